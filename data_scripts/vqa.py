"""Conversations about images: LLaVA-Instruct-150k.

DATA_DIR/llava_dataset/llava_instruct_150k.json
DATA_DIR/coco/train2017/*.jpg
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from .builder import RowBuilder
from .records import at, entries, inside, read_json, require, short_repr
from .schema import VQA_FEATURES

ROLES = {"human": "user", "gpt": "assistant"}


class ConversationBuilder(RowBuilder):
    """One row per record. A record without an image is a conversation in words only."""

    FEATURES = VQA_FEATURES

    @property
    def path(self) -> Path:
        return self.root / "llava_dataset" / f"{self.title}.json"

    def files(self) -> list[Path]:
        return [require(self.path, f"the conversations of {self.title}")]

    def split_names(self) -> list[str]:
        return ["train"]

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        records = self.entries({"records": read_json(self.path)}, "records", str(self.path))
        for number, (_, record) in enumerate(records):
            row = self.attempt(self.row, number, record)
            if row is not None:
                yield row

    def row(self, number: int, record: dict[str, Any]) -> dict[str, Any]:
        """Return the row of a conversation. Raises ValueError if its turns or its image are wrong."""
        where = f"{self.path}: record {number} (id {short_repr(record.get('id'))})"
        turns = []
        for _, turn in entries({"conversations": [], **record}, "conversations", where):
            if turn.get("from") not in tuple(ROLES) or not isinstance(turn.get("value"), str):
                raise ValueError(
                    f"{where}: a turn needs a 'value' and 'from', one of {', '.join(ROLES)}, got "
                    f"{short_repr(turn.get('from'))}; correct the record or take it out."
                )
            turns.append({"role": ROLES[turn["from"]], "text": turn["value"]})
        if any(one["role"] == other["role"] for one, other in pairwise(turns)):
            raise ValueError(f"{where}: human and gpt must take turns; correct the record or take it out.")
        image = record.get("image")
        if image is None and any("<image>" in turn["text"] for turn in turns):
            raise ValueError(f"{where}: it mentions <image> but has no 'image'; add it or take the record out.")
        with at(where):
            path = str(inside(self.root / "coco" / "train2017", image)) if image else None
        return {
            "image": path and {"path": path, "bytes": None},
            "image_id": str(record.get("id", number)),
            "conversation": turns,
        }
