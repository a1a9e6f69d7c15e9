"""Training data as the arguments name it: one data set, or the paper's mixture of several."""

import data_scripts
from data_scripts.mixture import Mixture, TrainingDataset, load_mixture
from data_scripts.transforms import (
    ConversationTransform,
    ReasoningTransform,
    ReferringTransform,
    SemanticTransform,
    Wording,
)

from .arguments import DataArguments, GsvaTrainingArguments

MIXTURE = "mixture"


def load_rows(args: DataArguments, split: str, limit: int | None, name: str | None = None):
    """The first `limit` rows (None: all) of a split of `name`, by default of `args.dataset`."""
    rows = data_scripts.load(name or args.dataset, args.data_dir, split, **args.options)
    return rows.select(range(min(limit, len(rows)))) if limit is not None else rows


def training_data(args: DataArguments, training: GsvaTrainingArguments, wording: Wording) -> TrainingDataset | Mixture:
    """
    Training examples by index. An epoch of a data set is every picture once; an epoch of the mixture is
    `steps_per_epoch` optimizer steps of examples drawn with replacement, as in the original (main.py:
    batch_size * grad_accumulation_steps * steps_per_epoch * world_size).

    Raises:
        ValueError: a mixture without data_dir, or of families that do not exist.
    """
    referring = ReferringTransform(wording, args.num_expressions, args.all_absent)
    if args.dataset != MIXTURE:
        rows = load_rows(args, args.train_split, args.max_train_samples)
        transform = ConversationTransform() if "conversation" in rows.column_names else referring
        return TrainingDataset(rows, transform, training.seed)
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
        transforms={
            "refer_seg": referring,
            "sem_seg": SemanticTransform(num_expressions=args.num_expressions),
            "reason_seg": ReasoningTransform(num_expressions=args.num_expressions),
        },
    )


def pictures_in(dataset: TrainingDataset | Mixture) -> int:
    """How many rows there are to draw from."""
    parts = [part for family in dataset.sources for part in family] if isinstance(dataset, Mixture) else [dataset]
    return sum(len(part.rows) for part in parts)
