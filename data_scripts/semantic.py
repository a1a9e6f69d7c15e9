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

from .builder import RowBuilder
from .class_names import ADE20K, COCO_STUFF
from .images import IMAGE_SUFFIXES, check_image_size
from .mask_images import read_labels
from .masks import check_annotation, encode_labels, is_none, mask_area, segmentation_to_rle
from .records import IMAGE, Kinds, at, entries, image_path, inside, listing, read_json, require, short_repr, visible
from .schema import expression

COCO_IMAGES = "coco/train2017"
LABEL_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # formats that keep class numbers


class LabelMapBuilder(RowBuilder):
    """One row per image with a label map, one expression per class in it.

    A subclass defines where images and label maps lie and the meaning of the values in a label map. An image and its label
    map have one name apart from the suffix.
    """

    IMAGES: str
    LABELS: str
    IGNORED = 255
    USES = (f"{__package__}.class_names",)

    def pairs(self) -> list[tuple[Path, Path]]:
        """Return (image, label map) of every row, in order. By default, one row per label map."""
        labels = self.listing(self.LABELS, LABEL_SUFFIXES)
        folder = self.root / self.IMAGES
        images: dict[str, Path] | None = None
        pairs = []
        for stem, label in labels.items():
            image = folder / f"{stem}.jpg"
            if not image.exists():
                images = listing(folder, IMAGE_SUFFIXES) if images is None else images
                image = images.get(stem, image)
            pairs.append((image, label))
        return pairs

    @property
    def classes(self) -> dict[int, str | None]:
        """Return {value in a label map: name of the class, or None for a class that is never asked for}."""
        raise NotImplementedError

    def files(self) -> list[Path]:
        return [require(label, f"the label map of {image.name}") for image, label in self.pairs()]

    def split_names(self) -> list[str]:
        return ["train"]

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        yield from (row for pair in self.pairs() if (row := self.attempt(self.row, *pair)) is not None)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        # `num_proc` divides lists among the arguments between processes
        return [datasets.SplitGenerator("train", gen_kwargs={"split": "train", "pairs": self.pairs()})]

    def _generate_examples(self, split: str, pairs: list | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from ((number, self.row(*pair)) for number, pair in enumerate(self.pairs() if pairs is None else pairs))

    def row(self, image: Path, label: Path) -> dict[str, Any]:
        """Return the row of one image and its label map. Raises ValueError if the label map is wrong."""
        try:
            labels = read_labels(inside(label.parent, label.name))
            inside(image.parent, image.name)
        except (OSError, ValueError) as error:
            raise ValueError(f"The label map {label} cannot be read ({error}); download it again.") from None
        height, width = labels.shape
        with at(f"The label map {label}"):
            check_image_size(image, (height, width))
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

    def listing(self, folder: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
        """Return {stem: path} of a folder's files. Raises FileNotFoundError if there are none."""
        path = require(self.root / folder, f"a folder of {self.title}")
        paths = listing(path, suffixes)
        if not paths:
            raise FileNotFoundError(
                f"There are no {suffixes[0]} files in {path}, where those of {self.title} belong (also read: "
                f"{', '.join(suffixes[1:])}, in any case)."
            )
        return paths

    def left_out(self) -> list[str]:
        pairs = self.pairs()
        used = {path for pair in pairs for path in pair}
        folders = {path.parent for pair in pairs for path in pair} - {
            self.root / COCO_IMAGES
        }  # shared with other sets
        return [
            f"{path} ({'has no partner of this name' if path.suffix.lower() in IMAGE_SUFFIXES else 'is not an image'})"
            for folder in sorted(folders)
            for path in sorted(visible(folder))
            if path not in used
        ]


class Ade20kBuilder(LabelMapBuilder):
    """One row per image. The value of a class is its number in the list, from 1; 0 is "other"."""

    IMAGES, LABELS = "ade20k/images/training", "ade20k/annotations/training"

    def pairs(self) -> list[tuple[Path, Path]]:
        folder = self.root / self.LABELS
        labels = listing(folder, LABEL_SUFFIXES)
        images = self.listing(self.IMAGES, IMAGE_SUFFIXES)
        return [(image, labels.get(stem, folder / f"{stem}.png")) for stem, image in images.items()]

    @cached_property
    def classes(self) -> dict[int, str | None]:
        return {0: None, **dict(enumerate(ADE20K, 1))}


class CocoStuffBuilder(LabelMapBuilder):
    """Classes with a dash in the name ("wall-brick") are never asked for, as in the original."""

    IMAGES, LABELS = COCO_IMAGES, "cocostuff/train2017"

    @cached_property
    def classes(self) -> dict[int, str | None]:
        return {value: None if "-" in name else name for value, name in enumerate(COCO_STUFF)}


class MapillaryBuilder(LabelMapBuilder):
    """Mapillary Vistas 2.0. "unlabeled" is a class like the others, as in the original (Q27)."""

    IMAGES, LABELS = "mapillary/training/images", "mapillary/training/v2.0/labels"

    @property
    def config_path(self) -> Path:
        return require(self.root / "mapillary" / "config_v2.0.json", "the class list of mapillary")

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
        names: dict[Any, tuple[str, str | None]] = {}
        for _, category in self.entries(content, "categories", path, id=(int, str), name=str):
            with self.collecting():
                names[category["id"]] = self.object_and_part(category["name"])
        images = self.by_id(self.entries(content, "images", path, **IMAGE), "file_name")
        annotations: dict[Any, list[dict]] = {number: [] for number in images}
        kinds: Kinds = {"image_id": (int, str), "category_id": (int, str)}
        numbered = []
        for where, annotation in self.entries(content, "annotations", path, segmentation=object, **kinds):
            with self.collecting():
                for field, ids in (("image_id", annotations), ("category_id", names)):
                    if annotation[field] not in ids:
                        raise ValueError(f"{where}: there is no {field} {annotation[field]!r}; download it again.")
                if "id" in annotation:
                    numbered.append((where, annotation))
                annotations[annotation["image_id"]].append(annotation)
        self.by_id(numbered, "image_id")
        for number, image in images.items():
            row = self.attempt(self.row, image, annotations[number], names)
            if row is not None:
                yield row

    def row(self, image: dict, annotations: list[dict], names: dict[Any, tuple[str, str | None]]) -> dict[str, Any]:
        """Return the row of an image with its annotations; `names` is {category id: (object, part)}."""
        path = image_path(image, self.root / self.LAYOUTS[self.title][1], str(self.path))
        with at(f"{self.path}: image {short_repr(image['id'])}"):
            check_image_size(path, (image["height"], image["width"]))
        expressions = []
        for annotation in annotations:
            with self.collecting(), at(f"{self.path}: annotation {short_repr(annotation.get('id'))}"):
                check_annotation(annotation)
                if is_none(annotation["segmentation"]):
                    raise ValueError("it has no mask, so there is nothing of its class to ask for; take it out.")
                mask = segmentation_to_rle(annotation["segmentation"], image["height"], image["width"])
                title, part = names[annotation["category_id"]]
                if mask_area(mask):
                    expressions.append(expression(title, mask, part=part))
        return {
            "image": {"path": path, "bytes": None},
            "image_id": str(image["id"]),
            "height": image["height"],
            "width": image["width"],
            "expressions": expressions,
        }
