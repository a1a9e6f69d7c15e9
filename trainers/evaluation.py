"""Evaluation protocols: rows of a data set → the model's answers → one row per expression → metrics."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from data_scripts.schema import decode_mask, encode_mask
from data_scripts.transforms import clean_expression, escape, read_image
from metrics.gres import gres_metrics, report, to_json, undefined_notes

from .arguments import IGNORE_REGIONS, TASKS
from .kept_rows import KeptRows

PROTOCOL_NOTES = {
    "teacher_forced": "gold answers were in the model's input (the original's published protocol)",
    "slots": "the answer's wording was given, every slot was the model's own choice",
    "generate": "answers were generated from the question alone",
}
# Sets that the original scores with its `validate`, which knows no rejection, and not with `eval_gres`.
SCORED_BY_VALIDATE = ("refclef", "refcoco", "refcoco+", "refcocog", "ReasonSeg")


@contextmanager
def cpu_threads(count: int):
    """Computes with so many threads where there is no accelerator, and puts the number back afterwards."""
    before = torch.get_num_threads()
    if PartialState().device.type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        threads: CPU threads of each process. With as many on every process sums come in the same order, and rows are
            the same to the last digit on any number of processes.
        ignore_region: What pixels are that the data set (ReasonSeg) says not to count: "foreground", as the original's
            `.bool()` makes them (quirk Q5, which changes published numbers), or "ignored", left out, as LISA does.
        task: "referring", or "reasoning": only the first text of each picture is asked for, as a phrase or a sentence
            (quirk Q6). By default as the data set's name says.
        keep_masks: Rows hold the prediction's run-length encoding as `prediction`.
        rows_file: JSON lines that the rows are written to; finished batches lie beside it meanwhile.
        save_masks: Whether `prediction` is also in that file.
        resume: Continue what a killed evaluation left beside `rows_file`.
        labels: Further fields of every row, such as `stage` and `model`.
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
    threads: int = 1
    ignore_region: str = "foreground"
    task: str | None = None
    keep_masks: bool = False
    rows_file: Path | None = None
    save_masks: bool = False
    resume: bool = False
    labels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.task = self.task or ("reasoning" if "reasonseg" in Path(self.dataset).name.lower() else "referring")
        for name, known in (("protocol", PROTOCOL_NOTES), ("ignore_region", IGNORE_REGIONS), ("task", TASKS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(known)}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} evaluates nothing; give 1 or more.")

    @property
    def prompts(self) -> str:
        return "one per expression" if self.one_prompt_per_expression else "all expressions in one"


def conventions_for(dataset: str, names: Sequence[str]) -> list[str]:
    """The conventions to report of a data set: "gsva" is the function that the original uses on it.

    >>> conventions_for("refcoco+", ["rela", "gsva"])
    ['rela', 'gsva_validate']
    """
    validated = Path(dataset).name in SCORED_BY_VALIDATE
    return list(dict.fromkeys("gsva_validate" if name == "gsva" and validated else name for name in names))


@dataclass
class EvaluationResult:
    """
    Rows in the order of the data set, their metrics, and how long this start took in seconds.

    `pictures` holds the rows of each picture; `taken_over` is how many of them an earlier, killed start had evaluated.
    """

    pictures: list[list[dict[str, Any]]]
    metrics: dict[str, float]
    seconds: float
    notes: dict[str, str] = field(default_factory=dict)
    taken_over: int = 0

    @property
    def has_masks(self) -> bool:
        return all("prediction" in row for row in self.rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for rows in self.pictures for row in rows]


Prediction = Callable[[int, dict[str, Any], list[dict[str, Any]]], None]


@torch.no_grad()
def evaluate_rows(model, processor, plan: EvaluationPlan, on_prediction: Prediction | None = None) -> EvaluationResult:
    """
    Evaluates every expression exactly once, on however many processes.

    Batches are fixed before they are shared out among the processes, so that every batch is computed alike on one
    process and on many, before a kill or after, and the gathered rows are identical.

    Args:
        on_prediction: Called with (index of the row, row as it was asked, results of the processor) for every picture
            that is evaluated now, on the process that does it.

    Raises:
        ValueError: There is nothing to evaluate, the model and the processor do not belong together, or what was begun
            is not what shall be continued.
    """
    state = PartialState()
    if not len(plan.rows):
        raise ValueError(f"{plan.dataset} {plan.split} has no rows to evaluate.")
    check_slot_tokens(model, processor)
    if "expressions" not in plan.rows[0]:
        raise ValueError(f"{plan.dataset} {plan.split} has no expressions to evaluate; choose a segmentation set.")
    begun = time.perf_counter()
    was_training = model.training
    model.eval()
    batches = [range(n, min(n + plan.batch_size, len(plan.rows))) for n in range(0, len(plan.rows), plan.batch_size)]
    kept = KeptRows(plan.rows_file, state.process_index) if plan.rows_file is not None else None
    finished = _begin(kept, model, processor, plan, state) if kept is not None else {}
    if kept is not None and finished is None:  # complete before
        pictures = _by_picture(kept.read(), plan)
        return _result(pictures, plan, begun, len(plan.rows))
    if finished and state.is_main_process:
        print(f"{plan.rows_file}: {len(finished)} of {len(batches)} batches were finished, going on", flush=True)
    mine = [n for n in range(len(batches)) if n not in finished][state.process_index :: state.num_processes]
    found: list[tuple[int, list[list[dict]]]] = []
    bar = tqdm(
        mine, f"{plan.protocol} on {plan.dataset} {plan.split}", disable=not state.is_main_process, mininterval=2
    )
    for number in bar:
        rows = [askable(plan.rows[index], plan) for index in batches[number]]
        with cpu_threads(plan.threads):
            answers = _answer_rows(model, processor, rows, plan)
        pictures = [_metric_rows(row, results, plan) for row, results in zip(rows, answers, strict=True)]
        for index, row, results in zip(batches[number], rows, answers):
            if on_prediction is not None:
                on_prediction(index, row, results)
        found.append((number, pictures))
        if kept is not None:
            kept.add(number, pictures)
    model.train(was_training)
    gathered = gather_object(found) if state.num_processes > 1 else found
    every = sorted([*finished.items(), *gathered], key=lambda pair: pair[0])
    if [number for number, _ in every] != list(range(len(batches))):
        raise RuntimeError(
            f"Evaluated the batches {[number for number, _ in every]}, not each of {len(batches)} once."
        )
    pictures = [rows for _, batch in every for rows in batch]
    taken_over = sum(len(batches[number]) for number in finished)
    result = _result(pictures, plan, begun, taken_over)
    if kept is not None and state.is_main_process:
        hidden = set() if plan.save_masks else {"prediction"}
        kept.write({name: value for name, value in row.items() if name not in hidden} for row in result.rows)
    return result


def _result(pictures, plan: EvaluationPlan, begun: float, taken_over: int) -> EvaluationResult:
    metrics = gres_metrics([row for rows in pictures for row in rows], plan.convention)
    return EvaluationResult(pictures, metrics, time.perf_counter() - begun, undefined_notes(metrics), taken_over)


def _begin(kept: KeptRows, model, processor, plan: EvaluationPlan, state: PartialState):
    """What `KeptRows.begin` says, on every process; its error, too."""
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            answer = [kept.begin(fingerprint(model, processor, plan), plan.resume)]
        except ValueError as error:
            answer = [error]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], ValueError):
        raise answer[0]
    return answer[0]


def _by_picture(rows: list[dict[str, Any]], plan: EvaluationPlan) -> list[list[dict[str, Any]]]:
    """Rows of a finished evaluation, in the data set's order, as one list for each picture."""
    rest, pictures = iter(rows), []
    for row in _without_pictures(plan.rows):
        pictures.append([next(rest) for _ in askable(row, plan)["expressions"]])
    return pictures


def check_slot_tokens(model, processor) -> None:
    """Raises ValueError for a model that cannot say `[SEG]` or `[REJ]`, or means other tokens by them."""
    config, size = model.config, model.get_output_embeddings().weight.shape[0]
    for token, name in (("[SEG]", "seg_token_id"), ("[REJ]", "rej_token_id")):
        known, read = getattr(config, name, None), getattr(processor, name, None)
        if known is None or known >= size:
            raise ValueError(
                f"The model has no {token} in its vocabulary ({name}={known}, {size} output tokens), so it cannot "
                f"{'reject' if token == '[REJ]' else 'segment'}; add the token and train it, or take a GSVA model."
            )
        if known != read:
            raise ValueError(
                f"The model means token {known} by {token}, the processor {read}; load both from one directory."
            )


def askable(row: dict[str, Any], plan: EvaluationPlan) -> dict[str, Any]:
    """The row with what is asked for: blank expressions are left out, special tokens read as plain text."""
    # of ReasonSeg's texts only the first is evaluated (Q6, as the original and LISA)
    entries = row["expressions"][:1] if plan.task == "reasoning" else row["expressions"]
    return {**row, "expressions": [e | {"text": escape(e["text"])} for e in entries if clean_expression(e["text"])]}


def truth_of(entry: dict[str, Any], ignore_region: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The true mask (height, width) of an expression, and the pixels that count (None: all of them)."""
    truth, ignore = decode_mask(entry["mask"]).astype(bool), entry.get("ignore_mask")
    if ignore is None:
        return truth, None
    ignore = decode_mask(ignore).astype(bool)
    return (truth | ignore, None) if ignore_region == "foreground" else (truth & ~ignore, ~ignore)


def _prompt(row: dict[str, Any], plan: EvaluationPlan) -> str:
    if plan.task == "referring":
        return "refer"
    return "reason_sentence" if row["expressions"][0]["is_sentence"] else "reason_phrase"


def answer(
    model, processor, images, expressions, plan: EvaluationPlan, no_targets=None, prompt: str = "refer"
) -> list[list[dict[str, Any]]]:
    """The processor's results for the expressions of each picture, answered as the plan says."""
    options: dict[str, Any] = {}
    if plan.protocol == "slots":
        options["threshold"] = plan.threshold
    elif plan.protocol == "generate":
        options["max_new_tokens"] = plan.max_new_tokens
        options["do_sample"] = False
    inputs = processor(
        images=images,
        expressions=expressions,
        no_targets=no_targets,
        prompt=prompt,
        one_prompt_per_expression=plan.one_prompt_per_expression,
        return_tensors="pt",
    ).to(next(model.parameters()).device)
    outputs = model.segment(**inputs, method=plan.protocol, **options)
    return processor.post_process_segmentation(outputs, inputs, keep_rejected_masks=plan.protocol == "teacher_forced")


def _answer_rows(model, processor, rows, plan: EvaluationPlan) -> list[list[dict[str, Any]]]:
    """Per row the results, one for each expression. Rows with one kind of prompt are answered together."""
    per_row: list[list[dict]] = [[] for _ in rows]
    groups: dict[str, list[int]] = {}
    for n, row in enumerate(rows):
        if row["expressions"]:
            groups.setdefault(_prompt(row, plan), []).append(n)
    for prompt, group in groups.items():
        gold = None
        if plan.protocol == "teacher_forced":
            gold = [[not truth_of(e, plan.ignore_region)[0].any() for e in rows[n]["expressions"]] for n in group]
        images = [read_image(rows[n]["image"]) for n in group]
        expressions = [[entry["text"] for entry in rows[n]["expressions"]] for n in group]
        for n, results in zip(group, answer(model, processor, images, expressions, plan, gold, prompt), strict=True):
            per_row[n] = results
    return per_row


def _metric_rows(row: dict[str, Any], results: list[dict[str, Any]], plan: EvaluationPlan) -> list[dict[str, Any]]:
    rows = []
    for entry, result in zip(row["expressions"], results, strict=True):
        truth, counted = truth_of(entry, plan.ignore_region)
        mask = prediction = result["mask"]
        if truth.shape != mask.shape:
            raise ValueError(
                f"The mask of {entry['text']!r} in image {row['image_id']} is {truth.shape}, its picture {mask.shape} "
                "(height, width); take picture and annotations from one release."
            )
        if counted is not None:
            mask = mask & counted
        rows.append(
            {
                "dataset": plan.dataset,
                "split": plan.split,
                "protocol": plan.protocol,
                "prompts": plan.prompts,
                "ignore_region": plan.ignore_region,
                **({"threshold": plan.threshold} if plan.protocol == "slots" else {}),
                **plan.labels,
                "image_id": row["image_id"],
                "expression": entry["text"],
                "is_no_target": not bool(truth.any()),
                "is_rejected": result["is_rejected"],
                "score": result["score"] if np.isfinite(result["score"]) else None,
                "intersection": int((mask & truth).sum()),
                "union": int((mask | truth).sum()),
                "is_malformed": result["is_malformed"],
                "num_targets": (entry["num_targets"] or 1) if truth.any() else 0,
                "num_expressions": 1 if plan.one_prompt_per_expression else len(row["expressions"]),
            }
        )
        if plan.keep_masks or plan.rows_file is not None:
            rows[-1]["prediction"] = encode_mask(prediction)
    return rows


def as_results(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that hold their `prediction` as the processor's results, for drawing."""
    return [
        {
            "text": row["expression"],
            "mask": decode_mask(row["prediction"]).astype(bool),
            "is_rejected": row["is_rejected"],
            "score": np.nan if row["score"] is None else row["score"],
            "is_malformed": row["is_malformed"],
        }
        for row in rows
    ]


def _without_pictures(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The rows with their pictures as they are stored, not decoded."""
    return rows.cast_column("image", datasets.Image(decode=False)) if isinstance(rows, datasets.Dataset) else rows


def _digest(*pieces: bytes) -> str:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()[:16]


def _as_bytes(picture: Any) -> bytes:
    """A stored picture for the fingerprint: its bytes, or those of its file."""
    if not isinstance(picture, dict):
        return picture.tobytes()
    if picture["bytes"] is not None:
        return picture["bytes"]
    return Path(picture["path"]).read_bytes() if os.path.exists(picture["path"]) else b"missing"


def fingerprint(model, processor, plan: EvaluationPlan) -> dict[str, Any]:
    """Everything that rows depend on, by name; the data, the model and the processor as digests."""
    data, weights = hashlib.sha256(), hashlib.sha256()
    for row in _without_pictures(plan.rows):
        facts = {name: value for name, value in row.items() if name != "image"}
        data.update(json.dumps(facts, sort_keys=True, default=str).encode() + _as_bytes(row["image"]))
    for name, value in model.state_dict().items():
        name = getattr(model, "saved_name", str)(
            name
        )  # as it was when evaluations were begun before there were other bases
        weights.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if value.device.type != "meta":  # a sample, since all of 7 billion weights would take minutes
            weights.update(value.detach().flatten()[:: max(value.numel() // 64, 1)].float().cpu().numpy().tobytes())
    tokenizer = processor.tokenizer
    tokens = [sorted(tokenizer.get_vocab().items()), repr(sorted(tokenizer.added_tokens_decoder.items()))]
    wording = [processor.prompts, processor.chat_template, processor.image_processor.to_dict(), tokens]
    options = {
        name: getattr(plan, name) for name in ("dataset", "split", "protocol", "prompts", "ignore_region", "task")
    }
    if plan.protocol == "slots":
        options["threshold"] = plan.threshold
    elif plan.protocol == "generate":
        options["max_new_tokens"] = plan.max_new_tokens
        options["generation_config"] = _digest(model.generation_config.to_json_string().encode())
    config = model.config
    parts = (config.text_config, config.vision_config, config.sam_config.vision_config)
    return {
        **options,
        **plan.labels,
        "batch_size": plan.batch_size,
        "threads": plan.threads,
        "attention": [part._attn_implementation for part in parts],
        "samples": len(plan.rows),
        "data": data.hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
        "processor": _digest(json.dumps(wording, sort_keys=True, default=str).encode()),
    }


def record(result: EvaluationResult, plan: EvaluationPlan, convention: str, stage: str, model: str) -> dict[str, Any]:
    """One entry of `results.json`: where the numbers come from, and the numbers (null where not defined)."""
    found = report(result.rows, convention)
    entry = {
        "protocol": plan.protocol,
        "protocol_note": PROTOCOL_NOTES[plan.protocol],
        "prompts": plan.prompts,
        "ignore_region": plan.ignore_region,
        "convention": convention,
        "stage": stage,
        "dataset": plan.dataset,
        "split": plan.split,
        "samples": len(plan.rows),
        "expressions": found["samples"],
        "metrics": found["metrics"],
        "intervals": found["intervals"],
        "breakdown": found["breakdown"],
        "curve": found["curve"],
        "notes": found["notes"],
        "model": model,
        "seconds": round(result.seconds, 2),
    }
    if result.taken_over:
        entry["taken_over"] = result.taken_over
    if plan.protocol == "slots":
        entry["threshold"] = plan.threshold
    return json.loads(to_json(entry))
