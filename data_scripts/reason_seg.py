"""ReasonSeg: images with outlines and a few implicit questions, some with an explanation in words.

DATA_DIR/reason_seg/ReasonSeg/{train,val,test}/*.jpg, a .json beside each
DATA_DIR/reason_seg/ReasonSeg/explanatory/train.json
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .builder import RowBuilder
from .images import read_image
from .masks import encode_mask
from .polygons import fill_polygon
from .records import entries, expect, inside, parse_json, read_json, require, short_repr
from .schema import expression

logger = logging.getLogger(__name__)
TARGET, IGNORE = 1, 255


def read_annotation(path: Path) -> dict[str, Any]:
    """Read the JSON beside an image: UTF-8, or cp1252 like a few of the published files."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is neither UTF-8 nor cp1252 ({error}); download it again.") from None
    record = expect(parse_json(text, str(path)), str(path), shapes=list, text=list, is_sentence=(bool, int))
    if wrong := [one for one in record["text"] if not isinstance(one, str)]:
        raise ValueError(
            f"{path}: text must be a list of strings, got {short_repr(wrong[0])} in it; download it again."
        )
    return {"shapes": record["shapes"], "text": record["text"], "is_sentence": bool(record["is_sentence"])}


def draw_shapes(shapes: list[dict], height: int, width: int) -> np.ndarray:
    """Return a label map (height, width): 1 on the target, 255 on pixels that do not count, 0 elsewhere.

    Larger shapes are painted first. Coordinates lose their fraction. Shapes labelled "flag" are notes.
    """
    drawn = []
    for shape in shapes:
        label = shape["label"].lower()
        if label != "flag" and len(shape["points"]):
            points = np.array(shape["points"], dtype=np.float64)
            if not (abs(points) < 2**30).all():  # also for NaN
                raise ValueError("a point lies outside of any image")
            covered = fill_polygon(points.astype(np.int32), height, width) > 0
            drawn.append((int(covered.sum()), covered, IGNORE if "ignore" in label else TARGET))
    labels = np.zeros((height, width), np.uint8)
    # largest first; of two shapes of one size, the later one is painted first, as in the original (Q48)
    for number in sorted(range(len(drawn)), key=lambda number: (-drawn[number][0], -number)):
        labels[drawn[number][1]] = drawn[number][2]
    return labels


class ReasonSegBuilder(RowBuilder):
    """One row per image. Its texts share one mask and, if some pixels do not count, one ignore mask."""

    USES = (fill_polygon.__module__,)

    @property
    def folder(self) -> Path:
        return self.root / "reason_seg" / "ReasonSeg"

    @property
    def explanations_path(self) -> Path:
        return self.folder / "explanatory" / "train.json"

    @cached_property
    def images(self) -> dict[str, list[Path]]:
        """{split: paths of its images}, without empty splits."""
        require(self.folder, "ReasonSeg's folder with train, val and test")
        images = {split: sorted((self.folder / split).glob("*.jpg")) for split in ("train", "val", "test")}
        return {split: paths for split, paths in images.items() if paths}

    def files(self) -> list[Path]:
        images = [path for paths in self.images.values() for path in paths]
        if not images:
            require(self.folder / "train", "ReasonSeg's images")
            raise FileNotFoundError(f"There are no .jpg files in {self.folder}/train, val or test.")
        files = [file for path in images for file in (path, require(path.with_suffix(".json"), f"for {path.name}"))]
        return files + [path for path in [self.explanations_path] if path.exists()]

    @cached_property
    def explanations(self) -> dict[str, str]:
        """{file name of an image: its explanation}."""
        if not self.explanations_path.exists():
            logger.warning("%s is missing: no image has an explanation.", self.explanations_path)
            return {}
        path = str(self.explanations_path)
        records = entries({"records": read_json(self.explanations_path)}, "records", path, image=str, outputs=str)
        return {record["image"]: record["outputs"] for _, record in records}

    def split_names(self) -> list[str]:
        return list(self.images)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        for path in self.images[split]:
            record = read_annotation(path.with_suffix(".json"))
            width, height = read_image({"path": str(inside(path.parent, path.name)), "bytes": None}).size
            try:
                labels = draw_shapes(record["shapes"], height, width)
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                raise ValueError(
                    f"{path.with_suffix('.json')}: a shape needs a label and points [[x, y], ...] ({error!r})."
                ) from None
            ignore = encode_mask(labels == IGNORE) if (labels == IGNORE).any() else None
            yield {
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
