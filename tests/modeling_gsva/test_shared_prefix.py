"""The common prefix of the prompts about an image is run once, and the second pass of teacher_forced only if it matters."""

import pytest
import torch
from padding import padded

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float64; see test_modeling
EXPRESSIONS = [["red dog", "a cat", "the bird on the left"], ["b"], ["red dog", "red dog", "red dogs"]]
NO_TARGETS = [[True, False, True], [False], [False, True, True]]


@pytest.fixture(scope="module")
def double_model(make_model):
    return make_model().double()


@pytest.fixture(scope="module")
def pictures(make_picture):
    return [make_picture(0, 40, 30), make_picture(1, 20, 50), make_picture(2, 30, 30)]


@pytest.fixture
def widths(double_model):
    """(conversations, tokens) of every call of the language model."""
    seen = []
    hook = double_model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize("template", ["plain", "llava_v1"])
@pytest.mark.parametrize("method", ["slots", "teacher_forced", "generate"])
def test_shared_prefix_equals_reading_each_prompt_alone(
    double_model, make_processor, pictures, widths, method, template
):
    processor = make_processor(template)
    inputs = processor(pictures, expressions=EXPRESSIONS, no_targets=NO_TARGETS, one_prompt_per_expression=True,
                       return_tensors="pt")  # fmt: skip
    options = {"max_new_tokens": 3} if method == "generate" else {}
    if method == "slots":  # some are rejected, some are not
        options["threshold"] = float(torch.cat(double_model.segment(**inputs).scores).mean())
    widths.clear()
    shared = double_model.segment(**inputs, method=method, **options)
    read = list(widths)
    prompt, answer = inputs["input_ids"].shape[1], shared.sequences.shape[1] - inputs["input_ids"].shape[1]
    image_end = 1 + int((inputs["input_ids"] == processor.image_token_id).nonzero()[:, 1].min()) + 15
    if method == "generate":  # its prompts are in the cache; sequences from elsewhere are read as a whole
        assert read[-1] == (7, answer + 1)
        widths.clear()
        features = double_model.model.get_vision_features(inputs["pixel_values"])
        embeddings = double_model.get_sam_embeddings(inputs["sam_pixel_values"])
        given = inputs["attention_mask"], inputs["image_index"], features, embeddings
        again, read = double_model.segment_sequences(shared.sequences, *given), list(widths)
        for one, other in zip(again.mask_logits, shared.mask_logits, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)
    # three images with what comes before them, then the seven prompts' own words
    assert [count for count, _ in read] == [3, 7]
    assert image_end <= read[0][1] <= image_end + 20 and read[1][1] <= prompt + answer - image_end
    for row in range(7):
        part = {k: v[row : row + 1] if len(v) == 7 else v for k, v in inputs.items() if k != "expressions"}
        alone = double_model.segment(**part, method=method, **options)
        for name in ("scores", "mask_logits", "iou_scores"):
            torch.testing.assert_close(getattr(shared, name)[row], getattr(alone, name)[0], **TOLERANCE)
        assert torch.equal(shared.is_rejected[row], alone.is_rejected[0])
        assert torch.equal(shared.sequences[row], alone.sequences[0])
    if method == "slots":
        assert 0 < torch.cat(shared.is_rejected).sum() < 7


def test_prompts_that_differ_before_the_image_share_nothing(double_model, processor, pictures, widths):
    messages = [[{"role": "user", "content": f"{word}: <image>\nWhere?"}] for word in ("One", "Two")]
    rows = [processor.encode_conversations([each], add_generation_prompt=True)[0][0] for each in messages]
    ids, mask = padded(processor, rows, side="left")
    answers, answer_mask = padded(processor, [processor.tokenizer(" [SEG]")["input_ids"][1:]] * 2)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "answer_ids": answers,
        "answer_attention_mask": answer_mask,
    }
    inputs |= dict(processor.image_processor(pictures[:1], return_tensors="pt"), image_index=torch.tensor([0, 0]))
    outputs = double_model.segment(**inputs)
    assert [count for count, _ in widths] == [2]
    for row in range(2):
        part = {k: v[row : row + 1] if len(v) == 2 else v for k, v in inputs.items()}
        torch.testing.assert_close(double_model.segment(**part).scores[0], outputs.scores[row], **TOLERANCE)


@pytest.mark.parametrize(
    ("no_targets", "rows"),
    [
        ([[False] * 3, [False], [False] * 3], 0),
        ([[False, False, True], [True], [False, False, True]], 0),  # no slot comes after a gold [REJ]
        ([[False, True, False], [True], [False] * 3], 1),
        ([[True, True, False], [False], [False, True, False]], 2),
    ],
)
def test_second_pass_only_behind_a_gold_rejection(double_model, processor, pictures, widths, no_targets, rows):
    inputs = processor(pictures, expressions=EXPRESSIONS, no_targets=no_targets, return_tensors="pt")
    outputs = double_model.segment(**inputs, method="teacher_forced")
    assert [count for count, _ in widths] == [3, rows][: 1 + bool(rows)]
    if rows:
        assert widths[1][1] < inputs["answer_ids"].shape[1] < widths[0][1]
    # The masks are those of answers in which every slot is [SEG], the scores those with the gold tokens before them.
    all_seg = processor(pictures, expressions=EXPRESSIONS, return_tensors="pt")
    wanted = double_model.segment(**all_seg, method="teacher_forced")
    for found, expected in zip(outputs.mask_logits, wanted.mask_logits, strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE)
    differ = [not torch.allclose(a, b, **TOLERANCE) for a, b in zip(outputs.scores, wanted.scores, strict=True)]
    assert sum(differ) == rows
