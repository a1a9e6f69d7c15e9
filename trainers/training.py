"""The training stage of a run."""

import copy
import gc
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn

from data_scripts.files import write_json
from data_scripts.transforms import Wording
from evaluation.loop import cpu_threads
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor

from .arguments import DataArguments, GsvaTrainingArguments, ModelArguments
from .curves import training_curves
from .data import GsvaCollator, ProcessorWording, evaluation_config, num_images, training_data
from .freezing import cast_trained, merge_lora, moved_table, parts_table, prepare_for_training, snapshot, unmoved
from .loading import load_model, merge
from .output_folder import ADAPTER, CURVES, LOG_HISTORY, RUN, TRAINING
from .publishing import save, save_adapter
from .sharding import gather_trained_model, shares_weights
from .threads import training_threads
from .trainer import GsvaTrainer, last_complete_checkpoint

logger = logging.getLogger(__name__)


def train(
    processor: GsvaProcessor,
    model: nn.Module,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: GsvaTrainingArguments,
) -> nn.Module | None:
    """
    Fine-tune the model, beginning at the last complete checkpoint if there is one, and save the result in `output_dir`.

    Returns:
        The plain model with the trained weights. With sharded weights it is read back only if it is evaluated next, and
        may be None.
    """
    state, loaded_dtype = PartialState(), model.dtype
    checkpoint = checkpoint_to_resume(training_args)
    wording = ProcessorWording(processor) if data_args.wording == "processor" else Wording()
    dataset = training_data(data_args, training_args, wording)
    model = prepare_for_training(model, model_args)
    if training_args.bf16 or training_args.fp16:
        # Half precision would round small steps away; autocast computes in it all the same.
        cast_trained(model, torch.float32)
    threads = choose_threads(training_args, checkpoint)
    if state.is_main_process:
        print(parts_table(model), flush=True)
    before = snapshot(model)
    trainer = make_trainer(processor, model, dataset, data_args, training_args, {"threads": threads})
    with cpu_threads(threads or 1):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    sharded = shares_weights(training_args)
    model = gather_trained_model(trainer, model_args) if sharded else trainer.accelerator.unwrap_model(trainer.model)
    if trainer.state.global_step and state.is_main_process:
        report_moved(model, before)
    if model is not None:
        model = save_trained(processor, model, model_args, Path(training_args.output_dir), loaded_dtype)
    if state.is_main_process:
        save_history(trainer, {"pictures": num_images(dataset), "seconds": result.metrics["train_runtime"]})
    state.wait_for_everyone()
    if sharded and (training_args.do_eval or training_args.do_predict):
        trainer.accelerator.free_memory()
        del trainer, model  # free the shards before the whole model is loaded
        gc.collect()
        _, model = load_model(replace(model_args, model=training_args.output_dir, base_model=None))
    return model


def checkpoint_to_resume(args: GsvaTrainingArguments) -> str | None:
    """Return the checkpoint that training begins at, or None to begin with the model as loaded."""
    if args.resume_from_checkpoint is None and args.resume:
        return last_complete_checkpoint(args.output_dir)
    return args.resume_from_checkpoint


def choose_threads(args: GsvaTrainingArguments, checkpoint: str | None) -> int | None:
    """Return the CPU threads of each process and print the reason, or None on an accelerator, where they do not matter."""
    state = PartialState()
    if state.device.type != "cpu":
        return None
    threads, sentence = training_threads(args.threads, run_record(checkpoint).get("threads"))
    if state.is_main_process:
        print(sentence, flush=True)
    return threads


def run_record(checkpoint: str | Path | None) -> dict[str, Any]:
    """Return the facts about the run that a checkpoint holds; none if it is of an older version."""
    path = Path(checkpoint or "") / RUN
    return json.loads(path.read_text(encoding="utf-8")) if checkpoint and path.is_file() else {}


def make_trainer(
    processor: GsvaProcessor,
    model: nn.Module,
    dataset,
    data_args: DataArguments,
    training_args: GsvaTrainingArguments,
    record: dict[str, Any],
) -> GsvaTrainer:
    """Return the trainer of a model that is prepared for training."""
    # `push` publishes the finished model. Trainer would publish checkpoints, and would leave their adapters in the output
    # folder, where from_pretrained puts them on top of the merged weights.
    trainer_args = copy.copy(training_args)
    trainer_args.push_to_hub = False
    evaluation = None
    if training_args.do_eval:
        limit = data_args.max_eval_samples_in_training
        evaluation = evaluation_config(data_args, training_args, data_args.protocols[0], limit=limit)
    trainer = GsvaTrainer(
        model=model,
        args=trainer_args,
        train_dataset=dataset,
        data_collator=GsvaCollator(processor, data_args.max_length),
        processing_class=processor,
        evaluation=evaluation,
        run_record=record,
        eval_dataset=[] if training_args.eval_strategy != "no" else None,
    )
    if trainer.features is not None and PartialState().is_main_process:
        print(trainer.features.disk_report(num_images(dataset)), flush=True)
    return trainer


def report_moved(model: nn.Module, before: dict[str, tuple[float, float]]) -> None:
    """Print which parts have changed in training, and warn about trained parameters that have not."""
    print(moved_table(model, before), flush=True)
    if names := unmoved(model, before):
        logger.warning("%d trained parameters did not move: %s", len(names), ", ".join(names[:8]))


def save_trained(
    processor: GsvaProcessor, model: nn.Module, args: ModelArguments, output_dir: Path, dtype: torch.dtype
) -> nn.Module:
    """Save adapter and merged model on the main process, and return the model to use from now on, in `dtype`."""
    is_main_process = PartialState().is_main_process
    if is_main_process and isinstance(model, PeftModel):
        save_adapter(model, output_dir)
    if args.quantization:
        # Merge the adapter into the original weights, not into the rounded ones. The model in use stays quantized.
        if is_main_process:
            save(processor, merge_into_base(args, output_dir / ADAPTER), output_dir)
        return cast_trained(model, dtype)
    model = merge_lora(model).to(dtype)
    if is_main_process:
        save(processor, model, output_dir)
    return model


def merge_into_base(args: ModelArguments, adapter: Path) -> GsvaForConditionalGeneration:
    """Return the unquantized base with the adapter merged into it, in CPU memory."""
    return merge(load_model(replace(args, quantization=None), "cpu")[1], adapter)


def save_history(trainer: GsvaTrainer, facts: dict[str, Any]) -> None:
    """Write the log, the training curves and the facts for the model card."""
    output_dir, history = Path(trainer.args.output_dir), trainer.state.log_history
    write_json(output_dir / TRAINING, facts, indent=None)
    write_json(output_dir / LOG_HISTORY, history)
    training_curves(history, output_dir / CURVES)
    print(f"trained {trainer.state.global_step} steps in {facts['seconds']:.0f} s", flush=True)
