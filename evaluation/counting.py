"""Compare predicted masks with the truth where they are: arrays on the host, tensors on their device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_scripts.schema import encode_mask, encode_runs
from metrics.gres import box_overlap, mask_box
from modeling_gsva.transfer_gsva import mask_of_runs, mask_runs, upload

from .questions import Question

# A row of the data set, its questions, and the processor's results for them.
Answered = tuple[dict[str, Any], list[Question], list[dict[str, Any]]]


@dataclass(frozen=True)
class MaskCounts:
    """Pixels of a predicted mask and of the truth in common and in one or the other, the same of their boxes, and on demand the
    run-length encoding of the prediction."""

    intersection: int
    union: int
    box_intersection: int
    box_union: int
    prediction: dict[str, Any] | None = None


def stays_on_device(device: torch.device) -> bool:
    """Return whether masks are counted on their device. On a CPU they are arrays, whose counting is faster than tensors'."""
    return device.type != "cpu"


def count_masks(answers: Sequence[Answered], encode: bool, show: bool) -> list[list[MaskCounts]]:
    """
    Return the counts of each answer of a batch.

    Tensors are reduced on their device: numbers are read once for the whole batch, and runs of the masks once where they are
    needed. Otherwise no mask is copied.

    Args:
        answers: The batch; the masks of its results are all arrays, or all tensors.
        encode: Whether the counts hold the predictions' encodings.
        show: Whether results shall hold arrays afterwards.

    Raises:
        ValueError: A mask does not have its image's size.
    """
    for row, questions, results in answers:
        for question, result in zip(questions, results, strict=True):
            _check_size(row, question, result["mask"])
    if not any(torch.is_tensor(result["mask"]) for _, _, results in answers for result in results):
        return [
            [_count(question, result["mask"], encode) for question, result in zip(questions, results)]
            for _, questions, results in answers
        ]
    stacked = [
        torch.stack([result["mask"] for result in results]) if results else torch.zeros(0, 1, 1, dtype=torch.bool)
        for _, _, results in answers
    ]
    numbers = [_reduced(questions, masks) for (_, questions, _), masks in zip(answers, stacked) if questions]
    read = iter(torch.cat(numbers).tolist())
    runs: list[Any] = mask_runs(stacked) if encode or show else [[None] * len(masks) for masks in stacked]
    counts = []
    for (_, questions, results), of_image in zip(answers, runs):
        counts.append(
            [
                _from_numbers(question, next(read), run if encode else None)
                for question, run in zip(questions, of_image)
            ]
        )
        if show:
            for question, result, run in zip(questions, results, of_image):
                result["mask"] = mask_of_runs(run, *question.truth.shape)
    return counts


def _check_size(row: dict[str, Any], question: Question, mask: np.ndarray | torch.Tensor) -> None:
    if question.truth.shape != tuple(mask.shape):
        raise ValueError(
            f"The mask of {question.text!r} in image {row['image_id']} is {question.truth.shape}, the image "
            f"{tuple(mask.shape)} (height, width); take images and annotations from one release."
        )


def _count(question: Question, mask: np.ndarray, encode: bool) -> MaskCounts:
    overlaps = *question.overlap(mask), *question.box_overlap(mask)
    return MaskCounts(*overlaps, encode_mask(mask) if encode else None)


def _reduced(questions: list[Question], masks: torch.Tensor) -> torch.Tensor:
    """Return (questions, 7) numbers of an image's masks: intersection, union, whether there is a pixel, and the box's bounds."""
    truth = upload(torch.from_numpy(np.stack([question.truth for question in questions])), masks.device)
    if any(question.counted is not None for question in questions):
        counted = [np.ones_like(q.truth) if q.counted is None else q.counted for q in questions]
        masks = masks & upload(torch.from_numpy(np.stack(counted)), masks.device)
    bounds = []
    for there in (masks.any(1), masks.any(2)):  # columns, lines
        size = there.shape[1]
        bounds += [there.byte().argmax(1), size - there.flip(1).byte().argmax(1)]  # the first of the greatest
    pixels = [(masks & truth).flatten(1).sum(1), (masks | truth).flatten(1).sum(1), masks.flatten(1).any(1).long()]
    return torch.stack([*pixels, *bounds], 1)


def _from_numbers(question: Question, numbers: list[int], runs: np.ndarray | None) -> MaskCounts:
    intersection, union, there, left, right, top, bottom = numbers
    box = (left, top, right - left, bottom - top) if there else (0, 0, 0, 0)
    encoded = None if runs is None else encode_runs(runs.tolist(), *question.truth.shape)
    return MaskCounts(intersection, union, *box_overlap(box, mask_box(question.truth)), encoded)
