"""Metrics of generalized referring segmentation (GRES): pure functions over rows, with numpy only.

One row is one expression. Four fields decide every metric::

    is_no_target   bool  the expression has nothing in the image (its truth is empty)
    is_rejected    bool  the model answered [REJ] (or nothing at all) for it
    intersection   int   pixels in both prediction and truth
    union          int   pixels in prediction or truth; a slot that made no mask has an empty prediction

The other fields (`FIELDS`) name the run and allow break-downs, intervals and the rejection curve. Every metric is a
ratio of two sums over rows, and all sums are exact (integers, or `math.fsum`): the order of rows changes no digit.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from reprlib import repr as shown  # short, and safe for what is nested deeply or in itself
from typing import Any

import numpy as np

# "rela": the benchmark's own evaluator (github.com/henghuiding/ReLA, gres_model/evaluation/refer_evaluation.py).
# "gsva": eval_gres of the original GSVA (github.com/LeapLabTHU/GSVA), which it runs on sets with no-targets.
# "gsva_validate": its validate, which it runs on the RefCOCO family and ReasonSeg and which knows no rejection.
# Where every expression has a target, gsva and gsva_validate are the same number.
CONVENTIONS = ("rela", "gsva", "gsva_validate")

# Both functions of the original divide by union + 1e-5 and by count + 1e-5; the benchmark's evaluator has no epsilon.
EPSILON = {"rela": 0.0, "gsva": 1e-5, "gsva_validate": 1e-5}

PRECISION_AT = (0.7, 0.8, 0.9)  # of the benchmark's evaluator

# Metric key -> when its denominator is empty.
UNDEFINED = {
    "gIoU": "no expressions",
    "cIoU": "no pixels in any counted union",
    "N_acc": "no no-target expressions",
    "T_acc": "no expressions with a target",
    **{f"Pr@{x}": "no expressions with a target" for x in PRECISION_AT},
    "malformed": "the rows do not say which answers were malformed (field is_malformed)",
}
METRIC_KEYS = tuple(UNDEFINED)

# Rows that differ in one of these come from different runs and are never averaged together.
RUN_FIELDS = ("dataset", "split", "protocol", "prompts", "ignore_region", "threshold", "stage", "model", "convention")

REQUIRED = ("is_no_target", "is_rejected", "intersection", "union")
REQUIRED_IN_FILES = ("dataset", "split", "protocol", "image_id", "expression", *REQUIRED)


def _is_whole(value: Any, at_least: int) -> bool:
    # 2**53: up to there float64 holds every whole number, so sums of areas stay exact
    return isinstance(value, Integral) and not isinstance(value, bool) and at_least <= int(value) < 2**53


_Test = tuple[Callable[[Any], bool], str]
_FLAG: _Test = (lambda v: isinstance(v, (bool, np.bool_)), "true or false")
_AREA: _Test = (lambda v: _is_whole(v, 0), "a whole number of pixels, 0 or more")
_COUNT: _Test = (lambda v: _is_whole(v, 0), "a whole number, 0 or more")
_TEXT: _Test = (lambda v: isinstance(v, str), "a string")
_FINITE: _Test = (
    lambda v: isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v),
    "a finite number, or null for no score",
)

# Every field with a meaning here; others are carried along unread.
FIELDS: dict[str, _Test] = {
    "is_no_target": _FLAG,
    "is_rejected": _FLAG,
    "intersection": _AREA,
    "union": _AREA,
    "score": _FINITE,  # log-odds of [SEG] against [REJ]; below 0 the slot is rejected
    "is_malformed": _FLAG,  # the answer could not be read as one slot per expression
    "num_targets": _COUNT,  # annotations of the expression; 0 for a no-target
    "num_expressions": (lambda v: _is_whole(v, 1), "a whole number, 1 or more"),  # expressions in the same prompt
    "image_id": (lambda v: isinstance(v, str) or _is_whole(v, 0), "a string or a whole number"),
    "expression": _TEXT,
    **{name: _TEXT for name in RUN_FIELDS},
    # on score, where the protocol has one; older rows have none. Infinity rejects all, or nothing.
    "threshold": (lambda v: isinstance(v, Real) and not isinstance(v, bool) and not math.isnan(v), "a number"),
}


def check_row(row: Mapping[str, Any], where: str = "row", required: Iterable[str] = REQUIRED) -> None:
    """Checks one row: fields that must be there, types, and areas that can be true.

    Args:
        row: field -> value. A field of `FIELDS` that is not required may be absent or None.
        where: how to name the row in an error, such as `"rows.jsonl line 3"`.
        required: the fields that must be there.

    Raises:
        ValueError: naming the row, the field, the value and what is expected (TypeError if it has no fields at all).
    """
    required = tuple(required)
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}: expected an object with named fields, got {shown(row)}")
    missing = [name for name in required if row.get(name) is None]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}; a row needs {', '.join(required)}")
    for name, (is_right, expected) in FIELDS.items():
        value = row.get(name)
        if value is not None and not is_right(value):
            raise ValueError(f"{where}: {name} is {shown(value)} ({type(value).__name__}), expected {expected}")
    if row["intersection"] > row["union"]:
        raise ValueError(
            f"{where}: intersection {row['intersection']} is larger than union {row['union']}; "
            "union counts the pixels in prediction or truth, the intersection included"
        )
    if row["is_no_target"] and row["intersection"] > 0:
        raise ValueError(
            f"{where}: is_no_target is true but intersection is {row['intersection']}; "
            "a no-target has an empty truth, so nothing can intersect it"
        )
    # The reverse (annotations, but an empty mask) is a no-target: the original decides it by pixels.
    if row.get("num_targets") == 0 and not row["is_no_target"]:
        raise ValueError(f"{where}: num_targets is 0 but is_no_target is false")


_Columns = dict[str, np.ndarray]


def _columns(rows: Iterable[Mapping[str, Any]]) -> _Columns:
    """Checked rows as one array per field; fields that may be absent are object arrays with None."""
    if not isinstance(rows, Iterable):
        raise TypeError(f"expected rows, one mapping for each expression, got {shown(rows)}")
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
    """Metric key -> what each row adds to its numerator and to its denominator: the conventions, in one place."""
    no_target, rejected, union = columns["is_no_target"], columns["is_rejected"], columns["union"]
    target = ~no_target
    # rela: a rejected target loses its intersection and keeps its union; gsva: its mask counts all the same
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
    return {
        "gIoU": (score, np.ones(len(union))),
        "cIoU": (intersection * counted, union * counted),
        "N_acc": (no_target & rejected, no_target),
        "T_acc": (target & ~rejected, target),
        **{f"Pr@{x}": (target & (iou >= x), target) for x in PRECISION_AT},
        "malformed": (
            malformed.astype(bool),
            np.not_equal(malformed, np.array(None)),
        ),  # None: not recorded, False in both
    }


def _ratio(numerator: float, denominator: float, epsilon: float) -> float:
    return numerator / (denominator + epsilon) if denominator else math.nan


def _metrics(columns: _Columns, convention: str) -> dict[str, float]:
    return {
        key: _ratio(math.fsum(top.tolist()), math.fsum(bottom.tolist()), EPSILON[convention] if key == "gIoU" else 0.0)
        for key, (top, bottom) in _terms(columns, convention).items()
    }


def gres_metrics(rows: Iterable[Mapping[str, Any]], convention: str = "rela") -> dict[str, float]:
    """The metrics of all rows together.

    Args:
        rows: one mapping per expression with at least `is_no_target, is_rejected, intersection, union` and, for
            `malformed`, `is_malformed`.
        convention: one of `CONVENTIONS`.

    Returns:
        `{gIoU, cIoU, N_acc, T_acc, Pr@0.7, Pr@0.8, Pr@0.9, malformed}`, each between 0 and 1, or NaN where its
        denominator is empty (`undefined_notes` says why).

    Raises:
        ValueError: an unknown convention, or a row that is wrong (see `check_row`).

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
    """A sentence for each metric that is NaN: `{"N_acc": "not defined here: no no-target expressions"}`."""
    return {
        key: f"not defined here: {reason}" for key, reason in UNDEFINED.items() if math.isnan(metrics.get(key, 0.0))
    }


def _breakdown(columns: _Columns, convention: str) -> dict[str, dict[str, dict[str, Any]]]:
    num_targets = columns["num_targets"]
    kinds = np.array(
        [
            "no-target" if empty else "target" if num is None else "single-target" if num == 1 else "multi-target"
            for empty, num in zip(columns["is_no_target"], num_targets)
        ],
        dtype=object,
    )
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
    """The metrics by kind of expression and by the number of expressions in its prompt.

    Args:
        rows: as in `gres_metrics`. `num_targets` tells single-target from multi-target (without it: `target`), and
            `num_expressions` the size of the prompt (without it that part is empty).
        convention: one of `CONVENTIONS`.

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
    table = np.column_stack([part for pair in terms.values() for part in pair]).astype(float)
    if not len(table):
        return {key: (math.nan, math.nan) for key in terms}
    images = columns["image_id"]
    if any(image is None for image in images):
        cluster = np.arange(len(table))
        order = np.lexsort(table.T)
    else:
        cluster = np.unique([str(image) for image in images], return_inverse=True)[1]
        order = np.lexsort((*table.T, cluster))
        cluster = cluster[order]
    # In this order the sums per image, and the resamples after them, depend on the set of rows only.
    table = np.add.reduceat(table[order], np.flatnonzero(np.diff(cluster, prepend=-1)), axis=0)
    units = len(table)
    rng = np.random.default_rng(seed)
    drawn_sums = []
    chunk = max(1, 2_000_000 // units)  # resamples at a time, to bound memory
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(units, size=(size, units)) + units * np.arange(size)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=size * units).reshape(size, units)
        # einsum, not @: BLAS sums in another order with another number of threads
        drawn_sums.append(np.einsum("ru,ut->rt", weights.astype(float), table))
    sums = np.concatenate(drawn_sums)
    tails = [(1 - level) / 2, (1 + level) / 2]
    result = {}
    for index, key in enumerate(terms):
        top, bottom = sums[:, 2 * index], sums[:, 2 * index + 1]
        epsilon = EPSILON[convention] if key == "gIoU" else 0.0
        defined = bottom > 0
        values = top[defined] / (bottom[defined] + epsilon)
        result[key] = tuple(np.quantile(values, tails).tolist()) if len(values) else (math.nan, math.nan)
    return result


def bootstrap_intervals(
    rows: Iterable[Mapping[str, Any]],
    convention: str = "rela",
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of every metric.

    Whole images are resampled where every row has an `image_id`, since expressions of one image are not independent;
    else single rows. Resamples in which a metric is not defined are left out of its interval.

    Args:
        rows: as in `gres_metrics`.
        convention: one of `CONVENTIONS`.
        resamples: number of resamples.
        seed: of the random draws; the same seed and the same set of rows, in any order, give the same digits.
        level: coverage, 0.95 for 95 % intervals.

    Returns:
        Metric key -> (low, high); (NaN, NaN) where the metric is not defined.
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
    # A slot is rejected below the threshold: the first threshold rejects nothing, the last one everything.
    thresholds = np.unique(scores)
    thresholds = np.append(thresholds, np.nextafter(thresholds[-1], np.inf))
    rejected_empty = np.searchsorted(np.sort(scores[no_target]), thresholds)
    kept_target = positives - np.searchsorted(np.sort(scores[~no_target]), thresholds)
    # Trapezoids in whole numbers, so exact: the chance that a target outscores a no-target, a tie counting half.
    twice_area = int(np.sum(np.diff(rejected_empty) * (kept_target[:-1] + kept_target[1:])))
    # |N_acc - T_acc| and N_acc + T_acc over their common denominator, again in whole numbers
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
    """N-acc against T-acc while the rejection threshold on `score` moves.

    `score` is the log-odds of [SEG] against [REJ]: at threshold t a slot is rejected when score < t, and t = 0 is the
    model's own choice. Masks play no part.

    Args:
        rows: as in `gres_metrics`, each with a finite `score`.
        max_points: at most so many points are returned, evenly spaced by rank; area and balance use all of them.

    Returns:
        `{"area", "balance", "points", "note"}`. `area` is under T-acc as a function of N-acc: 1 is perfect, 0.5 is
        guessing. `balance` is `{"threshold", "N_acc", "T_acc"}` where N-acc and T-acc are closest (then where their
        sum is largest, then at the lowest threshold). `points` is `{"threshold", "N_acc", "T_acc"}` of equally long
        lists, thresholds rising. Where scores, no-targets or targets lack, area is NaN, balance None, and `note` says
        so; `note` also says when `is_rejected` is not `score < 0` everywhere.
    """
    return _curve(_columns(rows), max_points)


def check_together(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Checks that all rows come from one run and returns its `RUN_FIELDS`.

    Raises:
        ValueError: naming the first field in which rows differ, with its values and how many rows have each.
    """
    rows = list(rows)
    run = {}
    for field in RUN_FIELDS:
        counts = Counter(row.get(field) for row in rows)
        if len(counts) > 1:
            found = ", ".join(
                f"{'none' if value is None else repr(value)} ({count} rows)"
                for value, count in sorted(counts.items(), key=lambda item: str(item[0]))
            )
            raise ValueError(
                f"these rows do not belong together: {field} is {found}. "
                f"Give the rows of one run, or report them apart with --group-by {field}"
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
    """Everything that rows of one run tell, as one JSON-ready record (`to_json` turns NaN into null).

    Args:
        rows: as in `gres_metrics`, all of one run (`check_together`).
        convention: one of `CONVENTIONS`.
        resamples: for the 95 % intervals; 0 leaves them out.
        seed: of the bootstrap.
        max_points: of the rejection curve.

    Returns:
        `{dataset, split, protocol, ..., convention, samples, images, metrics, intervals, breakdown, curve, notes}`;
        the fields that name the run are there when the rows have them.

    Raises:
        ValueError: rows of several runs, a wrong row, an unknown convention.
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
    """`json.dumps` in strict JSON: NaN becomes null. Further arguments go to `json.dumps`.

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


def _is_whole_rle(size: Any, counts: Any) -> bool:
    """Whether pycocotools can work on an encoding: it crashes or hangs on one that is empty, cut or of another length.

    Run lengths are little-endian numbers of 5 bits per character, from the fourth on differences to the last but one
    (maskApi.c: rleToString). `data_scripts.schema.check_rle` does the same for files; this module stands alone.
    """
    if not isinstance(counts, str) or len(size) != 2 or not all(_is_whole(side, 1) for side in size):
        return False
    codes = np.frombuffer(counts.encode("ascii", "replace"), np.uint8) - np.uint8(48)
    ends = np.flatnonzero(codes < 32)
    starts = np.append(0, ends + 1)
    digits = np.diff(starts)
    if not len(ends) or starts[-1] != len(codes) or codes.max() > 63 or digits.max() > 7:
        return False
    runs = np.where(codes & 48 == 16, codes.astype(np.int64) - 32, codes & 31)
    runs = np.add.reduceat(runs << 5 * (np.arange(len(codes)) - np.repeat(starts[:-1], digits)), starts[:-1])
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return bool(runs.min() >= 0 and runs.max() < 2**32 and runs.sum() == size[0] * size[1])


def row_from_masks(
    prediction: Mapping[str, Any], reference: Mapping[str, Any], is_rejected: bool, where: str = "row"
) -> dict[str, Any]:
    """One row from two masks in COCO run-length encoding.

    Args:
        prediction: `{"size": [height, width], "counts": str}`, empty where the slot made no mask.
        reference: the same for the truth; an empty one makes the expression a no-target.
        is_rejected: the model's decision.
        where: how to name the row in an error.

    Raises:
        ValueError: something that is no mask, or two sizes.
    """
    from pycocotools import mask as coco  # only here: rows need no masks

    for name, rle in {"prediction": prediction, "reference": reference}.items():
        size = rle.get("size") if isinstance(rle, Mapping) else None
        if not isinstance(size, (list, tuple)) or not _is_whole_rle(size, rle.get("counts")):
            raise ValueError(
                f"{where}: {name} is {shown(rle)}, expected {{'size': [height, width], 'counts': str}}, a COCO run-length "
                "encoding of that size"
            )
    if list(prediction["size"]) != list(reference["size"]):
        raise ValueError(
            f"{where}: the prediction's size is {list(prediction['size'])}, the reference's {list(reference['size'])}; "
            "bring the prediction to the image's own (height, width) first"
        )
    pair = [{"size": list(rle["size"]), "counts": rle["counts"].encode()} for rle in (prediction, reference)]
    return {
        "is_no_target": int(coco.area(pair[1])) == 0,
        "is_rejected": is_rejected,
        "intersection": int(coco.area(coco.merge(pair, intersect=True))),
        "union": int(coco.area(coco.merge(pair))),
    }
