"""`Predictor`: columns in, rows of one schema out, the same as `segment` gives, in any process."""

import io
import multiprocessing
import pickle

import numpy as np
import pytest
from PIL import Image

from data_scripts import shapes
from data_scripts.schema import decode_mask
from evaluation import requests
from evaluation.prediction_rows import PREDICTION_SCHEMA, prediction_table
from evaluation.predictor import Predictor
from evaluation.requests import batches, padding
from metrics.gres import mask_box

ASKED = ["the red circle", "all stars", "the green square at the left"]


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def predictor(model, processor):
    return Predictor("tiny", expressions=ASKED, threshold=-0.5, loaded=(processor, model))


def by_hand(model, processor, picture, asked, **options):
    inputs = processor(images=[picture], expressions=[asked], return_tensors="pt")
    return processor.post_process_segmentation(model.segment(**inputs, **options), inputs)[0]


def rows_of(columns) -> list[dict]:
    return prediction_table(columns).to_pylist()


def test_rows_say_what_segment_says(predictor, model, processor, make_picture):
    pictures = [make_picture(n, 30 + 7 * n, 40 - 5 * n) for n in range(4)]
    forms = [pictures[0], np.asarray(pictures[1]), png(pictures[2]), {"bytes": png(pictures[3]), "path": "d.png"}]
    scores = [row["score"] for row in rows_of(predictor({"image": pictures}))]
    threshold = sum(sorted(scores)[5:7]) / 2  # rejects half of them
    chosen = Predictor("tiny", expressions=ASKED, threshold=threshold, loaded=(processor, model))
    rows = rows_of(chosen({"image": forms, "image_id": ["a", "b", "c", 4]}))
    assert [row["image_id"] for row in rows] == [name for name in ("a", "b", "c", "4") for _ in ASKED]
    kept = 0
    for n, picture in enumerate(pictures):
        for row, result in zip(
            rows[3 * n : 3 * n + 3], by_hand(model, processor, picture, ASKED, threshold=threshold)
        ):
            assert (row["expression"], row["is_rejected"]) == (result["text"], result["is_rejected"])
            assert (row["height"], row["width"]) == (picture.height, picture.width) and row["error"] is None
            assert row["score"] == pytest.approx(result["score"], abs=1e-4) and not row["is_split"]
            assert row["probability"] == pytest.approx(result["probability"], abs=1e-4) and row["model"] == "tiny"
            assert row["answer"].count("[SEG]") + row["answer"].count("[REJ]") == len(ASKED)
            if row["is_rejected"]:
                assert row["area"] == 0 and row["mask"] is row["box"] is row["iou_estimate"] is None
                continue
            kept += 1
            mask = decode_mask(row["mask"]).astype(bool)
            assert (mask != result["mask"]).mean() < 1e-3 and row["area"] == mask.sum()
            assert tuple(row["box"]) == mask_box(mask)
            assert row["iou_estimate"] == pytest.approx(result["iou_score"], abs=1e-4)
    assert kept == 6


def test_each_expression_may_have_a_prompt_of_its_own(model, processor, make_picture):
    alone = Predictor("tiny", expressions=ASKED, one_prompt_per_expression=True, loaded=(processor, model))
    rows = rows_of(alone({"image": [make_picture()]}))
    assert [row["expression"] for row in rows] == ASKED and not any(row["is_split"] for row in rows)
    for row in rows:
        (result,) = by_hand(model, processor, make_picture(), [row["expression"]])
        assert row["answer"].count("[SEG]") + row["answer"].count("[REJ]") == 1
        assert row["score"] == pytest.approx(result["score"], abs=1e-4)


def test_what_cannot_be_answered_is_a_row_with_its_error(predictor, make_picture):
    asked = [["a cat", "a [SEG] dog", " . ", "x" * 20_000], ["a cat", "a dog"], []]
    rows = rows_of(predictor({"image": [make_picture(), b"no image", make_picture()], "expressions": asked}))
    said = [
        (row["expression"] and row["expression"][:11], row["error"] and row["error"].split(";")[0]) for row in rows
    ]
    assert said[:3] == [
        ("a cat", None),
        ("a [SEG] dog", "Expression 'a [SEG] dog' holds [SEG], which is a special token of the model"),
        (" . ", "Expression ' . ' is empty"),
    ]
    assert "20000 characters" in said[3][1]
    assert [expression for expression, _ in said[4:6]] == ["a cat", "a dog"]
    assert all("these bytes are of no image format" in error for _, error in said[4:6])
    assert said[6] == (None, "There is no expression") and len(rows) == 7


def test_a_prompt_longer_than_the_context_is_split_and_says_so(make_model, processor, make_picture):
    model = make_model()
    many = [f"thing number {n} on the left" for n in range(60)]
    predictor = Predictor("tiny", expressions=many, loaded=(processor, model), batch_size=2)
    rows = rows_of(predictor({"image": [make_picture()]}))
    assert [row["expression"] for row in rows] == many
    assert all(row["is_split"] and row["error"] is None for row in rows) and len({row["answer"] for row in rows}) > 3
    asked = [row["expression"] for row in rows if row["answer"] == rows[-1]["answer"]]  # of the last prompt
    again = rows_of(predictor({"image": [make_picture()], "expressions": [asked]}))
    assert not any(row["is_split"] for row in again)
    for one, other in zip(rows[-len(asked) :], again, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)
    (row,) = rows_of(predictor({"image": [make_picture()], "expressions": [["word " * 500]]}))
    assert "more than the model's context of 1024" in row["error"] and row["mask"] is None


def test_requests_about_one_image_share_its_encoding(model, processor, make_picture, monkeypatch):
    encoded = []
    encode = type(model).get_sam_embeddings
    monkeypatch.setattr(
        type(model), "get_sam_embeddings", lambda self, pixels: encoded.append(len(pixels)) or encode(self, pixels)
    )
    predictor = Predictor("tiny", loaded=(processor, model), batch_size=4)
    one, other = make_picture(1), make_picture(2)
    images = [one, png(one), other, one]
    rows = rows_of(predictor({"image": images, "expressions": [["a cat"], ["all dogs", "a tree"], ["a cat"], ["x"]]}))
    assert sum(encoded) == 2
    assert [row["expression"] for row in rows] == ["a cat", "all dogs", "a tree", "a cat", "x"]
    alone = [rows_of(predictor({"image": [one], "expressions": [[text]]}))[0]["score"] for text in ("a cat", "x")]
    assert [rows[0]["score"], rows[4]["score"]] == pytest.approx(alone, abs=1e-4)


def test_questions_are_answered_in_words_and_masks():
    predictor = Predictor("assets/tiny_gsva")
    image = shapes.make_row(0, "validation", 0)["image"]
    rows = rows_of(predictor({"image": [image, image], "question": ["segment all stars.", "hello?"]}))
    assert [row["question"] for row in rows] == ["segment all stars.", "hello?"]
    assert rows[0]["expression"] == "all stars" and rows[0]["answer"] == "all stars:[SEG]." and rows[0]["area"] > 0
    assert rows[1]["expression"] is None and rows[1]["answer"] and rows[1]["error"] is None


def test_masks_can_be_png_or_left_out(model, processor, make_picture):
    rows = {
        masks: rows_of(
            Predictor("tiny", masks=masks, threshold=-1e9, loaded=(processor, model))(
                {"image": [make_picture()], "expressions": [ASKED]}
            )
        )
        for masks in ("rle", "png", "none")
    }
    for rle, png_row, none in zip(*rows.values(), strict=True):
        with Image.open(io.BytesIO(png_row["mask_png"])) as image:
            assert (np.asarray(image) == decode_mask(rle["mask"]).astype(bool)).all()
        assert none["mask"] is none["mask_png"] is png_row["mask"] is rle["mask_png"] is None
        assert rle["area"] == none["area"] > 0


def _in_another_process(pickled, queue):
    predictor = pickle.loads(pickled)
    queue.put(predictor({"image": [shapes.make_row(0, "validation", 0)["image"]]}))


def test_it_goes_to_another_process_without_the_model(tmp_path):
    predictor = Predictor("assets/tiny_gsva", expressions=["all stars"])
    here = predictor({"image": [shapes.make_row(0, "validation", 0)["image"]]})
    assert len(pickle.dumps(predictor)) < 2000  # no weights
    context = multiprocessing.get_context("fork")  # spawn imports everything again
    queue = context.Queue()
    process = context.Process(target=_in_another_process, args=(pickle.dumps(predictor), queue))
    process.start()
    assert queue.get(timeout=120) == here
    process.join()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "teacher_forced"}, "method='teacher_forced'"),
        ({"masks": "jpg"}, "masks='jpg'"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"expressions": ["a"] * 10_000}, "10000 expressions are more than"),
        ({"expressions": ["a" * 100_000]}, "has 100000 characters"),
    ],
)
def test_bad_options_are_refused_at_once(options, said):
    with pytest.raises(ValueError, match=said):
        Predictor("nowhere", **options)


def test_columns_that_are_missing_are_named(predictor, model, processor):
    with pytest.raises(ValueError, match=r"no column 'image' among \['picture'\]"):
        predictor({"picture": []})
    with pytest.raises(ValueError, match="nothing to look for"):
        Predictor("tiny", loaded=(processor, model))({"image": []})
    assert prediction_table(predictor({"image": []})).schema == PREDICTION_SCHEMA


def test_batches_hold_little_padding_and_everything_once():
    lengths = np.random.default_rng(0).integers(20, 400, 300).tolist()
    entries = [(length, 5) for length in lengths]
    found = batches(entries, lambda entry: entry, most=8, size=sum)
    assert sorted(entry for batch in found for entry in batch) == sorted(entries)
    assert all(padding(batch, sum) <= requests.MAX_PADDING and len(batch) <= 8 for batch in found)
    assert len(found) < 50  # nearly full
    assert batches(entries, lambda entry: entry, most=8, size=sum) == found
