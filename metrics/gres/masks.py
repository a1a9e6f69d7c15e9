"""Rows and boxes from masks, in any form that people have."""

from collections.abc import Mapping, Sequence
from reprlib import repr as short_repr  # short, and safe for a value that is nested deeply or contains itself
from typing import Any

import numpy as np

from .functions import is_whole


def _run_lengths(counts: str) -> np.ndarray:
    """Return the run lengths of a compressed encoding, or [-1] if it is not one.

    Run lengths are little-endian numbers of 5 bits per character, from the fourth on the difference to the run length
    two places before (maskApi.c: rleToString). `data_scripts.masks.check_rle` has the same check for files;
    `evaluate.load` copies this module without that package.
    """
    codes = np.frombuffer(counts.encode("ascii", "replace"), np.uint8) - np.uint8(48)
    ends = np.flatnonzero(codes < 32)
    starts = np.append(0, ends + 1)
    digits = np.diff(starts)
    if not len(ends) or starts[-1] != len(codes) or codes.max() > 63 or digits.max() > 7:
        return np.array([-1])
    runs = np.where(codes & 48 == 16, codes.astype(np.int64) - 32, codes & 31)
    runs = np.add.reduceat(runs << 5 * (np.arange(len(codes)) - np.repeat(starts[:-1], digits)), starts[:-1])
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def encode_mask(mask: Any, where: str = "mask") -> dict[str, Any]:
    """Return a mask in any form that people have as `{"size": [height, width], "counts": str}`.

    Args:
        mask: A COCO run-length encoding, compressed (counts are a string or pycocotools' bytes) or not (a list), or an
            array or tensor (height, width) of booleans or of 0 and 1.
        where: The mask's name in errors.

    Raises:
        ValueError: It is none of these, or its run lengths do not fill its size. pycocotools would crash or hang.

    Example:
        >>> encode_mask({"size": [3, 3], "counts": [0, 1, 3, 1, 3, 1]}) == encode_mask(np.eye(3)) == encode_mask(np.eye(3) > 0)
        True
    """
    from pycocotools import mask as coco  # imported here, since rows without masks do not need it

    if hasattr(mask, "__array__"):
        array = np.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask)
        if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "buif" or not np.isin(array, (0, 1)).all():
            raise ValueError(
                f"{where} is an array of shape {array.shape} and type {array.dtype}, expected (height, width) of "
                f"booleans or of 0 and 1"
            )
        rle = coco.encode(np.asfortranarray(array.astype(np.uint8)))
        return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
    size, counts = (mask.get("size"), mask.get("counts")) if isinstance(mask, Mapping) else (None, None)
    size, counts = (value.tolist() if isinstance(value, np.ndarray) else value for value in (size, counts))
    counts = counts.decode("ascii", "replace") if isinstance(counts, bytes) else counts
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(is_whole(side, 1) for side in size):
        height, width = int(size[0]), int(size[1])
        runs: Any = [-1]
        if isinstance(counts, str):
            runs = _run_lengths(counts).tolist()
        elif isinstance(counts, (list, tuple)) and all(is_whole(run, 0) for run in counts):
            runs = [int(run) for run in counts]
        if runs and min(runs) >= 0 and sum(runs) == height * width < 2**32:
            if not isinstance(counts, str):
                rle = coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)
                counts = rle["counts"].decode("ascii")
            return {"size": [height, width], "counts": counts}
    raise ValueError(
        f"{where} is {short_repr(mask)}, expected {{'size': [height, width], 'counts': str}}, a COCO run-length encoding "
        f"of that size (counts may also be bytes or a list), or an array of booleans"
    )


def encode_pair(prediction: Any, reference: Any, where: str = "row") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a predicted and a true mask in the form of `encode_mask`; None stands for a mask without any pixel.

    Raises:
        ValueError: One of the two is not a mask, or their sizes differ.
    """
    masks = {"prediction": prediction, "reference": reference}
    encoded = {name: encode_mask(mask, f"{where}: {name}") for name, mask in masks.items() if mask is not None}
    sizes = [mask["size"] for mask in encoded.values()] or [[1, 1]]
    if sizes[0] != sizes[-1]:
        raise ValueError(
            f"{where}: the prediction's size is {sizes[0]}, the reference's {sizes[-1]}; "
            "bring the prediction to the image's own (height, width) first"
        )
    empty = encode_mask(np.zeros(sizes[0], np.uint8))
    return encoded.get("prediction", empty), encoded.get("reference", empty)


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box (x, y, width, height) of a mask (height, width), in pixels; zeros for a mask without any pixel.

    The box ends behind the last pixel, so that one pixel has a box of 1 x 1, as in COCO's `toBbox`.

    >>> mask_box(np.eye(3)[:2])
    (0, 0, 2, 2)
    """
    columns, lines = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return (0, 0, 0, 0)
    left, top = int(columns[0]), int(lines[0])
    return left, top, int(columns[-1]) + 1 - left, int(lines[-1]) + 1 - top


def box_overlap(one: Sequence[float], other: Sequence[float]) -> tuple[int, int]:
    """Return the pixels in both of two boxes (x, y, width, height), and in one or the other.

    >>> box_overlap((0, 0, 2, 2), (1, 1, 2, 2))
    (1, 7)
    """
    sides = (min(one[n] + one[n + 2], other[n] + other[n + 2]) - max(one[n], other[n]) for n in (0, 1))
    width, height = (max(side, 0) for side in sides)
    intersection = int(width * height)
    return intersection, int(one[2] * one[3] + other[2] * other[3]) - intersection


def row_from_masks(prediction: Any, reference: Any, is_rejected: bool, where: str = "row") -> dict[str, Any]:
    """Return one row from two masks.

    Args:
        prediction: The predicted mask in a form of `encode_mask`, without any pixel if there is none.
        reference: The true mask in such a form. Without any pixel, the expression is a no-target.
        is_rejected: The model's decision.
        where: The row's name in errors.

    Raises:
        ValueError: One of the two is not a mask, or their sizes differ.
    """
    from pycocotools import mask as coco  # imported here, since rows without masks do not need it

    for name, mask in {"prediction": prediction, "reference": reference}.items():
        if mask is None:  # a column that was forgotten; the evaluate module takes None, by `encode_pair`
            encode_mask(mask, f"{where}: {name}")
    pair = [{**mask, "counts": mask["counts"].encode()} for mask in encode_pair(prediction, reference, where)]
    box_intersection, box_union = box_overlap(*(coco.toBbox(mask).tolist() for mask in pair))
    return {
        "is_no_target": int(coco.area(pair[1])) == 0,
        "is_rejected": is_rejected,
        "intersection": int(coco.area(coco.merge(pair, intersect=True))),
        "union": int(coco.area(coco.merge(pair))),
        "box_intersection": box_intersection,
        "box_union": box_union,
    }
