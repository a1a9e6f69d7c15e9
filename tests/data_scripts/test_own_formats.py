"""Own data as annotation tools write it: the same cat of 100 pixels and dogs of 100 and 50, and what is absent."""

import base64
import io
import math

import data_trees as trees
import numpy as np
import pytest
from data_trees import SMALL, SQUARE, corners, shape, yolo_line
from PIL import Image

import data_scripts
from data_scripts.check import check


def rows_of(root, split="train"):
    """[(image id, {text: (pixels, num_targets)})] of a split."""
    return [
        (row["image_id"], {entry["text"]: (area, entry["num_targets"]) for entry, area in zip(row["expressions"], trees.areas([row]))})
        for row in data_scripts.load("own", root, split=split)
    ]  # fmt: skip


EXPECTED = {"cat": (100, 1), "dog": (150, 2), "a unicorn": (0, 0)}


def numbers():
    values = np.zeros((trees.HEIGHT, trees.WIDTH), np.uint8)
    values[5:15, 5:15], values[20:25, 20:30] = 1, 2
    return values


# ---- labelme -----------------------------------------------------------------------------------------------------------
def test_labelme_in_the_folder_itself(root):
    shapes = [shape("cat", corners(SQUARE)), shape("dog", corners(SQUARE)), shape("dog", corners(SMALL))]
    trees.labelme(root, *shapes, absent=["a unicorn"])
    assert rows_of(root) == [("a.jpg", EXPECTED)]
    finding = check("own", root)
    assert not finding.problems and (finding.expressions, finding.no_target) == (3, 1)


def test_labelme_in_a_folder_per_split(root):
    trees.labelme(root, shape("cat", corners(SQUARE)), folder="train")
    trees.labelme(root, shape("cat", corners(SQUARE)), stem="b", folder="val", imagePath="..\\val\\b.jpg")
    assert rows_of(root) == [("train/a.jpg", {"cat": (100, 1)})]
    assert rows_of(root, "val") == [("val/b.jpg", {"cat": (100, 1)})]


def test_labelme_shapes_of_one_group_are_one_thing(root):
    trees.labelme(root, shape("dog", corners(SQUARE), group_id=1), shape("dog", corners(SMALL), group_id=1))
    assert rows_of(root) == [("a.jpg", {"dog": (150, 1)})]


def png(mask):
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_labelmes_other_shapes_are_drawn_as_what_they_are(root):
    patch = np.zeros((10, 10), bool)
    patch[:5] = True
    trees.labelme(
        root,
        shape("rectangle", [[15, 15], [5, 5]], shape_type="rectangle"),
        shape("circle", [[20, 15], [28, 15]], shape_type="circle"),
        shape("mask", [[5, 5], [14, 14]], shape_type="mask", mask=png(patch)),
    )
    found = rows_of(root)[0][1]
    assert found["rectangle"] == (100, 1) and found["mask"] == (50, 1)
    assert abs(found["circle"][0] - math.pi * 8**2) < 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (shape("a line", [[1, 1], [9, 9]], shape_type="line"), "'a line'.*its shape is a 'line'"),
        (shape("a point", [[1, 1]], shape_type="point"), "its shape is a 'point'"),
        (shape("a rectangle", [[1, 1]], shape_type="rectangle"), "two opposite corners"),
        (shape("a mask", [[5, 5], [14, 14]], shape_type="mask", mask=None), "the field 'mask'"),
        (shape("a mask", [[35, 5], [44, 14]], shape_type="mask", mask=png(np.ones((10, 10), bool))), "does not fit"),
        (shape("cat", []), "has no points"),
        (shape("cat", [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9]]), "between 0 and 1"),
        (shape("cat", [[1, 1], [9, "x"], [9, 9]]), "could not convert"),
    ],
)
def test_a_labelme_shape_that_has_no_area_is_named(root, wrong, message):
    trees.labelme(root, shape("cat", corners(SQUARE)), wrong)
    with pytest.raises(ValueError, match=rf"(?s)a\.json.*{message}"):
        data_scripts.load("own", root)


def test_labelme_states_another_size(root):
    trees.labelme(root, shape("cat", corners(SQUARE)), imageHeight=60, imageWidth=80)
    with pytest.raises(ValueError, match=r"a\.jpg is 30 x 40 .*for 60 x 80"):
        data_scripts.load("own", root)


# ---- COCO --------------------------------------------------------------------------------------------------------------
def both_dogs(**more):
    content = trees.coco((1, 1, [SQUARE]), (1, 2, [SQUARE]), (1, 2, [SMALL]), **more)
    content["images"][0]["absent"] = ["a unicorn"]
    return content


def test_roboflow(root):
    trees.roboflow(root, both_dogs())
    trees.roboflow(root, trees.coco((1, 1, [SQUARE]), images=("b.jpg",)), "valid")
    assert rows_of(root) == [("1", EXPECTED)]
    assert rows_of(root, "valid") == [("1", {"cat": (100, 1)})]
    assert data_scripts.load("own", root)[0]["image"].filename == str(root / "train/a.jpg")


@pytest.mark.parametrize("folder", ["images", "images/default", "default"])
def test_cvat(root, folder):
    trees.cvat(root, both_dogs(), folder=folder)
    assert rows_of(root, "default") == [("1", EXPECTED)]
    assert data_scripts.load("own", root, split="default")[0]["image"].filename == str(root / folder / "a.jpg")


def test_coco_of_a_whole_set_asks_for_absent_things_where_they_are_not_labelled(root):
    trees.picture(root / "a.jpg")
    trees.picture(root / "b.jpg")
    content = trees.coco((1, 1, [SQUARE]), images=("a.jpg", "b.jpg"), absent=["cat", "a unicorn"])
    trees.write(root / "train.json", content)
    assert rows_of(root) == [
        ("1", {"cat": (100, 1), "a unicorn": (0, 0)}),
        ("2", {"cat": (0, 0), "a unicorn": (0, 0)}),
    ]


def test_a_category_that_does_not_exist(root):
    trees.roboflow(root, trees.coco((1, 7, [SQUARE])))
    with pytest.raises(ValueError, match="annotation 1: there is no category with id 7"):
        data_scripts.load("own", root)


# ---- YOLO --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("images", "place", "more"),
    [("images/train", "images/train", {}), ("train/images", "../train/images", {}), ("train/images", "./train/images", {}),
     ("images/train", "images/train", {"path": "/somewhere/else"}), ("pets/images/train", "images/train", {"path": "pets"})],
)  # fmt: skip
def test_yolo(root, images, place, more):
    lines = [yolo_line(0, SQUARE), yolo_line(1, SQUARE), "", yolo_line(1, SMALL)]
    trees.yolo(root, lines, images=images, place=place, absent="[a unicorn, cat]", **more)
    assert rows_of(root) == [(f"{images}/a.jpg", EXPECTED)]


def test_yolo_without_a_label_file_is_an_image_of_nothing(root):
    trees.yolo(root, None, absent="[cat]")
    assert rows_of(root) == [("images/train/a.jpg", {"cat": (0, 0)})]


@pytest.mark.parametrize(
    ("line", "message"),
    [("0 0.5 0.5 0.2 0.2", "it has a box but no mask"), ("2 0.1 0.1 0.5 0.1 0.5 0.5", "no class 2 in names"),
     ("0 10 10 30 10 30 30", "between 0 and 1; divide"), ("0 0.1 0.1 0.5", "pairs x y"), ("cat 0.1 0.1 0.5 0.1 0.5 0.5", "must be numbers")],
)  # fmt: skip
def test_a_yolo_line_that_is_wrong_is_named(root, line, message):
    trees.yolo(root, [yolo_line(0, SQUARE), line])
    with pytest.raises(ValueError, match=rf"a\.txt: .*line 2: .*{message}"):
        data_scripts.load("own", root)


def test_yolo_stays_in_its_folder(root):
    trees.picture(root.parent / "secret/1.jpg")
    trees.yolo(root, [yolo_line(0, SQUARE)], place="images/../../secret")
    with pytest.raises((ValueError, FileNotFoundError), match=r"data\.yaml|secret"):
        data_scripts.load("own", root)


# ---- label maps --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("images", "masks"), [("images/train", "masks/train"), ("train/images", "train/masks"), ("images", "masks"),
                                               ("JPEGImages", "SegmentationClass")])  # fmt: skip
def test_label_maps_with_a_class_list(root, images, masks):
    values = numbers()
    values[0, :] = 255
    trees.index_maps(root, values, images=images, masks=masks)
    assert rows_of(root) == [(f"{images}/a.jpg", {"cat": (100, 1), "dog": (50, 1)})]
    (root / "classes.txt").unlink()
    trees.write(root / "classes.json", {"classes": {"1": "cat", "2": "dog"}, "absent": ["a unicorn", "dog"]})
    assert rows_of(root) == [(f"{images}/a.jpg", {"cat": (100, 1), "dog": (50, 1), "a unicorn": (0, 0)})]


def test_a_value_without_a_class(root):
    trees.index_maps(root, numbers(), classes=("background", "cat"))
    with pytest.raises(ValueError, match=r"a\.png: .*the value 2, which classes\.txt does not list"):
        data_scripts.load("own", root)


def test_label_maps_of_another_size(root):
    trees.index_maps(root, numbers()[:20])
    with pytest.raises(ValueError, match=r"\[20, 40\].*\[30, 40\]"):
        data_scripts.load("own", root)


# ---- parquet with images inside ----------------------------------------------------------------------------------------
def test_parquet_with_hugging_face_images(root):
    import datasets

    root.mkdir(exist_ok=True)
    image = Image.open(trees.picture(root.parent / "a.jpg")).copy()  # without a path, so that it is embedded
    mask = Image.fromarray((numbers() == 1).astype(np.uint8) * 255)
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "mask": datasets.Image()}
    )
    rows = datasets.Dataset.from_list(
        [{"image": image, "text": "cat", "mask": mask}, {"image": image, "text": "a unicorn", "mask": None}],
        features=features,
    )
    rows.to_parquet(root / "train.parquet")
    found = rows_of(root)
    assert [row for _, row in found] == [{"cat": (100, 1)}, {"a unicorn": (0, 0)}]
    assert len({name for name, _ in found}) == len(found)


def test_parquet_with_expressions_and_hugging_face_images(root):
    import pyarrow
    import pyarrow.parquet

    image = {"bytes": trees.picture(root / "x.jpg").read_bytes(), "path": "x.jpg"}
    mask = {"bytes": base64.b64decode(png(numbers() == 1)), "path": None}
    table = pyarrow.Table.from_pylist(
        [{"image": image, "expressions": [{"text": "cat", "mask": mask}], "absent": ["a unicorn"]}]
    )
    pyarrow.parquet.write_table(table, root / "train.parquet")
    assert rows_of(root) == [("x.jpg", {"cat": (100, 1), "a unicorn": (0, 0)})]


# ---- which format ------------------------------------------------------------------------------------------------------
def test_what_is_not_read_is_named(root):
    trees.roboflow(root, both_dogs())
    trees.picture(root / "a.jpg")
    trees.write(root / "val.jsonl", '{"image": "a.jpg", "expressions": []}')
    trees.write(root / "masks.csv", "")
    text = str(check("own", root))
    assert "own: complete (val 1)" in text and "_annotations.coco.json (not read, because val.jsonl is there)" in text
    assert "masks.csv (not a format of annotations)" in text and "left out, not read: 2 files" in text
