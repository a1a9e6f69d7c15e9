"""The base class of all builders: it notices changed files and writes the rows to Arrow files once."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DatasetGenerationError

from . import images, mask_images, masks, records, schema
from .files import write_text
from .nouns import Categories
from .records import expect, inside, read_plain_pickle, require, same, short_repr  # noqa: F401  # some are importable from here, as before
from .schema import SEGMENTATION_FEATURES


def files_digest(paths: Iterable[Path], code: Iterable[str], *facts: Any) -> str:
    """Return a hash of files (names, sizes, times of change), of the source of modules `code`, and of `facts`."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in paths:
        stat = os.stat(path)
        digest.update(os.fsencode(path) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    for module in code:
        digest.update(Path(inspect.getfile(sys.modules[module])).read_bytes())
    return digest.hexdigest()[:32]


class RowBuilder(datasets.GeneratorBasedBuilder):
    """A data set in its published layout below `data_dir`, written to Arrow files in the cache of `datasets`.

    A subclass defines the files it reads (`files`), their splits (`split_names`) and the rows of a split (`rows`). The
    cache key contains the files' names, sizes and times, so a changed file is built again.
    """

    VERSION = datasets.Version("1.0.0")
    FEATURES = SEGMENTATION_FEATURES
    # modules whose code decides what the rows are: of all builders, and those that a subclass adds
    SHARED_CODE = (__name__, *(module.__name__ for module in (images, mask_images, masks, records, schema)))
    USES: tuple[str, ...] = ()
    ADVICE = "download its files again"  # what to do about files that cannot be read

    problems: list[str] | None = None  # `all_problems` collects errors of records here; otherwise they are raised

    def __init__(self, name: str, data_dir: str | os.PathLike, cache_dir: str | None = None):
        self.root = Path(os.path.abspath(data_dir))
        if not self.root.is_dir():
            raise FileNotFoundError(f"data_dir={str(data_dir)!r} is not a folder.")
        self.title = name
        for kind in type(self).__mro__:
            if kind.__module__.startswith(f"{__package__}."):
                # `datasets` would replace `open`, `Path` and more in these modules by ones for remote files, and import
                # scipy and pandas for that, which takes longer than a small build. These files are local.
                sys.modules[kind.__module__]._patched_for_streaming = True  # type: ignore[attr-defined]
        super().__init__(
            cache_dir=cache_dir,
            dataset_name=name,
            hash=files_digest(self.files(), (*self.SHARED_CODE, type(self).__module__, *self.USES), name),
        )

    def files(self) -> list[Path]:
        """Return the files whose change requires a new build. Raises FileNotFoundError if one is missing."""
        raise NotImplementedError

    def split_names(self) -> list[str]:
        """Return the splits that the files hold."""
        raise NotImplementedError

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of one split, in a fixed order."""
        raise NotImplementedError

    def annotations_digest(self) -> str:
        """Return a digest of the contents of the annotation files. It is kept beside the Arrow files, if they exist."""
        kept = Path(self.cache_dir) / "annotations.sha256"
        if kept.is_file() and re.fullmatch("[0-9a-f]{16}", text := kept.read_text(encoding="utf-8")):
            return text
        digest = hashlib.sha256()
        for path in self.files():
            if path.is_file():  # a folder of images is among them where the rows depend on its names
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        if kept.parent.is_dir():
            write_text(kept, digest.hexdigest()[:16])
        return digest.hexdigest()[:16]

    def categories(self) -> Categories:
        """Return the categories of the annotations beside the texts; none by default."""
        return Categories()

    def left_out(self) -> list[str]:
        """Return files among the data that `rows` does not read, each with the reason."""
        return []

    def empty_splits(self) -> list[str]:
        """Return a message for each split of the files that has no rows and is left out; call `build` first."""
        return []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Raise errors of the block, or collect them if `all_problems` asks for all of them."""
        try:
            yield
        except (ValueError, OSError) as error:
            if self.problems is None:
                raise
            self.problems.append(str(error))

    def attempt(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        """Return the result of a call, or None if it raised an error that is collected."""
        with self.collecting():
            return function(*arguments, **options)

    def entries(
        self, record: Any, name: str, where: str, /, **kinds: type | tuple[type, ...]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (its place, entry) for every right entry of the list `name` of a record, as `records.entries` does."""
        for number, entry in enumerate(expect(record, where, **{name: list})[name]):
            place = f"{where}: {name}[{number}]"
            if self.attempt(expect, entry, place, **kinds) is not None:
                yield place, entry

    def by_id(self, named: Iterable[tuple[str, dict[str, Any]]], compare: str) -> dict[Any, dict[str, Any]]:
        """Return {id: record}. Raises ValueError if two different records have one id.

        The message shows the field `compare` of both. A record that occurs twice, word for word, counts once.
        """
        by_id: dict[Any, dict[str, Any]] = {}
        by_text: dict[str, dict[str, Any]] = {}  # 1 and "1" name the same thing
        for where, record in named:
            other = by_text.setdefault(str(record["id"]), record)
            with self.collecting():
                if not same(other, record):
                    raise ValueError(
                        f"{where}: id {record['id']!r} stands twice, with {compare} {short_repr(other.get(compare))} and "
                        f"{short_repr(record.get(compare))}; give every record an id of its own"
                    )
            by_id[record["id"]] = other
        return by_id

    def all_problems(self) -> list[str]:
        """Return the messages of all errors in the data, instead of raising the first one."""
        self.problems = []
        with self.collecting():
            for split in self.split_names():
                with self.collecting():
                    for _ in self.rows(split):
                        pass
        problems, self.problems = self.problems, None
        return list(dict.fromkeys(problems))  # records that are read twice are wrong twice

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name, gen_kwargs={"split": name}) for name in self.split_names()]

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        number = -1
        for number, row in enumerate(self.rows(split)):
            yield number, row
        if number < 0:
            raise ValueError(f"{self.title} in {self.root} has no images in split {split!r}; {self.ADVICE}.")

    def build(self, num_proc: int | None = None) -> RowBuilder:
        """Write the Arrow files unless they exist. Raises an error in the data as it is."""
        try:
            self.download_and_prepare(num_proc=num_proc)
        except DatasetGenerationError as error:
            cause = error.__cause__ or error
            if isinstance(cause, (ValueError, OSError)) and not isinstance(
                cause, (UnicodeError, pyarrow.ArrowException)
            ):
                raise cause from None
            raise ValueError(
                f"{self.title} in {self.root} cannot be built: {cause} ({type(cause).__name__}); {self.ADVICE}."
            ) from cause
        return self

    def load(self, split: str, num_proc: int | None = None) -> datasets.Dataset:
        """Return the rows of `split`, memory-mapped. Raises ValueError with the existing splits if there is none."""
        self.build(num_proc)
        for name in (part.split("[")[0].strip() for part in split.split("+")):
            if name not in self.info.splits:
                raise ValueError(
                    f"{self.title} has no split {name!r} in {self.root}; its splits are {', '.join(self.info.splits)}."
                )
        return self.as_dataset(split=split)
