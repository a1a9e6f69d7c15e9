"""Pictures for people: masks over images, a page of predictions, curves of a training run."""

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_scripts.schema import decode_mask
from data_scripts.transforms import read_image

# Distinguishable on photographs and for most colour-blind people (Okabe and Ito's palette, without black and grey).
PALETTE = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)]


def overlay(image: Image.Image, masks: Sequence[np.ndarray]) -> Image.Image:
    """The image with each mask (height, width) tinted in a colour of its own, and its outline drawn."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32).copy()
    for number, mask in enumerate(masks):
        mask = np.asarray(mask, dtype=bool)
        colour = np.asarray(PALETTE[number % len(PALETTE)], dtype=np.float32)
        pixels[mask] = 0.45 * pixels[mask] + 0.55 * colour
        inner = mask.copy()
        inner[1:], inner[:-1] = inner[1:] & mask[:-1], inner[:-1] & mask[1:]
        inner[:, 1:], inner[:, :-1] = inner[:, 1:] & mask[:, :-1], inner[:, :-1] & mask[:, 1:]
        pixels[mask & ~inner] = colour * 0.6
    return Image.fromarray(pixels.astype(np.uint8))


def _outline(mask: np.ndarray, width: int) -> np.ndarray:
    """The `width` pixels inside a mask's border; the edge of the picture is a border, too."""
    inner = np.pad(mask, width)
    for _ in range(width):
        inner[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    return mask & ~inner[width:-width, width:-width]


def contours(image: Image.Image, truth: np.ndarray, prediction: np.ndarray, side: int = 320) -> Image.Image:
    """
    The image, scaled to `side` pixels, with the prediction tinted and outlined in orange and the truth outlined in blue.

    Args:
        truth, prediction: (height, width) booleans of the image's own size; an empty one leaves no trace.
    """
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32).copy()
    true, said = (
        np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) > 127
        for mask in (np.asarray(truth, dtype=bool), np.asarray(prediction, dtype=bool))
    )
    orange, blue = (np.asarray(PALETTE[n], dtype=np.float32) for n in (0, 4))
    pixels[said] = 0.6 * pixels[said] + 0.4 * orange
    pixels[_outline(said, 2)] = orange
    pixels[_outline(true, 4)] = 255  # a light rim, visible on dark pictures
    pixels[_outline(true, 3)] = blue
    return Image.fromarray(pixels.astype(np.uint8))


def labelled_overlay(image: Image.Image, results: Sequence[dict[str, Any]]) -> Image.Image:
    """The overlay of a picture's results with a legend below: expression, colour, score, rejected ones crossed out."""
    drawn = overlay(image, [result["mask"] for result in results])
    line = 18
    width = max(drawn.width, 10 + max((7 * len(_caption(result)) + 24 for result in results), default=0))
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
        pen.text((24, top + 3), _caption(result), fill="black")
    return sheet


def contact_sheet(images: Sequence[Image.Image], columns: int = 3, width: int = 360) -> Image.Image:
    """Pictures in rows of `columns`, each scaled to `width` pixels, on one white sheet."""
    scaled = [image.resize((width, max(round(image.height * width / image.width), 1))) for image in images]
    rows = [scaled[n : n + columns] for n in range(0, len(scaled), columns)]
    heights = [max(image.height for image in row) + 8 for row in rows]
    sheet = Image.new("RGB", (min(columns, max(len(scaled), 1)) * (width + 8), sum(heights) or 1), "white")
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            sheet.paste(image, (column * (width + 8), sum(heights[:number])))
    return sheet


def _caption(result: dict[str, Any]) -> str:
    said = "rejected" if result["is_rejected"] else f"{int(np.asarray(result['mask']).sum())} px"
    score = "no slot" if np.isnan(result["score"]) else f"score {result['score']:+.2f}"
    return f"{result['text']}: {said}, {score}".encode("latin-1", "replace").decode("latin-1")


def verdict(entry: dict[str, Any], result: dict[str, Any]) -> tuple[str, bool]:
    """What became of an expression, in words, and whether that is good."""
    truth, mask = decode_mask(entry["mask"]).astype(bool), np.asarray(result["mask"], dtype=bool)
    if not truth.any():
        return ("rejected, rightly", True) if result["is_rejected"] else ("there is none, but it was accepted", False)
    if result["is_rejected"]:
        return "rejected, but it is there", False
    iou = (truth & mask).sum() / (truth | mask).sum()
    return f"IoU {iou:.2f}", bool(iou >= 0.5)


def expression_sheet(
    row: dict[str, Any], results: Sequence[dict[str, Any]], title: str, side: int = 256
) -> Image.Image:
    """
    One evaluated picture as a sheet: a tile for each expression with the prediction tinted and outlined in orange, the
    truth outlined in blue, and below it the expression and what became of it.

    Args:
        row: Of an evaluation's data set, with one entry in `expressions` for each result.
        title: Stands above the tiles.
        side: Longer side of a tile's picture in pixels.
    """
    image, line, columns = read_image(row["image"]).convert("RGB"), 17, min(max(len(results), 1), 4)
    font, height = ImageFont.load_default(size=13), round(image.height * side / max(image.size)) + 3 * line + 14
    head = textwrap.wrap(title, 36 * columns)
    top = 6 + line * len(head)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, top + height * -(-len(results) // columns) + 6), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 4), "\n".join(head), fill="black", font=font)
    for number, (entry, result) in enumerate(zip(row["expressions"], results, strict=True)):
        left, up = 8 + (number % columns) * (side + 8), top + (number // columns) * height
        truth, mask = decode_mask(entry["mask"]).astype(bool), np.asarray(result["mask"], dtype=bool)
        tile = contours(image, truth, np.zeros_like(mask) if result["is_rejected"] else mask, side)
        sheet.paste(tile, (left, up))
        lines = textwrap.wrap(result["text"], 36, max_lines=2, placeholder=" ...") or [""]
        below = up + tile.height + 4
        pen.text((left, below), "\n".join(lines), fill="black", font=font)
        words, good = verdict(entry, result)
        pen.text((left, below + line * len(lines)), words, fill=(17, 112, 58) if good else (176, 0, 32), font=font)
    return sheet


def _inline(image: Image.Image, width: int = 190) -> str:
    shown = image.resize((width, max(round(image.height * width / image.width), 1)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG", optimize=True)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em;max-width:1200px;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:4px 10px;border-bottom:1px solid #ddd;text-align:left}
.row{display:flex;flex-wrap:wrap;gap:14px;margin:1.2em 0;padding-bottom:1em;border-bottom:1px solid #ddd}
figure{margin:0;width:190px}figcaption{font-size:13px;line-height:1.35}
.rejected img{opacity:.45}.bad{color:#b00020;font-weight:600}.good{color:#11703a}"""


def prediction_page(title: str, table: str, predictions: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]) -> str:
    """
    A page that opens offline: for each picture the image, and for each expression truth and prediction side by side.

    Args:
        title: Heading.
        table: Plain text shown above the pictures.
        predictions: Pairs of a segmentation row and the processor's results for it.
    """
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><pre>{html.escape(table)}</pre>",
        "<p>Left of each pair the truth, right of it the prediction.</p>",
    ]
    for row, results in predictions:
        image = read_image(row["image"])
        parts.append(
            f"<div class=row><figure>{_inline(image)}<figcaption>{html.escape(row['image_id'])}</figcaption></figure>"
        )
        for entry, result in zip(row["expressions"], results, strict=True):
            truth, mask = decode_mask(entry["mask"]).astype(bool), np.asarray(result["mask"], dtype=bool)
            rejected = result["is_rejected"]
            shown = np.zeros_like(mask) if rejected else mask
            pair = Image.new("RGB", (image.width * 2 + 4, image.height), "white")
            pair.paste(overlay(image, [truth]), (0, 0))
            pair.paste(overlay(image, [shown]), (image.width + 4, 0))
            words, good = verdict(entry, result)
            parts.append(
                f"<figure class={'rejected' if rejected else 'kept'}>{_inline(pair)}<figcaption>{html.escape(result['text'])}"
                f"<br><span class={'good' if good else 'bad'}>{words}</span></figcaption></figure>"
            )
        parts.append("</div>")
    return "\n".join([*parts, "</html>"])
