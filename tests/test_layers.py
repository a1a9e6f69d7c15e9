"""The structure of the project: imports, names at the top level, and calls that would execute the content of a file."""

import ast
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

PARTS = (
    "modeling_gsva",
    "data_scripts",
    "metrics",
    "evaluation",
    "conversion",
    "trainers",
    "benchmarks",
    "demo",
    "examples",
    "run_gres",
    "convert_checkpoint",
    "tests",
)
# The parts that each part may import, beside itself. `evaluate.load` copies the metric module alone.
# Every part but modeling_gsva may also import EVERYWHERE, which needs nothing of the project.
EVERYWHERE = "data_scripts.files"
MAY_IMPORT = {
    "modeling_gsva": (),
    "data_scripts": (),
    "metrics": (),
    "evaluation": ("modeling_gsva", "data_scripts", "metrics"),
    "trainers": ("evaluation", "conversion", "modeling_gsva", "data_scripts", "metrics"),
    "run_gres": ("trainers", "evaluation", "modeling_gsva", "data_scripts", "metrics"),
    "conversion": ("modeling_gsva",),
    "convert_checkpoint": ("conversion",),
    "demo": ("evaluation", "modeling_gsva", "data_scripts", "metrics"),
    "examples": ("evaluation", "data_scripts"),
    "benchmarks": PARTS,
    "tests": PARTS,
}
TOP_LEVEL = {
    *(
        "modeling_gsva",
        "data_scripts",
        "metrics",
        "evaluation",
        "conversion",
        "trainers",
        "configs",
        "benchmarks",
        "demo",
        "examples",
        "docs",
        "tests",
        "assets",
        ".ci",
    ),
    *("convert_checkpoint.py", "run_gres.py", "setup.cfg", "pyproject.toml", "Makefile", "LICENSE", "NOTICE"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "PARITY.md", ".gitignore", ".pre-commit-config.yaml"),
}
FILES = sorted(
    path
    for part in PARTS
    for path in (ROOT.glob(f"{part}.py") if (ROOT / f"{part}.py").exists() else (ROOT / part).rglob("*.py"))
)
SOURCES = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, full name of the module) of every import in a file, wherever in it it stands."""
    found = []
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.append((node.lineno, ".".join([*base, *filter(None, [node.module])])))
    return found


def wrong_imports(path: Path) -> list[str]:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = {part, *MAY_IMPORT[part]}
    barred = {"torch", "transformers"} if part in ("data_scripts", "metrics") else set()
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(path)
        if (top := name.split(".")[0]) in barred
        or (top in PARTS and top not in allowed and not (name == EVERYWHERE and part != "modeling_gsva"))
    ]


def test_the_converter_takes_only_the_writer_of_data_scripts():
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] == "conversion"]
    names = {name for path in files for _, name in imports(path) if name.startswith("data_scripts")}
    assert files and names == {"data_scripts.files"}


def test_imports_point_one_way():
    assert len(SOURCES) > 40
    assert [fault for path in FILES for fault in wrong_imports(path)] == []


def test_an_import_in_the_wrong_direction_is_found(monkeypatch):
    monkeypatch.setitem(MAY_IMPORT, "trainers", ("modeling_gsva", "metrics"))
    assert any("imports data_scripts" in fault for path in SOURCES for fault in wrong_imports(path))


def test_the_writer_may_be_imported_everywhere_but_in_the_model(monkeypatch):
    monkeypatch.setitem(globals(), "imports", lambda path: [(1, EVERYWHERE)])
    assert wrong_imports(ROOT / "metrics" / "gres" / "__main__.py") == []
    assert wrong_imports(ROOT / "modeling_gsva" / "modeling_gsva.py") != []


def test_the_model_is_flat():
    """transformers copies siblings named in `from .x import y`, and nothing else, into a saved directory."""
    for path in (ROOT / "modeling_gsva").rglob("*.py"):
        assert path.parent == ROOT / "modeling_gsva", path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("modeling_gsva")):
                assert node.level == 1 and node.module and "." not in node.module, f"{path}:{node.lineno}"


def test_nothing_else_lies_at_the_top():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    assert {Path(line).parts[0] for line in listed.splitlines()} - TOP_LEVEL == set()


# ---- what no file of ours may do with somebody else's -----------------------------------------------------------------
REFUSED = {
    "pickle.load": "run whatever the file says",
    "pickle.loads": "run whatever the bytes say",
    "eval": "run a string",
    "exec": "run a string",
    "compile": "make code of a string",
    "__import__": "import what a string names",
    "os.system": "give a string to a shell",
    "os.popen": "give a string to a shell",
    "yaml.load": "make any object; take yaml.safe_load",
    "yaml.unsafe_load": "make any object; take yaml.safe_load",
    "shutil.unpack_archive": "write wherever the archive says",
    "joblib.load": "run whatever the file says",
    "dill.load": "run whatever the file says",
}


def dangers(source: str) -> list[tuple[int, str]]:
    """(line, why) of every call that runs what a file or string says, or writes where an archive says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in REFUSED:
            found.append((node.lineno, f"{name} would {REFUSED[name]}"))
        elif name == "torch.load" and options.get("weights_only") != "True":
            found.append((node.lineno, "torch.load needs weights_only=True"))
        elif name.split(".")[-1] in ("extractall", "extract") and options.get("filter") != "'data'":
            found.append((node.lineno, f"{name} needs filter='data'"))
        elif options.get("allow_pickle") == "True" or options.get("shell") == "True":
            found.append((node.lineno, f"{name} with allow_pickle or shell"))
    return found


def test_nothing_runs_what_a_file_says():
    faults = [
        (path.relative_to(ROOT), *fault) for path in SOURCES for fault in dangers(path.read_text(encoding="utf-8"))
    ]
    assert faults == []


@pytest.mark.parametrize(
    "line",
    ["pickle.load(file)", "torch.load(path)", "torch.load(path, weights_only=False)", "eval(text)", "yaml.load(text)",
     "subprocess.run(text, shell=True)", "np.load(path, allow_pickle=True)", "tar.extractall(folder)", "exec(code)"],
)  # fmt: skip
def test_what_runs_a_file_is_found(line):
    assert dangers(line)
    assert not dangers(
        "torch.load(p, weights_only=True); yaml.safe_load(t); model.eval(); tar.extractall(f, filter='data')"
    )
