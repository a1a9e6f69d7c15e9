"""The training stage of a run."""

import copy
import gc
import logging
import pickle
import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from data_scripts.files import write_json
from data_scripts.transforms import Wording
from evaluation.config import EvaluationConfig
from evaluation.loop import cpu_threads
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor
from modeling_gsva.segmentation_gsva import context_length

from .arguments import DataArguments, GsvaTrainingArguments, ModelArguments
from .console import show_as_table
from .curves import training_curves
from .data import (
    GsvaCollator,
    ProcessorWording,
    describe_negatives,
    evaluation_config,
    num_images,
    training_data,
)
from .freezing import (
    cast_trained,
    merge_lora,
    moved_table,
    parts_table,
    prepare_for_training,
    snapshot,
    unmoved,
)
from .guard import check_watched
from .loading import load_model, merge, whole_weights
from .memory_plan import trained_model
from .output_folder import ADAPTER, CURVES, LOG_HISTORY, RUN, TRAINING
from .processes import on_main_process
from .publishing import save, save_adapter
from .run_record import FewerStepsError, check_resumed, describe_changes, make_record, refuse_fewer_steps, resume_point
from .sharding import gather_trained_model, prepare_for_deepspeed, shards_weights, tie_again
from .threads import training_threads
from .trainer import GsvaTrainer, complete_checkpoints

logger = logging.getLogger(__name__)


def train(
    processor: GsvaProcessor,
    model: nn.Module,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: GsvaTrainingArguments,
    record: dict[str, Any] | None = None,
) -> nn.Module | None:
    """
    Fine-tune the model, beginning at the last complete checkpoint if there is one, and save the result in `output_dir`.

    Args:
        record: Result of `begin_run`, which is kept with the weights.

    Returns:
        The plain model with the trained weights. With sharded weights it is read back only if it is evaluated next, and
        may be None.
    """
    state, loaded_dtype = PartialState(), model.dtype
    checkpoint = resume_point(training_args)
    check_optimizer(checkpoint, training_args)
    wording = ProcessorWording(processor) if data_args.wording == "processor" else Wording()
    dataset = training_data(data_args, training_args, wording)
    model = prepare_for_training(model, model_args)
    if training_args.bf16 or training_args.fp16:
        # Half precision would round small steps away; autocast computes in it all the same.
        cast_trained(model, torch.float32)
    record = dict(record or {})
    threads = record["threads"] = choose_threads(training_args, record.get("threads"))
    if state.is_main_process:
        print(parts_table(model), flush=True)
        if sentence := describe_negatives(dataset):
            print(sentence, flush=True)
    untied = prepare_for_deepspeed(model, training_args)
    before = snapshot(model)
    trainer = make_trainer(processor, model, dataset, data_args, training_args, record)
    with cpu_threads(threads or 1):
        result = run_trainer(trainer, checkpoint)
    sharded = shards_weights(training_args)
    if sharded:
        model = gather_trained_model(trainer, model_args)
    else:
        model = trainer.accelerator.unwrap_model(trainer.model)
        tie_again(model, untied)
    if trainer.state.global_step and state.is_main_process:
        report_moved(model, before)
    if model is not None:
        model = save_trained(processor, model, model_args, Path(training_args.output_dir), loaded_dtype)
    if state.is_main_process:
        write_json(Path(training_args.output_dir) / RUN, record)
        save_history(trainer, {"pictures": num_images(dataset), "seconds": result.metrics["train_runtime"]})
    state.wait_for_everyone()
    if sharded and (training_args.do_eval or training_args.do_predict):
        trainer.accelerator.free_memory()
        del trainer, model  # free the shards before the whole model is loaded
        gc.collect()
        _, model = load_model(replace(model_args, model=training_args.output_dir, base_model=None))
    return model


def begin_run(
    processor: GsvaProcessor,
    model: nn.Module,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: GsvaTrainingArguments,
) -> dict[str, Any]:
    """
    Return the record of the run, before anything takes long. Every process must call this.

    Args:
        model: The base model as it was loaded.

    Raises:
        ValueError: The output folder holds another run, or one of more steps than are asked for; evaluations cannot give a
            metric that is to be watched; or the disk is too small.
    """
    checkpoint = resume_point(training_args)
    check_optimizer(checkpoint, training_args)
    if training_args.do_eval:
        check_watched(training_args, evaluation_in_training(data_args, training_args))
    on_main_process(lambda: check_disk(planned_model(model, model_args, training_args), training_args))
    warn_of_long_conversations(model, data_args)
    record = make_record(processor, model, model_args, data_args, training_args)
    record = check_resumed(record, checkpoint, training_args)
    if PartialState().is_main_process and (sentence := describe_changes(record, checkpoint)):
        print(sentence, flush=True)
    return record


def check_optimizer(checkpoint: str | None, args: GsvaTrainingArguments) -> None:
    """
    Warn that the optimizer starts from zero if the checkpoint holds the model only.

    Raises:
        ValueError: The checkpoint holds the model only, although `save_only_model` is not set.
    """
    if checkpoint is None or any(
        next(Path(checkpoint).glob(pattern), None) for pattern in ("optimizer*", "global_step*")
    ):
        return
    if not args.save_only_model:
        raise ValueError(
            f"{checkpoint} holds the model only (it was saved with --save_only_model), so training cannot continue exactly. "
            "With --save_only_model true it goes on with a new optimizer and learning rate schedule; or begin again in "
            "another --output_dir."
        )
    if PartialState().is_main_process:
        logger.warning(
            "%s holds the model only: the optimizer and the learning rate schedule begin anew, so training does not continue "
            "exactly.",
            checkpoint,
        )


def planned_model(model: nn.Module, model_args: ModelArguments, args: GsvaTrainingArguments) -> nn.Module:
    """Return the model as training will prepare it, without content; quantized weights in the type they are saved in."""
    dtype = str(model.dtype).removeprefix("torch.")
    with whole_weights():  # with ZeRO-3 transformers would share out what it makes, and wait for the other processes
        return trained_model(model.config, replace(model_args, dtype=dtype, quantization=None), args.bf16 or args.fp16)


def warn_of_long_conversations(model: nn.Module, args: DataArguments) -> None:
    """Warn if conversations may be longer than the model's context, which would end the run when one comes."""
    limit = context_length(model.config.text_config)
    if limit is not None and (args.max_length is None or args.max_length > limit) and PartialState().is_main_process:
        logger.warning(
            "The model has %d positions, but max_length=%s allows longer conversations, and one of them would end the run. "
            "--max_length %d cuts them.",
            limit,
            args.max_length,
            limit,
        )


def check_disk(model: nn.Module, args: GsvaTrainingArguments) -> None:
    """
    Raise ValueError if the free disk space is too small for the checkpoints and the model of a run.

    Args:
        model: The model as it is prepared for training, with or without content.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # One checkpoint more than is kept exists for a moment. Without a limit, count two.
    count = 0 if args.save_strategy == "no" else (args.save_total_limit or 1) + 1
    existing = sum(1 for _ in Path(args.output_dir).glob("checkpoint-*"))
    needed = max(count - existing, 0) * checkpoint_bytes(model, args) + weights
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.output_dir).free
    if needed > free:
        raise ValueError(
            f"{args.output_dir}: {count} checkpoints and the model take {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are "
            "free; make room, give an --output_dir on another disk, or a smaller --save_total_limit."
        )


def checkpoint_bytes(model: nn.Module, args: GsvaTrainingArguments) -> int:
    """Return the size of a checkpoint in bytes: weights, and AdamW's two float32 moments."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if isinstance(model, PeftModel) else list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    if args.save_only_model:
        return weights
    numbers = sum(parameter.numel() for parameter in trained)
    if args.deepspeed_plugin is None:
        return weights + 8 * numbers
    return 2 * weights + 12 * numbers  # also the model in its own format, and float32 weights


def run_trainer(trainer: GsvaTrainer, checkpoint: str | None) -> TrainOutput:
    """
    Train, and return transformers' summary.

    Raises:
        ValueError: A file of the checkpoint is damaged.
    """
    begun: list[bool] = []

    class Begun(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(True)

    trainer.add_callback(Begun())
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    except FewerStepsError:
        raise
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        # After that, the only file still to be read is the state of the random numbers.
        if checkpoint is None or (begun and "rng_state" not in str(traceback.extract_tb(error.__traceback__))):
            raise
        others = [folder for folder in complete_checkpoints(trainer.args.output_dir) if folder != checkpoint]
        way = f"goes on from {others[-1]}" if others else "begins again"
        raise ValueError(
            f"{checkpoint} is damaged or does not fit ({' '.join(str(error).split())[:200]}). Delete it; the same command then "
            f"{way}."
        ) from error


class RefuseFewerSteps(TrainerCallback):
    """Ends a run that is resumed for fewer steps than it has, before it is handed out as if it had so few."""

    def on_train_begin(self, args, state, control, **kwargs):
        refuse_fewer_steps(state.global_step, state.max_steps, args.output_dir)


def choose_threads(args: GsvaTrainingArguments, recorded: int | None) -> int | None:
    """Return the CPU threads of each process and print the reason, or None on an accelerator, where they do not matter."""
    state = PartialState()
    if state.device.type != "cpu":
        return None
    threads, sentence = training_threads(args.threads, recorded)
    if state.is_main_process:
        print(sentence, flush=True)
    return threads


def evaluation_in_training(data_args: DataArguments, training_args: GsvaTrainingArguments) -> EvaluationConfig:
    """Return the settings of the evaluations during training."""
    limit = data_args.max_eval_samples_in_training
    return evaluation_config(data_args, training_args, data_args.protocols[0], limit=limit)


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
    evaluation = evaluation_in_training(data_args, training_args) if training_args.do_eval else None
    trainer = GsvaTrainer(
        callbacks=[RefuseFewerSteps()],
        model=model,
        args=trainer_args,
        train_dataset=dataset,
        data_collator=GsvaCollator(processor, data_args.max_length, always_an_image=shards_weights(training_args)),
        processing_class=processor,
        evaluation=evaluation,
        run_record=record,
        eval_dataset=[] if training_args.eval_strategy != "no" else None,
    )
    show_as_table(trainer)
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
