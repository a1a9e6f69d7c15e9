"""Predictions in the formats of annotation tools, read again by this project and by the tools' own packages."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

import data_scripts
from data_scripts import export as module
from data_scripts.export import export, main
from data_scripts.export_formats import FORMATS
from data_scripts.label_studio import decode_brush, encode_brush
from data_scripts.masks import decode_mask, encode_mask, segmentation_to_rle
from data_scripts.outlines import mask_outlines

MASK = pyarrow.struct([("size", pyarrow.list_(pyarrow.int32(), 2)), ("counts", pyarrow.string())])
SCHEMA = pyarrow.schema(
    [("image_id", pyarrow.string()), ("height", pyarrow.int32()), ("width", pyarrow.int32()), ("expression", pyarrow.string()),
     ("is_rejected", pyarrow.bool_()), ("probability", pyarrow.float32()), ("area", pyarrow.int64()), ("mask", MASK), ("mask_png", pyarrow.binary()),
     ("model", pyarrow.string()), ("error", pyarrow.string())]
)  # fmt: skip
HOLED = np.ones((6, 8), bool)
HOLED[2:4, 2:5] = False
PARTS = np.zeros((6, 8), bool)
PARTS[0, 0] = PARTS[3:6, 6:8] = True
NAMES = {"a b.png": (6, 8), "folder/a_b.jpg": (5, 7)}


def row(image_id, expression, mask=None, probability=0.75, **others):
    height, width = NAMES.get(image_id, (6, 8))
    kept = None if mask is None else encode_mask(mask)
    area = 0 if mask is None else int(mask.sum())
    facts = {
        "area": area,
        "image_id": image_id,
        "height": height,
        "width": width,
        "expression": expression,
        "model": "m",
    }
    return {
        **facts,
        "is_rejected": mask is None,
        "probability": probability,
        "mask": kept,
        "mask_png": None,
        "error": None,
        **others,
    }


def noise(seed, shape=(5, 7)):
    return np.random.default_rng(seed).random(shape) > 0.5


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), path)


ROWS = [
    row("a b.png", "the <b> & 'c'", HOLED),
    row("folder/a_b.jpg", "both dogs", noise(0)),
    row("a b.png", "a unicorn"),
    row("folder/a_b.jpg", "a unicorn", probability=None),
    row("a b.png", "both dogs", PARTS, probability=None),
    row("a b.png", "broken", error="It is too long.", is_rejected=None),
    row("a b.png", "empty", np.zeros((6, 8), bool)),
    row("gone.jpg", "both dogs", error="cannot be read", is_rejected=None, height=None, width=None),
    row("folder/a_b.jpg", "a fish"),
]
KEPT = {
    "a_b": {"the <b> & 'c'": HOLED, "both dogs": PARTS},
    "folder_a_b": {"both dogs": noise(0)},
}


@pytest.fixture
def out(tmp_path):
    """Predictions of two images in two shards, an image in both, and a file of a run that was killed."""
    write(tmp_path / "out/predictions-000000.parquet", ROWS[:4])
    write(tmp_path / "out/predictions-000001.parquet", ROWS[4:])
    (tmp_path / "out/.half.parquet").write_bytes(b"PAR1")
    for name, (height, width) in NAMES.items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
    return tmp_path / "out"


def run(out, kind):
    output = out.parent / kind
    counts = export(out, kind, output, out.parent / "pictures")
    return output, counts


def read_back(output):
    rows = data_scripts.load("own", output, split="train", cache_dir=str(output.parent / "cache"))
    return {
        row["image"].filename.rpartition("/")[2].rpartition(".")[0]: {
            entry["text"]: decode_mask(entry["mask"]).astype(bool) for entry in row["expressions"]
        }
        for row in rows
    }


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "index_png"])
def test_every_pixel_comes_back(out, kind):
    output, counts = run(out, kind)
    assert counts == {
        "images": 2, "masks": 3, "absent": 3, "expressions that have an error": 1, "images that could not be read": 1,
        "expressions whose mask has no pixel": 1,
    }  # fmt: skip
    found = read_back(output)
    assert found.keys() == KEPT.keys()
    for name, masks in KEPT.items():
        shown = {text: mask for text, mask in found[name].items() if mask.any()}
        assert shown.keys() == masks.keys()
        assert all((shown[text] == mask).all() for text, mask in masks.items())
    absent = {name: {text for text, mask in masks.items() if not mask.any()} for name, masks in found.items()}
    # data.yaml says only what is absent in every image without it
    assert absent == {"a_b": {"a unicorn"}, "folder_a_b": {"a unicorn"} | ({"a fish"} if kind != "yolo" else set())}


def test_a_label_map_shows_the_smallest_mask_and_says_what_it_lost(out):
    output, counts = run(out, "index_png")
    assert counts["pixels of masks under a smaller one"] == (HOLED & PARTS).sum() == 7
    found = read_back(output)["a_b"]
    assert (found["both dogs"] == PARTS).all() and (found["the <b> & 'c'"] == (HOLED & ~PARTS)).all()
    assert not found["a unicorn"].any()
    with Image.open(output / "masks/a_b.png") as labels:
        assert labels.mode == "P" and labels.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]  # VOC's first two classes


def test_a_label_map_of_many_classes_has_16_bits_and_keeps_255_free(out, tmp_path):
    rows = [
        row("a b.png", f"thing {n}", np.eye(6, 8, k=n % 8) > 0 if n < 2 else np.eye(6, 8, k=7) > 0) for n in range(300)
    ]
    write(tmp_path / "many/0.parquet", rows)
    export(tmp_path / "many", "index_png", tmp_path / "maps", tmp_path / "pictures")
    classes = json.loads((tmp_path / "maps/classes.json").read_text())["classes"]
    assert len(classes) == 300 and "255" not in classes and classes["256"] == "thing 254"
    assert (read_back(tmp_path / "maps")["a_b"]["thing 1"] == (np.eye(6, 8, k=1) > 0)).all()


def test_coco_holds_the_run_lengths_to_the_letter_and_pycocotools_reads_it(out):
    from pycocotools.coco import COCO

    output, _ = run(out, "coco")
    coco = COCO(output / "annotations/instances_train.json")
    written = {row["mask"]["counts"] for row in ROWS if row["mask"] and decode_mask(row["mask"]).any()}
    assert {annotation["segmentation"]["counts"] for annotation in coco.anns.values()} == written
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        mask = coco.annToMask(annotation)
        assert mask.shape == (image["height"], image["width"]) and mask.sum() == annotation["area"]
        x, y, width, height = map(int, annotation["bbox"])
        assert mask[y : y + height, x : x + width].sum() == mask.sum()
    assert [image["image_id"] for image in coco.imgs.values()] == list(NAMES)
    assert [annotation.get("score") for annotation in coco.anns.values()] == [0.75, None, 0.75]
    rows = data_scripts.load("own", output, split="train")
    assert {entry["mask"]["counts"] for row in rows for entry in row["expressions"]} >= written


def test_masks_as_png_are_exported_as_well(tmp_path):
    file = io.BytesIO()
    Image.fromarray(HOLED).save(file, "PNG")
    write(tmp_path / "out/0.parquet", [row("x", "all", HOLED) | {"mask": None, "mask_png": file.getvalue()}])
    export(tmp_path / "out/0.parquet", "coco", tmp_path / "coco")
    (annotation,) = json.loads((tmp_path / "coco/annotations/instances_train.json").read_text())["annotations"]
    assert annotation["segmentation"] == encode_mask(HOLED)


def test_outlines_give_every_mask_again():
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width = (int(side) for side in rng.integers(1, 30, 2))
        mask = np.kron(rng.random((height, width)) > rng.choice([0.2, 0.5, 0.8]), np.ones((2, rng.integers(1, 4)))) > 0
        # as YOLO's file holds them
        lines = [
            [float(f"{part:.9g}") for part in (outline / mask.shape[::-1]).ravel()] for outline in mask_outlines(mask)
        ]
        pixels = [[part * mask.shape[1 - n % 2] for n, part in enumerate(line)] for line in lines]
        masks = [segmentation_to_rle([line], *map(int, mask.shape), in_pixels=True) for line in pixels]
        again = sum((decode_mask(one) for one in masks), np.zeros(mask.shape, np.uint8))
        assert (again == mask).all()  # and no pixel twice


# ---- the tools' own packages -------------------------------------------------------------------------------------------
def test_supervision_reads_coco_and_yolo(out):
    supervision = pytest.importorskip("supervision")
    for kind in ("coco", "yolo"):
        output, _ = run(out, kind)
        if kind == "coco":
            arguments = {"annotations_path": str(output / "annotations/instances_train.json")}
        else:
            arguments = {
                "annotations_directory_path": str(output / "labels/train"),
                "data_yaml_path": str(output / "data.yaml"),
            }
        read = getattr(supervision.DetectionDataset, f"from_{kind}")
        dataset = read(images_directory_path=str(output / "images/train"), force_masks=True, **arguments)
        assert len(dataset) == 2
        for path, _, found in dataset:
            masks = KEPT[path.rpartition("/")[2].rpartition(".")[0]]
            assert {dataset.classes[n] for n in found.class_id} == set(masks)
            if kind == "coco":  # supervision fills YOLO's outlines with OpenCV, which draws their lines, too
                assert all((masks[dataset.classes[n]] == mask).all() for n, mask in zip(found.class_id, found.mask))


def test_label_studio_reads_its_masks(out):
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    output, _ = run(out, "label_studio")
    tasks = json.loads((output / "train.json").read_text())
    assert tasks[0]["data"] == {
        "image": "/data/local-files/?d=label_studio/images/a_b.png", "image_id": "a b.png", "absent": ["a unicorn"],
    }  # fmt: skip
    for task, masks in zip(tasks, KEPT.values()):
        for result in task["predictions"][0]["result"]:
            (text,) = result["value"]["brushlabels"]
            pixels = brush.decode_rle(result["value"]["rle"]).reshape(*masks[text].shape, 4)
            assert (pixels[..., 3].astype(bool) == masks[text]).all()
    theirs = [int(byte) for byte in brush.encode_rle((np.repeat(noise(1).ravel(), 4) * 255).tolist())]
    assert (decode_brush(theirs, 5, 7) == noise(1)).all()


def test_label_studio_accepts_its_interface_and_tasks(out):
    interfaces = pytest.importorskip("label_studio_sdk.label_interface")
    output, _ = run(out, "label_studio")
    interface = interfaces.LabelInterface((output / "interface.xml").read_text())
    interface.validate()
    assert list(interface.get_tag("mask").labels) == ["the <b> & 'c'", "both dogs"]
    for task in json.loads((output / "train.json").read_text()):
        assert interface.validate_prediction(task["predictions"][0])


# ---- tasks of Label Studio that people have changed --------------------------------------------------------------------
def task(*results, url="/data/upload/3/0123abcd-a_b.png", **others):
    return {"id": 1, "annotations": [{"result": list(results)}], "data": {"image": url}, **others}


def brushed(mask, text="dog"):
    value = {"format": "rle", "rle": encode_brush(mask), "brushlabels": [text]}
    return {"type": "brushlabels", "value": value, "original_height": 6, "original_width": 8}


def exported(out, *tasks):
    output, _ = run(out, "label_studio")
    (output / "train.json").write_text(json.dumps(tasks))
    return output


def test_annotations_come_before_predictions_and_cancelled_ones_do_not_count(out):
    outline = {
        "type": "polygonlabels",
        "value": {"points": [[0, 0], [100, 0], [100, 50], [0, 50]], "polygonlabels": ["top"]},
    }
    changed = task(brushed(HOLED), brushed(PARTS), outline, {"type": "choices", "value": {"choices": ["good"]}})
    changed["annotations"].append({"was_cancelled": True, "result": [brushed(PARTS, "no")]})
    changed["predictions"] = [{"result": [brushed(PARTS, "no")]}]
    (row,) = data_scripts.load("own", exported(out, changed), split="train")
    dog, top = row["expressions"]
    assert (dog["text"], dog["num_targets"], top["text"]) == ("dog", 2, "top")
    assert (decode_mask(dog["mask"]) == (HOLED | PARTS)).all()
    assert decode_mask(top["mask"])[:3].all() and not decode_mask(top["mask"])[3:].any()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"type": "rectanglelabels", "value": {"rectanglelabels": ["a"]}}, "'rectanglelabels', which has no mask"),
        (brushed(noise(0)), "holds 140 values of 8 bits, but an image of 6 x 8"),
        ({"type": "brushlabels", "value": {"rle": [0, 1], "brushlabels": ["a"]}}, "of 2 bytes is cut off"),
        ({"type": "brushlabels", "value": {"rle": [0.5], "brushlabels": ["a"]}}, "must be a list of bytes"),
        (brushed(np.zeros((6, 8))), "has no pixel"),
        ({"type": "polygonlabels", "value": {"points": [1], "polygonlabels": ["a"]}}, "in percent of the image"),
        ({"type": "brushlabels", "value": {"brushlabels": 3}}, "must be a list of texts"),
        (7, "a result has a type and a value"),
    ],
)
def test_a_wrong_result_is_named(out, result, message):
    with pytest.raises(ValueError, match=message) as raised:
        data_scripts.load("own", exported(out, task(result)), split="train")
    assert "train.json, task 0" in str(raised.value) and "result 0" in str(raised.value)


def test_a_task_cannot_name_an_image_outside(out):
    with pytest.raises(ValueError, match=r"passwd"):
        data_scripts.load("own", exported(out, task(brushed(HOLED), url="../../etc/passwd")), split="train")


# ---- names, and what goes wrong ----------------------------------------------------------------------------------------
def test_names_are_flat_and_differ_without_suffix_and_in_case(tmp_path):
    ids = ["a/b.jpg", "a_b.png", "A_B.gif", "../c.jpg", "http://x.y/z", ".hidden", "日" * 200, "17"]
    write(tmp_path / "out/0.parquet", [row(name, "x", HOLED) for name in ids])
    export(tmp_path / "out", "yolo", tmp_path / "yolo")
    names = sorted(path.stem for path in (tmp_path / "yolo/labels/train").iterdir())
    assert names == sorted(["a_b", "a_b_2", "A_B_3", "_c", "http___x.y_z", "hidden", "日" * 50, "17"])
    assert yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())["names"] == {0: "x"}


def test_the_command_line_says_what_it_wrote(out, capsys):
    assert main([str(out), "--format", "coco", "--images", str(out.parent / "pictures")]) == 0
    assert "out_coco: 2 images, 3 masks, 3 absent; left out: 1 expressions" in capsys.readouterr().out
    assert main([str(out), "--format", "coco"]) == 1
    assert "exists already and is not overwritten" in capsys.readouterr().err


def test_the_order_of_an_image_does_not_depend_on_batches(out, monkeypatch):
    _, counts = run(out, "coco")
    monkeypatch.setattr(module, "BATCH", 1)
    assert export(out, "coco", out.parent / "again") == counts


def broken(rows=None, images=None, content=None):
    def make(out):
        if rows is not None:
            write(out / "predictions-000000.parquet", rows)
        if content is not None:
            (out / "predictions-000000.parquet").write_bytes(content)
        return None if images is None else out.parent / images

    return make


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (broken([row("a b.png", "x", HOLED) | {"mask": None}]), ValueError, "--masks rle"),
        (broken([row("a b.png", "x", noise(0))]), ValueError, r"its mask is \[5, 7\]"),
        (broken([row(None, "x", HOLED)]), ValueError, "Row 0 of the predictions has no image_id"),
        (broken([row("a b.png", "x", HOLED), row("a b.png", "x", noise(0), height=5, width=7)]), ValueError, "several sizes"),
        (broken([row("b.png", "x", HOLED)], "pictures"), FileNotFoundError, "'b.png' of the predictions"),
        (broken([row("../a b.png", "x", HOLED)], "pictures"), ValueError, "leads out of"),
        (broken([row("a_b.jpg", "x", HOLED)], "pictures/folder"), ValueError, "is 5 x 7"),
        (broken(images="nowhere"), FileNotFoundError, "--images .*nowhere is not a folder"),
        (broken(content=b"PAR1"), ValueError, "not a parquet file, or damaged"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_named_and_nothing_is_left(out, make, error, message):
    images = make(out)
    with pytest.raises(error, match=message):
        export(out, "labelme", out.parent / "labelme", images)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "pictures"]


def test_other_parquet_files_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no predictions \(\*\.parquet\)"):
        export(tmp_path, "coco", tmp_path / "coco")
    pyarrow.parquet.write_table(pyarrow.table({"image": [1]}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"0\.parquet has no column image_id, height.*\(it has image\)"):
        export(tmp_path, "coco", tmp_path / "coco")
