"""What a run says in the terminal: a table row per log, one bar, and no warnings that are not the user's to act on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from conversion.writing import without_progress_bar

# Columns of the table: name in the log, heading, format. Those that the first log lacks are left out.
COLUMNS = (
    ("loss", "loss", "8.4f"),
    ("ce_loss", "ce", "8.4f"),
    ("mask_bce_loss", "bce", "8.4f"),
    ("mask_dice_loss", "dice", "8.4f"),
    ("object_score_loss", "object", "8.4f"),
    ("slot_accuracy", "slots", "8.4f"),
    ("mask_iou", "IoU", "8.4f"),
    ("learning_rate", "lr", "10.2e"),
    ("images_per_second", "images/s", "9.1f"),
    ("memory_gib", "GiB", "6.2f"),
)
METRICS = ("gIoU", "cIoU", "N_acc", "T_acc", "curve_area", "Pr@0.7")


def quieten(log_level: str) -> None:
    """Silence libraries that report what a user cannot act on, such as kernels for cards that are not there.

    Args:
        log_level: Of the training arguments; "debug" leaves everything as it is.
    """
    if log_level == "debug":
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _BarOnly(ProgressCallback):
    """The progress bar of transformers, without its dictionaries."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class RunTable(TrainerCallback):
    """Prints a table row for each log, and a line for each evaluation on the way. Checkpoints are saved without bars."""

    def __init__(self) -> None:
        self.columns: tuple[tuple[str, str, str], ...] = ()
        self._saving = ExitStack()

    def on_train_begin(self, args, state, control, **kwargs):
        self._saving.enter_context(without_progress_bar())

    def on_train_end(self, args, state, control, **kwargs):
        self._saving.close()

    def on_log(self, args, state, control, logs: Mapping[str, Any] | None = None, **kwargs):
        if state.is_world_process_zero and logs:
            for line in self.lines(logs, state.global_step):
                tqdm.write(line)

    def lines(self, logs: Mapping[str, Any], step: int) -> list[str]:
        """Return the lines that a log is worth; none for the summary of transformers at the end.

        >>> for line in RunTable().lines({"loss": 3.184, "ce_loss": 2.365, "learning_rate": 0.0007}, 25):
        ...     print(line)
          step    loss      ce         lr
            25  3.1840  2.3650   7.00e-04
        >>> RunTable().lines({"eval_gIoU": 0.7402, "eval_N_acc": 0.925, "eval_T_acc": None}, 80)
        ['    80  evaluated: gIoU 0.7402  N_acc 0.9250']
        """
        said = [(name, logs.get(f"eval_{name}")) for name in METRICS]
        if any(value is not None for _, value in said):
            words = "  ".join(f"{name} {float(value):.4f}" for name, value in said if value is not None)
            return [f"{step:6}  evaluated: {words}"]
        if "loss" not in logs:
            return []
        lines = []
        if not self.columns:
            self.columns = tuple(column for column in COLUMNS if column[0] in logs)
            lines.append("  step" + "".join(f"{heading:>{_width(spec)}}" for _, heading, spec in self.columns))
        cells = ((logs.get(name), spec) for name, _, spec in self.columns)
        lines.append(
            f"{step:6}"
            + "".join(f"{'-' if v is None else format(float(v), spec):>{_width(spec)}}" for v, spec in cells)
        )
        return lines


def _width(spec: str) -> int:
    return int(spec.partition(".")[0])


def show_as_table(trainer: Trainer) -> None:
    """Let a trainer print a table instead of dictionaries, unless its log level is "debug"."""
    if trainer.args.log_level == "debug":
        return
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(_BarOnly())
    trainer.add_callback(RunTable())
