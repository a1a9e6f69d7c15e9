"""Rows of an evaluation on disk: finished batches while it runs, one file at its end."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_scripts.files import write_text
from metrics.gres import read_rows


class KeptRows:
    """
    `rows_X.jsonl` and what lies beside it while it is made: `rows_X.meta.json`, what the rows depend on, and
    `rows_X.partN.jsonl`, the finished batches of process N, one JSON line each.

    Args:
        path: The rows file.
        process: Number of this process. Only process 0 calls `begin`, `write` and `close`.
    """

    def __init__(self, path: Path, process: int = 0):
        self.path = Path(path)
        self.meta = self.path.with_suffix(".meta.json")
        self.part = self.path.with_suffix(f".part{process}.jsonl")

    def parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(self.path.with_suffix(".part*.jsonl").name))

    def begin(self, fingerprint: dict[str, Any], resume: bool) -> dict[int, list[list[dict[str, Any]]]] | None:
        """
        The finished batches, {number: rows of each picture}; None if the evaluation was complete.

        Raises:
            ValueError: `resume`, but what was begun is not what shall be continued.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        finished: dict[int, list[list[dict[str, Any]]]] = {}
        if resume and self.meta.exists():
            try:
                begun = dict(json.loads(self.meta.read_text(encoding="utf-8")))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.meta} does not say what was begun ({error}); start anew without --resume_eval."
                ) from None
            self._check(begun, fingerprint)
            parts = self.parts()
            if not parts and self.path.exists():
                return None
            for part in parts:
                finished.update(_finished(part))
        stale = self.parts()
        # One file holds what was finished before the others go: no moment at which a kill loses it.
        kept = "".join(_line(number, pictures) for number, pictures in sorted(finished.items()))
        if finished:
            write_text(self.part, kept)
        for part in stale:
            if not finished or part != self.part:
                part.unlink()
        self.path.unlink(missing_ok=True)  # the rows of an older evaluation are not this one's
        write_text(self.meta, json.dumps(fingerprint, indent=1))
        return finished

    def _check(self, begun: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        changed = [name for name in {**begun, **fingerprint} if begun.get(name) != fingerprint.get(name)]
        if changed:
            told = "; ".join(f"{name} was {begun.get(name)!r}, is now {fingerprint.get(name)!r}" for name in changed)
            raise ValueError(
                f"{self.path} was begun with something else and cannot be continued: {told}. Give what it was begun "
                "with, or start anew without --resume_eval."
            )

    def add(self, number: int, pictures: list[list[dict[str, Any]]]) -> None:
        """Keeps a finished batch."""
        with self.part.open("a", encoding="utf-8") as file:
            file.write(_line(number, pictures))

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Writes the rows file; the parts stay until `close`, so that a kill in between loses nothing."""
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def read(self) -> list[dict[str, Any]]:
        return read_rows(self.path)

    def close(self) -> None:
        """Removes the parts, when everything made from them has been written."""
        for part in self.parts():
            part.unlink()


def _line(number: int, pictures: list[list[dict[str, Any]]]) -> str:
    return json.dumps({"batch": number, "pictures": pictures}) + "\n"


def _finished(part: Path) -> dict[int, list[list[dict[str, Any]]]]:
    """The batches of a part; a last line that a kill left half-written is none."""
    *lines, rest = part.read_text(encoding="utf-8").split("\n")
    del rest  # empty, or half a line
    return {entry["batch"]: entry["pictures"] for entry in map(json.loads, lines)}
