"""Files of strangers: pickles of plain data."""

import os
import pickle
from pathlib import Path

import data_trees as trees
import numpy as np
import pytest

from data_scripts.records import read_plain_pickle


class _Evil:
    def __reduce__(self):
        return os.system, ("echo broken in",)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_plain_data_are_read(tmp_path, protocol):
    content = [{"a": [1, 2.5, None, True, "caf\u00e9"], "b": ("x", {"y"})}]
    assert read_plain_pickle(trees.write(tmp_path / "x.p", pickle.dumps(content, protocol))) == content


def test_pickles_of_python_2_are_read(tmp_path):
    content = b"(lp0\n(dp1\nS'sent'\np2\nS'a cat'\np3\nsS'id'\np4\nL7L\nsa."
    assert read_plain_pickle(trees.write(tmp_path / "x.p", content)) == [{"sent": "a cat", "id": 7}]


@pytest.mark.parametrize(
    ("thing", "named"),
    [(_Evil(), "posix.system"), (Path("x"), "pathlib"), (np.float64(1), "numpy"), (print, "builtins.print")],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_anything_else_are_refused_by_name(tmp_path, thing, named, protocol, capfd):
    path = trees.write(tmp_path / "refs.p", pickle.dumps([thing], protocol))
    with pytest.raises(ValueError, match=r"refs\.p is not a pickle of plain data: it wants to load .*") as raised:
        read_plain_pickle(path)
    assert named in str(raised.value).replace("__builtin__", "builtins").replace("nt.system", "posix.system")
    assert "broken in" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"(lp0\n", b"not a pickle", pickle.dumps([1, 2])[:-3]])
def test_damaged_pickles_are_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"refs\.p is (damaged|not a pickle of plain data)"):
        read_plain_pickle(trees.write(tmp_path / "refs.p", content))
