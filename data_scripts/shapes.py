"""*shapes*, the embedded data set: images of coloured shapes and expressions about them, drawn when they are needed.

It is small enough for two CPU cores and has every kind of expression of generalised referring segmentation: with one
target, with several and without. Some absent expressions are hard: their colour and their shape are in the image, but not
together. An image is a pure function of (seed, split, index), and no two splits share one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw

from .masks import encode_mask
from .schema import SEGMENTATION_FEATURES, VQA_FEATURES, expression

VERSION = 1  # part of the cache key; increase it whenever the rows change
PICTURE_SIDE = 128  # pixels
SPLIT_SIZES = {"train": 12000, "validation": 1000, "test": 1000}
SPLIT_CODES = {"train": 0, "validation": 1, "test": 2}  # part of the random seed, so splits share no image
TASKS = ("segmentation", "vqa")
EXPRESSIONS_PER_PICTURE = 6
QUESTIONS_PER_PICTURE = 5

COLOURS = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (45, 85, 215),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
    "cyan": (40, 190, 205),
}
SHAPES = ("circle", "square", "triangle", "star")
# Radius of the circle around a shape in pixels. The two sizes differ by a third, so that the eye can distinguish them.
RADII = {"small": (17, 20), "big": (26, 29)}


@dataclass(frozen=True)
class Thing:
    """One shape in an image, with its mask (height, width) of booleans."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    mask: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def _outline(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Return the corners of a shape in pixels. A circle is a polygon of 40 corners."""
    corners, first, inner = {
        "circle": (40, 0.0, 1.0),
        "square": (4, np.pi / 4, 1.0),
        "triangle": (3, -np.pi / 2, 1.0),
        "star": (10, -np.pi / 2, 0.45),
    }[shape]
    angles = first + turn + 2 * np.pi * np.arange(corners) / corners
    radii = np.where(np.arange(corners) % 2 == 1, radius * inner, radius)
    return list(zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True))


def _background(random: np.random.Generator, side: int) -> np.ndarray:
    """Return a pale texture (side, side, 3) of stripes, a gradient and noise."""
    base = random.uniform(150, 215, size=3)
    yy, xx = np.mgrid[0:side, 0:side] / side
    angle, frequency = random.uniform(0, np.pi), random.uniform(2, 9)
    stripes = np.sin(2 * np.pi * frequency * (xx * np.cos(angle) + yy * np.sin(angle)) + random.uniform(0, 6))
    shade = (xx - 0.5) * random.uniform(-30, 30) + (yy - 0.5) * random.uniform(-30, 30)
    grain = random.normal(0, 7, size=(side, side, 1))
    return base + (random.uniform(4, 12) * stripes + shade)[..., None] + grain


def draw_picture(random: np.random.Generator, side: int = PICTURE_SIDE) -> tuple[Image.Image, list[Thing]]:
    """Return an image with two to four shapes that touch neither each other nor the border."""
    canvas = Image.fromarray(np.clip(_background(random, side), 0, 255).astype(np.uint8))
    things: list[Thing] = []
    places: list[tuple[float, float, float]] = []
    # A common colour and shape make plurals and hard absent expressions frequent.
    count, common_colour, common_shape = random.integers(2, 5), random.choice(list(COLOURS)), random.choice(SHAPES)
    for _ in range(200):
        if len(things) == count:
            break
        size = str(random.choice(list(RADII)))
        radius = random.uniform(*RADII[size])
        x, y = random.uniform(radius + 2, side - radius - 2, size=2)
        if any(np.hypot(x - px, y - py) < radius + other + 3 for px, py, other in places):
            continue
        colour = str(common_colour if random.random() < 0.35 else random.choice(list(COLOURS)))
        shape = str(common_shape if random.random() < 0.35 else random.choice(SHAPES))
        corners = _outline(shape, x, y, radius, random.uniform(-0.3, 0.3))
        # Draw at four times the size and average: edges are smooth, and the mask is the pixels more than half inside.
        patch = Image.new("L", (side * 4, side * 4))
        ImageDraw.Draw(patch).polygon([(4 * cx, 4 * cy) for cx, cy in corners], fill=255)
        alpha = patch.resize((side, side), Image.Resampling.BOX)
        tint = np.clip(np.asarray(COLOURS[colour]) + random.normal(0, 12, size=3), 0, 255).astype(np.uint8)
        canvas.paste(tuple(int(value) for value in tint), mask=alpha)
        things.append(Thing(colour, shape, size, x, y, np.asarray(alpha) > 127))
        places.append((x, y, radius))
    return canvas, things


def _places(things: list[Thing]) -> dict[str, Thing]:
    """Return the things that stand out by place: the next one is at least 8 pixels away."""
    outstanding = {}
    for word, key in (
        ("leftmost", lambda thing: thing.x),
        ("rightmost", lambda thing: -thing.x),
        ("top", lambda thing: thing.y),
        ("bottom", lambda thing: -thing.y),
    ):
        first, second = sorted(things, key=key)[:2]
        if key(second) - key(first) >= 8:
            outstanding[word] = first
    return outstanding


def _present(
    random: np.random.Generator, things: list[Thing]
) -> tuple[dict[str, list[Thing]], dict[str, list[Thing]]]:
    """Return all expressions with exactly one target, and all with several, each as {text: targets}."""

    def pick(**attributes: str) -> list[Thing]:
        return [thing for thing in things if all(getattr(thing, name) == value for name, value in attributes.items())]

    single: dict[str, list[Thing]] = {}
    several: dict[str, list[Thing]] = {"all shapes": list(things)}
    for colour in {thing.colour for thing in things}:
        same = pick(colour=colour)
        (single if len(same) == 1 else several)[
            f"the {colour} shape" if len(same) == 1 else f"all {colour} shapes"
        ] = same
    for shape in {thing.shape for thing in things}:
        same = pick(shape=shape)
        (single if len(same) == 1 else several)[f"the {shape}" if len(same) == 1 else f"all {shape}s"] = same
        if len(same) > 1:
            for word, thing in _places(same).items():
                single[f"the {word} {shape}"] = [thing]
            for size in RADII:
                if len(sized := [thing for thing in same if thing.size == size]) == 1:
                    single[f"the {size} {shape}"] = sized
    for name in {thing.name for thing in things}:
        same = pick(name=name)
        (single if len(same) == 1 else several)[f"the {name}" if len(same) == 1 else f"all {name}s"] = same
    for size in RADII:
        same = pick(size=size)
        if same and len(same) < len(things):
            text = f"the {size} shape" if len(same) == 1 else f"all {size} shapes"
            (single if len(same) == 1 else several)[text] = same
    for word, thing in _places(things).items():
        single[f"the {word} shape"] = [thing]
    unique = [text for text in single if any(text == f"the {thing.name}" for thing in things)]
    for first in unique:
        for second in unique:
            if first != second:
                several[f"{first} and {second}"] = single[first] + single[second]
    return single, several


def _absent(things: list[Thing]) -> tuple[list[str], list[str]]:
    """Return expressions without a target: hard ones (colour and shape exist, but not together), and the others."""
    colours, shapes = {thing.colour for thing in things}, {thing.shape for thing in things}
    names = {thing.name for thing in things}
    hard = [
        f"the {colour} {shape}"
        for colour in COLOURS
        for shape in SHAPES
        if colour in colours and shape in shapes and f"{colour} {shape}" not in names
    ]
    easy = [f"the {shape}" for shape in SHAPES if shape not in shapes]
    easy += [f"all {shape}s" for shape in SHAPES if shape not in shapes]
    for colour in COLOURS:
        if colour not in colours:
            easy += [f"the {colour} shape", f"all {colour} shapes", *(f"the {colour} {shape}" for shape in SHAPES)]
    return hard, sorted(easy)


def _choose(random: np.random.Generator, texts: list[str]) -> str:
    return texts[random.integers(len(texts))]


def _kind(text: str) -> str:
    """Return the group of an expression (`all`, `and`, place, size, or number of words), so that none dominates."""
    words = text.split()
    for word in ("and", "all", "leftmost", "rightmost", "top", "bottom", "small", "big"):
        if word in words:
            return word
    return f"{len(words)} {'shape' in words}"


def _spread(random: np.random.Generator, texts: list[str]) -> str:
    """Choose one of the texts: first a kind, then a text of that kind."""
    kinds: dict[str, list[str]] = {}
    for text in sorted(texts):
        kinds.setdefault(_kind(text), []).append(text)
    return _choose(random, kinds[_choose(random, sorted(kinds))])


def make_expressions(
    random: np.random.Generator, things: list[Thing], count: int = EXPRESSIONS_PER_PICTURE
) -> list[tuple[str, list[Thing]]]:
    """Return `count` different expressions with their targets in random order, a third of each kind of target."""
    single, several = _present(random, things)
    hard, easy = _absent(things)
    chosen: dict[str, list[Thing]] = {}
    for number in range(count):
        for _ in range(20):
            kind = number % 3
            if kind == 0:
                texts = single
            elif kind == 1:
                texts = several
            else:
                texts = {text: [] for text in (hard if hard and random.random() < 0.5 else easy)}
            text = _spread(random, list(texts)) if texts else None
            if text is not None and text not in chosen:
                chosen[text] = texts[text]
                break
    items = list(chosen.items())
    return [items[place] for place in random.permutation(len(items))]


def make_conversation(random: np.random.Generator, things: list[Thing]) -> list[dict[str, str]]:
    """Return questions and answers in words: the things from left to right, and whether something is there."""
    rounds = []
    for text, targets in make_expressions(random, things, QUESTIONS_PER_PICTURE):
        rounds.append((f"is there {text}?", "yes" if targets else "no"))
    listed = ", ".join(f"{thing.size} {thing.name}" for thing in sorted(things, key=lambda thing: thing.x))
    rounds.insert(int(random.integers(len(rounds) + 1)), ("what is there from left to right?", listed))
    turns = []
    for place, (question, answer) in enumerate(rounds):
        turns.append({"role": "user", "text": f"<image>\n{question}" if place == 0 else question})
        turns.append({"role": "assistant", "text": answer})
    return turns


def make_row(seed: int, split: str, index: int, task: str = "segmentation") -> dict[str, Any]:
    """Return one row of the schema. Both tasks of an index show the same image.

    >>> make_row(0, "train", 3)["image_id"]
    'train-0-3'
    """
    image, things = draw_picture(np.random.default_rng([seed, SPLIT_CODES[split], index, 0]))
    random = np.random.default_rng([seed, SPLIT_CODES[split], index, 1 + TASKS.index(task)])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    row: dict[str, Any] = {"image": {"bytes": buffer.getvalue(), "path": None}, "image_id": f"{split}-{seed}-{index}"}
    if task == "vqa":
        return {**row, "conversation": make_conversation(random, things)}
    expressions = []
    for text, targets in make_expressions(random, things):
        mask = np.any([thing.mask for thing in targets], axis=0) if targets else np.zeros((image.height, image.width))
        expressions.append(expression(text, encode_mask(mask), num_targets=len(targets)))
    return {**row, "height": image.height, "width": image.width, "expressions": expressions}


def _rows(split: str, task: str, seed: int, indices: list[int], version: int) -> Iterator[dict[str, Any]]:
    for index in indices:
        yield make_row(seed, split, index, task)


def load(
    split: str = "train",
    size: int | None = None,
    seed: int = 0,
    task: str = "segmentation",
    num_proc: int | None = None,
    cache_dir: str | None = None,
    limit: int | None = None,
) -> datasets.Dataset:
    """Return rows of *shapes*, which the first call draws and later calls read from the cache.

    Args:
        split: "train", "validation" or "test".
        size: Number of images; by default 12,000, 1,000 and 1,000. A smaller set is the start of a larger one.
        seed: Another seed gives other images.
        task: "segmentation" for expressions with masks, "vqa" for questions and answers about the same images.
        num_proc: The number of processes that draw.
        cache_dir: The folder of the Arrow files; by default the cache of `datasets`.
        limit: Draw at most this number of images, whatever the size.

    Raises:
        ValueError: The split, size, seed or task does not exist.
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"shapes has no split {split!r}; its splits are {', '.join(SPLIT_SIZES)}.")
    if task not in TASKS:
        raise ValueError(f"shapes has no task {task!r}; its tasks are {', '.join(TASKS)}.")
    size = SPLIT_SIZES[split] if size is None else size
    if not isinstance(size, int) or not isinstance(seed, int) or size < 1 or seed < 0:
        raise ValueError(f"shapes needs whole numbers size >= 1 and seed >= 0, got size={size!r} and seed={seed!r}.")
    size = size if limit is None else min(size, limit)
    return datasets.Dataset.from_generator(
        _rows,
        features=VQA_FEATURES if task == "vqa" else SEGMENTATION_FEATURES,
        cache_dir=cache_dir,
        gen_kwargs={"split": split, "task": task, "seed": seed, "indices": list(range(size)), "version": VERSION},
        num_proc=num_proc,
        split=datasets.NamedSplit(split),  # the name that the progress bar shows
    )
