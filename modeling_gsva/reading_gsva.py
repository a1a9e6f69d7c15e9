"""Readers, which run the language model over conversations piece by piece: behind a key-value cache, or whole."""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import DynamicCache

from .cache_gsva import ConversationCache, common_length
from .language_gsva import PREFIX_LANGUAGE_MODELS, LanguageAdapter


@dataclass
class AnsweredBatch:
    """
    Conversations, each a prompt and its answer, with the encoded images they are about.

    Args:
        sequences: (conversations, length) token ids: prompts padded on the left, answers padded on the right.
        attention_mask: (conversations, length), 0 at padding.
        start: the column in which every answer begins.
        image_index: (conversations,) the image of each, -1 for none.
        vision_features: the images from `language.encode`, or None without images.
        sam_embeddings: the images from `get_sam_embeddings`, or None where no masks are made.
    """

    sequences: torch.LongTensor
    attention_mask: torch.Tensor
    start: int
    image_index: torch.LongTensor
    vision_features: Any = None
    sam_embeddings: torch.Tensor | list[torch.Tensor] | None = None

    def rows(self, rows: list[int]) -> "AnsweredBatch":
        """Return some of the conversations, with all images."""
        kept = {name: getattr(self, name)[rows] for name in ("sequences", "attention_mask", "image_index")}
        return replace(self, **kept)

    def with_answers(self, answers: torch.LongTensor, attention_mask: torch.Tensor) -> "AnsweredBatch":
        """Return prompts with their answers, (conversations, length) tokens and attention mask, behind them."""
        return replace(
            self,
            sequences=torch.cat([self.sequences, answers.to(self.sequences)], 1),
            attention_mask=torch.cat([self.attention_mask, attention_mask.to(self.attention_mask)], 1),
        )

    def inputs(self, language: LanguageAdapter) -> dict[str, Any]:
        """Return the arguments of a forward pass over the whole conversations."""
        is_answer = torch.zeros_like(self.sequences, dtype=torch.bool)
        is_answer[:, self.start :] = True
        return language.whole_inputs(
            self.sequences, self.attention_mask, is_answer, self.vision_features, self.image_index
        )


class PrefixCache:
    """
    Runs the language model over conversations piece by piece with a key-value cache.

    Pieces are padded on the left, so that each ends in the last column; the attention mask of the cache keeps that padding
    masked in all later pieces.

    Args:
        language: the interface to the language model.
        batch: the conversations. Tokens may still be changed until they are read.

    Raises:
        ValueError: a language model whose conversations cannot share a beginning.
    """

    def __init__(self, language: LanguageAdapter, batch: AnsweredBatch):
        if not language.shares_prefix:
            kind = language.config.model_type
            is_prefix_model = kind in PREFIX_LANGUAGE_MODELS
            why = (
                "image and prompt attend to each other both ways"
                if is_prefix_model
                else "its states run through padding"
            )
            raise ValueError(
                f"Prompts of {kind} cannot share the run of their beginning: {why}. Take reader_for, which runs each "
                "conversation whole."
            )
        self.language, self.batch, self.start = language, batch, batch.start
        self.sequences, self.attention_mask = batch.sequences, batch.attention_mask
        self.begins = [batch.start - length for length in batch.attention_mask[:, : batch.start].sum(1).tolist()]
        whole = batch.inputs(language)
        self.positions = whole.pop("position_ids")  # (B, L) or (axes, B, L)
        del whole["input_ids"], whole["attention_mask"]
        self.types = {name: whole.pop(name) for name in list(whole) if name.endswith("token_type_ids")}
        self.images = whole
        self.cache = DynamicCache() if language.has_windows else DynamicCache(config=language.text_config)
        self.cached = batch.attention_mask[:, :0]  # the attention mask of the cache's columns
        self.cached_columns = batch.sequences[:, :0]  # and their places in the conversation
        self.ids = batch.sequences[:, :0]  # and their tokens

    def resume(self, key_values: DynamicCache, ids: torch.LongTensor, mask: torch.Tensor) -> "PrefixCache":
        """
        Go on behind a cache whose columns hold the beginnings of our prompts: `ids` and `mask`, (conversations, columns).
        """
        self.cache, self.ids, self.cached = key_values, ids, mask.to(self.cached)
        self.cached_columns = (mask.long().cumsum(1) - 1).clamp(min=0)
        lengths = mask.sum(1).tolist()
        self.begins = [begin + length for begin, length in zip(self.begins, lengths)]
        if (ids.masked_fill(mask == 0, -1) == self.language.image_token_id).any():
            self.images = {}
        return self

    def prompts(self) -> list[list[int]]:
        """Return the tokens of each prompt, without padding."""
        return [row[begin : self.start] for row, begin in zip(self.sequences.tolist(), self.begins)]

    def behind_cache(self) -> tuple[torch.LongTensor, torch.Tensor]:
        """Return prompts and attention mask, (conversations, length), whose first columns are those of the cache."""
        width = max(self.start - begin for begin in self.begins)
        is_rest = torch.arange(self.start - width, self.start) >= torch.tensor(self.begins)[:, None]
        rest, mask = self.sequences[:, self.start - width : self.start], is_rest.to(self.cached)
        return torch.cat([self.ids, rest], 1), torch.cat([self.cached, mask], 1)

    def read_common(self) -> "PrefixCache":
        """
        Run the common prefix of all prompts about an image, including the image, once for all of them.

        The last token of a prompt is never shared, as it predicts the answer's first one. Returns the cache itself.
        """
        image_id, image_index = self.language.image_token_id, self.batch.image_index
        prompts = [row[begin : self.start - 1] for row, begin in zip(self.sequences.tolist(), self.begins)]
        groups: dict[tuple, list[int]] = {}  # rows of the same image whose prompts agree up to the end of the image
        for row, (prompt, image) in enumerate(zip(prompts, image_index.tolist())):
            through_image = max((n + 1 for n, token in enumerate(prompt) if token == image_id), default=0)
            groups.setdefault((image, *prompt[:through_image]), []).append(row)
        # The only prompt of an image is run up to the end of the image, the only one without an image to its end.
        common = [
            common_length([prompts[row] for row in rows]) if len(rows) > 1 else len(key) - 1 or len(prompts[rows[0]])
            for key, rows in groups.items()
        ]
        ends_in_image = (self.sequences[:, self.start - 1] == image_id).any()
        if len(groups) == len(self.sequences) or not any(common) or ends_in_image:
            return self
        firsts = [rows[0] for rows in groups.values()]
        shared = PrefixCache(self.language, self.batch.rows(firsts))
        shared.read([begin + length for begin, length in zip(shared.begins, common)])
        group_of = dict(sorted((row, n) for n, rows in enumerate(groups.values()) for row in rows))
        self._continue(shared, list(group_of.values()))
        self.begins = [begin + common[group_of[row]] for row, begin in enumerate(self.begins)]
        return self

    def _continue(self, other: "PrefixCache", rows: list[int]) -> None:
        """Continue after `other`: row n of this object follows row `rows[n]` of `other`."""
        self.cache, self.cached, self.cached_columns = other.cache, other.cached[rows], other.cached_columns[rows]
        self.images, self.ids = {}, other.ids[rows]
        self.cache.batch_select_indices(torch.tensor(rows, device=self.cached.device))

    def read(self, ends: list[int] | None = None) -> torch.Tensor:
        """
        Run each row from where it stopped up to its column of `ends`, by default to its end.

        Returns:
            (conversations, width, hidden) states; column p of row r of the sequences is at index p - ends[r].
        """
        ends = [self.sequences.shape[1]] * len(self.begins) if ends is None else ends
        pieces = list(zip(self.begins, ends))
        ids, mask = align_right(self.sequences, pieces), align_right(self.attention_mask, pieces)
        self.cached = torch.cat([self.cached, mask.to(self.cached)], 1)
        self.ids = torch.cat([self.ids, ids], 1)
        inputs = {
            "position_ids": align_right(self.positions, pieces),
            "past_key_values": self.cache,
            "use_cache": True,
        }
        types = {name: align_right(value, pieces) for name, value in self.types.items()} if self.images else {}
        attention_mask: Any = self.cached
        if self.language.has_windows:
            columns = (self.attention_mask.long().cumsum(1) - 1).clamp(min=0)
            columns = align_right(columns, pieces)
            self.cached_columns = torch.cat([self.cached_columns, columns], 1)
            is_image = types.get("token_type_ids")
            attention_mask = self.language.window_masks(self.cached, self.cached_columns, ids.shape[1], is_image)
        outputs = self.language.hidden(input_ids=ids, attention_mask=attention_mask, **inputs, **types, **self.images)
        self.images, self.begins = {}, ends
        return outputs.last_hidden_state

    def go_back(self, rows: list[int], column: int, sequences: torch.LongTensor) -> None:
        """Keep only these rows after all were read, and run them again from `column` on with other `sequences`."""
        forgotten = self.sequences.shape[1] - column
        self.cache.crop(-forgotten)
        self.cached, self.cached_columns = self.cached[:, :-forgotten], self.cached_columns[:, :-forgotten]
        self.ids = self.ids[:, :-forgotten]
        self._continue(self, rows)
        self.sequences, self.attention_mask = sequences[rows], self.attention_mask[rows]
        self.positions = self.positions[..., rows, :]
        self.begins = [column] * len(rows)


class WholePasses:
    """
    Does the same without a key-value cache, for models in which no prefix can be shared: runs conversations whole, up to a column.

    Args:
        language, batch: see [`PrefixCache`].
    """

    cache = ids = cached = None  # a conversation's cache keeps nothing but the images

    def __init__(self, language: LanguageAdapter, batch: AnsweredBatch):
        self.language, self.batch = language, batch
        lengths = batch.attention_mask[:, : batch.start].sum(1).tolist()
        self.firsts = [batch.start - length for length in lengths]
        self.begins = list(self.firsts)

    def read(self, ends: list[int] | None = None) -> torch.Tensor:
        """See `PrefixCache.read`; the states of earlier columns are returned as well."""
        ends = [self.batch.sequences.shape[1]] * len(self.firsts) if ends is None else ends
        pieces = list(zip(self.firsts, ends))
        is_answer = torch.zeros_like(self.batch.sequences)
        is_answer[:, self.batch.start :] = 1
        ids, mask, answer = (
            align_right(value, pieces) for value in (self.batch.sequences, self.batch.attention_mask, is_answer)
        )
        images = self.batch.vision_features, self.batch.image_index
        inputs = self.language.whole_inputs(ids, mask, answer.bool(), *images)
        self.begins = ends
        return self.language.hidden(**inputs, use_cache=False).last_hidden_state

    def go_back(self, rows: list[int], column: int, sequences: torch.LongTensor) -> None:
        """See `PrefixCache.go_back`."""
        self.batch = replace(self.batch.rows(rows), sequences=sequences[rows])
        self.firsts = [self.firsts[row] for row in rows]
        self.begins = [column] * len(rows)


def align_right(values: torch.Tensor, pieces: list[tuple[int, int]]) -> torch.Tensor:
    """Cut the columns `begin` to `end` out of each row of (..., rows, columns); padded with 0 on the left."""
    width = max(end - begin for begin, end in pieces)
    aligned = values.new_zeros(*values.shape[:-1], width)
    for row, (begin, end) in enumerate(pieces):
        if end > begin:
            aligned[..., row, begin - end :] = values[..., row, begin:end]
    return aligned


Reader: TypeAlias = PrefixCache | WholePasses


def reader_for(language: LanguageAdapter, batch: AnsweredBatch, cache: ConversationCache | None = None) -> Reader:
    """Return the reader of a batch, behind what `cache` holds of the prompts, or with their common prefixes read."""
    if not language.shares_prefix:
        return WholePasses(language, batch)
    reader = PrefixCache(language, batch)
    if cache is not None and cache.match(reader.prompts(), batch.image_index, language.image_token_id):
        return reader.resume(cache.key_values, cache.ids, cache.mask)
    return reader.read_common()


__all__ = ["AnsweredBatch", "PrefixCache", "Reader", "WholePasses", "reader_for"]
