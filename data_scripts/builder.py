"""What all builders share: finding files, noticing that they changed, and building once into Arrow on disk."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from . import schema
from .schema import SEGMENTATION_FEATURES


def require(path: Path, purpose: str) -> Path:
    """`path` if it exists; otherwise FileNotFoundError that says what the file is for and what is beside it."""
    if path.exists():
        return path
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    there = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
    shown = ", ".join(there[:12]) + (", ..." if len(there) > 12 else "") if there else "nothing"
    raise FileNotFoundError(f"{path} is missing ({purpose}). The folder {parent} holds: {shown}.")


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8; ValueError names the file when it is not JSON."""
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON in UTF-8 ({error}); download it again.") from None


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name]
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """The content of a pickle that holds plain containers, strings and numbers only.

    Pickles are programs, and these come from strangers: one that asks for any class or function is refused with a
    ValueError naming it. Byte strings of Python 2 are read as UTF-8.
    """
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8").load()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is not a pickle of plain data: {error}. Do not use this file; download it again."
            ) from None
        except (EOFError, UnicodeDecodeError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); download it again.") from None


def fingerprint(paths: Iterable[Path], code: Iterable[str], *facts: Any) -> str:
    """Changes when a file's name, size or time of change does, or a module of `code`, or a given fact."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in paths:
        stat = os.stat(path)
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    for module in code:
        digest.update(Path(sys.modules[module].__file__).read_bytes())
    return digest.hexdigest()[:32]


class RowBuilder(datasets.GeneratorBasedBuilder):
    """A data set in the original's on-disk layout below `data_dir`, built into Arrow files in the `datasets` cache.

    A subclass says which files it reads (`files`), which splits they hold (`split_names`) and what the rows of a split
    are (`rows`). The cache is keyed by the files' names, sizes and times, so a changed file is built again.
    """

    VERSION = datasets.Version("1.0.0")
    FEATURES = SEGMENTATION_FEATURES
    USES: tuple[str, ...] = ()  # modules, besides its own, that decide what a subclass's rows are

    def __init__(self, name: str, data_dir: str | os.PathLike, cache_dir: str | None = None):
        self.root = Path(os.path.abspath(data_dir))
        if not self.root.is_dir():
            raise FileNotFoundError(f"data_dir={str(data_dir)!r} is not a folder.")
        self.title = name
        super().__init__(
            cache_dir=cache_dir,
            dataset_name=name,
            hash=fingerprint(self.files(), (__name__, schema.__name__, type(self).__module__, *self.USES), name),
        )

    def files(self) -> list[Path]:
        """The files whose change makes a new build necessary. Raises FileNotFoundError when one is missing."""
        raise NotImplementedError

    def split_names(self) -> list[str]:
        """The splits that the files hold."""
        raise NotImplementedError

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """The rows of one split, in a fixed order."""
        raise NotImplementedError

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name, gen_kwargs={"split": name}) for name in self.split_names()]

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self.rows(split))

    def build(self, num_proc: int | None = None) -> RowBuilder:
        """Write the Arrow files unless an earlier start has; an error in the data is raised as it is."""
        try:
            self.download_and_prepare(num_proc=num_proc)
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
        return self

    def load(self, split: str, num_proc: int | None = None) -> datasets.Dataset:
        """The rows of `split`, memory-mapped. Raises ValueError naming the splits that exist."""
        self.build(num_proc)
        for name in (part.split("[")[0].strip() for part in split.split("+")):
            if name not in self.info.splits:
                raise ValueError(
                    f"{self.title} has no split {name!r} in {self.root}; its splits are {', '.join(self.info.splits)}."
                )
        return self.as_dataset(split=split)
