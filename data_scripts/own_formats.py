"""The formats of own data: this project's JSON lines and parquet, and what annotation tools write.

    train.jsonl, train.parquet          this project's records, one per image
    train.json                          COCO, with captions or category names as expressions
    train/_annotations.coco.json        COCO as Roboflow exports it, images beside it
    annotations/instances_train.json    COCO as CVAT exports it, images in images/ or images/train/
    train.json                          Label Studio: a list of tasks, images in images/ or where their URLs end
    a.jpg and a.json beside it          labelme, in DATA_DIR (split "train") or in a folder per split
    data.yaml                           YOLO segmentation: images/train and labels/train, or train/images and train/labels
    classes.txt or classes.json         label maps (PNG): images/train and masks/train, or train/images and train/masks

A reader yields a record per image: `{"image", "expressions"}` and optionally `image_id`, `height`, `width` and `absent`,
where the expressions of some formats are a function of the image's (height, width).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from .images import IMAGE_SUFFIXES
from .label_studio import is_tasks, task_record
from .labelme import draw_shape, fill_like_coco
from .mask_images import read_labels
from .masks import encode_labels, encode_mask, mask_area, merge_masks, segmentation_to_rle
from .records import at, decode_text, expect, inside, listing, parse_json, read_json, require, short_repr, visible

if TYPE_CHECKING:
    from .own import OwnBuilder

ADVICE = "save it again, as UTF-8."
EXAMPLE = '{"image": "a.jpg", "expressions": [{"text": "the left cat", "mask": [10, 10, 90, 10, 90, 80]}]}'
BACKGROUND = ("background", "__background__", "_background_", "__ignore__", "_ignore_", "unlabeled", "void")
CLASS_LISTS = ("classes.txt", "class_names.txt", "classes.json")
IMAGE_FOLDERS, MASK_FOLDERS = (
    ("images", "JPEGImages"),
    ("masks", "labels", "SegmentationClass", "SegmentationClassPNG"),
)
_LABELME_FIELD = re.compile(rb'"(shapes|imagePath|imageData|lineColor|fillColor)"\s*:')
_IMAGE_NAME = re.compile(
    rb'"((?:[^"\\]|\\.)*\.(?:%s))"' % b"|".join(suffix[1:].encode() for suffix in IMAGE_SUFFIXES), re.IGNORECASE
)

# the place of a record in its file, and the record or a function that reads it
Record = tuple[str, Any]


@dataclass(frozen=True)
class Source:
    """The annotations of one split."""

    split: str
    path: Path  # for messages
    records: Callable[[OwnBuilder], Iterator[Record]]
    files: Callable[[], list[Path]]  # all files that the rows depend on


def find_sources(root: Path) -> list[Source]:
    """Return the annotations of the first format that `root` holds, one per split; nothing if it holds none."""
    return next((sources for finder in _finders() if (sources := finder(root))), [])


def other_sources(root: Path) -> list[str]:
    """Return the annotations in `root` that are not read, each with the reason."""
    read, left_out = find_sources(root), []
    for finder in _finders():
        try:
            sources = finder(root)
        except (ValueError, OSError):
            continue
        left_out += [
            f"{source.path} (not read, because {read[0].path.name} is there)"
            for source in sources
            if source.path not in {other.path for other in read}
        ]
    return list(dict.fromkeys(left_out))


def _finders() -> tuple[Callable[[Path], list[Source]], ...]:
    return _tables, _yolo, _index_maps, _roboflow, _cvat, _labelme


# ---- JSON lines, parquet, COCO -----------------------------------------------------------------------------------------
def _tables(root: Path) -> list[Source]:
    sources = []
    for path in sorted(visible(root)):
        suffix = path.suffix.lower()
        if suffix == ".jsonl":
            records: Callable = partial(_read_lines, path)
        elif suffix == ".parquet":
            records = partial(_read_parquet, path)
        elif suffix == ".json" and path.name not in CLASS_LISTS and not _is_labelme(path):
            records = partial(_read_tasks if is_tasks(path) else _read_coco, path)
        else:
            continue
        files = partial(_named_files, root, path, _split_of(path))
        sources.append(Source(_split_of(path), path, records, files))
    return sources


def _split_of(path: Path) -> str:
    return re.sub(r"\W", "_", path.stem)  # `datasets` accepts no other characters


def _read_lines(path: Path, builder: OwnBuilder) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                decode_text(line, str(path), ADVICE)
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                where = f"{path}, line {number}"
                yield where, partial(parse_json, line, where, f"a line is {EXAMPLE}, in UTF-8")


def _read_parquet(path: Path, builder: OwnBuilder) -> Iterator[Record]:
    import pyarrow.parquet

    number = 0
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(256)
        while batch := next(batches, None):
            for record in batch.to_pylist():
                number += 1
                if record.get("image_id") is None and isinstance(record.get("image"), dict):
                    name = record["image"].get("path")
                    record["image_id"] = name if isinstance(name, str) and name else f"{path.stem}-{number}"
                yield f"{path}, row {number}", record
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise ValueError(f"{path} is not a parquet file, or damaged after row {number} ({error}).") from None


def _read_coco(path: Path, builder: OwnBuilder) -> Iterator[Record]:
    """Yield the images of a COCO file. Annotations that share a caption, or a category, are one expression."""
    content = read_json(path, ADVICE)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(
            f"{path} lacks images or annotations: a .json file must be COCO's; else use .jsonl, {EXAMPLE}"
        )
    images = builder.by_id(builder.entries(content, "images", str(path), id=(int, str), file_name=str), "file_name")
    kinds: dict[str, Any] = {"id": (int, str), "name": str}
    named = builder.entries(content, "categories", str(path), **kinds) if content.get("categories") else iter(())
    categories = builder.by_id(named, "name")
    texts: dict[Any, dict[str, list[dict]]] = {number: {} for number in images}
    numbered: list[tuple[str, dict]] = []
    for place, annotation in builder.entries(content, "annotations", str(path), image_id=(int, str)):
        with builder.collecting(), at(f"{path}, annotation {short_repr(annotation.get('id'))}"):
            if annotation["image_id"] not in texts:
                raise ValueError(f"there is no image with id {annotation['image_id']!r}; add it to images.")
            if isinstance(annotation.get("id"), (int, str)):
                numbered.append((place, annotation))
            for text in _texts_of(annotation, categories):
                texts[annotation["image_id"]].setdefault(text, []).append(annotation)
    distinct = builder.by_id(numbered, "image_id")
    names_of_categories = {number: category["name"] for number, category in categories.items()}
    for number, image in images.items():
        expressions = [
            {"text": text, "annotations": _once(annotations, distinct)} for text, annotations in texts[number].items()
        ]
        record = {
            **{name: image.get(name) for name in ("height", "width", "absent")},
            "image": _relative(builder.root, path, _split_of(path), image["file_name"]),
            "image_id": number,
            "expressions": expressions,
            "absent_everywhere": content.get("absent"),
            "category_names": names_of_categories,
        }
        yield f"{path}, image {number!r}", record


def _read_tasks(path: Path, builder: OwnBuilder) -> Iterator[Record]:
    for number, task in enumerate(read_json(path, ADVICE)):
        where = f"{path}, task {number}"
        yield where, partial(task_record, builder.root, where, task)


def _once(annotations: list[dict], distinct: dict[Any, dict]) -> tuple[dict, ...]:
    """Return annotations without those that occur twice in the file, word for word. The result is a tuple, which no file holds."""
    return tuple(
        {id(distinct.get(one.get("id"), one) if _is_id(one.get("id")) else one): one for one in annotations}.values()
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _texts_of(annotation: dict, categories: dict[Any, dict]) -> list[str]:
    """Return the expressions that name an annotation: its captions, else the name of its category."""
    texts = annotation.get("caption")
    if not texts and _is_id(annotation.get("category_id")):
        category = categories.get(annotation["category_id"])
        if category is None:
            raise ValueError(f"there is no category with id {annotation['category_id']!r}; add it to categories.")
        texts = category["name"]
    named = [texts] if isinstance(texts, str) else texts
    if not texts or not isinstance(named, list) or not all(isinstance(text, str) for text in named):
        raise ValueError("it lacks a caption (a text or a list of texts) and a category_id; add one or take it out.")
    return named


def _roboflow(root: Path) -> list[Source]:
    folders = [folder for folder in sorted(visible(root)) if folder.is_dir()]
    return [_coco_source(root, folder / "_annotations.coco.json", folder.name) for folder in folders
            if (folder / "_annotations.coco.json").is_file()]  # fmt: skip


def _cvat(root: Path) -> list[Source]:
    paths = listing(root / "annotations", (".json",)).values()
    return [_coco_source(root, path, path.stem.removeprefix("instances_")) for path in paths
            if path.stem.startswith("instances_")]  # fmt: skip


def _coco_source(root: Path, path: Path, split: str) -> Source:
    files = partial(_named_files, root, path, split)
    return Source(re.sub(r"\W", "_", split), path, partial(_read_coco, path), files)


def _relative(root: Path, path: Path, split: str, name: str) -> str:
    """Return the path of a COCO file's image below `root`: beside the file, or in one of the tools' folders of images."""
    subset = path.stem.removeprefix("instances_")
    here = path.parent.relative_to(root).as_posix()
    for folder in (here, ".", "images", f"images/{subset}", subset, split, f"images/{split}"):
        if os.path.exists(root / folder / name):
            return os.path.normpath(PurePosixPath(folder) / name)
    return os.path.normpath(PurePosixPath("." if here == "annotations" else here) / name) if name else name


def _named_files(root: Path, path: Path, split: str) -> list[Path]:
    """Return an annotation file and the images and masks that it names.

    Names are found by their suffix, without parsing: this runs at every start. A parquet file is not searched; all
    images in the folder count as named by it.
    """
    if path.suffix.lower() == ".parquet":
        return [path, *images_below(root)]
    names = set()
    for name in set(_IMAGE_NAME.findall(path.read_bytes())):
        try:
            names.add(json.loads(b'"%s"' % name))
        except ValueError:
            continue
    files = (
        root / _relative(root, path, split, name) for name in sorted(names) if ".." not in name and "\0" not in name
    )
    return [path, *(file for file in files if os.path.isfile(file))]


def images_below(root: Path) -> list[Path]:
    """Return all images below a folder, sorted; hidden files and folders are no data, and links are followed once."""
    images, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images += [
            Path(folder, name)
            for name in sorted(names)
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return images


# ---- labelme -----------------------------------------------------------------------------------------------------------
def _is_labelme(path: Path) -> bool:
    with open(path, "rb") as file:
        return bool(_LABELME_FIELD.search(file.read(4096)))


def _labelme(root: Path) -> list[Source]:
    sources = []
    for folder in [root, *(folder for folder in sorted(visible(root)) if folder.is_dir())]:
        paths = [path for path in listing(folder, (".json",)).values() if path.is_file() and _is_labelme(path)]
        if paths:
            split = "train" if folder == root else re.sub(r"\W", "_", folder.name)
            files = partial(_labelme_files, folder, paths)
            sources.append(Source(split, folder, partial(_read_labelme, paths), files))
    return sources


def _labelme_files(folder: Path, paths: list[Path]) -> list[Path]:
    return [*paths, *(path for path in visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES)]


def _read_labelme(paths: list[Path], builder: OwnBuilder) -> Iterator[Record]:
    for path in paths:
        yield str(path), partial(_labelme_record, builder.root, path)


def _labelme_record(root: Path, path: Path) -> dict[str, Any]:
    content = expect(read_json(path, ADVICE), str(path), shapes=list)
    for number, shape in enumerate(content["shapes"]):
        expect(shape, f"{path}: shape {number}", label=str, points=list)
    folder = path.parent.relative_to(root).as_posix()
    name = str(content.get("imagePath") or "").replace("\\", "/")  # labelme on Windows
    image: Any = os.path.normpath(PurePosixPath(folder) / name) if name else None
    if image is None or image.startswith("..") or not os.path.exists(root / image):
        beside = listing(path.parent, IMAGE_SUFFIXES).get(path.stem)
        image = beside.relative_to(root).as_posix() if beside else image or f"{folder}/{path.stem}.jpg"
    return {
        "image": image,
        "height": content.get("imageHeight"),
        "width": content.get("imageWidth"),
        "absent": content.get("absent"),
        "expressions": partial(_labelme_expressions, content["shapes"]),
    }


def _labelme_expressions(shapes: list[dict], height: int, width: int) -> list[dict]:
    """Return one expression per label; shapes of one label and group_id are one instance."""
    instances: dict[str, dict[Any, list[dict]]] = {}
    for number, shape in enumerate(shapes):
        with at(f"shape {number} ({short_repr(shape['label'])})"):
            try:
                mask = encode_mask(draw_shape(shape, height, width, fill_like_coco))
            except (TypeError, LookupError, ArithmeticError) as error:
                raise ValueError(f"its points must be [[x, y], ...] ({error})") from None
            if not np.count_nonzero(shape["points"]) and not shape["points"]:
                raise ValueError("it has no points; draw it or take it out")
        group = shape.get("group_id")
        instances.setdefault(shape["label"], {}).setdefault(
            f"group {group}" if group is not None else number, []
        ).append(mask)
    return [
        {"text": label, "masks": [merge_masks(masks) for masks in groups.values()]}
        for label, groups in instances.items()
    ]


# ---- YOLO segmentation -------------------------------------------------------------------------------------------------
def _yolo(root: Path) -> list[Source]:
    path = next((path for name in ("data.yaml", "data.yml", "dataset.yaml") if (path := root / name).is_file()), None)
    if path is None:
        return []
    import yaml

    try:
        content = yaml.safe_load(decode_text(path.read_bytes(), str(path), ADVICE))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML ({error}); correct it.") from None
    content = expect(content, str(path), names=(list, dict))
    names = dict(enumerate(content["names"])) if isinstance(content["names"], list) else content["names"]
    if wrong := [name for key, name in names.items() if not isinstance(key, int) or not isinstance(name, str)]:
        raise ValueError(f"{path}: names must be a list of texts, or numbers with texts; got {short_repr(wrong[0])}.")
    sources = []
    for split in ("train", "val", "valid", "test"):
        places = content.get(split)
        if places:
            images = _yolo_images(root, path, content.get("path"), places if isinstance(places, list) else [places])
            records = partial(_read_yolo, images, names, content.get("absent"))
            sources.append(Source(split, path, records, partial(_yolo_files, path, images)))
    return sources


def _yolo_images(root: Path, path: Path, base: Any, places: list) -> list[Path]:
    """Return the images of a split: in folders, or named one per line in text files."""
    images: list[Path] = []
    for place in places:
        if not isinstance(place, str):
            raise ValueError(f"{path}: a split is a folder or a list of folders, got {short_repr(place)}.")
        # Tools write "../train/images" or the folder of another machine in front: what is meant lies beside data.yaml.
        plain = re.sub(r"^(\.{1,2}/)+", "", place.replace("\\", "/"))
        candidates = [os.path.join(base, plain)] if isinstance(base, str) and not os.path.isabs(base) else []
        name = next((name for name in [*candidates, plain] if os.path.exists(root / os.path.normpath(name))), plain)
        with at(str(path)):
            folder = require(inside(root, os.path.normpath(name)), f"images of {path.name}")
        if folder.is_file():
            lines = decode_text(folder.read_bytes(), str(folder), ADVICE).splitlines()
            images += [inside(root, os.path.normpath(line.strip())) for line in lines if line.strip()]
        else:
            images += images_below(folder)
    return images


def _yolo_labels(image: Path) -> Path:
    """Return the label file of an image: in labels/ where the image is in images/, else beside it."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, 0, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _yolo_files(path: Path, images: list[Path]) -> list[Path]:
    return [path, *(file for image in images for file in (image, _yolo_labels(image)) if file.is_file())]


def _read_yolo(images: list[Path], names: dict, absent: Any, builder: OwnBuilder) -> Iterator[Record]:
    for image in images:
        labels = _yolo_labels(image)
        record = {
            "image": image.relative_to(builder.root).as_posix(),
            "expressions": partial(_yolo_expressions, labels, names),
            "absent_everywhere": absent,
        }
        yield str(labels if labels.is_file() else image), record


def _yolo_expressions(path: Path, names: dict, height: int, width: int) -> list[dict]:
    """Return one expression per class: `CLASS x y x y ...` a line, in parts of the image. No file: nothing is labelled."""
    instances: dict[str, list] = {}
    lines = decode_text(path.read_bytes(), str(path), ADVICE).splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with at(f"line {number}"):
            try:
                kind, *numbers = (float(word) for word in line.split())
            except ValueError:
                raise ValueError(f"it must be numbers, CLASS x y x y ..., got {short_repr(line)}") from None
            if kind not in names:
                raise ValueError(f"there is no class {line.split()[0]} in names")
            if len(numbers) == 4:
                raise ValueError("it has a box but no mask; export as segmentation, or take it out")
            if len(numbers) < 6 or len(numbers) % 2:
                raise ValueError(f"an outline has pairs x y of three points or more, got {len(numbers)} numbers")
            if not all(-0.01 <= value <= 1.01 for value in numbers):
                raise ValueError("YOLO's coordinates are parts of the image, between 0 and 1; divide them by its size")
            outline = [value * (height if place % 2 else width) for place, value in enumerate(numbers)]
            if not mask_area(mask := segmentation_to_rle([outline], height, width, in_pixels=True)):
                raise ValueError("its outline encloses no pixel; draw it again or take it out")
            instances.setdefault(names[int(kind)], []).append(mask)
    return [{"text": name, "masks": masks} for name, masks in instances.items()]


# ---- label maps with a class list --------------------------------------------------------------------------------------
def _index_maps(root: Path) -> list[Source]:
    path = next((path for name in CLASS_LISTS if (path := root / name).is_file()), None)
    if path is None:
        return []
    splits = {
        split: pairs for split, images, masks in _image_and_mask_folders(root) if (pairs := _pairs(images, masks))
    }
    return [
        Source(split, path, partial(_read_index_maps, path, pairs), partial(_pair_files, path, pairs))
        for split, pairs in splits.items()
    ]


def _image_and_mask_folders(root: Path) -> Iterator[tuple[str, Path, Path]]:
    for images in IMAGE_FOLDERS:
        for masks in MASK_FOLDERS:
            if (root / images).is_dir() and (root / masks).is_dir():
                yield "train", root / images, root / masks
                for folder in sorted(visible(root / images)):
                    if folder.is_dir():
                        yield re.sub(r"\W", "_", folder.name), folder, root / masks / folder.name
            for folder in sorted(visible(root)):
                if (folder / images).is_dir() and (folder / masks).is_dir():
                    yield re.sub(r"\W", "_", folder.name), folder / images, folder / masks


def _pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    maps = listing(masks, (".png",))
    return [(image, maps[stem]) for stem, image in listing(images, IMAGE_SUFFIXES).items() if stem in maps]


def _pair_files(path: Path, pairs: list[tuple[Path, Path]]) -> list[Path]:
    return [path, *(file for pair in pairs for file in pair)]


def _classes(path: Path) -> tuple[dict[int, str], Any]:
    """Return {value: name} of a class list, and its 'absent'."""
    if path.suffix == ".txt":
        lines = decode_text(path.read_bytes(), str(path), ADVICE).splitlines()
        return {value: line.strip() for value, line in enumerate(lines) if line.strip()}, None
    content = read_json(path, ADVICE)
    absent = content.get("absent") if isinstance(content, dict) else None
    content = content.get("classes", content) if isinstance(content, dict) else content
    items = content.items() if isinstance(content, dict) else enumerate(content if isinstance(content, list) else [])
    classes = {int(value): name for value, name in items if str(value).isdecimal() and isinstance(name, str)}
    if not classes:
        raise ValueError(f'{path} must be a list of names, or {{"1": "cat", ...}}; correct it.')
    return classes, absent


def _read_index_maps(path: Path, pairs: list[tuple[Path, Path]], builder: OwnBuilder) -> Iterator[Record]:
    classes, absent = _classes(path)
    for image, labels in pairs:
        record = {
            "image": image.relative_to(builder.root).as_posix(),
            "expressions": partial(_index_expressions, builder.root, labels, classes, path.name),
            "absent_everywhere": absent,
        }
        yield str(labels), record


def _index_expressions(
    root: Path, path: Path, classes: dict[int, str], listed_in: str, height: int, width: int
) -> list[dict]:
    """Return one expression per class in a label map; background and 255 (void) are not asked for."""
    expressions = []
    for value, mask in encode_labels(read_labels(inside(root, path.relative_to(root).as_posix()))).items():
        name = classes.get(value, "background" if value in (0, 255) else None)
        if name is None:
            raise ValueError(f"it holds the value {value}, which {listed_in} does not list; add its class")
        if name.lower() not in BACKGROUND:
            expressions.append({"text": name, "mask": mask})
    return expressions
