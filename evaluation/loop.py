"""The evaluation loop: rows of a data set → the model's answers → one metric row per expression."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from data_scripts.transforms import read_image
from metrics.gres import gres_metrics
from modeling_gsva.transfer_gsva import upload

from .config import EvaluationConfig
from .counting import MaskCounts, count_masks, stays_on_device
from .questions import Question, num_questions, prompt_of, questions_of
from .resume import EvaluationProgress, stored_images

MetricRow = dict[str, Any]
# Called with the index of a row, the row, its questions and the processor's results for them.
OnPrediction = Callable[[int, dict[str, Any], list[Question], list[dict[str, Any]]], None]


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with `count` threads where there is no accelerator, and restore the former number afterwards."""
    before = torch.get_num_threads()
    if PartialState().device.type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch the model to evaluation, and back on every way out."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass
class EvaluationResult:
    """The metric rows of an evaluation.

    Args:
        rows_by_image: The rows of each image, in the order of the data set.
        seconds: The time that this start of the evaluation took.
        taken_over: The number of images that an earlier, killed start had evaluated.
        was_complete: Whether an earlier start had finished, so that nothing was evaluated now.
    """

    rows_by_image: list[list[MetricRow]]
    seconds: float
    taken_over: int = 0
    was_complete: bool = False
    _metrics: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)

    @cached_property
    def rows(self) -> list[MetricRow]:
        return [row for rows in self.rows_by_image for row in rows]

    @property
    def has_masks(self) -> bool:
        """Return whether every row holds the predicted mask."""
        return all("prediction" in row for row in self.rows)

    def metrics(self, convention: str = "rela") -> dict[str, float]:
        """Return the metrics by one convention. They are computed once."""
        if convention not in self._metrics:
            self._metrics[convention] = gres_metrics(self.rows, convention)
        return self._metrics[convention]


@torch.no_grad()
def evaluate_rows(
    model,
    processor,
    config: EvaluationConfig,
    progress: EvaluationProgress | None = None,
    on_prediction: OnPrediction | None = None,
    keep_masks: bool = False,
) -> EvaluationResult:
    """Evaluate every expression exactly once, on any number of processes.

    Batches are fixed before they are distributed among the processes. A batch is therefore computed in the same way on any
    number of processes, before and after a kill, and the gathered rows are identical.

    Args:
        progress: The open progress of this evaluation, which keeps finished batches on disk. With it, rows hold the
            predicted mask as `prediction`.
        on_prediction: A function that is called for every image evaluated now, on the process that evaluates it.
        keep_masks: Whether rows hold the predicted mask also without `progress`.

    Raises:
        ValueError: There is nothing to evaluate, or model and processor do not belong together.
    """
    begun, state, keep_masks = time.perf_counter(), PartialState(), keep_masks or progress is not None
    check_evaluation(model, processor, config)
    config = config.for_model(model)
    if progress is not None and progress.is_complete:
        rows_by_image = _by_image(progress.read(), config)
        return EvaluationResult(rows_by_image, time.perf_counter() - begun, len(config.rows), was_complete=True)
    rows = stored_images(config.rows)  # `read_image` names an image that cannot be read; `datasets` does not
    size, count = config.batch_size, len(rows)
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    finished = progress.finished if progress is not None else {}
    if progress is not None and finished and state.is_main_process:
        print(f"{progress.path}: {len(finished)} of {len(batches)} batches were finished, going on", flush=True)
    mine = [n for n in range(len(batches)) if n not in finished][state.process_index :: state.num_processes]
    evaluated: list[tuple[int, list[list[MetricRow]]]] = []
    title = f"{config.protocol} on {config.dataset} {config.split}"
    with evaluation_mode(model):
        for number in tqdm(mine, title, disable=not state.is_main_process, mininterval=2):
            rows_by_image = []
            with cpu_threads(config.threads):
                answers = _answer_batch(model, processor, [rows[index] for index in batches[number]], config)
            counts = count_masks(answers, encode=keep_masks, show=on_prediction is not None)
            for index, of_masks, (row, questions, of_image) in zip(batches[number], counts, answers, strict=True):
                rows_by_image.append(_metric_rows(row, questions, of_image, of_masks, config))
                if on_prediction is not None:
                    on_prediction(index, row, questions, of_image)
            evaluated.append((number, rows_by_image))
            if progress is not None:
                progress.add(number, rows_by_image)
    every = sorted([*finished.items(), *gather_from_all(evaluated)], key=lambda pair: pair[0])
    if [number for number, _ in every] != list(range(len(batches))):
        raise RuntimeError(
            f"Evaluated the batches {[number for number, _ in every]}, not each of {len(batches)} once."
        )
    taken_over = sum(len(batches[number]) for number in finished)
    rows_by_image = [rows for _, batch in every for rows in batch]
    result = EvaluationResult(rows_by_image, time.perf_counter() - begun, taken_over)
    if progress is not None and state.is_main_process:
        progress.write(result.rows)
    return result


def gather_from_all(values: list) -> list:
    """Return the values of all processes, in the order of the processes."""
    return gather_object(values) if PartialState().num_processes > 1 else values


def check_evaluation(model, processor, config: EvaluationConfig) -> None:
    """Raise ValueError if there is nothing to evaluate, or if model and processor do not belong together."""
    check_slot_tokens(model, processor)
    if not len(config.rows):
        raise ValueError(f"{config.dataset} {config.split} has no rows to evaluate.")
    if "expressions" not in stored_images(config.rows)[0]:
        raise ValueError(
            f"{config.dataset} {config.split} has no expressions to evaluate; choose a segmentation data set."
        )


def check_slot_tokens(model, processor) -> None:
    """Raise ValueError if the model lacks `[SEG]` or `[REJ]`, or has other ids for them or for images than the processor."""
    config, size = model.config, model.get_output_embeddings().weight.shape[0]
    for token, name in (("[SEG]", "seg_token_id"), ("[REJ]", "rej_token_id")):
        of_model, of_processor = getattr(config, name, None), getattr(processor, name, None)
        if of_model is None or of_model >= size:
            raise ValueError(
                f"The model has no {token} in its vocabulary ({name}={of_model}, {size} output tokens), so it cannot "
                f"{'reject' if token == '[REJ]' else 'segment'}; add the token and train it, or take a GSVA model."
            )
        if of_model != of_processor:
            raise ValueError(
                f"The model means token {of_model} by {token}, the processor {of_processor}; load both from one directory."
            )
    if config.image_token_id != processor.image_token_id:
        raise ValueError(
            f"The model takes token {config.image_token_id} for an image, the processor writes {processor.image_token_id}; load "
            "both from one directory."
        )


def segment_images(
    model,
    processor,
    images,
    expressions,
    config: EvaluationConfig,
    no_targets=None,
    prompt: str = "refer",
    as_tensors: bool = False,
) -> list[list[dict[str, Any]]]:
    """Return the processor's results for the expressions of each image, by the protocol of `config`.

    Args:
        images: The images.
        expressions: The expressions of each image.
        no_targets: The gold answers for `teacher_forced`: for each image, whether each expression is a no-target.
        prompt: The name of the processor's prompt.
        as_tensors: Whether masks stay on the model's device.
    """
    device = next(model.parameters()).device
    options: dict[str, Any] = {}
    if config.protocol == "slots":
        options["threshold"] = config.threshold  # None: the model's own
    elif config.protocol == "generate":
        options["max_new_tokens"] = config.max_new_tokens
        options["do_sample"] = False
        options["num_return_sequences"] = 1  # whatever the model's generation config says: a row has one answer
    inputs = processor(
        images=images,
        expressions=expressions,
        no_targets=no_targets,
        prompt=prompt,
        one_prompt_per_expression=config.one_prompt_per_expression,
        return_tensors="pt",
    )
    inputs = moved(inputs, device)
    outputs = model.segment(**inputs, method=config.protocol, **options)
    is_forced = config.protocol == "teacher_forced"
    # Processors of others' code know no `as_tensors`; they are not asked for it where there is nothing to gain.
    more = {"as_tensors": True} if as_tensors else {}
    return processor.post_process_segmentation(outputs, inputs, keep_rejected_masks=is_forced, **more)


def moved(inputs, device: torch.device):
    """Move a processor's output to a device; the host does not wait for a CUDA device to have it."""
    for name, value in inputs.items():
        if torch.is_tensor(value):
            inputs[name] = upload(value, device)
    return inputs.to(device)


def _answer_batch(
    model, processor, rows: list[dict[str, Any]], config: EvaluationConfig
) -> list[tuple[dict[str, Any], list[Question], list[dict[str, Any]]]]:
    """Return (row, questions, results) of each row. Rows with the same kind of prompt are answered together."""
    asked = [questions_of(row, config) for row in rows]
    results: list[list[dict[str, Any]]] = [[] for _ in rows]
    groups: dict[str, list[int]] = {}
    for number, questions in enumerate(asked):
        if questions:
            groups.setdefault(prompt_of(questions, config), []).append(number)
    for prompt, group in groups.items():
        gold = None
        if config.protocol == "teacher_forced":
            gold = [[question.is_no_target for question in asked[n]] for n in group]
        images = [read_image(rows[n]["image"]) for n in group]
        expressions = [[question.text for question in asked[n]] for n in group]
        on_device = stays_on_device(next(model.parameters()).device)
        answers = segment_images(model, processor, images, expressions, config, gold, prompt, on_device)
        for n, of_image in zip(group, answers, strict=True):
            results[n] = of_image
    return list(zip(rows, asked, results, strict=True))


def _metric_rows(
    row: dict[str, Any],
    questions: list[Question],
    results: list[dict[str, Any]],
    counts: list[MaskCounts],
    config: EvaluationConfig,
) -> list[MetricRow]:
    """Return the metric row of each question of a row."""
    run_facts = {
        "dataset": config.dataset,
        "split": config.split,
        "protocol": config.protocol,
        "prompts": config.prompts,
        "ignore_region": config.ignore_region,
        **({} if config.used_threshold is None else {"threshold": config.used_threshold}),
        **config.labels,
        "image_id": row["image_id"],
    }
    metric_rows = []
    for question, result, of_mask in zip(questions, results, counts, strict=True):
        metric_rows.append(
            {
                **run_facts,
                "expression": question.text,
                "is_no_target": question.is_no_target,
                "is_rejected": result["is_rejected"],
                **{name: result[name] if np.isfinite(result[name]) else None for name in ("score", "probability")},
                "probability": result["probability"] if np.isfinite(result["probability"]) else None,
                "intersection": of_mask.intersection,
                "union": of_mask.union,
                "box_intersection": of_mask.box_intersection,
                "box_union": of_mask.box_union,
                "is_malformed": result["is_malformed"],
                "num_targets": question.num_targets,
                "num_expressions": 1 if config.one_prompt_per_expression else len(questions),
            }
        )
        if of_mask.prediction is not None:
            metric_rows[-1]["prediction"] = of_mask.prediction
    return metric_rows


def _by_image(rows: list[MetricRow], config: EvaluationConfig) -> list[list[MetricRow]]:
    """Return the rows of a finished evaluation as one list per image."""
    rest = iter(rows)
    return [[next(rest) for _ in range(num_questions(row, config))] for row in stored_images(config.rows)]
