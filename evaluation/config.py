"""The settings of an evaluation: its data, its protocol, and the pixels that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metrics.gres import CONVENTIONS
from modeling_gsva.segmentation_gsva import check_threshold

# The protocols, with the note that accompanies all their numbers.
PROTOCOL_NOTES = {
    "teacher_forced": "gold answers were in the model's input (the original's published protocol)",
    "slots": "the answer's wording was given, every slot was the model's own choice",
    "generate": "answers were generated from the question alone",
}
PROTOCOLS = tuple(PROTOCOL_NOTES)
IGNORE_REGIONS = ("foreground", "ignored")
TASKS = ("referring", "reasoning")
# Data sets that the original scores with its `validate`, which knows no rejection, instead of with `eval_gres`.
SCORED_BY_VALIDATE = ("refclef", "refcoco", "refcoco+", "refcocog", "ReasonSeg")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}.")


@dataclass(frozen=True)
class EvaluationConfig:
    """The settings of one evaluation. They never change while it runs.

    Args:
        rows: Segmentation rows of data_scripts.
        dataset, split: Their names, for the record.
        protocol: "teacher_forced", "slots" or "generate".
        batch_size: Images per batch.
        one_prompt_per_expression: Ask for each expression in a separate prompt. By default, one prompt holds all
            expressions of an image.
        threshold: Reject a slot whose log-odds are below this (`slots`). None takes the calibrated threshold of the model,
            or 0, see `for_model`.
        conventions: Conventions of the metrics, see `conventions_for`. Training logs the first.
        max_new_tokens: Longest answer in tokens (`generate`).
        threads: CPU threads of each process. With the same number in every process, sums are added up in the same
            order, and rows are identical on any number of processes.
        ignore_region: How to treat the pixels that the data set (ReasonSeg) excludes. "foreground" makes them part of the
            target, as the original's `.bool()` does (quirk Q5, which changes published numbers). "ignored" leaves them
            out, as LISA does.
        task: "referring", or "reasoning". Reasoning asks only for the first text of each image, as a phrase or a sentence
            (quirk Q6). None chooses by the name of the data set.
        labels: Further fields of every row, such as `stage` and `model`.
        annotation_files: A digest of the files that the rows were read from (`data_scripts.annotations_digest`).
    """

    rows: Sequence[dict[str, Any]]
    dataset: str
    split: str
    protocol: str = "slots"
    batch_size: int = 16
    one_prompt_per_expression: bool = False
    threshold: float | None = None
    conventions: tuple[str, ...] = ("rela",)
    max_new_tokens: int = 128
    threads: int = 1
    ignore_region: str = "foreground"
    task: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotation_files: str | None = None

    def __post_init__(self):
        check_choice("protocol", self.protocol, PROTOCOLS)
        check_choice("ignore_region", self.ignore_region, IGNORE_REGIONS)
        if self.task is not None:
            check_choice("task", self.task, TASKS)
        for convention in self.conventions:
            check_choice("conventions", convention, CONVENTIONS)
        if self.threshold is not None:
            check_threshold(self.threshold)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} evaluates nothing; give 1 or more.")

    @property
    def prompts(self) -> str:
        """Return the name of the way of asking, for records and tables."""
        return "one per expression" if self.one_prompt_per_expression else "all expressions in one"

    @property
    def is_reasoning(self) -> bool:
        """Return whether ReasonSeg's rules apply."""
        task = self.task or ("reasoning" if "reasonseg" in Path(self.dataset).name.lower() else "referring")
        return task == "reasoning"

    @property
    def used_threshold(self) -> float | None:
        """Return the threshold, or None where the protocol has none."""
        return (self.threshold or 0.0) if self.protocol == "slots" else None

    def for_model(self, model) -> EvaluationConfig:
        """Return the settings with the model's threshold where none is set."""
        if self.threshold is not None or self.protocol != "slots":
            return self
        return replace(self, threshold=model.config.rejection_values["threshold"])


def conventions_for(dataset: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the conventions to report for a data set: "gsva" stands for the function that the original uses on it.

    >>> conventions_for("refcoco+", ["rela", "gsva"])
    ('rela', 'gsva_validate')
    """
    validated = Path(dataset).name in SCORED_BY_VALIDATE
    return tuple(dict.fromkeys("gsva_validate" if name == "gsva" and validated else name for name in names))
