"""Draw masks over images: tints, outlines, and colours that stand out."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageFilter, ImageOps

# Colours that most people, also most colour-blind people, can distinguish on photographs (the palette of Okabe and Ito,
# https://jfly.uni-koeln.de/color, without black and grey).
PALETTE = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]
# A colour is as far from an area as from the tenth of its pixels that are most like it.
SIMILAR = 0.1
DARK = 20  # brightness of the rim of a line
Colour: TypeAlias = tuple[int, int, int]


def outline(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Return the outermost `width` pixels of a mask (height, width). The edge of the image counts as a border, too."""
    return mask & ~_shrunk(mask, width)


def _shrunk(mask: np.ndarray, width: int) -> np.ndarray:
    """Return a mask without its outermost `width` pixels."""
    if width == 0:
        return mask
    framed = ImageOps.expand(Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255), width)
    inner = framed.filter(ImageFilter.MinFilter(2 * width + 1))
    return np.asarray(inner)[width:-width, width:-width] > 0


def _grown(mask: np.ndarray, width: int) -> np.ndarray:
    """Return a mask with `width` more pixels around it."""
    framed = ImageOps.expand(Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255), width)
    outer = framed.filter(ImageFilter.MaxFilter(2 * width + 1))
    return np.asarray(outer)[width:-width, width:-width] > 0


def colour_distance(pixels: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """Return how different pixels (..., 3) of 0 to 255 look from a colour, 0 to about 765.

    The weights of the channels depend on the mean red (https://www.compuphase.com/cmetric.htm).
    """
    difference = np.asarray(pixels, dtype=np.float32) - np.asarray(colour, dtype=np.float32)
    red = (np.asarray(pixels, dtype=np.float32)[..., 0] + colour[0]) / 512
    weights = np.stack([2 + red, np.full_like(red, 4), 3 - red], axis=-1)
    return np.sqrt((weights * difference**2).sum(-1))


def striking_colours(image: Image.Image, masks: Sequence[np.ndarray]) -> list[Colour]:
    """Return for each mask the colour of the palette that stands out most from what is under and around it.

    No two masks have the same colour while there are others left.

    Args:
        masks: (height, width) booleans of the image's size. An empty one gets whichever colour stands out from the image.
    """
    pixels, colours, free = np.asarray(image.convert("RGB")), [], list(PALETTE)
    for mask in masks:
        mask = np.asarray(mask, dtype=bool)
        under = pixels[_grown(mask, 4)] if mask.any() else pixels.reshape(-1, 3)
        free = free or list(PALETTE)
        colours.append(max(free, key=lambda one: float(np.quantile(colour_distance(under, one), SIMILAR))))
        free.remove(colours[-1])
    return colours


def enlarged(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a mask (height, width) resized to a (width, height) of Pillow, with smooth edges."""
    resized = Image.fromarray(np.asarray(mask, dtype=np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized) > 127


def marked(
    image: Image.Image, prediction: np.ndarray, colour: Colour, truth: np.ndarray | None = None, side: int = 256
) -> Image.Image:
    """Return the image with its longer side `side` pixels long, a mask tinted and outlined, and the truth outlined in white.

    Args:
        prediction: The mask to show (height, width). An empty one leaves no trace.
        colour: Of the mask.
        truth: The true mask, where it is known.
    """
    scaled = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(scaled).copy()
    mask = enlarged(prediction, scaled.size)
    pixels[mask] = (0.65 * pixels[mask] + 0.35 * np.asarray(colour)).astype(np.uint8)
    line = outline(mask, 3)
    pixels[_grown(mask, 1) & ~mask] = DARK  # a rim: whatever the colour, it is seen on what it touches
    pixels[line] = colour
    if truth is not None:
        true = enlarged(truth, scaled.size)
        line = _grown(true, 1) & ~_shrunk(true, 1) if true.any() else true
        pixels[_grown(line, 1) & ~line] = DARK
        pixels[line] = 255
    return Image.fromarray(pixels)


def greyed(image: Image.Image) -> Image.Image:
    """Return the image in pale grey: nothing was found in it."""
    return Image.blend(ImageOps.grayscale(image).convert("RGB"), Image.new("RGB", image.size, "white"), 0.55)


def overlay(
    image: Image.Image, masks: Sequence[np.ndarray], colours: Sequence[Colour], side: int = 256
) -> Image.Image:
    """Return the image with the outlines of several masks.

    Each outline runs inside the one before it, so that those of masks that coincide stay apart. A mask that is too small
    for that is outlined at its border.

    Args:
        masks: (height, width) booleans each.
        colours: Of the masks.
        side: The longer side of the result in pixels.
    """
    scaled = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    pixels, width = np.asarray(scaled).copy(), max(side // 100, 2)
    for number, (mask, colour) in enumerate(zip(masks, colours, strict=True)):
        mask = enlarged(mask, scaled.size)
        inner = _shrunk(mask, number * (width + 1))
        line = outline(inner if inner.any() else mask, width)
        rim = _grown(line, 1) & ~line
        pixels[rim] = pixels[rim] // 3
        pixels[line] = colour
    return Image.fromarray(pixels)


def data_url(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """Return an image as a URL that holds it, for pages that open offline."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
