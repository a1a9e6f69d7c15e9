"""The base class of all builders: it notices changed files and writes the rows to Arrow files once."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DatasetGenerationError

from . import images, masks, records, schema
from .records import inside, read_plain_pickle, require  # noqa: F401  # importable from here, as before
from .schema import SEGMENTATION_FEATURES


def files_digest(paths: Iterable[Path], code: Iterable[str], *facts: Any) -> str:
    """Return a hash of files (names, sizes, times of change), of the source of modules `code`, and of `facts`."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in paths:
        stat = os.stat(path)
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
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
    SHARED_CODE = (__name__, *(module.__name__ for module in (images, masks, records, schema)))
    USES: tuple[str, ...] = ()

    def __init__(self, name: str, data_dir: str | os.PathLike, cache_dir: str | None = None):
        self.root = Path(os.path.abspath(data_dir))
        if not self.root.is_dir():
            raise FileNotFoundError(f"data_dir={str(data_dir)!r} is not a folder.")
        self.title = name
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

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name, gen_kwargs={"split": name}) for name in self.split_names()]

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self.rows(split))

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
                f"{self.title} in {self.root} cannot be built: {cause} ({type(cause).__name__}); download its files again."
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
