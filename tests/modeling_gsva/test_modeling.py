"""GsvaForConditionalGeneration.forward: outputs, loss parts against plain numpy, batches, gradients, bad input."""

import math

import numpy as np
import pytest
import torch

from modeling_gsva import GsvaConfig

# Sums in another order; outputs are of size 1. Compared in float64, where only LLaMA's norms and softmax round to float32.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CONVERSATIONS = [
    talk("<image>\nred and blue?", "Sure,red:[SEG], blue:[REJ]."),
    talk("<image>\nThe green one, please.", "It is [SEG]."),
    talk("<image>\nall?", "[SEG] and [SEG]"),
    talk("Who are you?", "A model."),
]
IMAGE_INDEX = [0, 1, 0, -1]


@pytest.fixture(scope="module")
def examples(make_picture):
    """Two pictures of different shape, four conversations: two about the first, one about the second, one about none."""
    rng = np.random.default_rng(0)
    masks = [rng.random((2, 30, 40)) > 0.7, rng.random((1, 50, 20)) > 0.2, rng.random((2, 30, 40)) > 0.5, []]
    masks[0][1] = False  # [REJ]
    return {
        "images": [make_picture(0, 40, 30), make_picture(1, 20, 50)],
        "conversations": CONVERSATIONS,
        "image_index": IMAGE_INDEX,
        "masks": masks,
    }


@pytest.fixture(scope="module")
def batch(processor, examples):
    return processor(**examples, return_tensors="pt")


def pick(processor, examples, rows):
    """The batch that holds only these conversations, and only their pictures."""
    used = sorted({examples["image_index"][row] for row in rows} - {-1})
    return processor(
        images=[examples["images"][n] for n in used] or None,
        conversations=[examples["conversations"][row] for row in rows],
        image_index=[
            used.index(examples["image_index"][row]) if examples["image_index"][row] >= 0 else -1 for row in rows
        ],
        masks=[examples["masks"][row] for row in rows],
        return_tensors="pt",
    )


@pytest.fixture(scope="module")
def double_model(make_model):
    return make_model().double()


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_shapes_and_slots(model, batch, processor):
    with torch.no_grad():
        outputs = model(**batch)
    assert outputs.logits.shape == (4, batch["input_ids"].shape[1], model.config.text_config.vocab_size)
    assert [tuple(masks.shape) for masks in outputs.mask_logits] == [
        (2, 32, 32),
        (1, 32, 32),
        (2, 32, 32),
        (0, 32, 32),
    ]
    assert [len(iou) for iou in outputs.iou_scores] == [2, 1, 2, 0]
    ids = batch["input_ids"]
    found = [
        (r, c)
        for r in range(4)
        for c in range(ids.shape[1])
        if ids[r, c] in (processor.seg_token_id, processor.rej_token_id)
    ]
    assert outputs.slot_positions.tolist() == [list(place) for place in found]
    for (row, position), logits in zip(found, outputs.slot_logits):
        expected = outputs.logits[row, position - 1, [processor.seg_token_id, processor.rej_token_id]]
        torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_rejected_slots_have_no_mask(model, batch):
    with torch.no_grad():
        outputs = model(**batch)
    assert outputs.mask_logits[0][1].eq(0).all() and outputs.iou_scores[0][1] == 0
    for masks in (outputs.mask_logits[0][:1], outputs.mask_logits[1], outputs.mask_logits[2]):
        assert (masks.std((1, 2)) > 0.01).all()
    first, second = outputs.mask_logits[2]
    assert (first - second).abs().max() > 0.01  # two slots of one answer are prompted by different states


def test_without_labels_and_without_sam(model, batch):
    with torch.no_grad():
        plain = model(
            **{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "pixel_values", "image_index")}
        )
        masks = model(**{k: v for k, v in batch.items() if k not in ("labels", "mask_labels")})
        whole = model(**batch)
    assert plain.loss is None and plain.mask_logits is None and torch.equal(plain.logits, whole.logits)
    assert masks.loss is None and torch.equal(masks.mask_logits[1], whole.mask_logits[1])


def test_kept_features_give_the_same(model, batch):
    kept = {k: v for k, v in batch.items() if k not in ("pixel_values", "sam_pixel_values")}
    with torch.no_grad():
        kept["vision_features"] = model.model.get_vision_features(batch["pixel_values"])
        kept["sam_embeddings"] = model.get_sam_embeddings(batch["sam_pixel_values"])
        assert kept["vision_features"].shape == (2, 16, 24) and kept["sam_embeddings"].shape == (2, 16, 8, 8)
        assert torch.equal(model(**kept).loss, model(**batch).loss)


def test_base_model_gives_hidden_states(model, batch):
    with torch.no_grad():
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values", "image_index")}
        outputs = model.model(**inputs)
        assert len(outputs.image_hidden_states) == 3 and outputs.image_hidden_states[0].shape == (16, 32)
        embeds = model.get_input_embeddings()(inputs["input_ids"].masked_fill(inputs["input_ids"] == 263, 0))
        torch.testing.assert_close(model.lm_head(outputs.last_hidden_state), model(**batch).logits, **TOLERANCE)
        text = {"input_ids": inputs["input_ids"][3:], "attention_mask": inputs["attention_mask"][3:]}
        by_embeds = model.model(inputs_embeds=embeds[3:], attention_mask=text["attention_mask"])
        assert torch.equal(model.model(**text).last_hidden_state, by_embeds.last_hidden_state)


def test_embeddings_in_place_of_ids_give_the_same(make_model, batch):
    """Placeholders and slots are then known by their embeddings; `<image>` needs a row of its own for it."""
    model = make_model()
    model.resize_token_embeddings(model.config.image_token_id + 1, mean_resizing=False)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        given, expected = model(**without(batch, "input_ids", inputs_embeds=embeds)), model(**batch)
    assert torch.equal(given.slot_positions, expected.slot_positions) and torch.equal(given.loss, expected.loss)
    assert all(torch.equal(*masks) for masks in zip(given.mask_logits, expected.mask_logits))


def test_the_tuple_is_in_the_order_of_the_fields(model, batch):
    with torch.no_grad():
        loss, logits_with_loss, *_ = model(**batch, return_dict=False)  # as transformers' outputs begin
        logits, *_ = model(**without(batch, "labels", "mask_labels"), return_dict=False)
        expected = model(**batch)
    assert torch.equal(loss, expected.loss) and torch.equal(logits_with_loss, expected.logits)
    assert torch.equal(logits, expected.logits)


def test_labels_may_come_shifted(model, batch):
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        assert torch.equal(model(**batch, shift_labels=shifted).loss, model(**batch).loss)
        assert not torch.equal(model(**batch, shift_labels=shifted.roll(1, 1)).loss, model(**batch).loss)


def test_image_features_come_with_the_towers_states_on_demand(model, batch):
    with torch.no_grad():
        plain = model.get_image_features(batch["pixel_values"])
        full = model.get_image_features(batch["pixel_values"], output_hidden_states=True)
    assert [state is not None for state in plain.hidden_states] == [False, True, False]  # only the one that is read
    assert len(full.hidden_states) == 3 and torch.equal(full.hidden_states[1][:, 1:], full.last_hidden_state)
    assert torch.equal(torch.stack(full.pooler_output), torch.stack(plain.pooler_output))


@pytest.mark.parametrize("strategy, count", [("default", 16), ("full", 17)])
def test_vision_feature_layer_and_strategy(make_model, batch, strategy, count):
    model = make_model(vision_feature_layer=-1, vision_feature_select_strategy=strategy)
    assert model.config.image_seq_length == count
    with torch.no_grad():
        states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-1]
        features = model.model.get_vision_features(batch["pixel_values"])
    assert torch.equal(features, states[:, 17 - count :])


def test_half_precision_runs(make_model, batch, processor):
    model = make_model().to(torch.bfloat16)
    with torch.no_grad():
        outputs = model(**batch)
    assert torch.isfinite(outputs.loss) and all(torch.isfinite(masks).all() for masks in outputs.mask_logits)


# --- one image, many conversations; batches ---------------------------------------------------------------------------


def test_every_image_is_encoded_once(model, batch):
    seen = {"clip": [], "sam": []}
    hooks = [
        model.model.vision_tower.register_forward_pre_hook(
            lambda m, a, k: seen["clip"].append(len(a[0])), with_kwargs=True
        ),
        model.sam.vision_encoder.register_forward_pre_hook(
            lambda m, a, k: seen["sam"].append(len(a[0])), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    assert seen == {"clip": [2], "sam": [2]}  # three conversations have an image


@pytest.mark.parametrize("rows", [[0], [1], [2], [3], [2, 0], [3, 1], [3, 2, 1, 0]])
def test_neighbours_padding_and_order_change_nothing(double_model, processor, examples, batch, rows):
    with torch.no_grad():
        whole, part = double_model(**batch), double_model(**pick(processor, examples, rows))
    for n, row in enumerate(rows):
        length = int(batch["attention_mask"][row].sum())
        torch.testing.assert_close(part.logits[n, :length], whole.logits[row, :length], **TOLERANCE)
        if part.mask_logits is not None:
            torch.testing.assert_close(part.mask_logits[n], whole.mask_logits[row], **TOLERANCE)


def test_the_image_matters(model, batch):
    other = dict(batch)
    other["image_index"] = torch.tensor([1, 0, 1, -1])
    with torch.no_grad():
        right = model(**{k: v for k, v in batch.items() if k != "mask_labels"})
        wrong = model(**{k: v for k, v in other.items() if k != "mask_labels"})
    for row in range(3):
        assert (right.mask_logits[row] - wrong.mask_logits[row]).abs().max() > 0.01
    assert torch.equal(right.logits[3], wrong.logits[3])


# --- losses ------------------------------------------------------------------------------------------------------------


def bilinear(size: int, wanted: int) -> np.ndarray:
    """(wanted, size): the matrix of one-dimensional bilinear resizing between pixel centres."""
    places = np.clip((np.arange(wanted) + 0.5) * size / wanted - 0.5, 0, size - 1)
    matrix = np.zeros((wanted, size))
    for n, place in enumerate(places):
        low = int(place)
        high = min(low + 1, size - 1)
        matrix[n, low] += 1 - (place - low)
        matrix[n, high] += place - low
    return matrix


def resized(logits: np.ndarray, height: int, width: int) -> np.ndarray:
    return bilinear(logits.shape[0], height) @ logits @ bilinear(logits.shape[1], width).T


def numpy_losses(outputs, batch, skip_empty=False):
    """The three losses in float64, written out from their definitions."""
    ce, tokens = 0.0, 0
    logits, labels = outputs.logits.double().numpy(), batch["labels"].numpy()
    for row in range(len(labels)):
        for position in range(1, labels.shape[1]):
            if labels[row, position] != -100:
                scores = logits[row, position - 1]
                ce += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[labels[row, position]]
                tokens += 1
    bce = dice = masks = 0
    for row, truths in enumerate(batch["mask_labels"]):
        if not len(truths):
            continue
        image = int(batch["image_index"][row])
        height, width = batch["original_sizes"][image].tolist()
        inner_height, inner_width = batch["reshaped_input_sizes"][image].tolist()
        for slot, truth in enumerate(truths.double().numpy()):
            if truth.any() and slot >= len(outputs.mask_logits[row]):
                x = np.zeros((height, width))  # cut off
            elif truth.any():
                square = resized(outputs.mask_logits[row][slot].double().numpy(), 64, 64)
                x = resized(square[:inner_height, :inner_width], height, width)
            elif skip_empty:
                continue
            else:
                x = np.zeros((height, width))
            bce += np.mean(np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * truth)
            p = 1 / (1 + np.exp(-x))
            overlap, area = 2 * (p * truth).sum() / 1000, p.sum() / 1000 + truth.sum() / 1000
            dice += 1 - (overlap + 1e-6) / (area + 1e-6)
            masks += 1
    return ce / tokens, 2.0 * bce / (masks + 1e-8), 0.5 * dice / (masks + 1e-8)


def parts(outputs):
    return [float(part) for part in (outputs.ce_loss, outputs.mask_bce_loss, outputs.mask_dice_loss)]


@pytest.mark.parametrize("choice", ["zero_logits", "ignore"])
def test_loss_parts_against_numpy(make_model, batch, choice):
    model = make_model(rejected_slot_loss=choice)
    with torch.no_grad():
        outputs = model(**batch)
        expected = numpy_losses(outputs, batch, skip_empty=choice == "ignore")
        np.testing.assert_allclose(parts(outputs), expected, rtol=1e-5)
        np.testing.assert_allclose(float(outputs.loss), sum(expected), rtol=1e-5)
        in_training = model.train()(**batch)  # no dropout in these models: the same numbers, but no logits
    assert in_training.logits is None
    np.testing.assert_allclose(parts(in_training), expected, rtol=1e-5)


def test_rejected_slots_by_hand(make_model, processor, examples):
    """One conversation whose only slot is rejected: BCE of zero logits is log 2, dice of an empty mask nearly 1."""
    messages = [talk("<image>\nred?", "Sure,red:[REJ].")]
    inputs = processor(
        examples["images"][:1], conversations=messages, masks=[np.zeros((1, 30, 40))], return_tensors="pt"
    )
    with torch.no_grad():
        counted = make_model()(**inputs)
        ignored = make_model(rejected_slot_loss="ignore")(**inputs)
    area = 0.5 * 30 * 40 / 1000
    np.testing.assert_allclose(parts(counted)[1:], [2 * np.log(2), 0.5 * (1 - 1e-6 / (area + 1e-6))], rtol=1e-6)
    assert parts(ignored)[1:] == [0, 0]


def test_loss_weights(make_model, batch):
    with torch.no_grad():
        plain = make_model()(**batch)
        weighted = make_model(ce_loss_weight=0.5, bce_loss_weight=1.0, dice_loss_weight=0.25)(**batch)
    np.testing.assert_allclose(parts(weighted), np.array(parts(plain)) / 2, rtol=1e-6)


@pytest.mark.parametrize("choice", ["zero_logits", "ignore"])
@pytest.mark.parametrize("empty", [True, False])
def test_slots_that_truncation_cut_off(make_model, batch, empty, choice):
    """Conversation 0 loses its second slot, which counts with zero logits; only an empty mask can be ignored."""
    model = make_model(rejected_slot_loss=choice)
    cut = {k: v for k, v in batch.items()}
    second = (batch["input_ids"][0] == model.config.rej_token_id).nonzero()[0, 0]
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        cut[name] = batch[name].clone()
        cut[name][0, second:] = fill
    if not empty:
        cut["mask_labels"] = [torch.ones_like(mask) if n == 0 else mask for n, mask in enumerate(batch["mask_labels"])]
    with torch.no_grad():
        outputs = model(**cut)
    assert [len(masks) for masks in outputs.mask_logits] == [1, 1, 2, 0]
    np.testing.assert_allclose(parts(outputs), numpy_losses(outputs, cut, skip_empty=choice == "ignore"), rtol=1e-5)
    without = dict(cut, mask_labels=[cut["mask_labels"][0][:1], *cut["mask_labels"][1:]])
    with torch.no_grad():
        shorter = model(**without)
    if choice == "ignore" and empty:
        assert parts(shorter) == parts(outputs)
    else:  # one mask more, with these losses
        masks, area = sum(map(len, without["mask_labels"])), 0 if empty else 30 * 40
        if choice == "ignore":
            masks = sum(int(mask.flatten(1).any(1).sum()) for mask in without["mask_labels"] if len(mask))
        dice = 1 - (area / 1000 + 1e-6) / ((0.5 * 30 * 40 + area) / 1000 + 1e-6)
        expected = [(float(shorter.mask_bce_loss) * masks + 2 * np.log(2)) / (masks + 1)]
        expected.append((float(shorter.mask_dice_loss) * masks + 0.5 * dice) / (masks + 1))
        np.testing.assert_allclose(parts(outputs)[1:], expected, rtol=5e-6)
    assert torch.equal(shorter.mask_ious, outputs.mask_ious)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_the_processors_max_length_cuts_slots_but_no_masks(make_model, processor, examples, keep):
    """Of three slots, two of them [SEG], the first `keep` stay; the losses by hand from the masks that are left."""
    messages = [talk("<image>\nred, blue, green?", "Sure,red:[SEG], blue:[SEG], green:[REJ].")]
    masks = np.zeros((3, 30, 40), np.uint8)
    masks[0, 3:20, 5:30], masks[1, 10:, :7] = 1, 1
    options = {"conversations": messages, "masks": [masks], "return_tensors": "pt"}
    whole = processor(examples["images"][:1], **options)
    slots = [
        n for n, token in enumerate(whole["input_ids"][0]) if token in (processor.seg_token_id, processor.rej_token_id)
    ]
    cut = processor(examples["images"][:1], max_length=slots[keep], **options)
    assert cut["mask_labels"][0].shape == (3, 30, 40) and cut["input_ids"].shape[1] == slots[keep]
    model = make_model()
    with torch.no_grad():
        outputs = model(**cut)
        given = model(**whole)
    assert [len(logits) for logits in outputs.mask_logits] == [keep]
    # What comes later changes nothing before.
    torch.testing.assert_close(outputs.mask_logits[0], given.mask_logits[0][:keep], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(parts(outputs), numpy_losses(outputs, cut), rtol=5e-6)
    constant = [0.5 * (1 - (a / 1000 + 1e-6) / ((600 + a) / 1000 + 1e-6)) for a in masks.sum((1, 2)).tolist()]
    if keep == 0:
        expected = [2 * np.log(2) / (1 + 1e-8 / 3), sum(constant) / (3 + 1e-8)]
        np.testing.assert_allclose(parts(outputs)[1:], expected, rtol=5e-6)
    assert len(outputs.mask_ious) == keep
    training = model.train()(**cut, num_masks_in_batch=3)
    training.loss.backward()  # also where no mask is left
    with torch.no_grad():
        np.testing.assert_allclose(parts(model(**cut, num_masks_in_batch=3)), parts(outputs), rtol=5e-6)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def test_micro_batches_add_up_to_one_batch(make_model, processor, examples, batch):
    model = make_model().double().train()
    tokens, masks = int((batch["labels"][:, 1:] != -100).sum()), sum(map(len, batch["mask_labels"]))
    loss = model(**batch).loss
    loss.backward()
    whole = gradients(model)
    model.zero_grad()
    total = 0.0
    for row in range(4):
        inputs = pick(processor, examples, [row])
        part = model(**inputs, num_items_in_batch=torch.tensor(tokens), num_masks_in_batch=masks).loss
        part.backward()
        total += part.item()
    np.testing.assert_allclose(total, loss.item(), rtol=1e-6)
    added = gradients(model)
    assert whole.keys() == added.keys()
    for name in whole:
        difference, size = (added[name] - whole[name]).norm(), whole[name].norm()
        assert difference <= 1e-5 * size + 1e-9, (name, difference, size)


# --- gradients ---------------------------------------------------------------------------------------------------------

# What the original trains, LoRA aside (main.py: lm_head, embed_tokens, mask_decoder, text_hidden_fcs), by our names.
TRAINED = ("lm_head", "embed_tokens", "language_model.layers", "mask_decoder", "mask_projector")


def freeze_like_the_original(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
    return model.train()


def test_every_trained_parameter_gets_a_gradient(make_model, batch):
    model = freeze_like_the_original(make_model())
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        # Without a share in the loss: the IoU head, the three masks that are not asked for, and biases of keys.
        silent = "iou_prediction_head" in name or "k_proj.bias" in name or any(f"mlps.{n}." in name for n in (1, 2, 3))
        if parameter.requires_grad:
            assert silent or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "case, messages, image_index, slots",
    [
        ("only rejections", [talk("<image>\nred?", "Sure,red:[REJ].")], [0], 1),
        ("no slots", [talk("<image>\nred?", "Yes.")], [0], 0),
        ("no image", [talk("red?", "Yes.")], None, 0),
        ("images that nobody asks about", [talk("red?", "Yes.")], [-1], 0),
        ("nothing supervised", [talk("<image>\nred?", "Sure,red:[SEG].")], [0], 1),
        ("a [SEG] without anything in its mask", [talk("<image>\nred?", "Sure,red:[SEG].")], [0], 1),
    ],
)
def test_trained_parameters_always_get_a_gradient(make_model, processor, examples, case, messages, image_index, slots):
    """Distributed training waits for all of them, whatever the batch holds; the projector too where it is trained."""
    model = freeze_like_the_original(make_model())
    model.model.multi_modal_projector.requires_grad_(True)
    images = None if image_index is None else examples["images"][:1]
    inputs = processor(images, conversations=messages, image_index=image_index, masks=[np.zeros((slots, 30, 40))],
                       return_tensors="pt")  # fmt: skip
    if case == "nothing supervised":
        inputs["labels"][:] = -100
        inputs["mask_labels"] = [torch.ones(1, 30, 40)]
    loss = model(**inputs).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if case != "nothing supervised" and ("mask_decoder" in name or "mask_projector" in name):
            assert not parameter.grad.any(), name


def test_frozen_towers_build_no_graph(make_model, batch):
    model = freeze_like_the_original(make_model())
    model.enable_input_require_grads()  # peft does so before gradient checkpointing
    graphs = {}
    for name, tower in {"clip": model.model.vision_tower, "sam": model.sam.vision_encoder}.items():
        tower.register_forward_hook(
            lambda m, a, out, name=name: graphs.update({name: out.last_hidden_state.requires_grad})
        )
    model(**batch).loss.backward()
    assert graphs == {"clip": False, "sam": False}
    model.model.vision_tower.requires_grad_(True)
    model.sam.vision_encoder.requires_grad_(True)
    model(**batch).loss.backward()
    assert graphs == {"clip": True, "sam": True}
    assert any(p.grad is not None and p.grad.any() for p in model.model.vision_tower.parameters())
    assert model.sam.vision_encoder.patch_embed.projection.weight.grad.abs().max() > 0


def test_gradient_checkpointing_changes_nothing(make_model, batch):
    model = freeze_like_the_original(make_model())
    model(**batch).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-7, msg=name)


# --- bad input -----------------------------------------------------------------------------------------------------------


def without(batch, *names, **changes):
    return {**{k: v for k, v in batch.items() if k not in names}, **changes}


def test_bad_input_is_named(model, batch):
    wrong_size = [torch.zeros(2, 40, 30), *batch["mask_labels"][1:]]
    cases = [
        (
            without(batch, image_index=torch.tensor([0, 2, 0, -1])),
            "image_index points to image 2, but only 2 images were given",
        ),
        (
            without(batch, image_index=torch.tensor([0, 1, -1, -1])),
            "text holds 48 image placeholder tokens, but the images give 32",
        ),
        (without(batch, "image_index"), "text holds 48 image placeholder tokens.*Build the inputs with the processor"),
        (without(batch, "pixel_values"), "image placeholder tokens, but no image was given: pass pixel_values"),
        (
            without(batch, mask_labels=wrong_size),
            r"mask_labels\[0\] has masks of size \(40, 30\), but its image is \(30, 40\)",
        ),
        (
            without(batch, mask_labels=batch["mask_labels"][:3]),
            "4 conversations but 3 entries in mask_labels; give one each",
        ),
        (
            without(batch, mask_labels=[batch["mask_labels"][0][:1], *batch["mask_labels"][1:]]),
            r"Conversation 0 has 2 \[SEG\]/\[REJ\] slots but 1 masks; give one mask per slot",
        ),
        (without(batch, inputs_embeds=torch.zeros(4, 3, 32)), "exactly one of input_ids and inputs_embeds"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message), torch.no_grad():
            model(**inputs)


def test_several_images_in_a_text_are_read_but_not_segmented(model, processor, make_picture):
    pictures = [make_picture(0), make_picture(1)]
    inputs = processor(images=pictures, text="<image> or <image>: [SEG]", return_tensors="pt")
    swapped = processor(images=pictures[::-1], text="<image> or <image>: [SEG]", return_tensors="pt")
    text_only = ("sam_pixel_values", "original_sizes", "reshaped_input_sizes")
    with torch.no_grad():
        logits, other = (model(**without(each, *text_only)).logits for each in (inputs, swapped))
        assert not torch.allclose(logits, other)
        for run in (model, model.segment):
            with pytest.raises(ValueError, match="1 conversations but 2 images, not one in each: pass image_index"):
                run(**inputs, **({"method": "generate", "max_new_tokens": 1} if run == model.segment else {}))


def test_a_slot_without_an_image_is_named(model, processor, examples):
    messages = [talk("red?", "[SEG]"), talk("<image>\nred?", "[SEG]")]
    inputs = processor(examples["images"][:1], conversations=messages, image_index=[-1, 0], return_tensors="pt")
    with pytest.raises(ValueError, match=r"without an image \(image_index -1\) holds \[SEG\]"):
        model(**inputs)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"seg_token_id": 5, "rej_token_id": 5},
            "seg_token_id and rej_token_id are both 5: a slot could not be rejected",
        ),
        ({"seg_token_id": 99}, "seg_token_id=99 lies outside the vocabulary of 50 tokens.*resize the embedding"),
        ({"rej_token_id": -1}, "rej_token_id=-1 lies outside the vocabulary of 50 tokens"),
        ({"rej_token_id": None}, r"The model has no \[REJ\] in its vocabulary.*cannot reject; add the token"),
    ],
)
def test_config_names_bad_token_ids(options, message):
    with pytest.raises(ValueError, match=message):
        GsvaConfig(
            **{
                "text_config": {"model_type": "llama", "vocab_size": 50},
                "seg_token_id": 3,
                "rej_token_id": 4,
                **options,
            }
        )


def test_a_rejection_that_is_no_number_is_refused(make_model):
    config = make_model(rejection={"threshold": 1.5, "temperature": 2.0, "offset": -1.0}).config
    assert config.rejection_values == {"threshold": 1.5, "temperature": 2.0, "offset": -1.0}
    assert make_model().config.rejection_values == {"threshold": 0.0, "temperature": 1.0, "offset": 0.0}
    for name, value in (("threshold", math.inf), ("temperature", 0.0), ("temperature", -1.0), ("offset", "much")):
        with pytest.raises(ValueError, match=rf"rejection\['{name}'\]={value!r} is not a finite"):
            make_model(rejection={name: value})
