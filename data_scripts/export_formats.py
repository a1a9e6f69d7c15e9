"""The formats of annotation tools, to write; `own_formats.py` reads them. Each names the source that describes it."""

from __future__ import annotations

import base64
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

from .label_studio import encode_brush
from .masks import decode_mask, mask_area
from .outlines import mask_outlines

VOID = 255  # in label maps: pixels that are not annotated
MOST_CLASSES = 2**16 - 2  # in a PNG of 16 bits, without background and VOID


@dataclass(frozen=True)
class Answer:
    """An expression that is in the image, with its mask (COCO RLE) and the probability that it is there, if known."""

    text: str
    mask: dict[str, Any]
    probability: float | None


@dataclass(frozen=True)
class Picture:
    """An image with its predictions.

    Args:
        image_id: Of the predictions.
        name: The file name in the export.
        answers: The expressions that are in the image.
        absent: The texts of those that were rejected.
        source: The image's file, if it is copied.
        model: The name of the model.
    """

    image_id: str
    name: str
    height: int
    width: int
    answers: list[Answer]
    absent: list[str]
    source: Path | None = None
    model: str | None = None


class Format(ABC):
    """A format.

    Args:
        folder: Where files are written.
        name: What `folder` will be called in the end.
        texts: All expressions that have a mask.
        absent: Those that are absent in every image where they have none.
    """

    images: str  # the folder of the images

    def __init__(self, folder: Path, name: str, texts: list[str], absent: list[str]):
        self.folder, self.name, self.texts, self.absent = folder, name, texts, absent
        self.numbers = {text: number for number, text in enumerate(texts)}

    @abstractmethod
    def write(self, pictures: Iterable[Picture]) -> dict[str, int]:
        """Write the annotations of all images. Returns what the format could not hold: {what: how many}."""

    def file(self, name: str) -> Path:
        """Return the path of a file to write, whose folder exists then."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def dump(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        self.file(name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


class Coco(Format):
    """COCO, https://cocodataset.org/#format-data: one category for each expression; masks are compressed run lengths.

    The files lie as CVAT exports and imports them (https://docs.cvat.ai/docs/dataset_management/formats/format-coco/).
    `absent` of an image is this project's.
    """

    images = "images/train"

    def write(self, pictures: Iterable[Picture]) -> dict[str, int]:
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, picture in enumerate(pictures, 1):
            size = {"height": picture.height, "width": picture.width}
            named = {"id": number, "file_name": picture.name, "image_id": picture.image_id}
            entries.append({**named, **size, **({"absent": picture.absent} if picture.absent else {})})
            for answer in picture.answers:
                score = {} if answer.probability is None else {"score": answer.probability}
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": self.numbers[answer.text] + 1,  # tools take 0 for the background
                        "segmentation": answer.mask,
                        "area": mask_area(answer.mask),
                        "bbox": coco_mask.toBbox(answer.mask).tolist(),
                        "iscrowd": 0,
                        **score,
                    }
                )
        categories = [{"id": number + 1, "name": text} for text, number in self.numbers.items()]
        content = {"images": entries, "annotations": annotations, "categories": categories}
        self.dump("annotations/instances_train.json", content)
        return {}


class Labelme(Format):
    """labelme, https://github.com/wkentaro/labelme (labelme/_label_file.py): shapes of type "mask", a PNG of the box each.

    `absent` is this project's; labelme keeps fields that it does not know.
    """

    images = "."

    def write(self, pictures: Iterable[Picture]) -> dict[str, int]:
        for picture in pictures:
            content: dict[str, Any] = {
                "version": "5.5.0",
                "flags": {},
                "shapes": [self.shape(answer) for answer in picture.answers],
                "imagePath": picture.name,
                "imageData": None,
                "imageHeight": picture.height,
                "imageWidth": picture.width,
                **({"absent": picture.absent} if picture.absent else {}),
            }
            self.dump(f"{Path(picture.name).stem}.json", content)
        return {}

    @staticmethod
    def shape(answer: Answer) -> dict[str, Any]:
        """Return a shape: the first and the last pixel of its box, and a picture of the pixels from one to the other."""
        left, top, width, height = (int(side) for side in coco_mask.toBbox(answer.mask))
        file = io.BytesIO()
        pixels = decode_mask(answer.mask)[top : top + height, left : left + width] > 0
        Image.fromarray(pixels).save(file, "PNG")
        return {
            "label": answer.text,
            "points": [[left, top], [left + width - 1, top + height - 1]],
            "group_id": None,
            "description": "",
            "shape_type": "mask",
            "flags": {},
            "mask": base64.b64encode(file.getvalue()).decode(),
        }


class Yolo(Format):
    """YOLO segmentation, https://docs.ultralytics.com/datasets/segment/: a line `CLASS x y x y ...` for each connected part.

    `absent` in data.yaml is this project's. Training wants a `val`; here it is the same images, so take others for it.
    """

    images = "images/train"

    def write(self, pictures: Iterable[Picture]) -> dict[str, int]:
        for picture in pictures:
            lines = []
            for answer in picture.answers:
                for outline in mask_outlines(decode_mask(answer.mask)):
                    parts = (outline / (picture.width, picture.height)).ravel().tolist()
                    lines.append(" ".join([str(self.numbers[answer.text]), *(f"{part:.9g}" for part in parts)]))
            path = self.file(f"labels/train/{Path(picture.name).stem}.txt")
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        content: dict[str, Any] = {"train": self.images, "val": self.images, "names": dict(enumerate(self.texts))}
        if self.absent:
            content["absent"] = self.absent
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        self.file("data.yaml").write_text(text, encoding="utf-8")
        return {}


class IndexPng(Format):
    """Label maps as PASCAL VOC's SegmentationClass, http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html

    A pixel holds one class; where masks overlap, it is that of the smallest. Up to 254 classes have VOC's colours, more are
    grey values of 16 bits.
    """

    images = "images"

    def write(self, pictures: Iterable[Picture]) -> dict[str, int]:
        if len(self.texts) > MOST_CLASSES:
            raise ValueError(
                f"{len(self.texts)} expressions are more than the {MOST_CLASSES} classes of a label map; write coco instead."
            )
        values = [value for value in range(1, len(self.texts) + 2) if value != VOID]
        numbers = dict(zip(self.texts, values))
        dtype = np.uint8 if len(self.texts) < VOID else np.uint16
        lost = 0
        for picture in pictures:
            labels = np.zeros((picture.height, picture.width), dtype)
            for answer in sorted(picture.answers, key=lambda answer: -mask_area(answer.mask)):
                mask = decode_mask(answer.mask) > 0
                lost += int(np.count_nonzero(labels[mask]))
                labels[mask] = numbers[answer.text]
            drawn = Image.fromarray(labels)
            if dtype == np.uint8:
                drawn.putpalette(_voc_colours())
            drawn.save(self.file(f"masks/{Path(picture.name).stem}.png"), "PNG")
        self.dump("classes.json", {"classes": {str(n): text for text, n in numbers.items()}, "absent": self.absent})
        return {"pixels of masks under a smaller one": lost} if lost else {}


def _voc_colours() -> list[int]:
    """Return VOC's palette: bit 7 - n of red, green and blue is bit 3 n, 3 n + 1 and 3 n + 2 of the class number."""
    return [
        sum((number >> 3 * n + channel & 1) << 7 - n for n in range(8))
        for number in range(256)
        for channel in range(3)
    ]


class LabelStudio(Format):
    """Label Studio's tasks with predictions, https://labelstud.io/guide/predictions, and the labelling interface for them.

    Images are named for local storage whose LOCAL_FILES_DOCUMENT_ROOT is the folder above
    (https://labelstud.io/guide/storage#Local-storage). `absent` of a task's data is this project's.
    """

    images = "images"

    def write(self, pictures: Iterable[Picture]) -> dict[str, int]:
        tasks = []
        for picture in pictures:
            absent = {"absent": picture.absent} if picture.absent else {}
            url = f"/data/local-files/?d={quote(f'{self.name}/{self.images}/{picture.name}')}"
            results = [
                brush_result(n, answer, picture.height, picture.width) for n, answer in enumerate(picture.answers)
            ]
            prediction: dict[str, Any] = {"model_version": picture.model or "gsva", "result": results}
            if scores := [answer.probability for answer in picture.answers if answer.probability is not None]:
                prediction["score"] = sum(scores) / len(scores)
            data = {"image": url, "image_id": picture.image_id, **absent}
            tasks.append({"data": data, "predictions": [prediction]})
        self.dump("train.json", tasks)
        labels = "".join(f"    <Label value={quoteattr(text)}/>\n" for text in self.texts)
        self.file("interface.xml").write_text(
            '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
            f'  <BrushLabels name="mask" toName="image">\n{labels}  </BrushLabels>\n</View>\n',
            encoding="utf-8",
        )
        return {}


def brush_result(number: int, answer: Answer, height: int, width: int) -> dict[str, Any]:
    """Return a result of Label Studio: a mask that the tag "mask" labels on the tag "image"."""
    return {
        "id": f"mask{number}",
        "type": "brushlabels",
        "from_name": "mask",
        "to_name": "image",
        "original_height": height,
        "original_width": width,
        "image_rotation": 0,
        "value": {"format": "rle", "rle": encode_brush(decode_mask(answer.mask)), "brushlabels": [answer.text]},
        **({} if answer.probability is None else {"score": answer.probability}),
    }


FORMATS: dict[str, type[Format]] = {
    "coco": Coco,
    "labelme": Labelme,
    "yolo": Yolo,
    "index_png": IndexPng,
    "label_studio": LabelStudio,
}
