"""All data sets that GSVA is trained and evaluated on, in one schema (`schema.py`).

>>> import data_scripts
>>> rows = data_scripts.load("grefcoco", data_dir="dataset", split="val")  # doctest: +SKIP
>>> rows[0]["expressions"][0]["text"]  # doctest: +SKIP
'man in red'
"""

from __future__ import annotations

import os
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

    from .builder import RowBuilder
    from .nouns import Categories

# name -> module and builder class; a module is imported when one of its data sets is loaded
BUILDERS = {
    **dict.fromkeys(
        ("refclef", "refcoco", "refcoco+", "refcocog", "grefcoco", "refzom"), ("referring", "ReferringBuilder")
    ),
    # benchmarks of absence
    **dict.fromkeys(("rrefcoco", "rrefcoco+", "rrefcocog"), ("referring", "ReferringBuilder")),
    **dict.fromkeys(("fprefcoco", "fprefcoco+", "fprefcocog"), ("referring", "ReferringBuilder")),
    "hallusegbench": ("halluseg", "HalluSegBuilder"),
    "ade20k": ("semantic", "Ade20kBuilder"),
    "cocostuff": ("semantic", "CocoStuffBuilder"),
    "mapillary": ("semantic", "MapillaryBuilder"),
    "paco_lvis": ("semantic", "PartsBuilder"),
    "pascal_part": ("semantic", "PartsBuilder"),
    "ReasonSeg": ("reason_seg", "ReasonSegBuilder"),
    "llava_instruct_150k": ("vqa", "ConversationBuilder"),
    "own": ("own", "OwnBuilder"),
}
# data sets drawn from options instead of read from files
GENERATED = {"shapes": ("shapes", "load")}


def names() -> list[str]:
    """Return the names of the data sets that `load` accepts."""
    return [*BUILDERS, *GENERATED]


def _get(place: tuple[str, str]) -> Any:
    return getattr(import_module(f".{place[0]}", __name__), place[1])


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    num_proc: int | None = None,
    limit: int | None = None,
    **options: Any,
) -> datasets.Dataset:
    """Return the rows of one split of a data set, memory-mapped from Arrow files that the first call writes.

    Args:
        name: One of `names()`, or the folder or Hub id (with a slash) of a set written by `data_scripts.publish`.
        data_dir: The folder that holds the original's tree (`refer_seg/`, `coco/`, `ade20k/`, ...).
        split: A split that the data set's files hold, or several ("train+val"), or a slice ("train[:100]").
        cache_dir: The folder of the Arrow files; by default the cache of `datasets`.
        num_proc: The number of processes that share the first build of a set of label maps.
        limit: Return the first rows only. Of a generated data set no others are drawn.
        options: Options of a generated data set (`shapes`: size, seed, task); others have none.

    Raises:
        ValueError: The name or the split does not exist (the message lists those that do), or a record is wrong.
        FileNotFoundError: `data_dir` or one of the data set's files is missing.
    """
    if name in GENERATED:
        common = {"cache_dir": cache_dir, "num_proc": num_proc, "limit": limit}
        options.update({key: value for key, value in common.items() if value is not None})
        generate = _get(GENERATED[name])
        parameters = signature(generate).parameters
        if unknown := [option for option in options if option not in parameters]:
            raise ValueError(
                f"{name!r} takes no option {', '.join(unknown)}; its options are {', '.join(parameters)}."
            )
        return generate(split=split, **options)
    if options:
        raise ValueError(f"{name!r} takes no option {', '.join(options)}.")
    if name not in BUILDERS and "/" in name:
        rows = _load_published(name, split, cache_dir)
    else:
        rows = load_builder(name, data_dir, cache_dir).load(split, num_proc)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def categories(name: str, data_dir: str | os.PathLike | None = None, cache_dir: str | None = None) -> Categories:
    """Return the categories of a data set's annotations beside its texts, for drawing absent expressions.

    Only sets that are read from files have them, and of these not all.
    """
    from .nouns import Categories

    if name not in BUILDERS:
        return Categories()
    return load_builder(name, data_dir, cache_dir).categories()


def annotations_digest(
    name: str, data_dir: str | os.PathLike | None = None, cache_dir: str | None = None
) -> str | None:
    """Return a digest of the contents of a data set's annotation files, wherever they lie; None if it is not read from files.

    The first call for a built data set reads the files; later ones read the digest beside the Arrow files.
    """
    return load_builder(name, data_dir, cache_dir).annotations_digest() if name in BUILDERS else None


def _load_published(name: str, split: str, cache_dir: str | None) -> datasets.Dataset:
    import datasets
    import pyarrow.compute

    rows = datasets.load_dataset(name, split=split, cache_dir=cache_dir)
    if not {"image", "image_id"} <= set(rows.column_names) or not {"expressions", "conversation"} & set(
        rows.column_names
    ):
        raise ValueError(
            f"{name} has the columns {', '.join(rows.column_names)}, which is not this project's schema; "
            f"write it with `python -m data_scripts.publish`."
        )
    for chunk in rows.data.column("image").chunks:
        # A path without bytes would be opened on this machine, whoever wrote it.
        if pyarrow.compute.any(
            pyarrow.compute.and_(chunk.field("bytes").is_null(), chunk.field("path").is_valid())
        ).as_py():
            raise ValueError(
                f"{name} names images by their paths instead of holding them; write it with "
                f"`python -m data_scripts.publish`, or load it from its folder with name='own'."
            )
    return rows


def load_builder(name: str, data_dir: str | os.PathLike | None, cache_dir: str | None = None) -> RowBuilder:
    """Return the builder behind `load`, to build, to publish or to list splits. Raises the errors of `load`."""
    if name not in BUILDERS:
        raise ValueError(
            f"There is no data set {name!r}; the names are {', '.join(names())}, or the path or Hub id, with a slash, "
            f"of one that data_scripts.publish wrote."
        )
    if data_dir is None:
        raise ValueError(f"load({name!r}) needs data_dir, the folder that holds the data set's files.")
    return _get(BUILDERS[name])(name, data_dir, cache_dir)
