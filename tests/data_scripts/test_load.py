"""`data_scripts.load`: names, splits, folders and options."""

import os

import data_trees as trees
import pytest

import data_scripts


def test_any_working_directory_will_do(root, tmp_path, monkeypatch):
    trees.ade20k(root, trees.full(1))
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(root)
    assert data_scripts.load("ade20k", relative)[0]["expressions"][0]["text"] == "wall"


@pytest.mark.parametrize("folder", ["my_images.jpg", "my_annotations", "cocostuff"])
def test_any_folder_name_will_do(root, folder):
    """The original replaces "images", "cocostuff" and ".jpg" in the whole path."""
    trees.ade20k(root / folder, trees.full(1))
    trees.cocostuff(root / folder, trees.full(0))
    assert data_scripts.load("ade20k", root / folder)[0]["image"].size == (trees.WIDTH, trees.HEIGHT)
    row = data_scripts.load("cocostuff", root / folder)[0]
    assert (row["image"].size, row["expressions"][0]["text"]) == ((trees.WIDTH, trees.HEIGHT), "person")


@pytest.mark.parametrize(
    ("name", "split", "there"),
    [("grefcoco", "test", "train, val"), ("refcoco", "dev", "train, val"), ("refcocog", "testA", "train, val")],
)
def test_a_split_that_does_not_exist_names_those_that_do(root, name, split, there):
    trees.referring(root, name, [trees.ref(0), trees.ref(1, split="val")])
    with pytest.raises(ValueError, match=f"no split '{split}'.*its splits are {there}"):
        data_scripts.load(name, root, split)


def test_an_unknown_name_lists_the_known_ones(root):
    with pytest.raises(ValueError, match="'refcoco3'.*refclef, refcoco, .*llava_instruct_150k"):
        data_scripts.load("refcoco3", root)


def test_a_missing_folder_is_named(root):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data_scripts.load("grefcoco", root / "nowhere")
    with pytest.raises(ValueError, match="needs data_dir"):
        data_scripts.load("grefcoco")


def test_options_that_a_set_does_not_take(root):
    with pytest.raises(ValueError, match="'grefcoco' takes no option size, seed"):
        data_scripts.load("grefcoco", root, size=3, seed=0)
