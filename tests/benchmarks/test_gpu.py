"""`python -m benchmarks gpu`: its listing, what it keeps after failures, and a dry run of all of it on the CPU."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks._gpu_parts import PARTS, Bench, Figure
from benchmarks._gpu_workload import TINY

CPU = Bench(TINY, torch.device("cpu"))


def test_the_listing_names_every_part(capsys):
    assert gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["tests", *PARTS]
    assert all(len(line) > 30 for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_what_can_be_done(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "loading"])
    assert "there is no CUDA device; --dry_run runs the same" in capsys.readouterr().err


def read(folder):
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.html").read_text()


def test_it_goes_on_after_a_failure_and_keeps_what_it_has(tmp_path, monkeypatch):
    def broken(bench):
        yield Figure("before", 1.5, "ms")
        raise RuntimeError("out of <memory>")

    monkeypatch.setitem(PARTS, "differences", broken)
    results = gpu.run(["differences", "loading"], CPU, 9, tmp_path, dry_run=True, say=lambda words: None)
    assert [result.state for result in results] == ["failed", "done"]
    facts, html = read(tmp_path)
    assert facts["parts"][0]["figures"] == [{"what": "before", "value": 1.5, "unit": "ms", "reason": ""}]
    assert facts["parts"][0]["reason"] == "RuntimeError: out of <memory>"
    assert (
        facts["versions"]["torch"] == torch.__version__.split("+")[0]
        or facts["versions"]["torch"] == torch.__version__
    )
    assert "out of &lt;memory&gt;" in html and "before" in html and "a dry run on tiny shapes" in html


def test_a_stop_keeps_what_it_has(tmp_path, monkeypatch):
    def stopped(bench):
        yield Figure("before", 2.0, "ms")
        raise KeyboardInterrupt

    monkeypatch.setitem(PARTS, "differences", stopped)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(["differences", "loading"], CPU, 9, tmp_path, dry_run=True, say=lambda words: None)
    parts = read(tmp_path)[0]["parts"]
    assert [(part["state"], part["reason"]) for part in parts] == [
        ("failed", "it was stopped"),
        ("skipped", "not reached"),
    ]
    assert parts[0]["figures"][0]["value"] == 2.0


def test_no_part_begins_when_the_time_is_over(tmp_path):
    (result,) = gpu.run(["loading"], CPU, 0, tmp_path, dry_run=True, say=lambda words: None)
    assert result.state == "skipped" and "--only loading" in result.reason
    assert "--only loading" in read(tmp_path)[1]


def test_what_cannot_be_measured_is_a_reason():
    def fails():
        raise NotImplementedError("no\nkernel")

    assert CPU.try_figure("x", "ms", fails) == Figure("x", None, "ms", "NotImplementedError: no kernel")
    assert CPU.try_figure("x", "ms", lambda: 1.0, cuda_only=True).reason == "needs a CUDA device"


def test_versions_outside_the_range_are_said(monkeypatch):
    usual = gpu.importlib.metadata.version

    def version(name):
        if name == "peft":
            raise gpu.importlib.metadata.PackageNotFoundError
        return "5.0.1" if name == "transformers" else usual(name)

    monkeypatch.setattr(gpu.importlib.metadata, "version", version)
    found, notes = gpu.versions()
    assert found["transformers"] == "5.0.1" and "peft" not in found
    assert any(note.startswith("transformers 5.0.1 is outside") for note in notes)
    assert "peft is not installed: tests and parts that need it are left out." in notes


def test_reports_of_pytest_are_read(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(record_property): record_property('distance', 0.25)\ndef test_b(): assert 1 == 2\n@pytest.mark.skip(reason='why')\ndef test_c(): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "junit_family=xunit1",
        f"--rootdir={tmp_path}",
        f"--junitxml={report}",
    ]
    subprocess.run([*command, str(tmp_path / "test_x.py")], capture_output=True, cwd=tmp_path, check=False)
    figures, reason = gpu.read_report(report)
    assert [figure.value is not None for figure in figures] == [True, True, False, False]
    assert figures[0] == Figure("distance", 0.25) and figures[1].unit == "s, passed"
    assert "1 == 2" in figures[2].reason and "why" in figures[3].reason
    assert reason == "1 tests failed: test_x.test_b"


@pytest.mark.slow
def test_dry_run_of_everything(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry_run", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    facts, _ = read(tmp_path)
    assert [part["name"] for part in facts["parts"]] == ["tests", *PARTS]
    assert all(part["state"] == "done" and part["figures"] for part in facts["parts"])
    missing = {figure["reason"] for part in facts["parts"] for figure in part["figures"] if figure["value"] is None}
    assert missing <= {"needs a CUDA device", "need a CUDA device; `pytest -m gpu --collect-only` lists them"}
