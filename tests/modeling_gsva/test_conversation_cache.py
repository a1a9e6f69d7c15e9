"""A cache from turn to turn: the answers of reading everything again, for the new tokens alone."""

import pytest
import torch
from paths import BASE

from modeling_gsva import ConversationCache, GsvaForConditionalGeneration, GsvaProcessor

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float64


@pytest.fixture(scope="module")
def double_model(make_model):
    model = make_model().double()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def work(double_model):
    """Count (tokens read by the language model, images encoded by CLIP, by SAM)."""
    counts = {"tokens": 0, "clip": 0, "sam": 0}
    hooks = []

    def count(name, module, size):
        def hook(_, args, kwargs):
            counts[name] += size(args, kwargs)

        hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    count("tokens", double_model.model.language_model, lambda args, kwargs: kwargs["inputs_embeds"].shape[1])
    count("clip", double_model.model.vision_tower, lambda args, kwargs: len(args[0]))
    count("sam", double_model.sam.vision_encoder, lambda args, kwargs: len(args[0]))
    yield counts
    for hook in hooks:
        hook.remove()


def ask(processor, picture, *turns):
    """Inputs of a conversation about a picture: questions and answers in turn, a question last."""
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": [{"type": "text", "text": text}]}
        for n, text in enumerate(turns)
    ]
    messages[0]["content"].insert(0, {"type": "image", "image": picture})
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def said(processor, outputs):
    (row,) = outputs.sequences[:, int(outputs.answer_starts[0]) :]
    return processor.tokenizer.decode(row)


def equal(one, other):
    assert torch.equal(one.sequences, other.sequences)
    for name in ("scores", "mask_logits", "iou_scores"):
        for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
    assert all(torch.equal(a, b) for a, b in zip(one.is_rejected, other.is_rejected, strict=True))


OPTIONS = {"method": "generate", "max_new_tokens": 8}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_the_second_question_costs_its_own_tokens(double_model, processor, make_picture, work, options):
    picture, options = make_picture(), {**OPTIONS, **options}
    first, cache = ask(processor, picture, "Which dog?"), double_model.new_cache()
    answer = double_model.segment(**first, **options, cache=cache)
    equal(answer, double_model.segment(**first, **options))
    second = ask(processor, picture, "Which dog?", said(processor, answer), "And the cat, where is it?")
    expected = double_model.segment(**second, **options)
    work.update(tokens=0, clip=0, sam=0)
    equal(double_model.segment(**second, **options, cache=cache), expected)
    new = second["input_ids"].shape[1] - first["input_ids"].shape[1]
    assert (work["clip"], work["sam"]) == (0, 0)
    # The rest of the prompt, the answer's tokens one by one, and all of them again for the masks.
    assert work["tokens"] <= new + 8 + 8 + 1
    third = double_model.segment(**second, **options, cache=cache)  # the same question again
    equal(third, expected)


def test_slots_go_on_where_a_chat_was(double_model, processor, make_picture, work):
    picture = make_picture()
    cache = ConversationCache()
    asked = [["red dog", "a cat"]], [["red dog", "the sky", "b"]]
    inputs = [processor([picture], expressions=one, return_tensors="pt") for one in asked]
    expected = [double_model.segment(**one) for one in inputs]
    work.update(tokens=0, clip=0, sam=0)
    equal(double_model.segment(**inputs[0], cache=cache), expected[0])
    assert (work["clip"], work["sam"]) == (1, 1)
    work.update(tokens=0, clip=0, sam=0)
    equal(double_model.segment(**inputs[1], cache=cache), expected[1])
    assert (work["clip"], work["sam"]) == (0, 0)
    length = inputs[1]["input_ids"].shape[1] + inputs[1]["answer_ids"].shape[1]
    assert work["tokens"] < length - processor.image_seq_length


def test_several_conversations_at_once(double_model, processor, make_picture, work):
    pictures = [make_picture(0), make_picture(1, 20, 50)]
    first = processor(pictures, expressions=[["red dog", "a cat"], ["b"]], return_tensors="pt")
    second = processor(pictures, expressions=[["red dog", "a bird", "c"], ["blue", "d"]], return_tensors="pt")
    for options in ({}, {"method": "generate", "max_new_tokens": 5}):
        cache = ConversationCache()
        equal(double_model.segment(**first, **options, cache=cache), double_model.segment(**first, **options))
        expected = double_model.segment(**second, **options)
        work.update(tokens=0, clip=0, sam=0)
        outputs = double_model.segment(**second, **options, cache=cache)
        assert (work["clip"], work["sam"]) == (0, 0)
        if options:  # its prompts begin with the cache's padding
            start, other = int(outputs.answer_starts[0]), int(expected.answer_starts[0])
            assert torch.equal(outputs.sequences[:, start:], expected.sequences[:, other:])
            for a, b in zip(outputs.scores, expected.scores, strict=True):
                torch.testing.assert_close(a, b, **TOLERANCE)
        else:
            equal(outputs, expected)


def test_what_differs_is_read_again(double_model, make_model, processor, make_picture):
    first = ask(processor, make_picture(), "Which dog?")
    others = {
        "another image": ask(processor, make_picture(1), "Which dog?"),
        "no image": processor.apply_chat_template(
            [{"role": "user", "content": "Hi?"}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ),
        "another question": ask(processor, make_picture(), "A cat?"),
        "more conversations": processor(
            [make_picture(), make_picture(1)], expressions=[["a"], ["b"]], return_tensors="pt"
        ),
    }
    for other in others.values():
        cache = ConversationCache()
        double_model.segment(**first, **OPTIONS, cache=cache)
        again, expected = (double_model.segment(**other, **OPTIONS, cache=use) for use in (cache, None))
        assert torch.equal(again.sequences, expected.sequences)
        if expected.mask_logits is not None:
            equal(again, expected)
    cache = ConversationCache()
    double_model.segment(**first, **OPTIONS, cache=cache)
    another = make_model(1).double()
    another.generation_config.eos_token_id = None
    equal(another.segment(**first, **OPTIONS, cache=cache), another.segment(**first, **OPTIONS))


def test_candidates_and_caches_that_cannot_be_cropped_leave_no_cache_behind(double_model, processor, make_picture):
    first = ask(processor, make_picture(), "Which dog?")
    for options in (
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ):
        cache = ConversationCache()
        for _ in range(2):
            outputs = double_model.segment(**first, **OPTIONS, **options, cache=cache)
            equal(outputs, double_model.segment(**first, **OPTIONS, **options))
    with pytest.raises(ValueError, match="cache only applies"):
        inputs = processor([make_picture()], expressions=[["a"]], return_tensors="pt")
        double_model.segment(**inputs, method="teacher_forced", cache=ConversationCache())


def test_a_streamed_chat_takes_it(processor, make_picture):
    model, processor = GsvaForConditionalGeneration.from_pretrained(BASE), GsvaProcessor.from_pretrained(BASE)
    picture, cache = make_picture(), model.new_cache()
    first = ask(processor, picture, "segment the red circle.")
    text = "".join(processor.stream(model, first, max_new_tokens=32, cache=cache))
    second = ask(processor, picture, "segment the red circle.", text, "segment all stars.")
    widths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with processor.stream(model, second, max_new_tokens=32, cache=cache) as answer:
        list(answer)
        results = answer.results
    hook.remove()
    assert max(widths) < second["input_ids"].shape[1] - processor.image_seq_length
    outputs = model.segment(**second, method="generate", max_new_tokens=32)
    (expected,) = processor.post_process_segmentation(outputs, second)
    assert [entry["text"] for entry in results[0]] == [entry["text"] for entry in expected]
    assert all((one["mask"] == other["mask"]).mean() > 0.99 for one, other in zip(results[0], expected, strict=True))
