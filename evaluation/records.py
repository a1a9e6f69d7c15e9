"""The records of evaluations: `results.json`, and their cells in every table (text, model card, page)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_scripts.files import write_json
from metrics.gres import BENCHMARK_KEYS, METRIC_KEYS, report, to_json

from .config import PROTOCOL_NOTES, EvaluationConfig
from .loop import EvaluationResult
from .measured import annotations_digest, differences, kinds_of, measured_on

RESULTS = "results.json"
Record = dict[str, Any]
# The facts that name an evaluation in a table, beside its metrics.
FACTS = ("dataset", "split", "stage", "protocol", "prompts", "threshold", "convention", "samples")


def make_record(
    result: EvaluationResult, config: EvaluationConfig, convention: str, stage: str, model: str, **more: Any
) -> Record:
    """Return one entry of `results.json`: where the numbers come from, and the numbers (null where not defined).

    Args:
        stage: "before" or "after" training, or "as loaded".
        model: The name of the model, as the user gave it.
        more: Further fields.
    """
    numbers = report(result.rows, convention)
    record = {
        "protocol": config.protocol,
        "protocol_note": PROTOCOL_NOTES[config.protocol],
        "prompts": config.prompts,
        "ignore_region": config.ignore_region,
        "convention": convention,
        "stage": stage,
        "dataset": config.dataset,
        "split": config.split,
        "samples": len(config.rows),
        "expressions": numbers["samples"],
        "kinds": kinds_of(numbers),
        "annotations": {"rows": annotations_digest(config.rows), "files": config.annotation_files},
        **{name: numbers[name] for name in ("metrics", "intervals", "breakdown", "curve", "notes")},
        "model": model,
        "seconds": round(result.seconds, 2),
    }
    if result.taken_over:
        record["taken_over"] = result.taken_over
    if config.used_threshold is not None:
        record["threshold"] = config.used_threshold
    return json.loads(to_json({**record, **more}))


def read_results(output_dir: str | Path) -> list[Record]:
    """Return the records of an output folder, none if it has no `results.json`.

    Raises:
        ValueError: The file holds something else than records.
    """
    path = Path(output_dir) / RESULTS
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        for record in records:
            record["protocol"], record["convention"], record["dataset"], record["split"], record["metrics"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no list of records ({error!r}); evaluate again.") from None
    return records


def write_results(output_dir: str | Path, records: Sequence[Record]) -> None:
    """Write `results.json`."""
    write_json(Path(output_dir) / RESULTS, list(records))


def record_key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the fields that tell evaluations apart: a later record with the same key replaces an earlier one."""
    names = ("stage", "protocol", "convention", "dataset", "split", "prompts", "ignore_region")
    threshold = record.get("threshold") if record.get("protocol") == "slots" else None
    return (*(record.get(name) for name in names), threshold)


def record_keys(config: EvaluationConfig, stage: str) -> set[tuple[Any, ...]]:
    """Return the keys of the records that an evaluation makes, one for each convention."""
    names = ("protocol", "dataset", "split", "prompts", "ignore_region")
    facts = {**{name: getattr(config, name) for name in names}, "threshold": config.used_threshold}
    return {record_key({**facts, "stage": stage, "convention": convention}) for convention in config.conventions}


def rows_name(config: EvaluationConfig, stage: str) -> str:
    """Return the name of the rows file: one for each stage, protocol, way of asking, threshold and split."""
    words = [stage, config.protocol, Path(config.dataset).name, config.split]
    words += ["one per prompt"] * config.one_prompt_per_expression
    words += ["ignored"] * (config.ignore_region == "ignored")
    words += [f"threshold {config.used_threshold}"] * bool(config.used_threshold)
    return re.sub(r"[^\w+-]+", "_", f"rows_{'_'.join(words)}") + ".jsonl"


@dataclass(frozen=True)
class MetricCell:
    """One metric of a record as every table shows it.

    Args:
        text: The value with four digits, or "-" where there is none.
        interval: Its 95 % interval, such as "0.71–0.74", or "".
        reason: Why the metric is not defined, or "".
    """

    text: str
    interval: str = ""
    reason: str = ""


def shown_keys(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the metrics that a table of records shows: those of the benchmark, and others that one of the records has."""
    values = [record["metrics"] for record in records]
    return [key for key in METRIC_KEYS if key in BENCHMARK_KEYS or any(of.get(key) is not None for of in values)]


def metric_cells(record: Mapping[str, Any], keys: Iterable[str] = METRIC_KEYS) -> dict[str, MetricCell]:
    """Return the cells of a record's metrics, by name."""
    cells = {}
    for key in keys:
        value = record["metrics"].get(key)
        low, high = (record.get("intervals") or {}).get(key) or (None, None)
        cells[key] = MetricCell(
            text="-" if value is None else f"{value:.4f}",
            interval="" if value is None or low is None else f"{low:.4f}–{high:.4f}",
            reason=(record.get("notes") or {}).get(key, "") if value is None else "",
        )
    return cells


def fact_cells(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of the facts that name a record's evaluation, by name (`FACTS`)."""
    cells = {name: "-" if record.get(name) is None else str(record[name]) for name in FACTS}
    cells["dataset"] = Path(record["dataset"]).name
    return cells


def metric_notes(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each metric that is `-` in a table, such as "N_acc on refcoco val: not defined here: ..."."""
    records = list(records)
    shown = shown_keys(records)
    sentences = (
        f"{name} on {Path(record['dataset']).name} {record['split']}: {note}"
        for record in records
        for name, note in record.get("notes", {}).items()
        if name in shown
    )
    return list(dict.fromkeys(sentences))


def protocol_notes(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the notes of the protocols that occur in the records, by protocol."""
    return {record["protocol"]: record.get("protocol_note", "") for record in records}


def summary_line(record: Record) -> str:
    """Return one record as a line, for the moment when an evaluation ends."""
    facts = fact_cells(record)
    metrics = ", ".join(f"{name} {metric_cells(record)[name].text}" for name in ("gIoU", "cIoU", "N_acc", "T_acc"))
    stage = record.get("stage") or "evaluated"
    return (
        f"{stage}: {record['protocol']} on {facts['dataset']} {record['split']}, {facts[FACTS[-1]]} images: {metrics}"
    )


def _name(record: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (record.get("stage"), record["protocol"])))


def results_table(records: Sequence[Record]) -> str:
    """Return the records as tables of plain text that fit a terminal, with the reasons of undefined metrics below them.

    Facts that all records share stand above a table. Conventions that give the same metrics share a line. The metrics that
    are not the benchmark's are a second table.
    """
    further = [key for key in shown_keys(records) if key not in BENCHMARK_KEYS]
    shared, lines = _table(records, BENCHMARK_KEYS)
    lines = shared + lines
    if further:
        above, more = _table(records, further)
        lines += ["", *(above if above != shared else []), *more]
    lines += metric_notes(records)
    lines += differences([(_name(record), record) for record in records]) or measured_on(records)
    if any(record["protocol"] == "teacher_forced" for record in records):
        lines.append(f"teacher_forced: {PROTOCOL_NOTES['teacher_forced']}")
    return "\n".join(lines)


def _table(records: Sequence[Record], keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the line of the facts that all records share, if there are some, and the lines of a table of these metrics."""
    joined: dict[tuple[str, ...], list[str]] = {}
    place = FACTS.index("convention")
    for record in records:
        cells = [*fact_cells(record).values(), *(cell.text for cell in metric_cells(record, keys).values())]
        convention = cells.pop(place)
        joined.setdefault(tuple(cells), []).append(convention)
    table = [[*FACTS[:-1], "images", *keys]]
    table += [[*cells[:place], ", ".join(dict.fromkeys(names)), *cells[place:]] for cells, names in joined.items()]
    words = len(FACTS) - 1  # the number of images and the metrics are aligned to the right
    columns = list(zip(*table))
    shared = [n for n, column in enumerate(columns[:words]) if len(joined) > 1 and len(set(column[1:])) == 1]
    above = [", ".join(f"{columns[n][0]}: {columns[n][1]}" for n in shared)] * bool(shared)
    kept = [n for n in range(len(columns)) if n not in shared]
    widths = {n: max(map(len, columns[n])) for n in kept}
    lines = ["  ".join(f"{row[n]:{'<' if n < words else '>'}{widths[n]}}" for n in kept).rstrip() for row in table]
    return above, lines
