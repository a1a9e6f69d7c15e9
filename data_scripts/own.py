"""Your own images and expressions, from a folder with one annotation file per split, or from an annotation tool.

    DATA_DIR/train.jsonl, DATA_DIR/val.jsonl, ...     one image per line (or .parquet with the same columns):
        {"image": "cats/1.jpg", "expressions": [{"text": "the left cat", "mask": ...}, ...], "absent": ["a unicorn"]}

A mask is a polygon `[x0, y0, x1, y1, ...]` in pixels or a list of polygons, a COCO run-length encoding, the path of a
mask image (PNG) or its bytes, or null for an expression that has no target. Paths are relative to DATA_DIR. The formats
of annotation tools are listed in `own_formats.py`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from . import label_studio, labelme, own_formats, polygons
from .builder import RowBuilder
from .images import IMAGE_SUFFIXES, image_size
from .mask_images import read_mask
from .masks import (
    check_annotation,
    check_mask_size,
    empty_mask,
    encode_mask,
    evidence_of,
    is_none,
    mask_area,
    merge_masks,
    segmentation_to_rle,
)
from .nouns import Categories
from .own_formats import EXAMPLE, Source, find_sources, other_sources
from .records import at, inside, missing_file, parse_json, short_repr, visible
from .schema import expression
from .wordings import clean_expression

logger = logging.getLogger(__name__)

# optional fields of an expression: type, and its description in errors
OPTIONAL: dict[str, tuple[type, str]] = {
    "num_targets": (int, "a whole number of annotations"),
    "is_sentence": (bool, "true or false"),
    "part": (str, "a text"),
    "explanation": (str, "a text"),
}


class OwnBuilder(RowBuilder):
    """One row per image of an annotation file. The file's stem is the split (letters, digits and _)."""

    USES = tuple(module.__name__ for module in (label_studio, labelme, own_formats, polygons))
    ADVICE = "correct its files"

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Return {split: its annotations}."""
        sources: dict[str, Source] = {}
        for source in find_sources(self.root):
            if (other := sources.setdefault(source.split, source)) is not source:
                raise ValueError(f"{other.path} and {source.path} are both split {source.split!r}; rename one.")
        if not sources:
            raise FileNotFoundError(
                f"{self.root} holds no annotation file; write train.jsonl (or .parquet, or .json in COCO's format) "
                f"there, one line per image: {EXAMPLE}"
            )
        return sources

    def files(self) -> list[Path]:
        return sorted({file for source in self.sources.values() for file in source.files()})

    def left_out(self) -> list[str]:
        readable = (".jsonl", ".json", ".parquet", ".yaml", ".yml", ".txt", ".md", *IMAGE_SUFFIXES)
        others = [
            path for path in sorted(visible(self.root)) if path.is_file() and path.suffix.lower() not in readable
        ]
        return other_sources(self.root) + [f"{path} (not a format of annotations)" for path in others]

    def split_names(self) -> list[str]:
        """Return the splits that have records. Raises ValueError if none has."""
        names = []
        for split, source in self.sources.items():
            with self.collecting():
                if next(source.records(self), None) is not None:
                    names.append(split)
        if not names:
            raise ValueError("; ".join(map(self.empty_split, self.sources)))
        return names

    def categories(self) -> Categories:
        """Return the categories of a COCO file's annotations, which may have captions as texts. Other formats have none."""
        of_image: dict[str, set[str]] = {}
        of_text: dict[str, set[str]] = {}
        for source in self.sources.values():
            for _, record in source.records(self):
                names = record.get("category_names") if isinstance(record, dict) else None
                if names is None:
                    break
                for entry in record["expressions"]:
                    numbers = (annotation.get("category_id") for annotation in entry["annotations"])
                    found = {names[number] for number in numbers if isinstance(number, (int, str)) and number in names}
                    of_image.setdefault(str(record["image_id"]), set()).update(found)
                    of_text.setdefault(clean_expression(entry["text"]).lower(), set()).update(found)
        return Categories.of(of_image, of_text)

    def empty_splits(self) -> list[str]:
        return [self.empty_split(split) for split in self.sources if split not in self.info.splits]

    def empty_split(self, split: str) -> str:
        """Return the message for a split without images."""
        return f"split {split!r} is empty: {self.sources[split].path} holds no images."

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        images: dict[str, Any] = {}  # image id -> its image
        for where, read in self.sources[split].records(self):
            row = self.attempt(self.row_at, where, read, images)
            if row is not None:
                yield row

    def row_at(self, where: str, read: Any, images: dict[str, Any]) -> dict[str, Any]:
        """Return the row of the record at a place of a file; `images` are the images of the ids before it."""
        record = read() if callable(read) else read
        try:
            row = self.row(record)
            content = row["image"]["bytes"]
            key = row["image"]["path"] if content is None else hashlib.sha256(content).digest()
            if images.setdefault(row["image_id"], key) != key:
                other = images[row["image_id"]]
                raise ValueError(
                    f"its image_id is {row['image_id']!r}, as that of {other if isinstance(other, str) else 'another image'}; "
                    f"give every image an id of its own, or leave the ids out"
                )
            return row
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from None

    def row(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the row of one record. Raises ValueError with the fix if the record is wrong."""
        if isinstance(record, dict) and "expressions" not in record and "text" in record:  # one expression per record
            record = {**record, "expressions": [{name: record[name] for name in ("text", "mask") if name in record}]}
        listed = record.get("expressions") if isinstance(record, dict) else None
        if not isinstance(listed, list) and not callable(listed):
            raise ValueError(f"a record needs an 'image' and a list 'expressions', as in {EXAMPLE}")
        if "image" not in record:
            raise ValueError(f"it lacks 'image'; a record is as in {EXAMPLE}")
        image, name = self.image(record["image"])
        height, width = image_size(image, self.stated_size(record))
        if callable(listed):
            listed = listed(height, width)
        expressions = []
        for number, entry in enumerate(listed):
            with at(f"expression {number}"):
                expressions.append(self.expression(entry, height, width))
        expressions += self.absent(record, expressions, height, width)
        image_id = name if record.get("image_id") is None else record["image_id"]
        if not isinstance(image_id, (str, int)):
            raise ValueError(f"its image_id is {short_repr(image_id)}; give a text or a number, or leave it out.")
        return {
            "image": image,
            "image_id": str(image_id),
            "height": height,
            "width": width,
            "expressions": expressions,
        }

    def image(self, image: Any) -> tuple[dict[str, Any], str]:
        """Return a record's image as a path or bytes, and its path relative to the folder."""
        content = image.get("bytes") if isinstance(image, dict) else None
        name = image.get("path") if isinstance(image, dict) else image
        if content is not None:
            if not isinstance(content, bytes):
                raise ValueError(
                    f"the bytes of its image are {short_repr(content)}; embed images in parquet, not in JSON."
                )
            return {"path": Path(name).name if isinstance(name, str) else None, "bytes": content}, "image"
        path = inside(self.root, name)
        return {"path": str(path), "bytes": None}, Path(path).relative_to(self.root).as_posix()

    def stated_size(self, record: dict[str, Any]) -> tuple[int, int] | None:
        """Return the (height, width) that a record states, or None. Raises ValueError if they are not numbers."""
        sides = [record.get(name) for name in ("height", "width")]
        if sides == [None, None]:
            return None
        if not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
            raise ValueError(
                f"its height and width are {short_repr(sides)}; give two whole numbers, or leave both out."
            )
        return tuple(sides)  # type: ignore[return-value]

    def absent(self, record: dict, expressions: list[dict], height: int, width: int) -> list[dict]:
        """Return expressions without a target: those of the image's "absent", and of the file's where not labelled."""
        texts = {entry["text"].strip().lower(): mask_area(entry["mask"]) > 0 for entry in expressions}
        absent = []
        for field in ("absent", "absent_everywhere"):
            listed = record.get(field) or []
            if not isinstance(listed, list) or not all(isinstance(text, str) and text.strip(" .") for text in listed):
                raise ValueError(f"'absent' is {short_repr(listed)}; give a list of texts that have no target.")
            for text in dict.fromkeys(listed):
                present = texts.get(text.strip().lower())
                if present and field == "absent":
                    raise ValueError(f"{text!r} is in 'absent' and has a mask, too; take one out.")
                if present is None:
                    absent.append(expression(text, empty_mask(height, width), num_targets=0))
        return absent

    def expression(self, entry: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        """Return one expression of a record. Raises ValueError with the fix if it is wrong."""
        from_coco = isinstance(entry, dict) and isinstance(entry.get("annotations"), tuple)
        if not isinstance(entry, dict) or "text" not in entry or not (from_coco or {"mask", "masks"} & entry.keys()):
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
        masks = self.masks(entry, height, width)
        union = merge_masks(masks) if masks else empty_mask(height, width)
        pixels = mask_area(union)
        num_targets = entry.get("num_targets")
        if num_targets is None:
            num_targets = len(masks) if pixels else 0  # a no-target is decided by pixels
        elif bool(num_targets) != bool(pixels):
            raise ValueError(
                f"its num_targets is {num_targets}, but its mask has {pixels} pixels; correct one, or leave num_targets out."
            )
        ignore = entry.get("ignore_mask")
        return expression(
            text,
            union,
            num_targets=num_targets,
            is_sentence=bool(entry.get("is_sentence")),
            ignore_mask=None if ignore is None else self.mask(ignore, height, width),
            part=entry.get("part"),
            explanation=entry.get("explanation"),
        )

    def masks(self, entry: dict[str, Any], height: int, width: int) -> list[dict]:
        """Return the masks of an expression; none if it says that it has no target."""
        if isinstance(entry.get("annotations"), tuple):  # of COCO; a list would be from a file
            return self.annotation_masks(entry["annotations"], height, width)
        check_annotation(entry, "masks" if "masks" in entry else "mask")
        if "masks" not in entry:
            return [] if entry["mask"] is None else [self.mask(entry["mask"], height, width)]
        masks = entry["masks"]
        if not isinstance(masks, list) or not masks or any(mask is None for mask in masks):
            raise ValueError(
                f'its masks are {short_repr(masks)}; give a list of masks, or "mask": null for no target.'
            )
        return [self.mask(mask, height, width) for mask in masks]

    def annotation_masks(self, annotations: tuple[dict, ...], height: int, width: int) -> list[dict]:
        """Return the masks of the COCO annotations of one expression; none if they say that it has no target."""
        masks, absent, present = [], None, None
        for annotation in annotations:
            number = short_repr(annotation.get("id"))
            with at(f"annotation {number}"):
                check_annotation(annotation)
                segmentation = annotation.get("segmentation")
                if segmentation is None and "segmentation" in annotation:
                    absent = number
                    continue
                if is_none(segmentation):
                    value = short_repr(segmentation) if "segmentation" in annotation else "missing"
                    raise ValueError(
                        f"it has no mask (segmentation: {value}); draw it, or write null if its expression has no target."
                    )
                masks.append(self.mask(segmentation, height, width))
                if not mask_area(masks[-1]) and (evidence := evidence_of(annotation)):
                    raise ValueError(f"it has {evidence}, but its mask has no pixel; draw its mask or take it out.")
                present = number
        if absent is not None and present is not None:
            raise ValueError(
                f"annotation {absent} says that it has no target (null), annotation {present} gives it a mask; take one out."
            )
        return masks

    def mask(self, mask: Any, height: int, width: int) -> dict[str, Any]:
        """Return the encoding of a mask in any form. Raises ValueError if it is empty or of another size."""
        if isinstance(mask, str) and mask.lstrip("\ufeff \t\r\n")[:1] in ("[", "{"):  # a parquet column holds one type
            mask = parse_json(mask, f"its mask {short_repr(mask)}", "correct it.")
        is_struct = isinstance(mask, dict) and {"bytes", "path"} & mask.keys() and "counts" not in mask
        if isinstance(mask, (str, bytes)) or is_struct:
            rle = self.mask_image(mask)
        else:
            flat = isinstance(mask, list) and bool(mask) and not isinstance(mask[0], (list, dict))
            rle = segmentation_to_rle([mask] if flat else mask, height, width)
        check_mask_size(rle, height, width)
        if not mask_area(rle) and not (isinstance(mask, dict) and "counts" in mask):
            raise ValueError(
                f"its mask has no pixel in an image of {height} x {width} (height x width); polygons are "
                f"[x0, y0, x1, y1, ...] in pixels, three points or more. Write null if it is not in the image."
            )
        return rle

    def mask_image(self, mask: str | bytes | dict) -> dict[str, Any]:
        """Return the encoding of a mask image: its path, its bytes, or a Hugging Face image `{"bytes", "path"}`."""
        content = mask.get("bytes") if isinstance(mask, dict) else mask if isinstance(mask, bytes) else None
        name = mask.get("path") if isinstance(mask, dict) else mask
        if content is not None and not isinstance(content, bytes):
            raise ValueError(f"the bytes of its mask are {short_repr(content)}; embed masks in parquet, not in JSON.")
        source = inside(self.root, name) if content is None else content
        try:
            pixels, antialiased = read_mask(source)
        except FileNotFoundError:
            raise ValueError(missing_file(f"Its mask {name!r}", str(source))) from None
        except (OSError, ValueError) as error:
            shown_name = name if isinstance(name, str) else "(embedded)"
            raise ValueError(f"its mask {shown_name!r} cannot be read ({error}).") from None
        if antialiased and not self.told_of_edges:
            self.told_of_edges = True
            logger.warning(
                "The mask %r in %s has soft edges: grey is target from half on, here and in all other masks.",
                name if isinstance(name, str) else "(embedded)",
                self.root,
            )
        return encode_mask(pixels)

    told_of_edges = False

    def load(self, split: str, num_proc: int | None = None) -> Any:
        self.build(num_proc)
        for name in (part.split("[")[0].strip() for part in split.split("+")):
            if name in self.sources and name not in self.info.splits:
                raise ValueError(self.empty_split(name))
        return super().load(split, num_proc)
