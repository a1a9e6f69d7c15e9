"""Draw pictures for people: masks over images, sheets of images, and the outcome of each expression."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from .fonts import font_for
from .questions import Question

# Colours that most people, also most colour-blind people, can distinguish on photographs (the palette of Okabe and Ito,
# https://jfly.uni-koeln.de/color, without black and grey).
PALETTE = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]
PREDICTION, TRUTH = PALETTE[0], PALETTE[4]
GOOD, BAD = (17, 112, 58), (176, 0, 32)


def outline(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Return the outermost `width` pixels of a mask (height, width). The edge of the image counts as a border, too."""
    framed = ImageOps.expand(Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255), width)
    inner = framed.filter(ImageFilter.MinFilter(2 * width + 1))
    return mask & ~(np.asarray(inner)[width:-width, width:-width] > 0)


def overlay(image: Image.Image, masks: Sequence[np.ndarray]) -> Image.Image:
    """Return the image with each mask (height, width) tinted and outlined in another colour."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
    for number, mask in enumerate(masks):
        mask = np.asarray(mask, dtype=bool)
        colour = np.asarray(PALETTE[number % len(PALETTE)], dtype=np.float32)
        pixels[mask] = 0.45 * pixels[mask] + 0.55 * colour
        pixels[outline(mask)] = colour * 0.6
    return Image.fromarray(pixels.astype(np.uint8))


def contours(image: Image.Image, truth: np.ndarray, prediction: np.ndarray, side: int = 320) -> Image.Image:
    """Return the image, scaled to `side` pixels, with the prediction tinted and outlined in orange, the truth in blue.

    Args:
        truth, prediction: (height, width) booleans of the image's size; an empty one leaves no trace.
        side: The longer side of the result in pixels.
    """
    scaled = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(scaled, dtype=np.float32).copy()
    true, predicted = (
        np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(scaled.size, Image.Resampling.BILINEAR)) > 127
        for mask in (np.asarray(truth, dtype=bool), np.asarray(prediction, dtype=bool))
    )
    pixels[predicted] = 0.6 * pixels[predicted] + 0.4 * np.asarray(PREDICTION, dtype=np.float32)
    pixels[outline(predicted, 2)] = PREDICTION
    pixels[outline(true, 4)] = 255  # a light rim, visible on dark images
    pixels[outline(true, 3)] = TRUTH
    return Image.fromarray(pixels.astype(np.uint8))


def labelled_overlay(image: Image.Image, results: Sequence[dict[str, Any]]) -> Image.Image:
    """Return the overlay of an image's results with a legend: expression, colour, score; rejected ones crossed out.

    An expression in characters that no font of this machine has is called by its number. Pages have its text.
    """
    drawn = overlay(image, [result["mask"] for result in results])
    line = 18
    captions = [
        _drawable(_caption(result), f"expression {n}: {_decision(result)}") for n, result in enumerate(results, 1)
    ]
    widths = [font.getbbox(caption)[2] for caption, font in captions]
    width = max(drawn.width, *(34 + round(length) for length in widths), 0)
    sheet = Image.new("RGB", (width, drawn.height + line * len(results) + 8), "white")
    sheet.paste(drawn, (0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, result in enumerate(results):
        top = drawn.height + 4 + number * line
        if result["is_rejected"]:
            pen.line([(6, top + 4), (16, top + 14)], fill=(200, 0, 0), width=2)
            pen.line([(16, top + 4), (6, top + 14)], fill=(200, 0, 0), width=2)
        else:
            pen.rectangle([6, top + 4, 16, top + 14], fill=PALETTE[number % len(PALETTE)])
        caption, font = captions[number]
        pen.text((24, top + 3), caption, fill="black", font=font)
    return sheet


def _caption(result: dict[str, Any]) -> str:
    return f"{result['text']}: {_decision(result)}"


def _decision(result: dict[str, Any]) -> str:
    decision = "rejected" if result["is_rejected"] else f"{int(np.asarray(result['mask']).sum())} px"
    score = "no slot" if np.isnan(result["score"]) else f"score {result['score']:+.2f}"
    return f"{decision}, {score}"


def _drawable(text: str, otherwise: str, size: int = 11) -> tuple[str, Any]:
    """Return a text with a font that has its characters, or the text `otherwise` if there is no such font."""
    font = font_for(text, size)
    return (text, font) if font is not None else (otherwise, font_for(otherwise, size))


def contact_sheet(images: Sequence[Image.Image], columns: int = 3, width: int = 360) -> Image.Image:
    """Return images in rows of `columns` on one white sheet, each at most `width` pixels wide and high."""
    scaled = [ImageOps.contain(image, (width, width)) for image in images]
    rows = [scaled[n : n + columns] for n in range(0, len(scaled), columns)]
    heights = [max(image.height for image in row) + 8 for row in rows]
    sheet = Image.new("RGB", (min(columns, max(len(scaled), 1)) * (width + 8), sum(heights) or 1), "white")
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            sheet.paste(image, (column * (width + 8), sum(heights[:number])))
    return sheet


def verdict(question: Question, result: dict[str, Any]) -> tuple[str, bool]:
    """Return the outcome of an expression in words, and whether it is right. The IoU is that of its metric row."""
    if question.is_no_target:
        return ("rejected, rightly", True) if result["is_rejected"] else ("accepted, but it is not there", False)
    if result["is_rejected"]:
        return "rejected, but it is there", False
    intersection, union = question.overlap(np.asarray(result["mask"], dtype=bool))
    iou = intersection / union
    return f"IoU {iou:.2f}", iou >= 0.5


def shown_mask(result: dict[str, Any]) -> np.ndarray:
    """Return the mask to draw for a result: an empty one if it is rejected."""
    mask = np.asarray(result["mask"], dtype=bool)
    return np.zeros_like(mask) if result["is_rejected"] else mask


def expression_sheet(
    image: Image.Image,
    questions: Sequence[Question],
    results: Sequence[dict[str, Any]],
    title: str,
    side: int = 256,
) -> Image.Image:
    """Return a sheet with a tile per expression: prediction in orange, truth in blue, and the outcome.

    Args:
        image: The image that was asked about.
        questions: The questions with their truth.
        results: The processor's result for each question.
        title: The text above the tiles.
        side: The longer side of a tile's image in pixels.
    """
    image, line, columns = image.convert("RGB"), 17, min(max(len(results), 1), 4)
    font, height = ImageFont.load_default(size=13), round(image.height * side / max(image.size)) + 3 * line + 14
    title, of_title = _drawable(title, title.encode("ascii", "backslashreplace").decode(), 13)
    heading = textwrap.wrap(title, 36 * columns)
    top = 6 + line * len(heading)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, top + height * -(-len(results) // columns) + 6), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 4), "\n".join(heading), fill="black", font=of_title)
    for number, (question, result) in enumerate(zip(questions, results, strict=True)):
        left, upper = 8 + (number % columns) * (side + 8), top + (number // columns) * height
        tile = contours(image, question.truth, shown_mask(result), side)
        sheet.paste(tile, (left, upper))
        text, of_text = _drawable(result["text"], f"expression {number + 1}", 13)
        lines = textwrap.wrap(text, 36, max_lines=2, placeholder=" ...") or [""]
        below = upper + tile.height + 4
        pen.text((left, below), "\n".join(lines), fill="black", font=of_text)
        words, is_good = verdict(question, result)
        pen.text((left, below + line * len(lines)), words, fill=GOOD if is_good else BAD, font=font)
    return sheet


def data_url(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """Return an image as a URL that holds it, for pages that open offline."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
