"""Results as the instances that transformers' detectors give, which tools for masks and boxes take."""

from math import isnan
from reprlib import repr as shown  # short, and safe for values that are nested deeply or contain themselves
from typing import Any

import numpy as np
import torch


def check_probability(threshold: Any) -> None:
    """Raise ValueError for a threshold that is not a probability."""
    if not isinstance(threshold, (int, float)) or isinstance(threshold, bool) or not 0 <= threshold <= 1:
        raise ValueError(
            f"threshold={shown(threshold)} is not a probability; give a number from 0 to 1 above which an expression is kept, "
            "or None for the model's own decision. (post_process_segmentation compares log-odds.)"
        )


def mask_corners(mask: np.ndarray) -> list[float]:
    """
    Return the left, top, right and bottom edge of a mask (height, width) in pixels. The box ends behind the last pixel, so
    that one pixel has a box of 1 x 1.
    """
    columns, lines = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return [float(columns[0]), float(lines[0]), float(columns[-1] + 1), float(lines[-1] + 1)]


def instances_of(results: list[dict[str, Any]], size: tuple[int, int], threshold: float | None) -> dict[str, Any]:
    """
    Return the instances of an image.

    Args:
        results: of the image, from `post_process_segmentation`.
        size: (height, width) of the image, for an image without instances.
        threshold: keep probabilities above it; None keeps what the model keeps.

    Returns:
        See [`GsvaProcessor.post_process_instance_segmentation`].
    """
    kept = []
    for label, result in enumerate(results):
        probability = result["probability"]
        if isnan(probability):  # of a model that gives none
            probability = float(torch.tensor(result["score"]).sigmoid())
        if not result["is_rejected"] and result["mask"].any() and (threshold is None or probability > threshold):
            kept.append((label, probability, result))
    masks = [result["mask"] for *_, result in kept]
    return {
        "scores": torch.tensor([probability for _, probability, _ in kept], dtype=torch.float32),
        "labels": torch.tensor([label for label, *_ in kept], dtype=torch.long),
        "text_labels": [result["text"] for *_, result in kept],
        "boxes": torch.tensor([mask_corners(mask) for mask in masks], dtype=torch.float32).reshape(-1, 4),
        "masks": torch.from_numpy(np.stack(masks)[:, None] if masks else np.zeros((0, 1, *size), dtype=bool)),
    }


__all__ = ["instances_of"]
