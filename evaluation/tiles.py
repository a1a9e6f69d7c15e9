"""One tile per expression: a picture of its mask, its text, and what came of it. Every picture for people is made of them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_scripts.schema import decode_mask

from .drawing import Colour, greyed, marked, overlay, striking_colours
from .fonts import font_for
from .questions import Question

SIDE = 256  # pixels of the longer side of a tile's picture
GOOD, BAD, PALE = (17, 112, 58), (176, 0, 32), (110, 110, 110)
RIGHT_IOU = 0.5  # a mask counts as right from this overlap on, as in Pr@0.5
_LINE, _GAP, _SIZE = 18, 10, 13  # pixels of a line of text, of the space between tiles, of letters


@dataclass(frozen=True)
class Tile:
    """An expression and what came of it.

    Args:
        picture: The image with its mask, and the truth as a white outline where it is known; pale grey for a rejected one.
        text: The expression.
        is_rejected: Whether the model says that it is not there.
        decision: The probability that it is there, or how it was decided.
        colour: Of the mask in the tile of all masks; None where there is none.
        verdict: "right", "wrong" or "missed", with the overlap; "" where the truth is not known.
    """

    picture: Image.Image
    text: str
    is_rejected: bool
    decision: str
    colour: Colour | None = None
    verdict: str = ""

    @property
    def is_right(self) -> bool:
        return self.verdict.startswith("right")


def make_tiles(
    image: Image.Image,
    results: Sequence[dict[str, Any]],
    questions: Sequence[Question] | None = None,
    side: int = SIDE,
) -> list[Tile]:
    """Return the tiles of an image's expressions, each mask in the colour that stands out most from what is under it.

    Args:
        image: The image that was asked about.
        results: The processor's result for each expression.
        questions: The expressions with their truth, where that is known.
        side: The longer side of the pictures in pixels.
    """
    colours = [None] * len(results) if len(results) < 2 else _colours(image, results)
    known: Sequence[Question | None] = questions if questions is not None else [None] * len(results)
    return [_tile(image, *facts, side) for facts in zip(results, known, colours, strict=True)]


def _colours(image: Image.Image, results: Sequence[dict[str, Any]]) -> list[Colour | None]:
    """Return the colour of each mask among all masks, None for what is rejected."""
    kept = [result for result in results if not result["is_rejected"]]
    colours = iter(striking_colours(image, [result["mask"] for result in kept]))
    return [None if result["is_rejected"] else next(colours) for result in results]


def _tile(
    image: Image.Image, result: dict[str, Any], question: Question | None, colour: Colour | None, side: int
) -> Tile:
    mask = np.asarray(result["mask"], dtype=bool)
    (own_colour,) = striking_colours(image, [mask])
    if result["is_rejected"]:
        image, mask = greyed(image), np.zeros_like(mask)
    picture = marked(image, mask, own_colour, None if question is None else question.truth, side)
    words = "" if question is None else verdict(question, result)
    return Tile(picture, result["text"], bool(result["is_rejected"]), decision(result), colour, words)


def all_masks(image: Image.Image, results: Sequence[dict[str, Any]], side: int = SIDE) -> Tile:
    """Return a tile with the outlines of all masks, in the colours that stand before the expressions of `make_tiles`."""
    masks = [result["mask"] for result in results if not result["is_rejected"]]
    picture = overlay(image, masks, striking_colours(image, masks), side)
    return Tile(picture, "all masks", False, f"{len(masks)} of {len(results)} expressions")


def result_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the processor said of an expression, from a metric row that holds its `prediction`."""
    numbers = {name: math.nan if row.get(name) is None else row[name] for name in ("score", "probability")}
    mask = decode_mask(row["prediction"]).astype(bool)
    return {"text": row["expression"], "mask": mask, "is_rejected": row["is_rejected"], **numbers}


def decision(result: dict[str, Any]) -> str:
    """Return how sure the model is that an expression is there.

    >>> decision({"is_rejected": False, "score": 3.0, "probability": 0.9526})
    'probability 0.953'
    >>> decision({"is_rejected": True, "score": float("nan")})
    'rejected: no slot in the answer'
    """
    said = "rejected: " if result["is_rejected"] else ""
    probability = result.get("probability", math.nan)
    if not math.isnan(probability):
        return f"{said}probability {probability:.3f}"
    if math.isnan(result["score"]):
        return f"{said}no slot in the answer"
    return f"{said}score {result['score']:+.2f}"


def verdict(question: Question, result: dict[str, Any]) -> str:
    """Return whether an answer is right, wrong or missed. The IoU is that of its metric row."""
    if question.is_no_target:
        return "right: rejected" if result["is_rejected"] else "wrong: it is not there"
    if result["is_rejected"]:
        return "missed: it is there"
    intersection, union = question.overlap(np.asarray(result["mask"], dtype=bool))
    iou = intersection / union
    return f"{'right' if iou >= RIGHT_IOU else 'wrong'}: IoU {iou:.2f}"


def drawable(text: str, otherwise: str, size: int = _SIZE) -> tuple[str, Any]:
    """Return a text with a font that has its characters, or the text `otherwise` if this machine has no such font."""
    font = font_for(text, size)
    return (text, font) if font is not None else (otherwise, font_for(otherwise, size))


def sheet(groups: Sequence[tuple[str, Sequence[Tile]]], columns: int = 4, side: int = SIDE) -> Image.Image:
    """Return one white picture of titled groups of tiles, one below the other, `columns` tiles wide at most.

    An expression in characters that no font of this machine has is called by its number. Pages have its text.

    Args:
        groups: A title ("" for none) and the tiles of each group.
        side: Pixels of the longer side of the tiles' pictures.
    """
    columns = min(columns, max((len(tiles) for _, tiles in groups), default=1)) or 1
    parts = [_group(title, tiles, columns, side) for title, tiles in groups]
    whole = Image.new("RGB", (columns * (side + _GAP) + _GAP, sum(part.height for part in parts) + _GAP), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def _group(title: str, tiles: Sequence[Tile], columns: int, side: int) -> Image.Image:
    title, of_title = drawable(title, title.encode("ascii", "backslashreplace").decode())
    heading = textwrap.wrap(title, side * columns // 7)
    top = _GAP + _LINE * len(heading)
    height = max((tile.picture.height for tile in tiles), default=0) + 4 * _LINE + _GAP
    drawn = Image.new("RGB", (columns * (side + _GAP) + _GAP, top + height * -(-len(tiles) // columns)), "white")
    ImageDraw.Draw(drawn).multiline_text((_GAP, _GAP // 2), "\n".join(heading), fill="black", font=of_title)
    for number, tile in enumerate(tiles):
        place = _GAP + (number % columns) * (side + _GAP), top + (number // columns) * height
        drawn.paste(tile.picture, place)
        _caption(drawn, tile, number, (place[0], place[1] + tile.picture.height + 4), side)
    return drawn


def _caption(drawn: Image.Image, tile: Tile, number: int, place: tuple[int, int], side: int) -> None:
    """Write the text of a tile, struck through if it is rejected, then decision and verdict."""
    pen, (left, top) = ImageDraw.Draw(drawn), place
    text, font = drawable(tile.text, f"expression {number + 1}")
    if tile.colour is not None:
        pen.rectangle([left, top + 2, left + 11, top + 13], fill=tile.colour, outline="black")
        left += 17
    for line in textwrap.wrap(text, side // 7, max_lines=2, placeholder=" ...") or [""]:
        pen.text((left, top), line, fill=PALE if tile.is_rejected else "black", font=font)
        if tile.is_rejected:
            middle = top + _LINE // 2
            pen.line([(left, middle), (left + pen.textlength(line, font=font), middle)], fill=PALE, width=1)
        top += _LINE
    left = place[0]
    plain = ImageFont.load_default(size=_SIZE)
    pen.text((left, top), tile.decision, fill=PALE, font=plain)
    if tile.verdict:
        pen.text((left, top + _LINE), tile.verdict, fill=GOOD if tile.is_right else BAD, font=plain)
