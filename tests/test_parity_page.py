"""Every cell "where" of PARITY.md names a file and a definition that exist, and pages name no file that does not."""

import ast
import re

import pytest
from paths import ROOT

ROWS = [line for line in (ROOT / "PARITY.md").read_text(encoding="utf-8").splitlines() if re.match(r"\| [MQ]\d", line)]
NAMES = [line.split()[1] for line in ROWS]
ELSEWHERE = ("transformers", "-")  # quirks that a library decides, or that have no counterpart here
ENTRY = re.compile(r"`(?P<file>[\w./]+\.py)`: (?P<names>`[\w.]+`(?:, `[\w.]+`)*)")
ROOMS = "modeling_gsva|data_scripts|metrics|evaluation|conversion|trainers|benchmarks|configs|assets|tests"
PATH = re.compile(rf"(?:{ROOMS})/[\w./-]+\.(?:py|md|ya?ml|jsonl?|txt|jinja)\b")
PAGES = [*ROOT.glob("*.md"), *(page for room in ROOMS.split("|") for page in (ROOT / room).rglob("*.md"))]


def definitions(source: str) -> set[str]:
    """Return the names that a module defines, those of classes' members as `Class.member`."""
    names: set[str] = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name))
            if isinstance(node, ast.ClassDef):
                add(node.body, node.name + ".")

    add(ast.parse(source).body, "")
    return names


def wrong_parts(where: str) -> list[str]:
    """Return the parts of a cell that name no existing file and definition."""
    if where in ELSEWHERE:
        return []
    wrong = []
    for part in where.split("; "):
        entry = ENTRY.fullmatch(part)
        if entry is None or not (path := ROOT / entry["file"]).is_file():
            wrong.append(part)
            continue
        defined = definitions(path.read_text(encoding="utf-8"))
        wrong += [f"{entry['file']}: {name}" for name in re.findall(r"[\w.]+", entry["names"]) if name not in defined]
    return wrong


def test_every_quirk_has_one_row():
    assert NAMES == [f"M{number}" for number in range(1, 20)] + [f"Q{number}" for number in range(1, 49)]


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_quirk_is_decided_where_its_row_says(row):
    cells = re.split(r"(?<!\\)\|", row)
    assert len(cells) == 7 and wrong_parts(cells[5].strip()) == []


@pytest.mark.parametrize(
    "where",
    ["`trainers/evaluation.py`: `truth_of`", "`evaluation/questions.py`: `truth_of`", "`evaluation/questions.py`", "questions"],
)  # fmt: skip
def test_a_cell_that_names_nothing_is_found(where):
    assert wrong_parts(where) == wrong_parts(f"`evaluation/questions.py`: `Question.overlap`; {where}") != []


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_files_that_a_page_names_exist(page):
    paths = PATH.findall(page.read_text(encoding="utf-8"))
    assert [path for path in paths if not (ROOT / path).exists() and not (page.parent / path).exists()] == []
