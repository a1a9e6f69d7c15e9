"""Choose the exhibits of an evaluation, the rows that are worth looking at, and draw them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_scripts.transforms import read_image
from metrics.gres import kind_of

from .config import EvaluationConfig
from .drawing import data_url
from .loop import EvaluationResult
from .questions import questions_of
from .tiles import make_tiles, result_of

# The groups of exhibits, in the order of the page.
GROUPS = ("worst false rejections", "worst missed rejections", "worst masks", "best masks")
EXHIBITS_PER_KIND = 6


def choose_exhibits(
    rows_by_image: Sequence[Sequence[dict[str, Any]]], each: int = EXHIBITS_PER_KIND
) -> list[tuple[str, int, int]]:
    """Return the rows worth looking at, as (group, image, expression).

    For each kind of expression these are the `each` wrong decisions with the highest confidence, and the worst and best
    masks. An answer without a slot has no score and counts as the least confident.

    Args:
        rows_by_image: The metric rows of each image.
    """
    places: dict[tuple[str, str], list[tuple[float, int, int]]] = {}
    for number, rows in enumerate(rows_by_image):
        for position, row in enumerate(rows):
            iou = row["intersection"] / row["union"] if row["union"] else 0.0
            ranks = {}
            if row["is_no_target"] and not row["is_rejected"]:
                ranks["worst missed rejections"] = np.inf if row["score"] is None else -row["score"]
            elif row["is_rejected"] and not row["is_no_target"]:
                ranks["worst false rejections"] = np.inf if row["score"] is None else row["score"]
            elif not row["is_no_target"]:
                ranks = {"worst masks": iou, "best masks": -iou}
            for group, rank in ranks.items():
                places.setdefault((group, kind_of(row["is_no_target"], row["num_targets"])), []).append(
                    (rank, number, position)
                )
    chosen = []
    for group in GROUPS:
        for (name, _), ranked in sorted(places.items()):
            if name == group:
                chosen += [(group, number, position) for _, number, position in sorted(ranked)[:each]]
    return chosen


def make_exhibits(result: EvaluationResult, config: EvaluationConfig) -> list[dict[str, Any]]:
    """Return the exhibits of an evaluation whose rows hold their `prediction`: tiles without their texts, and facts."""
    exhibits = []
    for group, number, position in choose_exhibits(result.rows_by_image):
        row, source = result.rows_by_image[number][position], config.rows[number]
        question = questions_of(source, config)[position]
        (tile,) = make_tiles(read_image(source["image"]), [result_of(row)], [question])
        names = ("image_id", "expression", "is_rejected", "score", "intersection", "union", "num_expressions")
        exhibits.append(
            {
                "group": group,
                "kind": kind_of(row["is_no_target"], row["num_targets"]),
                **{name: row[name] for name in names},
                "picture": data_url(tile.picture, "JPEG", quality=88).partition(",")[2],
            }
        )
    return exhibits
