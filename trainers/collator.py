"""Examples of data_scripts → one batch of model inputs."""

from dataclasses import dataclass
from typing import Any

from transformers import BatchFeature, ProcessorMixin


@dataclass
class GsvaCollator:
    """
    Batches examples `{"image", "conversations", "masks"}` (see `data_scripts/transforms.py`). Every picture is stacked
    once, whatever number of conversations it has; conversations point to theirs by `image_index`.

    >>> batch = collator([{"image": picture, "conversations": [talk, talk], "masks": [mask, mask]},
    ...                   {"image": None, "conversations": [talk], "masks": [no_mask]}])  # doctest: +SKIP
    >>> batch["image_index"]  # doctest: +SKIP
    tensor([ 0,  0, -1])

    Args:
        processor: A [`GsvaProcessor`].
        max_length: Longest conversation in tokens, the placeholders of the image included.
    """

    processor: ProcessorMixin
    max_length: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> BatchFeature:
        images, conversations, image_index, masks = [], [], [], []
        for example in examples:
            if example["image"] is not None:
                images.append(example["image"])
            for conversation, mask in zip(example["conversations"], example["masks"], strict=True):
                conversations.append(conversation)
                shows = example["image"] is not None and any("<image>" in turn["content"] for turn in conversation)
                image_index.append(len(images) - 1 if shows else -1)
                masks.append(mask)
        return self.processor(
            images=images,
            conversations=conversations,
            image_index=image_index,
            masks=masks,
            max_length=self.max_length,
            return_tensors="pt",
        )
