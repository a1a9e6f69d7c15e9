"""
The tests marked `gpu`, in a process of their own, and what becomes of each as soon as it is known.

pytest loads this file as a plugin (`-p benchmarks._gpu_tests`). It then adds a line of JSON to a file for each test, and for each
file of tests that cannot be imported, so that a test which hangs or kills the process loses no other's result.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks._gpu_report import ROOT, Figure

LINES = "GSVA_GPU_TESTS"  # the environment variable that names the file of lines


class TestsFailed(Exception):
    """Some of the tests failed; the message names them."""


def marked_files(folder: Path = ROOT / "tests") -> list[str]:
    """Return the files that hold tests marked `gpu`, without importing them."""

    def is_marked(path: Path) -> bool:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        return any(isinstance(node, ast.Attribute) and ast.unparse(node).endswith("mark.gpu") for node in nodes)

    return [
        path.relative_to(folder.parent).as_posix() for path in sorted(folder.rglob("test_*.py")) if is_marked(path)
    ]


def left_out(file: str, why: str, root: Path, told: set[str]) -> Iterator[Figure]:
    """
    Yield each marked test of a file of which nothing was told, found without importing it; the file where there is none at all.
    """
    tree = ast.parse((root / file).read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and "mark.gpu" in ast.unparse(node.value)]
    marks = {ast.unparse(target) for node in assigned for target in node.targets}  # say DEVICES, or pytestmark for all

    def is_marked(function: ast.FunctionDef) -> bool:
        nodes = [node for decorator in function.decorator_list for node in ast.walk(decorator)]
        by_name = any(isinstance(node, ast.Name) and node.id in marks for node in nodes)
        return "pytestmark" in marks or by_name or any(ast.unparse(node).endswith("mark.gpu") for node in nodes)

    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    names = [f"{file}::{node.name}" for node in functions if node.name.startswith("test_") and is_marked(node)]
    missing = [name for name in names if name not in told] if told & {file, *names} else names or [file]
    yield from (Figure(name, None, "", f"left out: {why}") for name in missing)


def _add(report, outcome: str) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
    reason = reason.removeprefix("Skipped: ")
    line = {"name": report.nodeid, "outcome": outcome, "seconds": getattr(report, "duration", 0.0),
            "reason": " ".join(reason.split())[-300:], "measured": getattr(report, "user_properties", [])}  # fmt: skip
    with open(os.environ[LINES], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report) -> None:
    """Add a test's line after its call, or where it ended before or after that."""
    if report.when == "call" or not report.passed:
        _add(report, report.outcome)


def pytest_collectreport(report) -> None:
    """Add the line of a file that cannot be imported, or leaves itself out."""
    if not report.passed:
        _add(report, "left out")


def figures_of(line: dict[str, Any]) -> Iterator[Figure]:
    """Return what a line says: what the test measured (pytest's `record_property`), and how it ended."""
    for what, value in line["measured"]:
        yield Figure(what, float(value))
    if line["outcome"] == "passed":
        yield Figure(line["name"], line["seconds"], "s, passed")
    else:
        yield Figure(line["name"], None, "", f"{line['outcome']}: {line['reason']}")


def run_tests(minutes: float, files: list[str] | None = None, root: Path = ROOT) -> Iterator[Figure]:
    """
    Run the tests marked `gpu` and yield what became of each.

    Raises:
        TestsFailed: after all figures, if a test failed or the time was over.
    """
    files = marked_files() if files is None else files
    if importlib.util.find_spec("pytest") is None:
        for file in files:
            yield from left_out(file, "pytest is not installed", root, set())
        return
    end, bad, rest = time.monotonic() + 60 * minutes, [], ""
    told: set[str] = set()  # tests, without their parameters
    with tempfile.TemporaryDirectory() as folder:
        lines, output = Path(folder) / "lines", Path(folder) / "output"
        lines.touch()
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "benchmarks._gpu_tests", "-p", "no:cacheprovider", "--tb=line",
                   "--continue-on-collection-errors", *files]  # fmt: skip
        environment = {**os.environ, LINES: str(lines), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        with output.open("w") as log:
            process = subprocess.Popen(
                command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            with lines.open(encoding="utf-8") as file:
                while True:
                    is_over = process.poll() is not None or time.monotonic() > end
                    while text := file.readline():
                        rest += text
                        if not rest.endswith("\n"):
                            continue  # half a line so far
                        line, rest = json.loads(rest), ""
                        bad += [line["name"]] * (line["outcome"] == "failed")
                        if line["outcome"] == "left out":
                            names = list(left_out(line["name"], line["reason"], root, told))
                            told |= {figure.what for figure in names}
                            yield from names
                        else:
                            told.add(line["name"].partition("[")[0])
                            yield from figures_of(line)
                    if is_over:
                        break
                    time.sleep(0.2)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes of tests on several cards
            code = process.wait()
        said = " ".join(output.read_text(errors="replace").strip().splitlines()[-3:])[-300:]
        left = [figure for file in files for figure in left_out(file, said, root, told)]
        yield from left
    if bad:
        raise TestsFailed(f"{len(bad)} tests failed: {', '.join(bad[:5])}")
    if time.monotonic() > end or code < 0 or left:
        raise TestsFailed("not finished in time" if time.monotonic() > end else f"pytest ended with {code}")
