"""`python -m benchmarks gpu`: its listing, what it keeps after failures and stops, older libraries, and a dry run on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from paths import ROOT

from benchmarks import _gpu_parts, _gpu_report, _gpu_tests, gpu
from benchmarks._gpu_report import Figure
from benchmarks._gpu_workload import TINY

CPU = torch.device("cpu")
BENCH = _gpu_parts.Bench(TINY, CPU)


def test_the_listing_names_every_part(capsys):
    assert gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(gpu.PARTS)
    assert all(callable(getattr(_gpu_parts, name)) for name in gpu.PARTS if name != gpu.TESTS)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_s_own_dry_run_is_ours(tmp_path):
    """make itself would only print the command."""
    options = f"--only loading --output {tmp_path}"
    command = ["make", "gpu", "--dry-run", f"PYTHON={sys.executable}", f"GPU={options}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "\ntests  " in done.stdout, done.stdout + done.stderr
    (part,) = read(tmp_path)[0]["parts"]
    assert (part["name"], part["state"]) == ("loading", "done")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_what_can_be_done(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "loading"])
    assert "there is no CUDA device; --dry_run runs the same" in capsys.readouterr().err


def read(folder):
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.html").read_text()


def run(names, folder, part, minutes=9):
    return gpu.run(names, CPU, minutes, folder, part, say=lambda words: None)


def test_it_goes_on_after_a_failure_and_keeps_what_it_has(tmp_path):
    def part(name, device, minutes):
        yield Figure("before", 1.5, "ms")
        if name == "differences":
            raise RuntimeError("out of <memory>")
        if name == "evaluation":
            raise ImportError("cannot import name 'Sam2Config' from 'transformers'")

    results = run(["differences", "evaluation", "loading"], tmp_path, part)
    assert [result.state for result in results] == ["failed", "skipped", "done"]
    facts, html = read(tmp_path)
    assert facts["parts"][0]["figures"] == [{"what": "before", "value": 1.5, "unit": "ms", "reason": ""}]
    assert facts["parts"][0]["reason"] == "RuntimeError: out of <memory>"
    assert facts["parts"][1]["reason"] == "left out: cannot import name 'Sam2Config' from 'transformers'"
    assert facts["versions"]["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert "out of &lt;memory&gt;" in html and "before" in html and "a dry run on tiny shapes" in html


def test_a_stop_keeps_what_it_has(tmp_path):
    def part(name, device, minutes):
        yield Figure("before", 2.0, "ms")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["differences", "loading"], tmp_path, part)
    parts = read(tmp_path)[0]["parts"]
    reasons = [(part["state"], part["reason"]) for part in parts]
    assert reasons == [("failed", "it was stopped"), ("skipped", "not reached")]
    assert parts[0]["figures"][0]["value"] == 2.0


def test_figures_are_kept_before_the_part_ends(tmp_path):
    """So that a kill loses nothing either."""
    seen = []

    def part(name, device, minutes):
        yield Figure("first", 1.0)
        seen.append(read(tmp_path)[0]["parts"][0])
        yield Figure("second", 2.0)

    run(["differences"], tmp_path, part)
    assert [figure["what"] for figure in seen[0]["figures"]] == ["first"] and seen[0]["reason"] == "it was stopped"


def test_no_part_begins_when_the_time_is_over(tmp_path):
    (result,) = run(["loading"], tmp_path, gpu.figures_of, minutes=0)
    assert result.state == "skipped" and "--only loading" in result.reason
    assert "--only loading" in read(tmp_path)[1]


def test_what_cannot_be_measured_is_a_reason():
    def fails():
        raise NotImplementedError("no\nkernel")

    assert BENCH.try_figure("x", "ms", fails) == Figure("x", None, "ms", "NotImplementedError: no kernel")
    assert BENCH.try_figure("x", "ms", lambda: 1.0, cuda_only=True).reason == "needs a CUDA device"


def test_a_failed_figure_holds_no_memory(monkeypatch):
    """The frames of its traceback would keep its tensors, and the next figure would find the card full."""
    alive = []

    class Large:
        def __init__(self):
            alive.append(1)

        def __del__(self):
            alive.pop()

    def fails():
        large = Large()
        raise torch.OutOfMemoryError(f"{type(large)}")

    monkeypatch.setattr(_gpu_parts.gc, "collect", lambda: alive.append("looked") if not alive else None)
    assert "OutOfMemoryError" in BENCH.try_figure("x", "ms", fails).reason
    assert alive == ["looked"]


def test_the_planned_memory_is_that_of_the_documented_table():
    row = next(
        line
        for line in (ROOT / "trainers/README.md").read_text().splitlines()
        if line.startswith("| `finetune_gres_7b` | one_gpu")
    )
    assert _gpu_parts.planned_gib() == pytest.approx(float(row.split("|")[9]), abs=0.06)


def test_versions_outside_the_range_are_said(monkeypatch):
    usual = _gpu_report.importlib.metadata.version

    def version(name):
        if name == "peft":
            raise _gpu_report.importlib.metadata.PackageNotFoundError
        return "5.0.1" if name == "transformers" else usual(name)

    monkeypatch.setattr(_gpu_report.importlib.metadata, "version", version)
    found, notes = _gpu_report.versions()
    assert found["transformers"] == "5.0.1" and "peft" not in found
    assert any(note.startswith("transformers 5.0.1 is outside") for note in notes)
    assert any(note.startswith("peft is not installed: ") for note in notes)


@pytest.mark.parametrize(
    ("missing", "left_out"),
    [("peft", {"training_step", "feature_cache", "qlora_step"}), ("transformers", set(gpu.PARTS) - {gpu.TESTS})],
)
def test_a_library_that_is_missing_costs_the_parts_that_need_it(missing, left_out, tmp_path):
    """`None` in `sys.modules` is how Python marks a module that cannot be imported."""
    names = ["mask_decoder", "training_step", "feature_cache", "qlora_step", "sam_encoder"]
    script = (
        f"import sys; sys.modules[{missing!r}] = None; import benchmarks.gpu as gpu; "
        f"sys.exit(gpu.main(['--dry_run', '--output', {str(tmp_path)!r}, '--only', *{names!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = read(tmp_path)[0]["parts"]
    assert {part["name"] for part in parts if part["state"] == "skipped"} == left_out & set(names)
    assert all(missing in part["reason"] for part in parts if part["state"] == "skipped")


TESTS = """
import os, time, pytest
@pytest.mark.gpu
def test_a(record_property): record_property("distance", 0.25)
@pytest.mark.gpu
def test_b(): assert 1 == 2
@pytest.mark.gpu
@pytest.mark.skip(reason="why")
def test_c(): pass
def test_d(): assert False, "is not marked"
"""


def outcomes(tmp_path, minutes=5.0, **files):
    """Run files of tests; return figures, and what was raised at their end."""
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    result = _gpu_report.Result("tests", "tests")
    names = [f"{name}.py" for name in files]
    gpu.run_part(result, lambda: _gpu_tests.run_tests(minutes, names, tmp_path), lambda: None)
    return result.figures, result.reason


def test_tests_are_told_one_by_one(tmp_path):
    figures, reason = outcomes(tmp_path, test_x=TESTS, test_old="from transformers import NotYet\n")
    by_name = {figure.what: figure for figure in figures}
    assert by_name["distance"].value == 0.25 and by_name["test_x.py::test_a"].unit == "s, passed"
    assert "1 == 2" in by_name["test_x.py::test_b"].reason and "why" in by_name["test_x.py::test_c"].reason
    assert by_name["test_old.py"].reason.startswith("left out: ") and "NotYet" in by_name["test_old.py"].reason
    assert len(by_name) == 5 and reason == "1 tests failed: test_x.py::test_b"


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)"])
def test_a_test_that_ends_the_process_loses_no_other(tmp_path, end):
    figures, reason = outcomes(tmp_path, test_x=TESTS.replace("assert 1 == 2", end), test_y=TESTS)
    left = ["test_x.py::test_b", "test_x.py::test_c", *(f"test_y.py::test_{name}" for name in "abc")]
    assert [figure.what for figure in figures] == ["distance", "test_x.py::test_a", *left]
    assert figures[2].reason.startswith("left out") and "pytest ended with" in reason


def test_a_test_that_hangs_loses_no_other(tmp_path):
    figures, reason = outcomes(tmp_path, 0.25, test_x=TESTS.replace("assert 1 == 2", "time.sleep(600)"))
    assert [figure.what for figure in figures[:2]] == ["distance", "test_x.py::test_a"]
    assert [figure.what for figure in figures[2:]] == ["test_x.py::test_b", "test_x.py::test_c"]
    assert reason == "not finished in time"


def test_tests_that_an_older_library_leaves_out_are_named(tmp_path):
    figures, _ = outcomes(tmp_path, test_old="from transformers import NotYet\n" + TESTS)
    assert [figure.what for figure in figures] == [f"test_old.py::test_{name}" for name in "abc"]
    assert all(figure.reason.startswith("left out: ") and "NotYet" in figure.reason for figure in figures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, on which they would run")
def test_nothing_is_left_out_of_this_project_s_tests():
    """Each marked test is told, and no test that is not marked: here, that each needs a device."""
    files = _gpu_tests.marked_files()
    assert "tests/modeling_gsva/test_host_reads.py" in files and "tests/test_parity.py" in files
    figures = list(_gpu_tests.run_tests(9))
    assert {figure.what.partition("::")[0] for figure in figures} == set(files)
    assert len(figures) > 20 and all(figure.reason.startswith("skipped: needs ") for figure in figures), figures


def test_a_signal_keeps_what_there_is(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "gpu",
        "--dry_run",
        "--output",
        str(tmp_path),
        "--only",
        "sam_encoder",
        "loading",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    end = time.monotonic() + 120
    while not (tmp_path / "gpu.json").exists() or not read(tmp_path)[0]["parts"][0]["figures"]:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; " in said
    parts = read(tmp_path)[0]["parts"]
    assert parts[0]["figures"] and [part["reason"] for part in parts] == ["it was stopped", "not reached"]


@pytest.mark.slow
def test_dry_run_of_everything(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    facts, _ = read(tmp_path)
    assert [part["name"] for part in facts["parts"]] == list(gpu.PARTS)
    assert all(part["state"] == "done" and part["figures"] for part in facts["parts"])
    missing = {figure["reason"] for part in facts["parts"] for figure in part["figures"] if figure["value"] is None}
    assert all(reason.startswith("skipped: ") or reason == "needs a CUDA device" for reason in missing), missing
