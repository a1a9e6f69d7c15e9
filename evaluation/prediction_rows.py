"""The rows of predictions: one for each expression of an image, with its mask, or with the error that kept it from one."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from metrics.gres import mask_box
from metrics.gres.masks import encode_mask

MASKS = ("rle", "png", "none")

# The columns of every file of predictions. All but `is_split` may be null; in a row with an `error` most of them are.
PREDICTION_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("height", pa.int32()),  # of the image, in pixels
        ("width", pa.int32()),
        ("expression", pa.string()),  # as asked; of a free question the phrase that the answer has before its slot
        ("question", pa.string()),  # null where expressions were asked for
        ("answer", pa.string()),  # the whole answer of the prompt, with [SEG] and [REJ]
        ("is_rejected", pa.bool_()),
        ("score", pa.float32()),  # log-odds of [SEG] against [REJ]
        ("probability", pa.float32()),  # that the expression is there
        ("box", pa.list_(pa.int32(), 4)),  # x, y, width, height in pixels, as COCO's; null where rejected
        ("area", pa.int64()),  # of the mask in pixels; 0 where rejected
        ("mask", pa.struct([("size", pa.list_(pa.int32(), 2)), ("counts", pa.string())])),  # COCO RLE, masks="rle"
        ("mask_png", pa.binary()),  # black and white, masks="png"
        ("iou_estimate", pa.float32()),  # the mask decoder's own; null where rejected
        ("model", pa.string()),
        ("revision", pa.string()),
        ("is_split", pa.bool_()),  # the expressions of the image did not fit into one prompt
        ("error", pa.string()),
    ]
)


def result_row(result: Mapping[str, Any], masks: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a result of `post_process_segmentation`.

    Args:
        masks: How the mask is kept: "rle", "png" or "none".
        facts: Further columns, such as `image_id`, `answer` and `model`.
    """
    mask, is_rejected = result["mask"], bool(result["is_rejected"])
    row = {
        **bare_row(facts),
        "height": mask.shape[0],
        "width": mask.shape[1],
        "expression": result["text"],
        "is_rejected": is_rejected,
        "score": finite(result["score"]),
        "probability": finite(result["probability"]),
        "area": int(mask.sum()),
    }
    if is_rejected:
        return row
    row |= {"box": list(mask_box(mask)), "iou_estimate": finite(result.get("iou_score"))}
    if masks == "rle":
        row["mask"] = encode_mask(mask)
    elif masks == "png":
        row["mask_png"] = png(mask)
    return row


def bare_row(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with these columns and no other: what a free answer without any slot gives."""
    return {**dict.fromkeys(PREDICTION_SCHEMA.names), "is_split": False, **facts}


def error_row(error: object, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of an expression that could not be answered; its message is one line."""
    return {**bare_row(facts), "error": " ".join(str(error).split()) or type(error).__name__}


def finite(value: float | None) -> float | None:
    """Return a number, or None for NaN, which stands for no slot or no mask."""
    return None if value is None or math.isnan(value) else float(value)


def png(mask: np.ndarray) -> bytes:
    """Return a mask (height, width) as a black and white PNG."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, format="PNG")
    return file.getvalue()


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return rows as columns, in the order of the schema."""
    return {name: [row[name] for row in rows] for name in PREDICTION_SCHEMA.names}


def prediction_table(columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """Return columns of predictions as a table of `PREDICTION_SCHEMA`, whichever of them hold only nulls."""
    return pa.Table.from_pydict({name: columns[name] for name in PREDICTION_SCHEMA.names}, schema=PREDICTION_SCHEMA)
