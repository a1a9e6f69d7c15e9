"""What numbers were measured on: a digest of the annotations, and the numbers of expressions of each kind.

Releases of one data set differ in their expressions (gRefCOCO has several), and so do evaluations on fewer images. Numbers
are compared only where these facts are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .resume import stored_images

KINDS = ("no-target", "single-target", "multi-target", "target")  # as metrics.gres counts them
# What an expression says. Named one by one, so that the digest stays the same when the schema grows.
SAYS = ("text", "is_sentence", "num_targets", "mask", "ignore_mask", "part")


def annotations_digest(rows: Sequence[dict[str, Any]]) -> str:
    """Return a digest of what rows say of their images: ids, sizes, texts and masks, in their order.

    No path of a machine and no pixel of an image counts, so the same release gives the same digest everywhere.
    """
    digest = hashlib.sha256()
    for row in stored_images(rows):
        said = [[entry.get(name) for name in SAYS] for entry in row["expressions"]]
        facts = [row["image_id"], row["height"], row["width"], said]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def kinds_of(record: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of expressions of each kind that a record counts. Records of older versions have them, too."""
    parts = (record.get("breakdown") or {}).get("kind") or {}
    return {kind: parts[kind]["samples"] for kind in KINDS if kind in parts}


def describe(record: Mapping[str, Any]) -> str:
    """Return what a record was measured on, in words.

    >>> describe({"samples": 2, "breakdown": {"kind": {"no-target": {"samples": 3}}}, "annotations": {"rows": "0a1b"}})
    '2 images with 3 expressions (3 no-target), annotations 0a1b'
    """
    kinds = kinds_of(record)
    words = f"{record.get('samples', 'unknown')} images"
    if kinds:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        words += f" with {sum(kinds.values())} expressions ({counts})"
    annotations = record.get("annotations") or {}
    if rows := annotations.get("rows"):
        words += f", annotations {rows}"
    if files := annotations.get("files"):
        words += f", their files {files}"
    return words


def measured_on(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each data that records were measured on, as far as they say it."""
    sentences = (
        f"{Path(record['dataset']).name} {record['split']}: {describe(record)}"
        for record in records
        if kinds_of(record)
    )
    return list(dict.fromkeys(sentences))


def differences(named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return a sentence for each split on which records were measured on different data.

    Args:
        named: (name of the run or the evaluation, record), of any data sets.
    """
    splits: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for name, record in named:
        splits.setdefault((Path(record["dataset"]).name, record["split"]), []).append((name, record))
    sentences = []
    for (dataset, split), pairs in splits.items():
        if not any(_differ(one, other) for _, one in pairs for _, other in pairs):
            continue
        data: dict[str, list[str]] = {}
        for name, record in pairs:
            data.setdefault(describe(record), []).append(name)
        listed = "; ".join(f"{', '.join(dict.fromkeys(names))}: {words}" for words, names in data.items())
        sentences.append(
            f"These were not measured on the same data, so their numbers cannot be compared ({dataset} {split}): {listed}"
        )
    return sentences


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two records were surely measured on different data. What one of them does not say is not compared."""
    for name in ("rows", "files"):  # equal annotations decide, whatever the files that hold them
        a, b = ((record.get("annotations") or {}).get(name) for record in (one, other))
        if a is not None and b is not None:
            return a != b
    facts = ((record.get("samples"), kinds_of(record) or None) for record in (one, other))
    return any(a is not None and b is not None and a != b for a, b in zip(*facts))
