"""Metrics of presence: how well scores and decisions tell expressions with a target from no-targets. numpy only.

`scores` are the log-odds that an expression has a target (any increasing function of them gives the same ranks);
`is_present` says whether it has one. A metric whose denominator is empty is NaN.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# The IoU thresholds over which SAM 3 averages its F1 (arXiv 2511.16719, as COCO's AP): 0.50, 0.55, ... 0.95.
CGF1_IOU = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
CALIBRATION_BINS = 15  # of equal width, as in Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599


def _arrays(values: Iterable[float], is_present: Iterable[bool]) -> tuple[np.ndarray, np.ndarray]:
    values, present = np.asarray(list(values), dtype=float), np.asarray(list(is_present), dtype=bool)
    if values.shape != present.shape:
        raise ValueError(f"{len(values)} scores for {len(present)} expressions; give one for each")
    if not np.isfinite(values).all():
        raise ValueError(
            "a score is not a finite number; leave out expressions without a score, or evaluate by `slots`"
        )
    return values, present


def presence_auroc(scores: Iterable[float], is_present: Iterable[bool]) -> float:
    """Return the area under the ROC curve: the chance that a target scores above a no-target; a tie counts half.

    Source: Hanley and McNeil, Radiology 143 (1982). It is the area of the rejection curve.

    >>> presence_auroc([3.0, 1.0, 1.0, -2.0], [True, True, False, False])  # pairs: 1, 1, 1/2, 1
    0.875
    """
    scores, present = _arrays(scores, is_present)
    targets, others = scores[present], np.sort(scores[~present])
    if not len(targets) or not len(others):
        return math.nan
    below = np.searchsorted(others, targets, side="left")
    not_above = np.searchsorted(others, targets, side="right")
    return float((below + not_above).sum() / (2 * len(targets) * len(others)))


def presence_average_precision(scores: Iterable[float], is_present: Iterable[bool]) -> float:
    """Return the average precision of "has a target": the sum over thresholds of recall gained times precision.

    Expressions with the same score enter together. Source: the definition of scikit-learn's average_precision_score,
    without interpolation.

    >>> round(presence_average_precision([4.0, 3.0, 2.0, 1.0], [True, False, True, False]), 4)  # (1 + 2/3) / 2
    0.8333
    """
    scores, present = _arrays(scores, is_present)
    if not present.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(present[order])
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # the last place of each score
    gained = np.diff(hits[ends], prepend=0)
    return float((gained * hits[ends] / (ends + 1)).sum() / present.sum())


def presence_mcc(is_kept: Iterable[bool], is_present: Iterable[bool]) -> float:
    """Return Matthews' correlation of decisions and truth, which SAM 3 calls IL_MCC (arXiv 2511.16719).

    (TP·TN - FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)); NaN where one of the four sums is empty.

    >>> round(presence_mcc([True, True, False, False, True], [True, True, True, False, False]), 4)  # TP 2, FN 1, TN 1, FP 1
    0.1667
    """
    kept, present = np.asarray(list(is_kept), dtype=bool), np.asarray(list(is_present), dtype=bool)
    if kept.shape != present.shape:
        raise ValueError(f"{len(kept)} decisions for {len(present)} expressions; give one for each")
    tp, fp = int((kept & present).sum()), int((kept & ~present).sum())
    fn, tn = int((~kept & present).sum()), int((~kept & ~present).sum())
    denominator = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(denominator) if denominator else math.nan


def positive_micro_f1(rows: Iterable[Mapping[str, Any]]) -> float:
    """Return SAM 3's pmF1 over expressions with a target, averaged over the IoU thresholds `CGF1_IOU`.

    SAM 3 matches instances. Here an expression has one mask, the union of its targets: a kept mask at or above the IoU
    is a true positive, one below it a false positive and a false negative, a rejected target a false negative.
    """
    targets = [row for row in rows if not row["is_no_target"]]
    if not targets:
        return math.nan
    ious = np.array([row["intersection"] / row["union"] if row["union"] else 0.0 for row in targets])
    kept = np.array([not row["is_rejected"] for row in targets])
    values = []
    for threshold in CGF1_IOU:
        hits = int((kept & (ious >= threshold)).sum())
        values.append(2 * hits / (int(kept.sum()) + len(targets)))  # 2 TP / (2 TP + FP + FN)
    return float(np.mean(values))


def cgf1(rows: Iterable[Mapping[str, Any]]) -> float:
    """Return SAM 3's classification-gated F1: `positive_micro_f1` times `presence_mcc`, between -1 and 1.

    SAM 3 (arXiv 2511.16719) prints it times 100.

    Args:
        rows: As in `gres_metrics`.
    """
    rows = list(rows)
    return positive_micro_f1(rows) * presence_mcc(
        [not row["is_rejected"] for row in rows], [not row["is_no_target"] for row in rows]
    )


def calibration_error(
    probabilities: Iterable[float], is_present: Iterable[bool], bins: int = CALIBRATION_BINS
) -> float:
    """Return the expected calibration error: the mean distance of predicted probability and observed share, by bins.

    Σ over bins of (expressions in the bin / all) · |mean probability - share with a target|, bins of equal width.
    Source: Naeini et al., AAAI 2015; Guo et al., arXiv 1706.04599.

    >>> round(calibration_error([0.9, 0.9, 0.1, 0.1], [True, False, False, False], bins=2), 4)  # (0.4 + 0.1) / 2
    0.25
    """
    table = reliability(probabilities, is_present, bins)
    count = sum(line["count"] for line in table)
    if not count:
        return math.nan
    return sum(line["count"] / count * abs(line["probability"] - line["share"]) for line in table)


def bin_of(probabilities: np.ndarray, bins: int) -> np.ndarray:
    """Return the number of the bin of each probability, of `bins` bins of equal width.

    >>> bin_of(np.array([0.0, 0.5, 1.0]), 2).tolist()  # a border belongs to the higher bin, 1 to the last
    [0, 1, 1]
    """
    return np.minimum((probabilities * bins).astype(int), bins - 1)


def reliability(
    probabilities: Iterable[float], is_present: Iterable[bool], bins: int = CALIBRATION_BINS
) -> list[dict[str, float]]:
    """Return a line for each bin that is not empty: its mean probability, its share of targets, and its count.

    A probability on a border belongs to the higher bin, 1 to the last.

    Raises:
        ValueError: A probability lies outside 0 to 1.
    """
    values, present = _arrays(probabilities, is_present)
    if len(values) and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"probabilities lie between {values.min()} and {values.max()}; expected 0 to 1")
    places = bin_of(values, bins)
    return [
        {
            "probability": float(values[places == place].mean()),
            "share": float(present[places == place].mean()),
            "count": int((places == place).sum()),
        }
        for place in sorted(set(places.tolist()))
    ]


def presence_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return all metrics of presence that rows allow: AUROC and AP need a score in every row.

    Args:
        rows: As in `gres_metrics`.
    """
    present = [not row["is_no_target"] for row in rows]
    scores: list[Any] = [row.get("score") for row in rows]
    has_scores = all(score is not None for score in scores)
    return {
        "AUROC": presence_auroc(scores, present) if has_scores else math.nan,
        "AP": presence_average_precision(scores, present) if has_scores else math.nan,
        "IL_MCC": presence_mcc([not row["is_rejected"] for row in rows], present),
        "pmF1": positive_micro_f1(rows),
        "cgF1": cgf1(rows),
    }
