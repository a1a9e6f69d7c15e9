"""Metrics of generalized referring segmentation (GRES): pure functions over rows, with numpy only.

One row is one expression. Four fields decide every metric::

    is_no_target   bool  the expression has no target in the image (its true mask has no pixel)
    is_rejected    bool  the model answered [REJ] for it, or nothing
    intersection   int   pixels in both the prediction and the true mask
    union          int   pixels in the prediction or the true mask; without a mask, the prediction is empty

The other fields (`FIELDS`) identify the run and are needed for break-downs, intervals and the rejection curve. Every
metric is a ratio of two sums over rows. All sums are exact (integers, or `math.fsum`), so the order of rows does not
change any digit.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from reprlib import repr as short_repr  # short, and safe for a value that is nested deeply or contains itself
from typing import Any

import numpy as np

from .presence import count_metrics, decision_counts, rank_metrics, rejection_reliability, without_bias

# "rela": the benchmark's evaluator (github.com/henghuiding/ReLA, gres_model/evaluation/refer_evaluation.py).
# "gsva": `eval_gres` of the original GSVA (github.com/LeapLabTHU/GSVA), which it uses for sets with no-targets.
# "gsva_validate": `validate` of the original, which it uses for the RefCOCO family and ReasonSeg; without rejection.
# If every expression has a target, gsva and gsva_validate give the same numbers.
CONVENTIONS = ("rela", "gsva", "gsva_validate")

# Both functions of the original divide by union + 1e-5 and by count + 1e-5. The benchmark's evaluator has no epsilon.
EPSILON = {"rela": 0.0, "gsva": 1e-5, "gsva_validate": 1e-5}

PRECISION_AT = (0.7, 0.8, 0.9)  # as in the benchmark's evaluator

# metric -> the reason if its denominator is empty: first those of the benchmark, which every table shows
_BENCHMARK = {
    "gIoU": "no expressions",
    "cIoU": "no pixels in any counted union",
    "N_acc": "no no-target expressions",
    "T_acc": "no expressions with a target",
    **{f"Pr@{x}": "no expressions with a target" for x in PRECISION_AT},
    "malformed": "the rows do not say which answers were malformed (field is_malformed)",
}
# These need more than a decision and a mask in each row; tables show those that a record has.
_FURTHER = {
    "REC": "no single-target expressions whose rows hold boxes (fields box_intersection and box_union)",
    "AUROC": "it needs targets, no-targets and a score in every row",
    "AP": "it needs targets and a score in every row",
    "IL_MCC": "it needs targets and no-targets, rejected and kept expressions",
    "pmF1": "no expressions with a target",
    "cgF1": "IL_MCC or pmF1 is not defined",
    "ECE": "it needs a score in every row",
    "N3R": "no no-target expressions, or a kept one has no score",
}
UNDEFINED = {**_BENCHMARK, **_FURTHER}
BENCHMARK_KEYS, METRIC_KEYS = tuple(_BENCHMARK), tuple(UNDEFINED)
LOWER_IS_BETTER = ("malformed", "ECE")

# Rows that differ in one of these fields come from different runs and are never averaged together.
RUN_FIELDS = ("dataset", "split", "protocol", "prompts", "ignore_region", "threshold", "stage", "model", "convention")

REQUIRED = ("is_no_target", "is_rejected", "intersection", "union")
REQUIRED_IN_FILES = ("dataset", "split", "protocol", "image_id", "expression", *REQUIRED)


def is_whole(value: Any, at_least: int) -> bool:
    """Return whether a value is a whole number, not below `at_least`."""
    # float64 holds every whole number up to 2**53, so sums of areas stay exact
    return isinstance(value, Integral) and not isinstance(value, bool) and at_least <= int(value) < 2**53


_Test = tuple[Callable[[Any], bool], str]
_FLAG: _Test = (lambda v: isinstance(v, (bool, np.bool_)), "true or false")
_AREA: _Test = (lambda v: is_whole(v, 0), "a whole number of pixels, 0 or more")
_COUNT: _Test = (lambda v: is_whole(v, 0), "a whole number, 0 or more")
_TEXT: _Test = (lambda v: isinstance(v, str), "a string")
_FINITE: _Test = (
    lambda v: isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v),
    "a finite number, or null for no score",
)

# all fields that the metrics read; other fields are ignored
FIELDS: dict[str, _Test] = {
    "is_no_target": _FLAG,
    "is_rejected": _FLAG,
    "intersection": _AREA,
    "union": _AREA,
    "score": _FINITE,  # log-odds of [SEG] against [REJ]; a slot with a score below 0 is rejected
    # the probability that the expression is there, by the model's calibration; without it, sigmoid(score)
    "probability": (lambda v: _FINITE[0](v) and 0 <= v <= 1, "a number between 0 and 1"),
    "box_intersection": _AREA,  # pixels in both the box of the predicted mask and that of the true one
    "box_union": _AREA,
    "is_malformed": _FLAG,  # the answer did not have one slot per expression
    "num_targets": _COUNT,  # number of annotations of the expression; 0 for a no-target
    "num_expressions": (
        lambda v: is_whole(v, 1),
        "a whole number, 1 or more",
    ),  # number of expressions in the same prompt
    "image_id": (lambda v: isinstance(v, str) or is_whole(v, 0), "a string or a whole number"),
    "expression": _TEXT,
    **{name: _TEXT for name in RUN_FIELDS},
    # The threshold on score, if the protocol has one; older rows have none. Infinity rejects everything, or nothing.
    "threshold": (lambda v: isinstance(v, Real) and not isinstance(v, bool) and not math.isnan(v), "a number"),
}


def check_row(row: Mapping[str, Any], where: str = "row", required: Iterable[str] = REQUIRED) -> None:
    """Check one row: required fields, types, and consistent areas.

    Args:
        row: Field -> value. A field of `FIELDS` that is not required may be missing or None.
        where: The row's name in errors, such as `"rows.jsonl line 3"`.
        required: The fields that the row must have.

    Raises:
        ValueError: The row is wrong. The message names the row, the field, the value and the expected value.
        TypeError: The row is not a mapping.
    """
    required = tuple(required)
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}: expected an object with named fields, got {short_repr(row)}")
    missing = [name for name in required if row.get(name) is None]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}; a row needs {', '.join(required)}")
    for name, (is_right, expected) in FIELDS.items():
        value = row.get(name)
        if value is not None and not is_right(value):
            raise ValueError(f"{where}: {name} is {short_repr(value)} ({type(value).__name__}), expected {expected}")
    if row["intersection"] > row["union"]:
        raise ValueError(
            f"{where}: intersection {row['intersection']} is larger than union {row['union']}; "
            "union counts the pixels in prediction or truth, the intersection included"
        )
    box = [row.get(name) for name in ("box_intersection", "box_union")]
    if (box[0] is None) != (box[1] is None) or (box[0] is not None and box[0] > box[1]):
        raise ValueError(
            f"{where}: box_intersection is {box[0]} and box_union {box[1]}; give both, the intersection at most the union"
        )
    if row["is_no_target"] and row["intersection"] > 0:
        raise ValueError(
            f"{where}: is_no_target is true but intersection is {row['intersection']}; "
            "a no-target has an empty truth, so nothing can intersect it"
        )
    # The reverse (annotations without any pixel) is a no-target: the original decides by pixels.
    if row.get("num_targets") == 0 and not row["is_no_target"]:
        raise ValueError(f"{where}: num_targets is 0 but is_no_target is false")


_Columns = dict[str, np.ndarray]


def _columns(rows: Iterable[Mapping[str, Any]]) -> _Columns:
    """Check rows and return one array per field. Fields that may be missing are object arrays with None."""
    if not isinstance(rows, Iterable):
        raise TypeError(f"expected rows, one mapping for each expression, got {short_repr(rows)}")
    rows = list(rows)
    for index, row in enumerate(rows):
        check_row(row, f"row {index}")
    columns = {}
    for name in FIELDS:
        values = np.empty(len(rows), dtype=object)
        values[:] = [row.get(name) for row in rows]
        columns[name] = values
    for name in REQUIRED:
        columns[name] = columns[name].astype(bool if FIELDS[name] is _FLAG else np.int64)
    return columns


def _check_convention(convention: str) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; choose one of {', '.join(CONVENTIONS)}")


def _terms(columns: _Columns, convention: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return {metric: (numerators, denominators)} with one number per row. All conventions are defined here."""
    no_target, rejected, union = columns["is_no_target"], columns["is_rejected"], columns["union"]
    target = ~no_target
    # rela: a rejected target has no intersection, but its union counts. gsva: its mask counts as if it were not rejected.
    intersection = np.where(rejected, 0, columns["intersection"]) if convention == "rela" else columns["intersection"]
    iou = np.divide(intersection, union, out=np.zeros(len(union)), where=union > 0)
    score = iou if convention == "rela" else intersection / (union + EPSILON[convention])
    counted = np.ones(len(union), dtype=bool)
    if convention == "gsva_validate":
        score = np.where(union == 0, 1.0, score)
    else:
        score = np.where(no_target, rejected, score)
        counted = ~(no_target & rejected)
    malformed = columns["is_malformed"]
    probability = _probability(columns)
    reliable = not np.isnan(probability[no_target & ~rejected & (union > 0)]).any()
    single = np.array([number in (None, 1) for number in columns["num_targets"]], dtype=bool)
    boxes = target & single & np.not_equal(columns["box_union"], np.array(None))
    overlap, area = (np.where(boxes, columns[name], 0).astype(float) for name in ("box_intersection", "box_union"))
    if convention == "rela":
        overlap = np.where(rejected, 0, overlap)
    return {
        "gIoU": (score, np.ones(len(union))),
        "cIoU": (intersection * counted, union * counted),
        "N_acc": (no_target & rejected, no_target),
        "T_acc": (target & ~rejected, target),
        **{f"Pr@{x}": (target & (iou >= x), target) for x in PRECISION_AT},
        "malformed": (
            malformed.astype(bool),
            np.not_equal(malformed, np.array(None)),  # None means not recorded, which counts in neither sum
        ),
        "REC": (boxes & (2 * overlap >= area), boxes),
        "N3R": (
            np.nan_to_num(rejection_reliability(no_target, rejected, union > 0, probability)),
            no_target & reliable,
        ),
    }


def _probability(columns: _Columns) -> np.ndarray:
    """Return the probability that each expression is there (rows,), NaN where a row has neither it nor a score."""
    scores, stated = (columns[name].astype(float) for name in ("score", "probability"))  # None becomes NaN
    of_score = np.exp(-np.logaddexp(0, -scores, out=np.full(len(scores), np.nan), where=~np.isnan(scores)))
    return np.where(np.isnan(stated), of_score, stated)


def _counts(columns: _Columns) -> np.ndarray:
    """Return what each row adds to the sums of `count_metrics` (rows, counts)."""
    union, probability = columns["union"], _probability(columns)
    iou = np.divide(columns["intersection"], union, out=np.zeros(len(union)), where=union > 0)
    is_known = not np.isnan(probability).any()
    return decision_counts(columns["is_no_target"], columns["is_rejected"], iou, probability if is_known else None)


def _has_scores(columns: _Columns) -> bool:
    return not np.equal(columns["score"], np.array(None)).any()


def _ratio(numerator: float, denominator: float, epsilon: float) -> float:
    return numerator / (denominator + epsilon) if denominator else math.nan


def _metrics(columns: _Columns, convention: str) -> dict[str, float]:
    metrics = {
        key: _ratio(math.fsum(top.tolist()), math.fsum(bottom.tolist()), EPSILON[convention] if key == "gIoU" else 0.0)
        for key, (top, bottom) in _terms(columns, convention).items()
    }
    sums = np.array([[math.fsum(column) for column in _counts(columns).T.tolist()]])
    further = count_metrics(sums)
    if _has_scores(columns):
        scores, present = columns["score"].astype(float), ~columns["is_no_target"]
        further |= rank_metrics(scores, present, np.ones((1, len(scores))))
    metrics |= {key: float(value[0]) for key, value in further.items()}
    return {key: metrics.get(key, math.nan) for key in METRIC_KEYS}


def gres_metrics(rows: Iterable[Mapping[str, Any]], convention: str = "rela") -> dict[str, float]:
    """Return the metrics over all rows.

    Args:
        rows: One mapping per expression with at least `is_no_target, is_rejected, intersection, union` and, for
            `malformed`, `is_malformed`.
        convention: One of `CONVENTIONS`.

    Returns:
        The metrics by name (`METRIC_KEYS`), each between 0 and 1 (IL_MCC and cgF1 between -1 and 1), or NaN if its
        denominator is empty (`undefined_notes` gives the reason).

    Raises:
        ValueError: The convention is unknown, or a row is wrong (see `check_row`).

    Example:
        >>> kept = {"is_no_target": False, "is_rejected": False, "intersection": 3, "union": 4}
        >>> gone = {"is_no_target": True, "is_rejected": True, "intersection": 0, "union": 0}
        >>> metrics = gres_metrics([kept, gone])
        >>> metrics["gIoU"], metrics["cIoU"], metrics["N_acc"], metrics["Pr@0.8"]
        (0.875, 0.75, 1.0, 0.0)
    """
    _check_convention(convention)
    return _metrics(_columns(rows), convention)


def undefined_notes(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return a note for each metric that is NaN: `{"N_acc": "not defined here: no no-target expressions"}`."""
    return {
        key: f"not defined here: {reason}" for key, reason in UNDEFINED.items() if math.isnan(metrics.get(key, 0.0))
    }


def kind_of(is_no_target: bool, num_targets: int | None) -> str:
    """Return the kind of an expression: no-target, single-target or multi-target, or target if the number is unknown.

    Example:
        >>> kind_of(True, 0), kind_of(False, 1), kind_of(False, 2), kind_of(False, None)
        ('no-target', 'single-target', 'multi-target', 'target')
    """
    if is_no_target:
        return "no-target"
    if num_targets is None:
        return "target"
    return "single-target" if num_targets == 1 else "multi-target"


def _breakdown(columns: _Columns, convention: str) -> dict[str, dict[str, dict[str, Any]]]:
    kinds = np.array(list(map(kind_of, columns["is_no_target"], columns["num_targets"])), dtype=object)
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for field, values in {"kind": kinds, "num_expressions": columns["num_expressions"]}.items():
        result[field] = {}
        for value in sorted(set(values) - {None}):
            chosen = {name: column[values == value] for name, column in columns.items()}
            result[field][str(value)] = {
                "samples": len(chosen["union"]),
                "metrics": _metrics(chosen, convention),
            }
    return result


def breakdown(rows: Iterable[Mapping[str, Any]], convention: str = "rela") -> dict[str, dict[str, dict[str, Any]]]:
    """Return the metrics by kind of expression (`kind_of`) and by the number of expressions in the prompt.

    Args:
        rows: As in `gres_metrics`. `num_targets` distinguishes single-target from multi-target. Without
            `num_expressions`, the second part is empty.
        convention: One of `CONVENTIONS`.

    Returns:
        `{"kind": {"no-target": {"samples", "metrics"}, ...}, "num_expressions": {"1": {"samples", "metrics"}, ...}}`.
    """
    _check_convention(convention)
    return _breakdown(_columns(rows), convention)


def _bootstrap(
    columns: _Columns, convention: str, resamples: int, seed: int, level: float
) -> dict[str, tuple[float, float]]:
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples is {resamples} and level is {level}; expected at least 1, and between 0 and 1")
    terms = _terms(columns, convention)
    ratios = np.column_stack([part for pair in terms.values() for part in pair]).astype(float)
    if not len(ratios):
        return dict.fromkeys(METRIC_KEYS, (math.nan, math.nan))
    scores, present = columns["score"].astype(float), ~columns["is_no_target"]
    keys = (*ratios.T, np.nan_to_num(scores), np.nan_to_num(_probability(columns)))
    images = columns["image_id"]
    if any(image is None for image in images):
        order = np.lexsort(keys)
        cluster = np.arange(len(ratios))
    else:
        cluster = np.unique([str(image) for image in images], return_inverse=True)[1]
        order = np.lexsort((*keys, cluster))
        cluster = cluster[order]
    # With this order, the sums per image and the resamples depend only on the set of rows, not on their order.
    table = np.column_stack([ratios, _counts(columns)])[order]
    table = np.add.reduceat(table, np.flatnonzero(np.diff(cluster, prepend=-1)), axis=0)
    units, rows_at_once = len(table), max(1, 2_000_000 // len(order))  # which limits memory
    rng = np.random.default_rng(seed)
    values: dict[str, list[np.ndarray]] = {key: [] for key in METRIC_KEYS}
    chunk = max(1, 2_000_000 // units)  # resamples at a time, which limits memory
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(units, size=(size, units)) + units * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * units).reshape(size, units).astype(float)
        # einsum instead of @: the order of BLAS's sums depends on the number of threads
        sums = np.einsum("ru,ut->rt", weights, table)
        for index, key in enumerate(terms):
            top, bottom = sums[:, 2 * index], sums[:, 2 * index + 1]
            epsilon = EPSILON[convention] if key == "gIoU" else 0.0
            values[key].append(top[bottom > 0] / (bottom[bottom > 0] + epsilon))
        parts = [count_metrics(sums[:, ratios.shape[1] :])]
        if _has_scores(columns):
            for first in range(0, size, rows_at_once):
                of_rows = weights[first : first + rows_at_once, cluster]
                parts.append(rank_metrics(scores[order], present[order], of_rows))
        for part in parts:
            for key, of_part in part.items():
                values[key].append(of_part[~np.isnan(of_part)])
    tails = [(1 - level) / 2, (1 + level) / 2]
    found = {key: np.concatenate(parts) if parts else np.empty(0) for key, parts in values.items()}
    of_data = count_metrics(table[:, ratios.shape[1] :].sum(axis=0, keepdims=True))
    found["ECE"] = without_bias(found["ECE"], float(of_data["ECE"][0]))
    return {
        key: tuple(np.quantile(of_key, tails).tolist()) if len(of_key) else (math.nan, math.nan)
        for key, of_key in found.items()
    }


def bootstrap_intervals(
    rows: Iterable[Mapping[str, Any]],
    convention: str = "rela",
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals of every metric.

    Whole images are resampled if every row has an `image_id`, since expressions about one image are not independent; else
    single rows. Resamples in which a metric is not defined do not count in its interval.

    Args:
        rows: As in `gres_metrics`.
        convention: One of `CONVENTIONS`.
        resamples: The number of resamples.
        seed: Seed of the random draws. The same seed and the same set of rows, in any order, give the same digits.
        level: Coverage, 0.95 for 95 % intervals.

    Returns:
        Metric -> (low, high), or (NaN, NaN) if the metric is not defined.

    Raises:
        ValueError: As `gres_metrics`, or `resamples` or `level` is out of range.
    """
    _check_convention(convention)
    return _bootstrap(_columns(rows), convention, resamples, seed, level)


def _curve(columns: _Columns, max_points: int) -> dict[str, Any]:
    if max_points < 2:
        raise ValueError(f"max_points is {max_points}; a curve needs at least 2")
    no_target, scores = columns["is_no_target"], columns["score"]
    lacking = sum(score is None for score in scores)
    negatives, positives = int(no_target.sum()), int((~no_target).sum())
    reason = None
    if lacking:
        reason = f"{lacking} of {len(scores)} rows have no score"
    elif not negatives:
        reason = UNDEFINED["N_acc"]
    elif not positives:
        reason = UNDEFINED["T_acc"]
    if reason:
        empty: dict[str, list[float]] = {"threshold": [], "N_acc": [], "T_acc": []}
        return {"area": math.nan, "balance": None, "points": empty, "note": f"not defined here: {reason}"}
    scores = scores.astype(float)
    # A slot is rejected if its score is below the threshold: the first threshold rejects nothing, the last one everything.
    thresholds = np.unique(scores)
    thresholds = np.append(thresholds, np.nextafter(thresholds[-1], np.inf))
    rejected_empty = np.searchsorted(np.sort(scores[no_target]), thresholds)
    kept_target = positives - np.searchsorted(np.sort(scores[~no_target]), thresholds)
    # Trapezoids in whole numbers are exact: the chance that a target scores above a no-target; a tie counts half.
    twice_area = int(np.sum(np.diff(rejected_empty) * (kept_target[:-1] + kept_target[1:])))
    # |N_acc - T_acc| and N_acc + T_acc times their common denominator, also in whole numbers
    gap = np.abs(rejected_empty * positives - kept_target * negatives)
    both = rejected_empty * positives + kept_target * negatives
    best = np.lexsort((thresholds, -both, gap))[0]
    chosen = np.unique(np.linspace(0, len(thresholds) - 1, min(max_points, len(thresholds))).round().astype(int))
    values = {"threshold": thresholds, "N_acc": rejected_empty / negatives, "T_acc": kept_target / positives}
    differing = int(np.sum(columns["is_rejected"] != (scores < 0)))
    note = f"is_rejected differs from score < 0 in {differing} of {len(scores)} rows" if differing else None
    return {
        "area": twice_area / (2 * negatives * positives),
        "balance": {name: float(value[best]) for name, value in values.items()},
        "points": {name: value[chosen].tolist() for name, value in values.items()},
        "note": note,
    }


def rejection_curve(rows: Iterable[Mapping[str, Any]], max_points: int = 201) -> dict[str, Any]:
    """Return the curve of N-acc against T-acc over all rejection thresholds on `score`.

    `score` is the log-odds of [SEG] against [REJ]. At threshold t, a slot is rejected if score < t; the model's decision is
    t = 0. Masks are not used.

    Args:
        rows: As in `gres_metrics`, each with a finite `score`.
        max_points: The largest number of points to return, evenly spaced by rank. Area and balance use all points.

    Returns:
        `{"area", "balance", "points", "note"}`. `area` is the area under T-acc as a function of N-acc: 1 is perfect, 0.5
        is chance. `balance` is `{"threshold", "N_acc", "T_acc"}` at the threshold where N-acc and T-acc are closest (of
        several, where their sum is largest, then the lowest). `points` is `{"threshold", "N_acc", "T_acc"}` with lists of
        one length, in order of threshold. Without scores, no-targets or targets, area is NaN and balance None, and `note`
        gives the reason. `note` also says whether `is_rejected` differs from `score < 0`.
    """
    return _curve(_columns(rows), max_points)


def check_together(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Check that all rows come from one run, and return the run's `RUN_FIELDS`.

    Raises:
        ValueError: Rows differ. The message names the first such field, its values and their numbers of rows.
    """
    rows = list(rows)
    run = {}
    for field in RUN_FIELDS:
        counts = Counter(row.get(field) for row in rows)
        if len(counts) > 1:
            values = ", ".join(
                f"{'none' if value is None else repr(value)} ({count} rows)"
                for value, count in sorted(counts.items(), key=lambda item: str(item[0]))
            )
            raise ValueError(
                f"these rows do not belong together: {field} is {values}. "
                f"Give the rows of one run, or report the runs separately with --group-by {field}"
            )
        value = next(iter(counts), None)
        if value is not None:
            run[field] = value
    return run


def report(
    rows: Iterable[Mapping[str, Any]],
    convention: str = "rela",
    resamples: int = 1000,
    seed: int = 0,
    max_points: int = 201,
) -> dict[str, Any]:
    """Return metrics, intervals, break-down and curve of one run as a record that `to_json` can write.

    Args:
        rows: As in `gres_metrics`, all of one run (`check_together`).
        convention: One of `CONVENTIONS`.
        resamples: The number of resamples for the 95 % intervals; 0 leaves them out.
        seed: Seed of the bootstrap.
        max_points: The largest number of points of the rejection curve.

    Returns:
        `{dataset, split, protocol, ..., convention, samples, images, metrics, intervals, breakdown, curve, notes}`. The
        fields that identify the run are those that the rows have.

    Raises:
        ValueError: The rows are of several runs, a row is wrong, or the convention is unknown.
    """
    rows = list(rows)
    _check_convention(convention)
    columns = _columns(rows)
    run = check_together(rows)
    recorded = run.pop("convention", convention)
    metrics = _metrics(columns, convention)
    curve = _curve(columns, max_points)
    images = columns["image_id"]
    notes = undefined_notes(metrics)
    if curve["note"]:
        notes["curve"] = curve["note"]
    if recorded != convention:
        notes["convention"] = f"the rows were recorded with {recorded}, computed here with {convention}"
    if run.get("protocol") == "teacher_forced":
        notes["protocol"] = "teacher_forced: the gold answers, with gold [SEG] and [REJ], were in the model's input"
    record: dict[str, Any] = {
        **run,
        "convention": convention,
        "samples": len(rows),
        "images": None if any(image is None for image in images) else len({str(image) for image in images}),
        "metrics": metrics,
    }
    if resamples:
        record["intervals"] = {
            "level": 0.95,
            "resamples": resamples,
            "seed": seed,
            "unit": "image" if record["images"] else "expression",
            **{key: list(pair) for key, pair in _bootstrap(columns, convention, resamples, seed, 0.95).items()},
        }
    return {**record, "breakdown": _breakdown(columns, convention), "curve": curve, "notes": notes}


def to_json(value: Any, **kwargs: Any) -> str:
    """Return `value` as strict JSON, with null for NaN. Further arguments go to `json.dumps`.

    Example:
        >>> to_json({"N_acc": float("nan"), "T_acc": 1.0})
        '{"N_acc": null, "T_acc": 1.0}'
    """

    def clean(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: clean(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [clean(inner) for inner in item]
        return None if isinstance(item, float) and math.isnan(item) else item

    return json.dumps(clean(value), allow_nan=False, **kwargs)
