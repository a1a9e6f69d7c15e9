"""`make matrix` installs the ends of the ranges in setup.cfg, and other libraries as in configs/constraints.txt."""

import re

import matrix
import pytest
from packaging.specifiers import SpecifierSet


def test_each_end_installs_what_setup_cfg_declares():
    declared = matrix.ranges()
    known = dict(
        line.split("==")
        for line in (matrix.ROOT / "configs" / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    oldest, newest = list(matrix.constraints("oldest")), list(matrix.constraints("newest"))
    for library in matrix.LIBRARIES:
        bounds = SpecifierSet(declared[library])
        assert {specifier.operator for specifier in bounds} == {">=", "<"}, f"{library} wants both ends"
        (pin,) = [line for line in oldest if line.startswith(library + "==")]
        assert pin.split("==")[1] in bounds and known[library] in bounds
        assert library + declared[library] in newest
    for lines in (oldest, newest):
        names = [re.match(r"[\w.-]+", line)[0] for line in lines]
        assert len(set(names)) == len(names) and not set(matrix.FOLLOWING) & set(names)
        assert f"torch=={known['torch']}" in lines and f"numpy=={known['numpy']}" in lines


def test_a_library_without_lower_bound_is_named(monkeypatch):
    monkeypatch.setattr(matrix, "ranges", lambda: dict.fromkeys(matrix.LIBRARIES, "<6"))
    with pytest.raises(ValueError, match="transformers has no lower bound, only '<6'"):
        list(matrix.constraints("oldest"))
