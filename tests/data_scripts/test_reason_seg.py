"""ReasonSeg: encodings, shapes, explanations."""

import json
import math

import data_trees as trees
import pytest
from data_trees import areas, talk

import data_scripts
from data_scripts.check import check
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


# ---- labelme's other shapes, encodings, formats --------------------------------------------------------------------------
def reason(root, *shapes, **more):
    return trees.reason_seg(root, {"text": ["what purrs"], "is_sentence": False, "shapes": list(shapes), **more})


def test_rectangles_and_circles_are_drawn_as_what_they_are(root):
    reason(root, {"label": "target", "shape_type": "rectangle", "points": [[10, 10], [29, 29]]})
    assert areas(data_scripts.load("ReasonSeg", root)) == [400]
    reason(root, {"label": "target", "shape_type": "circle", "points": [[20, 15], [30, 15]]})
    assert abs(areas(data_scripts.load("ReasonSeg", root))[0] - math.pi * 10**2) < 10


@pytest.mark.parametrize("kind", ["line", "linestrip", "point", "points", "ellipse", "oriented_rectangle"])
def test_other_shapes_are_refused_by_name_unless_they_are_notes(root, kind):
    reason(root, {"label": "flag", "shape_type": kind, "points": [[10, 10]]})
    assert areas(data_scripts.load("ReasonSeg", root)) == [0]
    reason(root, {"label": "target", "shape_type": kind, "points": [[10, 10], [29, 29]]})
    with pytest.raises(ValueError, match=rf"a\.json: .*shape 0: its shape is a '{kind}'"):
        data_scripts.load("ReasonSeg", root)


def test_parts_of_the_image_and_a_stated_size(root):
    reason(root, {"label": "target", "points": [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9]]})
    with pytest.raises(ValueError, match=r"a\.json: .*between 0 and 1"):
        data_scripts.load("ReasonSeg", root)
    reason(root, imageHeight=60, imageWidth=80)
    with pytest.raises(ValueError, match=r"a\.jpg is 30 x 40 .*for 60 x 80"):
        data_scripts.load("ReasonSeg", root)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("gbk", "\u72d7\u5728\u54ea\u91cc"), ("gbk", "\u72d7"), ("shift_jis", "\u72ac\u304c\u3044\u308b"), ("big5", "\u72d7\u5728\u54ea\u88e1"),
     ("euc_kr", "\uac1c\ub294 \uc5b4\ub514"), ("cp1251", "\u0433\u0434\u0435 \u0441\u043e\u0431\u0430\u043a\u0430"), ("utf-16", "a cat"),
     ("utf-32", "a cat"), ("iso8859_7", "\u03c3\u03ba\u03cd\u03bb\u03bf\u03c2"), ("cp1256", "\u0643\u0644\u0628")],
)  # fmt: skip
def test_other_encodings_are_named(root, encoding, text):
    reason(root)
    record = json.dumps({"text": [text], "is_sentence": True, "shapes": []}, ensure_ascii=False)
    trees.write(root / "reason_seg/ReasonSeg/train/a.json", record.encode(encoding))
    with pytest.raises(ValueError, match=r"a\.json is neither UTF-8 nor cp1252"):
        data_scripts.load("ReasonSeg", root)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_published_encodings_are_read(root, encoding):
    reason(root)
    text = "the caf\u00e9\u2019s \u201cold\u201d cr\u00e8me \u2013 a na\u00efve piñata\u2026"
    record = json.dumps({"text": [text], "is_sentence": True, "shapes": []}, ensure_ascii=False)
    trees.write(root / "reason_seg/ReasonSeg/train/a.json", record.encode(encoding))
    assert data_scripts.load("ReasonSeg", root)[0]["expressions"][0]["text"] == text


def test_images_with_any_suffix_and_what_is_left_out(root):
    reason(root)
    folder = root / "reason_seg/ReasonSeg/train"
    for name in ("b.JPG", "c.png", "d.JPEG"):
        trees.picture(folder / name)
    for stem, suffix in (("b", ".json"), ("c", ".JSON"), ("d", ".json")):
        trees.write(folder / f"{stem}{suffix}", (folder / "a.json").read_text())
    trees.write(folder / "._a.jpg", b"\0")
    trees.write(folder / "lonely.json", "{}")
    assert [row["image_id"] for row in data_scripts.load("ReasonSeg", root)] == ["a", "b", "c", "d"]
    assert "lonely.json (has no image beside it)" in str(check("ReasonSeg", root))
