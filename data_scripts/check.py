"""Report which data sets are complete and what is missing, before a training run.

    python -m data_scripts.check DATA_DIR [NAME ...] [--open]

The command builds each data set, which a training run then finds built, and looks for every image. With --open it also
decodes every image and compares its size with the annotations. Without names it checks every data set of which DATA_DIR
holds a part. It exits with 1 if one of them is not complete.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Image
from tqdm import tqdm

from . import BUILDERS, load_builder
from .images import PictureError, read_image

# the first folder of each data set; without it, the data set counts as not there instead of incomplete
ROOTS = {
    **{name: f"refer_seg/{name}" for name in ("refclef", "refcoco", "refcoco+", "refcocog", "grefcoco", "refzom")},
    "ade20k": "ade20k",
    "cocostuff": "cocostuff",
    "mapillary": "mapillary",
    "paco_lvis": "vlpart/paco",
    "pascal_part": "vlpart/pascal_part",
    "ReasonSeg": "reason_seg/ReasonSeg",
    "llava_instruct_150k": "llava_dataset",
}


@dataclass
class Finding:
    """The contents of a data set, and its problems."""

    name: str
    splits: dict[str, int] = field(default_factory=dict)
    expressions: int = 0
    no_target: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{split} {count}" for split, count in self.splits.items())
        lines = [f"{self.name}: {'INCOMPLETE' if self.problems else 'complete'}" + (f" ({counts})" if counts else "")]
        if self.expressions:
            lines[0] += f", {self.expressions} expressions, {self.no_target} without a target"
        return "\n    ".join(lines + self.problems)


def check(name: str, data_dir: str | os.PathLike, open_images: bool = False, cache_dir: str | None = None) -> Finding:
    """Build one data set and look for its images.

    Args:
        name: See `data_scripts.names()`.
        data_dir: See `data_scripts.load`.
        open_images: Whether to decode every image and to compare its size with its annotations.
        cache_dir: The folder of the Arrow files.
    """
    finding = Finding(name)
    try:
        builder = load_builder(name, data_dir, cache_dir).build()
    except (OSError, ValueError) as error:
        finding.problems.append(str(error))
        return finding
    bad: dict[str, str] = {}
    seen: set[str] = set()
    for split in builder.info.splits:
        rows = builder.as_dataset(split=split).cast_column("image", Image(decode=False))
        finding.splits[split] = len(rows)
        for row in tqdm(rows, desc=f"{name} {split}", leave=False, disable=None):
            image, entries = row["image"], row.get("expressions", ())
            finding.expressions += len(entries)
            finding.no_target += sum(entry["num_targets"] == 0 for entry in entries)
            if image is None or image["path"] in seen:
                continue
            seen.add(image["path"])
            if open_images:
                try:
                    read_image(image, (row["height"], row["width"]) if "height" in row else None)
                except PictureError as error:
                    bad[image["path"]] = str(error)
            elif image["bytes"] is None and not os.path.exists(image["path"]):
                bad[image["path"]] = f"The image {image['path']} is missing."
    if bad:
        finding.problems.append(f"{len(bad)} of {len(seen)} images are missing or wrong, the first:")
        finding.problems.extend(list(bad.values())[:3])
    return finding


def find(data_dir: str | os.PathLike) -> list[str]:
    """Return the data sets of which a folder holds a part."""
    names = [name for name, root in ROOTS.items() if (Path(data_dir) / root).exists()]
    suffixes = (".jsonl", ".parquet") if names else (".jsonl", ".parquet", ".json")
    return names + ["own"] * any(path.suffix in suffixes for path in Path(data_dir).iterdir())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_scripts.check", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BUILDERS)}")
    parser.add_argument("--open", action="store_true", help="decode every image")
    parser.add_argument("--cache_dir")
    arguments = parser.parse_args(argv)
    if not os.path.isdir(arguments.data_dir):
        parser.error(f"{arguments.data_dir} is not a folder")
    if unknown := set(arguments.names) - set(BUILDERS):
        parser.error(f"there is no data set {', '.join(sorted(unknown))}; the names are {', '.join(BUILDERS)}")
    names = arguments.names or find(arguments.data_dir)
    findings = [check(name, arguments.data_dir, arguments.open, arguments.cache_dir) for name in names]
    for finding in findings:
        print(finding)
    absent = [name for name in BUILDERS if name not in names and name != "own"]
    if absent and not arguments.names and names != ["own"]:
        print(f"not there: {', '.join(absent)}")
    incomplete = sum(bool(finding.problems) for finding in findings)
    print(f"{len(findings) - incomplete} complete, {incomplete} incomplete in {arguments.data_dir}")
    return 1 if incomplete or not findings else 0


if __name__ == "__main__":
    sys.exit(main())
