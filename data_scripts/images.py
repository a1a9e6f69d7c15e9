"""Open images: a damaged, missing, oversized or wrongly sized one is a `PictureError` that names it."""

from __future__ import annotations

import io
import os
import struct
from reprlib import repr as short_repr
from typing import Any, BinaryIO, overload

import numpy as np
from PIL import Image, ImageOps

from .masks import check_size
from .records import missing_file

# Formats of images, in any case. Files with another suffix in a folder of images are reported, not read.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"),
    *(".jp2", ".avif", ".heic", ".heif"),
)
ORIENTATION = 0x0112  # EXIF tag; from 5 on, the orientation swaps height and width
# brands of HEIC in the header of its container (ISO/IEC 23008-12)
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# what Pillow raises on damaged files
DAMAGE = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, struct.error, Image.DecompressionBombError)


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
    except DAMAGE as error:
        raise ValueError(_heic_advice(source) or str(error) or type(error).__name__) from None
    try:
        check_size((image.height, image.width))
    except ValueError:
        image.close()
        raise
    return image


def _heic_advice(source: str | os.PathLike | bytes) -> str:
    """Return what to do about a HEIC file, which Pillow cannot open by itself; "" for other files."""
    if isinstance(source, bytes):
        header = source[:12]
    else:
        try:
            with open(source, "rb") as file:
                header = file.read(12)
        except OSError:
            return ""
    if header[4:8] != b"ftyp" or header[8:12] not in _HEIC_BRANDS:
        return ""
    return (
        "it is HEIC, which Pillow alone does not open: convert it to JPEG or PNG, or install pillow-heif and call "
        "pillow_heif.register_heif_opener() first"
    )


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image as it is shown: upright by its EXIF orientation, as RGB with 8 bits per channel.

    Alpha is dropped, as cv2.imread does for the original. 16-bit grey is scaled by its range; Pillow itself would clip it.
    `modeling_gsva.image_processing_gsva.upright_rgb` has the same rules, since model code is copied without this package; a
    test holds the two equal.

    Raises:
        ValueError: The range of the pixels is not known (32 bits, floating point), or Pillow does not convert their colours
            (LAB).
    """
    is_ppm = image.format == "PPM"  # whose "I" Pillow has scaled to 16 bits
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and is_ppm):
        return Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8)).convert("RGB")  # 65535 = 255 x 257
    if image.mode in ("I", "F"):
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if image.mode == "F" or not 0 <= low <= high <= 255:
            raise ValueError(
                f"its pixels are {'floating point' if image.mode == 'F' else '32-bit'} numbers from {low} to {high}, whose "
                f"range is not known; save it with 8 bits per channel"
            )
        return Image.fromarray(np.asarray(image).astype(np.uint8)).convert("RGB")
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    try:
        return image.convert("RGB")
    except ValueError:
        raise ValueError(f"its pixels are {image.mode}, which Pillow does not convert; save it as RGB") from None


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
    name = _name_of(image)
    try:
        image = _open_field(image)
        orientation = _orientation_of(image)
        upright = upright_rgb(image)
    except FileNotFoundError:
        raise PictureError(missing_file(f"The image {name}", name)) from None
    except DAMAGE as error:
        raise PictureError(f"The image {name} cannot be read ({error}); replace it by an intact file.") from None
    if size is not None:
        _check_stated_size(name, (upright.height, upright.width), size, orientation)
    return upright


def image_size(image: dict, stated: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return (height, width) of a row's `image` field, upright, from its header: no pixel is decoded.

    Args:
        image: The field, not decoded: `{"path", "bytes"}`.
        stated: (height, width) that the annotations state, if any.

    Raises:
        PictureError: The file is missing, not an image, or of another size. The message names it.
    """
    name = _name_of(image)
    try:
        with _open_field(image) as opened:
            orientation = _orientation_of(opened)
            swaps = orientation >= 5 and opened.format != "TIFF"  # Pillow states the upright size of TIFF
            size = (opened.width, opened.height) if swaps else (opened.height, opened.width)
    except FileNotFoundError:
        raise PictureError(missing_file(f"The image {name}", name)) from None
    except DAMAGE as error:
        raise PictureError(f"The image {name} cannot be read ({error}); replace it by an intact file.") from None
    if stated is not None:
        _check_stated_size(name, size, stated, orientation)
    return size


def check_image_size(path: str | os.PathLike, stated: tuple[int, int]) -> None:
    """Raise PictureError if the image at `path` has another size than stated.

    A missing or damaged image passes: it is an error when it is read, or is skipped then.
    """
    try:
        image_size({"path": os.fspath(path), "bytes": None})
    except PictureError:
        return
    image_size({"path": os.fspath(path), "bytes": None}, stated)


def _check_stated_size(name: str, size: tuple[int, int], stated: tuple[int, int], orientation: int) -> None:
    if size == tuple(stated):
        return
    advice = "take image and annotations from one release"
    if size == (stated[1], stated[0]) and orientation >= 5:
        advice = (
            f"its EXIF orientation ({orientation}) swaps height and width: the annotations are for the image as stored, "
            f"so turn them or remove the orientation from the file"
        )
    elif size == (stated[1], stated[0]):
        advice = "height and width are swapped: correct them, or turn the image"
    raise PictureError(
        f"The image {name} is {size[0]} x {size[1]} (height x width, upright), but its annotations are for {stated[0]} x "
        f"{stated[1]}; {advice}."
    )


def _name_of(image: Any) -> str:
    name = image.get("path") if isinstance(image, dict) else getattr(image, "filename", None)
    return os.fspath(name) if isinstance(name, (str, os.PathLike)) and name else "an image"


def _open_field(image: Any) -> Image.Image:
    """Open a row's `image` field. Raises FileNotFoundError, or ValueError if it is not such a field."""
    if isinstance(image, Image.Image):
        check_size((image.height, image.width))
        return image
    if not isinstance(image, dict):
        raise ValueError(f"an image is a path and bytes, got {short_repr(image)}")
    source = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if not isinstance(source, (str, bytes)):
        raise ValueError(f"neither its path nor its bytes are given: {short_repr(image)}")
    return open_image(source)


def _orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation (1 to 8; 1 is upright) without decoding pixels.

    `getexif` of a PNG decodes all pixels if there is no EXIF before them, as in nearly all files. It is called only if the
    file has EXIF or XMP, which may also state the orientation, after the pixels.
    """
    decode = image.format == "PNG" and "exif" not in image.info and _has_late_metadata(getattr(image, "fp", None))
    exif = image.getexif() if decode else Image.Image.getexif(image)
    orientation = exif.get(ORIENTATION, 1)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _has_late_metadata(file: BinaryIO | None) -> bool:
    """Return whether a PNG has a chunk with EXIF or text after its pixels. The file's position is restored."""
    try:
        position = file.tell()  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):  # the image is decoded and its file closed
        return True
    assert file is not None
    try:
        file.seek(8)
        after_pixels = False
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"IDAT":
                after_pixels = True
            elif after_pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            file.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(position)
