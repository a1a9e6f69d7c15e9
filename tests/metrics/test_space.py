"""The Space of the metric: what is pushed, and what its page computes. tests/test_hub.py pushes it and loads it back."""

import sys

import pytest
import yaml
from paths import ROOT

from metrics.publish import FOLDER, main, space_files

pytest.importorskip("evaluate")


@pytest.fixture
def app(monkeypatch):
    """The page's module, imported as a Space does: its folder is no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import app as module

    yield module
    sys.modules.pop("app")


def test_the_files_are_those_that_the_space_needs(capsys):
    assert main(["someone/gres", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in space_files()) and "nothing was pushed to someone/gres" in out
    assert {"README.md", "app.py", "requirements.txt", "gres.py", "functions.py", "presence.py"} <= set(space_files())
    assert all((FOLDER / name).is_file() for name in space_files())


def test_the_card_says_how_the_space_starts():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(text.split("---")[1])
    assert facts["sdk"] == "gradio" and facts["app_file"] == "app.py" and facts["title"] == "GRES"
    assert {"evaluate", "metric"} <= set(facts["tags"])
    assert set((FOLDER / "requirements.txt").read_text().split()) >= {"evaluate", "numpy", "pycocotools"}


def test_everything_that_the_module_imports_is_pushed():
    for name in space_files():
        if name.endswith(".py"):
            source = (ROOT / "metrics/gres" / name).read_text(encoding="utf-8")
            siblings = {line.split()[1][1:] + ".py" for line in source.splitlines() if line.startswith("from .")}
            assert siblings <= set(space_files()), name


def test_a_name_that_evaluate_would_not_find(capsys):
    assert main(["someone/metric"]) == 1
    error = capsys.readouterr().err
    assert "'someone/metric' is not named gres" in error and len(error.splitlines()) == 1


def test_the_page_computes_the_metrics_of_its_example(app):
    lines = {name: (value, note) for name, value, note in app.table(app.EXAMPLE)}
    assert lines["gIoU"] == ("0.8750", "") and lines["AUROC"] == ("1.0000", "")
    assert lines["REC"][0] == "-" and "rows hold boxes" in lines["REC"][1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no rows"),
        ("{", "line 1 is not JSON"),
        ("\n[1]", "line 2 is no object"),
        ('{"is_no_target": true}', "missing: intersection, union, is_rejected"),
    ],
)
def test_rows_that_are_wrong_are_named(app, text, message):
    with pytest.raises(ValueError, match=message):
        app.table(text)


def test_the_page_is_built(app):
    gradio = pytest.importorskip("gradio")
    assert isinstance(app.page(), gradio.Blocks)
