"""post_process_instance_segmentation: the instances of an image, and what supervision makes of them."""

import math

import numpy as np
import pytest
import torch

from modeling_gsva.instances_gsva import instances_of

TEXTS = [["the left one", "a unicorn", "both"], ["a dog"]]


@pytest.fixture(scope="module")
def answered(model, processor, make_picture):
    inputs = processor(images=[make_picture(0), make_picture(1, 24, 50)], expressions=TEXTS, return_tensors="pt")
    with torch.no_grad():
        middle = model.segment(**inputs).scores[0].sort().values[1].item()  # rejects one of the first image's three
        return model.segment(**inputs, threshold=middle), inputs


def result(probability=0.5, mask=((0, 1), (0, 1)), is_rejected=False, score=0.0):
    mask = np.array(mask, dtype=bool)
    return {"text": "x", "mask": mask, "is_rejected": is_rejected, "probability": probability, "score": score}


def test_instances_are_what_was_not_rejected(answered, processor):
    outputs, inputs = answered
    images = processor.post_process_instance_segmentation(outputs, inputs)
    whole = processor.post_process_segmentation(outputs, inputs)
    assert len(images) == 2
    assert 0 < len(images[0]["labels"]) < 3  # else the test shows nothing
    for found, results, (height, width) in zip(images, whole, inputs["original_sizes"].tolist()):
        kept = [n for n, one in enumerate(results) if one["mask"].any()]
        assert found["labels"].tolist() == kept and not any(results[n]["is_rejected"] for n in kept)
        assert found["text_labels"] == [results[n]["text"] for n in kept]
        assert found["scores"].tolist() == pytest.approx([results[n]["probability"] for n in kept])
        assert found["masks"].shape == (len(kept), 1, height, width) and found["masks"].dtype == torch.bool
        for mask, box, n in zip(found["masks"][:, 0].numpy(), found["boxes"].tolist(), kept):
            assert (mask == results[n]["mask"]).all()
            left, top, right, bottom = map(int, box)
            assert mask[top:bottom, left:right].sum() == mask.sum()  # nothing is outside, and every side is touched
            assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()


def test_a_threshold_is_a_probability_that_only_takes_away(answered, processor):
    outputs, inputs = answered
    (first, _) = processor.post_process_instance_segmentation(outputs, inputs)
    cut = first["scores"].max().item()
    for threshold, kept in ((0.0, len(first["scores"])), (cut, 0), (1, 0)):
        assert len(processor.post_process_instance_segmentation(outputs, inputs, threshold)[0]["scores"]) == kept
    for wrong in (-1.0, 1.5, math.nan, "0.5", True):
        with pytest.raises(ValueError, match="is not a probability"):
            processor.post_process_instance_segmentation(outputs, inputs, threshold=wrong)


def test_several_candidates_are_refused(answered, processor):
    outputs, inputs = answered
    several = type(outputs)(**{**outputs, "num_candidates": 2})
    with pytest.raises(ValueError, match="2 answers for each prompt"):
        processor.post_process_instance_segmentation(several, inputs)


def test_boxes_end_behind_the_last_pixel_and_empty_masks_are_no_instances():
    found = instances_of([result(), result(mask=((0, 0), (0, 0))), result(is_rejected=True)], (2, 2), None)
    assert found["boxes"].tolist() == [[1.0, 0.0, 2.0, 2.0]] and found["labels"].tolist() == [0]


def test_without_a_probability_the_score_gives_it():
    assert instances_of([result(probability=math.nan, score=2.0)], (2, 2), 0.85)["scores"].item() == pytest.approx(
        1 / (1 + math.exp(-2.0))
    )


def test_supervision_takes_the_result(answered, processor):
    supervision = pytest.importorskip("supervision")
    outputs, inputs = answered
    for found, texts in zip(processor.post_process_instance_segmentation(outputs, inputs), TEXTS):
        detections = supervision.Detections.from_transformers(found, id2label=dict(enumerate(texts)))
        assert len(detections) == len(found["scores"])
        assert (detections.mask == found["masks"][:, 0].numpy()).all() and (
            detections.xyxy == found["boxes"].numpy()
        ).all()
        assert detections.class_id.tolist() == found["labels"].tolist()
        assert detections.data["class_name"].tolist() == found["text_labels"]
        assert (detections.area == found["masks"].sum(dim=(1, 2, 3)).numpy()).all()


def test_supervision_takes_an_image_without_instances():
    supervision = pytest.importorskip("supervision")
    found = instances_of([result(is_rejected=True)], (2, 2), None)
    assert found["masks"].shape == (0, 1, 2, 2)
    assert len(supervision.Detections.from_transformers(found, id2label={0: "x"})) == 0
