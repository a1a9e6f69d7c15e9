"""Evaluation protocols: rows of a data set → the model's answers → one row per expression → metrics and pictures."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from data_scripts.schema import decode_mask
from data_scripts.transforms import clean_expression, escape, read_image
from metrics.gres import gres_metrics, undefined_notes

PROTOCOL_NOTES = {
    "teacher_forced": "gold answers were in the model's input (the original's published protocol)",
    "slots": "the answer's wording was given, every slot was the model's own choice",
    "generate": "answers were generated from the question alone",
}


@dataclass
class EvaluationPlan:
    """
    What to evaluate and how.

    Args:
        rows: Segmentation rows of data_scripts.
        dataset, split: Their names, for the record.
        protocol: "teacher_forced", "slots" or "generate".
        batch_size: Pictures per batch.
        one_prompt_per_expression: Ask for each expression by itself instead of all of a picture in one prompt.
        threshold: Reject a slot below these log-odds (`slots`).
        convention: Of the metrics that `evaluate_rows` returns.
        max_new_tokens: Longest answer (`generate`).
    """

    rows: Sequence[dict[str, Any]]
    dataset: str
    split: str
    protocol: str = "slots"
    batch_size: int = 16
    one_prompt_per_expression: bool = False
    threshold: float = 0.0
    convention: str = "rela"
    max_new_tokens: int = 128


@dataclass
class EvaluationResult:
    """Rows in the order of the data set, their metrics, and how long it took in seconds."""

    rows: list[dict[str, Any]]
    metrics: dict[str, float]
    seconds: float
    notes: dict[str, str] = field(default_factory=dict)


Prediction = Callable[[int, dict[str, Any], list[dict[str, Any]]], None]


@torch.no_grad()
def evaluate_rows(model, processor, plan: EvaluationPlan, on_prediction: Prediction | None = None) -> EvaluationResult:
    """
    Evaluates every expression exactly once, on however many processes.

    Batches are fixed before they are shared out among the processes, so that every batch is computed alike on one
    process and on many, and the gathered rows are identical.

    Args:
        on_prediction: Called with (index of the row, row, results of the processor) for every picture, on the process
            that evaluated it.

    Raises:
        ValueError: There is nothing to evaluate.
    """
    state = PartialState()
    if not len(plan.rows):
        raise ValueError(f"{plan.dataset} {plan.split} has no rows to evaluate.")
    begun = time.perf_counter()
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    batches = [range(n, min(n + plan.batch_size, len(plan.rows))) for n in range(0, len(plan.rows), plan.batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    found: list[tuple[int, list[dict]]] = []
    bar = tqdm(mine, f"{plan.protocol} on {plan.dataset} {plan.split}", disable=not state.is_main_process, mininterval=2)
    for batch in bar:
        rows = [_askable(plan.rows[index]) for index in batch]
        for index, row, results in zip(batch, rows, _answer(model, processor, rows, plan, device), strict=True):
            found.append((index, _metric_rows(row, results, plan)))
            if on_prediction is not None:
                on_prediction(index, row, results)
    model.train(was_training)
    gathered = gather_object(found) if state.num_processes > 1 else found
    rows = [row for _, group in sorted(gathered, key=lambda pair: pair[0]) for row in group]
    metrics = gres_metrics(rows, plan.convention)
    return EvaluationResult(rows, metrics, time.perf_counter() - begun, undefined_notes(metrics))


def _askable(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what can be asked for: blank expressions are left out, special tokens read as plain text."""
    entries = [e | {"text": escape(e["text"])} for e in row["expressions"] if clean_expression(e["text"])]
    return {**row, "expressions": entries}


def _answer(model, processor, rows, plan: EvaluationPlan, device) -> list[list[dict[str, Any]]]:
    """Per row the processor's results, one for each expression."""
    asked = [[entry["text"] for entry in row["expressions"]] for row in rows]
    kept = [n for n, texts in enumerate(asked) if texts]
    if not kept:
        return [[] for _ in rows]
    gold = None
    if plan.protocol == "teacher_forced":
        gold = [[not decode_mask(e["mask"]).any() for e in rows[n]["expressions"]] for n in kept]
    inputs = processor(
        images=[read_image(rows[n]["image"]) for n in kept],
        expressions=[asked[n] for n in kept],
        no_targets=gold,
        one_prompt_per_expression=plan.one_prompt_per_expression,
        return_tensors="pt",
    ).to(device)
    options = {}
    if plan.protocol == "slots":
        options["threshold"] = plan.threshold
    elif plan.protocol == "generate":
        options["max_new_tokens"] = plan.max_new_tokens
        options["do_sample"] = False
    outputs = model.segment(**inputs, method=plan.protocol, **options)
    results = processor.post_process_segmentation(outputs, inputs, keep_rejected_masks=True)
    per_row: list[list[dict]] = [[] for _ in rows]
    for n, entries in zip(kept, results, strict=True):
        per_row[n] = entries
    return per_row


def _metric_rows(row: dict[str, Any], results: list[dict[str, Any]], plan: EvaluationPlan) -> list[dict[str, Any]]:
    rows = []
    for entry, result in zip(row["expressions"], results, strict=True):
        truth, mask = decode_mask(entry["mask"]).astype(bool), result["mask"]
        if truth.shape != mask.shape:
            raise ValueError(
                f"The mask of {entry['text']!r} in image {row['image_id']} is {truth.shape}, its picture {mask.shape} "
                "(height, width); take picture and annotations from one release."
            )
        rows.append(
            {
                "dataset": plan.dataset,
                "split": plan.split,
                "protocol": plan.protocol,
                "prompts": "one per expression" if plan.one_prompt_per_expression else "all expressions in one",
                "image_id": row["image_id"],
                "expression": entry["text"],
                "is_no_target": not bool(truth.any()),
                "is_rejected": result["is_rejected"],
                "score": result["score"] if np.isfinite(result["score"]) else None,
                "intersection": int((mask & truth).sum()),
                "union": int((mask | truth).sum()),
                "is_malformed": result["is_malformed"],
                "num_targets": entry["num_targets"] if truth.any() else 0,
                "num_expressions": 1 if plan.one_prompt_per_expression else len(row["expressions"]),
            }
        )
    return rows


def record(result: EvaluationResult, plan: EvaluationPlan, convention: str, stage: str, model: str) -> dict[str, Any]:
    """One entry of `results.json`: where the numbers come from, and the numbers (null where not defined)."""
    metrics = gres_metrics(result.rows, convention)
    entry = {
        "protocol": plan.protocol,
        "protocol_note": PROTOCOL_NOTES[plan.protocol],
        "prompts": "one per expression" if plan.one_prompt_per_expression else "all expressions in one",
        "convention": convention,
        "stage": stage,
        "dataset": plan.dataset,
        "split": plan.split,
        "samples": len(plan.rows),
        "expressions": len(result.rows),
        "metrics": {name: None if np.isnan(value) else value for name, value in metrics.items()},
        "notes": undefined_notes(metrics),
        "model": model,
        "seconds": round(result.seconds, 2),
    }
    if plan.protocol == "slots":
        entry["threshold"] = plan.threshold
    return entry
