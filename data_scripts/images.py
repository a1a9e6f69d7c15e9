"""Open images: a damaged, missing, oversized or wrongly sized one is a `PictureError` that names it."""

from __future__ import annotations

import io
import os
import struct
from reprlib import repr as short_repr
from typing import Any, overload

from PIL import Image, ImageOps

from .masks import check_size


class PictureError(ValueError):
    """An image that is missing, damaged, or not of the size that its annotations state."""


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """Open an image from a path or its bytes. Only the header is read, not the pixels.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not an image, or has more pixels than `masks.max_image_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        ArithmeticError,
        LookupError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    try:
        check_size((image.height, image.width))
    except ValueError:
        image.close()
        raise
    return image


@overload
def read_image(image: None, size: tuple[int, int] | None = None) -> None: ...
@overload
def read_image(image: dict | Image.Image, size: tuple[int, int] | None = None) -> Image.Image: ...
def read_image(image: Any, size: tuple[int, int] | None = None) -> Image.Image | None:
    """Read a row's `image` field as an upright RGB image.

    The EXIF orientation is applied, as OpenCV does for the original.

    Args:
        image: The field: None, a PIL image, or `{"path", "bytes"}`.
        size: (height, width) that the annotations state, if any.

    Returns:
        The image, or None for None.

    Raises:
        PictureError: The file is missing, damaged, or of another size. The message names it.
    """
    if image is None:
        return None
    name = getattr(image, "filename", "") or "an image"
    try:
        if isinstance(image, dict):
            name = image.get("path") or name
            source = image.get("bytes") if image.get("bytes") is not None else image.get("path")
            if not isinstance(source, (str, bytes)):
                raise ValueError(f"neither its path nor its bytes are given: {short_repr(image)}")
            image = open_image(source)
        elif isinstance(image, Image.Image):
            check_size((image.height, image.width))
        else:
            raise ValueError(f"an image is a path and bytes, got {short_repr(image)}")
        image = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise PictureError(f"The image {name} is missing; put it there or take its record out.") from None
    except (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, struct.error) as error:
        raise PictureError(f"The image {name} cannot be read ({error}); download it again.") from None
    if size is not None and image.size != (size[1], size[0]):
        raise PictureError(
            f"The image {name} is {image.size[1]} x {image.size[0]} (height x width, upright), but its annotations "
            f"are for {size[0]} x {size[1]}; take image and annotations from one release."
        )
    return image
