"""Classes and parts: ade20k, cocostuff and mapillary (label maps), paco_lvis and pascal_part (COCO annotations).

DATA_DIR/ade20k/{images,annotations}/training
DATA_DIR/cocostuff/train2017/*.png, DATA_DIR/coco/train2017/*.jpg
DATA_DIR/mapillary/{config_v2.0.json, training/images, training/v2.0/labels}
DATA_DIR/vlpart/paco/annotations/paco_lvis_v1_train.json, DATA_DIR/coco/train2017/*.jpg
DATA_DIR/vlpart/pascal_part/{train.json, VOCdevkit/VOC2010/JPEGImages}
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .builder import RowBuilder
from .class_names import ADE20K, COCO_STUFF
from .images import open_image
from .masks import encode_labels, mask_area, segmentation_to_rle
from .records import IMAGE, Kinds, at, entries, image_path, inside, read_json, require, short_repr
from .schema import expression


class LabelMapBuilder(RowBuilder):
    """One row per image with a label map, one expression per class in it.

    A subclass defines where images and label maps lie and the meaning of the values in a label map.
    """

    IGNORED = 255
    USES = (f"{__package__}.class_names",)

    def pairs(self) -> list[tuple[Path, Path]]:
        """Return (image, label map) of every row, in order."""
        raise NotImplementedError

    @property
    def classes(self) -> dict[int, str | None]:
        """{value in a label map: name of the class, or None for a class that is never asked for}."""
        raise NotImplementedError

    def files(self) -> list[Path]:
        return [require(label, f"the label map of {image.name}") for image, label in self.pairs()]

    def split_names(self) -> list[str]:
        return ["train"]

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        yield from (self.row(*pair) for pair in self.pairs())

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        # `num_proc` divides lists among the arguments between processes
        return [datasets.SplitGenerator("train", gen_kwargs={"split": "train", "pairs": self.pairs()})]

    def _generate_examples(self, split: str, pairs: list | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from ((number, self.row(*pair)) for number, pair in enumerate(self.pairs() if pairs is None else pairs))

    def row(self, image: Path, label: Path) -> dict[str, Any]:
        """Return the row of one image and its label map. Raises ValueError if the label map is wrong."""
        try:
            with open_image(inside(label.parent, label.name)) as file:
                labels = np.array(file)  # for a palette image, the indices
            inside(image.parent, image.name)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"The label map {label} cannot be read ({error}); download it again.") from None
        if labels.ndim != 2:
            raise ValueError(f"The label map {label} must have one channel, got an array of shape {labels.shape}.")
        height, width = labels.shape
        expressions = []
        for value, mask in encode_labels(labels).items():
            if value == self.IGNORED:
                continue
            if value not in self.classes:
                raise ValueError(
                    f"The label map {label} holds the value {value}, which is no class of {self.title} "
                    f"(0 to {max(self.classes, default='none')}); take images and class list from one release."
                )
            if (name := self.classes[value]) is not None:
                expressions.append(expression(name, mask))
        return {
            "image": {"path": str(image), "bytes": None},
            "image_id": image.stem,
            "height": height,
            "width": width,
            "expressions": expressions,
        }

    def listing(self, folder: str, suffix: str) -> list[Path]:
        """Return the files of a folder with a suffix, sorted. Raises FileNotFoundError if there are none."""
        path = require(self.root / folder, f"a folder of {self.title}")
        paths = sorted(entry for entry in path.iterdir() if entry.suffix == suffix)
        if not paths:
            raise FileNotFoundError(f"There are no {suffix} files in {path}, where those of {self.title} belong.")
        return paths


class Ade20kBuilder(LabelMapBuilder):
    """The value of a class is its number in the list, from 1; 0 is "other"."""

    def pairs(self) -> list[tuple[Path, Path]]:
        labels = self.root / "ade20k" / "annotations" / "training"
        images = self.listing("ade20k/images/training", ".jpg")
        return [(image, labels / f"{image.stem}.png") for image in images]

    @cached_property
    def classes(self) -> dict[int, str | None]:
        return {0: None, **dict(enumerate(ADE20K, 1))}


class CocoStuffBuilder(LabelMapBuilder):
    """Classes with a dash in the name ("wall-brick") are never asked for, as in the original."""

    def pairs(self) -> list[tuple[Path, Path]]:
        images = self.root / "coco" / "train2017"
        return [(images / f"{label.stem}.jpg", label) for label in self.listing("cocostuff/train2017", ".png")]

    @cached_property
    def classes(self) -> dict[int, str | None]:
        return {value: None if "-" in name else name for value, name in enumerate(COCO_STUFF)}


class MapillaryBuilder(LabelMapBuilder):
    """Mapillary Vistas 2.0. "unlabeled" is a class like the others, as in the original (Q27)."""

    @property
    def config_path(self) -> Path:
        return require(self.root / "mapillary" / "config_v2.0.json", "the class list of mapillary")

    def pairs(self) -> list[tuple[Path, Path]]:
        images = self.root / "mapillary" / "training" / "images"
        labels = self.listing("mapillary/training/v2.0/labels", ".png")
        return [(images / f"{label.stem}.jpg", label) for label in labels]

    def files(self) -> list[Path]:
        return [self.config_path, *super().files()]

    @cached_property
    def classes(self) -> dict[int, str | None]:
        path = self.config_path
        labels = entries(read_json(path), "labels", str(path), readable=str)
        return {value: label["readable"].lower() for value, (_, label) in enumerate(labels)}


class PartsBuilder(RowBuilder):
    """One row per image of a COCO file, one expression per annotation that has a pixel, so names can repeat."""

    LAYOUTS = {
        "paco_lvis": ("vlpart/paco/annotations/paco_lvis_v1_train.json", "coco"),
        "pascal_part": ("vlpart/pascal_part/train.json", "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"),
    }

    @property
    def path(self) -> Path:
        return require(self.root / self.LAYOUTS[self.title][0], f"the annotations of {self.title}")

    def files(self) -> list[Path]:
        return [self.path]

    def split_names(self) -> list[str]:
        return ["train"]

    def object_and_part(self, category: str) -> tuple[str, str | None]:
        """Split a category "object:part". PACO also has whole objects, and word senses in brackets."""
        pieces = category.strip().split(":")
        if len(pieces) > 2 or (len(pieces) < 2 and self.title == "pascal_part"):
            raise ValueError(
                f"{self.path}: category {category!r} is not of the form "
                f"{'object:part' if self.title == 'pascal_part' else 'object or object:part'}; correct its name."
            )
        if self.title == "paco_lvis":
            pieces = [piece.split("_(")[0] for piece in pieces]
        return pieces[0], pieces[1] if len(pieces) > 1 else None

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        path, content = str(self.path), read_json(self.path)
        names = {
            category["id"]: self.object_and_part(category["name"])
            for _, category in entries(content, "categories", path, id=(int, str), name=str)
        }
        images = [image for _, image in entries(content, "images", path, **IMAGE)]
        annotations: dict[Any, list[dict]] = {image["id"]: [] for image in images}
        kinds: Kinds = {"image_id": (int, str), "category_id": (int, str)}
        for where, annotation in entries(content, "annotations", path, segmentation=object, **kinds):
            for field, ids in (("image_id", annotations), ("category_id", names)):
                if annotation[field] not in ids:
                    raise ValueError(f"{where}: there is no {field} {annotation[field]!r}; download it again.")
            annotations[annotation["image_id"]].append(annotation)
        folder = self.root / self.LAYOUTS[self.title][1]
        for image in images:
            expressions = []
            for annotation in annotations[image["id"]]:
                with at(f"{path}: annotation {short_repr(annotation.get('id'))}"):
                    mask = segmentation_to_rle(annotation["segmentation"], image["height"], image["width"])
                title, part = names[annotation["category_id"]]
                if mask_area(mask):
                    expressions.append(expression(title, mask, part=part))
            yield {
                "image": {"path": image_path(image, folder, path), "bytes": None},
                "image_id": str(image["id"]),
                "height": image["height"],
                "width": image["width"],
                "expressions": expressions,
            }
