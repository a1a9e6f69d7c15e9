"""Training sets: map-style, and a pure function of the index, so that workers, ranks and resumed runs agree.

Item `epoch * len(dataset) + i` is item `i` as epoch `epoch` words it: a sampler that counts on from epoch to epoch
(`trainers`) gets new sentences in every epoch and the same ones in every run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .transforms import (
    ConversationTransform,
    Draws,
    Example,
    PictureError,
    ReasoningTransform,
    ReferringTransform,
    SemanticTransform,
    Transform,
)

logger = logging.getLogger(__name__)

# family -> (the original's rate, transform, the original's data sets); see main.py of LeapLabTHU/GSVA at 618dc79
FAMILIES: dict[str, tuple[float, type[Transform], tuple[str, ...]]] = {
    "sem_seg": (9, SemanticTransform, ("ade20k", "cocostuff", "mapillary", "paco_lvis", "pascal_part")),
    "refer_seg": (3, ReferringTransform, ("refclef", "refcoco", "refcoco+", "refcocog")),
    "vqa": (3, ConversationTransform, ("llava_instruct_150k",)),
    "reason_seg": (1, ReasoningTransform, ("ReasonSeg",)),
}


class _Indexed:
    """A sequence whose item is found by drawing until there is something to ask for, within bounds."""

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
        draw = self.source(i, draws)
        for _ in range(self.max_redraws + 1):
            example = draw()
            if example is not None:
                return example
        raise ValueError(
            f"Item {index}: none of {self.max_redraws + 1} pictures had anything to ask for; check the data with "
            f"`python -m data_scripts.check`, or let questions be about absent things only (all_absent=True)."
        )

    def source(self, i: int, draws: Draws) -> Callable[[], Example | None]:
        """A function that tries once to make item `i`."""
        raise NotImplementedError


class TrainingDataset(_Indexed):
    """Every row of a data set once per epoch.

    A row with nothing to ask for (no expression, or only absent ones) gives its place to another, drawn at random:
    the original takes the first row instead, again and again (Q18).

    Args:
        rows: Rows as `data_scripts.load` gives them, or any sequence of such dicts.
        transform: Makes an example of a row; see `transforms.py`.
        seed: A number from 0.
        max_redraws: How many other rows to try before giving up.
        on_bad_image: "raise" a `PictureError` that names the file, or "skip" the row for another, with a warning.
            `skipped` counts the skips of this process.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        transform: Transform,
        seed: int = 0,
        max_redraws: int = 100,
        on_bad_image: str = "raise",
    ):
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"on_bad_image must be 'raise' or 'skip', got {on_bad_image!r}.")
        if not len(rows):
            raise ValueError("There are no rows to train on.")
        if hasattr(rows, "cast_column"):  # the picture is read only once it is known that it is wanted (Q45)
            from datasets import Image

            rows = rows.cast_column("image", Image(decode=False))
        self.rows, self.transform, self.on_bad_image = rows, transform, on_bad_image
        self.skipped = 0
        super().__init__(len(rows), seed, max_redraws)

    def example(self, i: int, draws: Draws) -> Example | None:
        """Row `i` as `draws` words it; None when it has nothing to ask for, or was skipped."""
        try:
            return self.transform.example(self.rows[i], draws)
        except PictureError as error:
            if self.on_bad_image == "raise":
                raise
            self.skipped += 1
            logger.warning("Skipped (%d so far in this process): %s", self.skipped, error)
            return None

    def source(self, i: int, draws: Draws) -> Callable[[], Example | None]:
        first = iter([i])

        def draw() -> Example | None:
            row = next(first, None)
            return self.example(draws.index(len(self.rows), "row") if row is None else row, draws)

        return draw


class Mixture(_Indexed):
    """Families of data sets drawn at given rates: first a family, then evenly a data set in it, then evenly a row.

    Drawing again stays within the family, which keeps the rates.

    Args:
        families: Name -> (rate, its training sets). Rates are relative.
        length: Items per epoch.
        seed: A number from 0.
        max_redraws: How many other rows to try before giving up.
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

    def source(self, i: int, draws: Draws) -> Callable[[], Example | None]:
        family = self.sources[draws.weighted(self.rates, "family")]

        def draw() -> Example | None:
            source = family[draws.index(len(family), "data set")]
            return source.example(draws.index(len(source), "row"), draws)

        return draw


def family_of(name: str) -> str:
    """The family of a data set; what is in none of the original's lists is a referring set."""
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
) -> Mixture:
    """The original's mixture, or part of it; nothing is loaded that is not asked for.

    Args:
        data_dir: See `data_scripts.load`.
        datasets: Family -> names of its data sets; by default the original's thirteen less grefcoco and refzom.
        rates: Family -> rate; by default the original's 9, 3, 3, 1.
        length: Items per epoch.
        transforms: Family -> transform, where the default one (the original's wording, three expressions) is not meant.
        seed, split, on_bad_image, cache_dir: As for `TrainingDataset` and `data_scripts.load`.
    """
    from . import load

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
            [TrainingDataset(load(name, data_dir, split, cache_dir), chosen, seed, on_bad_image=on_bad_image)
             for name in members],
        )  # fmt: skip
    return Mixture(families, length, seed)
