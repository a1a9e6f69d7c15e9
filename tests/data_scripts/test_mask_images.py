"""Mask images and label maps in every mode and format, read as what they show or refused with the fix."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_scripts.mask_images import read_labels, read_mask

TRUE = np.zeros((40, 60), np.uint8)
TRUE[10:30, 10:30] = 1
WHITE = Image.fromarray(TRUE * 255)


def saved(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def palette(colours, values, file_format="PNG", **options):
    image = Image.new("P", (60, 40))
    image.putdata(values.ravel().tolist())
    image.putpalette(colours)
    return saved(image, file_format, **options)


def cut_out(background, target):
    """An image with transparency: (red, green, blue, alpha) of the background and of the target."""
    image = Image.new("RGBA", (60, 40), background)
    image.paste(target, (10, 10, 30, 30))
    return saved(image)


def grey_png(values, bits):
    """A grey PNG with `bits` per pixel, as optimisers write it; Pillow cannot."""
    rows = b""
    for row in values:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        rows += b"\0" + bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


BLACK_WHITE, WHITE_BLACK = [0] * 3 + [255] * 3, [255] * 3 + [0] * 3
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0]
RIGHT = {
    "L": saved(WHITE),
    "L of 0 and 1": saved(Image.fromarray(TRUE)),
    "1": saved(WHITE.convert("1")),
    "1 bit": grey_png(TRUE, 1),
    "2 bits": grey_png(TRUE, 2),
    "4 bits": grey_png(TRUE, 4),
    "LA, opaque": saved(WHITE.convert("LA")),
    "RGB": saved(WHITE.convert("RGB")),
    "red": saved(Image.merge("RGB", [WHITE, Image.new("L", WHITE.size), Image.new("L", WHITE.size)])),
    "RGBA, opaque": saved(WHITE.convert("RGBA")),
    "RGBA, red on transparent": cut_out((0, 0, 0, 0), (255, 0, 0, 255)),
    "RGBA, black on transparent white": cut_out((255, 255, 255, 0), (0, 0, 0, 255)),
    "RGBA, white on transparent white": cut_out((255, 255, 255, 0), (255, 255, 255, 255)),
    "RGBA, opaque black around white": cut_out((0, 0, 0, 255), (255, 255, 255, 255)),
    "P, white is 1": palette(BLACK_WHITE, TRUE),
    "P, white is 0": palette(WHITE_BLACK, 1 - TRUE),
    "P, VOC": palette(VOC, TRUE * 2),
    "P, transparent background": palette(BLACK_WHITE, TRUE, transparency=0),
    "P, transparent white background": palette(WHITE_BLACK, TRUE, transparency=0),
    "GIF": palette(BLACK_WHITE, TRUE, "GIF"),
    "GIF, white is 0": palette(WHITE_BLACK, 1 - TRUE, "GIF"),
    "lossless WebP": saved(WHITE.convert("RGB"), "WEBP", lossless=True),
    "lossless WebP, cut out": saved(Image.open(io.BytesIO(cut_out((0, 0, 0, 0), (9, 0, 0, 255)))), "WEBP", lossless=True),
    "TIFF": saved(WHITE, "TIFF"),
    "TIFF, CMYK": saved(WHITE.convert("CMYK"), "TIFF"),
    "TIFF, YCbCr": saved(WHITE.convert("RGB").convert("YCbCr"), "TIFF"),
    "TIFF, 32 bits": saved(Image.fromarray(TRUE.astype(np.int32) * 70000), "TIFF"),
    "TIFF, floats": saved(Image.fromarray(TRUE.astype(np.float32)), "TIFF"),
    "BMP": saved(WHITE, "BMP"),
    "16 bits": saved(Image.fromarray(TRUE.astype(np.uint16) * 65535)),
    "16 bits of 0 and 1": saved(Image.fromarray(TRUE.astype(np.uint16))),
}  # fmt: skip


def is_readable(encoded: bytes) -> bool:
    """Return whether this Pillow reads what it has written: Pillow 12 does not read its TIFF in YCbCr."""
    try:
        Image.open(io.BytesIO(encoded)).load()
    except OSError:
        return False
    return True


RIGHT = {name: encoded for name, encoded in RIGHT.items() if is_readable(encoded)}


@pytest.mark.parametrize("name", list(RIGHT))
def test_a_mask_is_what_it_shows(name):
    mask, antialiased = read_mask(RIGHT[name])
    assert mask.dtype == bool and (mask == TRUE).all() and not antialiased


def test_a_mask_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_mask(saved(WHITE, exif=exif))[0].shape == (60, 40)


def soft(scale, mode=None):
    large = WHITE.resize((60 * scale, 40 * scale), Image.Resampling.NEAREST)
    moved = Image.new("L", large.size)
    moved.paste(large, (scale // 2, scale // 2))  # half a pixel further right and down
    image = moved.resize((60, 40), Image.Resampling.BOX)
    return image.convert(mode) if mode else image


@pytest.mark.parametrize("mode", [None, "RGB", "RGBA", "P"])
def test_soft_edges_are_read_at_half(mode):
    mask, antialiased = read_mask(saved(soft(4, mode)))
    grey = np.asarray(soft(4))
    assert antialiased and len(np.unique(grey)) > 3
    assert (mask == (grey >= 128)).all()


def test_blurred_edges_are_read_at_half():
    blurred = WHITE.filter(ImageFilter.GaussianBlur(1))
    mask, antialiased = read_mask(saved(blurred))
    assert antialiased and (mask == (np.asarray(blurred) >= 128)).all()


def test_numbers_of_several_things_are_all_target():
    numbers = TRUE.copy()
    numbers[10:20, 10:30] = 2
    assert (read_mask(saved(Image.fromarray(numbers)))[0] == TRUE).all()
    numbers[numbers == 2] = 255  # VOC's edges; the rest is no soft edge of it
    mask, antialiased = read_mask(saved(Image.fromarray(numbers)))
    assert (mask == TRUE).all() and not antialiased


WRONG = {
    "JPEG": (saved(WHITE, "JPEG"), "JPEG.*save it as PNG"),
    "lossy WebP": (saved(WHITE.convert("RGB"), "WEBP"), "lossy WebP.*save it as PNG"),
    "JPEG in TIFF": (saved(WHITE.convert("RGB"), "TIFF", compression="jpeg"), "lossy.*save it as PNG"),
    "two frames": (saved(WHITE, "GIF", save_all=True, append_images=[WHITE.rotate(90)]), "2 frames"),
    "animated PNG": (saved(WHITE, save_all=True, append_images=[WHITE.rotate(90)]), "2 frames"),
    "no background": (saved(Image.fromarray(TRUE + 1)), "none of them is black"),
    "two colours": (palette([200, 0, 0, 0, 0, 200], TRUE), "none of them is black"),
    "black and white, and transparent": (
        saved(Image.merge("LA", [Image.fromarray((np.indices((40, 60)).sum(0) % 2 * 255).astype(np.uint8)), WHITE])),
        "colour and transparency disagree",
    ),
    "negative": (saved(Image.fromarray(-TRUE.astype(np.float32)), "TIFF"), "below 0"),
    "no image": (b"GIF89a no image", "."),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_mask_whose_target_cannot_be_told_is_refused(name):
    content, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        read_mask(content)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_label_maps_of_few_bits_keep_their_classes(bits):
    values = TRUE * (2**bits - 1) if bits < 8 else TRUE * 150
    values[0, 0] = 1
    assert (read_labels(grey_png(values, bits)) == values).all()


@pytest.mark.parametrize(
    "content",
    [palette(VOC, TRUE * 2), palette(WHITE_BLACK + [9, 9, 9], TRUE * 2), saved(Image.fromarray(TRUE * 2), "TIFF"),
     saved(Image.fromarray(TRUE * 2), "BMP"), saved(Image.fromarray(TRUE.astype(np.uint16) * 2))],
    ids=["P", "P, white is 0", "TIFF", "BMP", "16 bits"],
)  # fmt: skip
def test_label_maps_are_numbers_not_colours(content):
    assert (read_labels(content) == TRUE * 2).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [(saved(WHITE, "JPEG"), "JPEG"), (saved(WHITE.convert("RGB")), "one channel"), (saved(WHITE, "GIF"), "GIF"),
     (saved(WHITE.convert("LA")), "one channel"), (b"P2 2 2 7 0 1 2 7", "PPM"), (saved(WHITE.convert("F"), "TIFF"), "one channel")],
    ids=["JPEG", "RGB", "GIF", "LA", "PGM", "floats"],
)  # fmt: skip
def test_label_maps_that_do_not_keep_numbers_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_labels(content)
