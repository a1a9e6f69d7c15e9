"""The referring sets in their published layout: refclef, refcoco, refcoco+, refcocog, grefcoco, refzom.

Each is a file of *refs* (sentences and the annotations that they name) beside COCO's `instances.json`:

    DATA_DIR/refer_seg/NAME/{refs(unc).p, instances.json}
    DATA_DIR/refer_seg/images/{mscoco/images/train2014, saiapr_tc-12}/*.jpg
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .builder import RowBuilder
from .masks import empty_mask, merge_masks, segmentation_to_rle
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
}


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


class ReferringBuilder(RowBuilder):
    """One row per image of a split, with the sentences of all its refs in the order of the file."""

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.title]

    @property
    def folder(self) -> Path:
        return self.root / "refer_seg" / self.title

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
        """{split: {image id: refs in the order of the file}}."""
        path = self.refs_path
        records = read_json(path) if path.suffix == ".json" else read_plain_pickle(path)
        if not isinstance(records, list):
            raise ValueError(f"{path} must hold a list of refs, got {type(records).__name__}; download it again.")
        refs: dict[str, dict[Any, list[dict]]] = {}
        for number, record in enumerate(records):
            where = f"{path}: record {number}"
            expect(record, where, **REF)
            for _ in entries(record, "sentences", where, sent=str):
                pass
            if not re.fullmatch(r"\w{1,64}", record["split"]) or record["split"] == "all":  # what `datasets` accepts
                raise ValueError(
                    f"{where}: split is {short_repr(record['split'])}; it must be a word of letters and digits."
                )
            for split in splits_of(record["split"], self.layout.letters):
                refs.setdefault(split, {}).setdefault(record["image_id"], []).append(record)
        return refs

    @cached_property
    def instances(self) -> tuple[dict[Any, dict], dict[Any, dict]]:
        """{image id: image record} and {annotation id: annotation record} of instances.json."""
        path = self.folder / "instances.json"
        content = read_json(path)
        images = {record["id"]: record for _, record in entries(content, "images", str(path), **IMAGE)}
        kinds: Kinds = {"id": (int, str), "segmentation": object}
        return images, {record["id"]: record for _, record in entries(content, "annotations", str(path), **kinds)}

    @cached_property
    def image_folders(self) -> dict[str, Path]:
        """{file name: folder}, for a set whose images may lie in several folders."""
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
                f"{self.refs_path}: ref {short_repr(ref['ref_id'])} names annotation {short_repr(wrong[0])}, which is "
                f"not an id."
            )
        ids = [number for number in ids if number != -1]  # gRefCOCO writes "no target" as [-1], Ref-ZOM as []
        for number in ids:
            if number in cache:
                continue
            if number not in self.instances[1]:
                raise ValueError(
                    f"{self.refs_path}: ref {ref['ref_id']} names annotation {number!r}, which "
                    f"{self.folder / 'instances.json'} does not have; take both files from one release."
                )
            with at(f"{self.folder / 'instances.json'}: annotation {number!r}"):
                segmentation = self.instances[1][number]["segmentation"]
                cache[number] = segmentation_to_rle(segmentation, image["height"], image["width"])
        if not ids:
            return empty_mask(image["height"], image["width"]), 0
        try:
            return merge_masks([cache[number] for number in ids]), len(ids)
        except ValueError as error:
            raise ValueError(f"{self.refs_path}: ref {ref['ref_id']} names annotations {ids}: {error}") from None

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        images = self.instances[0]
        for image_id, refs in sorted(self.refs[split].items(), key=lambda item: (isinstance(item[0], str), item[0])):
            image = images.get(image_id)
            if image is None:
                raise ValueError(
                    f"{self.refs_path}: ref {refs[0]['ref_id']} names image {image_id!r}, which "
                    f"{self.folder / 'instances.json'} does not have; take both files from one release."
                )
            path = self.find_image(image)
            cache: dict[Any, dict] = {}
            expressions = []
            for ref in refs:
                mask, num_targets = self.mask_of(ref, image, cache)
                expressions += [expression(sentence["sent"], mask, num_targets) for sentence in ref["sentences"]]
            yield {
                "image": {"path": path, "bytes": None},
                "image_id": str(image_id),
                "height": image["height"],
                "width": image["width"],
                "expressions": expressions,
            }
