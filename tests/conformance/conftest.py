"""Collect the tests that ran and that were skipped, for test_lists.py."""

import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))  # for hf_common; pytest's import mode "importlib" adds no folders
ran: dict[str, set[str]] = {}  # test → the reasons for which it, or a part of it, was skipped


@pytest.hookimpl
def pytest_runtest_logreport(report):
    file, _, name = report.nodeid.partition("::")
    if Path(file).parent.name == FOLDER.name and name:
        reasons = ran.setdefault(name.replace("::", "."), set())
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            reasons.add(re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", reason))


@pytest.fixture(scope="session")
def what_ran() -> dict[str, set[str]]:
    return ran
