"""Every code block of README and docs/ runs, or is checked where it needs weights, a card or a port; those of the rooms are checked."""

import subprocess

import pytest
from documents import MARKS, anchors, blocks, check, check_command, links, make_reader_folder, run
from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = [
    *ROOT.glob("[!d]*/README.md"),
    ROOT / "data_scripts/README.md",
    ROOT / "demo/README.md",
    ROOT / "metrics/gres/README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "PARITY.md",
]
TRAINING = [page for page in PAGES if any("slow" in block.marks for block in blocks(page))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The folder of drawn images, which all pages share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def reader(tmp_path, cache, monkeypatch):
    """A folder like a checkout that a reader has just made, as working directory; nothing is written outside it."""
    import datasets.config

    make_reader_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def run_page(page, skipped):
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.marks & skipped:
            check(block)
        else:
            run(block, namespace)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_page_runs(page, reader):
    run_page(page, MARKS)


@pytest.mark.slow
@pytest.mark.parametrize("page", TRAINING, ids=lambda path: path.name)
def test_a_page_runs_with_its_training(page, reader):
    run_page(page, {"no-run"})


@pytest.mark.parametrize("page", REFERENCE, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_the_reference_are_understood(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks(page):
        check(block)


@pytest.mark.parametrize("page", [*PAGES, *REFERENCE], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_docs_are_found_from_their_index():
    named = {link.partition("#")[0] for link in links(ROOT / "docs/README.md")}
    assert {path.name for path in (ROOT / "docs").iterdir()} - {"README.md"} <= named


@pytest.mark.parametrize(
    "line",
    ["python run_gres.py --do_evaluate", "python run_gres.py configs/no_such.yaml", "make no_such_target", "rm -rf runs",
     "python -m evaluation.calibrate runs/a --min_T_acc 2", "python convert_checkpoint.py --base a --output b",
     "accelerate launch --no_such_option run_gres.py", "pip install -e '.[no_such]'", "python -m evaluation.no_such"],
)  # fmt: skip
def test_a_wrong_command_is_found(line):
    with pytest.raises((ValueError, SystemExit, ImportError)):
        check_command(line.split())


def test_a_wrong_block_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("documents.ROOT", tmp_path)
    page = tmp_path / "page.md"
    for text in ("```\nno language\n```\n", "```python never\n1\n```\n", "```python\nnot closed\n"):
        page.write_text(text)
        with pytest.raises(ValueError, match=r"page\.md"):
            blocks(page)
    page.write_text("```bash no-run\nif then\n```\n\n```python\n1 +\n```\n")
    broken, syntax = blocks(page)
    with pytest.raises(subprocess.CalledProcessError):
        check(broken)
    with pytest.raises(SyntaxError):
        check(syntax)
