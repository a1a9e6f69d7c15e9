"""The training stage of a run."""

import copy
import gc
import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel

from data_scripts.files import write_text
from data_scripts.transforms import Wording
from evaluation.loop import cpu_threads
from modeling_gsva import GsvaForConditionalGeneration

from .arguments import GsvaTrainingArguments, ModelArguments
from .card import TRAINING
from .curves import training_curves
from .data import GsvaCollator, ProcessorWording, evaluation_config, pictures_in, training_data
from .freezing import cast_trained, merged, moved_table, parts_table, prepare_for_training, snapshot, unmoved
from .loading import ADAPTER, load_model, merge
from .publishing import save, save_adapter
from .sharding import gathered, shares_weights
from .trainer import GsvaTrainer, last_complete_checkpoint

logger = logging.getLogger(__name__)


def training_threads(args: GsvaTrainingArguments) -> int:
    """This process's share of the cores: `accelerate launch` leaves all but one idle where nobody says otherwise."""
    return args.threads or max((os.cpu_count() or 1) // PartialState().num_processes, 1)


def train(processor, model, model_args, data_args, training_args):
    """Fine-tunes, resuming from the last complete checkpoint; returns the plain model and saves it in `output_dir`."""
    output_dir, state = Path(training_args.output_dir), PartialState()
    wording = ProcessorWording(processor) if data_args.wording == "processor" else Wording()
    dataset = training_data(data_args, training_args, wording)
    model = prepare_for_training(model, model_args)
    loaded_dtype = model.dtype
    if training_args.bf16 or training_args.fp16:
        cast_trained(model, torch.float32)  # steps smaller than half precision can hold; autocast does the rest
    if state.is_main_process:
        print(parts_table(model), flush=True)
    before = snapshot(model)
    # What is published is the finished model (`push`). Trainer would publish checkpoints, and leave their adapters in the
    # output folder, where from_pretrained puts them on top of the merged weights.
    trainer_args = copy.copy(training_args)
    trainer_args.push_to_hub = False
    trainer = GsvaTrainer(
        model=model,
        args=trainer_args,
        train_dataset=dataset,
        data_collator=GsvaCollator(processor, data_args.max_length),
        processing_class=processor,
        evaluation=evaluation_config(
            data_args, training_args, data_args.protocols[0], limit=data_args.max_eval_samples_in_training
        )
        if training_args.do_eval
        else None,
        eval_dataset=[] if training_args.eval_strategy != "no" else None,
    )
    if trainer.features is not None and state.is_main_process:
        print(trainer.features.announce(pictures_in(dataset)), flush=True)
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None and training_args.resume:
        checkpoint = last_complete_checkpoint(output_dir)
    with cpu_threads(training_threads(training_args)):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    sharded = shares_weights(training_args)
    model = gathered(trainer, model_args) if sharded else trainer.accelerator.unwrap_model(trainer.model)
    if trainer.state.global_step and state.is_main_process:
        print(moved_table(model, before), flush=True)
        if still := unmoved(model, before):
            logger.warning("%d trained parameters did not move: %s", len(still), ", ".join(still[:8]))
    if state.is_main_process and isinstance(model, PeftModel):
        save_adapter(model, output_dir)
    if model_args.quantization:
        # Rounded weights are no good base: the adapter is merged into the original ones. What was trained stays in use.
        if state.is_main_process:
            save(processor, merge_into_base(model_args, output_dir / ADAPTER), output_dir)
        cast_trained(model, loaded_dtype)
    elif model is not None:
        model = merged(model).to(loaded_dtype)
        if state.is_main_process:
            save(processor, model, output_dir)
    if state.is_main_process:
        facts = {"pictures": pictures_in(dataset), "seconds": result.metrics["train_runtime"]}
        write_text(output_dir / TRAINING, json.dumps(facts))
        write_text(output_dir / "log_history.json", json.dumps(trainer.state.log_history, indent=1))
        training_curves(trainer.state.log_history, output_dir / "curves.png")
        print(f"trained {trainer.state.global_step} steps in {result.metrics['train_runtime']:.0f} s", flush=True)
    state.wait_for_everyone()
    if sharded and (training_args.do_eval or training_args.do_predict):
        trainer.accelerator.free_memory()
        del trainer, model  # the shards make room for the whole
        gc.collect()
        _, model = load_model(replace(model_args, model=str(output_dir), base_model=None))
    return model


def merge_into_base(args: ModelArguments, adapter: Path) -> GsvaForConditionalGeneration:
    """The unquantized base with the adapter merged into it, in the memory of the processor."""
    return merge(load_model(replace(args, quantization=None), "cpu")[1], adapter)
