"""The progress of an evaluation on disk: finished batches while it runs, one rows file at its end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import datasets
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from data_scripts.files import write_json, write_text
from metrics.gres import read_rows

from .config import EvaluationConfig

Batch = list[list[dict[str, Any]]]  # the metric rows of each image of a batch


class EvaluationProgress:
    """The rows file of an evaluation, `rows_X.jsonl`, and the files beside it while it runs.

    `rows_X.meta.json` holds everything that the rows depend on. `rows_X.partN.jsonl` holds the finished batches of process
    N, one JSON line each. Every process enters and leaves the `with` block:

        with EvaluationProgress(path, identity, resume=True) as progress:
            result = evaluate_rows(model, processor, config, progress)
            ...  # write everything that is made from the rows

    Leaving it in the ordinary way removes the part files. After an exception they stay, and `resume=True` goes on from them.

    Args:
        path: The rows file.
        identity: Everything that the rows depend on, by name (`evaluation_identity`). Only the main process needs it.
        resume: Go on with the finished batches of an earlier start.
        save_masks: Write the predicted masks into the rows file, too.

    Attributes:
        finished: The batches that an earlier start has finished, by number.
        is_complete: Whether an earlier start has finished the whole evaluation.

    Raises:
        ValueError: On entering, if `resume` is set and the earlier start was another evaluation.
    """

    def __init__(
        self, path: str | Path, identity: dict[str, Any] | None, resume: bool = False, save_masks: bool = False
    ):
        self.path, self.identity, self.resume, self.save_masks = Path(path), identity, resume, save_masks
        self.meta = self.path.with_suffix(".meta.json")
        self.part = self.path.with_suffix(f".part{PartialState().process_index}.jsonl")
        self.finished: dict[int, Batch] = {}
        self.is_complete = False

    def __enter__(self) -> Self:
        """Open the progress on the main process and tell the others the outcome, an error included."""
        state = PartialState()
        outcome: list[Any] = [None]
        if state.is_main_process:
            try:
                outcome = [self._open()]
            except ValueError as error:
                outcome = [error]
        if state.num_processes > 1:
            broadcast_object_list(outcome)
        if isinstance(outcome[0], ValueError):
            raise outcome[0]
        self.is_complete = outcome[0] is None
        self.finished = outcome[0] or {}
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None and PartialState().is_main_process:
            for part in self._parts():
                part.unlink()

    def add(self, number: int, rows_by_image: Batch) -> None:
        """Keep a finished batch."""
        with self.part.open("a", encoding="utf-8") as file:
            file.write(_line(number, rows_by_image))

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write the rows file. The parts stay until the block is left, so that a kill in between loses nothing."""
        hidden = set() if self.save_masks else {"prediction"}
        lines = ({name: value for name, value in row.items() if name not in hidden} for row in rows)
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in lines))

    def read(self) -> list[dict[str, Any]]:
        """Return the rows of the rows file."""
        return read_rows(self.path)

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(self.path.with_suffix(".part*.jsonl").name))

    def _open(self) -> dict[int, Batch] | None:
        """Return the finished batches by number, or None if the evaluation is complete. Remove stale files."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        finished: dict[int, Batch] = {}
        stale = self._parts()
        if self.resume and self.meta.exists():
            self._check_identity()
            if not stale and self.path.exists():
                return None
            for part in stale:
                finished.update(_batches_of(part))
        if finished:
            # One file holds all finished batches before the others go: a kill loses them at no moment.
            write_text(self.part, "".join(_line(number, rows) for number, rows in sorted(finished.items())))
        for part in stale:
            if not finished or part != self.part:
                part.unlink()
        self.path.unlink(missing_ok=True)  # it holds the rows of an older evaluation
        write_json(self.meta, self.identity)
        return finished

    def _check_identity(self) -> None:
        try:
            earlier = dict(json.loads(self.meta.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.meta} does not say what was begun ({error}); start again without --resume_eval."
            ) from None
        now = self.identity or {}
        changed = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
        if changed:
            changes = "; ".join(f"{name} was {earlier.get(name)!r}, is now {now.get(name)!r}" for name in changed)
            raise ValueError(
                f"{self.path} was begun with something else and cannot be continued: {changes}. Give what it was begun "
                "with, or start again without --resume_eval."
            )


def _line(number: int, rows_by_image: Batch) -> str:
    return json.dumps({"batch": number, "pictures": rows_by_image}) + "\n"


def _batches_of(part: Path) -> dict[int, Batch]:
    """Return the batches of a part file. A last line that a kill left half-written does not count."""
    *lines, _half_line = part.read_text(encoding="utf-8").split("\n")
    return {entry["batch"]: entry["pictures"] for entry in map(json.loads, lines)}


def stored_images(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return the rows with their images as they are stored, not decoded."""
    return rows.cast_column("image", datasets.Image(decode=False)) if isinstance(rows, datasets.Dataset) else rows


def _digest(*pieces: bytes) -> str:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()[:16]


def _image_bytes(image: Any) -> bytes:
    """Return the bytes of a stored image, or those of its file."""
    if not isinstance(image, dict):
        return image.tobytes()
    if image["bytes"] is not None:
        return image["bytes"]
    return Path(image["path"]).read_bytes() if os.path.exists(image["path"]) else b"missing"


def evaluation_identity(model, processor, config: EvaluationConfig) -> dict[str, Any]:
    """Return everything that rows depend on, by name; the data, the model and the processor as digests."""
    data, weights = hashlib.sha256(), hashlib.sha256()
    saved_name = getattr(model, "saved_name", str)  # the names of evaluations that began before there were other bases
    for row in stored_images(config.rows):
        facts = {name: value for name, value in row.items() if name != "image"}
        data.update(json.dumps(facts, sort_keys=True, default=str).encode() + _image_bytes(row["image"]))
    for name, value in model.state_dict().items():
        name = saved_name(name)
        weights.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if value.device.type != "meta":  # a sample of the values: reading all 7 billion weights would take minutes
            weights.update(value.detach().flatten()[:: max(value.numel() // 64, 1)].float().cpu().numpy().tobytes())
    tokenizer = processor.tokenizer
    tokens = [sorted(tokenizer.get_vocab().items()), repr(sorted(tokenizer.added_tokens_decoder.items()))]
    wording = [processor.prompts, processor.chat_template, processor.image_settings(), tokens]
    options: dict[str, Any] = {
        **{name: getattr(config, name) for name in ("dataset", "split", "protocol", "prompts", "ignore_region")},
        "task": "reasoning" if config.is_reasoning else "referring",
    }
    if config.protocol == "slots":
        options["threshold"] = config.used_threshold
    elif config.protocol == "generate":
        options["max_new_tokens"] = config.max_new_tokens
        options["generation_config"] = _digest(model.generation_config.to_json_string().encode())
    if model.config.rejection:  # the rows' probabilities depend on it
        options["rejection"] = model.config.rejection_values
    towers = (getattr(part, "vision_config", None) for part in (model.config.vlm_config, model.config.sam_config))
    parts = [part for part in (model.config.text_config, *towers) if part is not None]
    return {
        **options,
        **config.labels,
        "batch_size": config.batch_size,
        "threads": config.threads,
        "attention": [part._attn_implementation for part in parts],
        "samples": len(config.rows),
        "data": data.hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
        "processor": _digest(json.dumps(wording, sort_keys=True, default=str).encode()),
    }
