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

from .builder import IMAGE, Kinds, RowBuilder, at, entries, inside, picture_of, read_json, require
from .class_names import ADE20K, COCO_STUFF
from .schema import encode_labels, expression, mask_area, segmentation_to_rle, shown
from .transforms import open_image


class LabelMapBuilder(RowBuilder):
    """One row per picture with a label map; an expression per class in it.

    A subclass says where pictures and label maps lie and what the values of a label map mean.
    """

    IGNORED = 255
    USES = (f"{__package__}.class_names",)

    def pairs(self) -> list[tuple[Path, Path]]:
        """Picture and label map of every row, in order."""
        raise NotImplementedError

    @property
    def classes(self) -> dict[int, str | None]:
        """What each value of a label map is called; None for what is never asked for."""
        raise NotImplementedError

    def files(self) -> list[Path]:
        return [require(label, f"the label map of {picture.name}") for picture, label in self.pairs()]

    def split_names(self) -> list[str]:
        return ["train"]

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        yield from (self.row(*pair) for pair in self.pairs())

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        # a list among the arguments is what `num_proc` shares among processes
        return [datasets.SplitGenerator("train", gen_kwargs={"split": "train", "pairs": self.pairs()})]

    def _generate_examples(self, split: str, pairs: list | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from ((number, self.row(*pair)) for number, pair in enumerate(self.pairs() if pairs is None else pairs))

    def row(self, picture: Path, label: Path) -> dict[str, Any]:
        try:
            with open_image(inside(label.parent, label.name)) as file:
                labels = np.array(file)  # of a palette picture: the indices
            inside(picture.parent, picture.name)
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
                    f"(0 to {max(self.classes, default='none')}); take pictures and class list from one release."
                )
            if (name := self.classes[value]) is not None:
                expressions.append(expression(name, mask))
        return {
            "image": {"path": str(picture), "bytes": None},
            "image_id": picture.stem,
            "height": height,
            "width": width,
            "expressions": expressions,
        }

    def listing(self, folder: str, suffix: str) -> list[Path]:
        """The files of a folder below `data_dir` with a suffix, sorted. Raises FileNotFoundError when there is none."""
        path = require(self.root / folder, f"a folder of {self.title}")
        found = sorted(entry for entry in path.iterdir() if entry.suffix == suffix)
        if not found:
            raise FileNotFoundError(f"There are no {suffix} files in {path}, where those of {self.title} belong.")
        return found


class Ade20kBuilder(LabelMapBuilder):
    """0 is "other"; the value of a class is its number in the list from 1."""

    def pairs(self) -> list[tuple[Path, Path]]:
        labels = self.root / "ade20k" / "annotations" / "training"
        pictures = self.listing("ade20k/images/training", ".jpg")
        return [(picture, labels / f"{picture.stem}.png") for picture in pictures]

    @cached_property
    def classes(self) -> dict[int, str | None]:
        return {0: None, **dict(enumerate(ADE20K, 1))}


class CocoStuffBuilder(LabelMapBuilder):
    """Classes with a dash in the name ("wall-brick") are never asked for, as in the original."""

    def pairs(self) -> list[tuple[Path, Path]]:
        pictures = self.root / "coco" / "train2017"
        return [(pictures / f"{label.stem}.jpg", label) for label in self.listing("cocostuff/train2017", ".png")]

    @cached_property
    def classes(self) -> dict[int, str | None]:
        return {value: None if "-" in name else name for value, name in enumerate(COCO_STUFF)}


class MapillaryBuilder(LabelMapBuilder):
    """Mapillary Vistas 2.0; "unlabeled" is a class like others, as in the original (Q27)."""

    @property
    def config_path(self) -> Path:
        return require(self.root / "mapillary" / "config_v2.0.json", "the class list of mapillary")

    def pairs(self) -> list[tuple[Path, Path]]:
        pictures = self.root / "mapillary" / "training" / "images"
        labels = self.listing("mapillary/training/v2.0/labels", ".png")
        return [(pictures / f"{label.stem}.jpg", label) for label in labels]

    def files(self) -> list[Path]:
        return [self.config_path, *super().files()]

    @cached_property
    def classes(self) -> dict[int, str | None]:
        path = self.config_path
        labels = entries(read_json(path), "labels", str(path), readable=str)
        return {value: label["readable"].lower() for value, (_, label) in enumerate(labels)}


class PartsBuilder(RowBuilder):
    """One row per picture of a COCO file; an expression per annotation that has a pixel, so names can repeat."""

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
        """Object and part of a category "object:part"; PACO has whole objects, too, and senses in brackets."""
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
            for field, known in (("image_id", annotations), ("category_id", names)):
                if annotation[field] not in known:
                    raise ValueError(f"{where}: there is no {field} {annotation[field]!r}; download it again.")
            annotations[annotation["image_id"]].append(annotation)
        folder = self.root / self.LAYOUTS[self.title][1]
        for image in images:
            expressions = []
            for annotation in annotations[image["id"]]:
                with at(f"{path}: annotation {shown(annotation.get('id'))}"):
                    mask = segmentation_to_rle(annotation["segmentation"], image["height"], image["width"])
                title, part = names[annotation["category_id"]]
                if mask_area(mask):
                    expressions.append(expression(title, mask, part=part))
            yield {
                "image": {"path": picture_of(image, folder, path), "bytes": None},
                "image_id": str(image["id"]),
                "height": image["height"],
                "width": image["width"],
                "expressions": expressions,
            }
