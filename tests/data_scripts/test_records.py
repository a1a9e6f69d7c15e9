"""Untrusted files: pickles of plain data."""

import os
import pickle
import unicodedata
from pathlib import Path

import data_trees as trees
import numpy as np
import pytest

from data_scripts.records import listing, parse_json, read_json, read_plain_pickle, require, similar_name


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


# ---- texts and names -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("advice", ["save it as UTF-8.", "download it again."])
def test_a_byte_order_mark_is_read_over_and_other_encodings_are_named(tmp_path, advice):
    text = '{"text": "caf\u00e9"}'
    path = tmp_path / "a.json"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.encode(encoding))
        assert read_json(path, advice) == {"text": "caf\u00e9"}
    assert parse_json("\ufeff" + text, "a.json") == {"text": "caf\u00e9"}
    for encoding, name in [("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("cp1252", "not UTF-8"), ("gbk", "not UTF-8")]:
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=rf"a\.json is .*{name}.*{advice}"):
            read_json(path, advice)


NFC, NFD = unicodedata.normalize("NFC", "caf\u00e9.jpg"), unicodedata.normalize("NFD", "caf\u00e9.jpg")


@pytest.mark.parametrize(
    ("there", "stated"),
    [("photos/1.JPG", "photos/1.jpg"), ("Photos/1.jpg", "photos/1.jpg"), ("photos/1.jpg", "photos\\1.jpg"),
     ("photos\\1.jpg", "photos/1.jpg"), (f"photos/{NFD}", f"photos/{NFC}"), (f"photos/{NFC}", f"photos/{NFD}"),
     ("PHOTOS/A/1.jpg", "photos\\a\\1.JPG"), ("photos/1.jpg", "photos/1.jpg ")],
)  # fmt: skip
def test_a_missing_file_names_the_one_of_a_similar_name(tmp_path, there, stated):
    trees.write(tmp_path / there, b"")
    assert f"there is {tmp_path / there}" in similar_name(tmp_path / stated)
    assert ("another Unicode form" in similar_name(tmp_path / stated)) == ("caf" in stated)
    with pytest.raises(FileNotFoundError, match="write the name like this"):
        require(tmp_path / stated, "an image")
    assert similar_name(tmp_path / "photos/2.jpg") == similar_name(tmp_path / "x/1.jpg") == ""


def test_names_that_begin_with_a_dot_are_no_data(tmp_path):
    for name in ("a.jpg", "B.JPG", "._a.jpg", ".DS_Store", "notes.txt"):
        trees.write(tmp_path / name, b"")
    assert listing(tmp_path, (".jpg",)) == {"B": tmp_path / "B.JPG", "a": tmp_path / "a.jpg"}
    assert listing(tmp_path / "none", (".jpg",)) == {}
    trees.write(tmp_path / "a.png", b"")
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png beside it have one name"):
        listing(tmp_path, (".jpg", ".png"))
