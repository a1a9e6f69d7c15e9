"""Files and folders are written whole or not at all, with the permissions of the umask, and templates escape their values."""

import json
import os

import jinja2
import pytest
import torch
from safetensors.torch import save_file

from data_scripts.files import new_folder, refuse_existing, render, replacing, write_json, write_text


@pytest.fixture
def umask():
    old = os.umask(0o027)
    yield 0o640
    os.umask(old)


def test_a_file_takes_its_name_when_it_is_whole(tmp_path, umask):
    path = tmp_path / "new" / "weights.safetensors"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == path.suffix and not path.exists()
        save_file({"weight": torch.ones(2)}, temporary)
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]
    assert path.stat().st_mode & 0o777 == umask


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "page.html", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "page.html") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("page.html", "old")]


def test_the_longest_file_name_can_be_written(tmp_path):
    name = "ä" * 125 + ".json"  # 255 bytes, the most that common file systems allow
    write_json(tmp_path / name, {"a": [1]})
    assert json.loads((tmp_path / name).read_text()) == {"a": [1]}


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path, umask):
    with new_folder(tmp_path / "model") as folder:
        (folder / "code").mkdir()
        save_file({"weight": torch.ones(2)}, folder / "code" / "weights.safetensors")
        assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/code/weights.safetensors").stat().st_mode & 0o777 == umask


def test_a_folder_is_never_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    with pytest.raises(FileExistsError, match="exists already"), new_folder(tmp_path / "empty"):
        pass
    with pytest.raises(FileExistsError), new_folder(tmp_path / "late") as folder:
        (tmp_path / "late").write_text("somebody else's")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "late"]


def test_a_dangling_link_counts_as_existing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        refuse_existing(tmp_path / "link")


def test_templates_escape_and_miss_nothing(tmp_path):
    (tmp_path / "page.html.jinja").write_text("<p>{{ text }}</p>\n")
    assert render(tmp_path / "page.html.jinja", text="<script>") == "<p>&lt;script&gt;</p>\n"
    with pytest.raises(jinja2.UndefinedError, match="text"):
        render(tmp_path / "page.html.jinja")
