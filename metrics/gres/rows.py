"""Rows files: one JSON line or one parquet row per expression."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .functions import REQUIRED_IN_FILES, RUN_FIELDS, check_row


def _parsed(path: Path) -> Iterable[tuple[str, Any]]:
    """Yield (its place, row) for each row of a file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # imported here, since JSON lines do not need it

        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError, MemoryError) as error:
            raise ValueError(f"{path}: not a parquet file ({error})") from None
        yield from ((f"{path} row {n}", row) for n, row in enumerate(table.to_pylist(), 1))
        return
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                yield f"{path} line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, or not text
                if path.suffix == ".json":  # results.json, for example
                    raise ValueError(
                        f"{path}: not a rows file, which has one JSON object per line; the rows of an evaluation are in "
                        "rows_*.jsonl beside its results.json"
                    ) from None
                raise ValueError(
                    f"{path} line {number}: not a JSON object ({error}); a run that is killed while it writes leaves "
                    "half a line: remove that line, and let the run finish"
                ) from None


def read_rows(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[dict[str, Any]]:
    """Read and check the rows of one or several files.

    Args:
        paths: One path or several, `.parquet` or JSON lines. Each row needs `dataset, split, protocol, image_id,
            expression, is_no_target, is_rejected, intersection, union`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is given twice or has no rows, a row is wrong (the message has its line), or two files have
            the same expression of one run. Within a file an expression may repeat, as some do in gRefCOCO's val.
    """
    seen: set[Path] = set()
    rows: list[dict[str, Any]] = []
    first: dict[tuple, Path] = {}  # expression of a run -> its file
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such rows file; an evaluation writes one beside its results.json")
        if path.resolve() in seen:
            raise ValueError(f"{path}: given twice, so every expression would count twice")
        seen.add(path.resolve())
        before = len(rows)
        for where, row in _parsed(path):
            check_row(row, where, REQUIRED_IN_FILES)
            key = (*(row.get(field) for field in RUN_FIELDS), row["image_id"], row["expression"])
            if (other := first.setdefault(key, path)) != path:
                run = ", ".join(str(value) for value in key[: len(RUN_FIELDS)] if value is not None)
                raise ValueError(
                    f"{where}: {row['expression']!r} of image {row['image_id']} ({run}) is in {other} too, so it would "
                    "count twice; give one of the two files"
                )
            rows.append(row)
        if len(rows) == before:
            raise ValueError(f"{path}: holds no rows; the evaluation has not written any")
    return rows


def group_rows(rows: Iterable[dict[str, Any]], fields: Sequence[str]) -> dict[tuple, list[dict[str, Any]]]:
    """Return rows grouped by their values of `fields` (some of `RUN_FIELDS`), in sorted order.

    Example:
        >>> rows = [{"split": "val"}, {"split": "testA"}, {"split": "val"}]
        >>> {key: len(group) for key, group in group_rows(rows, ["split"]).items()}
        {('testA',): 1, ('val',): 2}
    """
    unknown = [field for field in fields if field not in RUN_FIELDS]
    if unknown:
        raise ValueError(f"cannot group by {', '.join(unknown)}; choose among {', '.join(RUN_FIELDS)}")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(field) for field in fields), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: [str(value) for value in item[0]]))
