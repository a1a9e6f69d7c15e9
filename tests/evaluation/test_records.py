"""Records, their names, and the table of plain text."""

import json
import math
from dataclasses import replace

import pytest
from evaluations import config_of

from evaluation.config import EvaluationConfig, conventions_for
from evaluation.loop import evaluate_rows
from evaluation.records import make_record, record_key, record_keys, results_table, rows_name
from metrics.gres import gres_metrics

PROTOCOLS = ("teacher_forced", "slots", "generate")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_record_says_everything(model, processor, rows, protocol):
    config = config_of(rows, protocol=protocol)
    result = evaluate_rows(model, processor, config)
    entry = make_record(result, config, "rela", "before", "tiny")
    assert {
        "protocol",
        "convention",
        "stage",
        "dataset",
        "split",
        "samples",
        "metrics",
        "model",
        "seconds",
    } <= entry.keys()
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert ("gold answers were in" in entry["protocol_note"]) == (protocol == "teacher_forced")
    assert sum(part["samples"] for part in entry["breakdown"]["kind"].values()) == len(result.rows)
    assert set(entry["breakdown"]["num_expressions"]) == {"1", "2", "3", "4"}
    low, high = entry["intervals"]["gIoU"]
    assert low <= entry["metrics"]["gIoU"] <= high
    defined = {name: value for name, value in entry["metrics"].items() if value is not None}
    metrics = gres_metrics(result.rows, "rela")
    assert defined == pytest.approx({name: value for name, value in metrics.items() if not math.isnan(value)})
    assert {"REC", "IL_MCC", "N3R"} & defined.keys() and ("AUROC" in defined) == (protocol != "generate")
    if protocol == "slots":
        assert 0 <= entry["curve"]["area"] <= 1 and entry["curve"]["points"]["threshold"] and entry["threshold"] == 0


def test_a_split_without_no_targets(model, processor, reasoning):
    config = config_of(reasoning, dataset="ReasonSeg", conventions=("gsva_validate",))
    result = evaluate_rows(model, processor, config)
    entry = make_record(result, config, "gsva_validate", "as loaded", "tiny")
    assert math.isnan(result.metrics("gsva_validate")["N_acc"]) and entry["metrics"]["N_acc"] is None
    assert "not defined here" in entry["notes"]["N_acc"] and entry["metrics"]["gIoU"] is not None
    assert conventions_for("ReasonSeg", ["rela", "gsva", "gsva_validate"]) == ("rela", "gsva_validate")
    assert conventions_for("grefcoco", ["rela", "gsva"]) == ("rela", "gsva")


def test_thresholds_have_rows_files_and_records_of_their_own():
    configs = [EvaluationConfig([], "refcoco", "val", threshold=value) for value in (0.0, 25.0, -1.5)]
    names = [rows_name(config, "after") for config in configs]
    assert names == [f"rows_after_slots_refcoco_val{end}.jsonl" for end in ("", "_threshold_25_0", "_threshold_-1_5")]
    facts = {
        "protocol": "slots",
        "convention": "rela",
        "dataset": "refcoco",
        "split": "val",
        "stage": "after",
        "samples": 3,
    }
    records = [
        {**facts, "prompts": config.prompts, "threshold": config.threshold, "metrics": {"gIoU": 0.5, "N_acc": None},
         "notes": {"N_acc": "not defined here: no no-target expressions"}}
        for config in configs
    ]  # fmt: skip
    assert len({record_key(entry) for entry in records}) == 3
    given = EvaluationConfig([], "refcoco", "val", "generate", threshold=25.0)  # which has no threshold
    assert rows_name(given, "after") == "rows_after_generate_refcoco_val.jsonl"
    assert record_keys(given, "after") == record_keys(replace(given, threshold=0.0), "after")
    table = results_table(records).splitlines()
    shared = "stage: after, protocol: slots, prompts: all expressions in one, convention: rela"
    assert table[0] == f"dataset: refcoco, split: val, {shared}"
    assert table[1].split()[:2] == ["threshold", "images"] and "25.0" in table[3]
    assert len(table) == 6 and table[5] == "N_acc on refcoco val: not defined here: no no-target expressions"


def test_facts_that_all_share_stand_above_and_equal_conventions_share_a_line():
    facts = {
        "dataset": "shapes",
        "split": "test",
        "protocol": "slots",
        "samples": 9,
        "prompts": "one",
        "threshold": 0.0,
    }
    records = [
        {**facts, "stage": stage, "convention": convention, "metrics": {"gIoU": value}}
        for stage, convention, value in (("before", "rela", 0.5), ("before", "gsva", 0.5), ("after", "rela", 0.75))
    ]
    above, heading, *lines = results_table(records).splitlines()
    assert above == "dataset: shapes, split: test, protocol: slots, prompts: one, threshold: 0.0"
    assert heading.split()[:3] == ["stage", "convention", "images"]
    assert [line.split()[0] for line in lines] == ["before", "after"] and "rela, gsva" in lines[0]
    alone = results_table(records[2:]).splitlines()
    assert len(alone) == 2 and alone[1].startswith("shapes") and "0.7500" in alone[1]
    assert max(map(len, (heading, *lines))) <= 110
