"""GSVA's losses of masks, with the original's constants, and of the object scores that SAM 2 gives beside them."""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .configuration_gsva import GsvaConfig
from .image_processing_gsva import upscale_mask_logits
from .transfer_gsva import to_device

# Constants of the original's losses (model/llava/model/modeling_lisa_gsva.py): the areas of the dice loss are divided by
# 1000 and smoothed by 1e-6, the mean over masks by 1e-8.
DICE_SCALE = 1000.0
DICE_EPS = 1e-6
MASK_COUNT_EPS = 1e-8


def mask_losses(logits: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the sums over masks of the binary cross-entropy (mean over a mask's pixels) and of the dice loss.

    Args:
        logits: (masks, height, width) before the sigmoid.
        truth: (masks, height, width) of 0 and 1.
    """
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").flatten(1).mean(1).sum()
    probability, truth = logits.sigmoid().flatten(1), truth.flatten(1)
    overlap = 2 * (probability * truth).sum(1) / DICE_SCALE
    area = (probability.sum(1) + truth.sum(1)) / DICE_SCALE
    return bce, (1 - (overlap + DICE_EPS) / (area + DICE_EPS)).sum()


def zero_logits_losses(area: int, pixels: int) -> tuple[float, float]:
    """
    Return the BCE and dice of `mask_losses` for one mask of constant zero logits, whose probabilities are all 0.5.

    Args:
        area: number of pixels in the true mask.
        pixels: number of pixels of the image.
    """
    dice = 1 - (area / DICE_SCALE + DICE_EPS) / ((0.5 * pixels + area) / DICE_SCALE + DICE_EPS)
    return math.log(2), dice


def upscaled_mask_losses(
    logits: torch.Tensor, truth: torch.Tensor, reshaped_input_size, original_size, input_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Compute `mask_losses` at the image's own size, and the IoU of each mask there. Autograd keeps the low-resolution
    logits and the truth as given; float32 tensors of the image's size are computed a second time in the backward pass.

    Args:
        logits: (masks, low height, low width) before the sigmoid.
        truth: (masks, height, width) of 0 and 1, of any type.
        reshaped_input_size, original_size, input_size: See `upscale_mask_logits`.

    Returns:
        Sums of BCE and dice, and IoUs (masks,) without a gradient.
    """

    def losses(logits):
        upscaled = upscale_mask_logits(logits, reshaped_input_size, original_size, input_size)
        with torch.no_grad():
            predicted, true = upscaled > 0, truth > 0
            iou = (predicted & true).flatten(1).sum(1) / (predicted | true).flatten(1).sum(1)
        return *mask_losses(upscaled, truth.float()), iou

    return checkpoint(losses, logits, use_reentrant=False, preserve_rng_state=False)


def batch_mask_losses(
    config: GsvaConfig,
    mask_logits: tuple[torch.Tensor, ...],
    mask_labels: list[torch.Tensor],
    image_index: torch.LongTensor,
    original_sizes: torch.LongTensor,
    reshaped_input_sizes: torch.LongTensor,
    num_masks: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Return the weighted BCE and dice losses of a batch, each summed over all masks and divided by their number, and the
    IoUs of the predicted masks. Only one conversation's masks exist at the image's size at a time, in the backward pass
    as well.

    Args:
        mask_logits: per conversation (slots, low height, low width).
        mask_labels: per conversation (slots, height, width), see [`GsvaForConditionalGeneration.forward`].
        image_index: (conversations,) the image of each.
        original_sizes, reshaped_input_sizes: (images, 2) as (height, width).
        num_masks: the number to divide by, by default that of this batch.

    Raises:
        ValueError: other numbers of masks than of conversations or slots, masks that do not have their image's size.
    """
    if len(mask_labels) != len(mask_logits):
        raise ValueError(
            f"{len(mask_logits)} conversations but {len(mask_labels)} entries in mask_labels; give one each."
        )
    input_size = config.mask_input_size
    bce_sum = dice_sum = mask_logits[0].new_zeros((), dtype=torch.float32)
    count, ious = 0, [bce_sum.new_zeros(0)]
    images, has_masks = image_index.tolist(), any(map(len, mask_labels))
    sizes, reshaped = (part.tolist() if has_masks else [] for part in (original_sizes, reshaped_input_sizes))
    for index, (image, logits, truth) in enumerate(zip(images, mask_logits, mask_labels)):
        if len(truth):
            _check_truth(index, logits, truth, tuple(sizes[image]))
    truths = [truth.to(logits.device, non_blocking=True) for logits, truth in zip(mask_logits, mask_labels)]
    # One read of all areas; of bytes the sum would be one of bytes.
    sums = [truth.bool().flatten(1).sum(1) for truth in truths if len(truth)]
    areas = iter(torch.cat(sums).tolist() if sums else [])
    of_each = [[next(areas) for _ in range(len(truth))] for truth in truths]
    # As in the original, the empty mask decides and not the token.
    predicted = [
        [n for n, area in enumerate(each[: len(logits)]) if area] for logits, each in zip(mask_logits, of_each)
    ]
    places = to_device([n for each in predicted for n in each], bce_sum.device).split(list(map(len, predicted)))
    for image, logits, truth, each, chosen in zip(images, mask_logits, truths, of_each, places):
        if len(chosen):
            chosen = chosen.to(logits.device)
            bce, dice, iou = upscaled_mask_losses(
                logits[chosen], truth[chosen], reshaped[image], tuple(sizes[image]), input_size
            )
            bce_sum, dice_sum, count = bce_sum + bce, dice_sum + dice, count + len(chosen)
            ious.append(iou)
        for n, area in enumerate(each):
            is_cut = n >= len(logits)  # by truncation: the original gives it zero logits, whatever its mask
            # CODEPATH: the original's checkpoints were trained with "zero_logits"; "ignore" is for new training alone.
            if is_cut and area or not area and config.rejected_slot_loss == "zero_logits":
                bce, dice = zero_logits_losses(area, math.prod(sizes[image]))
                bce_sum, dice_sum, count = bce_sum + bce, dice_sum + dice, count + 1
    shared = (count if num_masks is None else num_masks) + MASK_COUNT_EPS
    return config.bce_loss_weight * bce_sum / shared, config.dice_loss_weight * dice_sum / shared, torch.cat(ious)


def _check_truth(index: int, logits: torch.Tensor, truth: torch.Tensor, original_size: tuple[int, ...]) -> None:
    """Raise ValueError if the true masks of a conversation do not fit its image or its slots."""
    if tuple(truth.shape[1:]) != original_size:
        raise ValueError(
            f"mask_labels[{index}] has masks of size {tuple(truth.shape[1:])}, but its image is "
            f"{original_size} (height, width). Give masks at the image's own size."
        )
    if len(logits) > len(truth):
        raise ValueError(
            f"Conversation {index} has {len(logits)} [SEG]/[REJ] slots but {len(truth)} masks; give one mask per "
            "slot, an empty one for [REJ]."
        )


def object_score_loss(
    config: GsvaConfig,
    object_scores: tuple[torch.Tensor, ...],
    mask_labels: list[torch.Tensor],
    num_slots: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Return the weighted binary cross-entropy of the slots' object scores against whether their true mask is empty, summed over
    all slots with a true mask and divided by their number. A slot that truncation cut off counts as a score of zero, like its
    mask in `batch_mask_losses`.

    Args:
        object_scores: per conversation (slots,) logits.
        mask_labels: per conversation (slots, height, width), see [`GsvaForConditionalGeneration.forward`].
        num_slots: the number to divide by, by default that of this batch.
    """
    total, count = object_scores[0].new_zeros((), dtype=torch.float32), 0
    for scores, truth in zip(object_scores, mask_labels):
        there = truth[: len(scores)].flatten(1).any(1).to(scores.device).float() if len(truth) else scores[:0].float()
        total = total + F.binary_cross_entropy_with_logits(scores[: len(truth)].float(), there, reduction="sum")
        total = total + (len(truth) - len(there)) * math.log(2)
        count += len(truth)
    return config.object_score_loss_weight * total / (max(count, 1) if num_slots is None else num_slots)


__all__ = ["batch_mask_losses", "mask_losses", "object_score_loss", "upscaled_mask_losses"]
