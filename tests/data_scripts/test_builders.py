"""Builders, masks, transforms, mixture, own data, check and publish on small trees."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import data_trees as trees
import numpy as np
import pytest
from data_trees import SQUARE
from paths import FIXTURES, ROOT
from PIL import Image

import data_scripts
from data_scripts import check, publish
from data_scripts.builder import read_plain_pickle
from data_scripts.mixture import Mixture, TrainingDataset, load_mixture
from data_scripts.polygons import fill_polygon
from data_scripts.schema import decode_mask, encode_labels, encode_mask, mask_area, merge_masks
from data_scripts.transforms import (
    Draws,
    ReasoningTransform,
    ReferringTransform,
    SemanticTransform,
    Wording,
    read_image,
)

MINI = FIXTURES / "golden_data" / "mini"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# ---- masks -----------------------------------------------------------------------------------------------------------
def test_fill_polygon_is_opencv_4_10_0():
    """60 polygons, inside and far beyond the picture, as cv2.fillPoly of 4.10.0 drew them."""
    cases = json.loads((FIXTURES / "fill_poly_opencv_4_10_0.json").read_text())
    assert len(cases) == 60
    for case in cases:
        assert encode_mask(fill_polygon(np.array(case["points"]), *case["mask"]["size"])) == case["mask"], case


def test_encodings_of_a_label_map_are_those_of_its_masks():
    labels = np.random.default_rng(0).integers(0, 4, (13, 7))
    masks = encode_labels(labels)
    assert masks == {value: encode_mask(labels == value) for value in range(4)}
    assert merge_masks(list(masks.values())) == encode_mask(np.ones((13, 7)))
    assert encode_labels(np.zeros((2, 3), np.uint8)) == {0: encode_mask(np.ones((2, 3)))}


def test_masks_of_different_sizes_do_not_unite():
    with pytest.raises(ValueError, match=r"\[\(2, 2\), \(3, 3\)\]"):
        merge_masks([encode_mask(np.eye(2)), encode_mask(np.eye(3))])


# ---- pickles ---------------------------------------------------------------------------------------------------------
class _Evil:
    def __reduce__(self):
        return os.system, ("echo broken in",)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_plain_data_are_read(tmp_path, protocol):
    content = [{"a": [1, 2.5, None, True, "caf\u00e9"], "b": ("x", {"y"})}]
    assert read_plain_pickle(trees.write(tmp_path / "x.p", pickle.dumps(content, protocol))) == content


def test_pickles_of_python_2_are_read(tmp_path):
    content = b"(lp0\n(dp1\nS'sent'\np2\nS'a cat'\np3\nsS'id'\np4\nL7L\nsa."
    assert read_plain_pickle(trees.write(tmp_path / "x.p", content)) == [{"sent": "a cat", "id": 7}]


@pytest.mark.parametrize(
    ("thing", "named"),
    [(_Evil(), "posix.system"), (Path("x"), "pathlib"), (np.float64(1), "numpy"), (print, "builtins.print")],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_anything_else_are_refused_by_name(tmp_path, thing, named, protocol, capfd):
    path = trees.write(tmp_path / "refs.p", pickle.dumps([thing], protocol))
    with pytest.raises(ValueError, match=r"refs\.p is not a pickle of plain data: it wants to load .*") as raised:
        read_plain_pickle(path)
    assert named in str(raised.value).replace("__builtin__", "builtins").replace("nt.system", "posix.system")
    assert "broken in" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"(lp0\n", b"not a pickle", pickle.dumps([1, 2])[:-3]])
def test_damaged_pickles_are_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"refs\.p is (damaged|not a pickle of plain data)"):
        read_plain_pickle(trees.write(tmp_path / "refs.p", content))


# ---- builders --------------------------------------------------------------------------------------------------------
def test_a_row():
    row = data_scripts.load("grefcoco", MINI, "val")[0]
    assert (row["image_id"], row["height"], row["width"]) == ("5617", 104, 260)
    assert row["image"].size == (260, 104)
    first = row["expressions"][0]
    assert (first["text"], first["num_targets"], first["part"]) == ("black thing top side", 1, None)
    assert decode_mask(first["mask"]).shape == (104, 260)
    assert not any(mask_area(entry["mask"]) for entry in row["expressions"] if not entry["num_targets"])


def test_a_second_start_finds_what_the_first_built(root, monkeypatch):
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1])])
    assert len(data_scripts.load("grefcoco", root)) == 1
    monkeypatch.setattr("data_scripts.referring.read_json", lambda path: pytest.fail("read again"))
    rows = data_scripts.load("grefcoco", root)
    assert rows.cache_files and rows[0]["expressions"][0]["text"] == "a cat"


def test_a_changed_file_is_built_again(root):
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1])])
    assert len(data_scripts.load("grefcoco", root)[0]["expressions"]) == 1
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1], texts=["a cat", "a dog"])])
    assert len(data_scripts.load("grefcoco", root)[0]["expressions"]) == 2


def test_splits_that_carry_letters(root):
    refs = [trees.ref(i, split=split, texts=[split]) for i, split in enumerate(["testA", "testB", "testAB", "train"])]
    trees.referring(root, "refcoco", refs)

    def texts(split):
        return [entry["text"] for row in data_scripts.load("refcoco", root, split) for entry in row["expressions"]]

    assert texts("testA") == ["testA", "testAB"]
    assert texts("testB") == ["testB", "testAB"]
    assert texts("test") == ["testA", "testB", "testAB"]
    assert texts("train+testB[:1]") == ["train", "testB", "testAB"]


def test_label_maps_are_shared_among_processes(root):
    trees.ade20k(root, *(trees.full(value) for value in range(1, 6)))
    alone = data_scripts.load("ade20k", root)
    shared = data_scripts.load("ade20k", root, cache_dir=str(root / "other"), num_proc=2)
    assert alone.remove_columns("image").to_list() == shared.remove_columns("image").to_list()


def test_loading_needs_neither_torch_nor_the_model():
    code = (
        "import sys, data_scripts.mixture, data_scripts.check, data_scripts.publish, data_scripts.own\n"
        "import data_scripts.referring, data_scripts.semantic, data_scripts.reason_seg, data_scripts.vqa\n"
        "assert not {'torch', 'transformers', 'modeling_gsva', 'trainers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_read_upright(root, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = trees.picture(root / "a.jpg", size=(6, 4), exif=exif)
    assert read_image({"path": str(path), "bytes": None}).size == ((6, 4) if orientation < 5 else (4, 6))
    assert read_image({"path": None, "bytes": path.read_bytes()}).size == ((6, 4) if orientation < 5 else (4, 6))


# ---- transforms and training sets ------------------------------------------------------------------------------------
def words(example):
    return [turn["content"] for turns in example["conversations"] for turn in turns], [
        mask.sum(axis=(1, 2)).tolist() for mask in example["masks"]
    ]


@pytest.fixture
def rows():
    return data_scripts.load("grefcoco", MINI)


def test_an_example(rows):
    example = ReferringTransform(num_expressions=2)(rows[0], seed=0, epoch=0, index=0)
    (turns,), (masks,) = example["conversations"], example["masks"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert masks.dtype == np.uint8 and masks.shape == (2, rows[0]["height"], rows[0]["width"])
    assert example["image"].mode == "RGB" and example["image_id"] == rows[0]["image_id"]
    present = [token == "[SEG]" for token in re.findall(r"\[(?:SEG|REJ)\]", turns[1]["content"])]
    assert present == masks.any(axis=(1, 2)).tolist()


def test_an_example_is_a_function_of_row_seed_epoch_and_index(rows):
    transform = ReferringTransform()
    row = rows[0]
    assert words(transform(row, 1, 2, 3)) == words(ReferringTransform()(dict(row), 1, 2, 3))
    others = [transform(row, *numbers) for numbers in ((2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert len({str(words(example)) for example in [transform(row, 1, 2, 3), *others] if example}) > 1


def test_epochs_differ_and_runs_do_not(rows):
    first, again = (
        TrainingDataset(rows, ReferringTransform(), seed=3),
        TrainingDataset(rows, ReferringTransform(), seed=3),
    )
    epochs = [[words(first[epoch * len(first) + i]) for i in range(len(first))] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    backwards = [words(again[i]) for i in reversed(range(2 * len(first)))]
    assert backwards[::-1] == epochs[0] + epochs[1]  # whatever the order: workers, ranks, a resumed run
    other_seed = TrainingDataset(rows, ReferringTransform(), seed=4)
    assert [words(other_seed[i]) for i in range(len(rows))] != epochs[0]


def test_workers_give_the_same_stream(rows):
    torch_data = pytest.importorskip("torch.utils.data")
    dataset = TrainingDataset(rows, ReferringTransform(), seed=3)
    indices = list(range(5, 15))
    streams = [
        [words(example) for example in torch_data.DataLoader(dataset, None, sampler=indices, num_workers=workers)]
        for workers in (0, 2)
    ]
    assert len(streams[0]) == 10 and str(streams[0]) == str(streams[1])


def test_another_wording(rows):
    wording = Wording(questions=("<image>\nFind {}.",), answers=(("Here:", "{} [SEG]"),), separator=" and ")
    question, answer = words(ReferringTransform(wording, num_expressions=2)(rows[0], 0, 0, 1))[0]
    assert question.startswith("<image>\nFind ") and answer.startswith("Here: ") and answer.count(" and ") >= 1


def test_draws_are_even():
    counts = np.bincount([Draws(0, 0, i).weighted([9, 3, 3, 1], "family") for i in range(4000)])
    assert np.abs(counts / 4000 - np.array([9, 3, 3, 1]) / 16).max() < 0.03
    assert sorted(Draws(1, 2, 3).subset(6, 6)) == list(range(6)) and Draws(0, 0, 0).subset(2, 3) == [0, 1]


def test_explanations():
    rows = data_scripts.load("ReasonSeg", MINI)
    explained = next(row for row in rows if row["expressions"][0]["explanation"])
    text_only = ReasoningTransform(explanatory=1.0)(explained)
    assert all(mask.shape == (0, explained["height"], explained["width"]) for mask in text_only["masks"])
    assert text_only["conversations"][0][1]["content"] == explained["expressions"][0]["explanation"]
    never = [ReasoningTransform(explanatory=-1)(explained, index=i) for i in range(20)]
    assert not any(explained["expressions"][0]["explanation"] in answer for one in never for answer in words(one)[0])


def test_the_mixture_keeps_its_rates_and_its_stream():
    names = {"sem_seg": ["ade20k", "pascal_part"], "refer_seg": ["grefcoco"], "vqa": ["llava_instruct_150k"]}
    mixed = load_mixture(MINI, names, rates={"vqa": 6}, length=60, seed=5)
    assert len(mixed) == 60 and mixed.rates == [9, 3, 6]
    kinds = ["vqa" if not len(one["masks"][0]) else "seg" for one in (mixed[i] for i in range(120))]
    assert 20 <= kinds.count("vqa") <= 60  # a third of 120, more or less
    again = load_mixture(MINI, names, rates={"vqa": 6}, length=60, seed=5)
    assert words(again[77]) == words(mixed[77]) and words(mixed[17]) != words(mixed[77])


def test_the_mixture_loads_only_what_is_asked_for(root, monkeypatch):
    trees.ade20k(root, trees.full(1))
    loaded = []
    load = data_scripts.load
    monkeypatch.setattr(data_scripts, "load", lambda name, *args: loaded.append(name) or load(name, *args))
    assert len(load_mixture(root, {"sem_seg": ["ade20k"]}, length=3)[1]["masks"]) == 1
    assert loaded == ["ade20k"]


def test_a_part_has_two_names(root):
    trees.parts(root, "pascal_part", "dog:head")
    row = data_scripts.load("pascal_part", root)[0]
    asked = {words(SemanticTransform()(row, index=i))[0][0] for i in range(60)}
    assert any("dog head" in question for question in asked) and any("the head of the dog" in one for one in asked)


@pytest.mark.parametrize("index", [-1])
def test_items_are_numbered_from_0(rows, index):
    with pytest.raises(IndexError, match="from 0, got -1"):
        TrainingDataset(rows, ReferringTransform())[index]


def test_options_of_a_training_set(rows):
    with pytest.raises(ValueError, match="'raise' or 'skip', got 'ignore'"):
        TrainingDataset(rows, ReferringTransform(), on_bad_image="ignore")
    with pytest.raises(ValueError, match="no rows"):
        TrainingDataset([], ReferringTransform())
    with pytest.raises(ValueError, match="a rate above 0"):
        Mixture({"refer_seg": (0, [TrainingDataset(rows, ReferringTransform())])}, 5)


# ---- own data --------------------------------------------------------------------------------------------------------
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
        ({"image": "cats/2.jpg", "expressions": []}, r"line 2: The picture .*cats/2\.jpg is missing"),
        ({"expressions": []}, "line 2: it lacks 'image'"),
        ({"image": "cats/1.jpg"}, "line 2: a record needs an 'image' and a list 'expressions'"),
        (record(SQUARE, text=" . "), "line 2: expression 0: its text is ' . '"),
        ({"image": "cats/1.jpg", "expressions": [{"text": "a"}]}, "line 2: expression 0: it lacks 'mask'"),
        (record([0.1, 0.1, 0.5, 0.1, 0.5, 0.5]), "line 2: expression 0: its mask has no pixel .*Write null"),
        (record({"size": [3, 3], "counts": "013000"}), r"its mask is \[3, 3\] .*its picture \[30, 40\]"),
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


# ---- check and publish -----------------------------------------------------------------------------------------------
def test_check_says_what_is_complete_and_what_is_missing(root, capsys):
    trees.ade20k(root, trees.full(1), trees.full(2))
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1]), trees.ref(1, ann_id=[-1])])
    assert check.main([str(root)]) == 0
    text = capsys.readouterr().out
    assert "ade20k: complete (train 2), 2 expressions, 0 without a target" in text
    assert "grefcoco: complete (train 1), 2 expressions, 1 without a target" in text
    assert "not there: refclef, refcoco, " in text
    (root / "ade20k/images/training/1.jpg").write_bytes(b"no picture")
    (root / "refer_seg/images/mscoco/images/train2014/1.jpg").unlink()
    assert check.main([str(root), "--open"]) == 1
    text = capsys.readouterr().out
    assert "1 of 2 pictures are missing or wrong" in text and "training/1.jpg cannot be read" in text
    assert "grefcoco: INCOMPLETE" in text and "0 complete, 2 incomplete" in text
    assert check.main([str(root), "mapillary"]) == 1
    assert "mapillary/config_v2.0.json is missing" in capsys.readouterr().out


def test_publish_writes_a_folder_that_load_dataset_opens(root, tmp_path):
    from datasets import load_dataset

    trees.referring(root, "refcoco", [trees.ref(), trees.ref(1, split="testA", image_id=2)], images=(1, 2))
    out = tmp_path / "published"
    assert publish.main(["refcoco", str(root), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "data"]
    picture = root / "refer_seg/images/mscoco/images/train2014/1.jpg"
    picture.unlink()  # pictures are embedded
    rows = load_dataset(str(out), cache_dir=str(tmp_path / "hub"))
    assert {split: len(part) for split, part in rows.items()} == {"train": 1, "test": 1, "testA": 1}
    assert rows["train"][0]["image"].size == (trees.WIDTH, trees.HEIGHT)
    assert mask_area(rows["train"][0]["expressions"][0]["mask"]) == 100
    assert ReferringTransform()(rows["train"][0])["masks"][0].sum() == 100
    assert data_scripts.load(str(out), split="testA")[0]["image_id"] == "2"


def test_options_that_a_set_does_not_take(root):
    with pytest.raises(ValueError, match="'grefcoco' takes no option size, seed"):
        data_scripts.load("grefcoco", root, size=3, seed=0)


def test_publish_refuses_what_is_incomplete_or_there(root, tmp_path, capsys):
    trees.referring(root, "refcoco", [trees.ref()], pictures=False)
    assert publish.main(["refcoco", str(root), str(tmp_path / "published")]) == 1
    assert "1 of 1 pictures are missing" in capsys.readouterr().err
    assert not (tmp_path / "published").exists()
    with pytest.raises(FileExistsError, match="is there already"):
        publish.publish("refcoco", root, tmp_path)
