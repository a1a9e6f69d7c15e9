"""Images of any data set as a stream of rows: a folder of images, parquet, arrow or webdataset files, or a Hub id.

Nothing is copied or decoded: `datasets` streams the rows, and an image stays the bytes or the path that it is.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Audio, Image, IterableDataset, Video, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import HfApi

# The kinds of local files, in the order in which a folder is searched for them, and the builders that read them.
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
# Rows that are read from a parquet file at a time. By itself `datasets` takes as many as a file's first group of rows has, and fails
# where that has none, as in the empty parts that Spark writes.
PARQUET_ROWS = 64
SPLIT = "all"  # local files have one
IDS = ("image_id", "id", "__key__")  # columns that name the images, the first that is there


@dataclass(frozen=True)
class Columns:
    """The columns of a data set that matter. One that lies in another is named with a dot, `json.queries`.

    Args:
        image: Holds the images.
        image_id: Names the images; by default the first of `IDS` that is there, else the file's path or the row's number.
        expressions: Holds a list of expressions for each image, or one.
        question: Holds a free question for each image.
    """

    image: str = "image"
    image_id: str | None = None
    expressions: str | None = None
    question: str | None = None


@dataclass(frozen=True)
class ImageStream:
    """A data set of images, see `open_stream`.

    Args:
        rows: The rows, whose images are not decoded.
        columns: The columns to read.
        identity: A digest of the files' names and sizes, or the commit of a Hub data set.
        total: The number of rows, where it can be known without reading them.
        folder: The folder that paths of images are told from, for their ids.
        is_from_hub: Whether somebody else wrote the rows: their images may not be files of this machine.
    """

    rows: IterableDataset
    columns: Columns
    identity: str
    total: int | None = None
    folder: str | None = field(default=None, compare=False)
    is_from_hub: bool = False

    @property
    def num_sources(self) -> int:
        """Return the number of parts that can be read apart, such as files."""
        return max(int(self.rows.num_shards), 1)

    def source(self, number: int, skipped: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the rows of a part as `Predictor.prepare` takes them, without the first `skipped` ones.

        Raises:
            ValueError: The files are damaged.
        """
        rows = self.rows if self.num_sources == 1 else self.rows.shard(self.num_sources, number)
        try:
            for index, row in enumerate(rows.skip(skipped) if skipped else rows, skipped):
                yield self._row(row, number, index)
        except (ValueError, OSError):
            raise
        except Exception as error:  # each format has its own
            raise ValueError(
                f"The data set cannot be read ({type(error).__name__}: {error}); repair its files."
            ) from error

    def _row(self, row: Mapping[str, Any], source: int, index: int) -> dict[str, Any]:
        columns = self.columns
        image = _value(row, columns.image)
        path = image.get("path") if isinstance(image, Mapping) else None
        if self.is_from_hub and _names_local_file(image):
            raise ValueError(
                f"The data set names an image by the path {path or image} instead of holding it. A file of this machine is not "
                "opened because a data set of the Hub says so: download the data set, and give its folder."
            )
        if columns.image_id is not None:
            image_id = _value(row, columns.image_id)
        elif path and self.folder is not None:
            image_id = os.path.relpath(path, self.folder)
        else:
            image_id = f"{source}-{index}" if self.num_sources > 1 else index
        found = {"image": image, "image_id": image_id}
        if columns.question is not None:
            found["question"] = _value(row, columns.question)
        if columns.expressions is not None:
            found["expressions"] = _value(row, columns.expressions)
        return found

    def blocks(
        self, source: int, size: int, is_wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Iterator[dict[str, Any]], Callable[[], bool]]]:
        """Yield the wanted blocks of `size` rows of a part: the block's number, its rows, and what tells if it is the last.

        Read the rows of a block before asking whether it is the last, and before the next one.

        Args:
            is_wanted: Of the number of a block.
        """
        first = next(number for number in itertools.count() if is_wanted(number))
        rows = _Peekable(self.source(source, first * size))
        for number in itertools.count(first):
            if rows.is_at_end():
                return
            block = itertools.islice(rows, size)
            if is_wanted(number):
                yield number, block, rows.is_at_end
            for _ in block:  # what nobody has read
                pass


class _Peekable:
    """An iterator that knows whether it is at its end."""

    def __init__(self, values: Iterator[Any]):
        self.values, self.next = values, []  # type: ignore[var-annotated]

    def is_at_end(self) -> bool:
        if not self.next:
            self.next = list(itertools.islice(self.values, 1))
        return not self.next

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.is_at_end():
            raise StopIteration
        return self.next.pop()


def open_stream(
    name: str, columns: Columns, split: str | None = None, options: dict[str, Any] | None = None
) -> ImageStream:
    """Return the images of a data set.

    Args:
        name: A folder of images, parquet, arrow or webdataset files (`save_to_disk` writes such a folder), one such file, or
            the id of a Hub data set.
        columns: The columns to read.
        split: Of a Hub data set with several.
        options: Further arguments of `load_dataset` for a Hub data set, such as `name` and `revision`.

    Raises:
        ValueError: There is no such data set, it holds no images, or it lacks a column. The message names those it has.
    """
    is_local = Path(name).exists()
    rows, identity, total, folder = _open_files(Path(name)) if is_local else _open_hub(name, split, options or {})
    features = rows.features or {}
    columns = _checked(name, columns, list(features) or list(next(iter(rows), {})))
    if any(isinstance(feature, (Image, Audio, Video)) for feature in features.values()):
        rows = rows.decode(False)
    return ImageStream(rows, columns, identity, total, folder, is_from_hub=not is_local)


def _names_local_file(image: Any) -> bool:
    """Return whether an image of a row is a path, and neither held by the row nor of the Hub or the web.

    >>> [_names_local_file(image) for image in ("a.jpg", "zip://a.jpg::/b.zip", "zip://a.jpg::hf://datasets/b.zip", b"...")]
    [True, True, False, False]
    """
    if isinstance(image, Mapping):
        image = None if image.get("bytes") is not None else image.get("path")
    return isinstance(image, str) and not image.rsplit("::", 1)[-1].startswith(("hf://", "http://", "https://"))


def _checked(name: str, columns: Columns, names: list[str]) -> Columns:
    """Return the columns with the one that names images; raise ValueError for one that is not there."""
    for argument, column in vars(columns).items():
        argument = {"expressions": "expressions_column", "question": "question_column"}.get(
            argument, f"{argument}_column"
        )
        argument = {"image_id_column": "id_column"}.get(argument, argument)
        if column is not None and column not in names and column.partition(".")[0] not in names:
            raise ValueError(f"{name} has no column {column!r}, but {', '.join(names)}; choose with --{argument}.")
    image_id = columns.image_id or next((column for column in IDS if column in names), None)
    return Columns(columns.image, image_id, columns.expressions, columns.question)


def _value(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, or of the field of one that is named with a dot.

    >>> _value({"json": {"queries": ["a"]}}, "json.queries")
    ['a']
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _open_files(path: Path) -> tuple[IterableDataset, str, int | None, str | None]:
    """Return the rows of local files, their digest, their number, and the folder of images."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    for suffix, builder in BUILDERS.items():
        if found := [file for file in files if file.suffix.lower() == suffix]:
            names = [glob.escape(str(file)) for file in found]
            options = {"batch_size": PARQUET_ROWS} if builder == "parquet" else {}
            rows = _load(str(path), builder, data_files={SPLIT: names}, split=SPLIT, **options)
            return rows, _digest(path, found), sum(_count(path, file) for file in found), None
    found = [file for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS]
    if not found:
        raise ValueError(
            f"{path} holds no images, and no files of the kinds {', '.join(BUILDERS)}: give a folder of images, such files, or a "
            "Hub id."
        )
    pattern = glob.escape(str(path)) + ("/**" if path.is_dir() else "")
    rows = _load(str(path), "imagefolder", data_files={SPLIT: pattern}, split=SPLIT, drop_labels=True)
    return rows, _digest(path, files), len(found), str(path if path.is_dir() else path.parent)


def _load(name: str, builder: str, **options: Any) -> Any:
    """Return what `load_dataset` streams; raise ValueError with its reason if it cannot."""
    try:
        return load_dataset(builder, streaming=True, **options)
    except Exception as error:  # errors of datasets, pyarrow, tarfile, fsspec and the Hub
        raise ValueError(f"The data set {name} cannot be opened ({type(error).__name__}: {error}).") from error


def _digest(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _count(name: Path, file: Path) -> int:
    """Return the number of rows of a file, from its headers."""
    try:
        if file.suffix.lower() == ".parquet":
            return int(pq.read_metadata(file).num_rows)
        if file.suffix.lower() == ".arrow":
            with pa.memory_map(str(file)) as source:
                try:
                    batches: Any = pa.ipc.open_stream(source)
                except pa.ArrowInvalid:
                    reader = pa.ipc.open_file(source)
                    batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
                return sum(batch.num_rows for batch in batches)
        with tarfile.open(file) as archive:
            return len(
                {os.path.join(*os.path.split(member.name)).split(".")[0] for member in archive if member.isfile()}
            )
    except (pa.ArrowException, tarfile.TarError) as error:
        raise ValueError(f"{file} of {name} is damaged ({error}); replace it.") from error


def _open_hub(name: str, split: str | None, options: dict[str, Any]) -> tuple[IterableDataset, str, int | None, None]:
    """Return the rows of a Hub data set at one commit, the commit, the number of rows where its card says it, and no folder."""
    try:
        commit = HfApi().dataset_info(name, revision=options.get("revision")).sha
    except Exception as error:  # errors of the Hub, and of the HTTP library below it
        reason = " ".join(str(error).split())
        raise ValueError(
            f"dataset={name!r} is no file or folder on this machine, and the Hub does not give it ({reason[:300]})."
        ) from error
    splits = _load(name, name, **{**options, "revision": commit})
    if split not in splits and len(splits) > 1:
        raise ValueError(f"{name} has no split {split!r}, but {', '.join(splits)}; choose one with --eval_split.")
    chosen = split if split in splits else next(iter(splits))
    rows = splits[chosen]
    known = (rows.info.splits or {}).get(chosen)
    total = known.num_examples or None if known is not None else None
    return rows, f"{commit} {chosen}", total, None
