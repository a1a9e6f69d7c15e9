"""A list of skipped images in a file, which all processes and workers of a run share."""

from __future__ import annotations

import os
from pathlib import Path


class SkipList:
    """Images that a run has skipped, one line each.

    Every worker process appends to the same file, so that the main process can list them all at the end.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def add(self, message: object) -> None:
        """Add one skipped image. Lines of several processes do not mix: each is appended in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = " ".join(str(message).split()) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode("utf-8", "backslashreplace"))

    def summary(self) -> str:
        """Return the skipped images with their number, or "" if there are none."""
        lines = self.read()
        return f"\nskipped {len(lines)} images:\n" + "".join(f"  {line}\n" for line in lines) if lines else ""

    def read(self) -> list[str]:
        """Return the lines in order, each once; an image is met again in every epoch."""
        if not self.path.exists():
            return []
        return list(dict.fromkeys(self.path.read_text(encoding="utf-8").splitlines()))
