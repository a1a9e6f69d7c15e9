"""Your own images and expressions, from a folder with one annotation file per split.

    DATA_DIR/train.jsonl, DATA_DIR/val.jsonl, ...     one image per line (or .parquet with the same columns):
        {"image": "cats/1.jpg", "expressions": [{"text": "the left cat", "mask": ...}, ...]}
    DATA_DIR/train.json                               or COCO: images, annotations with a "caption" each

A mask is a polygon `[x0, y0, x1, y1, ...]` in pixels or a list of polygons, a COCO run-length encoding, the path of a
PNG whose non-zero pixels are the target, or null for an expression that has no target. Paths are relative to DATA_DIR.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .builder import RowBuilder
from .images import open_image, read_image
from .masks import empty_mask, encode_mask, mask_area, merge_masks, segmentation_to_rle
from .records import at, entries, inside, parse_json, read_json, short_repr
from .schema import expression

Record = tuple[str, dict[str, Any]]  # its place in a file, and its content

EXAMPLE = '{"image": "a.jpg", "expressions": [{"text": "the left cat", "mask": [10, 10, 90, 10, 90, 80]}]}'
# optional fields of an expression: type, and its description in errors
OPTIONAL: dict[str, tuple[type, str]] = {
    "num_targets": (int, "a whole number of annotations"),
    "is_sentence": (bool, "true or false"),
    "part": (str, "a text"),
    "explanation": (str, "a text"),
}


def _read_lines(path: Path) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, parse_json(line, where, f"a line is {EXAMPLE}")


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    number = 0
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(256)
        while batch := next(batches, None):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise ValueError(f"{path} is not a parquet file, or damaged after row {number} ({error}).") from None


def _read_coco(path: Path) -> Iterator[Record]:
    """Yield the images of a COCO file with one expression per caption, which several annotations may share."""
    content = read_json(path)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(
            f"{path} lacks images or annotations: a .json file must be COCO's; else use .jsonl, {EXAMPLE}"
        )
    images = [image for _, image in entries(content, "images", str(path), id=(int, str), file_name=str)]
    captions: dict[Any, dict[str, list]] = {image["id"]: {} for image in images}
    for _, annotation in entries(content, "annotations", str(path), image_id=(int, str)):
        where = f"{path}, annotation {short_repr(annotation.get('id'))}"
        if annotation["image_id"] not in captions:
            raise ValueError(f"{where}: there is no image with id {annotation['image_id']!r}; add it to images.")
        texts = annotation.get("caption")
        named = [texts] if isinstance(texts, str) else texts
        if not texts or not isinstance(named, list) or not all(isinstance(text, str) for text in named):
            raise ValueError(f"{where}: it lacks a caption, a text or a list of texts; add it or take it out.")
        for text in named:
            captions[annotation["image_id"]].setdefault(text, []).append(annotation.get("segmentation"))
    for image in images:
        expressions = [
            {"text": text, "masks": [mask for mask in masks if mask]} for text, masks in captions[image["id"]].items()
        ]
        yield f"{path}, image {image['id']!r}", {"image": image["file_name"], "expressions": expressions}


READERS = {".jsonl": _read_lines, ".parquet": _read_parquet, ".json": _read_coco}


class OwnBuilder(RowBuilder):
    """One row per image of an annotation file. The file's stem is the split (letters, digits and _)."""

    @cached_property
    def annotation_files(self) -> dict[str, Path]:
        """{split: annotation file}."""
        files: dict[str, Path] = {}
        for path in sorted(path for path in self.root.iterdir() if path.suffix in READERS):
            split = re.sub(r"\W", "_", path.stem)  # `datasets` accepts no other characters
            if split in files:
                raise ValueError(f"{files[split]} and {path} are both split {split!r}; rename one.")
            files[split] = path
        if not files:
            raise FileNotFoundError(
                f"{self.root} holds no annotation file; write train.jsonl (or .parquet, or .json in COCO's format) "
                f"there, one line per image: {EXAMPLE}"
            )
        return files

    def files(self) -> list[Path]:
        _ = self.annotation_files
        return sorted(path for path in self.root.rglob("*") if path.is_file())

    def split_names(self) -> list[str]:
        return list(self.annotation_files)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        path = self.annotation_files[split]
        for where, record in READERS[path.suffix](path):
            try:
                yield self.row(record)
            except (ValueError, OSError) as error:
                raise ValueError(f"{where}: {error}") from None

    def row(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the row of one record. Raises ValueError with the fix if the record is wrong."""
        if not isinstance(record, dict) or not isinstance(record.get("expressions"), list):
            raise ValueError(f"a record needs an 'image' and a list 'expressions', as in {EXAMPLE}")
        if "image" not in record:
            raise ValueError(f"it lacks 'image'; a record is as in {EXAMPLE}")
        image = record["image"]
        embedded = image.get("bytes") if isinstance(image, dict) else None
        name = image.get("path") if isinstance(image, dict) else image
        if embedded is None:
            image = {"path": str(inside(self.root, name)), "bytes": None}
        else:
            image = {"path": Path(name).name if isinstance(name, str) else None, "bytes": embedded}
        width, height = read_image(image).size
        expressions = []
        for number, entry in enumerate(record["expressions"]):
            with at(f"expression {number}"):
                expressions.append(self.expression(entry, height, width))
        image_id = record.get("image_id", Path(image["path"] or "image").stem)
        if not isinstance(image_id, (str, int)):
            raise ValueError(f"its image_id is {short_repr(image_id)}; give a text or a number, or leave it out.")
        return {
            "image": image,
            "image_id": str(image_id),
            "height": height,
            "width": width,
            "expressions": expressions,
        }

    def expression(self, entry: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        """Return one expression of a record. Raises ValueError with the fix if it is wrong."""
        if not isinstance(entry, dict) or "text" not in entry or not {"mask", "masks"} & entry.keys():
            missing = [name for name in ("text", "mask") if not isinstance(entry, dict) or name not in entry]
            raise ValueError(f"it lacks {missing[0]!r}; it must be as in {EXAMPLE}")
        text = entry["text"]
        if not isinstance(text, str) or not text.strip(" ."):
            raise ValueError(f"its text is {short_repr(text)}; give it words or take it out.")
        for name, (kind, meaning) in OPTIONAL.items():
            value = entry.get(name)
            if value is not None and (
                not isinstance(value, kind) or (isinstance(value, int) and not 0 <= value < 2**31)
            ):
                raise ValueError(f"its {name} is {short_repr(value)}; give {meaning}, or leave it out.")
        masks = entry["masks"] if "masks" in entry else [entry["mask"]]
        if not isinstance(masks, list):
            raise ValueError(f"its masks are {short_repr(masks)}; give a list.")
        masks = [self.mask(mask, height, width) for mask in masks if mask is not None]
        ignore = entry.get("ignore_mask")
        return expression(
            text,
            merge_masks(masks) if masks else empty_mask(height, width),
            num_targets=len(masks) if entry.get("num_targets") is None else entry["num_targets"],
            is_sentence=bool(entry.get("is_sentence")),
            ignore_mask=None if ignore is None else self.mask(ignore, height, width),
            part=entry.get("part"),
            explanation=entry.get("explanation"),
        )

    def mask(self, mask: Any, height: int, width: int) -> dict[str, Any]:
        """Return the encoding of a mask in any form. Raises ValueError if it is empty or of another size."""
        if isinstance(mask, str) and mask.lstrip()[:1] in ("[", "{"):  # a parquet column holds one type
            mask = parse_json(mask, f"its mask {short_repr(mask)}", "correct it.")
        if isinstance(mask, str):
            try:
                with open_image(inside(self.root, mask)) as file:
                    array = np.array(file)
            except (OSError, SyntaxError) as error:
                raise ValueError(f"its mask {mask!r} cannot be read ({error}); save the file again.") from None
            rle = encode_mask(np.any(array, axis=2) if array.ndim == 3 else array)
        else:
            flat = isinstance(mask, list) and bool(mask) and not isinstance(mask[0], (list, dict))
            rle = segmentation_to_rle([mask] if flat else mask, height, width)
        if rle["size"] != [height, width]:
            raise ValueError(f"its mask is {rle['size']} (height, width), its image {[height, width]}.")
        if not mask_area(rle) and not (isinstance(mask, dict) and "counts" in mask):
            raise ValueError(
                f"its mask has no pixel in an image of {height} x {width} (height x width); polygons are "
                f"[x0, y0, x1, y1, ...] in pixels, three points or more. Write null if it is not in the image."
            )
        return rle
