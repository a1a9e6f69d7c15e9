"""The two kinds of rows that every data set of this project becomes, and the masks in them.

A *segmentation row* is one picture with everything that can be asked about it; a *VQA row* is one conversation about
at most one picture. Masks are COCO run-length encodings `{"size": [height, width], "counts": str}`; an encoding
without any pixel means that the expression has nothing in the picture (no-target).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from datasets import Features, Image, List, Value
from pycocotools import mask as coco_mask

RLE = {"size": List(Value("int32"), length=2), "counts": Value("string")}

SEGMENTATION_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "height": Value("int32"),
        "width": Value("int32"),
        "expressions": List(
            {
                "text": Value("string"),
                "is_sentence": Value("bool"),
                # how many annotations the expression names: 0 for no-target, 2 or more for multi-target
                "num_targets": Value("int32"),
                "mask": RLE,
                # pixels that do not count (ReasonSeg); None where the data set has no such pixels
                "ignore_mask": RLE,
                # the part of the object `text` that is meant (PACO, PASCAL-Part); None for the whole object
                "part": Value("string"),
                # an answer in words (ReasonSeg's explanatory set)
                "explanation": Value("string"),
            }
        ),
    }
)

VQA_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "conversation": List({"role": Value("string"), "text": Value("string")}),
    }
)


def expression(
    text: str,
    mask: dict,
    num_targets: int = 1,
    is_sentence: bool = False,
    ignore_mask: dict | None = None,
    part: str | None = None,
    explanation: str | None = None,
) -> dict[str, Any]:
    """One entry of a segmentation row's `expressions`."""
    return {
        "text": text,
        "is_sentence": is_sentence,
        "num_targets": num_targets,
        "mask": mask,
        "ignore_mask": ignore_mask,
        "part": part,
        "explanation": explanation,
    }


def _plain(rle: dict) -> dict[str, Any]:
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


def decode_mask(rle: dict) -> np.ndarray:
    """The uint8 mask (height, width) of 0 and 1 behind a run-length encoding.

    >>> decode_mask({"size": [3, 3], "counts": "013000"}).tolist()
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    return coco_mask.decode(rle)


def mask_area(rle: dict) -> int:
    """Number of pixels of the target; 0 means no-target.

    >>> mask_area(empty_mask(4, 5))
    0
    """
    return int(coco_mask.area(rle))


@lru_cache(maxsize=4096)
def _empty_counts(height: int, width: int) -> str:
    return encode_mask(np.zeros((height, width), np.uint8))["counts"]


def empty_mask(height: int, width: int) -> dict[str, Any]:
    """The encoding of a mask (height, width) without any pixel."""
    return {"size": [height, width], "counts": _empty_counts(height, width)}


def encode_labels(labels: np.ndarray) -> dict[int, dict[str, Any]]:
    """Value -> encoding of its pixels, for every value in a label map (height, width), in ascending order.

    One pass over the pixels, however many values there are.

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
    """Union of run-length encodings of one size. Raises ValueError when the sizes differ or there is none."""
    sizes = {tuple(rle["size"]) for rle in rles}
    if len(sizes) != 1:
        raise ValueError(f"Masks to be united must share one (height, width), got {sorted(sizes)}")
    return _plain(rles[0] if len(rles) == 1 else coco_mask.merge(list(rles)))


def segmentation_to_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """The encoding of any form in which a COCO-like file states a mask.

    Forms: None or [] (nothing), a list of polygons [x0, y0, x1, y1, ...] in pixels, a list of run-length encodings, or
    one run-length encoding, compressed (`counts` a string) or not (a list); several pieces are united. Polygons that
    enclose nothing (an odd number of coordinates, or fewer than three points) are left out, as the original does when
    it evaluates. Run-length encodings bring their own size.

    >>> mask_area(segmentation_to_rle([[0, 0, 4, 0, 4, 2, 0, 2], [1, 1, 2, 2]], 4, 6))
    8

    Raises:
        ValueError: The value has none of these forms, or the sizes of encodings differ.
    """
    if segmentation is None or (isinstance(segmentation, (list, tuple)) and not len(segmentation)):
        return empty_mask(height, width)
    pieces = [segmentation] if isinstance(segmentation, dict) else segmentation
    rles, polygons = [], []
    for piece in pieces if isinstance(pieces, (list, tuple)) else [pieces]:
        if isinstance(piece, dict) and {"size", "counts"} <= piece.keys():
            uncompressed = isinstance(piece["counts"], list)
            rles.append(coco_mask.frPyObjects(piece, *piece["size"]) if uncompressed else piece)
        elif isinstance(piece, (list, tuple)) and all(isinstance(number, (int, float)) for number in piece):
            if len(piece) >= 6 and len(piece) % 2 == 0:
                polygons.append(piece)
        else:
            raise ValueError(
                f"A mask must be a list of polygons [x0, y0, x1, y1, ...] or a run-length encoding with 'size' and "
                f"'counts', got {str(segmentation)[:80]!r}"
            )
    if polygons:
        rles.extend(coco_mask.frPyObjects(polygons, height, width))
    return merge_masks(rles) if rles else empty_mask(height, width)
