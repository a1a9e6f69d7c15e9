"""GsvaTrainer: transformers' Trainer with loss parts in the log, GRES metrics as evaluation, and exact continuation."""

import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch.utils.data import Sampler
from transformers import Trainer, TrainerControl
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_utils import sort_checkpoints

from data_scripts.files import give_umask_permissions, remove_folder, replacing, write_json
from data_scripts.transforms import read_image
from evaluation.config import PROTOCOL_NOTES, EvaluationConfig
from evaluation.loop import evaluate_rows
from evaluation.questions import Question
from evaluation.tiles import make_tiles, sheet
from metrics.gres import rejection_curve
from modeling_gsva.transfer_gsva import to_device

from .divergence import DivergenceWatch
from .feature_cache import FeatureCache
from .guard import CURVE_AREA, GuardTAcc, guarded_checkpoint
from .output_folder import RUN, TENSORBOARD, VALIDATION

LOSS_PARTS = ("ce_loss", "mask_bce_loss", "mask_dice_loss", "object_score_loss")


class EpochSampler(Sampler[int]):
    """
    Shuffles the data set in each epoch and writes the epoch into the index: item `epoch * n + i` is item `i` with the
    wording of that epoch (`data_scripts/mixture.py`). The order depends on seed and epoch alone, so workers, processes
    and resumed runs agree.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter((self.epoch * self.length + torch.randperm(self.length, generator=generator)).tolist())


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest `checkpoint-N` with a complete state file, or None. A folder that was copied in part has none."""
    return next(reversed(complete_checkpoints(output_dir)), None)


def complete_checkpoints(output_dir: str | Path) -> list[str]:
    """Return the folders `checkpoint-N` with a complete state file, oldest first."""
    folders = sorted(
        (int(folder.name.rpartition("-")[2]), folder)
        for folder in Path(output_dir).glob("checkpoint-*")
        if folder.name.rpartition("-")[2].isdigit()
    )
    complete = []
    for step, folder in folders:
        try:
            if json.loads((folder / "trainer_state.json").read_text())["global_step"] == step:
                complete.append(str(folder))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return complete


def peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes that this process has held: tensors on a GPU, the whole process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): macOS counts bytes, Linux kilobytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def gather_frozen_in_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the frozen parameters of the parts that an adapter holds whole, gathered from all ZeRO-3 processes."""
    import deepspeed

    frozen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".modules_to_save." in name and not parameter.requires_grad
    }
    with deepspeed.zero.GatheredParameters(list(frozen.values())):
        return {name: parameter.detach().cpu().clone() for name, parameter in frozen.items()}


class GsvaTrainer(Trainer):
    """
    Args:
        evaluation ([`EvaluationConfig`]): Settings of `evaluate()`, whose metrics are logged as `eval_gIoU` and so on.
        run_record: Facts about the run that are saved in each checkpoint as `run.json`.

    The cross-entropy of a micro-batch is divided by the number of supervised tokens of the whole optimizer step, its mask
    losses by the number of masks of the whole step. So any split into micro-batches and processes gives the same gradient
    (the original averages each micro-batch by itself).
    """

    control: TrainerControl
    data_collator: Any

    def __init__(
        self, *args, evaluation: EvaluationConfig | None = None, run_record: dict[str, Any] | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.run_record = run_record
        self._aside: Path | None = None
        self._frozen_in_adapter: dict[str, torch.Tensor] = {}
        self.evaluation = evaluation
        self.watch = DivergenceWatch(
            self.args.output_dir,
            decode=getattr(self.processing_class, "batch_decode", None),
            mode=getattr(self.args, "divergence", "off"),
            rank=self.args.process_index,
        )
        if (bound := getattr(self.args, "guard_T_acc", None)) is not None:
            self.add_callback(GuardTAcc(bound, self.args.guard))
        self.features: FeatureCache | None = None
        if getattr(self.args, "feature_cache", None):
            plain = self.accelerator.unwrap_model(self.model)
            plain = plain.base_model.model if isinstance(plain, PeftModel) else plain
            self.features = FeatureCache(self.args.feature_cache, plain, getattr(torch, self.args.feature_cache_dtype))
            self.data_collator = self.features.collator(self.data_collator)
        for callback in self.callback_handler.callbacks:
            # transformers documents output_dir, but takes the working directory unless TENSORBOARD_LOGGING_DIR is set.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(Path(self.args.output_dir) / TENSORBOARD)
        self._begin_log()

    def _begin_log(self) -> None:
        self._parts: dict[str, Any] = {}  # tensors that wait on the device for `log`, and numbers
        self._steps, self._images, self._data_seconds, self._begun = 0, 0, 0.0, time.perf_counter()

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self._sampler = EpochSampler(len(dataset), seed)
        return self._sampler

    def _run_epoch(self, **kwargs) -> None:
        # transformers would add a step to a run that is complete, or that a guard has stopped.
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        # accelerate does not reach the sampler when several processes resume within an epoch.
        self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as Trainer does, with ZeRO-3 and LoRA also the frozen parameters of the parts trained in full.

        transformers gathers trained parameters only, but peft saves whole parts and fails without the frozen ones.
        """
        if (
            self.is_deepspeed_enabled
            and self.deepspeed.zero_optimization_stage() == 3
            and isinstance(self.model, PeftModel)
        ):
            self._frozen_in_adapter = gather_frozen_in_adapter(self.model)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict and self._frozen_in_adapter:
            state_dict = {**state_dict, **self._frozen_in_adapter}
        super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial=None) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial) -> None:
        """Save a checkpoint under a temporary name and rename it when every process has written its part.

        So a folder named `checkpoint-N` is always complete.
        """
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        aside, old = folder / ".checkpoint", folder / ".old-checkpoint"
        if self.args.should_save:
            for left_by_a_kill in (aside, old):
                shutil.rmtree(left_by_a_kill, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == aside:
            self.state.best_model_checkpoint = best = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(aside / name / "trainer_state.json"))
        if not self.args.should_save:
            return
        if self.run_record is not None:
            write_json(aside / name / RUN, self.run_record)
        give_umask_permissions(aside / name)
        if (folder / name).exists():
            remove_folder(folder / name)
        (aside / name).rename(folder / name)
        aside.rmdir()
        if limit := self.args.save_total_limit:
            checkpoints = sort_checkpoints(str(folder), use_mtime=True)
            protected = {best, self._guarded_checkpoint()}
            unprotected = [checkpoint for checkpoint in checkpoints[:-1] if checkpoint not in protected]
            for checkpoint in unprotected[: max(len(checkpoints) - limit, 0)]:
                remove_folder(checkpoint)

    def _guarded_checkpoint(self) -> str | None:
        bound = getattr(self.args, "guard_T_acc", None)
        return None if bound is None else guarded_checkpoint(self.state.log_history, bound, self.args.output_dir)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._data_seconds += time.perf_counter() - start
        self._steps += 1
        count = sum((self._counts(batch, device) for batch in batches), start=to_device([0, 0], device))
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count)
        for batch in batches:
            batch["num_masks_in_batch"], batch["num_slots_in_batch"] = count.clamp(min=1)
            self._images += len(batch.get("original_sizes", ()))
        # There may be no supervised tokens, where max_length cuts off every answer: do not divide by zero.
        return batches, num_items.clamp(min=1) if torch.is_tensor(num_items) else num_items

    def _counts(self, batch, device) -> torch.Tensor:
        """Return (2,) on the device: how many masks of a batch count in the mask losses, and how many slots have a true mask."""
        config = self.accelerator.unwrap_model(self.model).config
        masks = batch.get("mask_labels", [])
        slots = to_device([sum(len(mask) for mask in masks)], device)
        if config.rejected_slot_loss == "zero_logits":
            return slots.expand(2)
        there = [mask.flatten(1).any(1) for mask in masks if len(mask)]
        return torch.cat([torch.cat(there).sum(0, keepdim=True) if there else slots, slots])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.features is not None:
            inputs = self.features.fill(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._collect(inputs, outputs)
            self._check_divergence(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def _collect(self, inputs, outputs) -> None:
        """Add the loss parts, slot accuracy and mask IoU of a micro-batch to the sums that `log` averages."""
        values: dict[str, Any] = {n: outputs[n].detach() for n in LOSS_PARTS if outputs.get(n) is not None}
        if outputs.get("slot_positions") is not None:
            positions, config = outputs["slot_positions"], self.accelerator.unwrap_model(self.model).config
            expects_seg = inputs["input_ids"][positions[:, 0], positions[:, 1]] == config.seg_token_id
            answers_seg = outputs["slot_logits"].detach().argmax(1) == 0
            values["slots_right"] = (expects_seg == answers_seg).sum().float()
            values["slots"] = float(len(positions))
        if (ious := outputs.get("mask_ious")) is not None:
            values["ious"], values["masks"] = ious.detach().sum(), float(len(ious))
        for name, value in values.items():
            self._parts[name] = self._parts.get(name, 0) + value

    def _check_divergence(self, inputs, outputs) -> None:
        if self.watch.mode == "off":
            return
        # Each micro-batch of each process has its share of the step's loss.
        shares = self.args.gradient_accumulation_steps * self.args.world_size
        names = [name for name in ("loss", *LOSS_PARTS) if outputs.get(name) is not None]
        values = torch.stack([outputs[name].detach().double() for name in names]).tolist()  # one read for all
        losses = {name: value * shares for name, value in zip(names, values)}
        config = self.accelerator.unwrap_model(self.model).config
        self.watch.check_batch(self.state.global_step + 1, losses, inputs, outputs, config.seg_token_id)

    def log(self, logs, start_time=None):
        if "loss" in logs and self._parts:
            # Each micro-batch and process holds its share of the step's loss, so the sum is the loss.
            names = sorted({*LOSS_PARTS, "slots", "slots_right", "ious", "masks"})
            values = [self._parts.get(name, 0.0) for name in names]
            numbers = to_device([0.0 if torch.is_tensor(v) else v for v in values], self.args.device, torch.float32)
            sums = torch.stack([v.float() if torch.is_tensor(v) else n for v, n in zip(values, numbers)])
            sums = self.accelerator.reduce(sums).tolist()  # one read for all
            parts = dict(zip(names, sums))
            trains_objects = self.accelerator.unwrap_model(self.model).config.object_score_loss_weight
            shown = LOSS_PARTS if trains_objects else LOSS_PARTS[:-1]
            logs.update({name: parts[name] / self._steps for name in shown})
            if parts["slots"]:
                logs["slot_accuracy"] = parts["slots_right"] / parts["slots"]
            if parts["masks"]:
                logs["mask_iou"] = parts["ious"] / parts["masks"]
            memory = torch.tensor([peak_memory(self.args.device) / 2**30], device=self.args.device)
            logs["memory_gib"] = float(self.accelerator.gather(memory).max())  # of the process with most
            seconds = time.perf_counter() - self._begun
            logs["images_per_second"] = self._images * self.args.world_size / seconds
            logs["data_wait_share"] = self._data_seconds / seconds
            self._begin_log()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """
        Evaluate the model as it is now, and log the metrics with the names of protocol and convention.

        Predictions for the first images are drawn in `OUTPUT_DIR/validation/step-N/` and sent to TensorBoard and W&B.
        """
        if self.evaluation is None:
            raise ValueError("This trainer has no evaluation; pass GsvaTrainer(evaluation=EvaluationConfig(...)).")
        start, config = time.perf_counter(), self.evaluation
        convention = config.conventions[0]
        with self.accelerator.autocast():  # half-precision frozen weights beside float32 trained ones
            model = self.accelerator.unwrap_model(self.model)
            result = evaluate_rows(model, self.processing_class, config, on_prediction=self._draw)
        values = {**result.metrics(convention), CURVE_AREA: rejection_curve(result.rows)["area"]}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items() if not math.isnan(value)}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        facts = {
            "protocol": config.protocol,
            "protocol_note": PROTOCOL_NOTES[config.protocol],
            "convention": convention,
        }
        self.log({**metrics, **{f"{metric_key_prefix}_{name}": value for name, value in facts.items()}})
        self._show_pictures()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._begun += time.perf_counter() - start  # the time of an evaluation is not training time
        # A metric may depend on the answers (IL_MCC needs rejected ones). As NaN it is never the best; transformers would
        # end the run if it were missing.
        return {f"{metric_key_prefix}_{name}": math.nan for name in values} | metrics

    @property
    def _pictures(self) -> Path:
        return Path(self.args.output_dir) / VALIDATION / f"step-{self.state.global_step}"

    def _draw(self, index: int, row: dict, questions: list[Question], results: list[dict]) -> None:
        """Draw the sheet of one of the first images, on the process that evaluates it."""
        config, step = self.evaluation, self.state.global_step
        if config is None or index >= getattr(self.args, "validation_pictures", 0):
            return
        title = (
            f"{config.dataset} {config.split} {row['image_id']}, step {step}: prediction tinted, truth outlined in white; "
            f"{config.protocol}: {PROTOCOL_NOTES[config.protocol]}"
        )
        with replacing(self._pictures / f"{index:03d}.png") as temporary:
            sheet([(title, make_tiles(read_image(row["image"]), results, questions))]).save(temporary)

    def _show_pictures(self) -> None:
        """Send the pictures that all processes have drawn to TensorBoard and W&B, if `report_to` names them."""
        self.accelerator.wait_for_everyone()
        paths = sorted(self._pictures.glob("[0-9]*.png")) if self.is_world_process_zero() else []
        if not paths:
            return
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for path in paths:
                    with Image.open(path) as picture:
                        pixels = np.asarray(picture)
                    name = f"validation/{path.stem}"
                    callback.tb_writer.add_image(name, pixels, self.state.global_step, dataformats="HWC")
            elif isinstance(callback, WandbCallback) and callback._wandb is not None:
                pictures = [callback._wandb.Image(str(path)) for path in paths]
                callback._wandb.log({"validation": pictures, "train/global_step": self.state.global_step})
