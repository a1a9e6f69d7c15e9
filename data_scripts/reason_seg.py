"""ReasonSeg: images with outlines and a few implicit questions, some with an explanation in words.

DATA_DIR/reason_seg/ReasonSeg/{train,val,test}/*.jpg, a .json beside each
DATA_DIR/reason_seg/ReasonSeg/explanatory/train.json
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import labelme, polygons
from .builder import RowBuilder
from .images import IMAGE_SUFFIXES, image_size
from .labelme import draw_shape, fill_like_opencv
from .masks import encode_mask
from .records import (
    at,
    decode_text,
    entries,
    expect,
    inside,
    listing,
    parse_json,
    read_json,
    require,
    short_repr,
    visible,
)
from .schema import expression

logger = logging.getLogger(__name__)
TARGET, IGNORE = 1, 255
SPLITS = ("train", "val", "test")
# Text that is ASCII except for the characters of English text in cp1252: quotes, dashes, other signs, single letters of
# loanwords. Text in another encoding (GBK, Shift JIS, cp1251, ...) has other signs, or several such letters in a row.
_CP1252 = re.compile(r"(?:[\x00-\x7f\u2018\u2019\u201c\u201d\u2013\u2014\u2026\u2022\u20ac\u2122\xa0\xa9\xae\xb0\xbd]"
                     r"|[\xc0\xc1\xc2\xc4\xc7-\xcf\xd1\xd3\xd4\xd6\xda-\xdc\xdf-\xe2\xe4\xe7-\xef\xf1\xf3\xf4\xf6\xf8-\xfc]"
                     r"(?![\xa1-\xff]))*")  # fmt: skip


def read_annotation(path: Path) -> dict[str, Any]:
    """Read the JSON beside an image: UTF-8, or cp1252 like a few of the published files."""
    content = path.read_bytes()
    advice = "save it as UTF-8, or download it again."
    try:
        text = decode_text(content, str(path), advice)
    except ValueError:
        text = content.decode("cp1252", "replace")
        if content[:2] in (b"\xff\xfe", b"\xfe\xff") or not _CP1252.fullmatch(text):
            raise ValueError(f"{path} is neither UTF-8 nor cp1252 with English in it; {advice}") from None
    record = expect(parse_json(text, str(path), advice), str(path), shapes=list, text=list, is_sentence=(bool, int))
    if wrong := [one for one in record["text"] if not isinstance(one, str)]:
        raise ValueError(f"{path}: text must be a list of strings, got {short_repr(wrong[0])} in it; correct it.")
    return {**record, "is_sentence": bool(record["is_sentence"])}


def draw_shapes(shapes: list[dict], height: int, width: int) -> np.ndarray:
    """Return a label map (height, width): 1 on the target, 255 on pixels that do not count, 0 elsewhere.

    Larger shapes are painted first. Coordinates lose their fraction. Shapes labelled "flag" are notes.
    """
    drawn = []
    for number, shape in enumerate(shapes):
        label = shape["label"].lower()
        if label != "flag":
            with at(f"shape {number}"):
                covered = draw_shape(shape, height, width, fill_like_opencv)
            if len(shape["points"]):
                drawn.append((int(covered.sum()), covered, IGNORE if "ignore" in label else TARGET))
    labels = np.zeros((height, width), np.uint8)
    # largest first; of two shapes of one size, the later one is painted first, as in the original (Q48)
    for number in sorted(range(len(drawn)), key=lambda number: (-drawn[number][0], -number)):
        labels[drawn[number][1]] = drawn[number][2]
    return labels


class ReasonSegBuilder(RowBuilder):
    """One row per image. Its texts share one mask and, if some pixels do not count, one ignore mask."""

    USES = (labelme.__name__, polygons.__name__)

    @property
    def folder(self) -> Path:
        return self.root / "reason_seg" / "ReasonSeg"

    @property
    def explanations_path(self) -> Path:
        return self.folder / "explanatory" / "train.json"

    @cached_property
    def images(self) -> dict[str, dict[str, Path]]:
        """Return {split: {stem: path of an image}}, without empty splits."""
        require(self.folder, "ReasonSeg's folder with train, val and test")
        images = {split: listing(self.folder / split, IMAGE_SUFFIXES) for split in SPLITS}
        return {split: paths for split, paths in images.items() if paths}

    @cached_property
    def annotations(self) -> dict[str, dict[str, Path]]:
        """Return {split: {stem: path of a .json}}."""
        return {split: listing(self.folder / split, (".json",)) for split in SPLITS}

    def annotation_of(self, split: str, image: Path) -> Path:
        """Return the path of the .json beside an image. Raises FileNotFoundError if it is missing."""
        return self.annotations[split].get(image.stem) or require(image.with_suffix(".json"), f"for {image.name}")

    def files(self) -> list[Path]:
        if not self.images:
            require(self.folder / "train", "ReasonSeg's images")
            raise FileNotFoundError(
                f"There are no images ({', '.join(IMAGE_SUFFIXES)}) in {self.folder}/train, val or test."
            )
        files = [
            file
            for split, images in self.images.items()
            for image in images.values()
            for file in (image, self.annotation_of(split, image))
        ]
        return files + [path for path in [self.explanations_path] if path.exists()]

    def left_out(self) -> list[str]:
        read = {path for paths in self.images.values() for path in paths.values()}
        stems = {path.with_suffix("") for path in read}
        return [
            f"{path} ({'has no image beside it' if path.suffix.lower() == '.json' else 'is not an image'})"
            for split in SPLITS
            for path in sorted(visible(self.folder / split))
            if path not in read and not (path.suffix.lower() == ".json" and path.with_suffix("") in stems)
        ]

    @cached_property
    def explanations(self) -> dict[str, str]:
        """Return {file name of an image: its explanation}."""
        if not self.explanations_path.exists():
            logger.warning("%s is missing: no image has an explanation.", self.explanations_path)
            return {}
        path = str(self.explanations_path)
        records = entries({"records": read_json(self.explanations_path)}, "records", path, image=str, outputs=str)
        return {record["image"]: record["outputs"] for _, record in records}

    def split_names(self) -> list[str]:
        return list(self.images)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        for path in self.images[split].values():
            row = self.attempt(self.row, path, self.annotation_of(split, path))
            if row is not None:
                yield row

    def row(self, path: Path, annotation: Path) -> dict[str, Any]:
        """Return the row of an image and the .json beside it."""
        record = read_annotation(annotation)
        stated: Any = (
            record.get("imageHeight"),
            record.get("imageWidth"),
        )  # labelme writes them, ReasonSeg's own files do not
        with at(str(annotation)):
            height, width = image_size(
                {"path": str(inside(path.parent, path.name)), "bytes": None},
                stated if all(isinstance(side, int) for side in stated) else None,
            )
        try:
            labels = draw_shapes(record["shapes"], height, width)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{annotation}: a shape needs a label and points [[x, y], ...] ({reason}).") from None
        ignore = encode_mask(labels == IGNORE) if (labels == IGNORE).any() else None
        return {
            "image": {"path": str(path), "bytes": None},
            "image_id": path.stem,
            "height": height,
            "width": width,
            "expressions": [
                expression(
                    text,
                    encode_mask(labels == TARGET),
                    num_targets=sum("ignore" not in shape["label"].lower() for shape in record["shapes"]),
                    is_sentence=record["is_sentence"],
                    ignore_mask=ignore,
                    explanation=self.explanations.get(path.name),
                )
                for text in record["text"]
            ],
        }
