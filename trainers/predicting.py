"""Predictions on a data set of images: their arguments, the run that they belong to, and what a start says and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState

import data_scripts
from data_scripts.files import write_json
from evaluation.predict_dataset import SHARDS, Totals, predict_dataset
from evaluation.predictor import METHODS, Predictor
from evaluation.streams import Columns, ImageStream, open_stream

from .arguments import DataArguments, GsvaTrainingArguments, ModelArguments
from .card import public_name
from .digests import model_digest
from .output_folder import PREDICTIONS_RUN
from .processes import on_main_process
from .publishing import push_predictions
from .run_record import list_differences
from .threads import usable_cores

MOST_WORKERS = 8  # threads that prepare images, unless --dataloader_num_workers says more


def is_stream(data_args: DataArguments, training_args: GsvaTrainingArguments) -> bool:
    """Return whether predictions are asked for on files or a Hub id, and not on image files or on a known data set."""
    known = {*data_scripts.names(), "mixture"}
    return training_args.do_predict and not data_args.image and data_args.dataset not in known


def open_predictions(data_args: DataArguments, training_args: GsvaTrainingArguments) -> ImageStream:
    """Return the images to predict on, before a model is loaded.

    Raises:
        ValueError: There is no such data set or column, nothing or too much is asked for, or the protocol needs gold answers.
    """
    if training_args.do_train or training_args.do_eval:
        raise ValueError(
            f"dataset={data_args.dataset!r} has no annotations to train or evaluate on: give --do_predict alone, or one of "
            f"{', '.join(data_scripts.names())}."
        )
    if data_args.protocols[0] not in METHODS:
        raise ValueError(
            f"protocols={data_args.protocols[0]} needs gold answers, which images do not have; choose {' or '.join(METHODS)}."
        )
    asked = [name for name in ("expressions", "expressions_column", "question_column") if getattr(data_args, name)]
    if len(asked) != 1:
        raise ValueError(
            "--do_predict needs one of --expressions, --expressions_column and --question_column to say what to look for, not "
            f"{' and '.join(asked) or 'none'}."
        )
    columns = Columns(
        data_args.image_column, data_args.id_column, data_args.expressions_column, data_args.question_column
    )
    return open_stream(data_args.dataset, columns, data_args.eval_split, data_args.options)


def predict_stream(
    processor,
    model,
    stream: ImageStream,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: GsvaTrainingArguments,
) -> None:
    """Predict on the images that have no predictions in the output folder yet. Every process calls this.

    Raises:
        ValueError: An expression cannot be asked, the folder holds predictions of another run, or the data is damaged.
        OSError: The folder cannot be written.
    """
    for expression in data_args.expressions:
        processor.normalize_expression(expression)
    predictor = Predictor(
        model_args.model,
        threshold=data_args.threshold,
        method=data_args.protocols[0],
        masks=data_args.masks,
        expressions=data_args.expressions,
        batch_size=training_args.per_device_eval_batch_size,
        max_new_tokens=data_args.max_new_tokens,
        threads=training_args.threads or 1,
        one_prompt_per_expression=data_args.one_prompt_per_expression,
        loaded=(processor, model),
    )
    output_dir = Path(training_args.output_dir)
    record = on_main_process(lambda: _record(predictor, stream, data_args))
    on_main_process(lambda: _check_folder(output_dir, record))
    workers = training_args.dataloader_num_workers or min(usable_cores(), MOST_WORKERS)
    is_shown = not training_args.disable_tqdm
    totals = predict_dataset(predictor, stream, output_dir, data_args.shard_size, workers, is_shown)
    if PartialState().is_main_process:
        print(_said(totals, output_dir), flush=True)
    if training_args.push_to_hub:
        facts = {"model": model_args.model, "data set": data_args.dataset, **record["kept"]}
        shown = ("model", "revision", "data set", "method", "threshold", "masks", "expressions")
        push_predictions(training_args, {name: public_name(str(facts[name])) for name in shown})


def _said(totals: Totals, output_dir: Path) -> str:
    processes = PartialState().num_processes
    on = f" on {processes} processes" if processes > 1 else ""
    return f"{totals}{on}\npredictions: {output_dir / SHARDS}"


def _record(predictor: Predictor, stream: ImageStream, data_args: DataArguments) -> dict[str, Any]:
    """Return the facts that decide every row, as JSON can hold them. The number of processes is none of them."""
    processor, model = predictor.load()
    options = ("threshold", "method", "masks", "expressions", "batch_size", "max_new_tokens", "threads")
    kept = {
        "weights": model_digest(model, processor),
        "dataset": stream.identity,
        **predictor.facts(),
        **{f"{name}_column": value for name, value in vars(stream.columns).items()},
        **{name: getattr(predictor, name) for name in (*options, "one_prompt_per_expression")},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "shard_size": data_args.shard_size,
    }
    return {"kept": kept, "names": {"weights": predictor.model_name, "dataset": data_args.dataset}}


def _check_folder(output_dir: Path, record: dict[str, Any]) -> None:
    """Write the record of a new run; raise ValueError if the folder holds predictions of another one."""
    path = output_dir / PREDICTIONS_RUN
    if not any(output_dir.glob(SHARDS)):
        write_json(path, record)
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        differences = list_differences(earlier, record)
    except (OSError, ValueError, KeyError, TypeError):
        differences = f"{path.name} is missing or damaged"
    if differences:
        raise ValueError(
            f"{output_dir} holds the predictions of another run, which this one cannot go on from. {differences}. Give the "
            "arguments of that run, or another --output_dir."
        )
