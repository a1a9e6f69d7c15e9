"""Write files and folders whole or not at all, and pages from templates. Every room of the project may import this one.

It needs nothing of the project, and neither torch nor datasets.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield the path of a temporary file beside `path` that takes its place when the block ends.

    An older file is replaced in one step. If the block raises, the older file stays and the temporary one is removed.
    The file gets the permissions that the umask gives, whatever those of the library that wrote it (safetensors: 0600).

    Raises:
        OSError: The folder cannot be written.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with replacing(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [(path.name, path.read_text()) for path in folder.iterdir()]
    [('a.txt', 'whole')]
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix tells image and plotting libraries the format. The name is short: `path` may have the longest one allowed.
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}{path.suffix[:16]}")
    try:
        temporary.touch(exist_ok=False)
        permissions = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(permissions)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that gets its name when the block ends.

    If the block raises, the temporary folder is removed. All files in it get the permissions that the umask gives.

    Raises:
        FileExistsError: `path` exists and is not an empty folder. Nothing is overwritten.
        OSError: The folder above cannot be written.
    """
    path = Path(path)
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}")
    try:
        temporary.mkdir()
        yield temporary
        give_umask_permissions(temporary)
        refuse_existing(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes the place of the folder at `path` when the block ends.

    The temporary folder has a fixed name, so the next start removes what a killed process left. All files in it get
    the permissions that the umask gives.

    Raises:
        OSError: The folder above cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        give_umask_permissions(temporary)
        if path.exists():
            remove_folder(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def adding_files(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder `.saving` in `folder`, whose files move into `folder` one by one when the block ends.

    Files of the same name are replaced, others stay. The files get the permissions that the umask gives.

    Raises:
        OSError: The folder cannot be written.
    """
    folder = Path(folder)
    temporary = folder / ".saving"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        give_umask_permissions(temporary)
        for file in temporary.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: str | Path) -> None:
    """Remove a folder in two steps, so that a killed process does not leave half of it under its name."""
    path = Path(path)
    # One name for all checkpoints of a run, so that the next removal takes along what a killed process left.
    removed = path.with_name(f".old-{path.name.partition('-')[0]}")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def give_umask_permissions(folder: str | Path) -> None:
    """Give all files in `folder` and its subfolders the permissions that the umask gives, as a new file would get."""
    folder = Path(folder)
    permissions = folder.stat().st_mode & 0o666  # the folder was made under the same umask
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(permissions)


def refuse_existing(path: str | Path) -> None:
    """Raise FileExistsError if something is at `path`, except an empty folder."""
    path = Path(path)
    if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already and is not overwritten: give another name, or move it away.")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=indent))


def render(template: str | Path, **values: Any) -> str:
    """Return the text of a Jinja template file with `values` put in. Values are escaped for HTML and Markdown.

    A template may name others of its folder, and the frame of all pages (`templates/page.html.jinja` here).

    Raises:
        jinja2.UndefinedError: The template names a value that is not given.
    """
    template = Path(template)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(values)
