"""Metrics of presence, counted by hand, and where they are not defined."""

import math

import pytest

from metrics.gres import gres_metrics, rejection_curve
from metrics.gres.presence import (
    calibration_error,
    cgf1,
    positive_micro_f1,
    presence_auroc,
    presence_average_precision,
    presence_mcc,
    reliability,
)


def row(kind, rejected, iou=0.0, score=0.0):
    return {
        "is_no_target": kind == "none",
        "is_rejected": rejected,
        "intersection": round(iou * 100),
        "union": 100,
        "score": score,
    }


@pytest.mark.parametrize(
    ("scores", "present", "auroc", "precision"),
    [
        ([2, 1, -1, -2], [1, 1, 0, 0], 1.0, 1.0),  # perfect
        ([-2, -1, 1, 2], [1, 1, 0, 0], 0.0, (1 / 3 + 2 / 4) / 2),  # reversed
        ([0, 0, 0, 0], [1, 1, 0, 0], 0.5, 0.5),  # all tied: one threshold, precision 2 / 4
        ([3, 2, 2, 1], [1, 1, 0, 0], 3.5 / 4, (1 + 2 / 3) / 2),  # a tie counts half
        ([1, 2], [1, 1], math.nan, 1.0),  # no no-targets
        ([1, 2], [0, 0], math.nan, math.nan),
        ([], [], math.nan, math.nan),
    ],
)
def test_ranking_by_hand(scores, present, auroc, precision):
    assert presence_auroc(scores, present) == pytest.approx(auroc, nan_ok=True)
    assert presence_average_precision(scores, present) == pytest.approx(precision, nan_ok=True)


def test_auroc_is_the_area_of_the_rejection_curve():
    rows = [row("none" if n % 3 else "one", n % 2 == 0, score=(n * 7 % 11) - 5) for n in range(40)]
    area = rejection_curve(rows)["area"]
    assert presence_auroc([r["score"] for r in rows], [not r["is_no_target"] for r in rows]) == pytest.approx(area)


@pytest.mark.parametrize(
    ("kept", "present", "value"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], 1.0),
        ([0, 0, 1, 1], [1, 1, 0, 0], -1.0),
        ([1, 1, 1, 0], [1, 0, 1, 1], -1 / 3),  # TP 2, FP 1, FN 1, TN 0: (0 - 1) / sqrt(3 · 3 · 1 · 1)
        ([1, 1, 1, 1], [1, 1, 0, 0], math.nan),  # nothing rejected
        ([1, 0], [1, 1], math.nan),
    ],
)
def test_mcc_by_hand(kept, present, value):
    assert presence_mcc(kept, present) == pytest.approx(value, nan_ok=True)


def test_cgf1_by_hand():
    rows = [row("one", False, 1.0), row("one", False, 0.72), row("one", True), row("none", True), row("none", False)]
    # TP at 0.50 to 0.70: 2, at 0.75 to 0.95: 1; kept targets 2, targets 3: F1 = 2 TP / (2 + 3)
    f1 = (5 * 4 / 5 + 5 * 2 / 5) / 10
    assert positive_micro_f1(rows) == pytest.approx(f1)
    mcc = (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    assert cgf1(rows) == pytest.approx(f1 * mcc)
    assert gres_metrics(rows)["cgF1"] == pytest.approx(f1 * mcc)
    assert math.isnan(positive_micro_f1([row("none", True)])) and math.isnan(cgf1([row("none", True)]))


def test_calibration_error_by_hand():
    probabilities, present = [0.05, 0.15, 0.95, 1.0, 0.5], [False, True, True, True, True]
    # five bins: [0, 0.2) mean 0.1 share 1/2; [0.4, 0.6) 0.5 and 1; [0.8, 1] 0.975 and 1
    assert calibration_error(probabilities, present, bins=5) == pytest.approx((2 * 0.4 + 1 * 0.5 + 2 * 0.025) / 5)
    assert [line["count"] for line in reliability(probabilities, present, bins=5)] == [2, 1, 2]
    assert math.isnan(calibration_error([], []))
    with pytest.raises(ValueError, match="expected 0 to 1"):
        calibration_error([1.2], [True])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="2 scores for 1 expressions"):
        presence_auroc([1.0, 2.0], [True])
    with pytest.raises(ValueError, match="not a finite number"):
        presence_average_precision([math.nan], [True])
    lacking = [row("one", False), {**row("none", True), "score": None}]
    assert math.isnan(gres_metrics(lacking)["AUROC"]) and gres_metrics(lacking)["IL_MCC"] == 1.0
