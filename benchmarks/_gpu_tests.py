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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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


def left_out(file: str, why: str, root: Path) -> Iterator[Figure]:
    """Yield each marked test of a file that pytest could not read, found without importing it; the file where none is found."""
    tree = ast.parse((root / file).read_text(encoding="utf-8"))
    whole = any("mark.gpu" in ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign))
    names = [
        f"{file}::{node.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if whole or any("mark.gpu" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    yield from (Figure(name, None, "", f"left out: {why}") for name in names or [file])


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
            yield from left_out(file, "pytest is not installed", root)
        return
    end, bad, named, rest = time.monotonic() + 60 * minutes, [], set(), ""
    with tempfile.TemporaryDirectory() as folder:
        lines, output = Path(folder) / "lines", Path(folder) / "output"
        lines.touch()
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "benchmarks._gpu_tests", "-p", "no:cacheprovider", "--tb=line",
                   "--continue-on-collection-errors", *files]  # fmt: skip
        environment = {**os.environ, LINES: str(lines), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        with output.open("w") as log:
            process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            with lines.open(encoding="utf-8") as file:
                while True:
                    is_over = process.poll() is not None or time.monotonic() > end
                    while text := file.readline():
                        rest += text
                        if not rest.endswith("\n"):
                            continue  # half a line so far
                        line, rest = json.loads(rest), ""
                        named.add(line["name"].partition("::")[0])
                        bad += [line["name"]] * (line["outcome"] == "failed")
                        if line["outcome"] == "left out":
                            yield from left_out(line["name"], line["reason"], root)
                        else:
                            yield from figures_of(line)
                    if is_over:
                        break
                    time.sleep(0.2)
        finally:
            process.kill()
            code = process.wait()
        said = output.read_text(errors="replace").strip().splitlines()
        left = [file for file in files if file not in named]
        for file in left:
            yield from left_out(file, " ".join(said[-3:])[-300:], root)
    if bad:
        raise TestsFailed(f"{len(bad)} tests failed: {', '.join(bad[:5])}")
    if time.monotonic() > end or code < 0 or left:
        raise TestsFailed("not finished in time" if time.monotonic() > end else f"pytest ended with {code}")
