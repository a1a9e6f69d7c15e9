"""Label maps and parts."""

import json

import data_trees as trees
import pytest
from data_trees import areas

import data_scripts
from data_scripts.check import check
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


# ---- other formats, hidden files, few bits, sizes ------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".png", ".PNG", ".webp", ".bmp", ".tif"])
@pytest.mark.parametrize("name", ["ade20k", "cocostuff", "mapillary"])
def test_images_and_label_maps_with_any_suffix(root, name, suffix):
    names = [["a", "b", "c"]] if name == "mapillary" else []
    getattr(trees, name)(root, *names, trees.full(1), trees.full(1))
    images = {
        "ade20k": "ade20k/images/training",
        "cocostuff": "coco/train2017",
        "mapillary": "mapillary/training/images",
    }[name]
    labels = {"ade20k": "ade20k/annotations/training", "cocostuff": "cocostuff/train2017",
              "mapillary": "mapillary/training/v2.0/labels"}[name]  # fmt: skip
    trees.picture(root / images / f"1{suffix}")
    (root / images / "1.jpg").unlink()
    (root / labels / "1.png").rename(root / labels / "1.PNG")
    for folder in (images, labels):
        for hidden in ("._0.jpg", "._0.png", ".DS_Store"):
            trees.write(root / folder / hidden, b"\0\5")
    rows = data_scripts.load(name, root)
    assert [row["image_id"] for row in rows] == ["0", "1"] and areas(rows, 1) == [1200]
    assert rows[1]["image"].size == (40, 30)


def test_what_is_left_out_is_named(root):
    trees.ade20k(root, trees.full(1))
    trees.write(root / "ade20k/images/training/notes.txt", "")
    trees.label_map(root / "ade20k/annotations/training/5.png", trees.full(1))
    text = str(check("ade20k", root))
    assert "ade20k: complete" in text and "left out, not read: 2 files" in text
    assert "notes.txt (is not an image)" in text and "5.png (has no partner of this name)" in text


def test_two_images_of_one_name(root):
    trees.ade20k(root, trees.full(1))
    trees.picture(root / "ade20k/images/training/0.png")
    with pytest.raises(ValueError, match=r"0\.jpg and 0\.png beside it have one name"):
        data_scripts.load("ade20k", root)


def test_a_label_map_of_another_size_than_its_image(root):
    trees.ade20k(root, trees.full(1))
    trees.picture(root / "ade20k/images/training/0.jpg", size=(80, 60))
    with pytest.raises(ValueError, match=r"0\.png: The image .*0\.jpg is 60 x 80 .*for 30 x 40"):
        data_scripts.load("ade20k", root)


@pytest.mark.parametrize("name", ["pascal_part", "paco_lvis"])
@pytest.mark.parametrize("value", [None, [], [[]], "", {}], ids=repr)
def test_a_part_without_a_mask_is_named(root, name, value):
    trees.parts(root, name, "dog:head", ())
    path = next(root.rglob("*train.json"))
    content = json.loads(path.read_text())
    content["annotations"][0].update(segmentation=value, bbox=[5, 5, 10, 10])
    trees.write(path, content)
    with pytest.raises(ValueError, match=r"annotation 1: it has bbox .*but no mask"):
        data_scripts.load(name, root)


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_an_id_of_a_part_that_stands_twice(root, kind):
    trees.parts(root, "pascal_part", "dog:head")
    path = root / "vlpart/pascal_part/train.json"
    content = json.loads(path.read_text())
    content[kind].append({**content[kind][0], "file_name": "2.jpg", "segmentation": []})
    trees.write(path, content)
    with pytest.raises(ValueError, match=rf"{kind}\[1\]: id 1 stands twice"):
        data_scripts.load("pascal_part", root)
