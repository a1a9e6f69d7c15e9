"""The GRES metrics as an `evaluate` module, loaded from its folder without a network."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT

evaluate = pytest.importorskip("evaluate")

FOLDER = str(ROOT / "metrics" / "gres")
# one kept target, one rejected no-target, one rejected target
COLUMNS = {
    "intersection": [3, 0, 0],
    "union": [4, 0, 8],
    "is_no_target": [False, True, False],
    "is_rejected": [False, True, True],
}
RELA_GIOU = (0.75 + 1 + 0) / 3


@pytest.fixture
def load(tmp_path):
    def load_module(*arguments, **options):
        return evaluate.load(FOLDER, *arguments, cache_dir=str(tmp_path), **options)

    return load_module


def test_compute_in_one_call(load):
    metrics = load().compute(**COLUMNS, convention="rela")
    assert metrics["gIoU"] == RELA_GIOU and metrics["cIoU"] == 3 / 12
    assert metrics["N_acc"] == 1.0 and metrics["T_acc"] == 0.5
    assert math.isnan(metrics["malformed"]) and "malformed" in metrics["notes"]
    assert load().compute(**COLUMNS, is_malformed=[True, False, False])["malformed"] == 1 / 3


def test_add_and_add_batch(load):
    metric = load()
    metric.add_batch(**{name: np.array(values[:2]) for name, values in COLUMNS.items()})
    metric.add(intersection=0, union=8, is_no_target=False, is_rejected=True, is_malformed=True)
    metrics = metric.compute()
    assert metrics["gIoU"] == RELA_GIOU and metrics["malformed"] == 1.0  # of the one row that says
    # nothing is left over for the next round, nor for another convention
    assert metric.compute(**COLUMNS, convention="gsva")["gIoU"] == pytest.approx(
        (3 / (4 + 1e-5) + 1 + 0) / (3 + 1e-5), abs=1e-12
    )
    with pytest.raises(ValueError, match="unknown convention 'lisa'"):
        load().compute(**COLUMNS, convention="lisa")


def test_combine(load):
    both = evaluate.combine({"first": load(experiment_id="one"), "second": load(experiment_id="two")})
    without = dict.fromkeys(["is_malformed", "score", "probability", "num_targets", "box_intersection", "box_union"])
    both.add_batch(**COLUMNS, **without)
    both.add(intersection=1, union=2, is_no_target=False, is_rejected=False, **without)
    metrics = both.compute()
    assert metrics["first_gIoU"] == metrics["second_gIoU"] == (0.75 + 1 + 0 + 0.5) / 4


def test_masks(load):
    coco = pytest.importorskip("pycocotools.mask")

    def rle(mask):
        encoded = coco.encode(np.asfortranarray(np.array(mask, dtype=np.uint8)))
        return {**encoded, "counts": encoded["counts"].decode()}

    top, left, none = rle([[1, 1], [0, 0]]), rle([[1, 0], [1, 0]]), rle([[0, 0], [0, 0]])
    metric = load("masks")
    metric.add(prediction=top, reference=left, is_rejected=False)
    metrics = metric.compute(predictions=[none], references=[none], is_rejected=[True])
    assert metrics["gIoU"] == (1 / 3 + 1) / 2 and metrics["cIoU"] == 1 / 3 and metrics["N_acc"] == 1.0
    with pytest.raises(ValueError, match="entry 1 of the batch: reference is"):
        load("masks").add_batch(predictions=[top, top], references=[left, {"size": [2]}], is_rejected=[False, False])
    with pytest.raises(ValueError, match="unknown config_name 'boxes'"):
        load("boxes")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"union": None}, "missing: union"),
        ({"areas": [1, 2, 3]}, "unknown: areas"),
        ({"union": [4, 0]}, "lengths are"),
        ({"is_rejected": [False, "no", True]}, "entry 1 of the batch: is_rejected is 'no'"),
        ({"intersection": [0.5, 0, 0]}, "entry 0 of the batch: intersection is 0.5"),
    ],
)
def test_wrong_columns_are_named(load, change, message):
    with pytest.raises(ValueError, match=message):
        load().add_batch(**{**COLUMNS, **change})


def test_two_processes_count_every_row_once(tmp_path):
    # uneven parts, then a process without any row
    code = f"""
import sys
import evaluate
rank = int(sys.argv[1])
for split in (2, 3):
    metric = evaluate.load({FOLDER!r}, num_process=2, process_id=rank, experiment_id=f"at{{split}}", cache_dir=sys.argv[2])
    part = slice(0, split) if rank == 0 else slice(split, None)
    metric.add_batch(**{{name: values[part] for name, values in {COLUMNS!r}.items()}})
    result = metric.compute()
    print(None if result is None else result["gIoU"])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [stdout.split() for stdout, _ in outputs] == [[str(RELA_GIOU)] * 2, ["None"] * 2]


def test_masks_as_pycocotools_and_numpy_give_them(load):
    coco = pytest.importorskip("pycocotools.mask")
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 1:4] = 1
    raw = coco.encode(np.asfortranarray(mask))
    metric = load("masks")
    metric.add_batch(
        predictions=[raw, mask > 0, {"size": [4, 6], "counts": [5, 2, 2, 2, 2, 2, 9]}, None],
        references=[mask > 0, raw, raw, None],
        is_rejected=[False, False, False, True],
    )
    metric.add(prediction=None, reference=raw, is_rejected=True)
    metric.add(prediction=raw, reference=None, is_rejected=False)
    metrics = metric.compute()
    assert metrics["gIoU"] == pytest.approx(4 / 6) and metrics["cIoU"] == pytest.approx(18 / 30)
    assert (metrics["N_acc"], metrics["T_acc"]) == (0.5, 0.75)
    batch = np.stack([mask > 0] * 2)
    assert load("masks").compute(predictions=batch, references=[raw, None], is_rejected=[False, True])["gIoU"] == 1.0
    with pytest.raises(ValueError, match="entry 0 of the batch: prediction is"):
        load("masks").add(prediction="a.png", reference=raw, is_rejected=False)
