"""Memory of a training step: masks at the images' size for one conversation at a time, logits only where labels are."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling_gsva.image_processing_gsva import upscale_mask_logits
from modeling_gsva.modeling_gsva import upscaled_mask_losses
from trainers.arguments import ModelArguments
from trainers.freezing import prepare_for_training
from trainers.memory_plan import LiveBytes

HEIGHT, WIDTH, SLOTS, LOW, SIDE = 150, 200, 3, 16, 64
RESHAPED = (48, 64)
ONE_MASK = HEIGHT * WIDTH * 4  # bytes in float32


def plain_losses(logits, truth):
    """The same in the open, with everything kept."""
    masks, truth = upscale_mask_logits(logits, RESHAPED, (HEIGHT, WIDTH), SIDE), truth.float()
    bce = dice = 0.0
    for mask, true in zip(masks, truth, strict=True):
        bce = bce + F.binary_cross_entropy_with_logits(mask, true)
        chance = mask.sigmoid()
        dice = dice + 1 - (2 * (chance * true).sum() / 1000 + 1e-6) / (chance.sum() / 1000 + true.sum() / 1000 + 1e-6)
    return bce, dice


def our_losses(logits, truth):
    return upscaled_mask_losses(logits, truth, RESHAPED, (HEIGHT, WIDTH), SIDE)[:2]


@pytest.fixture
def picture():
    def make(seed=0):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(SLOTS, LOW, LOW, generator=generator).requires_grad_()
        return logits, (torch.rand(SLOTS, HEIGHT, WIDTH, generator=generator) > 0.6).to(torch.uint8)

    return make


def saved_by(losses, pictures) -> tuple[int, torch.Tensor]:
    """Bytes in float32 that autograd keeps of tensors as large as a mask, and the loss."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.nbytes * (tensor.is_floating_point() and tensor.numel() >= HEIGHT * WIDTH)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum(2.0 * bce + 0.5 * dice for bce, dice in (losses(*one) for one in pictures))
    return kept, loss


def test_losses_and_gradients_are_those_of_the_plain_computation(picture):
    ours, plain = [picture(n) for n in range(3)], [picture(n) for n in range(3)]
    kept, loss = saved_by(our_losses, ours)
    kept_plainly, expected = saved_by(plain_losses, plain)
    assert kept == 0 and kept_plainly >= 3 * SLOTS * 2 * ONE_MASK
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for (logits, _), (logits_plain, _) in zip(ours, plain, strict=True):
        assert logits_plain.grad.abs().max() > 1e-4
        torch.testing.assert_close(logits.grad, logits_plain.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("losses", "grows"), [(our_losses, False), (plain_losses, True)])
def test_the_peak_is_that_of_one_picture(picture, losses, grows):
    """Forwards and backwards: what is alive at once, from one picture to four."""
    peaks = []
    for number in (1, 4):
        pictures = [picture(n) for n in range(number)]
        with LiveBytes([tensor for one in pictures for tensor in one]) as counter:
            sum(sum(losses(*one)) for one in pictures).backward()
        peaks.append(counter.peak)
    assert peaks[0] > SLOTS * ONE_MASK
    assert (peaks[1] - peaks[0] > 3 * SLOTS * ONE_MASK) == grows
    assert grows or peaks[1] < 1.1 * peaks[0]


def test_ious_by_hand():
    """A mask of the lower half of 4 x 4: against the left half, against itself, and one that says nothing."""
    lower, left = torch.zeros(4, 4), torch.zeros(4, 4)
    lower[2:], left[:, :2] = 1, 1
    logits = torch.stack([lower, lower, torch.zeros(4, 4)]) * 2 - 1
    truth = torch.stack([left, lower, left]).to(torch.uint8)
    *_, ious = upscaled_mask_losses(logits.requires_grad_(), truth, (4, 4), (4, 4), 4)
    assert ious.tolist() == pytest.approx([4 / 12, 1.0, 0.0]) and not ious.requires_grad


@pytest.fixture
def step(make_model, processor, make_picture):
    """A model as it is trained, and a batch of pictures much larger than the model's own masks."""

    def make(pictures=2):
        model = prepare_for_training(make_model(), ModelArguments(lora_dropout=0.0)).train()
        talk, rng = (
            processor.build_conversation(["a thing", "nothing", "two"], [False, True, False]),
            np.random.default_rng(0),
        )
        masks = (rng.random((pictures, SLOTS, HEIGHT, WIDTH)) > 0.5).astype(np.uint8)
        masks[:, 1] = 0
        images = [make_picture(n, WIDTH, HEIGHT) for n in range(pictures)]
        return model, processor(images=images, conversations=[talk] * pictures, masks=list(masks), return_tensors="pt")

    return make


def test_a_step_keeps_no_mask_of_a_pictures_size_and_logits_only_where_labels_are(step):
    model, batch = step()
    vocabulary, shapes = model.config.text_config.vocab_size, []
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        outputs = model(**batch)
    assert outputs.logits is None and supervised < batch["labels"].numel() / 2
    logits = [
        shape
        for shape in shapes
        if shape and shape[-1] == vocabulary and shape[0] != model.config.text_config.hidden_size
    ]
    assert logits and {shape[0] for shape in logits} == {supervised}  # of the loss, and nothing but the loss
    assert not [shape for shape in shapes if shape[-2:] == (HEIGHT, WIDTH) or shape[-1:] == (HEIGHT * WIDTH,)]
    assert outputs.mask_ious.shape == (4,)
    outputs.loss.backward()


def test_ious_of_a_step_are_those_of_its_masks(step):
    model, batch = step()
    with torch.no_grad():
        outputs = model(**batch)
    expected = []
    for n, (logits, truth) in enumerate(zip(outputs.mask_logits, batch["mask_labels"], strict=True)):
        reshaped, side = batch["reshaped_input_sizes"][n].tolist(), model.config.sam_config.vision_config.image_size
        masks = upscale_mask_logits(logits, reshaped, (HEIGHT, WIDTH), side) > 0
        expected += [float((m & t).sum() / (m | t).sum()) for m, t in zip(masks, truth.bool()) if t.any()]
    torch.testing.assert_close(outputs.mask_ious, torch.tensor(expected))
