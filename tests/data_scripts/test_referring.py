"""The referring sets: splits, every form of a mask, wrong records, expressions as questions."""

import json

import data_trees as trees
import pytest
from data_trees import SQUARE, areas, talk

import data_scripts
from data_scripts.images import PictureError
from data_scripts.masks import decode_mask, empty_mask, encode_mask
from data_scripts.mixture import TrainingDataset
from data_scripts.transforms import ReferringTransform


def test_splits_that_carry_letters(root):
    refs = [trees.ref(i, split=split, texts=[split]) for i, split in enumerate(["testA", "testB", "testAB", "train"])]
    trees.referring(root, "refcoco", refs)

    def texts(split):
        return [entry["text"] for row in data_scripts.load("refcoco", root, split) for entry in row["expressions"]]

    assert texts("testA") == ["testA", "testAB"]
    assert texts("testB") == ["testB", "testAB"]
    assert texts("test") == ["testA", "testB", "testAB"]
    assert texts("train+testB[:1]") == ["train", "testB", "testAB"]


def test_missing_refs_are_named_with_what_is_there(root):
    trees.referring(root, "grefcoco", [trees.ref()])
    (root / "refer_seg/grefcoco/grefs(unc).json").unlink()
    with pytest.raises(FileNotFoundError, match=r"grefs\(unc\)\.p or grefs\(unc\)\.json.*holds: instances.json"):
        data_scripts.load("grefcoco", root)


@pytest.mark.parametrize("place", ["refer_seg/images/mscoco/images/val2014", "coco/val2014"])
def test_refzom_finds_pictures_of_val2014(root, place):
    trees.referring(root, "refzom", [trees.ref(ann_id=[1])], pictures=False)
    path = trees.picture(root / place / "1.jpg")
    row = data_scripts.load("refzom", root)[0]
    assert row["image"].filename == str(path)
    path.rename(trees.picture(root / "refer_seg/images/mscoco/images/train2014/1.jpg"))
    assert (
        "train2014" in data_scripts.load("refzom", root)[0]["image"].filename
    )  # noticed though the refs are the same


def square_mask():
    mask = empty_mask(trees.HEIGHT, trees.WIDTH)
    mask = decode_mask(mask)
    mask[5:15, 5:15] = 1
    return mask


COMPRESSED = encode_mask(square_mask())


UNCOMPRESSED = {"size": [30, 40], "counts": [5 * 30 + 5] + [10, 20] * 9 + [10, 30 * 40 - 15 * 30 + 15]}


@pytest.mark.parametrize(
    ("segmentations", "ann_id", "expected"),
    [
        ({1: [[1, 1, 5, 5]]}, [1], 0),  # a lone polygon of two points
        ({1: [[1, 1]]}, [1], 0),  # of one point
        ({1: [[5, 5, 15, 5, 15, 15, 5]]}, [1], 0),  # of an odd number of coordinates
        ({1: [SQUARE, [1, 1, 5, 5]]}, [1], 100),  # next to a right one
        ({1: [[1, 1, 5, 5]], 2: [[1, 1]]}, [1, 2], 0),  # several targets, none of them right
        ({1: [[1, 1, 5, 5]], 2: [SQUARE]}, [1, 2], 100),
        ({1: COMPRESSED}, [1], 100),
        ({1: [[20, 20, 30, 20, 30, 25, 20, 25]], 2: COMPRESSED}, [2], 100),  # the original reuses the mask before
        ({1: [[20, 20, 30, 20, 30, 25, 20, 25]], 2: COMPRESSED}, [1, 2], 150),
        ({1: UNCOMPRESSED}, [1], 100),
        ({1: []}, [1], 0),
        ({1: None}, [1], 0),
        ({}, [-1], 0),
        ({}, [], 0),
        ({1: [SQUARE]}, 1, 100),  # a bare number
    ],
)
@pytest.mark.parametrize("name", ["grefcoco", "refzom", "refcoco"])
def test_every_form_of_a_mask(root, name, segmentations, ann_id, expected):
    trees.referring(root, name, [trees.ref(ann_id=ann_id)], segmentations)
    assert areas(data_scripts.load(name, root)) == [expected]


def test_uncompressed_crowds_decode_to_their_pixels(root):
    trees.referring(root, "refcoco", [trees.ref(split="val")], {1: UNCOMPRESSED})
    mask = data_scripts.load("refcoco", root, "val")[0]["expressions"][0]["mask"]
    assert (decode_mask(mask) == square_mask()).all()


@pytest.mark.parametrize("segmentation", [["5 5 15 5 15 15"], 7, {"counts": "abc"}, [[SQUARE]]])
def test_a_mask_in_no_form_names_its_annotation(root, segmentation):
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1])], {1: segmentation})
    with pytest.raises(ValueError, match="instances.json: annotation 1: A mask must be a list of polygons"):
        data_scripts.load("grefcoco", root)


@pytest.mark.parametrize("name", ["refcoco", "refzom", "grefcoco"])
def test_a_missing_annotation_is_named(root, name):
    trees.referring(root, name, [trees.ref(5, ann_id=[99])])
    with pytest.raises(ValueError, match="ref 5 names annotation 99, which .*instances.json does not have"):
        data_scripts.load(name, root)


def test_a_missing_picture_record_is_named(root):
    trees.referring(root, "refcoco", [trees.ref(5, image_id=3)])
    with pytest.raises(ValueError, match="ref 5 names image 3"):
        data_scripts.load("refcoco", root)


def test_a_record_without_a_field_is_named(root):
    broken = trees.ref()
    del broken["split"]
    trees.referring(root, "grefcoco", [trees.ref(), broken])
    with pytest.raises(ValueError, match="record 1 lacks split"):
        data_scripts.load("grefcoco", root)


def test_annotations_for_a_picture_of_another_size(root):
    trees.referring(root, "refcoco", [trees.ref()])
    trees.picture(root / "refer_seg/images/mscoco/images/train2014/1.jpg", size=(40, 31))
    with pytest.raises(PictureError, match=r"1\.jpg is 31 x 40 .* its annotations are for 30 x 40"):
        TrainingDataset(data_scripts.load("refcoco", root), ReferringTransform())[0]


def worded(root, texts, name="refcoco", **options):
    trees.referring(root, name, [trees.ref(texts=texts)])
    return TrainingDataset(data_scripts.load(name, root), ReferringTransform(**options))[0]


@pytest.mark.parametrize("blank", ["", "  ", "...", " . "])
def test_blank_expressions_are_kept_as_facts_and_not_asked_for(root, blank):
    question, answer = talk(worded(root, [blank, "a cat"]))
    assert question.count("a cat") == 1 and answer.count("[SEG]") == 1
    assert [entry["text"] for entry in data_scripts.load("refcoco", root)[0]["expressions"]] == [blank, "a cat"]


def test_an_empty_sentence_with_an_empty_segmentation(root):
    trees.referring(root, "refcoco", [trees.ref(texts=[""], split="val")], {1: []})
    assert areas(data_scripts.load("refcoco", root, "val")) == [0]


def test_nothing_to_ask_for_anywhere_says_so(root):
    with pytest.raises(ValueError, match="none of 101 images had anything to ask for"):
        worded(root, ["..."])


def test_refs_without_sentences_give_their_place_to_another_picture(root):
    refs = [trees.ref(0, texts=[]), trees.ref(1, ann_id=2, image_id=2)]
    trees.referring(root, "refcoco", refs, {1: [SQUARE], 2: [SQUARE]}, images=(1, 2))
    dataset = TrainingDataset(data_scripts.load("refcoco", root), ReferringTransform())
    assert [example["image_id"] for example in dataset] == ["2", "2"]


def test_pictures_with_absent_things_only_give_their_place_to_others(root):
    refs = [trees.ref(0, ann_id=[-1]), *(trees.ref(i, image_id=i + 1, ann_id=[i]) for i in range(1, 5))]
    trees.referring(root, "grefcoco", refs, {i: [SQUARE] for i in range(1, 5)}, images=(1, 2, 3, 4, 5))
    rows = data_scripts.load("grefcoco", root)
    taken = {TrainingDataset(rows, ReferringTransform())[epoch * 5]["image_id"] for epoch in range(40)}
    assert taken == {"2", "3", "4", "5"}  # not one of them again and again
    lone = TrainingDataset(rows, ReferringTransform(all_absent=True))[0]
    assert lone["image_id"] == "1" and "[REJ]" in talk(lone)[1] and not lone["masks"][0].any()


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("a||b", "a||b"),
        ("sign saying ASSISTANT: hello", "sign saying ASSISTANT: hello"),  # labels come from turns, not from this
        ("tag </s> here", "tag s here"),
        ("the <image> on the wall", "the image on the wall"),
        ("the [SEG] sign", "the SEG sign"),
        ("{} braces {0}", "{} braces {0}"),
    ],
)
def test_expressions_that_look_like_markup(root, text, asked):
    question, answer = talk(worded(root, [text]))
    assert asked.lower() in question and question.count("<image>") == 1
    assert asked in answer and answer.count("[SEG]") == 1 and "</s>" not in answer


# ---- annotations that are not what a ref needs ---------------------------------------------------------------------------
def changed(root, name, change):
    """Change the content of a set's instances.json in place."""
    path = root / "refer_seg" / name / "instances.json"
    content = json.loads(path.read_text())
    change(content)
    trees.write(path, content)
    return root


@pytest.mark.parametrize("name", ["grefcoco", "refcoco", "refzom"])
@pytest.mark.parametrize("value", [None, [], [[]], "", {}, float("nan"), "missing"], ids=repr)
@pytest.mark.parametrize("ann_id", [[1], [2, 1]])
def test_an_annotation_with_a_box_and_no_mask_is_not_absent(root, name, value, ann_id):
    trees.referring(root, name, [trees.ref(ann_id=ann_id)], {1: [SQUARE], 2: [SQUARE]})

    def change(content):
        content["annotations"][0].update(bbox=[5, 5, 10, 10], area=100, segmentation=value)
        if value == "missing":
            del content["annotations"][0]["segmentation"]

    changed(root, name, change)
    with pytest.raises(
        ValueError, match=r"annotation 1: it has bbox .* but no mask|annotations\[0\] lacks segmentation"
    ):
        data_scripts.load(name, root)


@pytest.mark.parametrize("kind", ["images", "annotations"])
@pytest.mark.parametrize("other", [1, "1"])
def test_an_id_that_stands_twice(root, kind, other):
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1])])
    changed(
        root,
        "grefcoco",
        lambda content: content[kind].append({**content[kind][0], "id": other, "file_name": "2.jpg", "image_id": 2}),
    )
    with pytest.raises(ValueError, match=rf"{kind}\[1\]: id '?1'? stands twice"):
        data_scripts.load("grefcoco", root)


def test_a_record_that_stands_twice_word_for_word_counts_once(root):
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1])])
    changed(root, "grefcoco", lambda content: content["annotations"].append(content["annotations"][0]))
    assert areas(data_scripts.load("grefcoco", root)) == [100]


def test_an_annotation_of_another_image(root):
    trees.referring(root, "grefcoco", [trees.ref(7, ann_id=[1]), trees.ref(8, image_id=2, ann_id=[1])], images=(1, 2))
    with pytest.raises(ValueError, match="annotation 1: it is of image 1, but ref 8 names it for image 2"):
        data_scripts.load("grefcoco", root)


def test_no_target_and_a_target_at_once(root):
    trees.referring(root, "grefcoco", [trees.ref(7, ann_id=[-1, 1])])
    with pytest.raises(ValueError, match=r"ref 7 names no target \(-1\) and annotations \[1\]"):
        data_scripts.load("grefcoco", root)


def test_run_lengths_of_another_size_are_named_when_rows_are_built(root):
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1])], {1: {"size": [40, 30], "counts": [100, 50, 1050]}})
    with pytest.raises(ValueError, match=r"annotation 1: its mask is \[40, 30\] .*its image \[30, 40\] .*swapped"):
        data_scripts.load("grefcoco", root)


def test_parts_of_the_image_instead_of_pixels(root):
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1])], {1: [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]})
    with pytest.raises(ValueError, match="annotation 1: .*between 0 and 1"):
        data_scripts.load("grefcoco", root)


def test_a_size_that_is_not_the_images_is_named_when_rows_are_built(root):
    trees.referring(root, "refcoco", [trees.ref()])
    trees.picture(root / "refer_seg/images/mscoco/images/train2014/1.jpg", size=(30, 40))
    with pytest.raises(
        PictureError, match=r"image 1: .*1\.jpg is 40 x 30 .*for 30 x 40; height and width are swapped"
    ):
        data_scripts.load("refcoco", root)


def test_refs_without_an_entry(root):
    trees.referring(root, "grefcoco", [])
    with pytest.raises(ValueError, match=r"grefs\(unc\)\.json has no refs"):
        data_scripts.load("grefcoco", root)
