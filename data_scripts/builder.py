"""What all builders share: finding files, noticing that they changed, and building once into Arrow on disk."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DatasetGenerationError

from . import schema
from .schema import SEGMENTATION_FEATURES, check_size, shown


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


def inside(folder: Path, name: Any) -> Path:
    """`folder / name`, for a name that stands in a file: it must not lead out of the folder, by links neither.

    Links are followed into the folders that `GSVA_TRUSTED_FOLDERS` lists (separated as PATH is), for pictures that are
    kept elsewhere; the folder itself may be a link.

    Raises:
        ValueError: The name is no string, is empty or absolute, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"a file name must be a string with a name in it, got {shown(name)}")
    path = os.path.join(folder, name)
    real, root = os.path.realpath(path), os.path.realpath(folder)
    allowed = [root, *filter(None, os.environ.get("GSVA_TRUSTED_FOLDERS", "").split(os.pathsep))]
    if os.path.isabs(name) or ".." in Path(name).parts or real == root:
        raise ValueError(f"the file name {name!r} leads out of {folder}; correct it to one relative to that folder")
    if not any(real.startswith(os.path.join(os.path.realpath(place), "")) for place in allowed):
        raise ValueError(
            f"the file {path} is a link to {real}, out of its folder; put the file there, or name the folder it links "
            f"to in GSVA_TRUSTED_FOLDERS if you trust it"
        )
    return Path(path)


# field -> what it must be
Kinds = dict[str, type | tuple[type, ...]]
# what a field must be -> how an error says it
_KINDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    bool: "true or false",
}


def expect(record: Any, where: str, /, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """`record`, if it is an object whose fields are of these kinds; others are not looked at.

    >>> expect({"id": "7"}, "a.json: image 0", id=int)
    Traceback (most recent call last):
    ValueError: a.json: image 0: id must be a whole number, got '7'; correct it or download the file again.

    Raises:
        ValueError: It is no object, or lacks a field, or has one of another kind.
    """
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: an object with {', '.join(kinds)} belongs here, got {shown(record)}; download it again."
        )
    if missing := [name for name in kinds if name not in record]:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}; download it again.")
    for name, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(record[name], allowed) or (isinstance(record[name], bool) and bool not in allowed):
            raise ValueError(
                f"{where}: {name} must be {' or '.join(dict.fromkeys(_KINDS[one] for one in allowed))}, got {shown(record[name])}; "
                f"correct it or download the file again."
            )
    return record


def entries(
    record: Any, name: str, where: str, /, **kinds: type | tuple[type, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where it stands and what it says, for every entry of the list `name` of a record. Raises what `expect` does."""
    for number, entry in enumerate(expect(record, where, **{name: list})[name]):
        yield (place := f"{where}: {name}[{number}]"), expect(entry, place, **kinds)


@contextmanager
def at(where: str) -> Iterator[None]:
    """Puts where it happened before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


# what a COCO file says of a picture
IMAGE: Kinds = {"id": (int, str), "file_name": str, "height": int, "width": int}


def picture_of(image: dict[str, Any], folder: Path, where: str) -> str:
    """The path of a picture that a COCO file names. Raises ValueError when it leads out of `folder` or states no size."""
    with at(f"{where}: picture {shown(image['id'])}"):
        check_size((image["height"], image["width"]))
        return str(inside(folder, image["file_name"]))


def parse_json(text: str | bytes, where: str, advice: str = "download it again.") -> Any:
    """The value of a JSON text, UTF-8 if bytes; ValueError says where it stands when it is none."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text)
        if "\\ud" in text.lower():  # half of a pair, which no file can hold, or an emoji
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{where} is not JSON in UTF-8 ({error}); {advice}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8; ValueError names the file when it is not JSON."""
    return parse_json(path.read_bytes(), str(path))


class _PlainUnpickler(pickle._Unpickler):
    """Reads lists, dicts, strings and numbers, and nothing that could run code.

    The one in Python: that in C lets eight bytes of a file ask for tens of gigabytes (an index of its memo).
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name]
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """The content of a pickle that holds plain containers, strings and numbers only.

    Pickles are programs, and these come from strangers: one that asks for any class or function is refused with a
    ValueError naming it. Byte strings of Python 2 are read as UTF-8.
    """
    with io.BytesIO(path.read_bytes()) as file:  # which reads no more than there is
        try:
            return _PlainUnpickler(file, encoding="utf-8").load()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is not a pickle of plain data: {error}. Do not use this file; download it again."
            ) from None
        except (EOFError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, MemoryError,
                RecursionError) as error:  # fmt: skip  # what the bytes of a damaged one may ask for
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); download it again.") from None


def fingerprint(paths: Iterable[Path], code: Iterable[str], *facts: Any) -> str:
    """Changes when a file's name, size or time of change does, or a module of `code`, or a given fact."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in paths:
        stat = os.stat(path)
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    for module in code:
        digest.update(Path(inspect.getfile(sys.modules[module])).read_bytes())
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
        """The rows of `split`, memory-mapped. Raises ValueError naming the splits that exist."""
        self.build(num_proc)
        for name in (part.split("[")[0].strip() for part in split.split("+")):
            if name not in self.info.splits:
                raise ValueError(
                    f"{self.title} has no split {name!r} in {self.root}; its splits are {', '.join(self.info.splits)}."
                )
        return self.as_dataset(split=split)
