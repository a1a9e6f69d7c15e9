"""SegmentationMixin: `model.segment`, which answers expressions with masks by one of three methods."""

from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import ModelOutput

from .language_gsva import LanguageAdapter


@dataclass
class GsvaSegmentationOutput(ModelOutput):
    """
    Output of [`GsvaForConditionalGeneration.segment`], one entry per conversation.

    Args:
        method: how the answers were made: "slots", "generate" or "teacher_forced".
        sequences: (conversations, length) token ids of prompt and answer as the model gave it, padded.
        answer_starts: (conversations,) position at which each answer begins in `sequences`.
        mask_logits: per conversation (slots, height, width) low-resolution logits; constant zero where rejected.
        scores: per conversation (slots,) log-odds of `[SEG]` against `[REJ]`.
        is_rejected: per conversation (slots,) booleans.
        iou_scores: per conversation (slots,), the mask decoder's own estimate of its mask's IoU.
        image_index: (conversations,) which image each conversation is about, -1 for none.
    """

    method: str | None = None
    sequences: torch.LongTensor | None = None
    answer_starts: torch.LongTensor | None = None
    mask_logits: tuple[torch.Tensor, ...] | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    is_rejected: tuple[torch.Tensor, ...] | None = None
    iou_scores: tuple[torch.Tensor, ...] | None = None
    image_index: torch.LongTensor | None = None


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

    def inputs(self, language: LanguageAdapter) -> dict[str, Any]:
        """Return the arguments of a forward pass over the whole conversations."""
        is_answer = torch.zeros_like(self.sequences, dtype=torch.bool)
        is_answer[:, self.start :] = True
        return language.whole_inputs(
            self.sequences, self.attention_mask, is_answer, self.vision_features, self.image_index
        )


@dataclass
class SlotAnswers:
    """
    The slots of a batch of answers, in reading order, and the model's decisions on them.

    Args:
        places: (slots, 2), conversation and position of each in `sequences`.
        states: (slots, hidden), the hidden states that predict them.
        rejected: (slots,) booleans.
        has_mask: (slots,) booleans, the slots for which a mask is decoded.
        scores: (slots,) log-odds of `[SEG]` against `[REJ]`.
    """

    places: torch.LongTensor
    states: torch.Tensor
    rejected: torch.Tensor
    has_mask: torch.Tensor
    scores: torch.Tensor


def check_method(method: str, answer_ids: torch.Tensor | None, generate_kwargs: dict) -> None:
    """Raise ValueError for an unknown method, or arguments that do not belong to it."""
    if method not in ("slots", "generate", "teacher_forced"):
        raise ValueError(f"method={method!r} is not known; choose 'slots', 'generate' or 'teacher_forced'.")
    if method != "generate" and answer_ids is None:
        raise ValueError(
            f"method={method!r} needs answer_ids, the answers' wording: build the inputs with processor(images=..., "
            "expressions=...), or use method='generate' for free questions."
        )
    if method != "generate" and generate_kwargs:
        raise ValueError(f"{sorted(generate_kwargs)} only apply to method='generate', not to {method!r}.")


def check_padding(attention_mask: torch.Tensor) -> None:
    """Raise ValueError for prompts that are padded on the right."""
    if not attention_mask[:, -1].all():
        raise ValueError(
            "Prompts are padded on the right, but answers follow them: pad them on the left (padding_side='left'), as "
            "processor(images=..., expressions=...) does."
        )


def common_length(rows: list[list[int]]) -> int:
    """Return how many tokens at the beginning are the same in all rows."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows)))


class PrefixCache:
    """
    Runs the language model over conversations piece by piece with a key-value cache.

    Pieces are padded on the left, so that each ends in the last column; the attention mask of the cache keeps that padding
    masked in all later pieces.

    Args:
        language: the interface to the language model.
        batch: the conversations. Tokens may still be changed until they are read.
    """

    def __init__(self, language: LanguageAdapter, batch: AnsweredBatch):
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
        """Continue from what `other` has run: our n-th row follows its row `rows[n]`."""
        self.cache, self.cached, self.cached_columns = other.cache, other.cached[rows], other.cached_columns[rows]
        self.images = {}
        self.cache.batch_select_indices(torch.tensor(rows, device=self.cached.device))

    def read(self, ends: list[int] | None = None) -> torch.Tensor:
        """
        Run each row from where it stopped up to its column of `ends`, by default to its end.

        Returns:
            (conversations, width, hidden) states; column p of row r of the sequences is at p - ends[r].
        """
        ends = [self.sequences.shape[1]] * len(self.begins) if ends is None else ends
        pieces = list(zip(self.begins, ends))
        ids, mask = align_right(self.sequences, pieces), align_right(self.attention_mask, pieces)
        self.cached = torch.cat([self.cached, mask.to(self.cached)], 1)
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
        """After reading to the end: keep only these rows, and run them from `column` on with their other `sequences`."""
        forgotten = self.sequences.shape[1] - column
        self.cache.crop(-forgotten)
        self.cached, self.cached_columns = self.cached[:, :-forgotten], self.cached_columns[:, :-forgotten]
        self._continue(self, rows)
        self.sequences, self.attention_mask = sequences[rows], self.attention_mask[rows]
        self.positions = self.positions[..., rows, :]
        self.begins = [column] * len(rows)


class WholePasses:
    """
    Does the same without a cache, for models in which no prefix can be shared: runs conversations whole, up to a column.

    Args:
        language, batch: see [`PrefixCache`].
    """

    def __init__(self, language: LanguageAdapter, batch: AnsweredBatch):
        self.language, self.batch = language, batch
        lengths = batch.attention_mask[:, : batch.start].sum(1).tolist()
        self.firsts = [batch.start - length for length in lengths]
        self.begins = list(self.firsts)

    def read_common(self) -> "WholePasses":
        return self

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


def reader_for(language: LanguageAdapter, batch: AnsweredBatch) -> PrefixCache | WholePasses:
    """Return the reader of a batch, with the prompts' common prefixes read."""
    return (PrefixCache if language.shares_prefix else WholePasses)(language, batch).read_common()


_Base: Any = PreTrainedModel if TYPE_CHECKING else object  # a mixin, whose other attributes type checkers would miss


class SegmentationMixin(_Base):
    """
    `segment` and `segment_sequences`, for the class that has `language`, `generate`, `find_slots` and the masks' parts
    ([`GsvaForConditionalGeneration`]).
    """

    @torch.no_grad()
    def segment(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        answer_ids: torch.LongTensor | None = None,
        answer_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        vision_features: Any = None,
        sam_embeddings: torch.Tensor | list[torch.Tensor] | None = None,
        method: str = "slots",
        threshold: float = 0.0,
        original_sizes=None,
        reshaped_input_sizes=None,
        expressions=None,
        **generate_kwargs,
    ) -> GsvaSegmentationOutput:
        """
        Answer with masks: `model.segment(**processor(images=..., expressions=..., return_tensors="pt"))`.

        Args:
            input_ids, attention_mask: (conversations, length) prompts, padded on the left.
            answer_ids, answer_attention_mask: (conversations, length) the answers' wording, padded on the right, with
                `[SEG]` or `[REJ]` at each slot. `slots` only reads where the slots are.
            pixel_values, sam_pixel_values, image_index: see `forward`. Every image is encoded once.
            method: "slots": the answer's wording is given, each slot is the model's own choice and later slots see that
                choice. "generate": the answer is generated from the question alone, `generate_kwargs` go to `generate`.
                "teacher_forced", the original's published protocol: the slots of `answer_ids` (the gold ones) are in the
                input when later ones are decided, and masks come from a second pass in which every slot is `[SEG]`.
            threshold: a slot is rejected when its log-odds of `[SEG]` against `[REJ]` are below it ("slots"). Later slots
                see the likelier token of earlier ones whatever the threshold, so that no score depends on it.
            original_sizes, reshaped_input_sizes, expressions: not used here, for `post_process_segmentation`.

        Raises:
            ValueError: unknown method, answers missing where the method needs them, prompts padded on the right.
        """
        language = self.language
        images = {name: generate_kwargs.pop(name) for name in language.other_inputs if name in generate_kwargs}
        check_method(method, answer_ids, generate_kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        check_padding(attention_mask)
        if sam_embeddings is None and sam_pixel_values is not None:
            sam_embeddings = self.get_sam_embeddings(sam_pixel_values)
        if vision_features is None:
            vision_features = language.encode({**images, "pixel_values": pixel_values})
        if image_index is None:
            image_index = self._one_image_each(input_ids, sam_embeddings)

        if method == "generate":
            generate_kwargs |= language.generate_inputs(input_ids, vision_features, image_index)
            sequences = self.generate(input_ids, attention_mask=attention_mask, **generate_kwargs)
            sequences = sequences if isinstance(sequences, torch.Tensor) else sequences.sequences
            return self.segment_sequences(sequences, attention_mask, image_index, vision_features, sam_embeddings)
        assert answer_ids is not None  # checked above
        if answer_attention_mask is None:
            answer_attention_mask = torch.ones_like(answer_ids)
        batch = AnsweredBatch(
            torch.cat([input_ids, answer_ids.to(input_ids)], 1),
            torch.cat([attention_mask, answer_attention_mask.to(attention_mask)], 1),
            input_ids.shape[1],
            image_index,
            vision_features,
            sam_embeddings,
        )
        if method == "slots":
            return self._segment_slots(batch, threshold)
        return self._segment_teacher_forced(batch)

    @torch.no_grad()
    def segment_sequences(
        self,
        sequences: torch.LongTensor,
        attention_mask: torch.Tensor,
        image_index: torch.LongTensor,
        vision_features: Any = None,
        sam_embeddings: torch.Tensor | list[torch.Tensor] | None = None,
    ) -> GsvaSegmentationOutput:
        """
        Make the masks of sequences that `generate` returned, whatever its strategy, in one pass over the finished
        sequences; its hidden states equal those of the steps that wrote them.

        Args:
            sequences: (conversations × returned, prompt + new) ids.
            attention_mask: (conversations, prompt) of the prompts.
            image_index: (conversations,) the image of each, -1 for none.
            vision_features, sam_embeddings: from `language.encode` and `get_sam_embeddings`.
        """
        copies, start = len(sequences) // len(attention_mask), attention_mask.shape[1]  # num_return_sequences
        attention_mask = attention_mask.repeat_interleave(copies, 0)
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        answers = sequences[:, start:]
        is_end = torch.zeros_like(answers, dtype=torch.bool)
        for token in {pad, *(eos if isinstance(eos, list) else [eos])} - {None}:
            is_end |= answers == token
        alive = torch.cumsum(is_end, 1) - is_end.long() == 0  # up to and including the first end
        batch = AnsweredBatch(
            sequences,
            torch.cat([attention_mask, alive.to(attention_mask)], 1),
            start,
            image_index.repeat_interleave(copies, 0),
            vision_features,
            sam_embeddings,
        )
        places = self._answer_slots(batch)
        hidden = reader_for(self.language, batch).read()
        states = hidden[places[:, 0], places[:, 1] - 1 - sequences.shape[1]]
        rejected = sequences[places[:, 0], places[:, 1]] == self.config.rej_token_id
        return self._output(
            "generate", batch, SlotAnswers(places, states, rejected, ~rejected, self._slot_scores(states))
        )

    def _segment_teacher_forced(self, batch: AnsweredBatch) -> GsvaSegmentationOutput:
        """
        Decide as the original's `validate`/`eval_gres` (quirk Q3 of its data pipeline: gold answers are in the input). A
        slot is decided by the arg-max over the whole vocabulary one position earlier; any other token than the gold one
        counts as the opposite decision. Masks come from a second pass in which every slot is `[SEG]`.
        """
        seg_id, rej_id = self.config.seg_token_id, self.config.rej_token_id
        sequences, slots = batch.sequences, self._answer_slots(batch)
        rows, columns = slots[:, 0], slots[:, 1] - 1 - sequences.shape[1]
        reader = reader_for(self.language, batch)
        states = reader.read()[rows, columns]
        gold, likeliest = sequences[rows, slots[:, 1]], self.language.logits(states).argmax(-1)
        rejected = torch.where(gold == rej_id, likeliest == rej_id, likeliest != seg_id)
        scores = self._slot_scores(states)
        # The second pass differs only after a gold [REJ], which matters where another slot follows it.
        places = slots.tolist()
        absent = [place for place, token in zip(places, gold.tolist()) if token == rej_id]
        first = dict(reversed(absent))
        again = sorted({row for row, column in places if column > first.get(row, column)})
        if again:
            column = min(first[row] for row in again)
            reader.go_back(again, column, sequences.index_put(tuple(slots.T), gold.new_tensor(seg_id)))
            hidden = reader.read()
            for n, (row, place) in enumerate(places):
                if row in again and place > column:
                    states[n] = hidden[again.index(row), columns[n]]
        answers = SlotAnswers(slots, states, rejected, torch.ones_like(rejected), scores)
        return self._output("teacher_forced", batch, answers)

    def _segment_slots(self, batch: AnsweredBatch, threshold: float) -> GsvaSegmentationOutput:
        """
        Decide slot by slot with a key-value cache. Step k runs for every conversation the tokens between its slots k-1
        and k, beginning with the chosen token of slot k-1, and reads the choice for slot k at the last position. The
        likelier token always goes on; `threshold` only decides which slots are reported as rejected, so that scores do
        not depend on it.
        """
        seg_id, rej_id = self.config.seg_token_id, self.config.rej_token_id
        sequences, slots = batch.sequences, self._answer_slots(batch)
        per_row = [slots[slots[:, 0] == row, 1].tolist() for row in range(len(sequences))]
        states = sequences.new_zeros(len(slots), self.config.text_config.hidden_size, dtype=self.dtype)
        scores = torch.zeros(len(slots), device=states.device)
        order = {place: n for n, place in enumerate(map(tuple, slots.tolist()))}
        reader = reader_for(self.language, batch)
        for step in range(max(map(len, per_row), default=0)):
            # A conversation without a slot left runs nothing, except its prompt: the first step takes in all images.
            ends = [
                places[step] if step < len(places) else max(begin, batch.start)
                for places, begin in zip(per_row, reader.begins)
            ]
            last = reader.read(ends)[:, -1]  # (B, H)
            likely = self._slot_scores(last)
            for row, places in enumerate(per_row):
                if step < len(places):
                    sequences[row, places[step]] = rej_id if likely[row] < 0 else seg_id
                    place = order[row, places[step]]
                    states[place], scores[place] = last[row], likely[row]
        rejected = scores < threshold
        sequences[slots[:, 0], slots[:, 1]] = torch.where(rejected, rej_id, seg_id)
        return self._output("slots", batch, SlotAnswers(slots, states, rejected, ~rejected, scores))

    def _answer_slots(self, batch: AnsweredBatch) -> torch.LongTensor:
        """Return (slots, 2): conversation and position of each slot of the answers."""
        slots = self.find_slots(batch.sequences.masked_fill(batch.attention_mask == 0, -1))
        return slots[slots[:, 1] >= batch.start]

    def _slot_scores(self, states: torch.Tensor) -> torch.Tensor:
        logits = self._slot_logits(states)
        return logits[:, 0] - logits[:, 1]

    def _output(self, method: str, batch: AnsweredBatch, slots: SlotAnswers) -> GsvaSegmentationOutput:
        sequences = batch.sequences
        counts = torch.bincount(slots.places[:, 0], minlength=len(sequences)).tolist()
        result = GsvaSegmentationOutput(
            method=method,
            sequences=sequences,
            answer_starts=torch.full((len(sequences),), batch.start, device=sequences.device),
            scores=slots.scores.split(counts),
            is_rejected=slots.rejected.split(counts),
            image_index=batch.image_index,
        )
        if batch.sam_embeddings is not None:
            # A free answer may hold [SEG] where there is no image to segment.
            slot_images = batch.image_index[slots.places[:, 0]]
            has_mask = slots.has_mask & (slot_images >= 0)
            masks, iou = self._slot_masks(slots.states, has_mask, batch.sam_embeddings, slot_images)
            result.mask_logits, result.iou_scores = masks.split(counts), iou.split(counts)
        return result


__all__ = ["GsvaSegmentationOutput", "SegmentationMixin"]
