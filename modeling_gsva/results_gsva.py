"""What comes of an answer: its slots, the expressions that they belong to, and masks in the image's own pixels."""

from itertools import islice
from typing import Any

import numpy as np
import torch

from .image_processing_gsva import upscale_mask_logits
from .instances_gsva import check_probability, instances_of
from .prompts_gsva import strip_wording
from .segmentation_gsva import check_threshold
from .transfer_gsva import masks_to_host, to_device


class ResultsMixin:
    """The half of [`GsvaProcessor`] that reads answers; the other half prepares questions."""

    tokenizer: Any
    seg_token_id: int
    rej_token_id: int
    image_processor: Any

    @property
    def sam_image_processor(self):
        """Return what prepares images for the mask model."""
        return self.image_processor

    @property
    def mask_input_size(self) -> int:
        """Return the side of the mask model's square input in pixels."""
        return self.sam_image_processor.mask_input_size

    def read_answer(self, token_ids: list[int]) -> list[tuple[str, bool]]:
        """
        Return the slots of a free answer in order: the phrase before each, and whether it is rejected.

        >>> # "Sure, the dog:[SEG], a unicorn:[REJ]." → [("the dog", False), ("a unicorn", True)]
        """
        slots, begin = [], 0
        for position, token in enumerate(token_ids):
            if token in (self.seg_token_id, self.rej_token_id):
                phrase = self.tokenizer.decode(token_ids[begin:position], skip_special_tokens=True)
                slots.append((strip_wording(phrase), token == self.rej_token_id))
                begin = position + 1
        return slots

    def _match_slots(self, asked: list[str], slots: list[tuple[str, bool]]) -> tuple[list[int | None], bool]:
        """Return the slot that answers each expression, and whether the answer's slots are not those asked for."""
        # Strip the expressions as well: one may itself begin like an answer ("it is red").
        texts = [strip_wording(expression).lower() for expression in asked]
        phrases = [phrase.lower() for phrase, _ in slots]
        if len(slots) == len(asked) and all(not phrase or phrase == text for phrase, text in zip(phrases, texts)):
            return list(range(len(asked))), False
        free = list(range(len(slots)))
        matched: list[int | None] = []
        for text in texts:
            place = next((n for n in free if phrases[n] == text), None)
            if place is not None:
                free.remove(place)
            matched.append(place)
        return matched, True

    def _answers(
        self, asked: list[str] | None, slots: list[tuple[str, bool]], method: str
    ) -> tuple[list[str], list[int | None], bool]:
        """Return what a conversation asks for, the slot that answers each, and whether its slots are not those asked for."""
        if asked is None:
            return [phrase for phrase, _ in slots], list(range(len(slots))), False
        if method == "generate":
            return asked, *self._match_slots(asked, slots)
        return asked, list(range(len(asked))), False

    @staticmethod
    def _candidate(outputs, number: int):
        """Return the output that holds only the `number`-th answer of each prompt."""
        rows = slice(number, None, outputs.num_candidates)
        per_row = (
            *("sequences", "answer_starts", "mask_logits", "scores", "probabilities", "is_rejected", "iou_scores"),
            *("object_scores", "image_index"),
        )
        parts = {name: value[rows] for name in per_row if (value := outputs.get(name)) is not None}
        return type(outputs)(method=outputs.method, **parts)

    def post_process_segmentation(
        self,
        outputs,
        inputs,
        threshold: float | None = None,
        keep_rejected_masks: bool = False,
        as_tensors: bool = False,
    ) -> list[list[dict]]:
        r"""
        Return results in the image's own pixels.

        Args:
            outputs: the output of `model.segment(**inputs)`.
            inputs: the processor's output that it was called with.
            threshold: decide again by comparing scores with it. A slot that `segment` rejected has no mask, so a threshold
                below the one given to `segment` only adds empty masks; one above it rejects more.
            keep_rejected_masks: also return the masks of rejected slots where there are any (`teacher_forced` makes
                them: the original's metric scores a rejected target by its mask).
            as_tensors: leave the masks on their device, as boolean tensors. Otherwise their runs are copied to the host, once for
                the whole batch, and written out there.

        Returns:
            Per image, per expression `{"text", "mask", "is_rejected", "score", "probability", "is_malformed", "iou_score"}`: the
            expression (in free chat the phrase before the slot), a (height, width) boolean array (all False where
            rejected), the log-odds of `[SEG]` against `[REJ]` and the probability that the expression is there (both NaN
            where the answer has no slot for the expression, which counts as rejected), whether the answer's slots were not
            the ones asked for, and the mask decoder's own estimate of its mask's IoU (NaN where no mask was made). Where the
            mask model has an object score (SAM 2, SAM 3's tracker), `"object_score"` is its logit of an object being there,
            NaN where no mask was made. With `num_return_sequences` above 1, per image one such list for
            each candidate, the best first.
        """
        if threshold is not None:
            check_threshold(threshold)
        candidates = outputs.num_candidates or 1
        if candidates > 1:  # read the n-th answer of every prompt as if it were the only one
            parts = (self._candidate(outputs, number) for number in range(candidates))
            options = threshold, keep_rejected_masks, as_tensors
            answers = [self.post_process_segmentation(part, inputs, *options) for part in parts]
            return [list(of_image) for of_image in zip(*answers)]
        sizes, reshaped = (_as_sizes(inputs.get(name, ())) for name in ("original_sizes", "reshaped_input_sizes"))
        results: list[list[dict]] = [[] for _ in range(len(sizes))]
        asked_per_conversation = inputs.get("expressions")
        sequences, starts = outputs.sequences.tolist(), outputs.answer_starts.tolist()
        values = {
            name: _per_row(getattr(outputs, name))
            for name in ("scores", "probabilities", "object_scores", "iou_scores")
        }
        rejected_slots = _per_row(outputs.is_rejected) or []
        masks: list[torch.Tensor] = []  # of the conversations that have any, and the results that each belongs to
        owners: list[list[dict]] = []
        for row, image in enumerate(outputs.image_index.tolist()):
            if image < 0:
                continue
            answer = sequences[row][starts[row] :]
            slots = self.read_answer(answer)[: len(outputs.scores[row])]  # tokens after the end are not part of it
            asked = None if asked_per_conversation is None else asked_per_conversation[row]
            asked, matched, malformed = self._answers(asked, slots, outputs.method)
            kept: dict[int, list[dict]] = {}  # slots whose masks are shown, and the results that show them
            for text, n in zip(asked, matched):
                found = {name: float("nan") if n is None or of is None else of[row][n] for name, of in values.items()}
                was_rejected = n is None or rejected_slots[row][n]
                is_rejected = n is None or bool(was_rejected if threshold is None else found["scores"] < threshold)
                result = {
                    "text": text,
                    "mask": None,
                    "is_rejected": is_rejected,
                    "score": found["scores"],
                    "probability": found["probabilities"],
                    "is_malformed": malformed,
                    "iou_score": float("nan"),
                }
                if outputs.object_scores is not None:
                    result["object_score"] = found["object_scores"]
                # A slot that `segment` rejected has constant zero logits, which are not a mask.
                has_mask = outputs.mask_logits is not None and (not was_rejected or outputs.method == "teacher_forced")
                if has_mask:
                    result["iou_score"] = found["iou_scores"]  # NaN where the answer has no slot
                if n is not None and has_mask and (keep_rejected_masks or not is_rejected):
                    kept.setdefault(n, []).append(result)
                elif as_tensors:
                    result["mask"] = torch.zeros(*sizes[image], dtype=torch.bool, device=outputs.sequences.device)
                else:
                    result["mask"] = np.zeros(sizes[image], dtype=bool)
                results[image].append(result)
            if kept:
                logits = outputs.mask_logits[row]
                logits = logits[to_device(list(kept), logits.device)]
                logits = upscale_mask_logits(logits, reshaped[image], sizes[image], self.mask_input_size)
                # The original's threshold in eval_gres is >= 0 (utils: a logit of exactly zero is foreground).
                masks.append(logits >= 0)
                owners.extend(kept.values())
        finished = masks if as_tensors else masks_to_host(masks)
        for owner, mask in zip(owners, (mask for of_row in finished for mask in of_row)):
            for result in owner:
                result["mask"] = mask
        return results

    def post_process_instance_segmentation(
        self, outputs, inputs, threshold: float | None = None
    ) -> list[dict[str, Any]]:
        r"""
        Return results as detectors of transformers give them, such as SAM 3: only what is in the image, each with mask and box.
        `supervision.Detections.from_transformers(result, id2label=dict(enumerate(expressions)))` takes the result of an image.

        Args:
            outputs: the output of `model.segment(**inputs)`, with one answer for each prompt.
            inputs: the processor's output that it was called with.
            threshold: keep what has a probability above it; by default what `segment` did not reject. What it rejected has
                no mask, so no threshold brings that back.

        Returns:
            Per image a dictionary of its n kept expressions, in the order asked for; those without any pixel are left out:

            - `scores` (n,): the probability that the expression is there.
            - `labels` (n,): its number in the image's list of expressions, `text_labels` (a list of n): its text.
            - `boxes` (n, 4): left, top, right, bottom in pixels; right and bottom are behind the last pixel.
            - `masks` (n, 1, height, width): booleans. The second dimension is what supervision wants of masks with boxes.

        Raises:
            ValueError: a threshold that is no probability, or several candidates for each prompt.
        """
        if threshold is not None:
            check_probability(threshold)
        if (candidates := outputs.num_candidates or 1) > 1:
            raise ValueError(
                f"The outputs hold {candidates} answers for each prompt, of which the instances cannot be told apart; ask with "
                "num_return_sequences=1, or take post_process_segmentation."
            )
        results = self.post_process_segmentation(outputs, inputs)
        sizes = [(int(height), int(width)) for height, width in inputs.get("original_sizes", ())]
        return [instances_of(of_image, size, threshold) for of_image, size in zip(results, sizes)]


def _as_sizes(values) -> list[tuple[int, int]]:
    """Return sizes (images, 2), a tensor, an array or a list, as (height, width) each."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return [(int(height), int(width)) for height, width in values]


def _per_row(values: tuple[torch.Tensor, ...] | None) -> list[list] | None:
    """Return tensors of different lengths as lists, read at once."""
    if not values:
        return None if values is None else []
    rest = iter(torch.cat(list(values)).tolist())
    return [list(islice(rest, len(part))) for part in values]
