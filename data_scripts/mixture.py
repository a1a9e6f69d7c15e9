"""Map-style training sets whose items depend on the index alone, so that workers, ranks and resumed runs agree.

Item `epoch * len(dataset) + i` is item `i` in the wording of epoch `epoch`. A sampler that keeps counting from epoch to
epoch (`trainers`) gets new sentences in every epoch and the same sentences in every run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .images import PictureError
from .negatives import Negatives
from .nouns import Categories
from .skipped import SkipList
from .transforms import (
    ConversationTransform,
    Draws,
    Example,
    ReasoningTransform,
    ReferringTransform,
    SemanticTransform,
    Transform,
)

logger = logging.getLogger(__name__)

# family -> (the original's rate, transform, the original's data sets); main.py of LeapLabTHU/GSVA at 618dc79
FAMILIES: dict[str, tuple[float, type[Transform], tuple[str, ...]]] = {
    "sem_seg": (9, SemanticTransform, ("ade20k", "cocostuff", "mapillary", "paco_lvis", "pascal_part")),
    "refer_seg": (3, ReferringTransform, ("refclef", "refcoco", "refcoco+", "refcocog")),
    "vqa": (3, ConversationTransform, ("llava_instruct_150k",)),
    "reason_seg": (1, ReasoningTransform, ("ReasonSeg",)),
}


class _DrawnExamples:
    """A sequence of examples. Rows are drawn for an item until one has something to ask for, `max_redraws` times."""

    def __init__(self, length: int, seed: int, max_redraws: int):
        self.length, self.seed, self.max_redraws = length, seed, max_redraws

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(self.length))

    def __getitem__(self, index: int) -> Example:
        if index < 0:
            raise IndexError(f"Items are numbered epoch * {self.length} + i from 0, got {index}.")
        epoch, i = divmod(int(index), self.length)
        draws = Draws(self.seed, epoch, i)
        source = self.source_of(draws)
        for attempt in range(self.max_redraws + 1):
            example = self.attempt(i, attempt, source, draws)
            if example is not None:
                return example
        raise ValueError(
            f"Item {index}: none of {self.max_redraws + 1} images had anything to ask for; check the data with "
            f"`python -m data_scripts.check`, or allow questions about absent things only (all_absent=True)."
        )

    def source_of(self, draws: Draws) -> Any:
        """Draw what stays the same in all attempts to make an item; nothing by default."""
        return None

    def attempt(self, i: int, attempt: int, source: Any, draws: Draws) -> Example | None:
        """Try to make item `i`; `attempt` counts from 0. Returns None if the row has nothing to ask for."""
        raise NotImplementedError


class TrainingDataset(_DrawnExamples):
    """Every row of a data set once per epoch.

    A row with nothing to ask for (no expression, or only absent ones) is replaced by another row drawn at random. The
    original always takes the first row instead (Q18).

    Args:
        rows: Rows from `data_scripts.load`, or any sequence of such dicts.
        transform: Makes an example from a row; see `transforms.py`.
        seed: A whole number, 0 or more.
        max_redraws: The number of other rows to try before an error.
        on_bad_image: "raise" a `PictureError` that names the file, or "skip" the row for another, with a warning.
            `skipped` counts the skips of this process.
        skip_list: Gets every skipped image, of all worker processes.

    Raises:
        ValueError: There are no rows, or `on_bad_image` has another value.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        transform: Transform,
        seed: int = 0,
        max_redraws: int = 100,
        on_bad_image: str = "raise",
        skip_list: SkipList | None = None,
    ):
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image must be 'raise' or 'skip', got {on_bad_image!r}.")
        if not len(rows):
            raise ValueError("There are no rows to train on.")
        if hasattr(rows, "cast_column"):  # an image is decoded only if the question needs it (Q45)
            from datasets import Image

            rows = rows.cast_column("image", Image(decode=False))
        self.rows, self.transform, self.on_bad_image = rows, transform, on_bad_image
        self.skipped, self.skip_list = 0, skip_list
        super().__init__(len(rows), seed, max_redraws)

    def example(self, i: int, draws: Draws) -> Example | None:
        """Return row `i` as an example, or None if it has nothing to ask for or was skipped."""
        try:
            return self.transform.example(self.rows[i], draws)
        except PictureError as error:
            if self.on_bad_image == "raise":
                raise
            self.skipped += 1
            if self.skip_list is not None:
                self.skip_list.add(error)
            logger.warning("Skipped (%d so far in this process): %s", self.skipped, error)
            return None

    def attempt(self, i: int, attempt: int, source: Any, draws: Draws) -> Example | None:
        return self.example(i if attempt == 0 else draws.index(len(self.rows), "row"), draws)


class Mixture(_DrawnExamples):
    """Families of data sets drawn at given rates: first a family, then one of its data sets, then a row of it.

    Data sets of a family, and rows of a data set, are drawn with equal chance. Further attempts stay in the family, which
    keeps the rates.

    Args:
        families: Name -> (rate, training sets). Rates are relative.
        length: Items per epoch.
        seed: A whole number, 0 or more.
        max_redraws: The number of other rows to try before an error.

    Raises:
        ValueError: No family or item, or a family with a rate of 0 or without data sets.
    """

    def __init__(
        self,
        families: Mapping[str, tuple[float, Sequence[TrainingDataset]]],
        length: int,
        seed: int = 0,
        max_redraws: int = 100,
    ):
        for name, (rate, sources) in families.items():
            if rate <= 0 or not sources:
                raise ValueError(f"Family {name!r} needs a rate above 0 and at least one data set, got rate {rate}.")
        if not families or length < 1:
            raise ValueError(f"A mixture needs at least one family and one item, got {len(families)} and {length}.")
        self.rates = [rate for rate, _ in families.values()]
        self.sources = [list(sources) for _, sources in families.values()]
        super().__init__(length, seed, max_redraws)

    def source_of(self, draws: Draws) -> list[TrainingDataset]:
        return self.sources[draws.weighted(self.rates, "family")]

    def attempt(self, i: int, attempt: int, source: list[TrainingDataset], draws: Draws) -> Example | None:
        dataset = source[draws.index(len(source), "data set")]
        return dataset.example(draws.index(len(dataset), "row"), draws)


def family_of(name: str) -> str:
    """Return the family of a data set. Sets that are in none of the original's lists are referring sets."""
    return next((family for family, (_, _, names) in FAMILIES.items() if name in names), "refer_seg")


def load_mixture(
    data_dir: str,
    datasets: Mapping[str, Sequence[str]] | None = None,
    rates: Mapping[str, float] | None = None,
    length: int = 1,
    seed: int = 0,
    split: str = "train",
    on_bad_image: str = "raise",
    cache_dir: str | None = None,
    transforms: Mapping[str, Transform] | None = None,
    skip_list: SkipList | None = None,
    negatives: float = 0.0,
    negatives_like: str = "noun",
) -> Mixture:
    """Load the original's mixture, or part of it. Only the data sets asked for are loaded.

    Args:
        data_dir: See `data_scripts.load`.
        datasets: Family -> names of its data sets; by default the original's thirteen without grefcoco and refzom.
        rates: Family -> rate; by default the original's 9, 3, 3, 1.
        length: Items per epoch.
        transforms: Family -> transform, to replace the default (the original's wording, three expressions).
        negatives, negatives_like: Draw absent expressions for the referring sets from the texts of all of them, see
            `negatives.Negatives`. The other families stay as they are.
        seed, split, on_bad_image, skip_list, cache_dir: As for `TrainingDataset` and `data_scripts.load`.

    Raises:
        ValueError: A family does not exist, or negatives are to be drawn without referring sets; else the errors of
            `data_scripts.load`.
    """
    from . import categories, load

    datasets = datasets or {family: names for family, (_, _, names) in FAMILIES.items()}
    unknown = (set(datasets) | set(rates or ()) | set(transforms or ())) - set(FAMILIES)
    if unknown:
        raise ValueError(f"There is no family {sorted(unknown)}; the families are {', '.join(FAMILIES)}.")
    families = {}
    for family, members in datasets.items():
        rate, transform, _ = FAMILIES[family]
        chosen = (transforms or {}).get(family) or transform()
        families[family] = (
            (rates or {}).get(family, rate),
            [TrainingDataset(load(name, data_dir, split, cache_dir), chosen, seed, on_bad_image=on_bad_image, skip_list=skip_list)
             for name in members],
        )  # fmt: skip
    if negatives:
        if "refer_seg" not in families:
            raise ValueError(
                f"negatives={negatives:g} are drawn for the family refer_seg, which this mixture does not have; leave them "
                f"out, or add a referring set."
            )
        names, (_, sources) = datasets["refer_seg"], families["refer_seg"]
        known = Categories.united(categories(name, data_dir) for name in names)
        dropped = any(getattr(source.transform, "drop_no_targets", False) for source in sources)
        drawn = Negatives([source.rows for source in sources], negatives, negatives_like, known, dropped)
        for source in sources:
            if isinstance(source.transform, ReferringTransform):
                source.transform.negatives = drawn
    return Mixture(families, length, seed)
