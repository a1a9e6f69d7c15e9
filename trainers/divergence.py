"""Notice early that training goes wrong, and save the batch at which it does."""

import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_scripts.files import replacing, write_json

from .output_folder import DIVERGENCE

logger = logging.getLogger(__name__)


class DivergenceWatch:
    """
    Checks every training batch before its gradient counts.

    - A loss that is NaN or infinite: the weights are still good, so `mode="stop"` raises; "warn" goes on.
    - A spike: a loss above `factor` times the median of the last `window` losses, once half of them are there.
    - A collapse to `[REJ]`: the last `window` batches have at least `min_slots` slots that should be `[SEG]`, and the model
      answers `[REJ]` in all of them.

    Each event is reported with its step. Its batch is saved in `OUTPUT_DIR/divergence/`: the tensors as safetensors
    (lists as `name.0`, `name.1` ...), losses and texts as JSON. At most `max_files` batches are saved in a run.

    Args:
        output_dir: Output folder of the run.
        decode: Function that turns token ids (conversations, length) into texts.
        mode: "stop", "warn" or "off".
        rank: Rank of the process, for the file names.
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
        self.folder, self.decode, self.mode, self.rank = Path(output_dir) / DIVERGENCE, decode, mode, rank
        self.factor, self.min_slots, self.max_files, self.files = factor, min_slots, max_files, 0
        self.window, self.losses = window, deque[float](maxlen=window)
        self.slots: deque[tuple[int, int]] = deque(maxlen=window)
        self.is_collapsed = False

    def check_batch(
        self, step: int, losses: dict[str, float], inputs: dict[str, Any], outputs, seg_token_id: int
    ) -> str | None:
        """
        Return the problem with a batch in words, or None.

        Args:
            step: Optimizer step that the batch belongs to.
            losses: `loss` and its parts, scaled so that batches of any split can be compared.
            inputs: Inputs of the model.
            outputs: Outputs of the model.
            seg_token_id: Id of `[SEG]`.

        Raises:
            FloatingPointError: The loss is NaN or infinite and the mode is "stop".
        """
        if self.mode == "off":
            return None
        loss, problem = losses["loss"], None
        if not math.isfinite(loss):
            problem = f"the loss is {loss}"
        elif 2 * len(self.losses) >= self.window and loss > self.factor * statistics.median(self.losses) > 0:
            problem = (
                f"the loss jumped to {loss:.4g}, {self.factor:g} times its median {statistics.median(self.losses):.4g}"
            )
        elif self._collapses(inputs, outputs, seg_token_id):
            count = sum(expected for expected, _ in self.slots)
            problem = f"not one of the last {count} slots that should be [SEG] is: all [REJ]"
        if math.isfinite(loss):
            self.losses.append(loss)
        if problem is None:
            return None
        message = f"Step {step}: {problem}. {self._save_batch(step, problem, losses, inputs)}"
        if not math.isfinite(loss) and self.mode == "stop":
            raise FloatingPointError(
                f"{message} The weights are still those after step {step - 1}; begin again in another "
                "--output_dir with a lower --learning_rate, or look at the batch. --divergence warn goes on regardless."
            )
        logger.warning("%s", message)
        return problem

    def _collapses(self, inputs, outputs, seg_token_id: int) -> bool:
        """Return whether a collapse to [REJ] begins with this batch; a lasting collapse is reported once."""
        if outputs.get("slot_positions") is None:
            return False
        positions = outputs["slot_positions"]
        expects_seg = inputs["input_ids"][positions[:, 0], positions[:, 1]] == seg_token_id
        answers_seg = expects_seg & (outputs["slot_logits"].detach().argmax(1) == 0)
        expected, answered = torch.stack([expects_seg.sum(), answers_seg.sum()]).tolist()
        self.slots.append((expected, answered))
        was_collapsed = self.is_collapsed
        self.is_collapsed = (
            len(self.slots) == self.slots.maxlen
            and sum(expected for expected, _ in self.slots) >= self.min_slots
            and not any(answered for _, answered in self.slots)
        )
        return self.is_collapsed and not was_collapsed

    def _save_batch(self, step: int, problem: str, losses: dict[str, float], inputs: dict[str, Any]) -> str:
        """Save the batch and return a sentence that says where it is."""
        if self.files >= self.max_files:
            return f"(Its batch is not saved: {self.max_files} batches are.)"
        self.files += 1
        path = self.folder / f"step{step}-rank{self.rank}-{self.files}.safetensors"
        tensors = {}
        for name, value in inputs.items():
            pairs = (
                [(name, value)] if torch.is_tensor(value) else [(f"{name}.{n}", v) for n, v in enumerate(value or ())]
            )
            tensors.update({key: t.detach().cpu().contiguous() for key, t in pairs if torch.is_tensor(t)})
        with replacing(path) as temporary:
            save_file(tensors, temporary)
        # JSON has no NaN
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
        report: dict[str, Any] = {"step": step, "rank": self.rank, "problem": problem, "losses": numbers}
        if self.decode is not None:
            report["texts"] = self.decode(inputs["input_ids"])
        write_json(path.with_suffix(".json"), report)
        return f"The batch is in {path}."
