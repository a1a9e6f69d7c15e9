"""generate() has the properties that transformers' GenerationTesterMixin tests; test_segmentation.py tests its strategies."""

import pytest
import torch
from transformers import DynamicCache

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float64; see test_modeling
NEW = 4


@pytest.fixture(scope="module")
def model(make_model):
    """In float64, without an end of sequence, and with a row for `<image>`, so that ids can be embedded."""
    model = make_model(seed=3).double()  # with which eight beams find a better answer
    model.resize_token_embeddings(model.config.image_token_id + 1, mean_resizing=False)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def inputs(processor, make_picture):
    pictures = [make_picture(0, 40, 30), make_picture(1, 20, 50)]
    inputs = processor(pictures, expressions=[["red dog", "a cat"], ["b"]], return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_index")}


@pytest.fixture(scope="module")
def greedy(model, inputs):
    return model.generate(**inputs, max_new_tokens=NEW)


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}], ids=str
)
def test_every_output_has_its_shape(make_model, inputs, options):
    model = make_model(
        attn_implementation="eager"
    )  # in float64 LLaMA's eager mask overflows where it rounds to float32
    model.generation_config.eos_token_id = None
    asked = ("scores", "logits", "attentions", "hidden_states")
    outputs = model.generate(
        **inputs,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        **{f"output_{name}": True for name in asked},
        **options,
    )
    config, (rows, length) = model.config.text_config, inputs["input_ids"].shape
    beams = rows * options.get("num_beams", 1)
    assert outputs.sequences.shape == (rows, length + NEW)
    assert isinstance(outputs.past_key_values, DynamicCache)
    for steps in (outputs.scores, outputs.logits):
        assert [tuple(step.shape) for step in steps] == [(beams, config.vocab_size)] * NEW
    for step in range(NEW):
        read = length if step == 0 else 1
        states, attentions = outputs.hidden_states[step], outputs.attentions[step]
        assert [tuple(layer.shape) for layer in states] == [(beams, read, config.hidden_size)] * 3
        assert [tuple(layer.shape) for layer in attentions] == [(beams, 4, read, length + step)] * 2


def test_embeddings_generate_what_their_ids_do(model, inputs, greedy):
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {name: value for name, value in inputs.items() if name != "input_ids"}
    new = model.generate(inputs_embeds=embeds, **given, max_new_tokens=NEW)
    assert torch.equal(new, greedy[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(model.generate(inputs["input_ids"], inputs_embeds=embeds, **given, max_new_tokens=NEW), greedy)


def test_generation_goes_on_from_its_cache(model, inputs, greedy):
    """The picture is in the cache by then, and need not be given again."""
    first = model.generate(**inputs, max_new_tokens=NEW - 2, return_dict_in_generate=True)
    assert torch.equal(first.sequences, greedy[:, :-2])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW - 2), value=1)
    again = model.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=2
    )
    assert torch.equal(again, greedy)


def test_a_cache_of_the_users_own_is_used(model, inputs, greedy):
    cache = DynamicCache(config=model.config.text_config)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, past_key_values=cache), greedy)
    assert cache.get_seq_length() == greedy.shape[1] - 1


def test_the_cache_changes_nothing(model, inputs, greedy):
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, use_cache=False), greedy)


def test_padding_on_the_left_changes_nothing(model, inputs):
    def last_logits(ids, mask):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        given = {**inputs, "input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            return model(**given, position_ids=positions, logits_to_keep=1).logits

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pad = model.config.text_config.pad_token_id
    padded = torch.nn.functional.pad(ids, (5, 0), value=pad), torch.nn.functional.pad(mask, (5, 0))
    torch.testing.assert_close(last_logits(*padded), last_logits(ids, mask), **TOLERANCE)


def test_the_best_beam_is_no_worse_than_the_greedy_answer(model, inputs, greedy):
    def log_likelihood(sequences):
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": sequences, "attention_mask": mask}, position_ids=positions).logits
        said = logits[:, -NEW - 1 : -1].log_softmax(-1).gather(2, sequences[:, -NEW:, None])
        return said.sum((1, 2))

    found = model.generate(**inputs, max_new_tokens=NEW, num_beams=8)
    assert (log_likelihood(found) >= log_likelihood(greedy) - 1e-9).all()


def test_pictures_are_encoded_once_however_long_the_answer(model, inputs):
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *given: calls.append(len(given[1])))
    try:
        model.generate(**inputs, max_new_tokens=NEW, num_beams=3)
    finally:
        hook.remove()
    assert len(calls) == 1


def test_only_the_logits_asked_for_are_made(model, inputs):
    with torch.no_grad():
        every, last = model(**inputs).logits, model(**inputs, logits_to_keep=1).logits
    assert last.shape[1] == 1
    torch.testing.assert_close(last, every[:, -1:], **TOLERANCE)


def test_unknown_arguments_are_refused(model, inputs):
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(**inputs, max_new_tokens=1, nonsense=1)
