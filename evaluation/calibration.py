"""Calibrate rejection: fit probabilities to scores, and choose the threshold for a wanted operating point.

A score is the log-odds of `[SEG]` against `[REJ]`. Its probability that the expression is there is
`sigmoid(score / temperature + offset)`; an expression is rejected when its score lies below the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metrics.gres.presence import calibration_error, without_bias

FOLDS = 5
# With fewer expressions of either kind two parameters cannot be fitted to any use: they stay at 1 and 0.
MIN_OF_A_KIND = 20
RESAMPLES = 1000
LEVEL = 0.95
RISK_STEPS = 20  # coverages at which `--max_risk` is tested


@dataclass(frozen=True)
class Scores:
    """The scores of a validation evaluation.

    Args:
        scores: The log-odds of `[SEG]` (expressions,).
        is_present: Whether each expression has a target (expressions,).
        images: The number of the image of each expression (expressions,), 0 to images - 1.
    """

    scores: np.ndarray
    is_present: np.ndarray
    images: np.ndarray

    @classmethod
    def of_rows(cls, rows: Sequence[dict[str, Any]]) -> Scores:
        """Take the scores of metric rows.

        Raises:
            ValueError: A row has no score, or the rows lack no-targets or targets.
        """
        lacking = sum(row.get("score") is None for row in rows)
        if lacking:
            raise ValueError(
                f"{lacking} of {len(rows)} rows have no score; calibrate on an evaluation with --protocols slots."
            )
        present = np.array([not row["is_no_target"] for row in rows], dtype=bool)
        for kind, count in (("no-targets", (~present).sum()), ("expressions with a target", present.sum())):
            if not count:
                raise ValueError(
                    f"The {len(rows)} rows hold no {kind}, so rejection cannot be calibrated on them; evaluate a split with "
                    "both kinds, such as grefcoco val."
                )
        images = np.unique([str(row["image_id"]) for row in rows], return_inverse=True)[1]
        return cls(np.array([row["score"] for row in rows], dtype=float), present, images)

    def select(self, chosen: np.ndarray) -> Scores:
        """Return the chosen expressions, by places or booleans."""
        return Scores(self.scores[chosen], self.is_present[chosen], self.images[chosen])

    @property
    def num_images(self) -> int:
        return int(self.images.max()) + 1


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-values)), without overflow."""
    return np.exp(-np.logaddexp(0, -values))


def fit(data: Scores, steps: int = 100) -> tuple[float, float]:
    """Return the temperature and offset of the highest likelihood, by Newton's method.

    The targets of the likelihood are (N+ + 1) / (N+ + 2) and 1 / (N- + 2) instead of 1 and 0, so that data that a
    threshold separates have a finite optimum (Platt, "Probabilistic outputs for support vector machines", 1999).
    """
    positives, negatives = int(data.is_present.sum()), int((~data.is_present).sum())
    goal = np.where(data.is_present, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    centre, scale = float(data.scores.mean()), float(data.scores.std()) or 1.0
    inputs = np.column_stack([(data.scores - centre) / scale, np.ones(len(goal))])
    weights = np.array([1.0, 0.0])

    def loss(candidate: np.ndarray) -> float:
        logits = inputs @ candidate
        return float((np.logaddexp(0, logits) - goal * logits).sum())

    for _ in range(steps):
        probabilities = sigmoid(inputs @ weights)
        gradient = inputs.T @ (probabilities - goal)
        curvature = (inputs * (probabilities * (1 - probabilities))[:, None]).T @ inputs + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-6 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    slope = max(weights[0] / scale, 1e-6)  # a score that says nothing, or the opposite, gets a flat probability
    return 1 / slope, float(weights[1] - slope * centre)


def cross_validated(data: Scores, folds: int = FOLDS, seed: int = 0) -> np.ndarray:
    """Return the probability of each expression by a fit on the other folds. No image is in two folds."""
    fold_of_image = np.random.default_rng(seed).permutation(data.num_images) % folds
    fold = fold_of_image[data.images]
    probabilities = np.empty(len(data.scores))
    for number in range(folds):
        rest, held_out = fold != number, fold == number
        if not held_out.any():
            continue
        temperature, offset = fit_or_keep(data.select(rest))[:2]
        probabilities[held_out] = sigmoid(data.scores[held_out] / temperature + offset)
    return probabilities


def fit_or_keep(data: Scores) -> tuple[float, float, str]:
    """Return temperature, offset and a sentence. With too few expressions of a kind they stay at 1 and 0."""
    counts = {"no-targets": int((~data.is_present).sum()), "targets": int(data.is_present.sum())}
    for kind, count in counts.items():
        if count < MIN_OF_A_KIND:
            return (
                1.0,
                0.0,
                f"Only {count} {kind}: temperature 1 and offset 0 are kept, {MIN_OF_A_KIND} are needed to fit.",
            )
    return (*fit(data), "")


def accuracies(data: Scores, threshold: float) -> tuple[float, float]:
    """Return N_acc and T_acc if scores below the threshold are rejected."""
    kept = data.scores >= threshold
    return float((~kept[~data.is_present]).mean()), float(kept[data.is_present].mean())


def thresholds_of(data: Scores) -> np.ndarray:
    """Return one threshold for each way to split the scores, in rising order: halfway between neighbouring scores."""
    values = np.unique(data.scores)
    middle = (values[1:] + values[:-1]) / 2
    return np.concatenate([[values[0] - 1.0], middle, [values[-1] + 1.0]])


def _table(data: Scores, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return N_acc and T_acc at each threshold."""
    others, targets = np.sort(data.scores[~data.is_present]), np.sort(data.scores[data.is_present])
    rejected = np.searchsorted(others, thresholds) / len(others)
    kept = 1 - np.searchsorted(targets, thresholds) / len(targets)
    return rejected, kept


def threshold_for_min_t_acc(data: Scores, wanted: float) -> float:
    """Return the threshold of the highest N_acc among those that keep T_acc at `wanted` or above.

    Raises:
        ValueError: Only a threshold that rejects no no-target does. The message says the best of the others.
    """
    thresholds = thresholds_of(data)
    rejected, kept = _table(data, thresholds)
    place = np.flatnonzero(kept >= wanted)[-1]  # the lowest threshold keeps every target
    if not rejected[place]:
        best = np.flatnonzero(rejected)[0]
        raise ValueError(
            f"No threshold that rejects a no-target keeps T_acc at {wanted:g}; the best keeps {kept[best]:.4f} and rejects "
            f"{rejected[best]:.4f} of the no-targets. Give a lower --min_T_acc."
        )
    return float(thresholds[place])


def threshold_for_min_n_acc(data: Scores, wanted: float) -> float:
    """Return the threshold of the highest T_acc among those that keep N_acc at `wanted` or above.

    Raises:
        ValueError: Only a threshold that rejects every target does. The message says the best of the others.
    """
    thresholds = thresholds_of(data)
    rejected, kept = _table(data, thresholds)
    place = np.flatnonzero(rejected >= wanted)[0]  # the highest threshold rejects everything
    if not kept[place]:
        best = np.flatnonzero(kept)[-1]
        raise ValueError(
            f"No threshold that keeps a target brings N_acc to {wanted:g}; the best reaches {rejected[best]:.4f} and keeps "
            f"{kept[best]:.4f} of the targets. Give a lower --min_N_acc."
        )
    return float(thresholds[place])


def threshold_for_balance(data: Scores) -> float:
    """Return the threshold at which N_acc and T_acc are closest; of several, that with the higher sum."""
    thresholds = thresholds_of(data)
    rejected, kept = _table(data, thresholds)
    return float(thresholds[np.lexsort((-(rejected + kept), np.abs(rejected - kept).round(12)))[0]])


def threshold_for_max_risk(data: Scores, wanted: float, confidence: float = 0.95, seed: int = 0) -> float:
    """Return the lowest threshold whose risk is at most `wanted` with the given confidence.

    The risk is the share of no-targets among the expressions that are kept. For each of `RISK_STEPS` coverages, the
    hypothesis "the risk is above `wanted`" is tested by the exact binomial tail; it is rejected at
    (1 - confidence) / RISK_STEPS, so that all tests together err with probability 1 - confidence at most (Bonferroni).
    Sources: Geifman and El-Yaniv, arXiv 1705.08500 (selective risk, binomial tail); Angelopoulos et al., "Learn then
    Test", arXiv 2110.01052 (testing a grid of thresholds). The expressions of an image depend on each other, so the test
    takes one expression of each image, drawn by seed.

    Raises:
        ValueError: No coverage passes; the message says the lowest risk that does.
    """
    drawn = data.select(_one_per_image(data, seed))
    level = (1 - confidence) / RISK_STEPS
    scores = np.sort(drawn.scores)
    best_bound, passed = 1.0, None
    for step in range(1, RISK_STEPS + 1):
        kept_count = math.ceil(len(scores) * step / RISK_STEPS)
        place = len(scores) - kept_count
        threshold = float(scores[place] - 1.0 if place == 0 else (scores[place] + scores[place - 1]) / 2)
        kept = drawn.scores >= threshold
        count, wrong = int(kept.sum()), int((kept & ~drawn.is_present).sum())
        if count == 0:
            continue
        best_bound = min(best_bound, risk_bound(wrong, count, level))
        if binomial_tail(wrong, count, wanted) <= level:
            passed = threshold if passed is None else min(passed, threshold)
    if passed is None:
        raise ValueError(
            f"No threshold keeps the risk at {wanted:g} with confidence {confidence:g} on {len(scores)} images; the lowest "
            f"risk that holds is {best_bound:.3f}. Give a higher --max_risk or more validation images."
        )
    return passed


def _one_per_image(data: Scores, seed: int) -> np.ndarray:
    """Return the places of one expression of each image, drawn by seed."""
    order = np.random.default_rng(seed).permutation(len(data.scores))
    return order[np.unique(data.images[order], return_index=True)[1]]


def binomial_tail(wrong: int, count: int, risk: float) -> float:
    """Return the probability of at most `wrong` errors in `count` draws with the given risk.

    >>> round(binomial_tail(1, 3, 0.5), 4)  # (1 + 3) / 8
    0.5
    """
    if risk <= 0:
        return 1.0
    if risk >= 1:
        return 1.0 if wrong >= count else 0.0
    terms = [
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(risk)
        + (count - k) * math.log1p(-risk)
        for k in range(wrong + 1)
    ]
    return min(math.fsum(math.exp(term) for term in terms), 1.0)


def risk_bound(wrong: int, count: int, level: float) -> float:
    """Return the upper bound of the risk that `wrong` errors in `count` draws allow (Clopper and Pearson, 1934).

    >>> round(risk_bound(0, 59, 0.05), 4)  # 1 - 0.05 ** (1 / 59)
    0.0495
    """
    low, high = wrong / count, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_tail(wrong, count, middle) > level else (low, middle)
    return high


def resampled(data: Scores, count: int, seed: int = 0) -> Iterator[Scores]:
    """Yield `count` bootstrap samples: as many images as there are, drawn with replacement, with all their expressions."""
    places = np.argsort(data.images, kind="stable")
    starts = np.searchsorted(data.images[places], np.arange(data.num_images + 1))
    random = np.random.default_rng(seed)
    for _ in range(count):
        images = random.integers(data.num_images, size=data.num_images)
        yield data.select(np.concatenate([places[starts[image] : starts[image + 1]] for image in images]))


def bootstrap(
    data: Scores, statistic: Callable[[Scores], float], seed: int = 0, is_error: bool = False
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic, with images as the unit.

    Args:
        is_error: Whether it is a calibration error, whose bias in resamples is taken off (`without_bias`).
    """
    values = np.array(
        [value for drawn in resampled(data, RESAMPLES, seed) if not math.isnan(value := statistic(drawn))]
    )
    if is_error:
        values = without_bias(values, statistic(data))
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return tuple(np.quantile(values, tails).tolist()) if len(values) else (math.nan, math.nan)


def least_calibration_error(probabilities: np.ndarray, draws: int = 200, seed: int = 0) -> float:
    """Return the calibration error that these probabilities would show on average if they were right.

    It is not 0: in a bin of few expressions, the share of targets differs from the probability by chance.
    """
    random = np.random.default_rng(seed)
    truths = random.random((draws, len(probabilities))) < probabilities
    return float(np.mean([calibration_error(probabilities, truth) for truth in truths]))


def hold_out(images: Sequence[str], share: float, seed: int = 0) -> np.ndarray:
    """Return whether each expression belongs to a held-out image (expressions,); `share` of the images, by seed.

    Args:
        images: The image of each expression.
    """
    names, places = np.unique(images, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    return (order < round(share * len(names)))[places]


def expressions_needed(accuracy: float, half_width: float = 0.05) -> int:
    """Return how many independent expressions give an accuracy a 95 % interval of ± `half_width` (normal approximation).

    An accuracy of 0 or 1 is taken as 0.95: no sample shows that errors are impossible.

    >>> expressions_needed(0.5), expressions_needed(0.9)
    (385, 139)
    """
    accuracy = min(max(accuracy, 0.05), 0.95)
    return math.ceil(1.959964**2 * accuracy * (1 - accuracy) / half_width**2)
