"""ReasonSeg: encodings, shapes, explanations."""

import data_trees as trees
import pytest
from data_trees import talk

import data_scripts
from data_scripts.masks import mask_area
from data_scripts.mixture import TrainingDataset
from data_scripts.transforms import ReasoningTransform

TRIANGLE = {"label": "target", "points": [[2.9, 2.2], [20.5, 2.0], [2.0, 20.0]]}


@pytest.mark.parametrize("explanatory", [0.1, -1])
def test_reason_seg_without_explanations(root, explanatory, caplog):
    trees.reason_seg(root, {"text": ["what purrs"], "is_sentence": False, "shapes": [TRIANGLE]})
    rows = data_scripts.load("ReasonSeg", root)
    assert "explanatory/train.json is missing" in caplog.text
    assert talk(TrainingDataset(rows, ReasoningTransform(explanatory=explanatory))[0])[1].endswith("[SEG].")


def test_reason_seg_in_no_encoding_is_named(root):
    trees.reason_seg(root)
    trees.write(root / "reason_seg/ReasonSeg/train/a.json", b'{"text": ["\x81"], "is_sentence": false, "shapes": []}')
    with pytest.raises(ValueError, match=r"a\.json is neither UTF-8 nor cp1252"):
        data_scripts.load("ReasonSeg", root)


def test_reason_seg_in_cp1252(root):
    trees.reason_seg(root)
    record = '{"text": ["caf\u00e9"], "is_sentence": false, "shapes": []}'
    trees.write(root / "reason_seg/ReasonSeg/train/a.json", record.encode("cp1252"))
    assert data_scripts.load("ReasonSeg", root)[0]["expressions"][0]["text"] == "caf\u00e9"


@pytest.mark.parametrize("split", ["train", "val"])
def test_reason_seg_without_texts(root, split):
    trees.reason_seg(root, {"text": [], "is_sentence": False, "shapes": [TRIANGLE]}, split)
    assert data_scripts.load("ReasonSeg", root, split)[0]["expressions"] == []


@pytest.mark.parametrize(
    ("shapes", "target", "ignored"),
    [
        ([], 0, None),
        ([{"label": "target", "points": []}], 0, None),
        ([{"label": "target", "points": [[2, 3], [9, 3]]}], 8, None),  # two points: the line between them
        ([{"label": "flag", "points": [[2, 3], [9, 3]]}], 0, None),
        ([{"label": "target", "points": [[0, 0], [9, 0], [9, 9], [0, 9]]},
          {"label": "Ignored_part", "points": [[0, 0], [4, 0], [4, 4], [0, 4]]}], 75, 25),
    ],
)  # fmt: skip
def test_reason_seg_shapes(root, shapes, target, ignored):
    trees.reason_seg(root, {"text": ["what purrs"], "is_sentence": False, "shapes": shapes})
    entry = data_scripts.load("ReasonSeg", root)[0]["expressions"][0]
    assert mask_area(entry["mask"]) == target
    assert (entry["ignore_mask"] and mask_area(entry["ignore_mask"])) == ignored


def test_reason_seg_picture_without_its_json(root):
    trees.reason_seg(root)
    (root / "reason_seg/ReasonSeg/train/a.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"train/a\.json is missing \(for a\.jpg\)"):
        data_scripts.load("ReasonSeg", root)


def test_reason_seg_json_without_shapes(root):
    trees.reason_seg(root, {"text": ["a"], "is_sentence": True})
    with pytest.raises(ValueError, match=r"a\.json lacks shapes"):
        data_scripts.load("ReasonSeg", root)
