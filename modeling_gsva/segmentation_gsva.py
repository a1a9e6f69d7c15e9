"""SegmentationMixin: `model.segment`, which answers expressions with masks by one of three methods."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from reprlib import repr as shown  # short, and safe for values that are nested deeply or contain themselves
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .cache_gsva import ConversationCache, can_crop, crop_to
from .reading_gsva import AnsweredBatch, PrefixCache, Reader, reader_for
from .transfer_gsva import to_device

# How many tokens `generate` writes where neither its arguments nor the generation configuration set a limit.
DEFAULT_NEW_TOKENS = 20


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
        probabilities: per conversation (slots,) probability that the expression is there, by the calibration in the
            configuration (`rejection`); the sigmoid of the score without one.
        is_rejected: per conversation (slots,) booleans.
        iou_scores: per conversation (slots,), the mask decoder's own estimate of its mask's IoU.
        object_scores: per conversation (slots,), the mask decoder's logits of an object being there; NaN where it makes no
            mask. None for mask models without them (SAM, SAM-HQ).
        image_index: (conversations,) which image each conversation is about, -1 for none.
        num_candidates: how many answers each prompt got (`num_return_sequences`). With several, "conversations" above are
            prompts × candidates, the candidates of a prompt one after the other, best first.
    """

    method: str | None = None
    sequences: torch.LongTensor | None = None
    answer_starts: torch.LongTensor | None = None
    mask_logits: tuple[torch.Tensor, ...] | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    probabilities: tuple[torch.Tensor, ...] | None = None
    is_rejected: tuple[torch.Tensor, ...] | None = None
    iou_scores: tuple[torch.Tensor, ...] | None = None
    object_scores: tuple[torch.Tensor, ...] | None = None
    image_index: torch.LongTensor | None = None
    num_candidates: int | None = None


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
        counts: the number of slots of each conversation.
    """

    places: torch.LongTensor
    states: torch.Tensor
    rejected: torch.Tensor
    has_mask: torch.Tensor
    scores: torch.Tensor
    counts: list[int]


def counted(places: list[list[int]], conversations: int) -> list[int]:
    """Return how many slots, as (conversation, position), each conversation has."""
    counts = Counter(row for row, _ in places)
    return [counts[row] for row in range(conversations)]


def check_threshold(threshold) -> None:
    """Raise ValueError for a threshold that is not a finite number: it would accept or reject whatever the model says."""
    try:
        is_finite = isinstance(threshold, Real) and not isinstance(threshold, bool) and isfinite(threshold)
    except OverflowError:  # a whole number beyond every float
        is_finite = False
    if not is_finite:
        raise ValueError(
            f"threshold={shown(threshold)} is not a finite number; give the log-odds of [SEG] against [REJ] below which a slot "
            "is rejected. 0.0 is the model's own choice, 1e9 rejects every slot and -1e9 none."
        )


def context_length(text_config) -> int | None:
    """Return how many positions a language model can tell apart, or None where its configuration sets no limit."""
    length = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if length is not None and rope.get("rope_type") in (
        "linear",
        "dynamic",
    ):  # the others' lengths are those after scaling
        length = int(length * (rope.get("factor") or 1.0))
    return length


def check_context(config, prompt: int, answer: int) -> None:
    """
    Raise ValueError if a prompt with its answer does not fit the language model's context.

    Args:
        config: the model's, a [`GsvaConfig`].
        prompt, answer: lengths in tokens; the image's positions are part of the prompt.
    """
    limit = context_length(config.text_config)
    if limit is not None and prompt + answer > limit:
        length = getattr(config, "image_seq_length", None)  # of other bases it depends on the image
        image = "" if length is None else f" (its image takes {length} of them)"
        raise ValueError(
            f"A prompt of {prompt} tokens{image} and an answer of {answer} make "
            f"{prompt + answer} positions, but the model has {limit} (max_position_embeddings). Ask for fewer expressions at "
            "once, for each in a prompt of its own (one_prompt_per_expression=True), or for a shorter answer "
            "(max_new_tokens)."
        )


def check_training_length(config, length: int) -> None:
    """Raise ValueError if a conversation to learn from, `length` tokens with its image, does not fit the model's context."""
    limit = context_length(config.text_config)
    if limit is not None and length > limit:
        raise ValueError(
            f"A conversation to learn from has {length} tokens with its image, but the model has {limit} positions "
            f"(max_position_embeddings). max_length={limit} cuts longer conversations (of the processor, or --max_length); "
            "fewer expressions per image make them shorter."
        )


def check_method(method: str, answer_ids: torch.Tensor | None, generate_kwargs: dict, cache=None) -> None:
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
    if cache is not None and method == "teacher_forced":
        raise ValueError("A cache only applies to method='slots' and 'generate', not to 'teacher_forced'.")


def check_padding(attention_mask: torch.Tensor) -> None:
    """Raise ValueError for prompts that are padded on the right."""
    if not attention_mask[:, -1].all():
        raise ValueError(
            "Prompts are padded on the right, but answers follow them: pad them on the left (padding_side='left'), as "
            "processor(images=..., expressions=...) does."
        )


_Base: Any = PreTrainedModel if TYPE_CHECKING else object  # a mixin, whose other attributes type checkers would miss


class SegmentationMixin(_Base):
    """
    `segment` and `segment_sequences`, for the class that has `language`, `generate`, `find_slots` and the masks' parts
    ([`GsvaForConditionalGeneration`]).
    """

    def new_cache(self) -> ConversationCache:
        """Return the cache of a new conversation, for `segment`."""
        return ConversationCache()

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
        threshold: float | None = None,
        original_sizes=None,
        reshaped_input_sizes=None,
        expressions=None,
        cache: ConversationCache | None = None,
        **generate_kwargs,
    ) -> GsvaSegmentationOutput:
        """
        Answer with masks: `model.segment(**processor(images=..., expressions=..., return_tensors="pt"))`.

        Args:
            input_ids, attention_mask: (conversations, length) prompts, padded on the left.
            answer_ids, answer_attention_mask: (conversations, length) the answers' wording, padded on the right, with
                `[SEG]` or `[REJ]` at each slot. `slots` only uses the positions of the slots.
            pixel_values, sam_pixel_values, image_index: see `forward`. Every image is encoded once.
            method: "slots": the answer's wording is given, each slot is the model's own choice and later slots see that
                choice. "generate": the answer is generated from the question alone, `generate_kwargs` go to `generate`.
                "teacher_forced", the original's published protocol: the slots of `answer_ids` (the gold ones) are in the
                input when later ones are decided, and masks come from a second pass in which every slot is `[SEG]`.
            threshold: a slot is rejected when its log-odds of `[SEG]` against `[REJ]` are below it ("slots"); by default
                the calibrated threshold in the configuration (`rejection`), or 0. Later slots see the likelier token of
                earlier ones whatever the threshold, so that no score depends on it.
            original_sizes, reshaped_input_sizes, expressions: ignored; `post_process_segmentation` uses them.
            cache: of the turns before, see [`ConversationCache`] ("slots" and "generate").

        Raises:
            ValueError: unknown method, answers missing where the method needs them, prompts padded on the right, a prompt
                that does not fit the language model's context with its answer, a threshold that is not a finite number.
        """
        language = self.language
        images = {name: generate_kwargs.pop(name) for name in language.other_inputs if name in generate_kwargs}
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if answer_ids is not None and answer_attention_mask is None:
            answer_attention_mask = torch.ones_like(answer_ids)
        check_method(method, answer_ids, generate_kwargs, cache)
        if threshold is None:
            threshold = self.config.rejection_values["threshold"]
        check_threshold(threshold)
        check_padding(attention_mask)
        if method == "generate":
            self.check_generation(attention_mask, generate_kwargs)
        elif answer_attention_mask is not None:
            for prompt, answer in zip(attention_mask.sum(1).tolist(), answer_attention_mask.sum(1).tolist()):
                check_context(self.config, prompt, answer)
        with nullcontext() if cache is None else cache.in_use():
            if cache is not None:
                has_image = bool((input_ids == self.config.image_token_id).any())
                given = pixel_values, vision_features, sam_embeddings
                vision_features, sam_embeddings = cache.images(self, has_image, *given)
            if sam_embeddings is None and sam_pixel_values is not None:
                sam_embeddings = self.get_sam_embeddings(sam_pixel_values)
            if vision_features is None:
                vision_features = language.encode({**images, "pixel_values": pixel_values})
            if image_index is None:
                image_index = self._one_image_each(input_ids, sam_embeddings)
            start = input_ids.shape[1]
            batch = AnsweredBatch(input_ids, attention_mask, start, image_index, vision_features, sam_embeddings)
            answers = answer_ids, answer_attention_mask
            outputs, reader = self._answer(batch, method, answers, threshold, generate_kwargs, cache)
            if cache is not None and outputs.num_candidates == 1:
                cache.keep(self, reader, pixel_values, vision_features, sam_embeddings, image_index)
            elif cache is not None:
                cache.clear()
            return outputs

    def _answer(
        self,
        prompts: AnsweredBatch,
        method: str,
        answers: tuple[torch.Tensor | None, torch.Tensor | None],
        threshold: float,
        options: dict[str, Any],
        cache: ConversationCache | None,
    ) -> tuple[GsvaSegmentationOutput, Reader]:
        """Answer prompts by a method, behind what `cache` holds of them; return the reader of the conversations as well."""
        if method == "generate":
            return self._segment_generated(prompts, options, cache)
        batch = prompts.with_answers(*answers)
        if method == "teacher_forced":
            return self._segment_teacher_forced(batch)
        reader = reader_for(self.language, batch, cache)
        return self._segment_slots(batch, threshold, reader), reader

    def _segment_generated(
        self, prompts: AnsweredBatch, options: dict[str, Any], cache: ConversationCache | None
    ) -> tuple[GsvaSegmentationOutput, Reader]:
        """Generate answers behind what `cache` holds of the prompts, and make their masks."""
        columns, image_id = 0, self.config.image_token_id
        input_ids, attention_mask = prompts.sequences, prompts.attention_mask
        if cache is not None and self._takes_cache(options):
            reader = PrefixCache(self.language, prompts)
            columns = cache.match(reader.prompts(), prompts.image_index, image_id)
        if cache is not None and columns:
            reader.resume(cache.key_values, cache.ids, cache.mask)
            options["past_key_values"] = cache.key_values
            copies = max(self._option(options, name) or 1 for name in ("num_beams", "num_return_sequences"))
            if copies > 1:  # `generate` expands its other inputs alone
                cache.key_values.batch_repeat_interleave(copies)
            input_ids, attention_mask = reader.behind_cache()
        images = prompts.vision_features, prompts.image_index
        if not (columns and (input_ids[:, :columns] == image_id).any()):
            options |= self.language.generate_inputs(input_ids, *images)
        options["return_dict_in_generate"] = True
        generated = self.generate(input_ids, attention_mask=attention_mask, **options)
        return self._read_generated(
            generated.sequences, attention_mask, prompts.image_index, prompts.vision_features, prompts.sam_embeddings,
            generated.get("past_key_values"),
        )  # fmt: skip

    def _option(self, options: dict, name: str):
        """Return an option of `generate`, from where it takes it."""
        config = options.get("generation_config") or self.generation_config
        return options[name] if name in options else getattr(config, name, None)

    def check_generation(self, attention_mask: torch.Tensor, options: dict) -> None:
        """Raise ValueError if prompts do not fit the context with the longest answer asked for, before images are encoded."""
        answer, length = (self._option(options, name) for name in ("max_new_tokens", "max_length"))
        if answer is None:
            answer = DEFAULT_NEW_TOKENS if length is None else length - attention_mask.shape[1]
        check_context(self.config, max(attention_mask.sum(1).tolist(), default=0), max(answer, 1))

    def _takes_cache(self, options: dict) -> bool:
        """Return whether `generate` can begin behind a cache: no other was asked for, and no draft model rewinds it."""
        others = ("cache_implementation", "prompt_lookup_num_tokens", "assistant_early_exit")
        is_other = any(self._option(options, name) for name in others) or not self.language.resumes_generation
        given = options.get("past_key_values") is not None or options.get("assistant_model") is not None
        return self._option(options, "use_cache") is not False and not is_other and not given

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
        return self._read_generated(sequences, attention_mask, image_index, vision_features, sam_embeddings)[0]

    def _read_generated(
        self, sequences, attention_mask, image_index, vision_features, sam_embeddings, past_key_values=None
    ) -> tuple[GsvaSegmentationOutput, Reader]:
        """Do as `segment_sequences`, from the prompts in the cache that `generate` returned; return the reader as well."""
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
        ends_in_image = (sequences[:, start - 1] == self.config.image_token_id).any()
        is_usable = self.language.resumes_generation and can_crop(past_key_values)
        if is_usable and past_key_values.get_seq_length() >= start > 1 and not ends_in_image:
            # The beams of a prompt have it in common; after the end of a row the cache holds padding, which is cut here.
            beams = len(past_key_values.layers[0].keys) // (len(sequences) // copies)
            crop_to(past_key_values, start - 1)
            rows = [row // copies * beams for row in range(len(sequences))]
            if rows != list(range(len(past_key_values.layers[0].keys))):
                past_key_values.batch_select_indices(torch.tensor(rows, device=sequences.device))
            prefix = sequences[:, : start - 1], batch.attention_mask[:, : start - 1]
            reader: Reader = PrefixCache(self.language, batch).resume(past_key_values, *prefix)
        else:
            reader = reader_for(self.language, batch)
        hidden = reader.read()
        states = hidden[places[:, 0], places[:, 1] - 1 - sequences.shape[1]]
        rejected = sequences[places[:, 0], places[:, 1]] == self.config.rej_token_id
        counts = counted(places.tolist(), len(sequences))
        answers = SlotAnswers(places, states, rejected, ~rejected, self._slot_scores(states), counts)
        outputs = self._output("generate", batch, answers)
        outputs.num_candidates = copies
        return outputs, reader

    def _segment_teacher_forced(self, batch: AnsweredBatch) -> tuple[GsvaSegmentationOutput, Reader]:
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
        counts = counted(places, len(sequences))
        absent = [place for place, token in zip(places, gold.tolist()) if token == rej_id]
        first = dict(reversed(absent))
        again = sorted({row for row, column in places if column > first.get(row, column)})
        if again:
            column = min(first[row] for row in again)
            reader.go_back(again, column, sequences.index_put(tuple(slots.T), gold.new_tensor(seg_id)))
            hidden = reader.read()
            last = sequences.shape[1] + 1
            later = [
                (n, again.index(row), place - last)
                for n, (row, place) in enumerate(places)
                if row in again and place > column
            ]
            numbers, rows, columns = to_device(later, hidden.device).T
            states[numbers] = hidden[rows, columns]
        answers = SlotAnswers(slots, states, rejected, torch.ones_like(rejected), scores, counts)
        return self._output("teacher_forced", batch, answers), reader

    def _segment_slots(self, batch: AnsweredBatch, threshold: float, reader: Reader) -> GsvaSegmentationOutput:
        """
        Decide slot by slot with a key-value cache. Step k runs for every conversation the tokens between its slots k-1
        and k, beginning with the chosen token of slot k-1, and reads the choice for slot k at the last position. The
        likelier token always goes on; `threshold` only decides which slots are reported as rejected, so that scores do
        not depend on it.
        """
        seg_id, rej_id = self.config.seg_token_id, self.config.rej_token_id
        sequences, slots = batch.sequences, self._answer_slots(batch)
        per_row: list[list[int]] = [[] for _ in range(len(sequences))]
        steps: list[list[tuple[int, int, int]]] = []  # of each step's slots: number, conversation and position
        for n, (row, column) in enumerate(slots.tolist()):
            if len(per_row[row]) == len(steps):
                steps.append([])
            steps[len(per_row[row])].append((n, row, column))
            per_row[row].append(column)
        states = sequences.new_zeros(len(slots), self.config.text_config.hidden_size, dtype=self.dtype)
        scores = torch.zeros(len(slots), device=states.device)
        of_steps = to_device([slot for step in steps for slot in step], states.device).reshape(len(slots), 3)
        for step, of_step in enumerate(of_steps.split(list(map(len, steps)))):
            # A conversation without a further slot runs nothing, except its prompt: the first step needs all images.
            ends = [
                places[step] if step < len(places) else max(begin, batch.start)
                for places, begin in zip(per_row, reader.begins)
            ]
            last = reader.read(ends)[:, -1]  # (B, H)
            likely = self._slot_scores(last).to(scores)
            numbers, rows, columns = of_step.T
            sequences[rows, columns] = torch.where(likely[rows] < 0, rej_id, seg_id).to(sequences)
            states[numbers], scores[numbers] = last[rows].to(states), likely[rows]
        rejected = scores < threshold
        sequences[slots[:, 0], slots[:, 1]] = torch.where(rejected, rej_id, seg_id)
        counts = list(map(len, per_row))
        return self._output("slots", batch, SlotAnswers(slots, states, rejected, ~rejected, scores, counts))

    def _answer_slots(self, batch: AnsweredBatch) -> torch.LongTensor:
        """Return (slots, 2): conversation and position of each slot of the answers."""
        slots = self.find_slots(batch.sequences.masked_fill(batch.attention_mask == 0, -1))
        return slots[slots[:, 1] >= batch.start]

    def _slot_scores(self, states: torch.Tensor) -> torch.Tensor:
        logits = self._slot_logits(states)
        return logits[:, 0] - logits[:, 1]

    def _output(self, method: str, batch: AnsweredBatch, slots: SlotAnswers) -> GsvaSegmentationOutput:
        sequences = batch.sequences
        counts = slots.counts
        rejection = self.config.rejection_values
        probabilities = torch.sigmoid(slots.scores.float() / rejection["temperature"] + rejection["offset"])
        result = GsvaSegmentationOutput(
            method=method,
            sequences=sequences,
            answer_starts=torch.full((len(sequences),), batch.start, device=sequences.device),
            scores=slots.scores.split(counts),
            probabilities=probabilities.split(counts),
            is_rejected=slots.rejected.split(counts),
            image_index=batch.image_index,
            num_candidates=1,
        )
        if batch.sam_embeddings is not None:
            # A free answer may hold [SEG] where there is no image to segment.
            slot_images = batch.image_index[slots.places[:, 0]]
            has_mask = slots.has_mask & (slot_images >= 0)
            self._slot_masks(result, slots.places, slots.states, has_mask, batch.sam_embeddings, batch.image_index)
        return result


__all__ = ["ConversationCache", "GsvaSegmentationOutput", "SegmentationMixin"]
