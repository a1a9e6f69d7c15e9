"""GRES metrics: hand-computed tables, the original's own figures, intervals, curve, rows files and the command line."""

import io
import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT

from metrics.gres import (
    CONVENTIONS,
    METRIC_KEYS,
    bootstrap_intervals,
    box_overlap,
    breakdown,
    check_together,
    gres_metrics,
    kind_of,
    mask_box,
    plot_rejection_curves,
    read_rows,
    rejection_curve,
    report,
    row_from_masks,
    to_json,
    undefined_notes,
)

NAN = math.nan


def row(intersection, union, is_no_target=0, is_rejected=0, **more):
    flags = {"is_no_target": bool(is_no_target), "is_rejected": bool(is_rejected)}
    return {"intersection": intersection, "union": union, **flags, **more}


def file_row(*areas, **more):
    names = {"dataset": "grefcoco", "split": "val", "protocol": "slots", "image_id": "1", "expression": "a cat"}
    return {**names, **row(*areas), **more}


def write(path, rows):
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return path


# One row alone, so each line is one rule of one convention. E is the original's epsilon in both divisions.
E = 1e-5
RULES = [
    # reason, (I, U, no_target, rejected), convention, gIoU, cIoU
    ("a kept target scores its IoU", (3, 4, 0, 0), "rela", 3 / 4, 3 / 4),
    ("the original adds 1e-5 to the union and to the count", (3, 4, 0, 0), "gsva", 3 / (4 + E) / (1 + E), 3 / 4),
    ("validate counts a target as eval_gres does", (3, 4, 0, 0), "gsva_validate", 3 / (4 + E) / (1 + E), 3 / 4),
    ("rela: rejecting a target loses I and keeps U", (3, 4, 0, 1), "rela", 0, 0),
    ("gsva: the mask of a rejected target counts", (3, 4, 0, 1), "gsva", 3 / (4 + E) / (1 + E), 3 / 4),
    ("validate knows no rejection", (3, 4, 0, 1), "gsva_validate", 3 / (4 + E) / (1 + E), 3 / 4),
    ("rela: a rejected no-target scores 1 and adds no pixel", (0, 9, 1, 1), "rela", 1, NAN),
    ("gsva: so too, over count + 1e-5", (0, 9, 1, 1), "gsva", 1 / (1 + E), NAN),
    ("validate: the mask decides, whatever was rejected", (0, 9, 1, 1), "gsva_validate", 0, 0),
    ("validate: an empty mask on an empty truth scores 1", (0, 0, 1, 0), "gsva_validate", 1 / (1 + E), NAN),
    ("rela: an accepted no-target scores 0, its union counts", (0, 9, 1, 0), "rela", 0, 0),
    ("gsva: so too", (0, 9, 1, 0), "gsva", 0, 0),
    ("accepted is accepted, even with an empty mask", (0, 0, 1, 0), "rela", 0, NAN),
    ("a target whose mask and truth are both empty scores 0 in rela", (0, 0, 0, 0), "rela", 0, NAN),
]


@pytest.mark.parametrize("areas, convention, giou, ciou", [pytest.param(*r[1:], id=r[0]) for r in RULES])
def test_one_rule_at_a_time(areas, convention, giou, ciou):
    metrics = gres_metrics([row(*areas)], convention)
    assert (metrics["gIoU"], metrics["cIoU"]) == pytest.approx((giou, ciou), abs=1e-12, nan_ok=True)


# I, U, no_target, rejected: two kept targets, a rejected one, two rejected no-targets, an accepted one.
MIXED = [row(8, 10), row(7, 10), row(45, 50, 0, 1), row(0, 30, 1, 1), row(0, 0, 1, 1), row(0, 20, 1, 0)]


@pytest.mark.parametrize(
    "convention, expected",
    [
        # gIoU (.8 + .7 + 0 + 1 + 1 + 0) / 6; cIoU (8 + 7) / (10 + 10 + 50 + 20); Pr of [.8, .7, 0]
        ("rela", {"gIoU": 3.5 / 6, "cIoU": 15 / 90, "Pr@0.7": 2 / 3, "Pr@0.8": 1 / 3, "Pr@0.9": 0}),
        # the rejected target's .9 and 45 pixels come back
        (
            "gsva",
            {
                "gIoU": (8 / (10 + E) + 7 / (10 + E) + 45 / (50 + E) + 2) / (6 + E),
                "cIoU": 60 / 90,
                "Pr@0.7": 1,
                "Pr@0.8": 2 / 3,
                "Pr@0.9": 1 / 3,
            },
        ),
        # masks only: one no-target has none (1), two have some (0), and their 30 + 20 pixels join the unions
        (
            "gsva_validate",
            {"gIoU": (8 / (10 + E) + 7 / (10 + E) + 45 / (50 + E) + 1) / (6 + E), "cIoU": 60 / 120},
        ),
    ],
)
def test_mixed_rows(convention, expected):
    metrics = gres_metrics(MIXED, convention)
    assert tuple(metrics) == METRIC_KEYS
    assert metrics["N_acc"] == 2 / 3 and metrics["T_acc"] == 2 / 3
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-12)


# Foreground areas and decisions of the original on tiny random weights, and what its own functions returned for them
# (LeapLabTHU/GSVA, commit 618dc79; the values are float32 sums there, hence 1e-6).
# fmt: off
GREFCOCO = [
    (1388, 78780, 0, 1), (1267, 93870, 0, 0), (11167, 100428, 0, 1), (18548, 132352, 0, 1), (0, 38303, 1, 0),
    (7829, 99930, 0, 1), (16072, 137280, 0, 0), (4894, 69411, 0, 0), (0, 112902, 1, 0), (0, 91897, 1, 0),
    (0, 41530, 1, 0), (2439, 67801, 0, 0), (13770, 116648, 0, 0), (2315, 114567, 0, 1), (0, 107595, 1, 1),
    (8993, 124364, 0, 1), (58187, 412707, 0, 1), (14794, 270858, 0, 0), (0, 248554, 1, 0), (0, 6754, 1, 1),
    (0, 6282, 1, 0),
]
REFCOCO = [
    (2335, 101845, 0, 1), (241, 52047, 0, 1), (1176, 32113, 0, 0), (9127, 71942, 0, 1), (10564, 241649, 0, 1),
    (9028, 203660, 0, 0),
]
REASONSEG = [(2223, 39944, 0, 1), (8634, 54982, 0, 1)]
# fmt: on


@pytest.mark.parametrize(
    "areas, conventions, expected",
    [
        (
            GREFCOCO,
            ["gsva"],
            {
                "gIoU": 0.14240588247776031,
                "cIoU": 0.0685458853840828,
                "N_acc": 0.25,
                "T_acc": 0.46153846153846156,
            },
        ),
        (REFCOCO, ["gsva", "gsva_validate"], {"gIoU": 0.04651480168104172, "cIoU": 0.0461723767220974}),
        (REASONSEG, ["gsva", "gsva_validate"], {"gIoU": 0.10634253174066544, "cIoU": 0.11437330394983292}),
    ],
    ids=["eval_gres on grefcoco", "validate on refcoco", "validate on ReasonSeg"],
)
def test_figures_of_the_original(areas, conventions, expected):
    for convention in conventions:
        metrics = gres_metrics([row(*item) for item in areas], convention)
        assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-6)


SCORED = ("AUROC", "AP", "IL_MCC", "cgF1", "ECE")  # not defined for one row without a score


@pytest.mark.parametrize(
    "rows, undefined",
    [
        ([], set(METRIC_KEYS)),
        ([row(1, 2)], {"N_acc", "malformed", "REC", "N3R", *SCORED}),
        (
            [row(0, 5, 1, 0, is_malformed=True)],
            {"T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9", "pmF1", "REC", "N3R", *SCORED},
        ),
        ([row(0, 5, 1, 1)], {"cIoU", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9", "malformed", "pmF1", "REC", *SCORED}),
        ([row(1, 2, score=1.0)], {"N_acc", "malformed", "REC", "N3R", *SCORED} - {"AP", "ECE"}),
        ([row(1, 2, box_intersection=1, box_union=2)], {"N_acc", "malformed", "N3R", *SCORED}),
    ],
    ids=["no rows", "targets only", "no-targets only", "all rejected", "scored targets", "a box"],
)
def test_empty_denominators_are_nan_with_a_note(rows, undefined):
    metrics = gres_metrics(rows)
    notes = undefined_notes(metrics)
    assert {key for key, value in metrics.items() if math.isnan(value)} == undefined == set(notes)
    assert all(note.startswith("not defined here: ") for note in notes.values())
    low, high = bootstrap_intervals(rows, resamples=5)["N_acc"]
    assert math.isnan(low) == math.isnan(high) == ("N_acc" in undefined)
    assert {key for key, value in json.loads(to_json(metrics)).items() if value is None} == undefined


# no_target, rejected, I, U, score, number of targets, pixels of the boxes (both, either)
TABLE = [
    (0, 0, 9, 10, 4.0, 1, 10, 16),
    (0, 0, 6, 10, 2.0, 1, 10, 20),  # boxes overlap by exactly 1/2
    (0, 0, 8, 10, 1.0, 2, 1, 20),  # several targets: no box counts
    (0, 1, 0, 10, -1.0, 1, 16, 16),  # rejected
    (1, 1, 0, 0, -4.0, 0, 0, 0),
    (1, 0, 0, 5, 0.0, 0, 0, 7),  # kept at even odds
    (1, 0, 0, 0, 3.0, 0, 0, 0),  # kept, but without any pixel
]


def table_rows():
    names = ("is_no_target", "is_rejected", "intersection", "union", "score", "num_targets", "box_intersection")
    return [
        {**dict(zip((*names, "box_union"), values)), "is_no_target": bool(values[0]), "is_rejected": bool(values[1])}
        for values in TABLE
    ]


def test_further_metrics_by_hand():
    """One table for REC, AUROC, AP, IL_MCC, pmF1, cgF1, ECE and N3R."""
    metrics, gsva = gres_metrics(table_rows()), gres_metrics(table_rows(), "gsva")
    assert metrics["REC"] == 2 / 3 and gsva["REC"] == 1.0  # gsva counts the box of a rejected target
    # pairs (target, no-target) in order, of 12: 4 has 3, 2 has 2, 1 has 2, -1 has 1
    assert metrics["AUROC"] == pytest.approx(8 / 12)
    # from the top: 4 yes, 3 no, 2 yes, 1 yes, 0 no, -1 yes, -4 no
    assert metrics["AP"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4 + 4 / 6) / 4)
    mcc = (3 * 1 - 2 * 1) / math.sqrt(5 * 4 * 3 * 2)  # TP 3, FP 2, FN 1, TN 1
    assert metrics["IL_MCC"] == pytest.approx(mcc)
    # IoU .9, .6, .8: 3 hits at .50 to .60, 2 at .65 to .80, 1 at .85 and .90, 0 at .95; F1 = 2 hits / (3 kept + 4 targets)
    f1 = (3 * 6 / 7 + 4 * 4 / 7 + 2 * 2 / 7) / 10
    assert metrics["pmF1"] == pytest.approx(f1) and metrics["cgF1"] == pytest.approx(f1 * mcc)
    # 15 bins: 4 (.982, yes) and 3 (.953, no) share the last, all others are alone
    p = [1 / (1 + math.exp(-values[4])) for values in TABLE]
    alone = (1 - p[1]) + (1 - p[2]) + (1 - p[3]) + p[4] + p[5]
    assert metrics["ECE"] == pytest.approx((abs(p[0] + p[6] - 1) + alone) / 7)
    assert metrics["N3R"] == pytest.approx((1 + (1 - 0.5) + 0.5) / 3)
    calibrated = gres_metrics([{**row, "probability": 0.25} for row in table_rows()])
    assert calibrated["N3R"] == pytest.approx((1 + 0.75 + 0.5) / 3) and calibrated["ECE"] == pytest.approx(
        4 / 7 - 0.25
    )
    assert gsva["IL_MCC"] == metrics["IL_MCC"] and gsva["N3R"] == metrics["N3R"]


def test_boxes_end_behind_the_last_pixel():
    mask = np.zeros((4, 6), bool)
    assert mask_box(mask) == (0, 0, 0, 0)
    mask[1, 2] = True
    assert mask_box(mask) == (2, 1, 1, 1)
    mask[3, 4] = True
    assert mask_box(mask) == (2, 1, 3, 3)
    assert box_overlap(mask_box(mask), (0, 0, 3, 2)) == (1, 14)
    assert box_overlap((0, 0, 2, 2), (2, 0, 2, 2)) == (0, 8)  # boxes that touch
    assert box_overlap((0, 0, 0, 0), (0, 0, 2, 2)) == (0, 4)  # a prediction without any pixel


def test_malformed_counts_the_rows_that_say_so():
    rows = [row(1, 2, is_malformed=True), row(1, 2, is_malformed=False), row(1, 2), row(1, 2, is_malformed=None)]
    assert gres_metrics(rows)["malformed"] == 0.5


def many_rows(count=400, seed=0):
    """Rows as a model with some sense would leave them, seeded."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        empty = rng.random() < 0.3
        score = rng.gauss(-1.0 if empty else 1.5, 1.2)
        truth = 0 if empty else rng.randint(100, 9000)
        overlap = rng.randint(0, truth)
        more = {"score": score, "num_targets": 0 if empty else rng.randint(1, 3), "num_expressions": rng.randint(1, 4)}
        more |= {"box_intersection": overlap, "box_union": truth + overlap}
        rows.append(
            file_row(
                0 if score < 0 else overlap,
                truth if score < 0 else truth + rng.randint(1, 500),
                empty,
                score < 0,
                image_id=index // 3,
                expression=str(index),
                is_malformed=rng.random() < 0.1,
                **more,
            )
        )
    return rows


def test_order_changes_no_digit():
    rows = many_rows()
    expected = [to_json(report(rows, convention, resamples=50)) for convention in CONVENTIONS]
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        assert [to_json(report(rows, convention, resamples=50)) for convention in CONVENTIONS] == expected


def test_intervals_against_resampling_by_hand():
    rows = many_rows(120)
    images = {}
    for item in rows:
        images.setdefault(item["image_id"], []).append(item)
    rng = random.Random(1)
    drawn = [
        gres_metrics([item for image in rng.choices(list(images), k=len(images)) for item in images[image]])
        for _ in range(600)
    ]
    for key, (low, high) in bootstrap_intervals(rows, resamples=4000).items():
        # two independent estimates of the same quantiles, 600 draws in one of them
        values = np.array([metrics[key] for metrics in drawn])
        if key == "ECE":  # whose resamples are too high by chance
            values += gres_metrics(rows)[key] - values.mean()
        expected = np.quantile(values, [0.025, 0.975])
        assert (low, high) == pytest.approx(expected, abs=0.03), key
        assert low <= gres_metrics(rows)[key] <= high


def test_intervals_are_seeded_and_draw_whole_images():
    rows = many_rows(90)
    assert bootstrap_intervals(rows, seed=3) == bootstrap_intervals(rows, seed=3)
    assert bootstrap_intervals(rows, seed=3) != bootstrap_intervals(rows, seed=4)
    one_image = [{**item, "image_id": "same"} for item in rows]
    assert bootstrap_intervals(one_image)["T_acc"] == (gres_metrics(rows)["T_acc"],) * 2
    alone = [{name: value for name, value in item.items() if name != "image_id"} for item in rows]
    intervals = bootstrap_intervals(alone)
    assert intervals["T_acc"][0] < gres_metrics(rows)["T_acc"] < intervals["T_acc"][1]
    assert bootstrap_intervals(alone[::-1]) == intervals
    with pytest.raises(ValueError, match="resamples is 0"):
        bootstrap_intervals(rows, resamples=0)


def test_breakdown():
    rows = [
        row(1, 2, num_targets=1, num_expressions=1),
        row(3, 4, num_targets=2, num_expressions=3),
        row(0, 4, 0, 1, num_targets=3, num_expressions=3),
        row(0, 0, 1, 1, num_targets=0, num_expressions=3),
        row(0, 6, 1, 0, num_targets=1, num_expressions=1),  # an annotation without a pixel is a no-target
    ]
    parts = breakdown(rows)
    kinds = {name: (part["samples"], part["metrics"]["gIoU"]) for name, part in parts["kind"].items()}
    assert kinds == {"multi-target": (2, 3 / 8), "no-target": (2, 1 / 2), "single-target": (1, 1 / 2)}
    assert math.isnan(parts["kind"]["no-target"]["metrics"]["T_acc"])
    sizes = {name: (part["samples"], part["metrics"]["gIoU"]) for name, part in parts["num_expressions"].items()}
    assert sizes == {"1": (2, 1 / 4), "3": (3, (0.75 + 0 + 1) / 3)}
    parts = breakdown([row(1, 2), row(0, 0, 1, 1)])
    assert set(parts["kind"]) == {"target", "no-target"} and parts["num_expressions"] == {}


@pytest.mark.parametrize(
    "empty, target, area, balance",
    [
        ([-2.0, -1.0], [1.0, 2.0], 1.0, (1.0, 1.0, 1.0)),  # apart: everything right at the lowest target
        ([1.0, 2.0], [-2.0, -1.0], 0.0, (1.0, 0.0, 0.0)),  # inverted: both wrong
        ([0.5], [0.5], 0.5, (0.5, 0.0, 1.0)),  # a tie counts half and cannot be balanced; the lower threshold
        ([-1.0, 1.0], [-0.5, 2.0], 0.75, (1.0, 0.5, 0.5)),  # 3 of 4 pairs in order
        ([-1.0, 0.0, 3.0], [1.0, 2.0], 2 / 3, (2.0, 2 / 3, 1 / 2)),  # 4 of 6 pairs; |2/3 - 1/2| is the least
        ([1.0, 1.0], [0.0, 3.0], 0.5, (3.0, 1.0, 0.5)),  # (0, 1/2) is as even, (1, 1/2) is better
        ([-1.0], [0.0], 1.0, (0.0, 1.0, 1.0)),  # a score of 0 is not below 0: kept
    ],
)
def test_rejection_curve(empty, target, area, balance):
    rows = [row(0, 1, 1, s < 0, score=s) for s in empty] + [row(0, 1, 0, s < 0, score=s) for s in target]
    curve = rejection_curve(rows)
    assert curve["area"] == pytest.approx(area, abs=1e-15) and curve["note"] is None
    assert tuple(curve["balance"].values()) == pytest.approx(balance)
    points = list(zip(*curve["points"].values()))
    assert points[0][1:] == (0.0, 1.0) and points[-1][1:] == (1.0, 0.0)
    for threshold, n_acc, t_acc in points:  # every point is what the plain definition gives
        assert n_acc == sum(s < threshold for s in empty) / len(empty)
        assert t_acc == sum(s >= threshold for s in target) / len(target)


def test_rejection_curve_area_is_the_share_of_ordered_pairs_and_points_are_thinned():
    rows = [{**item, "score": round(item["score"], 1)} for item in many_rows(300)]  # rounded, for ties
    empty = [item["score"] for item in rows if item["is_no_target"]]
    target = [item["score"] for item in rows if not item["is_no_target"]]
    ordered = sum((t > e) + (t == e) / 2 for t in target for e in empty) / (len(target) * len(empty))
    few, all_points = rejection_curve(rows, max_points=5), rejection_curve(rows, max_points=10**6)
    assert few["area"] == all_points["area"] == pytest.approx(ordered, abs=1e-12)
    assert few["balance"] == all_points["balance"]
    assert [len(values) for values in few["points"].values()] == [5, 5, 5]


@pytest.mark.parametrize(
    "rows, note",
    [
        ([row(1, 2, score=1.0)], "no no-target expressions"),
        ([row(0, 0, 1, 1, score=1.0)], "no expressions with a target"),
        ([row(1, 2, score=1.0), row(0, 0, 1, 1, score=None)], "1 of 2 rows have no score"),
    ],
)
def test_rejection_curve_where_it_is_not_defined(rows, note):
    curve = rejection_curve(rows)
    assert math.isnan(curve["area"]) and curve["balance"] is None and note in curve["note"]


def test_rejection_curve_tells_when_scores_and_decisions_differ():
    rows = [row(1, 2, 0, 1, score=1.0), row(0, 0, 1, 1, score=-1.0)]
    assert rejection_curve(rows)["note"] == "is_rejected differs from score < 0 in 1 of 2 rows"


WRONG = [
    ("not an object", 7, "expected an object"),
    ("missing fields, by name", {"is_no_target": False, "is_rejected": False}, "missing intersection, union"),
    ("a null is missing", row(None, 4), "missing intersection"),
    ("negative area", row(-1, 4), "intersection is -1 .int., expected a whole number of pixels"),
    ("fractional area", row(1, 4.5), "union is 4.5 .float."),
    ("true is no area", row(True, 4), "intersection is True .bool."),
    ("intersection over union", row(5, 4), "intersection 5 is larger than union 4"),
    ("a no-target that intersects", row(2, 4, 1), "is_no_target is true but intersection is 2"),
    ("0 is no flag", {**row(1, 4), "is_rejected": 0}, "is_rejected is 0 .int., expected true or false"),
    ("text is no flag", {**row(1, 4), "is_rejected": "no"}, "is_rejected is 'no'"),
    ("NaN is no score", row(1, 4, score=NAN), "score is nan"),
    ("a target without targets", row(1, 4, num_targets=0), "num_targets is 0"),
    ("a box without the other number", row(1, 4, box_union=3), "box_intersection is None and box_union 3; give both"),
    ("a box larger than both", row(1, 4, box_intersection=4, box_union=3), "box_intersection is 4 and box_union 3"),
    ("no probability", row(1, 4, probability=1.5), "probability is 1.5"),
    ("an empty prompt", row(1, 4, num_expressions=0), "num_expressions is 0"),
    ("a split that is no text", row(1, 4, split=3), "split is 3"),
]


@pytest.mark.parametrize("wrong, message", [pytest.param(*w[1:], id=w[0]) for w in WRONG])
def test_a_wrong_row_is_named(wrong, message):
    with pytest.raises((TypeError, ValueError), match=f"row 1: .*{message}"):
        gres_metrics([row(1, 2), wrong])


def test_an_unknown_convention_is_named():
    for function in (gres_metrics, breakdown, bootstrap_intervals, report):
        with pytest.raises(ValueError, match="unknown convention 'lisa'; choose one of rela, gsva, gsva_validate"):
            function([row(1, 2)], "lisa")


def test_numpy_values_are_as_good():
    item = row(np.int64(3), np.uint8(4), score=np.float32(0.5))
    assert gres_metrics([{**item, "is_rejected": np.bool_(False)}])["gIoU"] == 0.75


def test_rows_of_several_runs_do_not_belong_together():
    rows = [file_row(1, 2), file_row(1, 2), file_row(1, 2, split="testA")]
    with pytest.raises(ValueError, match=r"split is 'testA' \(1 rows\), 'val' \(2 rows\).*--group-by split"):
        report(rows)
    with pytest.raises(ValueError, match=r"model is none \(1 rows\), 'tiny' \(1 rows\)"):
        check_together([file_row(1, 2), file_row(1, 2, model="tiny")])
    with pytest.raises(ValueError, match=r"threshold is 0.0 \(1 rows\), 25.0 \(1 rows\).*--group-by threshold"):
        report([file_row(1, 2, threshold=0.0), file_row(1, 2, threshold=25.0)])
    assert check_together(rows[:2]) == {"dataset": "grefcoco", "split": "val", "protocol": "slots"}


def test_report_says_what_must_be_said():
    item = file_row(1, 2, protocol="teacher_forced", convention="gsva")
    record = report([item, item], "rela", resamples=0)
    assert record["convention"] == "rela" and record["samples"] == 2 and record["images"] == 1
    assert "gold answers" in record["notes"]["protocol"]
    assert "recorded with gsva" in record["notes"]["convention"]
    assert set(record["notes"]) == {
        "N_acc",
        "malformed",
        "REC",
        "N3R",
        *SCORED,
        "curve",
        "protocol",
        "convention",
    }  # expressions may repeat in a split
    assert record["notes"]["N_acc"] == "not defined here: no no-target expressions"
    assert "intervals" not in record


def test_row_from_masks():
    coco = pytest.importorskip("pycocotools.mask")

    def rle(mask):
        encoded = coco.encode(np.asfortranarray(np.array(mask, dtype=np.uint8)))
        return {**encoded, "counts": encoded["counts"].decode()}

    full, left, none = rle([[1, 1], [1, 1]]), rle([[1, 0], [1, 0]]), rle([[0, 0], [0, 0]])
    assert row_from_masks(full, left, False) == row(2, 4, box_intersection=2, box_union=4)
    assert row_from_masks(none, left, True) == row(0, 2, 0, 1, box_intersection=0, box_union=2)
    assert row_from_masks(full, none, False) == row(0, 4, 1, box_intersection=0, box_union=4)
    with pytest.raises(ValueError, match=r"prediction's size is \[2, 2\], the reference's \[1, 3\]"):
        row_from_masks(full, rle([[1, 1, 1]]), False)
    with pytest.raises(ValueError, match="prediction is None"):
        row_from_masks(None, full, False)


def test_read_rows(tmp_path):
    rows = many_rows(20)
    lines = write(tmp_path / "rows.jsonl", rows)
    assert read_rows(lines) == rows
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_rows([tmp_path / "rows.parquet"]) == rows
    with pytest.raises(ValueError, match="given twice"):
        read_rows([lines, tmp_path / "." / "rows.jsonl"])
    with pytest.raises(FileNotFoundError, match="no such rows file"):
        read_rows(tmp_path / "other.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(tmp_path / "empty.jsonl")
    write(tmp_path / "lacking.jsonl", [rows[0], {k: v for k, v in rows[1].items() if k not in ("split", "union")}])
    with pytest.raises(ValueError, match="lacking.jsonl line 2: missing split, union"):
        read_rows(tmp_path / "lacking.jsonl")
    lines.write_text(lines.read_text()[:-30])
    with pytest.raises(ValueError, match="rows.jsonl line 20: not a JSON object"):
        read_rows(lines)


def test_an_expression_of_one_run_is_in_one_file(tmp_path):
    pair = [file_row(1, 2), file_row(1, 2)]  # within a file it may repeat
    first = write(tmp_path / "first.jsonl", pair)
    assert (
        read_rows(first) == pair
        and len(read_rows([first, write(tmp_path / "t.jsonl", [file_row(1, 2, threshold=2)])])) == 3
    )
    second = write(tmp_path / "second.jsonl", [file_row(1, 2, expression="a dog"), *pair])
    message = r"second.jsonl line 2: 'a cat' of image 1 \(grefcoco, val, slots\) is in .*first.jsonl too.*give one of the two"
    with pytest.raises(ValueError, match=message):
        read_rows([first, second])
    (tmp_path / "results.json").write_text(json.dumps([{"protocol": "slots"}], indent=1))
    with pytest.raises(ValueError, match="results.json: not a rows file.*rows_"):
        read_rows(tmp_path / "results.json")


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "metrics.gres", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_command_line_json(tmp_path):
    rows = many_rows(60)
    path = write(tmp_path / "rows.jsonl", rows)
    done = run(path, "--convention", "gsva", "--json", "--bootstrap", 20)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == to_json(report(rows, "gsva", resamples=20), indent=2)
    record = json.loads(done.stdout)
    assert record["metrics"] == gres_metrics(rows, "gsva")
    assert record["breakdown"]["kind"]["no-target"]["metrics"]["T_acc"] is None


def test_command_line_text_groups_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = many_rows(40)
    val = write(tmp_path / "val.jsonl", rows)
    test = write(tmp_path / "testA.jsonl", [{**item, "split": "testA"} for item in rows])
    done = run(val, test, "--json")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: these rows do not belong together: split is")
    assert "Traceback" not in done.stderr
    done = run(val, test, "--group-by", "split", "--bootstrap", 5, "--plot", tmp_path / "plots" / "curve.png")
    assert done.returncode == 0, done.stderr
    assert f"{gres_metrics(rows)['gIoU']:.4f}" in done.stdout
    assert done.stdout.index("grefcoco testA slots rela") < done.stdout.index("grefcoco val slots rela")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["curve.png"]
    assert (tmp_path / "plots" / "curve.png").read_bytes().startswith(b"\x89PNG")
    done = run(val, "--bootstrap", 0, "--plot", tmp_path / "curve.xyz")
    assert (
        done.returncode == 1
        and "curve.xyz: no picture can be written as 'xyz'" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_legend_of_the_curve_lies_below_the_axes_and_within_the_figure(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    kept = []
    save = figures.Figure.savefig
    monkeypatch.setattr(
        figures.Figure,
        "savefig",
        lambda figure, *args, **options: (kept.append(figure), save(figure, *args, **options)),
    )
    curve, empty = rejection_curve(many_rows(40)), rejection_curve([row(1, 2, score=1.0)])
    for names in (["a"], ["a_long_name " * 12 + str(n) for n in range(3)] + ["unbroken" * 20, "none"]):
        plot_rejection_curves({name: empty if name == "none" else curve for name in names}, tmp_path / "curve.png")
        figure = kept.pop()
        legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_tightbbox()
        assert 0 <= legend.x0 and legend.x1 <= figure.bbox.x1 and 0 <= legend.y0 and legend.y1 < axes.y0
        assert axes.y1 <= figure.bbox.y1 and axes.height > 4 * figure.dpi
        text = " ".join(entry.get_text() for entry in figure.legends[0].get_texts()).replace("\n", " ")
        assert text.count(f"area {curve['area']:.3f}") == len(set(names) - {"none"})
    assert "none: not defined here: no no-target expressions" in text


def test_pure_functions_bring_neither_torch_nor_evaluate():
    code = "import sys, metrics.gres; sys.exit(bool({'torch', 'evaluate', 'matplotlib'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False).returncode == 0


def test_kinds_have_one_definition():
    assert kind_of(True, None) == kind_of(True, 2) == "no-target"  # pixels decide, not the number of annotations
    assert [kind_of(False, number) for number in (None, 1, 2, 7)] == ["target", "single-target"] + ["multi-target"] * 2


def test_a_plot_goes_to_a_path_or_an_open_file(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(0, 0 if empty else 4, empty, score=score)
            for empty, score in ((True, -1.0), (False, 2.0))]  # fmt: skip
    curves = {"a run": rejection_curve(rows)}
    plot_rejection_curves(curves, tmp_path / "curve.svg")
    assert b"<svg" in (tmp_path / "curve.svg").read_bytes()
    file = io.BytesIO()
    plot_rejection_curves(curves, file)
    assert file.getvalue().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no picture can be written as 'xyz'"):
        plot_rejection_curves(curves, tmp_path / "curve.xyz")
    assert not (tmp_path / "curve.xyz").exists()


def test_masks_in_every_form_that_people_have():
    coco = pytest.importorskip("pycocotools.mask")
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 1:4] = 1
    raw = coco.encode(np.asfortranarray(mask))
    forms = [
        raw,  # bytes
        {**raw, "counts": raw["counts"].decode()},
        {"size": (4, 6), "counts": [5, 2, 2, 2, 2, 2, 9]},
        {"size": np.array([4, 6]), "counts": np.array([5, 2, 2, 2, 2, 2, 9], np.uint32)},
        mask,
        mask > 0,
        mask.astype(np.float32),
    ]
    expected = {"is_no_target": False, "is_rejected": False, "intersection": 6, "union": 6}
    expected |= {"box_intersection": 6, "box_union": 6}
    for form in forms:
        assert row_from_masks(form, forms[0], False) == row_from_masks(forms[0], form, False) == expected
    for wrong in ({"size": [4, 6], "counts": [5, 2]}, {"size": [4, 6], "counts": [-1, 25]}, mask * 255, mask[0],
                  np.full((2, 2), NAN), "masks/1.png", [[1, 1, 3, 1, 3, 3]], {"size": [4, 6], "counts": [5.5, 18.5]},
                  {"size": [4, 6], "counts": []}, {"size": [4, 6], "counts": b""}):  # fmt: skip
        with pytest.raises(ValueError, match="row: prediction is"):
            row_from_masks(wrong, raw, False)
