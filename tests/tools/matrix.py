"""Run pip install at one end of the declared ranges, for tox (pyproject.toml): `python tests/tools/matrix.py oldest|newest ARGUMENTS`.

The ranges are those of setup.cfg. "oldest" pins each library of LIBRARIES to its lower bound, "newest" lets pip choose. Other
packages have the versions of configs/constraints.txt, except those that the old libraries restrict themselves.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

from paths import ROOT

LIBRARIES = ("transformers", "datasets", "peft", "accelerate", "evaluate")
FOLLOWING = ("huggingface_hub", "tokenizers", "safetensors", "pyarrow", "fsspec", "dill", "multiprocess")
NAME = re.compile(r"[\w.-]+")


def ranges() -> dict[str, str]:
    """What setup.cfg requires: name -> its bounds, such as ">=5.21,<6"."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split("\n")
    return {name: line.removeprefix(name) for line in lines if (found := NAME.match(line)) and (name := found[0])}


def constraints(end: str) -> Iterator[str]:
    """The lines of pip's constraints file for one end of the ranges."""
    declared = ranges()
    for library in LIBRARIES:
        lower = re.match(r">=([\d.]+)", declared[library])
        if lower is None:
            raise ValueError(
                f"setup.cfg: {library} has no lower bound, only {declared[library]!r}; write >=VERSION first"
            )
        yield f"{library}=={lower[1]}" if end == "oldest" else library + declared[library]
    for line in (ROOT / "configs" / "constraints.txt").read_text().splitlines():
        if (found := NAME.match(line)) and found[0] not in LIBRARIES + FOLLOWING:
            yield line


def main() -> int:
    end, *arguments = sys.argv[1:]
    if end not in ("oldest", "newest"):
        raise SystemExit(f"{end!r} is no end of the ranges; known: oldest, newest")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "constraints.txt"
        path.write_text("\n".join(constraints(end)) + "\n")
        return subprocess.call([sys.executable, "-m", "pip", "install", "--constraint", str(path), *arguments])


if __name__ == "__main__":
    sys.exit(main())
