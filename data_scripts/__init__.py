"""Every data set that GSVA is trained and evaluated on, in one schema (see `schema.py`).

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

# name -> module and builder class; a module is imported when one of its data sets is asked for
BUILDERS = {
    **dict.fromkeys(
        ("refclef", "refcoco", "refcoco+", "refcocog", "grefcoco", "refzom"), ("referring", "ReferringBuilder")
    ),
    "ade20k": ("semantic", "Ade20kBuilder"),
    "cocostuff": ("semantic", "CocoStuffBuilder"),
    "mapillary": ("semantic", "MapillaryBuilder"),
    "paco_lvis": ("semantic", "PartsBuilder"),
    "pascal_part": ("semantic", "PartsBuilder"),
    "ReasonSeg": ("reason_seg", "ReasonSegBuilder"),
    "llava_instruct_150k": ("vqa", "ConversationBuilder"),
    "own": ("own", "OwnBuilder"),
}
# made in memory, from options instead of files
GENERATED = {"shapes": ("shapes", "load")}


def names() -> list[str]:
    """The data sets that `load` knows."""
    return [*BUILDERS, *GENERATED]


def _get(place: tuple[str, str]) -> Any:
    return getattr(import_module(f".{place[0]}", __name__), place[1])


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    num_proc: int | None = None,
    **options: Any,
) -> datasets.Dataset:
    """Rows of one split of a data set, memory-mapped from Arrow files that the first call builds.

    Args:
        name: One of `names()`, or the folder or Hub id, with a slash, of a set written by `data_scripts.publish`.
        data_dir: The folder that holds the original's tree (`refer_seg/`, `coco/`, `ade20k/`, ...).
        split: A split that the data set's files hold, or several ("train+val"), or a slice ("train[:100]").
        cache_dir: Where the Arrow files go; by default the cache of `datasets`.
        num_proc: Processes that share the first build of a set of label maps.
        options: What a generated data set takes (`shapes`: size, seed); others take none.

    Raises:
        ValueError: The name or the split does not exist (the message lists those that do), or a record is wrong.
        FileNotFoundError: `data_dir` or one of the data set's files is missing.
    """
    if name in GENERATED:
        common = {"cache_dir": cache_dir, "num_proc": num_proc}
        options.update({key: value for key, value in common.items() if value is not None})
        generate = _get(GENERATED[name])
        known = signature(generate).parameters
        if unknown := [option for option in options if option not in known]:
            raise ValueError(f"{name!r} takes no option {', '.join(unknown)}; its options are {', '.join(known)}.")
        return generate(split=split, **options)
    if options:
        raise ValueError(f"{name!r} takes no option {', '.join(options)}.")
    if name not in BUILDERS and "/" in name:
        return _load_published(name, split, cache_dir)
    return load_builder(name, data_dir, cache_dir).load(split, num_proc)


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
        # a path without bytes is one of this machine, whoever wrote it
        if pyarrow.compute.any(
            pyarrow.compute.and_(chunk.field("bytes").is_null(), chunk.field("path").is_valid())
        ).as_py():
            raise ValueError(
                f"{name} names pictures by their paths instead of holding them; write it with "
                f"`python -m data_scripts.publish`, or load it from its folder with name='own'."
            )
    return rows


def load_builder(name: str, data_dir: str | os.PathLike | None, cache_dir: str | None = None) -> RowBuilder:
    """The builder behind `load`, for building, publishing or asking for its splits. Raises what `load` does."""
    if name not in BUILDERS:
        raise ValueError(
            f"There is no data set {name!r}; the names are {', '.join(names())}, or the path or Hub id, with a slash, "
            f"of one that data_scripts.publish wrote."
        )
    if data_dir is None:
        raise ValueError(f"load({name!r}) needs data_dir, the folder that holds the data set's files.")
    return _get(BUILDERS[name])(name, data_dir, cache_dir)
