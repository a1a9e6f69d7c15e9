"""What the web demo does without a web page: sessions, the slider, downloads, limits."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from demo import session as demo
from demo.session import Assistant, as_coco, as_json, decide, write_archive

EXPRESSIONS = ["the red circle", "all stars", "the <b>unicorn</b>"]


@pytest.fixture(scope="module")
def assistant(make_model, processor) -> Assistant:
    return Assistant(make_model(), processor)


@pytest.fixture
def path(make_picture, tmp_path):
    make_picture(0, 60, 44).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def result(probability, is_rejected=False, mask=None):
    mask = np.eye(4, dtype=bool) if mask is None else mask
    return {"text": "a", "mask": mask, "is_rejected": is_rejected, "score": 1.0, "probability": probability}


def test_the_slider_decides_as_segment_does(assistant, path):
    session = assistant.open(path)
    assistant.ask(session, EXPRESSIONS)
    assert all(one["mask"].shape == (44, 60) for one in session.results)
    inputs = assistant.processor(images=[session.image], expressions=[EXPRESSIONS], return_tensors="pt")
    scores = [one["score"] for one in session.results]
    for threshold in (-100.0, sum(scores) / 3, 100.0):
        outputs = assistant.model.segment(**inputs, threshold=threshold)
        (expected,) = assistant.processor.post_process_segmentation(outputs, inputs)
        decided = decide(session.results, 1 / (1 + np.exp(-np.float64(threshold))))
        for one, other in zip(decided, expected, strict=True):
            assert one["is_rejected"] == other["is_rejected"] and (one["mask"] == other["mask"]).all()
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_an_expression_without_a_slot_stays_rejected():
    assert [one["is_rejected"] for one in decide([result(float("nan")), result(0.9, True), result(0.4)], 0.4)] == [
        True, True, False,
    ]  # fmt: skip
    assert not decide([result(0.1)], 0.2)[0]["mask"].any()


def test_a_second_turn_does_not_encode_the_image_again(assistant, path, monkeypatch):
    session, encoded = assistant.open(path), []
    hooks = [
        part.register_forward_pre_hook(lambda *_: encoded.append(1))
        for part in (assistant.model.sam.vision_encoder, assistant.model.model.vision_tower)
    ]
    assistant.ask(session, EXPRESSIONS)
    assert len(encoded) == 2
    assistant.ask(session, ["the blue square"])
    assistant.ask_freely(session, "What is there?")
    assistant.ask_freely(session, "And where?")
    for hook in hooks:
        hook.remove()
    assert len(encoded) == 2 and len(session.turns) == 4
    assistant.ask(session, ["the blue square"])
    assert session.turns == [] and session.answer == ""


@pytest.mark.parametrize(
    "expressions, said",
    [
        ([" ", ""], "There is no expression"),
        (["x"] * 25, "25 expressions are more than 24"),
        (["x" * 301], "301 characters, more than 300"),
        (["the [SEG]"], "special token"),
    ],
)
def test_refused_expressions(assistant, path, expressions, said):
    with pytest.raises(ValueError, match=said):
        assistant.ask(assistant.open(path), expressions)


def test_refused_questions_and_images(assistant, path, tmp_path, monkeypatch):
    session = assistant.open(path)
    with pytest.raises(ValueError, match="question is empty"):
        assistant.ask_freely(session, " ")
    with pytest.raises(ValueError, match="301 characters"):
        assistant.ask_freely(session, "x" * 301)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        assistant.open(tmp_path / "bad.png")
    monkeypatch.setattr(demo, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="2,640 pixels, more than 100"):
        assistant.open(path)


def test_the_download_holds_masks_and_coco(tmp_path):
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:3, 2:6] = True
    results = [result(0.9, mask=mask), result(0.1, is_rejected=True, mask=mask & False)]
    write_archive(Image.new("RGB", (8, 6), "red"), results, tmp_path / "masks.zip")
    with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
        assert sorted(archive.namelist()) == ["annotations.json", "image.png", "mask_01.png"]
        coco = json.loads(archive.read("annotations.json"))
        with archive.open("mask_01.png") as file:
            assert (np.asarray(Image.open(file)) == mask * 255).all()
    (annotation,) = coco["annotations"]
    assert annotation["bbox"] == [2, 1, 4, 2] and annotation["area"] == 8 and annotation["score"] == 0.9
    assert (rle.decode(annotation["segmentation"]).astype(bool) == mask).all()
    assert as_coco(Image.new("RGB", (8, 6)), [result(0.9, mask=mask & False)])["annotations"][0]["bbox"] == [
        0,
        0,
        0,
        0,
    ]
    assert as_json([result(float("nan"))])[0]["probability"] is None


def test_the_threshold_of_a_calibrated_model(make_model, processor):
    model = make_model()
    assert Assistant(model, processor).probability_threshold == 0.5
    model.config.rejection = {"threshold": 2.0, "temperature": 4.0, "offset": -0.5}
    assert Assistant(model, processor).probability_threshold == 0.5  # sigmoid(2 / 4 - 0.5)
