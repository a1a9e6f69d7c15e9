"""Read images whose pixels are annotations: masks (target or not) and label maps (a class number per pixel).

A format that changes values, such as JPEG, cannot hold either. A mask is read by what it shows, not by how it is stored.
"""

from __future__ import annotations

import io
import os
import re
import struct

import numpy as np
from PIL import Image, ImageOps

from .images import DAMAGE, open_image

# formats that keep every pixel as it was saved; WebP and TIFF only with some compressions
_LOSSLESS = ("PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "PCX")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp", "jpeg2000")
_ADVICE = "save it as a black-and-white PNG without transparency, white on the target"


def read_mask(source: str | os.PathLike | bytes) -> tuple[np.ndarray, bool]:
    """Read a mask: the target is every pixel that is not black.

    Palettes are read as their colours, and transparent pixels are background. Grey values at the edges of white
    (antialiasing) are target from half on.

    Returns:
        Booleans (height, width), True on the target, and whether edges were antialiased.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not an image, its format is lossy, it has several frames, or the target is
            ambiguous: no black pixel among several colours, or colours that disagree with transparency.
    """
    with _open_lossless(source) as file:
        try:
            image = ImageOps.exif_transpose(file)
        except DAMAGE as error:
            raise ValueError(str(error) or type(error).__name__) from None
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            level, top = _visible_level(image), 255.0
        else:
            level, top = _level(image)
        if level.min() > 0 and (
            level.min() < level.max() or len(image.convert("RGB").getcolors(level.size) or ()) > 1
        ):
            raise ValueError(f"it has several colours and none of them is black, the background; {_ADVICE}")
    if _is_antialiased(level, top):
        return level >= top / 2, True
    return level > 0, False


def read_labels(source: str | os.PathLike | bytes) -> np.ndarray:
    """Read a label map as whole numbers (height, width): grey values, or the indices of a palette.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not an image, its format is lossy, it has several frames, or more than one channel.
    """
    with _open_lossless(source) as file:
        bits = _grey_bits(file)
        # Pillow stretches PGM's values to 8 or 16 bits, and writes GIF with other indices than the grey values it is given
        if file.format in ("PPM", "GIF"):
            raise ValueError(f"it is {file.format}, which does not keep class numbers; save it as PNG")
        labels = _pixels(file)
    if labels.ndim != 2 or labels.dtype.kind not in "bui":
        raise ValueError(
            f"a label map must have one channel of whole numbers, this one has mode {file.mode} (an array of shape "
            f"{labels.shape}); save class numbers as grey values, or as the indices of a palette"
        )
    # Pillow stretches grey values of 2 and 4 bits to 0 ... 255
    return labels.astype(np.uint8) if labels.dtype == bool else labels // (255 // (2**bits - 1))


def _open_lossless(source: str | os.PathLike | bytes) -> Image.Image:
    image = open_image(source)
    try:
        if image.format not in _LOSSLESS or _is_lossy(image, source):
            name = {"WEBP": "lossy WebP", "TIFF": "TIFF with lossy compression"}.get(image.format or "", image.format)
            raise ValueError(f"it is {name}, which changes the values of pixels; save it as PNG")
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise ValueError(f"it has {frames} frames; save the one that is meant as PNG")
    except BaseException:
        image.close()
        raise
    return image


def _is_lossy(image: Image.Image, source: str | os.PathLike | bytes) -> bool:
    if image.format == "TIFF":
        return image.info.get("compression") in _LOSSY_TIFF
    if image.format != "WEBP":
        return False
    # WebP container: chunks of a name, a length and content; pixels are in "VP8L" (lossless) or "VP8 " (lossy)
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        file.seek(12)
        while len(header := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", header)
            if name in (b"VP8L", b"VP8 "):
                return name == b"VP8 "
            # a frame of an animation holds such chunks after 16 bytes
            file.seek(16 if name == b"ANMF" else length + length % 2, os.SEEK_CUR)
    return True


def _pixels(image: Image.Image) -> np.ndarray:
    try:
        return np.array(image)
    except DAMAGE as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _grey_bits(image: Image.Image) -> int:
    """Return the bits per pixel of grey values that Pillow stretches on decoding (raw modes L;2 and L;4), else 8."""
    modes = [
        str(argument)
        for tile in getattr(image, "tile", ())
        for argument in np.atleast_1d(np.asarray(tile[3], dtype=object))
    ]
    match = next((match for mode in modes if (match := re.fullmatch(r"L;([24])[IR]*", mode))), None)
    return int(match[1]) if match else 8


def _level(image: Image.Image) -> tuple[np.ndarray, float]:
    """Return the brightest channel of every pixel, and its largest possible value."""
    if image.mode == "1":
        return np.array(image).astype(np.uint8) * 255, 255
    if image.mode in ("L", "I", "F") or image.mode.startswith("I;16"):
        array = np.array(image)
        if array.dtype.kind == "f" and not np.isfinite(array).all() or array.min() < 0:
            raise ValueError(f"it has pixels below 0 or without a value; {_ADVICE}")
        ranges = (1, 255, 65535) if array.dtype.kind == "f" else (255, 65535)
        top = (
            65535
            if image.mode.startswith("I;16")
            else next((top for top in ranges if array.max() <= top), array.max())
        )
        return array, float(top)
    try:
        return np.array(image.convert("RGB")).max(axis=2), 255
    except ValueError:
        raise ValueError(f"its pixels are {image.mode}, which Pillow does not convert; {_ADVICE}") from None


def _visible_level(image: Image.Image) -> np.ndarray:
    """Return the brightest channel of every pixel of an image with transparency, 0 where it is transparent."""
    premultiplied = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
    pixels = np.array((image.convert(premultiplied) if premultiplied else image).convert("RGBA"))
    alpha, level = pixels[..., 3], pixels[..., :3].max(axis=2)
    if (alpha == 255).all():
        return level
    visible = level[alpha >= 128]
    if not len(visible):
        return np.zeros_like(level)
    if (visible == 0).all() or (visible > 0).all():  # one object, cut out: in black, white or its own colours
        return alpha
    raise ValueError(
        f"its visible pixels are partly black, so colour and transparency disagree about the target; {_ADVICE}"
    )


def _is_antialiased(level: np.ndarray, top: float) -> bool:
    """Return whether values between black and white are the soft edges of one shape rather than numbers of several.

    Regions of one number have patches of 3 x 3 pixels of the same value; soft edges change within two pixels.
    """
    if level.max() != top or min(level.shape) < 3:
        return False
    between = (level > 0) & (level < top)
    if not between.any():
        return False
    height, width = level.shape
    flat = between[1:-1, 1:-1].copy()
    for row in range(3):
        for column in range(3):
            flat &= level[row : height - 2 + row, column : width - 2 + column] == level[1:-1, 1:-1]
    return not flat.any()
