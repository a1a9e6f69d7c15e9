"""Load the training data that the arguments name, one data set or the paper's mixture of several, and batch it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import Image
from transformers import BatchFeature, ProcessorMixin

import data_scripts
from data_scripts.mixture import Mixture, TrainingDataset, family_of, load_mixture
from data_scripts.negatives import Negatives
from data_scripts.skipped import SkipList
from data_scripts.transforms import (
    ConversationTransform,
    PictureError,
    ReasoningTransform,
    ReferringTransform,
    SemanticTransform,
    Wording,
    read_image,
)
from evaluation.config import EvaluationConfig, conventions_for
from modeling_gsva import GsvaProcessor

from .arguments import DataArguments, GsvaTrainingArguments
from .output_folder import SKIPPED

MIXTURE = "mixture"


def load_rows(args: DataArguments, split: str, limit: int | None, name: str | None = None):
    """Return the first `limit` rows (None: all) of a split of the data set `name`, by default `args.dataset`."""
    first = {} if limit is None else {"limit": limit}
    return data_scripts.load(name or args.dataset, args.data_dir, split, **{**args.options, **first})


def training_data(args: DataArguments, training: GsvaTrainingArguments, wording: Wording) -> TrainingDataset | Mixture:
    """
    Return training examples by index.

    In an epoch of a data set each image comes once. An epoch of the mixture is `steps_per_epoch` optimizer steps of
    examples drawn with replacement, as in the original (main.py: batch_size * grad_accumulation_steps *
    steps_per_epoch * world_size).

    Raises:
        ValueError: The mixture has no `data_dir`, or names families that do not exist; or there are no expressions to draw
            absent ones from.
    """
    referring = ReferringTransform(wording, args.num_expressions, args.all_absent, args.drop_no_targets)
    if args.dataset != MIXTURE:
        rows = load_rows(args, args.train_split, args.max_train_samples)
        transform = ConversationTransform() if "conversation" in rows.column_names else referring
        if args.negatives:
            referring.negatives = negatives_of(args, rows)
        return TrainingDataset(rows, transform, training.seed, **bad_images(args, training))
    if args.data_dir is None:
        raise ValueError("dataset='mixture' needs data_dir, the folder that holds the data sets' files.")
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    return load_mixture(
        args.data_dir,
        datasets=args.mixture_families,
        rates=args.mixture_family_rates,
        length=args.steps_per_epoch * per_step,
        seed=training.seed,
        split=args.train_split,
        **bad_images(args, training),
        negatives=args.negatives,
        negatives_like=args.negatives_like,
        transforms={
            "refer_seg": referring,
            "sem_seg": SemanticTransform(num_expressions=args.num_expressions),
            "reason_seg": ReasoningTransform(num_expressions=args.num_expressions),
        },
    )


def negatives_of(args: DataArguments, rows: Any) -> Negatives:
    """Return what draws absent expressions for the rows of a data set.

    Raises:
        ValueError: The data set has no expressions that name things.
    """
    if "expressions" not in rows.column_names or family_of(args.dataset) == "reason_seg":
        raise ValueError(
            f"negatives={args.negatives:g} needs expressions that name things, from which absent ones are drawn, and "
            f"{args.dataset} has questions instead; leave negatives out, or train on a referring set."
        )
    categories = data_scripts.categories(args.dataset, args.data_dir)
    return Negatives([rows], args.negatives, args.negatives_like, categories, args.drop_no_targets)


def describe_negatives(dataset: TrainingDataset | Mixture) -> str:
    """Return a sentence about the absent expressions that are drawn for a training set, or "" if none are."""
    parts = [part for family in dataset.sources for part in family] if isinstance(dataset, Mixture) else [dataset]
    drawn = (getattr(getattr(part, "transform", None), "negatives", None) for part in parts)
    return next((str(negatives) for negatives in drawn if negatives is not None), "")


def skip_list(args: DataArguments, training: GsvaTrainingArguments) -> SkipList | None:
    """Return the list of skipped images of a run; None if a bad image is an error."""
    return SkipList(Path(training.output_dir) / SKIPPED) if args.on_bad_image == "skip" else None


def skipped_images(output_dir: str | Path) -> str:
    """Return the images that a run has skipped with their number, or "" if there are none."""
    return SkipList(Path(output_dir) / SKIPPED).summary()


def bad_images(args: DataArguments, training: GsvaTrainingArguments) -> dict[str, Any]:
    """Return what a training set does with images that cannot be read, as its options."""
    skipped = skip_list(args, training)
    return {"on_bad_image": "raise" if skipped is None else "skip", "skip_list": skipped}


def readable_rows(rows: Any, skipped: SkipList | None) -> Any:
    """Return the rows whose images can be read. Every image is decoded once for that; the others are listed."""
    if skipped is None:
        return rows
    undecoded = rows.cast_column("image", Image(decode=False)) if hasattr(rows, "cast_column") else rows
    readable = []
    for index, row in enumerate(undecoded):
        try:
            read_image(row["image"], (row["height"], row["width"]) if "height" in row else None)
            readable.append(index)
        except PictureError as error:
            skipped.add(error)
    return rows if len(readable) == len(rows) else rows.select(readable)


def load_training_data(
    processor: GsvaProcessor, args: DataArguments, training: GsvaTrainingArguments
) -> TrainingDataset | Mixture:
    """Return `training_data` in the wording that the arguments name."""
    return training_data(args, training, ProcessorWording(processor) if args.wording == "processor" else Wording())


def num_images(dataset: TrainingDataset | Mixture) -> int:
    """Return the number of rows that examples are made from."""
    parts = [part for family in dataset.sources for part in family] if isinstance(dataset, Mixture) else [dataset]
    return sum(len(part.rows) for part in parts)


@dataclass(frozen=True)
class ProcessorWording(Wording):
    """Words training examples as the processor words evaluation, so that a small model need not learn twenty phrasings."""

    # One question and one answer to draw from. Their text is not used.
    questions: tuple[str, ...] = field(default=("processor",), init=False)
    answers: tuple[tuple[str, str], ...] = field(default=(("processor", ""),), init=False)
    separator: str = field(default=", ", init=False)
    processor: GsvaProcessor

    def question(self, template, names):
        return self.processor.build_conversation(list(names))[0]["content"]

    def answer(self, template, names, present):
        return self.processor.build_conversation(list(names), [not there for there in present])[1]["content"]


@dataclass
class GsvaCollator:
    """
    Batches examples `{"image", "conversations", "masks"}` (see `data_scripts/transforms.py`). Every image is stacked
    once, even if several conversations are about it; `image_index` holds the image of each conversation, or -1.

    >>> batch = collator([{"image": picture, "conversations": [talk, talk], "masks": [mask, mask]},
    ...                   {"image": None, "conversations": [talk], "masks": [no_mask]}])  # doctest: +SKIP
    >>> batch["image_index"]  # doctest: +SKIP
    tensor([ 0,  0, -1])

    Args:
        processor: A [`GsvaProcessor`].
        max_length: Longest conversation in tokens, including the placeholders of the image.
        always_an_image: Whether a batch without images gets a black one that no conversation shows. Where each process holds
            a shard of the weights (ZeRO-3), all of them must run the frozen towers, or they wait for each other forever.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    always_an_image: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> BatchFeature:
        images, conversations, image_index, masks = [], [], [], []
        for example in examples:
            if example["image"] is not None:
                images.append(example["image"])
            for conversation, mask in zip(example["conversations"], example["masks"], strict=True):
                conversations.append(conversation)
                has_image = example["image"] is not None and any("<image>" in turn["content"] for turn in conversation)
                image_index.append(len(images) - 1 if has_image else -1)
                masks.append(mask)
        if self.always_an_image and not images:
            images.append(PIL.Image.new("RGB", (64, 64)))
        return self.processor(
            images=images,
            conversations=conversations,
            image_index=image_index,
            masks=masks,
            max_length=self.max_length,
            return_tensors="pt",
        )


def evaluation_config(
    args: DataArguments,
    training: GsvaTrainingArguments,
    protocol: str,
    rows: Sequence[dict[str, Any]] | None = None,
    limit: int | None = None,
) -> EvaluationConfig:
    """Return the settings of an evaluation as the arguments name them.

    Args:
        protocol: One of `PROTOCOLS`.
        rows: The rows to evaluate; by default the first of the evaluation split.
        limit: Evaluate at most this number of images, beside `max_eval_samples`.
    """
    limit = min((n for n in (limit, args.max_eval_samples) if n is not None), default=None)
    evaluated_rows: Any = rows
    if rows is None:
        evaluated_rows = load_rows(args, args.eval_split, limit, args.evaluated)
        evaluated_rows = readable_rows(evaluated_rows, skip_list(args, training))
    return EvaluationConfig(
        rows=evaluated_rows,
        dataset=args.evaluated,
        split=args.eval_split,
        protocol=protocol,
        batch_size=training.per_device_eval_batch_size,
        one_prompt_per_expression=args.one_prompt_per_expression,
        threshold=args.threshold,
        conventions=conventions_for(args.evaluated, args.conventions),
        threads=training.threads or 1,
        max_new_tokens=args.max_new_tokens,
        ignore_region=args.ignore_region,
        task=args.eval_task,
        annotation_files=data_scripts.annotations_digest(args.evaluated, args.data_dir) if rows is None else None,
    )
