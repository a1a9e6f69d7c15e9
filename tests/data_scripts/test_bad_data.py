"""What the layouts and record formats allow but the original crashes on: a right result, or an error with the fix.

One test per probe of DATA_SPEC section 10 that concerns the data (those about picture sizes, tokens and truncation
belong to the processor's tests).
"""

import os

import data_trees as trees
import pytest
from data_trees import SQUARE

import data_scripts
from data_scripts.mixture import FAMILIES, Mixture, TrainingDataset, load_mixture
from data_scripts.schema import decode_mask, empty_mask, encode_mask, mask_area
from data_scripts.transforms import (
    ConversationTransform,
    PictureError,
    ReasoningTransform,
    ReferringTransform,
    SemanticTransform,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def areas(rows, i=0):
    return [mask_area(entry["mask"]) for entry in rows[i]["expressions"]]


def square_mask():
    mask = empty_mask(trees.HEIGHT, trees.WIDTH)
    mask = decode_mask(mask)
    mask[5:15, 5:15] = 1
    return mask


# ---- options and names -----------------------------------------------------------------------------------------------
def test_the_default_mixture_names_only_sets_that_exist():
    assert {name for _, _, names in FAMILIES.values() for name in names} <= set(data_scripts.names())


def test_two_sets_without_a_mixture_are_two_datasets(root):
    """The original's no_sampling mode silently takes the first of two; here one dataset is one set of rows."""
    trees.ade20k(root, trees.full(1), trees.full(2))
    rows = data_scripts.load("ade20k", root)
    assert len(TrainingDataset(rows, SemanticTransform())) == 2
    mixed = Mixture({"sem_seg": (1, [TrainingDataset(rows, SemanticTransform())] * 2)}, length=5)
    assert len(mixed) == 5


@pytest.mark.parametrize("families", [{"vqa": (1, [])}, {}])
def test_a_mixture_of_nothing_is_refused(families):
    with pytest.raises(ValueError, match="at least one"):
        Mixture(families, length=5)


def test_an_unknown_family_is_refused(root):
    with pytest.raises(ValueError, match="sem_seg, refer_seg, vqa, reason_seg"):
        load_mixture(root, {"semantic": ["ade20k"]})


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


def test_missing_refs_are_named_with_what_is_there(root):
    trees.referring(root, "grefcoco", [trees.ref()])
    (root / "refer_seg/grefcoco/grefs(unc).json").unlink()
    with pytest.raises(FileNotFoundError, match=r"grefs\(unc\)\.p or grefs\(unc\)\.json.*holds: instances.json"):
        data_scripts.load("grefcoco", root)


# ---- referring sets --------------------------------------------------------------------------------------------------
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
    with pytest.raises(ValueError, match="ref 5 names picture 3"):
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


def talk(example):
    return [turn["content"] for turn in example["conversations"][0]]


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
    with pytest.raises(ValueError, match="none of 101 pictures had anything to ask for"):
        worded(root, ["..."])


def test_refs_without_sentences_give_their_place_to_another_picture(root):
    trees.referring(root, "refcoco", [trees.ref(0, texts=[]), trees.ref(1, image_id=2)], images=(1, 2))
    dataset = TrainingDataset(data_scripts.load("refcoco", root), ReferringTransform())
    assert [example["image_id"] for example in dataset] == ["2", "2"]


def test_pictures_with_absent_things_only_give_their_place_to_others(root):
    refs = [trees.ref(0, ann_id=[-1]), *(trees.ref(i, image_id=i + 1, ann_id=[1]) for i in range(1, 5))]
    trees.referring(root, "grefcoco", refs, images=(1, 2, 3, 4, 5))
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


# ---- ReasonSeg -------------------------------------------------------------------------------------------------------
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


# ---- conversations ---------------------------------------------------------------------------------------------------
def conversation(root, *turns, **options):
    trees.llava(root, *turns, **options)
    return TrainingDataset(data_scripts.load("llava_instruct_150k", root), ConversationTransform())[0]


def test_a_conversation_without_a_picture(root):
    example = conversation(root, ("human", "hi"), ("gpt", "hello"), image=None)
    assert example["image"] is None and talk(example) == ["hi", "hello"]


def test_a_conversation_that_speaks_of_a_picture_it_lacks(root):
    with pytest.raises(ValueError, match=r"record 0 \(id '7'\): it speaks of <image> but names no 'image'"):
        conversation(root, ("human", "<image>\nhi"), ("gpt", "hello"), image=None)


def test_a_trailing_question_is_dropped(root):
    example = conversation(root, ("human", "q <image>"), ("gpt", "a"), ("human", "q2"))
    assert talk(example) == ["<image>\nq", "a"] and example["image"] is not None


@pytest.mark.parametrize("turns", [("human", "human", "gpt"), ("human", "gpt", "gpt")])
def test_turns_that_do_not_alternate(root, turns):
    with pytest.raises(ValueError, match="record 0 .*human and gpt must take turns"):
        conversation(root, *((who, "x") for who in turns))


def test_an_empty_answer_and_one_that_looks_like_a_turn(root):
    example = conversation(root, ("human", "q"), ("gpt", ""), ("human", "q"), ("gpt", "it says ASSISTANT: hi [SEG]"))
    assert talk(example) == ["q", "", "q", "it says ASSISTANT: hi SEG"]


def test_another_role_is_named(root):
    with pytest.raises(ValueError, match="one of human, gpt, got 'system'"):
        conversation(root, ("system", "x"), ("human", "q"))


def test_a_missing_picture_is_named_or_skipped(root, caplog):
    trees.ade20k(root, trees.full(1), trees.full(2))
    rows = data_scripts.load("ade20k", root)
    path = root / "ade20k/images/training/0.jpg"
    path.unlink()
    with pytest.raises(PictureError, match=f"{path} is missing"):
        TrainingDataset(rows, SemanticTransform())[0]
    skipping = TrainingDataset(rows, SemanticTransform(), on_bad_image="skip")
    assert skipping[0]["image_id"] == "1" and skipping.skipped >= 1
    assert str(path) in caplog.text


def test_a_truncated_picture_is_named(root):
    trees.ade20k(root, trees.full(1))
    path = root / "ade20k/images/training/0.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(PictureError, match=f"(?i){path} cannot be read .*truncated"):
        TrainingDataset(data_scripts.load("ade20k", root), SemanticTransform())[0]


# ---- classes and parts -----------------------------------------------------------------------------------------------
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
