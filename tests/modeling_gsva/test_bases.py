"""GSVA over any vision-language model: the base is still itself, and `segment` is a plain forward pass over the same tokens."""

import pytest
import tiny_bases as bases
import torch
from tiny_bases import IMAGE, INDEX, REJ, SEG, conversation, images_in, make_gsva, make_inputs, rms
from transformers import LogitsProcessor, LogitsProcessorList

from modeling_gsva import ConversationCache, GsvaForConditionalGeneration

FAMILIES = (*bases.FIRST_RANK, *bases.SECOND_RANK)


@pytest.fixture(scope="module", params=[*FAMILIES, *bases.WINDOWED])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family) -> GsvaForConditionalGeneration:
    return make_gsva(family)


@pytest.fixture(scope="module")
def inputs(model, family) -> dict[str, torch.Tensor]:
    return make_inputs(model, family)


def types_of(model, ids: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    """Token types written out from the families' documentation: 1 at images, or from the answer on in PaliGemma."""
    kind = model.config.vlm_config.model_type
    is_image, is_answer = (ids == IMAGE).long(), (torch.arange(ids.shape[1]) >= start).long().expand_as(ids)
    if kind in ("qwen2_5_vl", "qwen3_vl", "qwen3_5"):
        return {"mm_token_type_ids": is_image}
    return {"gemma3": {"token_type_ids": is_image}, "paligemma": {"token_type_ids": is_answer}}.get(kind, {})


def alone(model, ids: torch.Tensor, start: int, image: int, images: dict) -> torch.Tensor:
    """Hidden states (length, hidden) of the base's own forward pass over one conversation without padding."""
    own = bases.images_of(images, [image])
    with torch.no_grad():
        outputs = model.vlm(
            input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), output_hidden_states=True, use_cache=False,
            **own, **types_of(model, ids[None], start),
        )  # fmt: skip
    return outputs.hidden_states[-1][0]


def test_hidden_states_and_logits_are_the_bases_own(model, inputs):
    ids, mask = (
        torch.cat([inputs[a], inputs[b]], 1)
        for a, b in (("input_ids", "answer_ids"), ("attention_mask", "answer_attention_mask"))
    )
    start = inputs["input_ids"].shape[1]
    labels = torch.where((torch.arange(ids.shape[1]) >= start) & mask.bool(), ids, -100)
    given = {"image_index": inputs["image_index"], **images_in(inputs)}
    with torch.no_grad():
        outputs = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True, **given)
    loss, tokens = 0.0, 0
    for row, image in enumerate(INDEX):
        tokens_of, begin = conversation(inputs, row)
        expected = alone(model, tokens_of, begin, image, images_in(inputs))
        kept = mask[row].bool()
        logits = model.language.logits(expected)
        assert rms(outputs.logits[row][kept], logits) < 1e-6
        loss += torch.nn.functional.cross_entropy(logits[begin - 1 : -1], tokens_of[begin:], reduction="sum")
        tokens += len(tokens_of) - begin
    torch.testing.assert_close(outputs.loss, loss / tokens, rtol=1e-5, atol=0)


def test_another_image_is_seen(model, inputs):
    """So that the equality above is not that of models which ignore their images."""
    tokens_of, begin = conversation(inputs, 0)
    first = alone(model, tokens_of, begin, 0, images_in(inputs))
    changed = {**images_in(inputs), "pixel_values": inputs["pixel_values"].flip(-1) + 1}
    assert rms(alone(model, tokens_of, begin, 0, changed)[-1], first[-1]) > 1e-3


def test_generate_writes_the_bases_own_tokens(model, inputs):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    outputs = model.segment(
        **{k: v for k, v in inputs.items() if not k.startswith("answer")}, method="generate", **options
    )
    start = inputs["input_ids"].shape[1]
    own = bases.images_of(images_in(inputs), INDEX)
    types = types_of(model, inputs["input_ids"], start)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.vlm.generate(**text, **own, **types, **options)
    assert torch.equal(outputs.sequences, expected)


def test_generate_takes_what_segment_takes(model, inputs):
    """Conversations that share an image, which the bases' own `generate` does not know, and inputs of the masks alone."""
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.segment(
        **{k: v for k, v in inputs.items() if not k.startswith("answer")}, method="generate", **options
    )
    assert len(set(INDEX)) < len(INDEX) and torch.equal(model.generate(**inputs, **options), expected.sequences)
    words = inputs["input_ids"].clone()
    words[words == IMAGE] = 7
    without = {"input_ids": words, "attention_mask": inputs["attention_mask"]}
    index = torch.full((len(words),), -1)
    assert torch.equal(model.generate(**without, image_index=index, **options), model.generate(**without, **options))


@pytest.mark.parametrize("method", ["slots", "teacher_forced"])
def test_segment_is_a_plain_forward_pass_over_the_same_tokens(model, inputs, method):
    """The hidden states that prompt the masks are compared, the scores of the slots, and the masks."""
    no_target = dict(inputs, answer_ids=inputs["answer_ids"].clone())
    if method == "teacher_forced":  # the second pass differs after a gold [REJ]
        for row in (0, 2):
            place = (inputs["answer_ids"][row] == SEG).nonzero()[0, 0]
            no_target["answer_ids"][row, place] = REJ
    prompting = []  # the hidden states of slots that get a mask
    hook = model.mask_projector.register_forward_pre_hook(lambda _, given: prompting.append(given[0].clone()))
    outputs = model.segment(**no_target, method=method)
    hook.remove()
    expected_states = []
    embeddings = model.get_sam_embeddings(inputs["sam_pixel_values"])
    for row, image in enumerate(INDEX):
        tokens_of, begin = conversation(no_target, row)
        slots = [n for n, token in enumerate(tokens_of.tolist()) if token in (SEG, REJ)]
        if method == "slots":  # each slot sees the likelier token of those before it
            for slot, score in zip(slots, outputs.scores[row].tolist()):
                tokens_of[slot] = SEG if score >= 0 else REJ
        states = alone(model, tokens_of, begin, image, images_in(inputs))[[slot - 1 for slot in slots]]
        logits = model.language.logits(states)[:, [SEG, REJ]]
        torch.testing.assert_close(outputs.scores[row], logits[:, 0] - logits[:, 1], rtol=2e-5, atol=2e-5)
        if method == "teacher_forced":
            tokens_of[slots] = SEG
            states = alone(model, tokens_of, begin, image, images_in(inputs))[[slot - 1 for slot in slots]]
        kept = torch.ones(len(slots), dtype=torch.bool) if method == "teacher_forced" else ~outputs.is_rejected[row]
        expected_states.append(states[kept])
        with torch.no_grad():
            masks, _ = model.decode_masks(states[kept], embeddings, torch.full((int(kept.sum()),), image))
        if kept.any():
            assert rms(outputs.mask_logits[row][kept], masks) < 1e-5
    assert rms(torch.cat(prompting), torch.cat(expected_states)) < 2e-6


class EveryThirdIsASlot(LogitsProcessor):
    """Writes `[SEG]` at every third token, which a random model would hardly ever."""

    def __init__(self, start: int):
        self.start = start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if (input_ids.shape[1] - self.start) % 3 == 2:
            scores = torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([SEG]), 0.0)
        return scores


def test_generated_slots_are_prompted_by_the_bases_own_states(model, inputs):
    prompting, start = [], inputs["input_ids"].shape[1]
    hook = model.mask_projector.register_forward_pre_hook(lambda _, given: prompting.append(given[0].clone()))
    outputs = model.segment(
        **{k: v for k, v in inputs.items() if not k.startswith("answer")}, method="generate", max_new_tokens=7,
        do_sample=False, eos_token_id=None, logits_processor=LogitsProcessorList([EveryThirdIsASlot(start)]),
    )  # fmt: skip
    hook.remove()
    expected = []
    for row, image in enumerate(INDEX):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        tokens_of = torch.cat([prompt, outputs.sequences[row, start:]])
        slots = (tokens_of == SEG).nonzero()[:, 0]
        assert len(slots) >= 2
        expected.append(alone(model, tokens_of, len(prompt), image, images_in(inputs))[slots - 1])
    assert rms(torch.cat(prompting), torch.cat(expected)) < 2e-6


def test_two_batches_in_turn(model, inputs):
    """Qwen's models keep the last batch's offsets of positions in the module."""
    whole = model.segment(**inputs)
    rows = [2]
    images = bases.images_of(images_in(inputs), [1])
    text = {k: inputs[k][rows] for k in ("input_ids", "attention_mask", "answer_ids", "answer_attention_mask")}
    other = {**text, **images, "image_index": torch.tensor([0]), "sam_pixel_values": inputs["sam_pixel_values"][1:]}
    small = model.segment(**other)
    again = model.segment(**inputs)
    for first, second in zip(whole.scores, again.scores):
        assert torch.equal(first, second)
    torch.testing.assert_close(small.scores[0], whole.scores[2], rtol=2e-5, atol=2e-5)


def test_saved_and_loaded(model, inputs, tmp_path):
    """Bit for bit; and a plain base's directory gives all but the mask side."""
    model.save_pretrained(tmp_path / "whole")
    again = GsvaForConditionalGeneration.from_pretrained(tmp_path / "whole")
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    model.vlm.save_pretrained(tmp_path / "base")
    start, info = GsvaForConditionalGeneration.from_pretrained(
        tmp_path / "base", config=model.config, output_loading_info=True
    )
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"sam", "mask_projector"}
    assert not info["unexpected_keys"]
    assert all(torch.equal(value, start.vlm.state_dict()[name]) for name, value in model.vlm.state_dict().items())


def test_gradients_reach_every_trained_part(family, inputs):
    model = make_gsva(family).train()
    model.sam.vision_encoder.requires_grad_(False)
    ids, mask = (
        torch.cat([inputs[a], inputs[b]], 1)
        for a, b in (("input_ids", "answer_ids"), ("attention_mask", "answer_attention_mask"))
    )
    start = inputs["input_ids"].shape[1]
    labels = torch.where((torch.arange(ids.shape[1]) >= start) & mask.bool(), ids, -100)
    sizes = torch.tensor([[40, 64], [64, 48]])
    truths = [
        (torch.rand(2, *sizes[image], generator=torch.Generator().manual_seed(5)) > 0.5).byte() for image in INDEX
    ]
    outputs = model(
        input_ids=ids, attention_mask=mask, labels=labels, image_index=inputs["image_index"], mask_labels=truths,
        sam_pixel_values=inputs["sam_pixel_values"], original_sizes=sizes, reshaped_input_sizes=sizes, **images_in(inputs),
    )  # fmt: skip
    outputs.loss.backward()
    for part in (model.mask_projector, model.sam.mask_decoder, model.vlm.get_input_embeddings(), model.lm_head):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert all(p.grad is None for p in model.sam.vision_encoder.parameters())


def test_who_shares_prefixes(model, family, inputs, monkeypatch):
    """The first rank runs the beginning of two prompts about an image once; the others cannot."""
    assert model.language.shares_prefix == (family not in bases.SECOND_RANK)
    assert model.language.has_windows == (family in bases.WINDOWED or family == "gemma3")
    rows = []
    language = type(model.language)
    hidden = language.hidden
    monkeypatch.setattr(
        language, "hidden", lambda self, **given: rows.append(len(given["input_ids"])) or hidden(self, **given)
    )
    model.segment(**inputs)
    assert rows == ([2, 3, 3] if model.language.shares_prefix else [3, 3])


@pytest.mark.parametrize("method", ["slots", "generate"])
def test_a_conversations_cache_changes_no_answer(model, inputs, method):
    """The second turn, behind what the cache holds of the first, is answered as if all of it were read again."""
    options = {"method": method}
    if method == "generate":
        options |= {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        inputs = {name: value for name, value in inputs.items() if not name.startswith("answer")}
    cache = ConversationCache()
    model.segment(**inputs, **options, cache=cache)
    more = torch.randint(5, 280, (3, 4), generator=torch.Generator().manual_seed(7))
    ids, mask = (
        torch.cat([inputs["input_ids"], more], 1),
        torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1),
    )
    longer = {**inputs, "input_ids": ids, "attention_mask": mask}
    behind, again = model.segment(**longer, **options, cache=cache), model.segment(**longer, **options)
    assert torch.equal(behind.sequences, again.sequences)
    for name in ("scores", "iou_scores"):
        for one, other in zip(getattr(behind, name), getattr(again, name), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    assert (cache.key_values is not None) == model.language.shares_prefix
