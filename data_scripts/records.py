"""Read records of untrusted files: JSON, plain pickles, fields of the right kind, file names that stay in their folder."""

from __future__ import annotations

import codecs
import io
import json
import os
import pickle
import unicodedata
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from .masks import check_size


def require(path: Path, purpose: str) -> Path:
    """Return `path` if it exists; else raise FileNotFoundError with the file's purpose and its neighbours."""
    if os.path.exists(path):
        return path
    if hint := similar_name(path):
        raise FileNotFoundError(f"{path} is missing ({purpose}){hint}.")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    names = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
    listing = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"
    raise FileNotFoundError(f"{path} is missing ({purpose}). The folder {parent} holds: {listing}.")


def similar_name(path: str | os.PathLike) -> str:
    """Return a hint for a missing file that exists under a similar name, or "".

    Names are similar if they differ in case, in the Unicode form (macOS writes decomposed accents), in blanks at the ends,
    or by Windows' backslashes between folders, whether in the stated name or on disk.
    """
    place = Path(path)
    rest: list[str] = []
    while not os.path.exists(place) and place != place.parent:
        rest = [*_parts(place.name), *rest]
        place = place.parent
    if not rest or ".." in rest:
        return ""
    while rest:
        try:
            names = sorted(os.listdir(place))
        except OSError:  # it is a file, or may not be read
            return ""
        name = next((name for name in names if _parts(name) == rest[: len(_parts(name))]), None)
        if name is None:
            return ""
        place, rest = place / name, rest[len(_parts(name)) :]
    other_form = unicodedata.normalize("NFC", str(place)) == unicodedata.normalize("NFC", str(path))
    note = " (the same letters in another Unicode form)" if other_form else ""
    return f"; there is {place}{note}: write the name like this"


def missing_file(title: str, path: str | os.PathLike) -> str:
    """Return the message that `title`, the file at `path`, is missing, with the file of a similar name if there is one."""
    return f"{title} is missing{similar_name(path) or '; put it there or take its record out'}."


def _parts(name: str) -> list[str]:
    """Return a file name split at its backslashes, in the form in which similar names are equal."""
    parts = name.replace("\\", "/").split("/")
    return [
        unicodedata.normalize("NFC", unicodedata.normalize("NFC", part).casefold()).strip() for part in parts if part
    ]


def listing(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Return {stem: path} of a folder's files with one of `suffixes`, in any case, in the order of their names.

    Names that begin with a dot are no data (macOS writes `._a.jpg` beside `a.jpg`). A missing folder has no files.

    Raises:
        ValueError: Two files have one stem, or a name is not text.
    """
    paths: dict[str, Path] = {}
    for path in sorted(visible(folder)):
        if path.suffix.lower() in suffixes:
            if (other := paths.setdefault(path.stem, path)) != path:
                raise ValueError(
                    f"{other} and {path.name} beside it have one name apart from the suffix, so what belongs to which cannot be "
                    f"told; rename one or take it out."
                )
            if not _is_text(path.name):
                raise ValueError(f"the file name {path.name!r} in {folder} is not UTF-8; rename it.")
    return paths


def visible(folder: Path) -> list[Path]:
    """Return the entries of a folder whose names do not begin with a dot; none if the folder is missing."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


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


# byte order marks of encodings that this project does not read; UTF-32's begins with UTF-16's
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

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
    ValueError: a.json: image 0: id must be a whole number, got '7'; correct it.

    Raises:
        ValueError: `record` is not an object, lacks a field, or has a field of another type.
    """
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: an object with {', '.join(kinds)} belongs here, got {short_repr(record)}; correct it."
        )
    if missing := [name for name in kinds if name not in record]:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}; correct it.")
    for name, kind in kinds.items():
        allowed = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(record[name], allowed) or (isinstance(record[name], bool) and bool not in allowed):
            raise ValueError(
                f"{where}: {name} must be {' or '.join(dict.fromkeys(_KIND_NAMES[one] for one in allowed))}, got {short_repr(record[name])}; "
                f"correct it."
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
        # subclasses such as PictureError keep their type, UnicodeDecodeError takes other arguments
        kind = type(error) if type(error).__init__ is ValueError.__init__ else ValueError
        raise kind(f"{where}: {error}") from None


# the fields of an image in a COCO file
IMAGE: Kinds = {"id": (int, str), "file_name": str, "height": int, "width": int}


def image_path(image: dict[str, Any], folder: Path, where: str) -> str:
    """Return the path of an image of a COCO file. Raises ValueError if it leads out of `folder` or has no size."""
    with at(f"{where}: image {short_repr(image['id'])}"):
        check_size((image["height"], image["width"]))
        return str(inside(folder, image["file_name"]))


def parse_json(text: str | bytes, where: str, advice: str = "download it again.") -> Any:
    """Return the value of a JSON text; bytes must be UTF-8. Raises ValueError with the place if it is not JSON."""
    if isinstance(text, bytes):
        text = decode_text(text, where, advice)
    try:
        value = json.loads(text.removeprefix("\ufeff"))
        if "\\ud" in text.lower():  # an emoji, or half of a surrogate pair, which cannot be written to a file
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); {advice}") from None


def decode_text(content: bytes, where: str, advice: str = "download it again.") -> str:
    """Return UTF-8 text without a byte order mark. Raises ValueError with the place if it has another encoding."""
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{where} is {encoding}, not UTF-8; {advice}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error}); {advice}") from None


def read_json(path: Path, advice: str = "download it again.") -> Any:
    """Return the content of a JSON file in UTF-8. Raises ValueError with the file's name if it is not JSON."""
    return parse_json(path.read_bytes(), str(path), advice)


def same(one: Any, other: Any) -> bool:
    """Return whether two values from files are equal; not if they are nested too deeply to compare."""
    try:
        return bool(one == other)
    except RecursionError:
        return False


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
