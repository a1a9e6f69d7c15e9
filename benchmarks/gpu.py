"""Run what has never run without a card: the tests marked `gpu`, then workload L, on one CUDA device.

    python -m benchmarks gpu [--minutes 9] [--only PART …] [--output runs/gpu] [--dry_run]

Needs no network: weights of the 7B model's true shapes are drawn at random on the card, and so are the images. It runs with the
libraries that are installed, and says which are older than setup.cfg allows and what that leaves out. A part that fails does not
end it, and what it has when it is stopped or out of time is kept: gpu.json and gpu.html are written anew after each part.

`--dry_run` lists what would be run, and runs all of it on tiny shapes on the CPU; what needs a card is named.
"""

from __future__ import annotations

import argparse
import configparser
import importlib.metadata
import importlib.util
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from packaging.requirements import Requirement

from benchmarks._gpu_parts import PARTS, Bench, Figure, title_of
from benchmarks._gpu_workload import LARGE, TINY, free
from data_scripts.files import render, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests"  # the part that runs the tests marked `gpu`
STATES = ("done", "failed", "skipped")


@dataclass
class Result:
    """What became of a part: its state, the reason of one that is not done, and its figures."""

    name: str
    title: str
    state: str = "skipped"
    reason: str = "not reached"
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)


def declared() -> list[Requirement]:
    """Return what setup.cfg requires to run and to test; nothing where the project is installed without it."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config.get("options", "install_requires", fallback="").splitlines()
    lines += config.get("options.extras_require", "test", fallback="").splitlines()
    return [Requirement(line) for line in map(str.strip, lines) if line and not line.startswith("#")]


def versions() -> tuple[dict[str, str], list[str]]:
    """Return the versions of what is declared, and sentences about those outside their range."""
    found, notes = {"python": platform.python_version()}, []
    for requirement in declared():
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            notes.append(f"{requirement.name} is not installed: tests and parts that need it are left out.")
            continue
        found[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            notes.append(
                f"{requirement.name} {version} is outside {requirement.specifier}: what it lacks shows as failed."
            )
    return found, notes


def device_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": f"a CPU ({platform.machine()})"}
    facts = torch.cuda.get_device_properties(device)
    return {
        "device": facts.name, "memory_gib": round(facts.total_memory / 2**30, 1),
        "capability": f"{facts.major}.{facts.minor}", "cuda": torch.version.cuda,
    }  # fmt: skip


def run_tests(bench: Bench, minutes: float) -> tuple[list[Figure], str]:
    """Run the tests marked `gpu` in a process of their own; return figures, and what failed or could not be collected."""
    if importlib.util.find_spec("pytest") is None:
        return [Figure("tests", None, "", "pytest is not installed")], ""
    if not bench.is_cuda:
        return [
            Figure("tests marked gpu", None, "", "need a CUDA device; `pytest -m gpu --collect-only` lists them")
        ], ""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "--continue-on-collection-errors", "-q",
                   "-o", "junit_family=xunit1", f"--junitxml={report}"]  # fmt: skip
        try:
            subprocess.run(command, cwd=ROOT, timeout=60 * minutes, capture_output=True, check=False)
        except subprocess.TimeoutExpired:
            return [Figure("tests", None, "", f"not finished in {minutes:.1f} minutes")], "the time was over"
        if not report.is_file():
            return [Figure("tests", None, "", "pytest wrote no report")], "pytest did not run"
        return read_report(report)


def read_report(path: Path) -> tuple[list[Figure], str]:
    """Return the figures of pytest's own JUnit file, which this process has just made, and the names of what failed."""
    figures, bad = [], []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}".lstrip(".")
        trouble = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), None)
        measured = [(one.get("name", ""), one.get("value", "")) for one in case.iter("property")]
        figures += [Figure(what, float(value), "") for what, value in measured]  # by pytest's `record_property`
        if trouble is None:
            figures.append(Figure(name, float(case.get("time", 0)), "s, passed"))
            continue
        element = case.find(trouble)
        message = " ".join((element.get("message") or "" if element is not None else "").split())[:200]
        figures.append(Figure(name, None, "", f"{trouble}: {message}"))
        if trouble != "skipped":
            bad.append(name)
    return figures, f"{len(bad)} tests failed: {', '.join(bad[:5])}" if bad else ""


def run_part(result: Result, bench: Bench, minutes: float) -> None:
    """Run a part into its result; a failure is written into it."""
    begun, result.state, result.reason = time.perf_counter(), "failed", "it was stopped"
    try:
        if result.name == TESTS:
            result.figures, result.reason = run_tests(bench, minutes)
        else:
            for figure in PARTS[result.name](bench):
                result.figures.append(figure)
            result.reason = ""
        result.state = "failed" if result.reason else "done"
    except Exception as error:  # noqa: BLE001
        result.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        result.seconds = time.perf_counter() - begun
        free(bench.device)


def page(facts: dict[str, Any], results: list[Result]) -> str:
    """Return the page."""
    parts = [asdict(result) for result in results]
    for part in parts:
        for figure in part["figures"]:
            value = figure["value"]
            figure["shown"] = "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return render(Path(__file__).resolve().parent / "templates/gpu.html.jinja", facts=facts, parts=parts)


def write(output: Path, facts: dict[str, Any], results: list[Result]) -> None:
    write_json(output / "gpu.json", {**facts, "parts": [asdict(result) for result in results]})
    write_text(output / "gpu.html", page(facts, results))


def listing() -> str:
    """Return what is run, one line a part."""
    lines = [f"{TESTS:<16}the tests marked gpu, in a process of their own"]
    return "\n".join([*lines, *(f"{name:<16}{title_of(name)}" for name in PARTS)])


def run(
    names: list[str], bench: Bench, minutes: float, output: Path, dry_run: bool, say: Callable[[str], None] = print
) -> list[Result]:
    """Run parts one after the other until the time is over, and write JSON and page after each."""
    end = time.monotonic() + 60 * minutes
    found, notes = versions()
    facts = {**device_facts(bench.device), "date": time.strftime("%Y-%m-%d %H:%M"), "dry_run": dry_run,
             "workload": re.sub(r"torch\.", "", str(bench.work)), "versions": found, "notes": notes}  # fmt: skip
    results = [Result(name, "tests marked gpu" if name == TESTS else title_of(name)) for name in names]
    try:
        for result in results:
            left = (end - time.monotonic()) / 60
            if left <= 0:
                result.reason = f"the {minutes:g} minutes were over; run it with --only {result.name}"
                continue
            say(f"{result.name} ...")
            run_part(result, bench, left)
            say(f"{result.name}: {result.state} in {result.seconds:.1f} s {result.reason}".rstrip())
            write(output, facts, results)
    finally:  # also when it is stopped
        write(output, facts, results)
    return results


def _stop(*_):
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no part later than this (default: 9)")
    parser.add_argument("--only", nargs="+", choices=[TESTS, *PARTS], help="run these parts alone")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder (default: runs/gpu)")
    parser.add_argument("--dry_run", action="store_true", help="list the parts and run them on tiny shapes on the CPU")
    parser.add_argument("--list", action="store_true", help="only list the parts")
    arguments = parser.parse_args(argv)
    if arguments.dry_run or arguments.list:
        print(listing(), flush=True)
    if arguments.list:
        return 0
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry_run runs the same on tiny shapes on the CPU.")
    signal.signal(signal.SIGTERM, _stop)  # so that what there is is written
    bench = Bench(TINY, torch.device("cpu")) if arguments.dry_run else Bench(LARGE, torch.device("cuda", 0))
    names = [name for name in (TESTS, *PARTS) if name in (arguments.only or (TESTS, *PARTS))]
    results = run(names, bench, arguments.minutes, arguments.output, arguments.dry_run)
    print(f"{arguments.output / 'gpu.html'} and gpu.json: " + ", ".join(
        f"{sum(result.state == state for result in results)} {state}" for state in STATES))  # fmt: skip
    return int(any(result.state == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
