"""Write predictions in the format of an annotation tool, which `data_scripts.load("own", DIR)` reads again.

python -m data_scripts.export OUT --format coco|labelme|yolo|index_png|label_studio [--images DIR] [--output DIR]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from .export_formats import FORMATS, Answer, Picture
from .files import new_folder, refuse_existing
from .images import IMAGE_SUFFIXES, image_size
from .mask_images import read_mask
from .masks import check_mask_size, check_rle, encode_mask, mask_area
from .records import at, inside, missing_file

# the columns of predictions that are read; the first ones must be there
NEEDED = ("image_id", "height", "width", "expression", "is_rejected")
COLUMNS = (*NEEDED, "probability", "area", "mask", "mask_png", "model", "error")
BATCH = 1000  # rows decoded at a time
NAME_BYTES = 150  # of an image's name; most file systems allow 255 with what is added to it


def read_predictions(out: str | os.PathLike) -> pyarrow.Table:
    """Return the predictions of a run: a folder of parquet files, or one of them.

    Raises:
        FileNotFoundError: There are none.
        ValueError: A file is damaged or holds something else.
    """
    out = Path(out)
    paths = [out] if out.is_file() else sorted(path for path in out.glob("*.parquet") if path.name[0] != ".")
    if not paths:
        raise FileNotFoundError(
            f"{out} holds no predictions (*.parquet); give the --output_dir of run_gres.py --do_predict --dataset."
        )
    tables = []
    for path in paths:
        try:
            names = pyarrow.parquet.read_schema(path).names
            if missing := [name for name in NEEDED if name not in names]:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)} (it has {', '.join(names)}); these are no predictions."
                )
            tables.append(pyarrow.parquet.read_table(path, columns=[name for name in COLUMNS if name in names]))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a parquet file, or damaged ({error}).") from None
    return pyarrow.concat_tables(tables, promote_options="default")


class Predictions:
    """The predictions of a table, image by image.

    Args:
        table: Of `read_predictions`.
        images: The folder that holds the images, to which the image ids are relative; None leaves them out.

    `left_out` counts what has no place in an annotation file, by reason.
    """

    def __init__(self, table: pyarrow.Table, images: str | os.PathLike | None = None):
        self.table, self.images = table, None if images is None else Path(images)
        self.left_out: Counter[str] = Counter()
        if self.images is not None and not self.images.is_dir():
            raise FileNotFoundError(f"--images {images} is not a folder; give the one that holds the images.")
        if table.column("image_id").null_count:
            row = table.column("image_id").is_null().index(True).as_py()
            raise ValueError(
                f"Row {row} of the predictions has no image_id, so its image is not known; predict again with one."
            )

    def texts(self) -> list[str]:
        """Return the expressions that have a mask in some image, in the order of their first one."""
        kept = self.table.filter(pyarrow.compute.equal(self.table.column("is_rejected"), False))
        if "area" in kept.column_names:
            kept = kept.filter(pyarrow.compute.not_equal(kept.column("area"), 0))
        return [text for text in pyarrow.compute.unique(kept.column("expression")).to_pylist() if _is_text(text)]

    def absent_everywhere(self) -> list[str]:
        """Return the expressions that are absent where they have no mask: those asked of all images."""
        known = self.table.filter(self.table.column("is_rejected").is_valid()).select(
            ["image_id", "expression", "is_rejected"]
        )
        pairs = known.group_by(["image_id", "expression"]).aggregate([("is_rejected", "min")])
        asked = pairs.group_by("expression").aggregate([("image_id", "count"), ("is_rejected_min", "max")]).to_pylist()
        images = len(pyarrow.compute.unique(known.column("image_id")))
        return [
            row["expression"]
            for row in asked
            if _is_text(row["expression"]) and row["image_id_count"] == images and row["is_rejected_min_max"]
        ]

    def __iter__(self) -> Iterator[Picture]:
        """Yield each image once, in the order of their first rows, wherever in the table the others are."""
        ids = self.table.column("image_id").combine_chunks().dictionary_encode()
        numbers = np.asarray((ids.combine_chunks() if isinstance(ids, pyarrow.ChunkedArray) else ids).indices)
        order = np.argsort(numbers, kind="stable")
        names = _Names()
        rows: list[dict[str, Any]] = []
        for start in range(0, len(order), BATCH):
            for row in self.table.take(order[start : start + BATCH]).to_pylist():
                if rows and rows[0]["image_id"] != row["image_id"]:
                    yield from self._picture(rows, names)
                    rows = []
                rows.append(row)
        if rows:
            yield from self._picture(rows, names)

    def _picture(self, rows: list[dict[str, Any]], names: _Names) -> Iterator[Picture]:
        """Yield the image of these rows, unless it could not be read."""
        sizes = {(row["height"], row["width"]) for row in rows if row["height"] is not None}
        image_id = rows[0]["image_id"]
        if not sizes:
            self.left_out["images that could not be read"] += 1
            return
        if len(sizes) > 1:
            raise ValueError(
                f"The image {image_id!r} has several sizes, {sorted(sizes)}: its rows are of several images."
            )
        ((height, width),) = sizes
        source = self._source(image_id, (height, width))
        answers, absent = [], []
        for row in rows:
            text = row["expression"]
            if row.get("error") is not None:
                self.left_out["expressions that have an error"] += 1
            elif not _is_text(text) or row["is_rejected"] is None:
                self.left_out["answers without an expression"] += 1
            elif row["is_rejected"]:
                absent.append(text)
            else:
                with at(f"image {image_id!r}, expression {text!r}"):
                    mask = _mask(row, height, width)
                if mask_area(mask):
                    answers.append(Answer(text, mask, row.get("probability")))
                else:
                    self.left_out["expressions whose mask has no pixel"] += 1
        present = {answer.text.strip().lower() for answer in answers}
        absent = [text for text in dict.fromkeys(absent) if text.strip().lower() not in present]
        model = rows[0].get("model")
        yield Picture(image_id, names.of(image_id, source), height, width, answers, absent, source, model)

    def _source(self, image_id: str, size: tuple[int, int]) -> Path | None:
        """Return the file of an image, after a look at its size; None where images are left out."""
        if self.images is None:
            return None
        name = os.path.relpath(image_id, self.images) if os.path.isabs(image_id) else image_id
        path = inside(self.images, name)
        if not path.is_file():
            raise FileNotFoundError(missing_file(f"The image {image_id!r} of the predictions, {path},", str(path)))
        image_size({"path": str(path), "bytes": None}, size)
        return path


def _is_text(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip(" ."))


def _mask(row: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Return the encoding of a row's mask. Raises ValueError if it holds none or one of another size."""
    if row.get("mask") is not None:
        mask = check_rle(row["mask"])
    elif row.get("mask_png") is not None:
        mask = encode_mask(read_mask(row["mask_png"])[0])
    else:
        raise ValueError("it has no mask; predict again with --masks rle")
    check_mask_size(mask, height, width)
    return mask


class _Names:
    """File names for images: one each, without folders, that differ also without their suffix and in case."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def of(self, image_id: str, source: Path | None) -> str:
        named = Path(re.sub(r"[^\w.-]", "_", image_id).lstrip("."))
        suffix = source.suffix if source else named.suffix if named.suffix.lower() in IMAGE_SUFFIXES else ".jpg"
        stem = named.stem if named.suffix.lower() in IMAGE_SUFFIXES else named.name
        stem = stem.encode()[-NAME_BYTES:].decode(errors="ignore") or "image"
        name, number = stem, 1
        while name.casefold() in self.taken:
            number += 1
            name = f"{stem}_{number}"
        self.taken.add(name.casefold())
        return name + suffix


def export(
    out: str | os.PathLike, kind: str, output: str | Path, images: str | os.PathLike | None = None
) -> dict[str, int]:
    """Write the predictions of `out` in a format as the folder `output`, whole or not at all.

    Args:
        out: A run's folder of predictions, or one of its parquet files.
        kind: One of `FORMATS`.
        output: The folder to write. It does not exist yet, or is empty.
        images: The folder of the images, to which image ids are relative. They are copied; None writes annotations alone.

    Returns:
        The numbers of `images`, `masks` and `absent` expressions, and what was left out, by reason.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: There are no predictions, or an image is missing.
        ValueError: A file or a mask is damaged, an image has another size, or the format does not hold as many classes.
    """
    refuse_existing(output)
    predictions = Predictions(read_predictions(out), images)
    counts: Counter[str] = Counter(images=0, masks=0, absent=0)
    writer = FORMATS[kind]

    with new_folder(output) as folder:

        def pictures() -> Iterator[Picture]:
            for picture in predictions:
                if picture.source is not None:
                    copy = folder / writer.images / picture.name
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(picture.source, copy)
                counts.update(images=1, masks=len(picture.answers), absent=len(picture.absent))
                yield picture

        lost = writer(folder, Path(output).name, predictions.texts(), predictions.absent_everywhere()).write(
            pictures()
        )
    return {**counts, **predictions.left_out, **lost}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` defaults to `sys.argv[1:]`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_scripts.export", description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", help="the folder of predictions that run_gres.py --do_predict wrote")
    parser.add_argument("--format", required=True, choices=FORMATS, help="the format to write")
    parser.add_argument(
        "--images", metavar="DIR", help="the folder of the images, which are copied; by default none are"
    )
    parser.add_argument("--output", metavar="DIR", help="the folder to write (default: OUT_FORMAT, beside OUT)")
    arguments = parser.parse_args(argv)
    output = arguments.output or f"{os.path.abspath(arguments.out)}_{arguments.format}"
    try:
        counts = export(arguments.out, arguments.format, output, arguments.images)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    shown = [f"{counts.pop(name)} {name}" for name in ("images", "masks", "absent")]
    print(f"Wrote {output}: {', '.join(shown)}" + "".join(f"; left out: {n} {what}" for what, n in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
