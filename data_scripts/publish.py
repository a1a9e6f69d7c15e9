"""Write a data set as a parquet folder with a card and embedded images, which plain `load_dataset(OUT)` opens.

python -m data_scripts.publish NAME DATA_DIR OUT [--push_to_hub USER/REPOSITORY]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import BUILDERS, load_builder
from .check import check
from .files import new_folder, refuse_existing, render

CARD = Path(__file__).parent / "templates" / "data_card.md.jinja"


def publish(name: str, data_dir: str | os.PathLike, out: str | os.PathLike, cache_dir: str | None = None) -> Path:
    """Write the folder `out`, whole or not at all, and return its path.

    Raises:
        FileExistsError: `out` exists.
        ValueError: The data set is not complete; the message is that of `data_scripts.check`.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out)  # now, since the check takes a while
    finding = check(name, data_dir, cache_dir=cache_dir)
    if finding.problems:
        raise ValueError(str(finding))
    with new_folder(out) as folder:
        builder = load_builder(name, data_dir, cache_dir)
        builder.download_and_prepare(str(folder / "data"), file_format="parquet")
        for unneeded in [*folder.glob("*.lock"), folder / "data" / "dataset_info.json"]:
            unneeded.unlink(missing_ok=True)
        card = render(
            CARD,
            name=name,
            folder=out.name,
            splits=[
                {"name": split, "images": count, "files": _files_of(folder, f"{builder.dataset_name}-{split}")}
                for split, count in finding.splits.items()
            ],
            has_expressions="expressions" in builder.FEATURES,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def _files_of(folder: Path, stem: str) -> list[str]:
    """Return the names of a split's files; a large split has several."""
    paths = [*folder.glob(f"data/{stem}.parquet"), *sorted(folder.glob(f"data/{stem}-*-of-*.parquet"))]
    return [path.name for path in paths]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` defaults to `sys.argv[1:]`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_scripts.publish", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=BUILDERS, metavar="NAME", help=f"the data set: {', '.join(BUILDERS)}")
    parser.add_argument("data_dir", help="the folder that holds the data set's files")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--push_to_hub", metavar="USER/REPOSITORY", help="also upload the folder as a data set")
    parser.add_argument("--cache_dir", help="the folder of the Arrow files; by default the cache of `datasets`")
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
