"""segment(): the methods slots, generate and teacher_forced against plain forward passes; generate with its strategies."""

import copy

import numpy as np
import pytest
import torch
from padding import padded

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # float64; see test_modeling


@pytest.fixture(scope="module")
def double_model(make_model):
    return make_model(seed=3).double()  # which says both [SEG] and [REJ]


@pytest.fixture(scope="module")
def pictures(make_picture):
    return [make_picture(0, 40, 30), make_picture(1, 20, 50)]


EXPRESSIONS = [["red dog", "a cat", "the bird on the left"], ["b"]]


@pytest.fixture(scope="module")
def inputs(processor, pictures):
    return processor(images=pictures, expressions=EXPRESSIONS, return_tensors="pt")


@pytest.fixture(scope="module")
def threshold(double_model, inputs):
    """Between the scores of the first conversation, so that some slots are rejected and some are not."""
    scores = double_model.segment(**inputs).scores[0].sort().values
    assert scores[1] - scores[0] > 1e-3
    return float((scores[0] + scores[1]) / 2)


def same(a, b, rows=None, columns=None):
    """Equal results row by row; `rows` of a against `columns` of b."""
    rows = range(len(a.scores)) if rows is None else rows
    columns = range(len(b.scores)) if columns is None else columns
    for n, m in zip(rows, columns, strict=True):
        torch.testing.assert_close(a.scores[n], b.scores[m], **TOLERANCE)
        assert torch.equal(a.is_rejected[n], b.is_rejected[m])
        torch.testing.assert_close(a.mask_logits[n], b.mask_logits[m], **TOLERANCE)
        torch.testing.assert_close(a.iou_scores[n], b.iou_scores[m], **TOLERANCE)


def identical(a, b):
    assert torch.equal(a.sequences, b.sequences)
    for name in ("scores", "is_rejected", "mask_logits", "iou_scores"):
        assert all(torch.equal(x, y) for x, y in zip(getattr(a, name), getattr(b, name), strict=True)), name


def slot_places(model, sequences, start):
    is_slot = (sequences == model.config.seg_token_id) | (sequences == model.config.rej_token_id)
    is_slot[:, :start] = False
    return [row.nonzero().flatten().tolist() for row in is_slot]


def fed(model, outputs):
    """The sequences that `slots` read: of every slot the likelier token, whatever was reported."""
    sequences = outputs.sequences.clone()
    places = slot_places(model, sequences, int(outputs.answer_starts[0]))
    for row, (columns, scores) in enumerate(zip(places, outputs.scores, strict=True)):
        sequences[row, columns] = torch.where(scores < 0, model.config.rej_token_id, model.config.seg_token_id)
    return sequences


def forward_on(model, inputs, sequences, row, end=None):
    """forward() over one conversation's own tokens, without padding and cache: its outputs."""
    mask = torch.cat([inputs["attention_mask"], inputs["answer_attention_mask"]], 1)[row].bool()
    ids = sequences[row][mask][None] if end is None else sequences[row, :end][mask[:end]][None]
    image = int(inputs["image_index"][row])
    with torch.no_grad():
        return model(
            input_ids=ids,
            pixel_values=inputs["pixel_values"][[image]],
            sam_pixel_values=inputs["sam_pixel_values"][[image]],
        )


# --- slots -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_prompt", [False, True])
def test_slots_with_cache_equal_a_forward_over_the_same_tokens(
    double_model, processor, pictures, threshold, one_prompt
):
    inputs = processor(pictures, expressions=EXPRESSIONS, one_prompt_per_expression=one_prompt, return_tensors="pt")
    outputs = double_model.segment(**inputs, threshold=threshold)
    rejected = torch.cat(outputs.is_rejected)
    assert rejected.any() and not rejected.all()
    sequences, masked = fed(double_model, outputs), 0
    for row in range(len(outputs.scores)):
        direct = forward_on(double_model, inputs, sequences, row)
        logits = direct.slot_logits
        torch.testing.assert_close(outputs.scores[row], (logits[:, 0] - logits[:, 1]).float(), **TOLERANCE)
        assert torch.equal(outputs.is_rejected[row], outputs.scores[row] < threshold)
        both = ~outputs.is_rejected[row] & (outputs.scores[row] >= 0)  # forward gives masks where the token is [SEG]
        masked += int(both.sum())
        torch.testing.assert_close(outputs.mask_logits[row][both], direct.mask_logits[0][both], **TOLERANCE)
        torch.testing.assert_close(outputs.iou_scores[row][both], direct.iou_scores[0][both], **TOLERANCE)
        assert outputs.mask_logits[row][outputs.is_rejected[row]].eq(0).all()
    assert masked


def test_each_choice_stands_where_its_slot_is(double_model, inputs, threshold, processor):
    outputs = double_model.segment(**inputs, threshold=threshold)
    start = inputs["input_ids"].shape[1]
    assert outputs.method == "slots" and outputs.answer_starts.tolist() == [start, start]
    wording = torch.cat([inputs["input_ids"], inputs["answer_ids"]], 1)
    for row, places in enumerate(slot_places(double_model, wording, start)):
        chosen = outputs.sequences[row, places] == double_model.config.rej_token_id
        assert torch.equal(chosen, outputs.is_rejected[row])
        others = [n for n in range(wording.shape[1]) if n not in places]
        assert torch.equal(outputs.sequences[row, others], wording[row, others])
        assert (
            outputs.mask_logits[row][chosen].eq(0).all() and (outputs.mask_logits[row][~chosen].std((1, 2)) > 0).all()
        )


def test_the_threshold_reports_and_changes_no_score(double_model, inputs):
    """So that the curve over thresholds is what evaluating at each of them gives."""
    kept = double_model.segment(**inputs, threshold=-1e9)
    rejected = double_model.segment(**inputs, threshold=1e9)
    assert not torch.cat(kept.is_rejected).any() and torch.cat(rejected.is_rejected).all()
    assert all(torch.equal(a, b) for a, b in zip(kept.scores, rejected.scores, strict=True))


def test_later_slots_see_the_models_own_choice(double_model, inputs):
    other = copy.deepcopy(double_model)  # chooses the opposite everywhere
    pair = [other.config.seg_token_id, other.config.rej_token_id]
    with torch.no_grad():
        other.lm_head.weight[pair] = other.lm_head.weight[pair[::-1]]
    outputs = {model: model.segment(**inputs) for model in (double_model, other)}
    mine, opposite = (found.scores[0] for found in outputs.values())
    torch.testing.assert_close(mine[0], -opposite[0], **TOLERANCE)  # nothing is chosen before the first slot
    assert (mine[1:] + opposite[1:]).abs().min() > 1e-3
    for model, found in outputs.items():  # a forward pass up to each slot, over what was really chosen
        sequences = fed(model, found)
        assert torch.equal(sequences, found.sequences)
        for slot, place in enumerate(slot_places(model, sequences, inputs["input_ids"].shape[1])[0]):
            logits = forward_on(model, inputs, sequences, 0, end=place).logits[0, -1]
            score = logits[model.config.seg_token_id] - logits[model.config.rej_token_id]
            torch.testing.assert_close(found.scores[0][slot], score.float(), **TOLERANCE)


@pytest.mark.parametrize("gold", [[[True] * 3, [True]], [[False, True, False], [True]]])
def test_slots_never_sees_a_gold_token(double_model, processor, pictures, inputs, threshold, gold):
    told = processor(pictures, expressions=EXPRESSIONS, no_targets=gold, return_tensors="pt")
    assert not torch.equal(told["answer_ids"], inputs["answer_ids"])
    identical(double_model.segment(**told, threshold=threshold), double_model.segment(**inputs, threshold=threshold))


def test_nothing_after_a_slot_reaches_it(double_model, inputs, threshold):
    """The scores of the first two slots stay when the third expression's own words are other ones."""
    changed = dict(inputs, answer_ids=inputs["answer_ids"].clone())
    places = slot_places(double_model, changed["answer_ids"], 0)[0]
    changed["answer_ids"][0, places[1] + 1 : places[2]] = 100
    before, after = (
        double_model.segment(**inputs, threshold=threshold),
        double_model.segment(**changed, threshold=threshold),
    )
    assert torch.equal(before.scores[0][:2], after.scores[0][:2]) and not torch.equal(
        before.scores[0][2], after.scores[0][2]
    )


def test_thresholds_only_move_decisions(double_model, inputs):
    base = double_model.segment(**inputs)
    first = base.scores[0][0]
    for offset, expected in ((-1e-6, False), (1e-6, True)):
        assert bool(double_model.segment(**inputs, threshold=float(first) + offset).is_rejected[0][0]) is expected


@pytest.mark.parametrize("method", ["slots", "teacher_forced"])
def test_batches_equal_one_by_one(double_model, processor, pictures, threshold, method):
    expressions = [["red dog", "a cat", "the bird on the left"], ["b"], ["x" * 40, "y"]]
    images, options = [*pictures, pictures[0]], {"threshold": threshold} if method == "slots" else {}
    no_targets = [[True, False, True], [False], [True, True]]
    together = processor(images, expressions=expressions, no_targets=no_targets, return_tensors="pt")
    batch = double_model.segment(**together, method=method, **options)
    for order in ([0], [1], [2], [2, 0], [1, 2]):
        part = processor([images[n] for n in order], expressions=[expressions[n] for n in order],
                         no_targets=[no_targets[n] for n in order], return_tensors="pt")  # fmt: skip
        same(double_model.segment(**part, method=method, **options), batch, columns=order)


def test_a_conversation_without_slots_or_image_beside_others(double_model, processor, pictures, inputs, threshold):
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        for text in ("Hi", "<image>?")
    ]
    prompts = [prompt.replace("<image>", "<image>" * 16) for prompt in prompts]
    rows = [processor.tokenizer(prompt)["input_ids"] for prompt in prompts]
    ids, mask = padded(processor, [*inputs["input_ids"][0:1].tolist(), *rows], side="left")
    answers, answer_mask = padded(processor, [inputs["answer_ids"][0].tolist(), [101, 2], [102, 103, 2]])
    mixed = {
        "input_ids": ids,
        "attention_mask": mask,
        "answer_ids": answers,
        "answer_attention_mask": answer_mask,
        "pixel_values": inputs["pixel_values"],
        "sam_pixel_values": inputs["sam_pixel_values"],
        "image_index": torch.tensor([0, -1, 1]),
    }
    outputs = double_model.segment(**mixed, threshold=threshold)
    assert [len(scores) for scores in outputs.scores] == [3, 0, 0]
    same(outputs, double_model.segment(**inputs, threshold=threshold), rows=[0], columns=[0])
    none = {k: v[1:] if k not in ("pixel_values", "sam_pixel_values") else v for k, v in mixed.items()}
    assert [len(scores) for scores in double_model.segment(**none).scores] == [0, 0]


def test_images_are_encoded_once_and_the_prompt_once(double_model, processor, pictures):
    inputs = processor(pictures, expressions=EXPRESSIONS, one_prompt_per_expression=True, return_tensors="pt")
    seen = {"clip": 0, "sam": 0, "tokens": 0}

    def count(name):
        return lambda module, args, kwargs: seen.update({name: seen[name] + len(args[0])})

    def tokens(module, args, kwargs):
        seen["tokens"] = max(seen["tokens"], 0) + kwargs["inputs_embeds"].shape[1]

    hooks = [
        double_model.model.vision_tower.register_forward_pre_hook(count("clip"), with_kwargs=True),
        double_model.sam.vision_encoder.register_forward_pre_hook(count("sam"), with_kwargs=True),
        double_model.model.language_model.register_forward_pre_hook(tokens, with_kwargs=True),
    ]
    double_model.segment(**inputs)
    one = dict(seen)
    together = processor(pictures, expressions=EXPRESSIONS, return_tensors="pt")
    double_model.segment(**together)
    for hook in hooks:
        hook.remove()
    assert one["clip"] == one["sam"] == 2  # four prompts, two pictures
    # the steps never feed more than the longest prompt and answer: nothing is computed twice
    assert seen["tokens"] - one["tokens"] <= together["input_ids"].shape[1] + together["answer_ids"].shape[1]


@torch.no_grad()
def test_kept_features(double_model, inputs, threshold):
    kept = {k: v for k, v in inputs.items() if k not in ("pixel_values", "sam_pixel_values")}
    kept["vision_features"] = double_model.model.get_vision_features(inputs["pixel_values"])
    kept["sam_embeddings"] = double_model.get_sam_embeddings(inputs["sam_pixel_values"])
    identical(double_model.segment(**kept, threshold=threshold), double_model.segment(**inputs, threshold=threshold))


# --- teacher_forced ------------------------------------------------------------------------------------------------------


def test_teacher_forced_equals_two_forward_passes(make_model, processor, pictures):
    model = make_model().double()
    seg, rej, other = model.config.seg_token_id, model.config.rej_token_id, 100
    gold = [[False, True, False, True, False], [True]]
    said = [[seg, rej, other, other, rej], [seg]]
    # gold [SEG]: kept only where the model says [SEG]; gold [REJ]: rejected only where it says [REJ]
    decided = [[False, True, True, False, True], [False]]
    expressions = [["red dog", "a cat", "the bird on the left", "two", "all three of them"], ["b"]]
    inputs = processor(pictures, expressions=expressions, no_targets=gold, return_tensors="pt")
    ids = torch.cat([inputs["input_ids"], inputs["answer_ids"]], 1)
    with torch.no_grad():  # a head that says these tokens at these states
        states = []
        for row in range(2):
            mask = torch.cat([inputs["attention_mask"], inputs["answer_attention_mask"]], 1)[row].bool()
            pixel_values = inputs["pixel_values"][[row]].double()
            hidden = model.model(input_ids=ids[row][mask][None], pixel_values=pixel_values).last_hidden_state[0]
            states.append(hidden[forward_on(model, inputs, ids, row).slot_positions[:, 1] - 1])
        inverse = torch.linalg.pinv(torch.cat(states))  # (hidden, slots)
        wanted = torch.tensor(said[0] + said[1])
        for token in (seg, rej, other):
            model.lm_head.weight[token] = inverse @ (100.0 * (wanted == token)).double()
    outputs = model.segment(**inputs, method="teacher_forced")
    assert outputs.method == "teacher_forced"
    for row in range(2):
        first = forward_on(model, inputs, ids, row)
        second = forward_on(model, inputs, ids.masked_fill(ids == rej, seg), row)
        assert first.logits[0, first.slot_positions[:, 1] - 1].argmax(-1).tolist() == said[row]
        assert outputs.is_rejected[row].tolist() == decided[row]
        scores = first.slot_logits[:, 0] - first.slot_logits[:, 1]
        torch.testing.assert_close(outputs.scores[row], scores, rtol=1e-4, atol=1e-3)  # of size 100
        torch.testing.assert_close(outputs.mask_logits[row], second.mask_logits[0], **TOLERANCE)
        assert (outputs.mask_logits[row].std((1, 2)) > 0).all()  # every slot has a mask, also the rejected ones
    assert torch.equal(outputs.sequences, ids)
    told = processor.post_process_segmentation(outputs, inputs, keep_rejected_masks=True)
    assert [[entry["is_rejected"] for entry in image] for image in told] == decided


# --- generate ------------------------------------------------------------------------------------------------------------

STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "return dict": {"return_dict_in_generate": True, "output_scores": True},
    "no cache": {"use_cache": False},
}
SINGLE = ("prompt lookup",)  # of GenerationMixin: batches of one only


@pytest.mark.parametrize("name", STRATEGIES)
def test_generate_runs_with_every_strategy(double_model, processor, pictures, inputs, name):
    options = STRATEGIES[name]
    if name in SINGLE:
        inputs = processor(pictures[:1], expressions=EXPRESSIONS[:1], return_tensors="pt")
    copies = options.get("num_return_sequences", 1)
    length = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    direct = double_model.generate(**inputs, max_new_tokens=8, **options)
    direct = direct if isinstance(direct, torch.Tensor) else direct.sequences
    assert len(direct) == copies * len(inputs["input_ids"]) and length < direct.shape[1] <= length + 8
    assert torch.equal(direct[:, :length], inputs["input_ids"].repeat_interleave(copies, 0))
    torch.manual_seed(0)
    outputs = double_model.segment(**inputs, method="generate", max_new_tokens=8, **options)
    assert outputs.method == "generate" and torch.equal(outputs.sequences, direct)
    assert outputs.image_index.tolist() == [n for n in inputs["image_index"].tolist() for _ in range(copies)]
    results = processor.post_process_segmentation(outputs, inputs)
    lengths = [[len(one) for one in image] if copies > 1 else len(image) for image in results]
    assert lengths == [[len(asked)] * copies if copies > 1 else len(asked) for asked in inputs["expressions"]]


def test_greedy_equals_step_by_step_forward(double_model, inputs):
    outputs = double_model.generate(**inputs, max_new_tokens=6)
    start = inputs["input_ids"].shape[1]
    for row in range(2):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        for step in range(6):
            with torch.no_grad():
                logits = double_model(input_ids=ids, pixel_values=inputs["pixel_values"][[row]]).logits[0, -1]
            assert int(logits.argmax()) == int(outputs[row, start + step])
            ids = torch.cat([ids, logits.argmax().reshape(1, 1)], 1)


def test_assisted_generation_gives_the_greedy_answer(double_model, processor, pictures):
    inputs = processor(pictures[:1], expressions=EXPRESSIONS[:1], return_tensors="pt")
    greedy = double_model.generate(**inputs, max_new_tokens=12)
    assert torch.equal(double_model.generate(**inputs, max_new_tokens=12, prompt_lookup_num_tokens=4), greedy)


def test_several_answers_belong_to_their_own_images(double_model, inputs):
    """The copies of a conversation keep its image: their greedy answers are those of one answer each."""
    one = double_model.segment(**inputs, method="generate", max_new_tokens=6)
    three = double_model.segment(**inputs, method="generate", max_new_tokens=6, num_beams=3, num_return_sequences=3)
    assert three.image_index.tolist() == [0, 0, 0, 1, 1, 1] and len(one.sequences) == 2
    direct = double_model.generate(**inputs, max_new_tokens=6, num_beams=3, num_return_sequences=3)
    assert torch.equal(three.sequences, direct)
    swapped = dict(inputs, image_index=torch.tensor([1, 0]))
    assert not torch.equal(double_model.generate(**swapped, max_new_tokens=6), one.sequences)


def crafted(processor, inputs, answers):
    """Sequences as `generate` returns them, answers written by hand and padded on the right."""
    rows = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
    answer_ids, _ = padded(processor, rows)
    copies = len(rows) // len(inputs["input_ids"])
    return torch.cat([inputs["input_ids"].repeat_interleave(copies, 0), answer_ids], 1)


def read(model, inputs, sequences):
    return model.segment_sequences(
        sequences,
        inputs["attention_mask"],
        inputs["image_index"],
        model.model.get_vision_features(inputs["pixel_values"]),
        model.get_sam_embeddings(inputs["sam_pixel_values"]),
    )


def test_every_seg_of_a_free_answer_gets_its_mask_and_phrase(double_model, processor, inputs):
    answers = [" Sure, the dog [SEG] and a unicorn:[REJ], three cats [SEG].</s>[SEG] lost", " None."]
    sequences = crafted(processor, inputs, answers)
    outputs = read(double_model, inputs, sequences)
    assert [len(scores) for scores in outputs.scores] == [3, 0]  # nothing counts after the end
    assert outputs.is_rejected[0].tolist() == [False, True, False]
    chat = {k: v for k, v in inputs.items() if k != "expressions"}
    results = processor.post_process_segmentation(outputs, chat)
    # the tail after </s> is no part of the answer
    assert [entry["text"] for entry in results[0][:3]] == ["the dog", "a unicorn", "three cats"] and len(
        results[0]
    ) == 3
    assert results[1] == [] and [entry["is_rejected"] for entry in results[0]] == [False, True, False]
    for row in range(2):
        mask = inputs["attention_mask"][row].bool()
        end = len(processor.tokenizer(answers[row].split("</s>")[0], add_special_tokens=False)["input_ids"])
        ids = torch.cat([inputs["input_ids"][row][mask], sequences[row, len(mask) : len(mask) + end]])[None]
        with torch.no_grad():
            direct = double_model(input_ids=ids, pixel_values=inputs["pixel_values"][[row]],
                                  sam_pixel_values=inputs["sam_pixel_values"][[row]])  # fmt: skip
        torch.testing.assert_close(outputs.mask_logits[row], direct.mask_logits[0], **TOLERANCE)
        torch.testing.assert_close(outputs.iou_scores[row], direct.iou_scores[0], **TOLERANCE)
        scores = direct.slot_logits[:, 0] - direct.slot_logits[:, 1]
        torch.testing.assert_close(outputs.scores[row], scores, **TOLERANCE)


def test_answers_of_several_copies(double_model, processor, inputs):
    answers = [" a [SEG]", " b:[REJ], c:[SEG]", " d", " [SEG][SEG]"]
    outputs = read(double_model, inputs, crafted(processor, inputs, answers))
    assert outputs.image_index.tolist() == [0, 0, 1, 1]
    assert [len(scores) for scores in outputs.scores] == [1, 2, 0, 2]
    alone = read(double_model, inputs, crafted(processor, inputs, [answers[1], answers[3]]))
    same(outputs, alone, rows=[1, 3])


def test_generated_states_equal_a_direct_forward(make_model, processor, inputs):
    """A model that is made to say [SEG]: the masks of its own answer are those of a forward pass over it."""
    model = make_model().double()
    with torch.no_grad():
        hidden = model.model(**{k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values", "image_index")})
        model.lm_head.weight[model.config.seg_token_id] = hidden.last_hidden_state[0, -1] * 10
        model.lm_head.weight[model.config.rej_token_id] = -hidden.last_hidden_state[0, -1]
    outputs = model.segment(**inputs, method="generate", max_new_tokens=5)
    assert len(outputs.scores[0]) >= 1 and not outputs.is_rejected[0][0] and outputs.mask_logits[0][0].std() > 0
    for row in range(2):
        ids = torch.cat([inputs["input_ids"][row][inputs["attention_mask"][row].bool()],
                         outputs.sequences[row, inputs["input_ids"].shape[1] :]])[None]  # fmt: skip
        with torch.no_grad():
            direct = model(input_ids=ids, pixel_values=inputs["pixel_values"][[row]],
                           sam_pixel_values=inputs["sam_pixel_values"][[row]])  # fmt: skip
        torch.testing.assert_close(outputs.mask_logits[row], direct.mask_logits[0], **TOLERANCE)


def chat_inputs(processor, pictures, questions, image_index):
    rows = []
    for question, image in zip(questions, image_index):
        message = {"role": "user", "content": ("<image>\n" if image >= 0 else "") + question}
        rows.append(processor.encode_conversations([[message]], add_generation_prompt=True)[0][0])
    ids, mask = padded(processor, rows, side="left")
    pixels = dict(processor.image_processor(pictures, return_tensors="pt")) if pictures else {}
    index = torch.tensor(image_index)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "image_index": index,
        **pixels,
    }


def test_a_conversation_without_an_image(make_model, processor, pictures):
    model = make_model().double()
    alone = chat_inputs(processor, [], ["Hello?"], [-1])
    outputs = model.segment(**alone, method="generate", max_new_tokens=6)
    assert outputs.mask_logits is None and processor.post_process_segmentation(outputs, alone) == []
    mixed = chat_inputs(processor, pictures, ["Hello?", "Where?", "Who?"], [-1, 1, 0])
    together = model.segment(**mixed, method="generate", max_new_tokens=6)
    start, end = mixed["input_ids"].shape[1], alone["input_ids"].shape[1]
    assert torch.equal(together.sequences[0, start:], outputs.sequences[0, end:])
    # It may even say [SEG]: there is nothing to segment, and its neighbours are answered all the same.
    sequences = crafted(processor, mixed, [" Hi [SEG].", " There [SEG].", " Him [SEG]."])
    spoken = read(model, mixed, sequences)
    assert spoken.mask_logits[0].eq(0).all() and all(spoken.mask_logits[n].std() > 0 for n in (1, 2))
    assert [[entry["text"] for entry in image] for image in processor.post_process_segmentation(spoken, mixed)] == [
        ["Him"],
        ["There"],
    ]


# --- results and bad input -------------------------------------------------------------------------------------------------


def test_results_have_the_pictures_sizes(double_model, processor, inputs, threshold):
    results = processor.post_process_segmentation(double_model.segment(**inputs, threshold=threshold), inputs)
    assert [[entry["text"] for entry in image] for image in results] == EXPRESSIONS
    assert [[entry["mask"].shape for entry in image] for image in results] == [[(30, 40)] * 3, [(50, 20)]]
    for entry in (entry for image in results for entry in image):
        assert entry["is_rejected"] == (entry["score"] < threshold) and not (
            entry["is_rejected"] and entry["mask"].any()
        )
        assert isinstance(entry["mask"], np.ndarray) and entry["mask"].dtype == bool


def test_half_precision(make_model, processor, inputs):
    model = make_model().to(torch.bfloat16)
    for options in ({}, {"method": "teacher_forced"}, {"method": "generate", "max_new_tokens": 3}):
        outputs = model.segment(**inputs, **options)
        assert all(torch.isfinite(masks).all() for masks in outputs.mask_logits)
        assert len(processor.post_process_segmentation(outputs, inputs)) == 2


@pytest.mark.parametrize("method", ["slots", "teacher_forced"])
def test_answers_of_one_length_need_no_mask(model, processor, pictures, method):
    inputs = processor(pictures[:1], expressions=EXPRESSIONS[:1], return_tensors="pt")
    assert inputs["answer_attention_mask"].all()
    masked = model.segment(**inputs, method=method)
    bare = model.segment(**{k: v for k, v in inputs.items() if k != "answer_attention_mask"}, method=method)
    identical(bare, masked)


def test_bad_calls_are_named(model, inputs):
    prompt = {k: v for k, v in inputs.items() if not k.startswith("answer_")}
    right = dict(inputs, attention_mask=inputs["attention_mask"].flip(1), input_ids=inputs["input_ids"].roll(-1, 1))
    cases = [
        (dict(inputs, method="guess"), "method='guess' is not known; choose 'slots', 'generate' or 'teacher_forced'"),
        (prompt, "method='slots' needs answer_ids.*use method='generate'"),
        (dict(prompt, method="teacher_forced"), "method='teacher_forced' needs answer_ids"),
        (dict(inputs, num_beams=2), r"\['num_beams'\] only apply to method='generate', not to 'slots'"),
        (right, "Prompts are padded on the right.*pad them on the left"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model.segment(**arguments)
