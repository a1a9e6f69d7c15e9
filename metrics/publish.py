"""Push the GRES metric to the Hub as a Space, from which `evaluate.load("USER/gres")` takes it.

python -m metrics.publish USER/gres [--dry_run]

The Space has a page (`app.py`) on which people paste rows. --dry_run shows the files and pushes nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "gres"
MODULE = "gres.py"


def space_files() -> list[str]:
    """Return the files of the Space: its page, its card, and the module with the siblings that `evaluate.load` copies."""
    siblings = re.findall(r"^from \.(\w+) import", (FOLDER / MODULE).read_text(encoding="utf-8"), re.MULTILINE)
    return ["README.md", "app.py", MODULE, *(f"{name}.py" for name in siblings), "requirements.txt"]


def check_name(repository: str) -> str:
    """Return the name of a Space from which evaluate can load the metric.

    Raises:
        ValueError: evaluate would look for another file: in a Space NAME, it takes NAME.py.
    """
    if repository.split("/")[-1] != Path(MODULE).stem:
        raise ValueError(
            f"{repository!r} is not named {Path(MODULE).stem}; evaluate.load takes NAME.py of a Space NAME, so give "
            f"USER/{Path(MODULE).stem}."
        )
    return repository


def push(repository: str) -> str:
    """Create the Space unless it exists, upload its files, and return its address."""
    from huggingface_hub import HfApi  # imported here, since a dry run does not need it

    api = HfApi()
    address = api.create_repo(repository, repo_type="space", space_sdk="gradio", exist_ok=True)
    api.upload_folder(
        repo_id=address.repo_id,
        repo_type="space",
        folder_path=FOLDER,
        allow_patterns=space_files(),
        commit_message="The GRES metric",
    )
    return str(address)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` defaults to `sys.argv[1:]`. An expected failure ends it with status 1 and one line."""
    parser = argparse.ArgumentParser(
        prog="python -m metrics.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("repository", metavar="USER/gres", help="the Space to create or to bring up to date")
    parser.add_argument("--dry_run", action="store_true", help="show the files and push nothing")
    options = parser.parse_args(argv)
    try:
        repository = check_name(options.repository)
        for name in space_files():
            print(f"{(FOLDER / name).stat().st_size:>8} bytes  {name}")
        if options.dry_run:
            print(f"nothing was pushed to {repository}")
        else:
            print(push(repository))
    except (OSError, ValueError) as error:
        print(f"metrics.publish: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
