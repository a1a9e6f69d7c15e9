"""Write a data set as a parquet folder with a card, pictures embedded, that plain `load_dataset(OUT)` opens.

python -m data_scripts.publish NAME DATA_DIR OUT [--push_to_hub USER/REPOSITORY]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import BUILDERS, load_builder
from .check import check

CARD = """---
configs:
- config_name: default
  data_files:
{data_files}
task_categories:
- image-segmentation
tags:
- referring-expression-segmentation
---
# {name}

{name} in the schema of GSVA's Hugging Face port, pictures embedded. The pictures and annotations are their authors';
their licence and terms apply.

| split | pictures |
| --- | --- |
{counts}

```python
from datasets import load_dataset

rows = load_dataset("{out}", split="{split}")
```

## Columns
{columns}
"""
SEGMENTATION_COLUMNS = """`image`, `image_id`, `height`, `width` and `expressions`, a list of

- `text`: the expression, as its authors wrote it; `is_sentence`: whether it is a whole sentence;
- `num_targets`: how many annotations it names, 0 for no-target;
- `mask`: COCO run-length encoding `{"size": [height, width], "counts": str}` (`pycocotools.mask.decode`), without a
  pixel for no-target; `ignore_mask`: pixels that do not count, or null;
- `part`: the part of `text` that is meant, or null; `explanation`: an answer in words, or null."""
VQA_COLUMNS = "`image` (may be null), `image_id` and `conversation`, a list of `role` (user or assistant) and `text`."


def _files_of(folder: Path, stem: str, split: str) -> str:
    """The lines of the card that name a split's files, of which large ones have several."""
    files = [*folder.glob(f"data/{stem}.parquet"), *sorted(folder.glob(f"data/{stem}-*-of-*.parquet"))]
    return "\n".join([f"  - split: {split}", "    path:", *(f"    - data/{file.name}" for file in files)])


def publish(name: str, data_dir: str | os.PathLike, out: str | os.PathLike, cache_dir: str | None = None) -> Path:
    """Write `out`, whole or not at all.

    Raises:
        FileExistsError: `out` is there already.
        ValueError: The data set is not complete; the message is that of `data_scripts.check`.
    """
    out = Path(os.path.abspath(out))
    if out.exists():
        raise FileExistsError(f"{out} is there already; take it away or choose another name.")
    finding = check(name, data_dir, cache_dir=cache_dir)
    if finding.problems:
        raise ValueError(str(finding))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / out.name
        builder = load_builder(name, data_dir, cache_dir)
        builder.download_and_prepare(str(folder / "data"), file_format="parquet")
        for left_over in [*folder.glob("*.lock"), folder / "data" / "dataset_info.json"]:
            left_over.unlink(missing_ok=True)
        columns = SEGMENTATION_COLUMNS if "expressions" in builder.FEATURES else VQA_COLUMNS
        card = CARD.format(
            name=name,
            out=out.name,
            split=next(iter(finding.splits)),
            data_files="\n".join(
                _files_of(folder, f"{builder.dataset_name}-{split}", split) for split in finding.splits
            ),
            counts="\n".join(f"| {split} | {count} |" for split, count in finding.splits.items()),
            columns=columns,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        shutil.move(folder, out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_scripts.publish", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=BUILDERS, metavar="NAME", help=", ".join(BUILDERS))
    parser.add_argument("data_dir")
    parser.add_argument("out")
    parser.add_argument("--push_to_hub", metavar="USER/REPOSITORY", help="upload the folder as a data set, too")
    parser.add_argument("--cache_dir")
    arguments = parser.parse_args(argv)
    try:
        out = publish(arguments.name, arguments.data_dir, arguments.out, arguments.cache_dir)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Wrote {out}")
    if arguments.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(arguments.push_to_hub, repo_type="dataset", exist_ok=True)
        print(api.upload_folder(repo_id=arguments.push_to_hub, repo_type="dataset", folder_path=out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
