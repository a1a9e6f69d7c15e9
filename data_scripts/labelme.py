"""Shapes of labelme (github.com/wkentaro/labelme), as in ReasonSeg's files and in folders of own data."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from reprlib import repr as short_repr
from typing import Any

import numpy as np

from .mask_images import read_mask
from .masks import check_pixels, segmentation_to_rle
from .polygons import fill_polygon

Fill = Callable[[np.ndarray, int, int], np.ndarray]  # points (n, 2) as (x, y), height, width -> mask (height, width)


def fill_like_opencv(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill a polygon as cv2.fillPoly does, outline included. Coordinates lose their fraction."""
    return fill_polygon(points.astype(np.int32), height, width) > 0


def fill_like_coco(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill a polygon as pycocotools does, like the polygons in other formats of own data."""
    from .masks import decode_mask

    return decode_mask(segmentation_to_rle([points.ravel().tolist()], height, width)) > 0


def draw_shape(shape: dict[str, Any], height: int, width: int, fill: Fill) -> np.ndarray:
    """Return the mask (height, width) of a labelme shape: polygon, rectangle, circle or mask.

    Raises:
        ValueError: The shape is of another kind, or its points are wrong.
    """
    kind = shape.get("shape_type") or "polygon"
    points = np.array(shape["points"], dtype=np.float64)
    if points.size and (points.ndim != 2 or points.shape[1] != 2):
        raise ValueError(f"its points must be [[x, y], ...], got {short_repr(shape['points'])}")
    if not (abs(points) < 2**30).all():  # also for NaN
        raise ValueError("a point lies outside of any image")
    if kind == "polygon":
        if len(points) >= 3:
            check_pixels(points.ravel().tolist(), height, width)
        return fill(points, height, width) if len(points) else np.zeros((height, width), bool)
    if kind == "rectangle":
        if len(points) not in (2, 4):  # two opposite corners; newer versions write all four
            raise ValueError(f"a rectangle has two opposite corners, got {len(points)} points")
        check_pixels(points.ravel().tolist(), height, width)
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        return fill(np.array([[left, top], [right, top], [right, bottom], [left, bottom]]), height, width)
    if kind == "circle":
        if len(points) != 2:
            raise ValueError(f"a circle has a centre and a point on its edge, got {len(points)} points")
        check_pixels(points.ravel().tolist(), height, width)
        (x, y), edge = points
        rows, columns = np.ogrid[:height, :width]
        return (columns - x) ** 2 + (rows - y) ** 2 <= ((edge - points[0]) ** 2).sum()
    if kind == "mask":
        return _paste(shape, points, height, width)
    raise ValueError(
        f"its shape is a {short_repr(kind)}, which has no area or is not known; draw a polygon, rectangle, circle or mask"
    )


def _paste(shape: dict[str, Any], points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mask of a shape that holds a PNG of its bounding box, as labelme's AI tools write."""
    if len(points) != 2 or not isinstance(shape.get("mask"), str):
        raise ValueError("a mask has two opposite corners and the field 'mask', a PNG in base64")
    try:
        patch, _ = read_mask(base64.b64decode(shape["mask"], validate=True))
    except binascii.Error as error:
        raise ValueError(f"its mask is not base64 ({error})") from None
    left, top = (int(corner) for corner in points.min(axis=0).round())
    if left < 0 or top < 0 or top + patch.shape[0] > height or left + patch.shape[1] > width:
        raise ValueError(
            f"its mask of {patch.shape[0]} x {patch.shape[1]} (height x width) at x={left}, y={top} does not fit into the image of "
            f"{height} x {width}"
        )
    mask = np.zeros((height, width), bool)
    mask[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
    return mask
