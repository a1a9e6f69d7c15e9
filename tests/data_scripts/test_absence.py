"""Benchmarks of absence in their published layouts: R-RefCOCO, FP-RefCOCO, HalluSegBench."""

import json

import data_trees as trees
import numpy as np
import pytest
from data_trees import areas

import data_scripts
from data_scripts.check import check, find

SENTENCES = {
    "exist": [{"sent": "a cat", "exist": True}, {"sent": "a dog", "exist": False}, {"sent": "cat"}],
    "is_false_premise": [
        {"sent": "a cat", "is_false_premise": False},
        {"sent": "a dog", "is_false_premise": True, "gt_sent": "a cat"},
        {"sent": "cat"},
    ],
}
LAYOUTS = [
    ("rrefcoco", "rrefcoco", "refs(unc).p", "exist"),
    ("rrefcoco+", "R-refcoco+", "refs(unc_exclude_unified).p", "exist"),
    ("rrefcocog", "rrefcocog", "refs(umd).p", "exist"),
    ("rrefcocog", "R-refcocog", "refs(umd_exclude_unified).p", "exist"),
    ("fprefcoco", "fprefcoco", "refs(berkeley_exclude_unified).p", "is_false_premise"),
    ("fprefcocog", "fprefcocog", "refs(berkeley_exclude_unified).p", "is_false_premise"),
]


def test_the_names_are_listed():
    names = ("rrefcoco", "rrefcoco+", "rrefcocog", "fprefcoco", "fprefcoco+", "fprefcocog", "hallusegbench")
    assert set(names) <= set(data_scripts.names())


@pytest.mark.parametrize(("name", "folder", "file", "flag"), LAYOUTS)
def test_a_sentence_says_whether_it_is_there(root, name, folder, file, flag):
    trees.absence(root, folder, file, SENTENCES[flag])
    assert find(root) == [name]
    rows = data_scripts.load(name, root, "val")
    assert [entry["text"] for entry in rows[0]["expressions"]] == ["a cat", "a dog", "cat"]
    assert areas(rows) == [100, 0, 100]
    assert [entry["num_targets"] for entry in rows[0]["expressions"]] == [1, 0, 1]
    finding = check(name, root)
    assert not finding.problems and (finding.expressions, finding.no_target) == (3, 1)


def test_a_flag_that_is_none_is_named(root):
    trees.absence(root, "rrefcoco", "refs(unc).p", [{"sent": "a cat", "exist": "no"}])
    with pytest.raises(ValueError, match=r"sentences\[0\]: exist must be true or false, got 'no'"):
        data_scripts.load("rrefcoco", root, "val")


def test_refs_that_are_missing_name_the_layouts(root):
    (root / "refer_seg/fprefcoco").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"refs\(berkeley_exclude_unified\)\.p or refs\(berkeley\)\.p"):
        data_scripts.load("fprefcoco", root)


def facts(rows):
    return [
        (row["image_id"], [(entry["text"], entry["is_sentence"]) for entry in row["expressions"]], areas(rows, number))
        for number, row in enumerate(rows)
    ]


def test_pairs_ask_for_what_is_there_and_for_what_the_other_image_shows(root):
    questions = {"question": "What is worn at work?", "counterfactual_question": "What keeps warm?"}
    trees.halluseg(root / "hallusegbench/test/refer_seg", {}, {"factual_image_path": "factual_images/0.jpg"})
    trees.halluseg(root / "hallusegbench/train/reason_seg_v1", questions)
    assert find(root) == ["hallusegbench"]
    tie, scarf = ("red tie", False), ("blue scarf", False)
    assert facts(data_scripts.load("hallusegbench", root, "test_refer_seg")) == [
        ("factual_images/0.jpg", [tie, scarf, tie, scarf], [20, 0, 20, 0]),  # of both pairs
        ("counterfactual_images/0_7_edited.png", [scarf, tie], [40, 0]),
        ("counterfactual_images/1_7_edited.png", [scarf, tie], [40, 0]),
    ]
    work, warm = (questions["question"], True), (questions["counterfactual_question"], True)
    assert facts(data_scripts.load("hallusegbench", root, "train_reason_seg_v1")) == [
        ("factual_images/0.jpg", [work, warm], [20, 0]),
        ("counterfactual_images/0_7_edited.png", [warm, work], [40, 0]),
    ]
    assert not check("hallusegbench", root, open_images=True).problems


def test_the_names_of_the_first_release(root):
    from data_scripts.halluseg import FIRST_RELEASE

    folder = trees.halluseg(root / "hallusegbench", {"factual_image_path": "testing/COCO_train2014_1.jpg"})
    (pair,) = json.loads((folder / "data.json").read_text())
    trees.write(folder / "filter_anno.json", [{FIRST_RELEASE.get(name, name): value for name, value in pair.items()}])
    (folder / "data.json").unlink()
    rows = data_scripts.load("hallusegbench", root, "test")
    assert [row["image_id"] for row in rows] == [
        "testing/COCO_train2014_1.jpg",
        "counterfactual_images/0_7_edited.png",
    ]
    assert areas(rows) == [20, 0]


def test_masks_of_another_size_are_brought_to_their_image(root):
    folder = trees.halluseg(root / "hallusegbench/test/refer_seg", {})
    mask = np.zeros((trees.HEIGHT // 2, trees.WIDTH // 2))
    mask[:5, :5] = 255
    trees.label_map(folder / "factual_masks/0_7_mask.png", mask)
    assert areas(data_scripts.load("hallusegbench", root, "test_refer_seg")) == [100, 0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no pairs", "the pairs of HalluSegBench; its subsets are refer_seg"),
        ("no list", "must hold a list of pairs, got dict"),
        ("no label", "pair 0 lacks counterfactual_label"),
        ("no mask", r"0_7_mask\.png is missing \(a mask\)"),
        ("an empty mask", r"0_7_mask\.png: the mask has no pixel"),
        ("a path out of the folder", "leads out of"),
        ("no image", r"The image .*0\.jpg is missing"),
    ],
)
def test_what_is_wrong_is_named(root, damage, message):
    folder = trees.halluseg(root / "hallusegbench/test/refer_seg", {})
    (pair,) = json.loads((folder / "data.json").read_text())
    if damage == "no pairs":
        (folder / "data.json").unlink()
    elif damage == "no list":
        trees.write(folder / "data.json", {})
    elif damage == "no label":
        del pair["counterfactual_label"]
    elif damage == "no mask":
        (folder / pair["factual_mask_path"]).unlink()
    elif damage == "an empty mask":
        trees.label_map(folder / pair["factual_mask_path"], trees.full(0))
    elif damage == "a path out of the folder":
        pair["factual_mask_path"] = "../../x.png"
    elif damage == "no image":
        (folder / pair["factual_image_path"]).unlink()
    if damage not in ("no pairs", "no list"):
        trees.write(folder / "data.json", [pair])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data_scripts.load("hallusegbench", root, "test_refer_seg")
