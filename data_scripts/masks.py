"""Masks as COCO run-length encodings: encode, decode, unite, check, and polygons to encodings.

An encoding is `{"size": [height, width], "counts": str}`. One without any pixel means that the expression has no target.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from reprlib import repr as short_repr  # short, and safe for a value that is nested deeply or contains itself
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from pycocotools import mask as coco_mask

# How far outside an image a polygon may reach, in longest sides. The published sets stay within a pixel or two.
OUTSIDE = 10

# Fields of a COCO annotation that show that its object is in the image.
EVIDENCE = ("bbox", "box", "boxes", "area", "keypoints", "num_keypoints")


def max_image_pixels() -> int:
    """Return the largest number of pixels an image or mask may have: `GSVA_MAX_IMAGE_PIXELS`, else Pillow's limit.

    A few bytes can state any size, and decoding allocates memory for the stated size. Pillow warns above 89,478,485
    pixels (a quarter of a gigabyte in RGB, `PIL.Image.MAX_IMAGE_PIXELS`) and refuses twice as many. This project refuses
    everything above the limit.

    Raises:
        ValueError: The variable is not a whole number above 0.
    """
    limit = os.environ.get("GSVA_MAX_IMAGE_PIXELS", "").strip()
    if not limit:
        return PillowImage.MAX_IMAGE_PIXELS or 1024**3 // 4 // 3
    if not limit.isdecimal() or int(limit) < 1:
        raise ValueError(f"GSVA_MAX_IMAGE_PIXELS={limit!r} must be a number of pixels, 1 or more.")
    return int(limit)


def check_size(size: Any) -> tuple[int, int]:
    """Return `size` as (height, width). Raises ValueError if it is not a size, or exceeds `max_image_pixels`."""
    sides = list(size) if isinstance(size, (list, tuple)) else []
    if len(sides) != 2 or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in sides):
        raise ValueError(f"a size must be [height, width] in pixels, two whole numbers, got {short_repr(size)}")
    if sides[0] * sides[1] > (limit := max_image_pixels()):
        raise ValueError(
            f"a size of {sides[0]} x {sides[1]} (height x width) is more than {limit} pixels; correct it, or set "
            f"GSVA_MAX_IMAGE_PIXELS if images are that large"
        )
    return sides[0], sides[1]


def _run_lengths(counts: str) -> np.ndarray:
    """Return the run lengths that `counts` encodes, or an array with a negative number if it is not an encoding.

    A run length is a little-endian number of 5 bits per character: "P" to "o" if another character follows, "0" to "O"
    at the end. From the fourth run length on, the number is the difference to the run length two places before
    (pycocotools, maskApi.c: rleToString).
    """
    codes = np.frombuffer(counts.encode("ascii", "replace"), np.uint8) - np.uint8(48)
    ends = np.flatnonzero(codes < 32)
    starts = np.append(0, ends + 1)
    digits = np.diff(starts)
    if not len(ends) or starts[-1] != len(codes) or codes.max() > 63 or digits.max() > 7:  # 7 x 5 bits hold any size
        return np.array([-1])
    runs = np.where(codes & 48 == 16, codes.astype(np.int64) - 32, codes & 31)
    if len(ends) < len(codes):
        runs = np.add.reduceat(runs << 5 * (np.arange(len(codes)) - np.repeat(starts[:-1], digits)), starts[:-1])
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def check_rle(rle: Any) -> dict[str, Any]:
    """Return a compressed run-length encoding from a file after checking that pycocotools can decode it.

    pycocotools reads and writes out of bounds if an encoding is empty, cut off, or does not fill its size.
    `metrics.gres.masks` has the same check for the metric, which must work without this package.

    >>> check_rle({"size": [3, 3], "counts": "0130"})
    Traceback (most recent call last):
    ValueError: a mask's run lengths do not make the 9 pixels of its size [3, 3]: '0130'

    Raises:
        ValueError: `size` or `counts` is missing, the size is not one or too large, or the run lengths do not fill it.
    """
    if not isinstance(rle, dict) or not {"size", "counts"} <= rle.keys():
        raise ValueError(f"a run-length encoding needs 'size' and 'counts', got {short_repr(rle)}")
    height, width = check_size(rle["size"])
    counts = rle["counts"].decode("ascii", "replace") if isinstance(rle["counts"], bytes) else rle["counts"]
    if not isinstance(counts, str):
        raise ValueError(f"a mask's counts must be a string, got {short_repr(counts)}")
    runs = _run_lengths(counts)
    if runs.min() < 0 or runs.sum() != height * width:
        raise ValueError(
            f"a mask's run lengths do not make the {height * width} pixels of its size {[height, width]}: {short_repr(counts)}"
        )
    return {"size": [height, width], "counts": counts}


def _plain(rle: dict) -> dict[str, Any]:
    """Return an encoding from pycocotools with plain integers and text, as JSON and Arrow hold it."""
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Run-length encode a mask (height, width) whose non-zero pixels are the target.

    >>> encode_mask(np.eye(3))
    {'size': [3, 3], 'counts': '013000'}
    """
    return _plain(coco_mask.encode(np.asfortranarray(mask != 0).view(np.uint8)))


def encode_runs(runs: Sequence[int], height: int, width: int) -> dict[str, Any]:
    """Encode a mask (height, width) given by the lengths of its runs, column by column, beginning with pixels outside.

    >>> encode_runs([0, 1, 3, 1, 3, 1], 3, 3) == encode_mask(np.eye(3))
    True
    """
    rle = {"size": [height, width], "counts": [int(length) for length in runs]}
    return _plain(coco_mask.frPyObjects(rle, height, width))


def decode_mask(rle: dict) -> np.ndarray:
    """Return the uint8 mask (height, width) of 0 and 1 that a run-length encoding describes.

    >>> decode_mask({"size": [3, 3], "counts": "013000"}).tolist()
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]]

    Raises:
        ValueError: `rle` is not an encoding that can be decoded (see `check_rle`).
    """
    return coco_mask.decode(check_rle(rle))


def mask_area(rle: dict) -> int:
    """Return the number of pixels of the target; 0 means no-target.

    >>> mask_area(empty_mask(4, 5))
    0
    """
    return int(coco_mask.area(rle))


@lru_cache(maxsize=4096)
def _empty_counts(height: int, width: int) -> str:
    return encode_mask(np.zeros((height, width), np.uint8))["counts"]


def empty_mask(height: int, width: int) -> dict[str, Any]:
    """Return the encoding of a mask (height, width) without any pixel."""
    return {"size": [height, width], "counts": _empty_counts(height, width)}


def encode_labels(labels: np.ndarray) -> dict[int, dict[str, Any]]:
    """Return {value: encoding of its pixels} for every value in a label map (height, width), in ascending order.

    The pixels are passed once, however many values there are.

    >>> {value: mask_area(mask) for value, mask in encode_labels(np.array([[7, 7], [2, 7]])).items()}
    {2: 1, 7: 3}
    """
    height, width = (int(side) for side in labels.shape)
    flat = labels.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ends = np.append(starts[1:], flat.size)
    values = flat[starts]
    masks = {}
    for value in np.unique(values):
        runs = np.stack([starts[values == value], ends[values == value]], axis=1).ravel()
        counts = np.diff(np.concatenate([[0], runs, [flat.size]] if runs[-1] < flat.size else [[0], runs]))
        rle = {"size": [height, width], "counts": counts.tolist()}
        masks[int(value)] = _plain(coco_mask.frPyObjects(rle, height, width))
    return masks


def merge_masks(rles: Sequence[dict]) -> dict[str, Any]:
    """Return the union of encodings of one size. Raises ValueError if the sizes differ or the list is empty."""
    sizes = {tuple(rle["size"]) for rle in rles}
    if len(sizes) != 1:
        raise ValueError(f"Masks to be united must share one (height, width), got {sorted(sizes)}")
    return _plain(rles[0] if len(rles) == 1 else coco_mask.merge(list(rles)))


def check_mask_size(rle: dict, height: int, width: int) -> None:
    """Raise ValueError if an encoding has another size than its image."""
    if list(rle["size"]) != [height, width]:
        swapped = " (height and width are swapped)" if list(rle["size"]) == [width, height] else ""
        raise ValueError(
            f"its mask is {list(rle['size'])} (height, width), its image {[height, width]}{swapped}; take the mask of this "
            f"image, in its size"
        )


def check_pixels(coordinates: Sequence[float], height: int, width: int) -> None:
    """Raise ValueError if the coordinates of an outline can only be parts of the image (0 to 1), not pixels.

    >>> check_pixels([0.1, 0.1, 0.9, 0.1, 0.9, 0.9], 40, 60)
    Traceback (most recent call last):
    ValueError: its mask has no pixel or a single one, because the coordinates of its outline are all between 0 and 1: ...
    """
    # Such an outline encloses one pixel at most. Outlines that leave the image a little reach a little beyond 0 and 1.
    if len(coordinates) and max(height, width) > 2 and all(-0.05 <= number <= 1.05 for number in coordinates):
        raise ValueError(
            f"its mask has no pixel or a single one, because the coordinates of its outline are all between 0 and 1: they are "
            f"parts of the image; multiply them by its width ({width}) and height ({height}). Write null if it is not in "
            f"the image"
        )


def is_none(segmentation: Any, depth: int = 4) -> bool:
    """Return whether a segmentation is a way to write "no mask": null, NaN, an empty text, list or object, or [[]].

    >>> [is_none(value) for value in (None, float("nan"), "", [], [[]], {}, {"size": [4, 6], "counts": []}, [[1, 2]])]
    [True, True, True, True, True, True, True, False]
    """
    if segmentation is None or (isinstance(segmentation, float) and math.isnan(segmentation)):
        return True
    if isinstance(segmentation, str):
        return segmentation.strip().lower() in ("", "null", "none", "nan", "[]", "[[]]", "{}")
    if isinstance(segmentation, dict):
        return not segmentation or ("counts" in segmentation and is_none(segmentation["counts"], 0))
    if isinstance(segmentation, (bytes, list, tuple)):
        return not segmentation or (depth > 0 and all(is_none(piece, depth - 1) for piece in segmentation))
    return False


def evidence_of(annotation: dict[str, Any]) -> str:
    """Return the fields of an annotation (`EVIDENCE`) that show its object in the image, or "" if there are none."""

    def is_something(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(is_something, value))
        return not is_none(value) and value != 0

    fields = [name for name in EVIDENCE if is_something(annotation.get(name))]
    return " and ".join(f"{name} {short_repr(annotation[name])}" for name in fields)


def check_annotation(annotation: dict[str, Any], field: str = "segmentation") -> None:
    """Raise ValueError if an annotation shows an object by a box, an area or keypoints, but has no mask.

    Such an annotation says where the object is, not that it is absent.
    """
    if is_none(annotation.get(field)) and (evidence := evidence_of(annotation)):
        value = short_repr(annotation[field]) if field in annotation else "missing"
        raise ValueError(
            f"it has {evidence}, but no mask ({field}: {value}); draw its mask or take it out. An expression without a "
            f"target is written in 'absent' or with null alone"
        )


def segmentation_to_rle(segmentation: Any, height: int, width: int, in_pixels: bool = False) -> dict[str, Any]:
    """Return the encoding of a mask in any form that a COCO-like file may use.

    Forms: None or [] (no pixel), a list of polygons [x0, y0, x1, y1, ...] in pixels, a list of run-length encodings, or
    one run-length encoding, compressed (`counts` is a string) or not (a list). Several pieces are united. Polygons that
    enclose nothing (an odd number of coordinates, or fewer than three points) are left out, as in the original's
    evaluation. Whether an annotation may be without a mask is the question of `check_annotation`. `in_pixels` says that the
    coordinates are known to be pixels, however small.

    >>> mask_area(segmentation_to_rle([[0, 0, 4, 0, 4, 2, 0, 2], [1, 1, 2, 2]], 4, 6))
    8

    Raises:
        ValueError: The value has another form, an encoding is damaged or of another size than the image, a coordinate is
            absurd, or all coordinates are parts of the image (0 to 1) instead of pixels.
    """
    check_size([height, width])
    if segmentation is None or (isinstance(segmentation, (list, tuple)) and not len(segmentation)):
        return empty_mask(height, width)
    pieces = [segmentation] if isinstance(segmentation, dict) else segmentation
    rles, polygons = [], []
    for piece in pieces if isinstance(pieces, (list, tuple)) else [pieces]:
        if isinstance(piece, dict) and {"size", "counts"} <= piece.keys():
            rles.append(check_rle(_compressed(piece) if isinstance(piece["counts"], list) else piece))
            check_mask_size(rles[-1], height, width)
        elif isinstance(piece, (list, tuple)) and all(isinstance(number, (int, float)) for number in piece):
            _check_polygon(piece, max(height, width))
            if len(piece) >= 6 and len(piece) % 2 == 0:
                polygons.append(piece)
        else:
            raise ValueError(
                f"A mask must be a list of polygons [x0, y0, x1, y1, ...] or a run-length encoding with 'size' and "
                f"'counts', got {short_repr(segmentation)}"
            )
    if polygons:
        if not in_pixels:
            check_pixels([number for polygon in polygons for number in polygon], height, width)
        rles.extend(coco_mask.frPyObjects(polygons, height, width))
    return merge_masks(rles) if rles else empty_mask(height, width)


def _compressed(rle: dict) -> dict[str, Any]:
    """Return an uncompressed encoding (`counts` is a list of run lengths) in compressed form."""
    height, width = check_size(rle["size"])
    runs = rle["counts"]
    if any(not isinstance(run, int) or run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(
            f"a mask's run lengths do not make the {height * width} pixels of its size {[height, width]}: {short_repr(runs)}"
        )
    return _plain(coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width))


def _check_polygon(numbers: Sequence[float], side: int) -> None:
    """Raise ValueError if a polygon reaches far out of the image.

    pycocotools allocates memory for every pixel of an outline, inside the image or not.
    """
    far = OUTSIDE * max(side, 1)
    if any(not -far <= number <= far for number in numbers):  # true for NaN as well
        raise ValueError(
            f"a polygon's coordinates must be numbers within {OUTSIDE} times the image's longest side ({side} pixels), "
            f"got {short_repr(list(numbers))}"
        )
