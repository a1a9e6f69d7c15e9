"""Metrics of presence: how well scores and decisions tell expressions with a target from no-targets. numpy only.

`scores` are the log-odds that an expression has a target (any increasing function of them gives the same ranks);
`is_present` says whether it has one. A metric whose denominator is empty is NaN.
"""

import math
from collections.abc import Iterable, Mapping
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


def _ratios(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Return top / bottom, NaN where the denominator is empty."""
    return np.divide(top, bottom, out=np.full(np.shape(bottom), math.nan), where=bottom > 0)


def _ranked(scores: np.ndarray, present: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how many targets and no-targets have each score, from the lowest: two arrays (resamples, different scores)."""
    order = np.lexsort((present, scores))
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    drawn = weights[:, order]
    targets = np.add.reduceat(drawn * present[order], starts, axis=1)
    return targets, np.add.reduceat(drawn, starts, axis=1) - targets


def rank_metrics(scores: np.ndarray, present: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return AUROC and AP (resamples,), NaN where not defined.

    Args:
        scores, present: The score of each expression, and whether it has a target (expressions,).
        weights: How often each resample drew each expression (resamples, expressions).
    """
    if not len(scores):
        return {name: np.full(len(weights), math.nan) for name in ("AUROC", "AP")}
    targets, others = _ranked(scores, present, weights)
    positives, negatives = targets.sum(axis=1), others.sum(axis=1)
    below = np.cumsum(others, axis=1) - others
    ordered = (targets * (2 * below + others)).sum(axis=1)  # twice the pairs in order, a whole number
    hits = np.cumsum(targets[:, ::-1], axis=1)  # from the highest score on
    counts = hits + np.cumsum(others[:, ::-1], axis=1)
    precision = np.divide(hits, counts, out=np.zeros_like(hits), where=counts > 0)
    return {
        "AUROC": _ratios(ordered, 2 * positives * negatives),
        "AP": _ratios((targets[:, ::-1] * precision).sum(axis=1), positives),
    }


def _rank_metric(name: str, scores: Iterable[float], is_present: Iterable[bool]) -> float:
    values, present = _arrays(scores, is_present)
    return float(rank_metrics(values, present, np.ones((1, len(values))))[name][0])


def presence_auroc(scores: Iterable[float], is_present: Iterable[bool]) -> float:
    """Return the area under the ROC curve: the chance that a target scores above a no-target; a tie counts half.

    Source: Hanley and McNeil, Radiology 143 (1982). It is the area of the rejection curve.

    >>> presence_auroc([3.0, 1.0, 1.0, -2.0], [True, True, False, False])  # pairs: 1, 1, 1/2, 1
    0.875
    """
    return _rank_metric("AUROC", scores, is_present)


def presence_average_precision(scores: Iterable[float], is_present: Iterable[bool]) -> float:
    """Return the average precision of "has a target": the sum over thresholds of recall gained times precision.

    Expressions with the same score enter together. Source: the definition of scikit-learn's average_precision_score,
    without interpolation.

    >>> round(presence_average_precision([4.0, 3.0, 2.0, 1.0], [True, False, True, False]), 4)  # (1 + 2/3) / 2
    0.8333
    """
    return _rank_metric("AP", scores, is_present)


def decision_counts(
    no_target: np.ndarray, rejected: np.ndarray, iou: np.ndarray, probability: np.ndarray | None
) -> np.ndarray:
    """Return what each expression adds to the sums that `count_metrics` reads (expressions, counts).

    Args:
        no_target, rejected: Whether each expression has no target, and whether it was rejected (expressions,).
        iou: The IoU of each mask with its truth (expressions,).
        probability: The probability that each expression is there (expressions,), or None where it is not known.
    """
    outcomes = (~no_target & ~rejected, no_target & ~rejected, ~no_target & rejected, no_target & rejected)
    hits = (outcomes[0] & (iou >= threshold) for threshold in CGF1_IOU)
    columns = [*outcomes, *hits]
    if probability is not None:
        places = bin_of(probability, CALIBRATION_BINS)
        for place in range(CALIBRATION_BINS):
            inside = places == place
            columns += [inside, inside * probability, inside & ~no_target]
    return np.column_stack(columns).astype(float)


def count_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return IL_MCC, pmF1, cgF1 and ECE (resamples,) of summed `decision_counts` (resamples, counts), NaN where not defined."""
    tp, fp, fn, tn = sums[:, :4].T
    # two roots instead of one: a product of four counts would not be exact
    root = np.sqrt((tp + fp) * (tp + fn)) * np.sqrt((tn + fp) * (tn + fn))
    mcc = _ratios(tp * tn - fp * fn, root)
    last = 4 + len(CGF1_IOU)
    hits, targets = sums[:, 4:last], tp + fn
    f1 = np.stack([_ratios(2 * column, tp + targets) for column in hits.T], axis=1).mean(
        axis=1
    )  # 2 TP / (2 TP + FP + FN)
    inside, probability, present = sums[:, last:].reshape(len(sums), -1, 3).transpose(2, 0, 1)
    error = _ratios(np.abs(probability - present).sum(axis=1), inside.sum(axis=1))
    return {"IL_MCC": mcc, "pmF1": f1, "cgF1": f1 * mcc, "ECE": error}


def presence_mcc(is_kept: Iterable[bool], is_present: Iterable[bool]) -> float:
    """Return Matthews' correlation of decisions and truth, which SAM 3 calls IL_MCC (arXiv 2511.16719).

    (TP·TN - FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN)); NaN where one of the four sums is empty.

    >>> round(presence_mcc([True, True, False, False, True], [True, True, True, False, False]), 4)  # TP 2, FN 1, TN 1, FP 1
    0.1667
    """
    kept, present = np.asarray(list(is_kept), dtype=bool), np.asarray(list(is_present), dtype=bool)
    if kept.shape != present.shape:
        raise ValueError(f"{len(kept)} decisions for {len(present)} expressions; give one for each")
    return _count_metric("IL_MCC", ~present, ~kept, np.zeros(len(kept)))


def _count_metric(name: str, no_target: np.ndarray, rejected: np.ndarray, iou: np.ndarray) -> float:
    return float(count_metrics(decision_counts(no_target, rejected, iou, None).sum(axis=0, keepdims=True))[name][0])


def _count_metric_of_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> float:
    rows = list(rows)
    no_target, rejected = (
        np.array([row[field] for row in rows], dtype=bool) for field in ("is_no_target", "is_rejected")
    )
    iou = np.array([row["intersection"] / row["union"] if row["union"] else 0.0 for row in rows])
    return _count_metric(name, no_target, rejected, iou)


def positive_micro_f1(rows: Iterable[Mapping[str, Any]]) -> float:
    """Return SAM 3's pmF1 over expressions with a target, averaged over the IoU thresholds `CGF1_IOU`.

    SAM 3 (arXiv 2511.16719) matches instances. Here an expression has one mask, the union of its targets: a kept mask at
    or above the IoU is a true positive, one below it a false positive and a false negative, a rejected target a false
    negative. F1 = 2 TP / (2 TP + FP + FN).
    """
    return _count_metric_of_rows("pmF1", rows)


def cgf1(rows: Iterable[Mapping[str, Any]]) -> float:
    """Return SAM 3's classification-gated F1: `positive_micro_f1` times `presence_mcc`, between -1 and 1.

    SAM 3 (arXiv 2511.16719) prints it times 100.

    Args:
        rows: As in `gres_metrics`.
    """
    return _count_metric_of_rows("cgF1", rows)


def rejection_reliability(
    no_target: np.ndarray, rejected: np.ndarray, has_mask: np.ndarray, probability: np.ndarray
) -> np.ndarray:
    """Return how reliably each no-target was rejected (expressions,); N3R is the mean of it over the no-targets.

    1 for a rejected no-target. For a kept one Π (1 - c) over what was predicted for it, with the confidence c: here that
    is one mask, and c the probability that the expression is there. 1/2 for an answer that neither rejects nor marks a
    pixel. Source: "Negative Relative Rejection Reliability" of OpenRef (arXiv 2605.25706), as the authors' evaluation
    computes it (github.com/zongjianwu/OpenRef-Benchmark at 835e30e, qwen3/eval_rdi_neg.py, `n3r_score_sum`).

    Args:
        no_target, rejected, has_mask: Of each expression (expressions,).
        probability: The probability that each expression is there (expressions,); NaN where it is not known.
    """
    return np.where(rejected, 1.0, np.where(has_mask, 1 - probability, 0.5)) * no_target


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


def without_bias(resampled: np.ndarray, value: float) -> np.ndarray:
    """Return calibration errors of resamples (resamples,) without their bias, around that of the data.

    A resample has fewer different expressions than the data, so chance moves its bins further: its error is larger on
    average. The mean surplus is taken off (bootstrap estimate of bias: Efron and Tibshirani, 1993, chapter 10).
    """
    return np.maximum(resampled - (resampled.mean() - value), 0) if len(resampled) else resampled


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
