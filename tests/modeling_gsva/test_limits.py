"""Several candidates of a prompt, prompts beyond the context, thresholds that are no numbers: grouped, or refused in words."""

import math

import numpy as np
import pytest
import torch

from evaluation.config import EvaluationConfig
from modeling_gsva import GsvaPipeline

NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan"), "0.5", True, 10**400, [0.0]]
OPTIONS = {"method": "generate", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def double_model(make_model):
    return make_model().double()


@pytest.fixture(scope="module")
def pictures(make_picture):
    return [make_picture(0, 40, 30), make_picture(1, 20, 50)]


def same(one, other):
    assert [entry["text"] for entry in one] == [entry["text"] for entry in other]
    for a, b in zip(one, other, strict=True):
        assert a["is_rejected"] == b["is_rejected"] and a["is_malformed"] == b["is_malformed"]
        assert np.array_equal(a["mask"], b["mask"])
        assert a["score"] == pytest.approx(b["score"], nan_ok=True)


@pytest.mark.parametrize("one_prompt_per_expression", [False, True])
@pytest.mark.parametrize("strategy", [{"num_beams": 3}, {"do_sample": True}], ids=str)
def test_results_are_grouped_by_candidate(double_model, processor, pictures, one_prompt_per_expression, strategy):
    asked = [["red dog", "a cat"], ["b"]]
    options = {"return_tensors": "pt", "one_prompt_per_expression": one_prompt_per_expression}
    inputs = processor(pictures, expressions=asked, **options)
    torch.manual_seed(0)
    outputs = double_model.segment(**inputs, **OPTIONS, **strategy, num_return_sequences=3)
    assert outputs.num_candidates == 3 and len(outputs.sequences) == 3 * len(inputs["input_ids"])
    results = processor.post_process_segmentation(outputs, inputs)
    for texts, candidates in zip(asked, results, strict=True):
        assert [[entry["text"] for entry in candidate] for candidate in candidates] == [texts] * 3
    for number in range(3):  # each is what its own sequences give
        alone = double_model.segment_sequences(
            outputs.sequences[number::3],
            inputs["attention_mask"],
            inputs["image_index"],
            double_model.model.get_vision_features(inputs["pixel_values"]),
            double_model.get_sam_embeddings(inputs["sam_pixel_values"]),
        )
        for image, expected in zip(results, processor.post_process_segmentation(alone, inputs), strict=True):
            same(image[number], expected)
    raised = processor.post_process_segmentation(outputs, inputs, threshold=1e9)
    assert all(entry["is_rejected"] for image in raised for candidate in image for entry in candidate)


def test_beams_with_one_answer_are_not_grouped(double_model, processor, pictures):
    inputs = processor(pictures, expressions=[["red dog", "a cat"], ["b"]], return_tensors="pt")
    outputs = double_model.segment(**inputs, **OPTIONS, num_beams=3)
    results = processor.post_process_segmentation(outputs, inputs)
    assert [[entry["text"] for entry in image] for image in results] == [["red dog", "a cat"], ["b"]]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_pipeline_groups_them_too(double_model, processor, pictures, batch_size):
    pipe = GsvaPipeline(model=double_model, processor=processor, device="cpu")
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    results = pipe(
        pictures, expressions=["red dog", "a cat"], method="generate", generate_kwargs=options, batch_size=batch_size
    )
    for picture, candidates in zip(pictures, results, strict=True):
        inputs = processor([picture], expressions=[["red dog", "a cat"]], return_tensors="pt")
        outputs = double_model.segment(**inputs, method="generate", **options)
        (expected,) = processor.post_process_segmentation(outputs, inputs)
        assert len(candidates) == len(expected) == 2
        if batch_size == 1:
            for one, other in zip(candidates, expected, strict=True):
                same(one, other)


def test_chats_are_grouped_or_refused_where_they_stream(double_model, processor, pictures):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "Hi?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    outputs = double_model.segment(**inputs, **OPTIONS, num_beams=2, num_return_sequences=2)
    (candidates,) = processor.post_process_segmentation(outputs, inputs)
    assert len(candidates) == 2
    with pytest.raises(ValueError, match="num_return_sequences=2 answers cannot be streamed"):
        processor.stream(double_model, inputs, num_return_sequences=2, do_sample=True)


# --- context ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(model):
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: seen.append(1))
        for module in (model.model.language_model, model.model.vision_tower, model.sam.vision_encoder)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("method", ["slots", "teacher_forced"])
def test_an_answer_beyond_the_context_is_an_error_before_the_model_runs(model, processor, pictures, calls, method):
    def inputs(number):
        return processor(pictures[:1], expressions=[["red dog"] * number], return_tensors="pt")

    def length(number):
        made = inputs(number)
        return made["input_ids"].shape[1] + made["answer_ids"].shape[1]

    limit = model.config.text_config.max_position_embeddings
    first, each = length(1), length(2) - length(1)
    most = 1 + (limit - first) // each
    assert length(most) <= limit < length(most + 1)
    with pytest.raises(
        ValueError, match=f"image takes 16 of them.*{length(most + 1)} positions.*has {limit}"
    ) as error:
        model.segment(**inputs(most + 1), method=method)
    assert "one_prompt_per_expression" in str(error.value) and not calls
    assert len(model.segment(**inputs(most), method=method).scores[0]) == most
    split = processor(
        pictures[:1],
        expressions=[["red dog"] * 3],
        one_prompt_per_expression=True,
        return_tensors="pt",
        max_length=limit,
    )
    assert len(model.segment(**split, method=method).scores) == 3


def test_generation_is_measured_with_its_new_tokens(model, processor, pictures, calls):
    inputs = processor(pictures[:1], expressions=[["red dog"]], return_tensors="pt")
    room = model.config.text_config.max_position_embeddings - inputs["input_ids"].shape[1]
    for run in (model.generate, lambda **given: model.segment(**given, method="generate")):
        with pytest.raises(ValueError, match=f"answer of {room + 1} make 1025 positions, but the model has 1024"):
            run(**inputs, max_new_tokens=room + 1)
    assert not calls
    stop = {"eos_token_id": list(range(model.config.text_config.vocab_size))}
    assert model.generate(**inputs, max_new_tokens=room, **stop).shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize(
    ("rope", "limit"),
    [({"rope_type": "linear", "factor": 2.0}, 2048), ({"rope_type": "default"}, 1024)],
)
def test_stretched_positions_count(rope, limit):
    from transformers import LlamaConfig

    from modeling_gsva.segmentation_gsva import context_length

    config = LlamaConfig(max_position_embeddings=1024, rope_parameters={"rope_theta": 10000.0, **rope})
    assert context_length(config) == limit


def test_expressions_heed_max_length(processor, pictures):
    made = processor(pictures[:1], expressions=[["red dog", "b"]], return_tensors="pt")
    length = made["input_ids"].shape[1] + made["answer_ids"].shape[1]
    kept = processor(pictures[:1], expressions=[["red dog", "b"]], return_tensors="pt", max_length=length)
    assert torch.equal(kept["input_ids"], made["input_ids"]) and torch.equal(kept["answer_ids"], made["answer_ids"])
    with pytest.raises(ValueError, match=f"2 expressions of image 0 .* {length} tokens .16 of them.*={length - 1}"):
        processor(pictures[:1], expressions=[["red dog", "b"]], max_length=length - 1)
    options = {"max_length": length - 1, "one_prompt_per_expression": True}
    assert len(processor(pictures[:1], expressions=[["red dog", "b"]], **options)["input_ids"]) == 2
    for wrong in (0, -1, 1.5, "8", True):
        with pytest.raises(ValueError, match="must be a number of tokens"):
            processor(pictures[:1], expressions=[["b"]], max_length=wrong)


# --- thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", NOT_FINITE, ids=lambda value: str(value)[:8])
def test_every_door_refuses_a_threshold_that_is_no_finite_number(model, processor, pictures, calls, threshold):
    inputs = processor(pictures[:1], expressions=[["a"]], return_tensors="pt")
    outputs = model.segment(**inputs)
    calls.clear()
    pipe = GsvaPipeline(model=model, processor=processor, device="cpu")
    doors = (
        lambda: model.segment(**inputs, threshold=threshold),
        lambda: processor.post_process_segmentation(outputs, inputs, threshold=threshold),
        lambda: pipe(pictures[0], expressions=["a"], threshold=threshold),
        lambda: pipe(iter(pictures), expressions=["a"], threshold=threshold),  # at the call, not at the first result
        lambda: EvaluationConfig(rows=[], dataset="d", split="s", threshold=threshold),
    )
    for door in doors:
        with pytest.raises(ValueError, match="is not a finite number"):
            door()
    assert not calls


@pytest.mark.parametrize("threshold", [-1e9, 1e9, 0, np.float32(0.5), np.int64(1)], ids=repr)
def test_numbers_of_every_kind_are_thresholds(model, processor, pictures, threshold):
    inputs = processor(pictures[:1], expressions=[["a", "b"]], return_tensors="pt")
    (scores,) = model.segment(**inputs).scores
    (decided,) = model.segment(**inputs, threshold=threshold).is_rejected
    assert decided.tolist() == [score < float(threshold) for score in scores.tolist()]
