"""Label maps and parts."""

import data_trees as trees
import pytest
from data_trees import areas

import data_scripts
from data_scripts.masks import mask_area
from data_scripts.mixture import TrainingDataset
from data_scripts.transforms import SemanticTransform


def test_label_maps_are_shared_among_processes(root):
    trees.ade20k(root, *(trees.full(value) for value in range(1, 6)))
    alone = data_scripts.load("ade20k", root)
    shared = data_scripts.load("ade20k", root, cache_dir=str(root / "other"), num_proc=2)
    assert alone.remove_columns("image").to_list() == shared.remove_columns("image").to_list()


@pytest.mark.parametrize(
    ("name", "value"), [("cocostuff", 182), ("cocostuff", 254), ("mapillary", 3), ("ade20k", 151), ("ade20k", 254)]
)
def test_a_label_that_is_no_class(root, name, value):
    names = [["a", "b", "c"]] if name == "mapillary" else []
    getattr(trees, name)(root, *names, trees.full(value))
    with pytest.raises(ValueError, match=rf"0\.png holds the value {value}, which is no class of {name}"):
        data_scripts.load(name, root)


@pytest.mark.parametrize(("name", "value"), [("ade20k", 0), ("ade20k", 255), ("cocostuff", 255), ("cocostuff", 95)])
def test_a_label_map_with_nothing_to_ask_for(root, name, value):
    """0 is ade20k's "other", 255 ignored, 95 of cocostuff a class with a dash."""
    getattr(trees, name)(root, trees.full(value), trees.full(1))
    rows = data_scripts.load(name, root)
    assert areas(rows, 0) == [] and areas(rows, 1) == [30 * 40]
    assert TrainingDataset(rows, SemanticTransform())[0]["image_id"] == "1"


def test_equal_class_names_keep_their_own_masks(root):
    half = trees.full(0)
    half[:, 10:] = 1
    trees.mapillary(root, ["Car", "car"], half)
    rows = data_scripts.load("mapillary", root)
    assert [(entry["text"], mask_area(entry["mask"])) for entry in rows[0]["expressions"]] == [
        ("car", 300),
        ("car", 900),
    ]


@pytest.mark.parametrize(
    ("name", "category"), [("pascal_part", "dog"), ("pascal_part", "a:b:c"), ("paco_lvis", "a:b:c")]
)
def test_a_category_of_another_form(root, name, category):
    trees.parts(root, name, category)
    with pytest.raises(ValueError, match=f"category '{category}' is not of the form"):
        data_scripts.load(name, root)


def test_a_part_that_cannot_be_decoded_is_not_asked_for(root):
    trees.parts(root, "pascal_part", "dog:head", [[3, 4]])
    assert data_scripts.load("pascal_part", root)[0]["expressions"] == []


def test_a_missing_label_map_is_named(root):
    trees.ade20k(root, trees.full(1))
    (root / "ade20k/annotations/training/0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"training/0\.png is missing \(the label map of 0\.jpg\)"):
        data_scripts.load("ade20k", root)
