"""Watch the evaluations of a training run: T-acc must not fall below a bound, and the metric of the best model must exist."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import IntervalStrategy, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from data_scripts.masks import mask_area
from data_scripts.wordings import clean_expression
from evaluation.config import EvaluationConfig
from metrics.gres import LOWER_IS_BETTER, METRIC_KEYS

logger = logging.getLogger(__name__)

CURVE_AREA = "curve_area"
# What an evaluation during training logs, each as "eval_" and its name.
WATCHED = (*METRIC_KEYS, CURVE_AREA)
NEED_SCORES = ("AUROC", "AP", "ECE", "N3R", CURVE_AREA)
ABSENT, PRESENT, SINGLE = "without a target", "with a target", "with a single target"  # kinds of expressions
GUARDS = ("warn", "stop")
T_ACC = "eval_T_acc"


def check_best_metric(args: Any) -> None:
    """
    Refuse a metric for the best model that evaluation does not give. Set its default, and whether greater is better.

    Args:
        args: The training arguments, before those of transformers are checked.

    Raises:
        ValueError: There is no such metric, the wrong end of it is asked for, or there is no evaluation during training.
    """
    if args.metric_for_best_model is None:
        if not args.load_best_model_at_end and args.save_strategy != "best":
            return
        args.metric_for_best_model = "gIoU"
    # N_acc may be written as in the paper: N-acc.
    name = args.metric_for_best_model.removeprefix("eval_").replace("-acc", "_acc")
    if name not in WATCHED:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not known; choose one of {', '.join(WATCHED)}."
        )
    args.metric_for_best_model = name
    is_used = args.load_best_model_at_end or args.save_strategy == "best"
    if is_used and IntervalStrategy(args.eval_strategy) == IntervalStrategy.NO:
        asked = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy=best"
        raise ValueError(f"{asked} needs evaluations during training: give --eval_strategy steps or epoch.")
    if args.greater_is_better is None:
        args.greater_is_better = name not in LOWER_IS_BETTER
    if args.greater_is_better != (name not in LOWER_IS_BETTER):
        raise ValueError(
            f"greater_is_better={args.greater_is_better} would keep the worst model by {name}; leave greater_is_better out."
        )


def check_guard(args: Any) -> None:
    """
    Refuse a guard that cannot work.

    Args:
        args: The training arguments, before those of transformers are checked.

    Raises:
        ValueError: The bound is not a part, there are no evaluations during training, or there is nothing to keep.
    """
    if args.guard not in GUARDS:
        raise ValueError(f"guard={args.guard!r} is not known; choose one of {', '.join(GUARDS)}.")
    if args.guard_T_acc is None:
        if args.guard == "stop":
            raise ValueError("guard=stop needs the bound below which training stops: give --guard_T_acc, say 0.95.")
        return
    if not 0 < args.guard_T_acc <= 1:
        raise ValueError(
            f"guard_T_acc={args.guard_T_acc} is not possible: T-acc is a part, so give a number above 0 and up to 1, say 0.95."
        )
    if IntervalStrategy(args.eval_strategy) == IntervalStrategy.NO:
        raise ValueError("guard_T_acc needs evaluations during training: give --eval_strategy steps or epoch.")
    if args.guard == "stop" and SaveStrategy(args.save_strategy) == SaveStrategy.NO:
        raise ValueError("guard=stop keeps the last checkpoint above guard_T_acc, but save_strategy=no saves none.")


def check_watched(args: Any, config: EvaluationConfig) -> None:
    """
    Refuse to watch a metric that the evaluations during training cannot give, before the first of them fails.

    Args:
        args: The training arguments.
        config: The settings of the evaluations during training.

    Raises:
        ValueError: The evaluated images have no expression of the kind that the metric counts, or answers have no scores.
    """
    names = {"guard_T_acc": "T_acc" if args.guard_T_acc is not None else None}
    if args.load_best_model_at_end or args.save_strategy == "best":
        names["metric_for_best_model"] = args.metric_for_best_model
    wanted = {option: name for option, name in names.items() if name is not None}
    if not wanted:
        return
    kinds = _kinds(config)
    for option, name in wanted.items():
        missing = [kind for kind in _needed(name) if kind not in kinds]
        if missing:
            raise ValueError(
                f"{option}: {name} is not defined on the first {len(config.rows)} images of {config.dataset} "
                f"{config.split}, which have no expression {' and none '.join(missing)}; choose another metric, or evaluate "
                f"on more images (--max_eval_samples_in_training) or other ones."
            )
        if name in NEED_SCORES and config.protocol == "generate":
            raise ValueError(
                f"{option}: {name} needs a score for every expression, which generated answers need not have; put slots first "
                f"in --protocols, or choose another metric."
            )


def _needed(name: str) -> tuple[str, ...]:
    """Return the kinds of expressions without which a metric is not defined."""
    if name in ("AUROC", "IL_MCC", "cgF1", CURVE_AREA):
        return (ABSENT, PRESENT)
    if name in ("N_acc", "N3R"):
        return (ABSENT,)
    if name == "REC":
        return (SINGLE,)
    return (PRESENT,) if name in ("T_acc", "AP", "pmF1") or name.startswith("Pr@") else ()


def _kinds(config: EvaluationConfig) -> set[str]:
    """Return the kinds of expressions that an evaluation asks about."""
    kinds: set[str] = set()
    rows: Any = config.rows
    if hasattr(rows, "select_columns") and "expressions" in rows.column_names:
        rows = rows.select_columns(["expressions"])  # no image is decoded
    for row in rows:
        entries = row.get("expressions", ())
        for entry in entries[:1] if config.is_reasoning else entries:
            if clean_expression(entry["text"]):
                if not mask_area(entry["mask"]):
                    kinds.add(ABSENT)
                else:
                    kinds |= {PRESENT, SINGLE} if entry["num_targets"] == 1 else {PRESENT}
        if len(kinds) == 3:
            break
    return kinds


def steps_above(history: Iterable[Mapping[str, Any]], bound: float) -> dict[int, float]:
    """Return the T-acc of the steps whose evaluation in a trainer's `log_history` is at least `bound`, oldest first.

    >>> steps_above([{"step": 5, "eval_T_acc": 0.97}, {"step": 10, "eval_T_acc": 0.9}], 0.95)
    {5: 0.97}
    """
    latest = {entry["step"]: float(entry[T_ACC]) for entry in history if entry.get(T_ACC) is not None}
    return {step: value for step, value in sorted(latest.items()) if value >= bound}


def guarded_checkpoint(history: Sequence[Mapping[str, Any]], bound: float, output_dir: str | Path) -> str | None:
    """Return the newest `checkpoint-N` whose weights were evaluated with a T-acc of at least `bound`, or None."""
    folders = (Path(output_dir) / f"checkpoint-{step}" for step in reversed(steps_above(history, bound)))
    return next((str(folder) for folder in folders if folder.is_dir()), None)


class GuardTAcc(TrainerCallback):
    """
    Warns of each evaluation whose T-acc is below a bound, or ends training at the first one.

    Every evaluation above the bound saves a checkpoint, so that there is one to go back to; `GsvaTrainer` never deletes the
    newest of them. Its name is said at the end. All of it follows from the log, so a resumed run does the same.

    Args:
        bound: The bound, above 0 and up to 1.
        mode: "warn" or "stop".
    """

    def __init__(self, bound: float, mode: str = "warn"):
        self.bound, self.mode = bound, mode

    def on_train_begin(self, args, state, control, **kwargs):
        # A run that this guard has stopped stays stopped when the same command is given again.
        if self.mode == "stop" and self._is_below(state):
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, metrics: Mapping[str, float] | None = None, **kwargs):
        value = (metrics or {}).get(T_ACC)
        if value is None:
            return
        if value >= self.bound:
            control.should_save = SaveStrategy(args.save_strategy) != SaveStrategy.NO
            return
        control.should_training_stop |= self.mode == "stop"
        if state.is_world_process_zero:
            ending = " Training stops." if self.mode == "stop" else ""
            logger.warning("%s%s", self.sentence(args, state), ending)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and any(T_ACC in entry for entry in state.log_history):
            print(self.sentence(args, state), flush=True)

    def _is_below(self, state) -> bool:
        values = [entry[T_ACC] for entry in state.log_history if entry.get(T_ACC) is not None]
        return bool(values) and values[-1] < self.bound

    def sentence(self, args, state) -> str:
        """Return where the last evaluation stands to the bound, and the checkpoint to go back to."""
        step, value = [(entry["step"], entry[T_ACC]) for entry in state.log_history if entry.get(T_ACC) is not None][
            -1
        ]
        place = "below" if value < self.bound else "not below"
        words = f"guard_T_acc: at step {step} T_acc is {value:.4f}, {place} {self.bound:g}."
        kept = guarded_checkpoint(state.log_history, self.bound, args.output_dir)
        if kept is None:
            return f"{words} No checkpoint has been above it."
        of_kept = steps_above(state.log_history, self.bound)[int(kept.rpartition("-")[2])]
        return f"{words} The last checkpoint that is not below it is {kept} ({of_kept:.4f})."
