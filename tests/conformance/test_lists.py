"""README.md lists every test of transformers that is skipped or overridden here with its reason, and no other test."""

import inspect
import os
import re
import sys
from pathlib import Path

import pytest

README = Path(__file__).with_name("README.md")
UNKNOWN = "?"


def section(title: str) -> str:
    return README.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Return the cells of a section's table, without its head."""
    lines = re.findall(r"^\| (.+) \|$", section(title), re.MULTILINE)
    return [line.split(" | ") for line in lines][1:]


def names(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def write_skips(skipped: dict[str, set[str]]):
    """Write the table again, and keep the reasons that people gave."""
    why = {reason: said for reason, said, _ in rows("Skipped")}
    lines = [
        f"| {reason} | {why.get(reason, UNKNOWN)} | {', '.join(f'`{name}`' for name in sorted(tests))} |"
        for reason, tests in sorted(skipped.items())
    ]
    old = section("Skipped")
    head, rule = re.findall(r"^\|.*\|$", old, re.MULTILINE)[:2]
    before, _, _ = old.partition(head)
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(old, "\n".join([before + head, rule, *lines, ""])), encoding="utf-8")


@pytest.fixture(scope="module")
def skipped(what_ran) -> dict[str, set[str]]:
    """Reason → tests."""
    if not any(name.startswith("Gsva") for name in what_ran):
        pytest.skip("needs the other tests of this folder to have run: run `make conformance`")
    reasons: dict[str, set[str]] = {}
    for name, given in what_ran.items():
        for reason in given if name.startswith("Gsva") else ():
            reasons.setdefault(reason, set()).add(name)
    return reasons


def test_every_skip_is_listed_with_its_reason(skipped, what_ran):
    """`WRITE_LISTS=1 make conformance` writes the table; a person adds why a reason holds here."""
    from transformers.testing_utils import torch_device

    if os.environ.get("WRITE_LISTS"):
        write_skips(skipped)
    listed = {reason: names(tests) for reason, _, tests in rows("Skipped")}
    unlisted = {reason: tests - listed.get(reason, set()) for reason, tests in skipped.items()}
    assert {reason: tests for reason, tests in unlisted.items() if tests} == {}
    assert [reason for reason, why, _ in rows("Skipped") if why == UNKNOWN] == []
    # What a machine or a package is missing for may run elsewhere.
    stale = {
        reason: {name for name in tests if name in what_ran} - skipped.get(reason, set())
        for reason, tests in listed.items()
        if torch_device == "cpu" and not reason.startswith("test requires")
    }
    assert {reason: tests for reason, tests in stale.items() if tests} == {}


def test_every_override_is_listed_with_its_reason(skipped):
    found = {}
    for module in [
        module for name, module in list(sys.modules.items()) if name.rpartition(".")[2].startswith("test_common_")
    ]:
        for cls in [cls for name, cls in vars(module).items() if name.startswith("Gsva") and name.endswith("Test")]:
            for name, value in vars(cls).items():
                own = inspect.isfunction(value) and inspect.unwrap(value).__code__.co_filename == module.__file__
                others = [vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)]
                # transformers wraps inherited tests anew in each class
                is_same = own and any(
                    inspect.unwrap(other).__code__ is inspect.unwrap(value).__code__ for other in others
                )
                if own and name.startswith("test_") and others and not is_same:
                    found[f"{cls.__name__}.{name}"] = inspect.getdoc(value)
    listed = {name: why for cell, why in rows("Overridden") for name in names(cell)}
    assert found == listed
