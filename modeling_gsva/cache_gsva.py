"""ConversationCache: what the model has read of conversations, so that the next turn costs only its own tokens."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


def common_length(rows: list[list[int]]) -> int:
    """Return how many tokens at the beginning are the same in all rows."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows)))


def can_crop(past_key_values) -> bool:
    """Return whether a cache holds every position of every layer, so that its end can be taken off."""
    return isinstance(past_key_values, DynamicCache) and all(
        type(layer) is DynamicLayer for layer in past_key_values.layers
    )


def crop_to(key_values: DynamicCache, columns: int) -> None:
    """Keep only the first `columns` positions."""
    if (surplus := key_values.get_seq_length() - columns) > 0:
        key_values.crop(-surplus)


class ConversationCache:
    """
    What the model has read of conversations, from turn to turn. Whoever holds a conversation makes one and gives it to each
    call of `segment` (or [`GsvaProcessor.stream`]) with the inputs of the whole conversation so far:

    ```python
    cache = ConversationCache()
    first = model.segment(**inputs, method="generate", cache=cache)
    second = model.segment(**longer_inputs, method="generate", cache=cache)  # runs only the new tokens
    ```

    It never changes an answer: tokens that differ from those read, and all of them with another image, model or number of
    conversations, are read again. It holds the keys and values, and the encoded images, of the last call.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self.clear()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let one call at a time use it (a streamed answer may still make its masks); after an error it is empty."""
        with self._lock:
            try:
                yield
            except BaseException:
                self.clear()
                raise

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        self.key_values: DynamicCache | None = None
        self.ids: Any = None
        self.mask: Any = None
        self.image_index: Any = None
        self.model = self.pixel_values = self.vision_features = self.sam_embeddings = None

    def images(self, model, has_image: bool, pixel_values, vision_features, sam_embeddings) -> tuple[Any, Any]:
        """Return the kept features where the images are those of the last call, or none were given; else the given ones."""
        same = (
            self.model is model
            and has_image
            and (
                _same(pixel_values, self.pixel_values)
                if pixel_values is not None
                else vision_features is None or _same(vision_features, self.vision_features)
            )
        )
        if not same:
            self.clear()
            return vision_features, sam_embeddings
        kept_sam = self.sam_embeddings if sam_embeddings is None else sam_embeddings
        return self.vision_features, kept_sam

    def keep(self, model, reader, pixel_values, vision_features, sam_embeddings, image_index) -> None:
        """Take over what `reader` has read."""
        self.model, self.key_values = model, reader.cache
        self.ids, self.mask, self.image_index = reader.ids, reader.cached, image_index
        self.pixel_values = self.pixel_values if pixel_values is None else pixel_values
        self.vision_features, self.sam_embeddings = vision_features, sam_embeddings

    def match(self, prompts: list[list[int]], image_index: torch.LongTensor, image_token_id: int) -> int:
        """
        Return how many columns of the cache begin all of these prompts, and crop it to them. The last token of a prompt is
        never among them, as it predicts the answer's first one, and an image is there as a whole or not at all.
        """
        if self.key_values is None or len(self.ids) != len(prompts) or not _same(image_index, self.image_index):
            return 0
        columns = self.ids.shape[1]
        for row, prompt in enumerate(prompts):
            places = self.mask[row].nonzero().flatten().tolist()
            same = common_length([self.ids[row, places].tolist(), prompt[:-1]])
            columns = min(columns, places[same] if same < len(places) else columns)
        kept = self.ids[:, :columns].masked_fill(self.mask[:, :columns] == 0, -1)
        in_cache = (kept == image_token_id).sum(1).tolist()
        if not (kept >= 0).any() or not can_crop(self.key_values):
            return 0
        if any(in_cache) and in_cache != [prompt.count(image_token_id) for prompt in prompts]:
            return 0
        crop_to(self.key_values, columns)
        self.ids, self.mask = self.ids[:, :columns], self.mask[:, :columns]
        return columns


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool(torch.equal(one.to(other), other))


__all__ = ["ConversationCache", "can_crop", "common_length", "crop_to"]
