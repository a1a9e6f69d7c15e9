"""One question per expression: its text, its true mask, and the pixels that count.

Gold answers, metric rows, exhibits, pages and validation sheets all read a `Question`, so that the IoU on a picture is the
IoU of its metric row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_scripts.schema import decode_mask
from data_scripts.transforms import clean_expression, escape
from metrics.gres import box_overlap, mask_box

from .config import EvaluationConfig


@dataclass(frozen=True)
class Question:
    """An expression with its truth.

    Args:
        text: The expression, with special tokens turned into plain text.
        truth: The true mask (height, width), boolean; empty for a no-target.
        counted: The pixels that count (height, width), boolean. None: all of them.
        num_targets: The number of targets; 0 for a no-target.
        is_sentence: Whether the text is a sentence instead of a phrase (ReasonSeg).
    """

    text: str
    truth: np.ndarray
    counted: np.ndarray | None = None
    num_targets: int = 1
    is_sentence: bool = False

    @property
    def is_no_target(self) -> bool:
        return self.num_targets == 0

    def overlap(self, mask: np.ndarray) -> tuple[int, int]:
        """Return intersection and union of a predicted mask (height, width) with the truth, in pixels that count."""
        mask = self._counted(mask)
        return int((mask & self.truth).sum()), int((mask | self.truth).sum())

    def box_overlap(self, mask: np.ndarray) -> tuple[int, int]:
        """Return the pixels in both boxes, of a predicted mask (height, width) and of the truth, and in one or the other."""
        return box_overlap(mask_box(self._counted(mask)), mask_box(self.truth))

    def _counted(self, mask: np.ndarray) -> np.ndarray:
        return mask if self.counted is None else mask & self.counted


def questions_of(row: dict[str, Any], config: EvaluationConfig) -> list[Question]:
    """Return the questions of a row. Blank expressions are left out.

    Of ReasonSeg's texts, only the first is asked for, as in the original and LISA (quirk Q6).
    """
    entries = row["expressions"][:1] if config.is_reasoning else row["expressions"]
    return [_question(entry, config.ignore_region) for entry in entries if clean_expression(entry["text"])]


def num_questions(row: dict[str, Any], config: EvaluationConfig) -> int:
    """Return the number of questions of a row, without decoding their masks."""
    entries = row["expressions"][:1] if config.is_reasoning else row["expressions"]
    return sum(bool(clean_expression(entry["text"])) for entry in entries)


def _question(entry: dict[str, Any], ignore_region: str) -> Question:
    truth, counted = decode_mask(entry["mask"]).astype(bool), None
    if (ignored := entry.get("ignore_mask")) is not None:
        ignored = decode_mask(ignored).astype(bool)
        if ignore_region == "foreground":
            truth = truth | ignored
        else:
            truth, counted = truth & ~ignored, ~ignored
    num_targets = (entry["num_targets"] or 1) if truth.any() else 0
    return Question(escape(entry["text"]), truth, counted, num_targets, bool(entry["is_sentence"]))


def prompt_of(questions: list[Question], config: EvaluationConfig) -> str:
    """Return the name of the processor's prompt for the questions of one image."""
    if not config.is_reasoning:
        return "refer"
    return "reason_sentence" if questions[0].is_sentence else "reason_phrase"
