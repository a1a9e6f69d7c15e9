"""HalluSegBench: pairs of a factual image and a counterfactual one, in which the named thing was replaced by another.

    DATA_DIR/hallusegbench/{train,test}/SUBSET/
        data.json
        factual_images/*, factual_masks/*.png, counterfactual_images/*, counterfactual_masks/*.png

SUBSET is `refer_seg`, `reason_seg_v1`, `reason_seg_v2`, `reason_seg_val` or `reason_seg_test`. The layout and the fields of
data.json are those that the data set's card describes (huggingface.co/datasets/PLAN-Lab/HalluSegBench, after train.zip
and test.zip are extracted; Li et al., arXiv 2506.21546). The first release had other names in one folder (README.md and
glamm.json of github.com/PLAN-Lab/HalluSegBench at 2be8895): `DATA_DIR/hallusegbench/{filter_anno.json or data.json}`, read
as the split `test`.

Each image becomes a row. What it shows is asked for with its mask; what the other image of the pair shows instead is
asked for as absent. Labels are phrases; the questions of the reasoning subsets are sentences.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import mask_images
from .builder import RowBuilder
from .images import image_size
from .mask_images import read_mask
from .records import Kinds, at, expect, inside, read_json, require
from .schema import empty_mask, encode_mask, expression

FOLDER = "hallusegbench"
SUBSETS = ("refer_seg", "reason_seg_v1", "reason_seg_v2", "reason_seg_val", "reason_seg_test")
# field of today's data.json -> the same field of the first release
FIRST_RELEASE = {
    "factual_image_path": "image_file",
    "factual_mask_path": "mask_file",
    "counterfactual_image_path": "edited_image_path",
    "counterfactual_mask_path": "new_mask_path",
    "factual_label": "original_label",
    "counterfactual_label": "new_label",
}
PAIR: Kinds = dict.fromkeys(FIRST_RELEASE, str)


class HalluSegBuilder(RowBuilder):
    """One row per image. An image that stands in several pairs is one row with the expressions of all of them."""

    USES = (mask_images.__name__,)

    @property
    def folder(self) -> Path:
        return self.root / FOLDER

    @cached_property
    def annotations(self) -> dict[str, Path]:
        """Return {split: path of its pairs}, such as `test_refer_seg`."""
        found = {
            f"{part}_{subset}": path
            for part in ("train", "test")
            for subset in SUBSETS
            if (path := self.folder / part / subset / "data.json").exists()
        }
        for name in ("filter_anno.json", "data.json"):
            if (path := self.folder / name).exists():
                found.setdefault("test", path)
        if not found:
            purpose = f"the pairs of HalluSegBench; its subsets are {', '.join(SUBSETS)}"
            require(self.folder / "test" / SUBSETS[0] / "data.json", purpose)
        return found

    def files(self) -> list[Path]:
        # Masks are beside data.json; their folders' times of change stand for them.
        folders = (folder for path in self.annotations.values() for folder in sorted(path.parent.iterdir()))
        return [*self.annotations.values(), *(folder for folder in folders if folder.is_dir())]

    def split_names(self) -> list[str]:
        return list(self.annotations)

    def pairs(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (its place, pair) for every right pair of a file, with today's names of the fields."""
        content = read_json(path)
        if not isinstance(content, list):
            raise ValueError(f"{path} must hold a list of pairs, got {type(content).__name__}; download it again.")
        for number, record in enumerate(content):
            where = f"{path}: pair {number}"
            if isinstance(record, dict):
                old = {name: record[first] for name, first in FIRST_RELEASE.items() if first in record}
                record = {**old, **record}
            if self.attempt(expect, record, where, **PAIR) is not None:
                yield where, record

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        path = self.annotations[split]
        asked: dict[str, list[tuple[str, str, str, bool, str | None]]] = {}  # image -> text, other text, ..., its mask
        for where, pair in self.pairs(path):
            for kind, other in (("factual", "counterfactual"), ("counterfactual", "factual")):
                questions = [pair.get(name) for name in ("question", "counterfactual_question")]
                is_sentence = all(isinstance(question, str) and question for question in questions)
                texts = dict(zip(("factual", "counterfactual"), questions)) if is_sentence else {}
                text, absent = (texts.get(name) or pair[f"{name}_label"] for name in (kind, other))
                of_image = asked.setdefault(pair[f"{kind}_image_path"], [])
                of_image.append((where, text, pair[f"{kind}_mask_path"], is_sentence, absent))
        for image, of_image in asked.items():
            row = self.attempt(self.row, path.parent, image, of_image)
            if row is not None:
                yield row

    def row(self, folder: Path, image: str, questions: list[tuple[str, str, str, bool, str | None]]) -> dict[str, Any]:
        """Return the row of an image: for each pair what it shows, and what it does not show."""
        with at(questions[0][0]):
            path = inside(folder, image)
            size = image_size({"path": str(path), "bytes": None})
        expressions = []
        for where, text, mask, is_sentence, absent in questions:
            with self.collecting(), at(where):
                expressions.append(expression(text, mask_of(inside(folder, mask), size), is_sentence=is_sentence))
                expressions.append(expression(absent or "", empty_mask(*size), 0, is_sentence))
        return {
            "image": {"path": str(path), "bytes": None},
            "image_id": image,
            "height": size[0],
            "width": size[1],
            "expressions": expressions,
        }


def mask_of(path: Path, size: tuple[int, int]) -> dict:
    """Return the mask of a file, brought to its image's (height, width) by nearest neighbour, as the authors' evaluation does.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is no mask, or has no pixel of the target.
    """
    with at(str(require(path, "a mask"))):
        mask = read_mask(path)[0]
        if mask.shape != size:
            resized = Image.fromarray(mask.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.NEAREST)
            mask = np.asarray(resized) > 0
        if not mask.any():
            raise ValueError("the mask has no pixel, but the image shows what it stands for; download it again.")
        return encode_mask(mask)
