"""Your own data in every form, and its errors."""

import json

import data_trees as trees
import numpy as np
import pytest
from data_trees import SQUARE, words
from PIL import Image

import data_scripts
from data_scripts import check, publish
from data_scripts.masks import decode_mask, encode_mask, mask_area
from data_scripts.mixture import TrainingDataset
from data_scripts.own import OwnBuilder
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
    assert rows[0]["image"].size == (trees.WIDTH, trees.HEIGHT) and rows[0]["image_id"] == "cats/1.jpg"
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


# ---- what is absent, and what is only not drawn --------------------------------------------------------------------------
BOX = {"id": 3, "image_id": 9, "caption": "a cat", "bbox": [5, 5, 10, 10], "area": 100}


def coco(root, *annotations, images=({"id": 9, "file_name": "1.jpg"},), **more):
    for image in images:
        trees.picture(root / image["file_name"])
    trees.write(root / "train.json", {"images": list(images), "annotations": list(annotations), **more})
    return root


SPELLINGS = [None, float("nan"), "", [], [[]], {}, {"size": [30, 40], "counts": []}]


@pytest.mark.parametrize("value", SPELLINGS, ids=repr)
@pytest.mark.parametrize("others", [(), ({"id": 1, "image_id": 9, "caption": "a cat", "segmentation": [SQUARE]},)])
def test_a_coco_annotation_with_a_box_and_no_mask_is_not_absent(root, value, others, capsys):
    coco(root, *others, {**BOX, "segmentation": value})
    with pytest.raises(
        ValueError, match=r"train\.json, image 9: .*annotation 3: it has bbox .* and area 100, but no mask"
    ):
        data_scripts.load("own", root)
    assert check.main([str(root)]) == 1 and "own: INCOMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize("annotation", [{key: BOX[key] for key in ("id", "image_id", "caption")}, *(
    {"id": 3, "image_id": 9, "caption": "a cat", "segmentation": value} for value in SPELLINGS[1:])], ids=repr)  # fmt: skip
def test_in_coco_only_null_says_that_something_is_absent(root, annotation):
    coco(root, annotation)
    with pytest.raises(ValueError, match="annotation 3: it has no mask .*write null"):
        data_scripts.load("own", root)
    coco(root, {**annotation, "segmentation": None})
    assert data_scripts.load("own", root)[0]["expressions"][0]["num_targets"] == 0


def test_annotations_that_contradict_each_other(root):
    one = {"image_id": 9, "caption": "a cat"}
    coco(root, {**one, "id": 1, "segmentation": [SQUARE]}, {**one, "id": 2, "segmentation": None})
    with pytest.raises(ValueError, match="annotation 2 says that it has no target .*annotation 1 gives it a mask"):
        data_scripts.load("own", root)
    coco(root, {**BOX, "segmentation": {"size": [30, 40], "counts": [1200]}})
    with pytest.raises(ValueError, match="annotation 3: it has bbox .*its mask has no pixel"):
        data_scripts.load("own", root)


@pytest.mark.parametrize("entry", [
    {"mask": None, "bbox": [5, 5, 10, 10]}, {"mask": None, "area": 3}, {"masks": []}, {"masks": [None]}, {"masks": [SQUARE, None]},
    {"mask": []}, {"mask": [[]]}, {"mask": ""}, {"mask": {}}, {"mask": float("nan")}, {}], ids=repr)  # fmt: skip
def test_a_line_says_null_alone_for_what_is_absent(root, entry):
    own(root, {"image": "cats/1.jpg", "expressions": [{"text": "a cat", **entry}]})
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: expression 0: "):
        data_scripts.load("own", root)


def test_absent_expressions_may_be_listed(root):
    own(
        root,
        {**record(SQUARE), "absent": ["a unicorn", "a dog"]},
        {"image": "cats/1.jpg", "expressions": [], "absent": ["a cat"]},
    )
    rows = data_scripts.load("own", root)
    assert [[(e["text"], mask_area(e["mask"]), e["num_targets"]) for e in row["expressions"]] for row in rows] == [
        [("a cat", 100, 1), ("a unicorn", 0, 0), ("a dog", 0, 0)],
        [("a cat", 0, 0)],
    ]
    own(root, {**record(SQUARE), "absent": ["A cat"]})
    with pytest.raises(ValueError, match="'A cat' is in 'absent' and has a mask"):
        data_scripts.load("own", root)
    own(root, {**record(SQUARE), "absent": [7]})
    with pytest.raises(ValueError, match="'absent' is .*give a list of texts"):
        data_scripts.load("own", root)


# ---- who is who ----------------------------------------------------------------------------------------------------------
def test_ids_that_stand_twice(root):
    first = {"id": 1, "image_id": 9, "caption": "a cat", "segmentation": [SQUARE]}
    two = ({"id": 9, "file_name": "1.jpg"}, {"id": 9, "file_name": "2.jpg"})
    for images in (two, (two[0], {**two[1], "id": "9"})):
        coco(root, first, images=images)
        with pytest.raises(
            ValueError, match=r"images\[1\]: id '?9'? stands twice, with file_name '1.jpg' and '2.jpg'"
        ):
            data_scripts.load("own", root)
    coco(root, first, {**first, "segmentation": [[20, 20, 30, 20, 30, 25, 20, 25]]})
    with pytest.raises(ValueError, match=r"annotations\[1\]: id 1 stands twice"):
        data_scripts.load("own", root)
    coco(root, first, first)  # word for word
    assert data_scripts.load("own", root)[0]["expressions"][0]["num_targets"] == 1


def test_images_have_ids_of_their_own(root):
    for name in ("x/1.jpg", "y/1.jpg"):
        trees.picture(root / name)
    lines = [
        {"image": name, "expressions": [{"text": "a cat", "mask": None}]}
        for name in ("x/1.jpg", "./y/1.jpg", "x/1.jpg")
    ]
    own(root, *lines)
    assert [row["image_id"] for row in data_scripts.load("own", root)] == ["x/1.jpg", "y/1.jpg", "x/1.jpg"]
    own(root, *({**line, "image_id": 7} for line in lines))
    with pytest.raises(ValueError, match=r"line 2: its image_id is '7', as that of .*x/1\.jpg"):
        data_scripts.load("own", root)


def test_a_stated_size_is_looked_at(root):
    coco(root, images=({"id": 9, "file_name": "1.jpg", "width": 80, "height": 60},))
    with pytest.raises(ValueError, match=r"image 9: The image .*1\.jpg is 30 x 40 .*for 60 x 80"):
        data_scripts.load("own", root)
    own(root, {**record(SQUARE), "height": 40, "width": 30})
    (root / "train.json").unlink()
    with pytest.raises(ValueError, match="line 1: .*is 30 x 40 .*for 40 x 30; height and width are swapped"):
        data_scripts.load("own", root)


@pytest.mark.parametrize(("mask", "count"), [(SQUARE, 0), (None, 1), ({"size": [30, 40], "counts": [1200]}, 2)])
def test_a_number_of_targets_that_contradicts_the_pixels(root, mask, count):
    own(root, record(mask, num_targets=count))
    with pytest.raises(
        ValueError, match=f"its num_targets is {count}, but its mask has {100 * (mask == SQUARE)} pixels"
    ):
        data_scripts.load("own", root)


def test_a_mask_without_a_pixel_counts_as_no_target_everywhere(root):
    own(root, record({"size": [30, 40], "counts": [1200]}), record(SQUARE))
    rows = data_scripts.load("own", root)
    assert [row["expressions"][0]["num_targets"] for row in rows] == [0, 1]
    assert "2 expressions, 1 without a target" in str(check.check("own", root))


# ---- files ---------------------------------------------------------------------------------------------------------------
def test_a_byte_order_mark_and_other_encodings(root):
    trees.picture(root / "cats/1.jpg")
    line = json.dumps(record(SQUARE, text="caf\u00e9"), ensure_ascii=False)
    trees.write(root / "train.jsonl", f"{line}\n".encode("utf-8-sig") * 2)  # two files put together
    assert len(data_scripts.load("own", root)) == 2
    for encoding, name in [("utf-16", "UTF-16"), ("cp1252", "not UTF-8")]:
        trees.write(root / "train.jsonl", line.encode(encoding))
        with pytest.raises(ValueError, match=rf"train\.jsonl.*{name}.*UTF-8") as raised:
            data_scripts.load("own", root)
        assert "download" not in str(raised.value)


def test_suffixes_in_any_case_and_hidden_files(root):
    own(root, record(SQUARE))
    (root / "train.jsonl").rename(root / "train.JSONL")
    trees.write(root / "._train.jsonl", b"\0\5\0")
    trees.write(root / ".val.jsonl", b"{")
    assert len(data_scripts.load("own", root)) == 1
    assert not check.check("own", root).problems


def test_soft_edges_are_told_once(root, caplog):
    soft = Image.new("L", (160, 120))
    soft.paste(255, (21, 21, 61, 61))  # pixels 5 to 14 are more than half inside
    for name in ("a", "b"):
        path = root / f"masks/{name}.png"
        path.parent.mkdir(exist_ok=True)
        soft.resize((40, 30), Image.Resampling.BOX).save(path)
    own(root, record("masks/a.png"), record("masks/b.png"))
    rows = data_scripts.load("own", root)
    assert all(mask_area(row["expressions"][0]["mask"]) == 100 for row in rows)
    assert caplog.text.count("has soft edges") == 1 and "masks/a.png" in caplog.text


def test_changes_behind_a_trusted_link_are_seen(root, monkeypatch):
    elsewhere = root.parent / "elsewhere"
    monkeypatch.setenv("GSVA_TRUSTED_FOLDERS", str(elsewhere))
    trees.label_map(elsewhere / "m.png", decode_mask(rle()) * 255)
    (root / "masks").symlink_to(elsewhere)
    own(root, record("masks/m.png"))
    assert mask_area(data_scripts.load("own", root)[0]["expressions"][0]["mask"]) == 100
    trees.label_map(elsewhere / "m.png", trees.full(255))
    assert mask_area(data_scripts.load("own", root)[0]["expressions"][0]["mask"]) == 1200


def test_only_data_is_built_again(root, monkeypatch):
    own(root, record(SQUARE), record("masks/1.png"))
    trees.label_map(root / "masks/1.png", decode_mask(rle()) * 255)
    data_scripts.load("own", root)
    built = []
    row = OwnBuilder.row
    monkeypatch.setattr(OwnBuilder, "row", lambda self, record: built.append(record) or row(self, record))
    for name in ("notes.txt", ".DS_Store", "Thumbs.db", "runs/pictures/1.png", "README.md", "cats/other.jpg"):
        trees.write(root / name, b"no data")
    assert len(data_scripts.load("own", root)) == 2 and not built
    trees.label_map(root / "masks/1.png", trees.full(1))
    assert mask_area(data_scripts.load("own", root)[1]["expressions"][0]["mask"]) == 1200 and len(built) == 2


def test_the_first_build_reads_headers_not_pixels(root, monkeypatch):
    own(root, record(SQUARE), record([SQUARE]))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    builder = data_scripts.load_builder("own", root)
    assert len(list(builder.rows("train"))) == 2


def test_an_empty_split_says_so(root, capsys):
    own(root, record(SQUARE))
    trees.write(root / "val.jsonl", "\n")
    assert len(data_scripts.load("own", root)) == 1
    with pytest.raises(ValueError, match=r"split 'val' is empty: .*val\.jsonl holds no images"):
        data_scripts.load("own", root, "val")
    assert check.main([str(root)]) == 1
    text = capsys.readouterr().out
    assert "(train 1), 1 expressions" in text and "val.jsonl holds no images" in text
    (root / "train.jsonl").unlink()
    with pytest.raises(ValueError, match=r"val\.jsonl holds no images"):
        data_scripts.load("own", root)
