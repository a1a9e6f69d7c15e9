"""Outlines of masks, for formats that hold polygons instead of pixels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from contourpy import FillType, contour_generator


def mask_outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Return the outlines of a mask (height, width), arrays (points, 2) of x and y in pixels, one for each connected part.

    Pixel 0 reaches from 0 to 1. An outline runs halfway between the centres of pixels inside and outside, so a program that
    fills the pixels whose centres are inside gets the mask again, and so does pycocotools. A part with holes has one outline,
    too: it goes to each hole and back on the same line.

    >>> mask_outlines(np.array([[0, 0, 0], [0, 1, 0]]))[0].tolist()
    [[1.0, 1.5], [1.5, 1.0], [2.0, 1.5], [1.5, 2.0]]
    """
    lines = contour_generator(z=np.pad(mask != 0, 1).astype(np.float32), fill_type=FillType.OuterOffset)
    outlines = []
    for points, offsets in zip(*lines.filled(0.5, 2), strict=True):
        rings = [_corners(points[begin : end - 1]) for begin, end in pairwise(offsets)]
        # the centre of the first pixel, of which the padding is one further, is at 0.5
        outlines.append(_joined(rings) - 0.5)
    return outlines


def _corners(ring: np.ndarray) -> np.ndarray:
    """Return a closed ring (points, 2), whose last point is not repeated, without the points on straight lines."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return ring[turns]


def _joined(rings: list[np.ndarray]) -> np.ndarray:
    """Return an outer ring and its holes as one ring: from its point that is nearest to a hole, around the hole, and back."""
    joined, *holes = rings
    for hole in holes:
        distances = ((joined[:, None] - hole[None]) ** 2).sum(axis=2)
        at, first = np.unravel_index(distances.argmin(), distances.shape)
        detour = np.roll(hole, -first, axis=0)
        joined = np.concatenate([joined[: at + 1], detour, detour[:1], joined[at:]])
    return joined
