"""Your own data in every form, and its errors."""

import json

import data_trees as trees
import numpy as np
import pytest
from data_trees import SQUARE, words

import data_scripts
from data_scripts import check, publish
from data_scripts.masks import decode_mask, encode_mask, mask_area
from data_scripts.mixture import TrainingDataset
from data_scripts.transforms import ReferringTransform


def own(root, *records, split="train", lines=None):
    trees.picture(root / "cats/1.jpg")
    text = "\n".join(json.dumps(record) for record in records) if lines is None else lines
    trees.write(root / f"{split}.jsonl", text + "\n")
    return root


def record(mask, text="a cat", **more):
    return {"image": "cats/1.jpg", "expressions": [{"text": text, "mask": mask, **more}]}


def rle():
    mask = np.zeros((trees.HEIGHT, trees.WIDTH), np.uint8)
    mask[5:15, 5:15] = 1
    return encode_mask(mask)


def test_own_data_in_every_form(root):
    trees.label_map(root / "masks/1.png", decode_mask(rle()) * 255)
    forms = [SQUARE, [SQUARE], rle(), "masks/1.png", None, [SQUARE, [20, 20, 30, 20, 30, 25, 20, 25]]]
    own(root, *(record(form) for form in forms))
    rows = data_scripts.load("own", root)
    found = [(mask_area(row["expressions"][0]["mask"]), row["expressions"][0]["num_targets"]) for row in rows]
    assert found == [(100, 1), (100, 1), (100, 1), (100, 1), (0, 0), (150, 1)]
    assert rows[0]["image"].size == (trees.WIDTH, trees.HEIGHT) and rows[0]["image_id"] == "1"
    assert "[SEG]" in words(TrainingDataset(rows, ReferringTransform())[0])[0][1]


def test_own_data_in_parquet_and_published_data(root, tmp_path):
    import pyarrow
    import pyarrow.parquet

    own(root, record(SQUARE))
    table = pyarrow.Table.from_pylist([record(json.dumps(SQUARE)), record(None)])
    pyarrow.parquet.write_table(table, root / "val.parquet")
    assert [mask_area(row["expressions"][0]["mask"]) for row in data_scripts.load("own", root, "val")] == [100, 0]
    publish.publish("own", root, tmp_path / "published")
    again = data_scripts.load("own", tmp_path / "published" / "data", "own_train")
    assert again[0]["expressions"] == data_scripts.load("own", root)[0]["expressions"]


def test_own_data_in_coco_format(root):
    trees.picture(root / "1.jpg")
    annotations = [
        {"id": 1, "image_id": 9, "segmentation": [SQUARE], "caption": ["a cat", "both"]},
        {"id": 2, "image_id": 9, "segmentation": [[20, 20, 30, 20, 30, 25, 20, 25]], "caption": "both"},
        {"id": 3, "image_id": 9, "segmentation": None, "caption": "a unicorn"},
    ]
    trees.write(root / "train.json", {"images": [{"id": 9, "file_name": "1.jpg"}], "annotations": annotations})
    (row,) = data_scripts.load("own", root)
    found = [(entry["text"], mask_area(entry["mask"]), entry["num_targets"]) for entry in row["expressions"]]
    assert found == [("a cat", 100, 1), ("both", 150, 2), ("a unicorn", 0, 0)]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"image": "cats/2.jpg", "expressions": []}, r"line 2: The image .*cats/2\.jpg is missing"),
        ({"expressions": []}, "line 2: it lacks 'image'"),
        ({"image": "cats/1.jpg"}, "line 2: a record needs an 'image' and a list 'expressions'"),
        (record(SQUARE, text=" . "), "line 2: expression 0: its text is ' . '"),
        ({"image": "cats/1.jpg", "expressions": [{"text": "a"}]}, "line 2: expression 0: it lacks 'mask'"),
        (record([0.1, 0.1, 0.5, 0.1, 0.5, 0.5]), "line 2: expression 0: its mask has no pixel .*Write null"),
        (record({"size": [3, 3], "counts": "013000"}), r"its mask is \[3, 3\] .*its image \[30, 40\]"),
        (record(7), "line 2: expression 0: A mask must be a list of polygons"),
        (record("masks/none.png"), r"line 2: .*masks/none\.png"),
        ([], "line 2: a record needs"),
    ],
)
def test_own_data_with_an_error(root, second, message, capsys):
    own(root, record(SQUARE), second)
    with pytest.raises(ValueError, match=message):
        data_scripts.load("own", root)
    assert check.main([str(root)]) == 1
    assert "own: INCOMPLETE" in capsys.readouterr().out


def test_own_data_that_is_not_json(root):
    own(root, lines='{"image": "cats/1.jpg", "expressions": []}\n{"image": ')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2 is not JSON .*a line is \{"):
        data_scripts.load("own", root)


def test_two_files_for_one_split(root):
    own(root, record(None))
    trees.write(root / "train.json", {"images": [], "annotations": []})
    with pytest.raises(ValueError, match=r"train\.json and .*train\.jsonl are both split 'train'"):
        data_scripts.load("own", root)


def test_own_data_without_an_annotation_file(root):
    with pytest.raises(FileNotFoundError, match="holds no annotation file; write train.jsonl"):
        data_scripts.load("own", root)
