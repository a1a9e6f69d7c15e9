"""
A server on loopback with the part of the Hub's API that `push_to_hub`, `upload_folder` and `from_pretrained` need.

    with HubStandIn() as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(cache_folder)})
        hub.files("model", "someone/gsva")  # {path: bytes} of the newest commit

Repositories are in memory and have one branch. Weights and tables are uploaded by LFS, as on the Hub; Xet is switched off.
Writing requires the token.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

USER, TOKEN = "someone", "hf_stand_in"
DATE = "2024-01-01T00:00:00.000Z"
TYPES = ("model", "dataset", "space")


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".parquet", ".arrow"))


def oid(path: str, content: bytes) -> str:
    """The name of a file's content: LFS's, or git's."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections
    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/(?:(?:dataset|space)s/)?[^/]+/[^/]+\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(\w+)", "lfs_upload"),
        ("POST", r"/api/(\w+)s/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(\w+)s/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/(\w+)s/([^/]+/[^/]+)/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/(\w+)s/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", "tree"),
        ("GET", r"/api/(\w+)s/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def answer(self):
        method = "GET" if self.command == "HEAD" else self.command
        url = urlsplit(self.path)
        self.body, self.query = self.read_body(), parse_qs(url.query)
        self.server.requests.append((self.command, url.path))
        try:
            for wanted, pattern, name in self.routes:
                # Quoted slashes belong to a name: unquoted after matching.
                if method == wanted and (match := re.fullmatch(pattern, url.path)):
                    if method == "POST" and name not in ("paths_info", "validate"):
                        self.check_token()
                    return getattr(self, name)(*(unquote(group or "") for group in match.groups()))
            raise Refused(404, "NotFound", f"The stand-in does not know {self.command} {url.path}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": str(refused)}
            self.send({"error": str(refused)}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, content, status=200, headers=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def check_token(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "Unauthorized", "Invalid username or password.")

    def repository(self, kind: str, name: str) -> list[tuple[str, dict[str, bytes]]]:
        if (kind or "model", name) not in self.server.repositories:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return self.server.repositories[kind or "model", name]

    def at(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """(commit, files) of a revision."""
        commits = self.repository(kind, name)
        for commit, files in reversed(commits):
            if revision in ("", "main", commit):
                return commit, files
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def url(self, kind: str, name: str) -> str:
        return f"{self.server.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{name}"

    def whoami(self):
        self.check_token()
        self.send({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {}})

    def validate(self):
        self.send({"errors": [], "warnings": []})

    def create(self):
        wanted = json.loads(self.body)
        kind, name = wanted.get("type") or "model", f"{wanted.get('organization') or USER}/{wanted['name']}"
        if kind not in TYPES:
            raise Refused(400, "BadRequest", f"Unknown type {kind}")
        exists = (kind, name) in self.server.repositories
        first = hashlib.sha1(f"{kind} {name}".encode()).hexdigest(), {}
        self.server.repositories.setdefault((kind, name), [first])
        self.send({"url": self.url(kind, name), "name": name, "id": name}, 409 if exists else 200)

    def preupload(self, kind, name, revision):
        _, files = self.at(kind, name, revision)
        modes = [
            {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
            | ({"oid": oid(path, files[path])} if path in files else {})
            for path in (entry["path"] for entry in json.loads(self.body)["files"])
        ]
        self.send({"files": modes})

    def lfs_batch(self):
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.large:
                entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{entry['oid']}"}}
        self.send({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_upload(self, name):
        if hashlib.sha256(self.body).hexdigest() != name:
            raise Refused(400, "BadRequest", f"The content is not {name}")
        self.server.large[name] = self.body
        self.send({})

    def commit(self, kind, name, revision):
        parent, files = self.at(kind, name, revision)
        files = dict(files)
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                if value.get("parentCommit", parent) != parent:
                    raise Refused(412, "PreconditionFailed", "A commit has happened since.")
            elif key == "file" and value["encoding"] == "base64":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: c for path, c in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
            else:
                raise Refused(400, "BadRequest", f"The stand-in does not know {key}")
        commit = hashlib.sha1(parent.encode() + self.body).hexdigest()
        self.repository(kind, name).append((commit, files))
        url = f"{self.url(kind, name)}/commit/{commit}"
        self.send({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    @staticmethod
    def entry(path: str, files: dict[str, bytes]) -> dict | None:
        """A file or folder as the Hub lists it."""
        if path in files:
            size, name = len(files[path]), oid(path, files[path])
            lfs = {"lfs": {"oid": name, "size": size, "pointerSize": 130}} if is_large(path) else {}
            return {"type": "file", "path": path, "size": size, "oid": name, **lfs}
        if any(file.startswith(f"{path}/") for file in files):
            return {"type": "directory", "path": path, "size": 0, "oid": oid("", path.encode())}
        return None

    def paths_info(self, kind, name, revision):
        _, files = self.at(kind, name, revision)
        is_json = "json" in self.headers.get("Content-Type", "")
        wanted = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        self.send([found for path in wanted if (found := self.entry(path.strip("/"), files))])

    def tree(self, kind, name, revision, folder):
        _, files = self.at(kind, name, revision)
        folder = f"{folder}/" if folder else ""
        inside = [path[len(folder) :].split("/") for path in files if path.startswith(folder)]
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        depth = 99 if self.query.get("recursive", ["false"])[0].lower() in ("true", "1") else 1
        shown = {folder + "/".join(parts[:n]) for parts in inside for n in range(1, min(len(parts), depth) + 1)}
        self.send([self.entry(path, files) for path in sorted(shown)])

    def info(self, kind, name, revision):
        commit, files = self.at(kind, name, revision)
        about = {"_id": commit[:24], "id": name, "author": name.split("/")[0], "sha": commit, "lastModified": DATE}
        about |= {"createdAt": DATE, "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        siblings = [{"rfilename": path, "size": len(content)} for path, content in sorted(files.items())]
        self.send({**about, "tags": [], "siblings": siblings})

    def resolve(self, kind, name, revision, path):
        commit, files = self.at(kind, name, revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path not in files:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
        content, status = files[path], 200
        headers["ETag"] = f'"{oid(path, content)}"'
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            content, status = content[begin : end + 1], 206
        self.send(content, status, headers)


class HubStandIn(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], list[tuple[str, dict[str, bytes]]]] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def environment(self, cache) -> dict[str, str]:
        """For a process of its own: the endpoint is read when huggingface_hub is imported."""
        return {
            "HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_EVALUATE_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip

    def put(self, name: str, folder: Path) -> None:
        """Let a folder be the model of that name."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories["model", name] = [(hashlib.sha1(f"model {name}".encode()).hexdigest(), files)]

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        """{path: content} of the newest commit."""
        return self.repositories[kind, name][-1][1]
