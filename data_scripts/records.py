"""Read records of strangers' files: JSON, plain pickles, fields of the right kind, file names that stay in their folder."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from .masks import check_size


def require(path: Path, purpose: str) -> Path:
    """Return `path` if it exists; else raise FileNotFoundError with the file's purpose and its neighbours."""
    if path.exists():
        return path
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    names = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
    listing = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"
    raise FileNotFoundError(f"{path} is missing ({purpose}). The folder {parent} holds: {listing}.")


def inside(folder: Path, name: Any) -> Path:
    """Return `folder / name` for a file name read from a file, which must not lead out of the folder.

    Links out of the folder are followed only into the folders that `GSVA_TRUSTED_FOLDERS` lists (separated like PATH).
    The folder itself may be a link. `modeling_gsva.chat_gsva` reads the same variable for files in chats; it cannot
    import this function, since model code is copied alone.

    Raises:
        ValueError: The name is not a string, is empty or absolute, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"a file name must be a string with a name in it, got {short_repr(name)}")
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


# name of a field -> its type or types
Kinds = dict[str, type | tuple[type, ...]]
# type of a field -> its name in errors
_KIND_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    bool: "true or false",
}


def expect(record: Any, where: str, /, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """Return `record` if it is an object whose fields have these types. Other fields are not checked.

    >>> expect({"id": "7"}, "a.json: image 0", id=int)
    Traceback (most recent call last):
    ValueError: a.json: image 0: id must be a whole number, got '7'; correct it or download the file again.

    Raises:
        ValueError: `record` is not an object, lacks a field, or has a field of another type.
    """
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: an object with {', '.join(kinds)} belongs here, got {short_repr(record)}; download it again."
        )
    if missing := [name for name in kinds if name not in record]:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}; download it again.")
    for name, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(record[name], allowed) or (isinstance(record[name], bool) and bool not in allowed):
            raise ValueError(
                f"{where}: {name} must be {' or '.join(dict.fromkeys(_KIND_NAMES[one] for one in allowed))}, got {short_repr(record[name])}; "
                f"correct it or download the file again."
            )
    return record


def entries(
    record: Any, name: str, where: str, /, **kinds: type | tuple[type, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (its place, entry) for every entry of the list `name` of a record. Raises the errors of `expect`."""
    for number, entry in enumerate(expect(record, where, **{name: list})[name]):
        yield (place := f"{where}: {name}[{number}]"), expect(entry, place, **kinds)


@contextmanager
def at(where: str) -> Iterator[None]:
    """Put the place `where` in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


# the fields of an image in a COCO file
IMAGE: Kinds = {"id": (int, str), "file_name": str, "height": int, "width": int}


def image_path(image: dict[str, Any], folder: Path, where: str) -> str:
    """Return the path of an image of a COCO file. Raises ValueError if it leads out of `folder` or has no size."""
    with at(f"{where}: image {short_repr(image['id'])}"):
        check_size((image["height"], image["width"]))
        return str(inside(folder, image["file_name"]))


def parse_json(text: str | bytes, where: str, advice: str = "download it again.") -> Any:
    """Return the value of a JSON text; bytes must be UTF-8. Raises ValueError with the place if it is not JSON."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text)
        if "\\ud" in text.lower():  # an emoji, or half of a surrogate pair, which cannot be written to a file
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{where} is not JSON in UTF-8 ({error}); {advice}") from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file in UTF-8. Raises ValueError with the file's name if it is not JSON."""
    return parse_json(path.read_bytes(), str(path))


class _PlainUnpickler(pickle._Unpickler):
    """Reads lists, dicts, strings and numbers, and nothing that could run code.

    It derives from the unpickler in Python: in the one in C, eight bytes of a file can allocate tens of gigabytes (an
    index of its memo).
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name]
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """Return the content of a pickle that holds only plain containers, strings and numbers.

    Pickles are programs, and these come from strangers: a pickle that names any class or function is refused. Byte
    strings of Python 2 are read as UTF-8.

    Raises:
        ValueError: The file is damaged, or names a class or function (given in the message).
    """
    with io.BytesIO(path.read_bytes()) as file:  # unlike a file, it never allocates more than it holds
        try:
            return _PlainUnpickler(file, encoding="utf-8").load()
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is not a pickle of plain data: {error}. Do not use this file; download it again."
            ) from None
        except (EOFError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, MemoryError,
                RecursionError) as error:  # fmt: skip  # which the bytes of a damaged pickle may cause
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); download it again.") from None
