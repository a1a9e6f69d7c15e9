"""What one visitor has asked about one image. It knows nothing of web pages."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_scripts.files import replacing
from data_scripts.schema import encode_mask
from metrics.gres import mask_box

# Below every score, so that each expression gets a mask. No score depends on the threshold.
KEEP_ALL = -1e9
MAX_PIXELS = 4096 * 4096
MAX_EXPRESSIONS, MAX_CHARACTERS = 24, 300
MAX_NEW_TOKENS = 256


@dataclass
class Session:
    """An image, the turns of a conversation about it, and what the model has read of it.

    Args:
        image: RGB.
        cache: A `ConversationCache`, so that the image is encoded once however many turns there are.
        results: Of the last turn: the processor's results, with the masks of rejected expressions, too.
        answer: The answer's text to a free question; "" after a list of expressions.
        turns: Messages of the free conversation so far.
    """

    image: Image.Image
    cache: Any
    results: list[dict[str, Any]] = field(default_factory=list)
    answer: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)


class Assistant:
    """A model and its processor, as the page uses them.

    Args:
        model, processor: As the Auto classes load them.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model.eval(), processor

    @property
    def probability_threshold(self) -> float:
        """Return the probability below which the model rejects by its calibration."""
        values = self.model.config.rejection_values
        return 1 / (1 + math.exp(-(values["threshold"] / values["temperature"] + values["offset"])))

    def open(self, path: str | Path) -> Session:
        """Return a new session about an image file.

        Raises:
            ValueError: The file is no image, or one of too many pixels.
        """
        try:
            with Image.open(path) as opened:
                pixels = opened.width * opened.height
        except OSError:
            pixels = 0  # the processor says what is wrong with it
        if pixels > MAX_PIXELS:
            raise ValueError(f"The image has {pixels:,} pixels, more than {MAX_PIXELS:,}; make it smaller.")
        image = self.processor.sam_image_processor.fetch_images(str(path))
        array = self.processor.sam_image_processor.process_image(image)
        return Session(Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0))), self.model.new_cache())

    def ask(self, session: Session, expressions: Sequence[str]) -> None:
        """Segment expressions in the session's image.

        Raises:
            ValueError: No expressions, too many or too long ones, or one that the processor refuses.
        """
        expressions = [text.strip() for text in expressions if text.strip()]
        if not expressions:
            raise ValueError("There is no expression; write one on each line.")
        if len(expressions) > MAX_EXPRESSIONS:
            raise ValueError(f"{len(expressions)} expressions are more than {MAX_EXPRESSIONS}; ask in several turns.")
        for text in expressions:
            self._check_length(text)
        inputs = self.processor(images=[session.image], expressions=[expressions], return_tensors="pt")
        inputs = inputs.to(self.model.device)
        outputs = self.model.segment(**inputs, threshold=KEEP_ALL, cache=session.cache)
        (session.results,) = self.processor.post_process_segmentation(outputs, inputs, threshold=KEEP_ALL)
        session.answer, session.turns = "", []

    def ask_freely(self, session: Session, question: str) -> None:
        """Let the model answer a question in its own words; masks are those of the slots that it writes.

        Raises:
            ValueError: An empty or too long question, or a conversation that does not fit the model's context.
        """
        question = question.strip()
        if not question:
            raise ValueError("The question is empty; write one.")
        self._check_length(question)
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if not session.turns:
            content.insert(0, {"type": "image", "image": session.image})
        turns = [*session.turns, {"role": "user", "content": content}]
        inputs = self.processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        outputs = self.model.segment(
            **inputs, method="generate", max_new_tokens=MAX_NEW_TOKENS, do_sample=False, cache=session.cache
        )
        (session.results,) = self.processor.post_process_segmentation(outputs, inputs)
        answer = outputs.sequences[0, int(outputs.answer_starts[0]) :].tolist()
        session.answer = self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
        session.turns = [*turns, {"role": "assistant", "content": [{"type": "text", "text": session.answer}]}]

    @staticmethod
    def _check_length(text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{text[:40]!r}... has {len(text)} characters, more than {MAX_CHARACTERS}; shorten it.")


def decide(results: Sequence[dict[str, Any]], probability: float) -> list[dict[str, Any]]:
    """Return results decided anew, without the model: what is less probable than `probability` is rejected.

    An expression that a free answer rejects has no mask and stays rejected.
    """
    decided = []
    for result in results:
        is_rejected = result["is_rejected"] or not result["probability"] >= probability  # true for NaN
        mask = np.zeros_like(result["mask"]) if is_rejected else result["mask"]
        decided.append({**result, "is_rejected": is_rejected, "mask": mask})
    return decided


def as_json(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return results for JSON: masks as COCO run lengths, numbers that are not finite as null."""
    entries = []
    for result in results:
        numbers = {name: result[name] if math.isfinite(result[name]) else None for name in ("score", "probability")}
        mask = np.asarray(result["mask"], dtype=bool)
        entries.append(
            {
                "text": result["text"],
                "is_rejected": bool(result["is_rejected"]),
                **numbers,
                "area": int(mask.sum()),
                "mask": encode_mask(mask),
            }
        )
    return entries


def as_coco(image: Image.Image, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the kept masks in COCO's format of annotations (https://cocodataset.org/#format-data), a category each."""
    kept = [result for result in as_json(results) if not result["is_rejected"]]
    boxes = [list(mask_box(result["mask"])) for result in results if not result["is_rejected"]]
    return {
        "images": [{"id": 1, "file_name": "image.png", "height": image.height, "width": image.width}],
        "categories": [{"id": n, "name": one["text"]} for n, one in enumerate(kept, 1)],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": n, "segmentation": one["mask"], "area": one["area"], "bbox": box,
             "iscrowd": 0, "score": one["probability"]}
            for n, (one, box) in enumerate(zip(kept, boxes, strict=True), 1)
        ],
    }  # fmt: skip


def write_archive(image: Image.Image, results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a zip file with the image, a PNG for each kept mask, and `annotations.json` in COCO's format."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("image.png", "w") as file:
            image.save(file, format="PNG")
        kept = (result for result in results if not result["is_rejected"])
        for number, result in enumerate(kept, 1):
            with archive.open(f"mask_{number:02d}.png", "w") as file:
                Image.fromarray(np.asarray(result["mask"], dtype=np.uint8) * 255).save(file, format="PNG")
        archive.writestr("annotations.json", json.dumps(as_coco(image, results)))
