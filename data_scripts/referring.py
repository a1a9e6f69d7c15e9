"""The referring sets in their published layout: refclef, refcoco, refcoco+, refcocog, grefcoco, refzom, and two families
of absent expressions over RefCOCO: rrefcoco, rrefcoco+, rrefcocog, and fprefcoco, fprefcoco+, fprefcocog.

Each is a file of *refs* (sentences and the annotations that they name) beside COCO's `instances.json`:

    DATA_DIR/refer_seg/NAME/{refs(unc).p, instances.json}
    DATA_DIR/refer_seg/images/{mscoco/images/train2014, saiapr_tc-12}/*.jpg

In the two families a sentence says whether what it names is there; the annotation of its ref is that of the expression
from which it was made:

- R-RefCOCO (Wu et al., "Towards Robust Referring Image Segmentation", arXiv 2209.09554): `"exist": false`; folders
  `rrefcoco`, ... (README.md and dataset/ReferDataset.py of github.com/jianzongwu/robust-ref-seg at 97dd7f9), or
  `R-refcoco`, ... in SESAME's download, whose refs are `refs(unc_exclude_unified).p`.
- FP-RefCOCO (Wu et al., "See, Say, and Segment", CVPR 2024): `"is_false_premise": true`, with the corrected expression in
  `gt_sent`, which is not read; `refs(berkeley_exclude_unified).p` (dataset/README.md and dataloaders/refer_seg_dataset.py
  of github.com/see-say-segment/sesame at 91f1f2e).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .builder import RowBuilder
from .images import check_image_size
from .masks import check_annotation, empty_mask, merge_masks, segmentation_to_rle
from .nouns import Categories
from .records import (
    IMAGE,
    Kinds,
    at,
    entries,
    expect,
    image_path,
    read_json,
    read_plain_pickle,
    require,
    short_repr,
)
from .schema import expression
from .wordings import clean_expression

# the fields of a ref that this project reads
REF: Kinds = {
    "ref_id": (int, str),
    "ann_id": (int, str, list, tuple),
    "image_id": (int, str),
    "split": str,
    "sentences": list,
}
TRAIN2014 = "refer_seg/images/mscoco/images/train2014"


@dataclass(frozen=True)
class Layout:
    """The places of a referring set's files, relative to `data_dir`."""

    refs: tuple[str, ...]  # the first one that exists is read
    images: tuple[str, ...] = (TRAIN2014,)
    # refcoco's convention: "test" is every split with that word in its name, "testA" every split with that letter
    letters: bool = True
    folders: tuple[str, ...] = ()  # below refer_seg, the first one that exists; by default that of the set's name


def _robust(name: str, by: str) -> Layout:
    """Return the layout of an R-RefCOCO set. The authors' loader reads the split "unc" of all three by default."""
    splits = tuple(dict.fromkeys((by, f"{by}_exclude_unified", "unc")))
    return Layout(tuple(f"refs({split}).p" for split in splits), folders=(f"r{name}", f"R-{name}"))


_FALSE_PREMISE = Layout(("refs(berkeley_exclude_unified).p", "refs(berkeley).p"))

LAYOUTS = {
    "refclef": Layout(("refs(unc).p",), ("refer_seg/images/saiapr_tc-12",)),
    "refcoco": Layout(("refs(unc).p",)),
    "refcoco+": Layout(("refs(unc).p",)),
    "refcocog": Layout(("refs(umd).p",)),
    "grefcoco": Layout(("grefs(unc).p", "grefs(unc).json"), letters=False),
    # published as "Ref-ZOM(final).p", which the original expects as "Ref_ZOM.p"; its images are COCO's train and val 2014
    "refzom": Layout(
        ("Ref_ZOM.p", "Ref-ZOM(final).p"),
        (TRAIN2014, "refer_seg/images/mscoco/images/val2014", "coco/train2014", "coco/val2014"),
        letters=False,
    ),
    "rrefcoco": _robust("refcoco", "unc"),
    "rrefcoco+": _robust("refcoco+", "unc"),
    "rrefcocog": _robust("refcocog", "umd"),
    **dict.fromkeys(("fprefcoco", "fprefcoco+", "fprefcocog"), _FALSE_PREMISE),
}


def folders_of(name: str) -> list[str]:
    """Return the folders, relative to `data_dir`, in which a referring set may lie."""
    return [f"refer_seg/{folder}" for folder in LAYOUTS[name].folders or (name,)]


def splits_of(name: str, letters: bool) -> list[str]:
    """Return the splits to which a ref of split `name` belongs.

    >>> splits_of("testAB", letters=True)
    ['testAB', 'test', 'testA', 'testB']
    >>> splits_of("testA", letters=False)
    ['testA']
    """
    if not letters or not name.startswith("test"):
        return [name]
    return list(dict.fromkeys([name, "test", *(f"test{letter}" for letter in name[len("test") :])]))


def check_ref(ref: Any, where: str) -> dict[str, Any]:
    """Return a ref whose fields have the right types. Raises ValueError otherwise."""
    expect(ref, where, **REF)
    for place, sentence in entries(ref, "sentences", where, sent=str):
        for flag in ("exist", "is_false_premise"):
            if sentence.get(flag, True) not in (True, False):  # 0 and 1 are right, too
                raise ValueError(
                    f"{place}: {flag} must be true or false, got {short_repr(sentence[flag])}; correct it."
                )
    if not re.fullmatch(r"\w{1,64}", ref["split"]) or ref["split"] == "all":  # what `datasets` accepts
        raise ValueError(f"{where}: split is {short_repr(ref['split'])}; it must be a word of letters and digits.")
    return ref


def is_absent(sentence: dict[str, Any]) -> bool:
    """Return whether a sentence says of itself that what it names is not in the image."""
    return not sentence.get("exist", True) or bool(sentence.get("is_false_premise", False))


class ReferringBuilder(RowBuilder):
    """One row per image of a split, with the sentences of all its refs in the order of the file."""

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.title]

    @property
    def folder(self) -> Path:
        places = [self.root / folder for folder in folders_of(self.title)]
        return next((place for place in places if place.is_dir()), places[0])

    @property
    def refs_path(self) -> Path:
        paths = [self.folder / name for name in self.layout.refs]
        purpose = f"the refs of {self.title}: {' or '.join(self.layout.refs)}"
        return next((path for path in paths if path.exists()), None) or require(paths[0], purpose)

    def files(self) -> list[Path]:
        files = [self.refs_path, require(self.folder / "instances.json", f"the annotations of {self.title}")]
        if len(self.layout.images) > 1:  # the paths in the rows depend on the folder that holds an image
            files += [self.root / place for place in self.layout.images if (self.root / place).is_dir()]
        return files

    @cached_property
    def refs(self) -> dict[str, dict[Any, list[dict]]]:
        """Return {split: {image id: refs in the order of the file}}."""
        path = self.refs_path
        records = read_json(path) if path.suffix == ".json" else read_plain_pickle(path)
        if not isinstance(records, list):
            raise ValueError(f"{path} must hold a list of refs, got {type(records).__name__}; download it again.")
        refs: dict[str, dict[Any, list[dict]]] = {}
        for number, record in enumerate(records):
            if self.attempt(check_ref, record, f"{path}: record {number}") is not None:
                for split in splits_of(record["split"], self.layout.letters):
                    refs.setdefault(split, {}).setdefault(record["image_id"], []).append(record)
        if not records:
            raise ValueError(f"{path} has no refs, so {self.title} has no split; download it again.")
        return refs

    @cached_property
    def instances(self) -> tuple[dict[Any, dict], dict[Any, dict]]:
        """Return {image id: image record} and {annotation id: annotation record} of instances.json."""
        path = self.folder / "instances.json"
        content = read_json(path)
        images = self.by_id(self.entries(content, "images", str(path), **IMAGE), "file_name")
        kinds: Kinds = {"id": (int, str), "segmentation": object}
        return images, self.by_id(self.entries(content, "annotations", str(path), **kinds), "image_id")

    @cached_property
    def image_folders(self) -> dict[str, Path]:
        """Return {file name: folder}, for a set whose images may be in several folders."""
        folders: dict[str, Path] = {}
        for place in self.layout.images:
            if (self.root / place).is_dir():
                for path in (self.root / place).iterdir():
                    folders.setdefault(path.name, path.parent)
        return folders

    def find_image(self, image: dict[str, Any]) -> str:
        """Return the path of an image of instances.json."""
        folder = self.root / self.layout.images[0]
        if len(self.layout.images) > 1:
            folder = self.image_folders.get(image["file_name"], folder)
        return image_path(image, folder, str(self.folder / "instances.json"))

    def split_names(self) -> list[str]:
        return list(self.refs)

    def mask_of(self, ref: dict, image: dict, cache: dict) -> tuple[dict, int]:
        """Return the union of a ref's annotations, and their number. `cache` keeps the masks of one image."""
        ids = ref["ann_id"] if isinstance(ref["ann_id"], (list, tuple)) else [ref["ann_id"]]
        if wrong := [number for number in ids if not isinstance(number, (int, str))]:
            raise ValueError(
                f"{self.refs_path}: ref {short_repr(ref['ref_id'])} names annotation {short_repr(wrong[0])}, not an id."
            )
        present = [number for number in ids if number != -1]  # gRefCOCO writes "no target" as [-1], Ref-ZOM as []
        if present and len(present) < len(ids):
            raise ValueError(f"{self.refs_path}: ref {ref['ref_id']} names no target (-1) and annotations {present}.")
        for number in present:
            if number not in cache:
                cache[number] = self.annotation_mask(number, ref, image)
        if not present:
            return empty_mask(image["height"], image["width"]), 0
        return merge_masks([cache[number] for number in present]), len(present)

    def annotation_mask(self, number: int | str, ref: dict, image: dict) -> dict:
        """Return the mask of an annotation. Raises ValueError if it is not of this image, or has no mask."""
        path = self.folder / "instances.json"
        annotation = self.instances[1].get(number)
        if annotation is None:
            raise ValueError(
                f"{self.refs_path}: ref {ref['ref_id']} names annotation {number!r}, which {path} does not have; take both "
                f"files from one release."
            )
        with at(f"{path}: annotation {number!r}"):
            if annotation.get("image_id", image["id"]) != image["id"]:
                raise ValueError(
                    f"it is of image {annotation['image_id']!r}, but ref {ref['ref_id']} names it for image "
                    f"{image['id']!r}; take both files from one release."
                )
            check_annotation(annotation)
            return segmentation_to_rle(annotation["segmentation"], image["height"], image["width"])

    def categories(self) -> Categories:
        """Return the categories of all annotations of an image, also of those without a text, and of what texts name."""
        content = read_json(self.folder / "instances.json")
        names = {entry.get("id"): str(entry.get("name")) for entry in content.get("categories") or ()}
        of_annotation: dict[Any, str] = {}
        of_image: dict[str, set[str]] = {}
        for number, annotation in self.instances[1].items():
            if (name := names.get(annotation.get("category_id"))) is not None:
                of_annotation[number] = name
                of_image.setdefault(str(annotation.get("image_id")), set()).add(name)
        of_text: dict[str, set[str]] = {}
        for refs_of_image in self.refs.values():
            for ref in (ref for refs in refs_of_image.values() for ref in refs):
                ids = ref["ann_id"] if isinstance(ref["ann_id"], (list, tuple)) else [ref["ann_id"]]
                of_ref = {of_annotation[number] for number in ids if number in of_annotation}
                for sentence in ref["sentences"]:
                    of_text.setdefault(clean_expression(sentence["sent"]).lower(), set()).update(of_ref)
        return Categories.of(of_image, of_text)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        for image_id, refs in sorted(self.refs[split].items(), key=lambda item: (isinstance(item[0], str), item[0])):
            row = self.attempt(self.row, image_id, refs)
            if row is not None:
                yield row

    def row(self, image_id: int | str, refs: list[dict]) -> dict[str, Any]:
        """Return the row of an image with all its refs of one split."""
        image = self.instances[0].get(image_id)
        if image is None:
            raise ValueError(
                f"{self.refs_path}: ref {refs[0]['ref_id']} names image {image_id!r}, which "
                f"{self.folder / 'instances.json'} does not have; take both files from one release."
            )
        path = self.find_image(image)
        with at(f"{self.folder / 'instances.json'}: image {image_id!r}"):
            check_image_size(path, (image["height"], image["width"]))
        cache: dict[Any, dict] = {}
        expressions = []
        for ref in refs:
            with self.collecting():
                mask, num_targets = self.mask_of(ref, image, cache)
                absent = empty_mask(image["height"], image["width"])
                expressions += [
                    expression(sentence["sent"], *((absent, 0) if is_absent(sentence) else (mask, num_targets)))
                    for sentence in ref["sentences"]
                ]
        return {
            "image": {"path": path, "bytes": None},
            "image_id": str(image_id),
            "height": image["height"],
            "width": image["width"],
            "expressions": expressions,
        }
