"""The record of a run: the facts that determine its weights. Checkpoints keep it, and a resumed run is compared with it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from .arguments import DataArguments, GsvaTrainingArguments, ModelArguments
from .data import load_training_data
from .digests import data_digest, model_digest
from .inherited_arguments import KEPT, REPORTED, plain
from .output_folder import RUN
from .processes import on_main_process
from .sharding import strategy_of
from .trainer import complete_checkpoints, last_complete_checkpoint

logger = logging.getLogger(__name__)

# Arguments of the model and the data that decide what is learned. The data's name, folder and options are in its digest.
KEPT_OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "train_tokens")
KEPT_OF_MODEL = ("dtype", "train_language_model", *KEPT_OF_LORA, "quantization", "object_score_loss_weight")
KEPT_OF_DATA = (
    "mixture",
    "mixture_rates",
    "steps_per_epoch",
    "num_expressions",
    "wording",
    "all_absent",
    "negatives",
    "negatives_like",
    "drop_no_targets",
    "max_length",
)


def make_record(
    processor: Any,
    model: nn.Module,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: GsvaTrainingArguments,
) -> dict[str, Any]:
    """
    Return the facts that make a run what it is, as JSON can hold them. Every process must call this.

    `kept` must be the same when the run is resumed; `reported` may change.

    Args:
        model: The base model as it was loaded, before it is prepared for training.
    """
    dataset = load_training_data(processor, data_args, training_args)

    base, data = on_main_process(lambda: (model_digest(model, processor), data_digest(dataset)))
    model_values, data_values = asdict(model_args), asdict(data_args)
    kept: dict[str, Any] = {"base model": base, "training data": data, "strategy": strategy_of(training_args)}
    kept |= {name: model_values[name] for name in KEPT_OF_MODEL}
    kept |= {name: data_values[name] for name in KEPT_OF_DATA}
    kept |= {name: plain(getattr(training_args, name)) for name in sorted(KEPT)}
    if model_args.train_language_model != "lora":
        kept |= dict.fromkeys(KEPT_OF_LORA)
    # As parsed: the same JSON may be written in several ways.
    kept |= {"mixture": data_args.mixture_families, "mixture_rates": data_args.mixture_family_rates}
    if data_args.dataset != "mixture":
        kept["steps_per_epoch"] = None
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    kept["batch of all devices"] = batch * training_args.world_size
    kept["feature_cache_dtype"] = training_args.feature_cache_dtype if training_args.feature_cache else None
    reported = {name: plain(getattr(training_args, name)) for name in sorted(REPORTED)}
    reported["processes"] = training_args.world_size
    names = {"base model": model_args.model, "training data": data_args.dataset}
    return {"kept": kept, "reported": reported, "names": names, "changes": []}


def read_record(folder: str | Path | None) -> dict[str, Any]:
    """Return the record in a checkpoint or output folder; empty if there is none."""
    path = Path(folder or "") / RUN
    if folder is None or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged; delete {path.parent} to go on from an earlier checkpoint.") from None


def resume_point(args: GsvaTrainingArguments) -> str | None:
    """
    Return the checkpoint that training begins at, or None to begin with the model as loaded.

    Raises:
        ValueError: `resume_from_checkpoint` is not a checkpoint, or the checkpoint has more steps than `max_steps`.
    """
    checkpoint = args.resume_from_checkpoint
    if checkpoint in ("true", "True", True) or (checkpoint is None and args.resume):
        checkpoint = last_complete_checkpoint(args.output_dir)
    elif checkpoint is not None and not (Path(checkpoint) / "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint={checkpoint!r} is not a checkpoint: it has no trainer_state.json.")
    if checkpoint is not None and args.max_steps > 0:
        refuse_fewer_steps(steps_of(checkpoint), args.max_steps, args.output_dir)
    return checkpoint


def steps_of(checkpoint: str | Path) -> int:
    """Return the number of optimizer steps of a checkpoint."""
    return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


class FewerStepsError(ValueError):
    """A run has more steps than are asked for."""


def refuse_fewer_steps(trained: int, asked: int, output_dir: str | Path) -> None:
    """Raise FewerStepsError if a run has more steps than are asked for, naming the checkpoints that it has."""
    if trained <= asked:
        return
    usable = [folder for folder in complete_checkpoints(output_dir) if steps_of(folder) <= asked]
    way = "give another --output_dir to train fewer"
    if usable:
        way += f", or --resume_from_checkpoint {usable[-1]} to go on from there"
    raise FewerStepsError(f"{output_dir} holds a run of {trained} steps, and {asked} are asked for: {way}.")


def check_resumed(record: dict[str, Any], checkpoint: str | None, args: GsvaTrainingArguments) -> dict[str, Any]:
    """
    Compare a run with the one in the output folder, and return its record with the changes so far.

    Raises:
        ValueError: They are different runs. The message lists what differs.
    """
    folder = checkpoint or (args.output_dir if args.resume else None)
    earlier = read_record(folder)
    if not earlier.get("kept"):
        if checkpoint is not None:
            logger.warning(
                "%s does not say what it was trained from (an older version wrote it), so nothing is compared.",
                checkpoint,
            )
        return record
    if differences := list_differences(earlier, record):
        raise ValueError(
            f"{folder} belongs to another run, which this one cannot go on from. "
            f"{differences}. Give the arguments of that run, or begin anew: in another --output_dir, or here "
            "with --resume false, which keeps the earlier run in a subfolder."
        )
    changes = list(earlier.get("changes", []))
    if checkpoint is not None:
        changed = {
            name: [earlier["reported"].get(name), record["reported"].get(name)]
            for name in _differences(earlier["reported"], record["reported"])
        }
        if changed:
            changes.append({"step": steps_of(checkpoint), **changed})
    return {**record, "changes": changes, "threads": earlier.get("threads")}


def list_differences(earlier: dict[str, Any], record: dict[str, Any]) -> str:
    """Return in words what two records keep differently; "" for the same run."""
    phrases = []
    for name in _differences(earlier["kept"], record["kept"]):
        was, now = earlier.get("names", {}).get(name), record["names"].get(name)
        if now is not None:
            phrases.append(f"{name}: other content than in the run ({was!r} then, {now!r} now)")
        else:
            phrases.append(f"{name}: {earlier['kept'].get(name)!r} then, {record['kept'].get(name)!r} now")
    return "; ".join(phrases)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    # An argument that only one of them has is new in, or gone from, the project.
    return [name for name in now if name in before and before[name] != now[name]]


def describe_changes(record: dict[str, Any], checkpoint: str | None) -> str | None:
    """Return a sentence about what has changed since the checkpoint, or None."""
    changes = record.get("changes", [])
    if checkpoint is None or not changes or changes[-1]["step"] != steps_of(checkpoint):
        return None
    facts = (f"{name} {then} -> {now}" for name, (then, now) in _pairs(changes[-1]))
    return f"Going on from {checkpoint} with changes: {', '.join(facts)}."


def _pairs(change: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    return [(name, value) for name, value in change.items() if name != "step"]


def changes_table(record: dict[str, Any]) -> list[str]:
    """Return a phrase for each change of a resumed run, for the model card."""
    return [
        f"{name} {then} -> {now} at step {change['step']}"
        for change in record.get("changes", [])
        for name, (then, now) in _pairs(change)
    ]
