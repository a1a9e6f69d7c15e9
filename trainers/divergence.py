"""Says early that training goes wrong, and writes the batch aside."""

import json
import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_scripts.files import write_text

logger = logging.getLogger(__name__)


class DivergenceWatch:
    """
    Looks at every training batch before its gradient counts.

    - A loss that is no number: the weights are still whole, so `mode="stop"` raises; "warn" goes on.
    - A spike: a loss above `factor` times the median of the last `window` ones, once half of them are there.
    - A collapse to `[REJ]`: of the last `window` batches' slots that should be `[SEG]` (at least `min_slots`) none is.

    Each is said with its step, and its batch goes to `OUTPUT_DIR/divergence/`: the tensors as safetensors (lists as
    `name.0`, `name.1` ...) and what happened, with the texts, as JSON; at most `max_files` batches in a run.

    Args:
        output_dir: Of the run.
        decode: Turns ids (conversations, length) into texts.
        mode: "stop", "warn" or "off".
        rank: Of the process, for the names of the files.
    """

    def __init__(
        self,
        output_dir: str | Path,
        decode=None,
        mode: str = "stop",
        rank: int = 0,
        window: int = 50,
        factor: float = 5.0,
        min_slots: int = 50,
        max_files: int = 5,
    ):
        self.folder, self.decode, self.mode, self.rank = Path(output_dir) / "divergence", decode, mode, rank
        self.factor, self.min_slots, self.max_files, self.files = factor, min_slots, max_files, 0
        self.window, self.losses = window, deque[float](maxlen=window)
        self.slots: deque[tuple[int, int]] = deque(maxlen=window)
        self.is_collapsed = False

    def see(
        self, step: int, parts: dict[str, float], inputs: dict[str, Any], outputs, seg_token_id: int
    ) -> str | None:
        """
        Args:
            step: The optimizer step that the batch is for.
            parts: `loss` and its parts as numbers of one size, however the batch is split up.
            inputs, outputs: Of the model.

        Returns:
            What is wrong, or None.

        Raises:
            FloatingPointError: the loss is no number and the mode is "stop".
        """
        if self.mode == "off":
            return None
        loss, wrong = parts["loss"], None
        if not math.isfinite(loss):
            wrong = f"the loss is {loss}"
        elif 2 * len(self.losses) >= self.window and loss > self.factor * statistics.median(self.losses) > 0:
            wrong = (
                f"the loss jumped to {loss:.4g}, {self.factor:g} times its median {statistics.median(self.losses):.4g}"
            )
        elif self._collapses(inputs, outputs, seg_token_id):
            wrong = f"not one of the last {sum(wanted for wanted, _ in self.slots)} slots that should be [SEG] is: all [REJ]"
        if math.isfinite(loss):
            self.losses.append(loss)
        if wrong is None:
            return None
        where = self._write(step, wrong, parts, inputs)
        message = f"Step {step}: {wrong}. {where}"
        if not math.isfinite(loss) and self.mode == "stop":
            raise FloatingPointError(
                f"{message} The weights are still those after step {step - 1}; resume from the last checkpoint with a lower "
                "--learning_rate, or look at the batch. --divergence warn goes on regardless."
            )
        logger.warning("%s", message)
        return wrong

    def _collapses(self, inputs, outputs, seg_token_id: int) -> bool:
        if outputs.get("slot_positions") is None:
            return False
        places = outputs["slot_positions"]
        wanted = inputs["input_ids"][places[:, 0], places[:, 1]] == seg_token_id
        said = outputs["slot_logits"].detach().argmax(1)[wanted] == 0
        self.slots.append((int(wanted.sum()), int(said.sum())))
        was = self.is_collapsed
        self.is_collapsed = (
            len(self.slots) == self.slots.maxlen
            and sum(n for n, _ in self.slots) >= self.min_slots
            and not any(n for _, n in self.slots)
        )
        return self.is_collapsed and not was  # said once, until it ends

    def _write(self, step: int, wrong: str, parts: dict[str, float], inputs: dict[str, Any]) -> str:
        if self.files >= self.max_files:
            return f"(Its batch is not written: {self.max_files} are.)"
        self.files += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step{step}-rank{self.rank}-{self.files}.safetensors"
        tensors = {}
        for name, value in inputs.items():
            pairs = (
                [(name, value)] if torch.is_tensor(value) else [(f"{name}.{n}", v) for n, v in enumerate(value or ())]
            )
            tensors.update({key: t.detach().cpu().contiguous() for key, t in pairs if torch.is_tensor(t)})
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary)
        temporary.replace(path)
        told = {"step": step, "rank": self.rank, "what": wrong, "losses": {n: _plain(v) for n, v in parts.items()}}
        if self.decode is not None:
            told["texts"] = self.decode(inputs["input_ids"])
        write_text(path.with_suffix(".json"), json.dumps(told, indent=1))
        return f"The batch is in {path}."


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN
