"""Absent expressions for data that has none: texts of other images, about things that an image does not show.

    python -m data_scripts.negatives DATA --out negatives.jsonl [--negatives 0.3] [--negatives_like attribute]

DATA is the name of a data set (with --data_dir), a folder of your own data, or a set that `data_scripts.publish` wrote.
The command writes what training with the same options would draw in its first epoch, for people to look through: a JSON
line per image, and a page with the first images. Absent texts that people have confirmed belong in the data's "absent"
lists.

A text is drawn only if it has a target in the image that it comes from: a text that is absent everywhere would teach
that text, not the look of its absence. Its head nouns must be known and must not be general ("thing", "shape").
`nouns.py` has the rules for nouns and attributes; they are for English.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from .files import refuse_existing, render, write_text
from .images import read_image
from .masks import empty_mask, mask_area, merge_masks
from .nouns import Categories, Part, read_phrase
from .schema import expression
from .wordings import clean_expression

if TYPE_CHECKING:
    from .transforms import Draws, ReferringTransform

PAGE = Path(__file__).parent / "templates" / "negatives.html.jinja"
PICTURE_SIDE = 240  # pixels of an image on the page
LIKE = ("noun", "attribute")
TRIES = 24  # texts to try at random before all of them are looked through
# An expression shows nothing else than what other expressions show of it if they cover this part of its target. Masks of
# one thing that were drawn twice differ at their edges.
COVERED = 0.9


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image: its texts in lower case, all words that may be nouns, and its categories."""

    texts: frozenset[str]
    nouns: frozenset[str]
    categories: frozenset[str]


class Negatives:
    """Draws absent expressions for an image from the texts of other images.

    Which texts are drawn depends on the image's row and on the random numbers alone, which are those of seed, epoch and
    index. So all workers, processes and resumed runs draw the same.

    Args:
        sources: The rows of one data set, or of several that are trained on together.
        share: The part of the expressions asked in a question that is drawn, from 0 (nothing) to below 1.
        like: "noun" draws texts whose head nouns and categories the image does not have. "attribute" prefers texts that
            share a head noun with the image and differ in an attribute, such as "the red car" where the image has a blue
            one; every second time first those whose attribute another thing of the image has, such as a red bus. Where
            there is none, it draws as "noun" does.
        categories: The categories of the annotations, if the data has them.
        drop_no_targets: Whether to leave out the rows' own expressions without a target, as if the data did not have them.
            The rows given to `draw` must lack them, too.

    Attributes:
        without: The number of images for which no text can be drawn as "noun" does.

    Raises:
        ValueError: The share or the way of drawing is not one.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[dict[str, Any]]],
        share: float,
        like: str = "noun",
        categories: Categories | None = None,
        drop_no_targets: bool = False,
    ):
        check_negatives(share, 1, all_absent=True)
        if like not in LIKE:
            raise ValueError(f"negatives_like={like!r} is not known; choose one of {', '.join(LIKE)}.")
        self.share, self.like, self.categories = share, like, categories or Categories()
        counts: Counter[str] = Counter()
        nouns_of: dict[str, set[str]] = {}
        texts_of: dict[str, set[str]] = {}
        rows_of: Counter[str] = Counter()
        for row in _texts(sources):
            rows_of[row["image_id"]] += 1
            texts = texts_of.setdefault(row["image_id"], set())
            nouns = nouns_of.setdefault(row["image_id"], set())
            for entry in row["expressions"]:
                if drop_no_targets and not _has_target(entry):
                    continue
                if text := clean_expression(entry["text"]):
                    texts.add(text.lower())
                    nouns |= read_phrase(text).nouns
                    if _has_target(entry) and not entry["is_sentence"]:
                        counts[text] += 1
        # An image of several rows, or of several data sets, has what all of them say of it.
        self.several = {key: (texts_of[key], nouns_of[key]) for key, count in rows_of.items() if count > 1}
        self.texts = sorted(counts)
        weights = np.array([counts[text] for text in self.texts], dtype=np.int64)
        self.groups, self.by_attribute = self._group(weights)
        drawable = {head for heads in self.groups for head in heads}
        self.num_images = len(nouns_of)
        self.without = sum(not any(map(nouns.isdisjoint, self.groups)) for nouns in nouns_of.values())
        self.num_heads = len(drawable)

    def _group(self, weights: np.ndarray) -> tuple[dict[frozenset[str], np.ndarray], dict[str, np.ndarray]]:
        """Return the numbers of texts, each as often as it occurs, by their head nouns, and of those with an attribute."""
        groups: dict[frozenset[str], list[int]] = {}
        by_attribute: dict[str, list[int]] = {}
        for number, text in enumerate(self.texts):
            phrase = read_phrase(text)
            if all(not part.is_generic for part in phrase.parts):
                groups.setdefault(phrase.heads, []).append(number)
            if len(phrase.parts) == 1 and phrase.parts[0].head and phrase.parts[0].attributes:
                by_attribute.setdefault(phrase.parts[0].head, []).append(number)

        def often(numbers: list[int]) -> np.ndarray:
            return np.repeat(np.array(numbers, dtype=np.int32), weights[numbers])

        self.all = often([number for numbers in groups.values() for number in numbers])
        return (
            {heads: often(groups[heads]) for heads in sorted(groups, key=sorted)},
            {head: often(by_attribute[head]) for head in sorted(by_attribute)},
        )

    def __str__(self) -> str:
        way = ", or another attribute of the same noun" if self.like == "attribute" else ""
        text = (
            f"Absent expressions (negatives {self.share:g}): drawn from {len(self.texts)} texts with {self.num_heads} head "
            f"nouns, for an image those with another noun{way}."
        )
        if self.without == self.num_images:
            return f"{text} No image has any left to draw by noun: they all name the same things."
        if self.without:
            text += f" {self.without} of {self.num_images} images have none left to draw by noun."
        return text

    def facts(self, row: dict[str, Any]) -> ImageFacts:
        """Return what is known of the image of a row, from all rows that show it."""
        texts = {text.lower() for entry in row["expressions"] if (text := clean_expression(entry["text"]))}
        nouns = {noun for text in texts for noun in read_phrase(text).nouns}
        other_texts, other_nouns = self.several.get(row["image_id"], ((), ()))
        categories = self.categories.of_image.get(row["image_id"], frozenset())
        nouns |= {noun for name in categories for noun in read_phrase(name).nouns}
        return ImageFacts(frozenset(texts.union(other_texts)), frozenset(nouns.union(other_nouns)), categories)

    def is_another_thing(self, text: str, facts: ImageFacts) -> bool:
        """Return whether the image has no text, no head noun and no category of a text."""
        phrase = read_phrase(text)
        return (
            text.lower() not in facts.texts
            and all(not part.is_generic for part in phrase.parts)
            and phrase.heads.isdisjoint(facts.nouns)
            and facts.categories.isdisjoint(self._categories_of(text))
        )

    def _categories_of(self, text: str) -> frozenset[str]:
        return self.categories.of_text.get(text.lower(), frozenset())

    def has_another_attribute(self, text: str, row: dict[str, Any], facts: ImageFacts) -> bool:
        """Return whether a thing of the image has the noun of a text, and everything the image's texts show differs from it.

        Each target must be shown not to be what the text names: by its own text or by others that cover it, which have
        another noun, or another value of an attribute.
        """
        (wanted,) = read_phrase(text).parts
        if text.lower() in facts.texts:
            return False
        others, unclear, is_like = [], [], False
        for entry in row["expressions"]:
            if not clean_expression(entry["text"]) or not mask_area(entry["mask"]):
                continue
            parts = read_phrase(clean_expression(entry["text"])).parts
            if all(self._excludes(part, wanted, entry["text"], text) for part in parts):
                others.append(entry["mask"])
                is_like |= any(part.head == wanted.head and part.differs_in_attribute(wanted) for part in parts)
            else:
                unclear.append(entry["mask"])
        if not is_like:
            return False
        if not unclear:
            return True
        shown = merge_masks(others)
        area = mask_area(shown)
        # |target without shown| = |target or shown| - |shown|
        return all(mask_area(merge_masks([mask, shown])) - area <= (1 - COVERED) * mask_area(mask) for mask in unclear)

    def _excludes(self, part: Part, wanted: Part, text_of_part: str, text: str) -> bool:
        if part.differs_in_attribute(wanted):
            return True
        of_part = self._categories_of(clean_expression(text_of_part))
        return part.excludes(wanted) and (not of_part or of_part.isdisjoint(self._categories_of(text)))

    def draw(self, row: dict[str, Any], count: int, draws: Draws) -> list[str]:
        """Return up to `count` different texts that are absent from the image of a row; fewer if there are no more."""
        facts, drawn = self.facts(row), list[str]()
        for _ in range(count):
            taken = ImageFacts(facts.texts.union(text.lower() for text in drawn), facts.nouns, facts.categories)
            text = self._like_attribute(row, taken, draws) if self.like == "attribute" else None
            if text is None:
                text = self._another_thing(taken, draws)
            if text is None:
                break
            drawn.append(text)
        return drawn

    def _like_attribute(self, row: dict[str, Any], facts: ImageFacts, draws: Draws) -> str | None:
        """Return a text with a noun of the image and another attribute, every second time one that another thing has."""
        present = [
            part
            for entry in row["expressions"]
            if _has_target(entry)
            for part in read_phrase(clean_expression(entry["text"])).parts
        ]
        heads = sorted({part.head for part in present} & self.by_attribute.keys())
        stated = {value for part in present for value in part.values}
        if not heads:
            return None
        for is_stated in (True, False) if draws.chance("attribute that the image has") < 0.5 else (False,):
            for _ in range(TRIES):
                numbers = self.by_attribute[heads[draws.index(len(heads), "noun of a negative")]]
                text = self.texts[numbers[draws.index(len(numbers), "negative")]]
                if is_stated and stated.isdisjoint(read_phrase(text).parts[0].values):
                    continue
                if self.has_another_attribute(text, row, facts):
                    return text
        return None

    def _another_thing(self, facts: ImageFacts, draws: Draws) -> str | None:
        for _ in range(min(TRIES, len(self.all))):
            text = self.texts[self.all[draws.index(len(self.all), "negative")]]
            if self.is_another_thing(text, facts):
                return text
        left = [numbers for heads, numbers in self.groups.items() if heads.isdisjoint(facts.nouns)]
        numbers = np.concatenate(left) if left else np.zeros(0, dtype=np.int32)
        for place in draws.subset(len(numbers), len(numbers)):
            if self.is_another_thing(text := self.texts[numbers[place]], facts):
                return text
        return None

    def count(self, own: int, num_expressions: int, draws: Draws) -> int:
        """Return how many of the expressions of a question are drawn.

        A question about `own` expressions of the image becomes one of own / (1 - share) expressions, but no more than
        `num_expressions`. The share of them is rounded up or down by chance, so that it is exact on average.
        """
        asked = min(num_expressions, own / (1 - self.share))
        return math.floor(self.share * asked + draws.chance("number of negatives"))

    def add(
        self, row: dict[str, Any], chosen: list[tuple], num_expressions: int, draws: Draws
    ) -> list[tuple[str, dict]]:
        """Return the chosen (name, entry) of a question with drawn ones among them, in random order.

        Drawn ones take the place of chosen ones where the question would hold more than `num_expressions`.
        """
        texts = self.draw(row, self.count(len(chosen), num_expressions, draws), draws) if chosen else []
        if not texts:
            return chosen
        mask = empty_mask(row["height"], row["width"])
        room = max(num_expressions - len(texts), 0)
        kept = [chosen[place] for place in draws.subset(len(chosen), min(room, len(chosen)))]
        both = kept + [(text, expression(text, mask, num_targets=0)) for text in texts]
        return [both[place] for place in draws.subset(len(both), len(both))]


def check_negatives(share: float, num_expressions: int, all_absent: bool) -> None:
    """Raise ValueError if `share` is not one, or if a question could hold drawn expressions only.

    Such a question is asked with `all_absent` alone.
    """
    if not 0 <= share < 1:
        raise ValueError(
            f"negatives={share:g} is not possible: it is the part of the expressions asked that is drawn. Give 0 to draw "
            f"none, or a number below 1, say 0.3."
        )
    if share * num_expressions > num_expressions - 1 and not all_absent:
        most = math.floor(100 * (num_expressions - 1) / num_expressions) / 100
        raise ValueError(
            f"negatives={share:g} of num_expressions={num_expressions} leaves no room for an expression that has a target. "
            f"Give {f'at most {most:g}, ' if most else ''}more num_expressions, or all_absent, which also asks questions "
            f"about absent things only."
        )


def _has_target(entry: Mapping[str, Any]) -> bool:
    """Return whether an expression names something in its image. Its pixels are not counted, which would take long."""
    return entry["num_targets"] > 0


def _texts(sources: Sequence[Sequence[dict[str, Any]]]) -> Iterable[dict[str, Any]]:
    """Yield `{"image_id", "expressions"}` of every row, without its image."""
    for rows in sources:
        with tqdm(total=len(rows), desc="texts for negatives", leave=False, disable=None, mininterval=2) as bar:
            if hasattr(rows, "select_columns"):
                for batch in rows.select_columns(["image_id", "expressions"]).iter(1000):
                    for image_id, entries in zip(batch["image_id"], batch["expressions"]):
                        yield {"image_id": image_id, "expressions": entries}
                    bar.update(len(batch["image_id"]))
            else:
                for row in rows:
                    yield row
                    bar.update()


def listed(rows: Sequence[dict[str, Any]], transform: ReferringTransform, seed: int, epoch: int) -> Iterator[dict]:
    """Yield what training would ask about each row in an epoch: the image's own texts, and the drawn ones."""
    from .transforms import Draws

    for index, row in enumerate(rows):
        own = {id(entry) for entry in row["expressions"]}
        drawn = [text for text, entry in transform.choose(row, Draws(seed, epoch, index)) if id(entry) not in own]
        heads = {part.head for entry in row["expressions"] for part in read_phrase(entry["text"]).parts}
        image = row["image"]
        yield {
            "image": image.get("path") if isinstance(image, dict) else None,
            "image_id": row["image_id"],
            "present": [entry["text"] for entry in row["expressions"] if mask_area(entry["mask"])],
            "absent": [entry["text"] for entry in row["expressions"] if not mask_area(entry["mask"])],
            "negatives": [
                {"text": text, "nouns": sorted(found), "like": "attribute" if found & heads else "noun"}
                for text in drawn
                for found in [read_phrase(text).heads]
            ],
        }


def _picture(image: Any) -> str:
    """Return a small copy of an image as a URL that holds it."""
    picture = read_image(image)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _load(options: argparse.Namespace) -> tuple[Any, Categories]:
    """Return the rows that the command line names, with undecoded images, and their categories."""
    from datasets import Image

    from . import categories, load, names
    from .own_formats import find_sources

    name, data_dir = options.data, options.data_dir
    if name not in names() and Path(name).is_dir() and find_sources(Path(name)):
        name, data_dir = "own", name
    try:
        further = dict(json.loads(options.dataset_options))
    except (TypeError, ValueError):
        raise ValueError(
            f"dataset_options={options.dataset_options!r} is no JSON object; write '{{\"size\": 100}}'."
        ) from None
    rows = load(name, data_dir, options.split, **further)
    if "expressions" not in rows.column_names:
        raise ValueError(f"{name} has conversations, not expressions; name a set with expressions.")
    return rows.cast_column("image", Image(decode=False)), categories(name, data_dir)


def write_negatives(options: argparse.Namespace) -> str:
    """Write the list and the page that the command line asks for; return what was written in words.

    Raises:
        FileExistsError: The list or the page exists already.
        ValueError: An option or the data is wrong.
    """
    from .transforms import ReferringTransform

    page = options.out.with_suffix(".html")
    for path in (options.out, page):
        refuse_existing(path)
    check_negatives(options.negatives, options.num_expressions, all_absent=True)
    for option in ("num_expressions", "max_images"):
        if (value := getattr(options, option)) is not None and value < 1:
            raise ValueError(f"{option}={value} must be at least 1.")
    rows, categories = _load(options)
    transform = ReferringTransform(None, options.num_expressions, True, options.drop_no_targets)
    negatives = transform.negatives = Negatives(
        [rows], options.negatives, options.negatives_like, categories, options.drop_no_targets
    )
    if options.max_images is not None:
        rows = rows.select(range(min(options.max_images, len(rows))))
    lines = list(
        tqdm(listed(rows, transform, options.seed, options.epoch), "images", len(rows), disable=None, mininterval=2)
    )
    number = sum(len(line["negatives"]) for line in lines)
    alike = sum(one["like"] == "attribute" for line in lines for one in line["negatives"])
    summary = (
        f"{negatives}\n{number} absent expressions for {len(lines)} images, {alike} of them with a noun of their image; "
        f"{sum(not line['negatives'] for line in lines)} images have none in this epoch."
    )
    shown = [{**line, "picture": _picture(rows[n]["image"])} for n, line in enumerate(lines[: options.num_pictures])]
    write_text(
        page, render(PAGE, title=f"Absent expressions: {options.data} {options.split}", note=summary, lines=shown)
    )
    write_text(options.out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return f"{summary}\n{options.out}\n{page}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` defaults to `sys.argv[1:]`. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_scripts.negatives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", help="a data set, or the folder of your own or of a published one")
    parser.add_argument(
        "--out", type=Path, required=True, help="the JSON lines to write; the page gets its name and .html"
    )
    parser.add_argument("--data_dir", help="the folder that holds the data set's files")
    parser.add_argument("--split", default="train", help="the split (default: %(default)s)")
    parser.add_argument("--dataset_options", default="{}", help="further options of the data set, as JSON")
    parser.add_argument("--negatives", type=float, default=0.3, help="as in training (default: %(default)s)")
    parser.add_argument("--negatives_like", choices=LIKE, default="noun", help="as in training (default: %(default)s)")
    parser.add_argument("--num_expressions", type=int, default=3, help="as in training (default: %(default)s)")
    parser.add_argument("--drop_no_targets", action="store_true", help="as in training")
    parser.add_argument("--seed", type=int, default=42, help="as in training (default: %(default)s)")
    parser.add_argument("--epoch", type=int, default=0, help="the epoch, from 0 (default: %(default)s)")
    parser.add_argument(
        "--max_images", type=int, help="list the first N images only; texts are drawn from all of them"
    )
    parser.add_argument("--num_pictures", type=int, default=24, help="images on the page (default: %(default)s)")
    try:
        print(write_negatives(parser.parse_args(argv)))
    except (ValueError, OSError) as error:
        print(f"data_scripts.negatives: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
