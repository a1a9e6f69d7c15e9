"""The notebook runs from its first cell to its last, and is committed without outputs."""

import json
import sys

import pytest
from documents import links, make_reader_folder
from paths import ROOT

nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbclient and ipykernel: pip install '.[test]'")
NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_committed_clean(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), cell.id


def test_its_links_lead_somewhere(notebook, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"))
    assert len(links(page)) > 3
    assert [link for link in links(page) if not (ROOT / "docs" / link).exists()] == []


def test_it_runs_to_its_end(notebook, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    make_reader_folder(tmp_path)
    # The kernel of this environment, whatever kernels the machine knows; nothing is written outside the folder.
    for name, value in {
        "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"), "IPYTHONDIR": str(tmp_path / "ipython"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": launch, "language": "python", "display_name": "Python 3"}))
    done = NotebookClient(notebook.copy(), timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in done.cells if cell.cell_type == "code"]
    text = "".join(str(output) for output in outputs[-2])
    assert "'text/plain': '0'" in text and "trained 6 steps" in text
    assert any("image/png" in output.get("data", {}) for output in outputs[2])
    assert (tmp_path / "runs/first_steps/model/report.html").is_file()
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"first_steps"} and (
        tmp_path / "shapes.png"
    ).is_file()
