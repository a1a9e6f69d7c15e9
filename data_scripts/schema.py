"""The two kinds of rows that every data set of this project is converted to.

A *segmentation row* is one image with everything that can be asked about it. A *VQA row* is one conversation about at
most one image. Masks are COCO run-length encodings (`masks.py`); one without any pixel is a no-target.
"""

from __future__ import annotations

from typing import Any

from datasets import Features, Image, List, Value

# These names lived here before `masks.py`; other rooms and users' code still import them from here.
from .masks import (  # noqa: F401
    check_rle,
    check_size,
    decode_mask,
    empty_mask,
    encode_labels,
    encode_mask,
    encode_runs,
    mask_area,
    max_image_pixels,
    merge_masks,
    segmentation_to_rle,
)

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
                # number of annotations that the expression names: 0 for no-target, 2 or more for multi-target
                "num_targets": Value("int32"),
                "mask": RLE,
                # pixels that do not count (ReasonSeg); None if there are none
                "ignore_mask": RLE,
                # the part of the object named by `text` (PACO, PASCAL-Part); None for the whole object
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
    """Return one entry of a segmentation row's `expressions`."""
    return {
        "text": text,
        "is_sentence": is_sentence,
        "num_targets": num_targets,
        "mask": mask,
        "ignore_mask": ignore_mask,
        "part": part,
        "explanation": explanation,
    }
