"""Report which data sets are complete, what is missing and what the metrics will count, before a training run.

    python -m data_scripts.check DATA_DIR [NAME ...] [--open] [--max_errors 20]

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
from .builder import RowBuilder
from .halluseg import FOLDER
from .images import PictureError, read_image
from .masks import mask_area
from .own_formats import find_sources
from .records import missing_file, visible
from .referring import LAYOUTS, folders_of
from .wordings import clean_expression

MAX_ERRORS = 20
# the first folder of each data set, or its first folders; without one, the data set counts as not there, not as incomplete
ROOTS = {
    **{name: folders_of(name) for name in LAYOUTS},
    "hallusegbench": [FOLDER],
    "ade20k": ["ade20k"],
    "cocostuff": ["cocostuff"],
    "mapillary": ["mapillary"],
    "paco_lvis": ["vlpart/paco"],
    "pascal_part": ["vlpart/pascal_part"],
    "ReasonSeg": ["reason_seg/ReasonSeg"],
    "llava_instruct_150k": ["llava_dataset"],
}


@dataclass
class Finding:
    """The contents of a data set, and its problems."""

    name: str
    splits: dict[str, int] = field(default_factory=dict)
    expressions: int = 0  # that can be asked for
    no_target: int = 0  # of these, decided by pixels as in the metrics and in training
    blank: int = 0  # texts without a word, which are never asked for
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # files that are not read
    max_errors: int = MAX_ERRORS

    def __str__(self) -> str:
        counts = ", ".join(f"{split} {count}" for split, count in self.splits.items())
        lines = [f"{self.name}: {'INCOMPLETE' if self.problems else 'complete'}" + (f" ({counts})" if counts else "")]
        if self.expressions:
            lines[0] += f", {self.expressions} expressions, {self.no_target} without a target"
        if self.blank:
            lines[0] += f", and {self.blank} blank ones, which are not asked for"
        lines += self._shortened(self.problems)
        if self.left_out:
            lines += [f"left out, not read: {len(self.left_out)} files", *self._shortened(self.left_out)]
        return "\n    ".join(lines)

    def _shortened(self, messages: list[str]) -> list[str]:
        rest = len(messages) - self.max_errors
        return [*messages[: self.max_errors], *([f"... and {rest} more (--max_errors)"] if rest > 0 else [])]


def check(
    name: str,
    data_dir: str | os.PathLike,
    open_images: bool = False,
    cache_dir: str | None = None,
    max_errors: int = MAX_ERRORS,
) -> Finding:
    """Build one data set and look for its images.

    Args:
        name: See `data_scripts.names()`.
        data_dir: See `data_scripts.load`.
        open_images: Whether to decode every image and to compare its size with its annotations.
        cache_dir: The folder of the Arrow files.
        max_errors: The number of problems, and of files left out, that the text of the finding names.
    """
    finding = Finding(name, max_errors=max_errors)
    try:
        builder = load_builder(name, data_dir, cache_dir)
        try:
            builder.build()
        except (OSError, ValueError) as error:
            finding.problems += load_builder(name, data_dir, cache_dir).all_problems() or [str(error)]
            return finding
        finding.left_out = builder.left_out()
    except (OSError, ValueError) as error:
        finding.problems.append(str(error))
        return finding
    finding.problems += builder.empty_splits()
    _check_rows(builder, finding, open_images)
    return finding


def _check_rows(builder: RowBuilder, finding: Finding, open_images: bool) -> None:
    """Count the expressions of a built data set, and look for its images."""
    bad: dict[str, str] = {}
    seen: set[str] = set()
    for split in builder.info.splits:
        rows = builder.as_dataset(split=split).cast_column("image", Image(decode=False))
        finding.splits[split] = len(rows)
        for row in tqdm(rows, desc=f"{finding.name} {split}", leave=False, disable=None):
            for entry in row.get("expressions", ()):
                if clean_expression(entry["text"]):
                    finding.expressions += 1
                    finding.no_target += mask_area(entry["mask"]) == 0
                else:
                    finding.blank += 1
            image = row["image"]
            if image is None or (image["path"] in seen and image["bytes"] is None):
                continue
            name = image["path"] if image["bytes"] is None else f"{image['path'] or 'image'} of {row['image_id']}"
            seen.add(name)
            if open_images:
                try:
                    read_image(image, (row["height"], row["width"]) if "height" in row else None)
                except PictureError as error:
                    bad[name] = str(error)
            elif image["bytes"] is None and not os.path.exists(image["path"]):
                bad[name] = missing_file(f"The image {image['path']}", image["path"])
    if bad:
        finding.problems.append(f"{len(bad)} of {len(seen)} images are missing or wrong:")
        finding.problems.extend(bad.values())


def find(data_dir: str | os.PathLike) -> list[str]:
    """Return the data sets of which a folder holds a part."""
    names = [name for name, roots in ROOTS.items() if any((Path(data_dir) / root).exists() for root in roots)]
    if names:  # beside the published sets' folders, only these are surely somebody's own
        has_own = any(path.suffix.lower() in (".jsonl", ".parquet") for path in visible(Path(data_dir)))
    else:
        try:
            has_own = bool(find_sources(Path(data_dir)))
        except (OSError, ValueError):  # which `check` reports
            has_own = True
    return names + ["own"] * has_own


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` defaults to `sys.argv[1:]`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_scripts.check", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir", help="the folder that holds the data sets' files")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"by default those found; of {', '.join(BUILDERS)}")
    parser.add_argument("--open", action="store_true", help="also decode every image")
    parser.add_argument(
        "--max_errors", type=int, default=MAX_ERRORS, help="problems to name per data set (default: %(default)s)"
    )
    parser.add_argument("--cache_dir", help="the folder of the Arrow files; by default the cache of `datasets`")
    arguments = parser.parse_args(argv)
    if not os.path.isdir(arguments.data_dir):
        parser.error(f"{arguments.data_dir} is not a folder")
    if arguments.max_errors < 1:
        parser.error("--max_errors must be 1 or more")
    if unknown := set(arguments.names) - set(BUILDERS):
        parser.error(f"there is no data set {', '.join(sorted(unknown))}; the names are {', '.join(BUILDERS)}")
    names = arguments.names or find(arguments.data_dir)
    findings = [
        check(name, arguments.data_dir, arguments.open, arguments.cache_dir, arguments.max_errors) for name in names
    ]
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
