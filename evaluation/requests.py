"""What is asked about images, prepared for the model: prompts that fit its context, and batches with little padding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import fsspec
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from modeling_gsva.pipeline_gsva import joined_images
from modeling_gsva.segmentation_gsva import context_length

MAX_EXPRESSIONS = 2000  # of one image
MAX_CHARACTERS = 10_000  # of one expression or question
MAX_PADDING = 0.1  # share of a batch's tokens or pixels that may be padding
TEXTS = ("input_ids", "attention_mask", "answer_ids", "answer_attention_mask")
Entry = TypeVar("Entry")


def check_expressions(expressions: Sequence[str]) -> None:
    """Raise ValueError for more expressions than an image can be asked for, or one that no prompt can hold."""
    if len(expressions) > MAX_EXPRESSIONS:
        raise ValueError(
            f"{len(expressions)} expressions are more than an image is asked for at once, {MAX_EXPRESSIONS}: give fewer, in "
            "several runs."
        )
    for expression in expressions:
        check_text(expression)


def check_text(text: Any, name: str = "expression") -> None:
    """Raise ValueError for an expression or question that is no string, or is longer than any prompt."""
    if not isinstance(text, str):
        raise ValueError(f"The {name} is of type {type(text).__name__}; give a string.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"The {name} {text[:40]!r}... has {len(text)} characters, more than {MAX_CHARACTERS}; give a short one."
        )


@dataclass
class Prompt:
    """One prompt about an image, as the model's inputs.

    Args:
        tensors: `TEXTS`, each (1, length).
        expressions: What it asks for; None for a free question.
    """

    tensors: dict[str, torch.Tensor]
    expressions: list[str] | None

    @property
    def lengths(self) -> tuple[int, int]:
        """Return the lengths of prompt and answer in tokens."""
        answer = self.tensors.get("answer_ids")
        return self.tensors["input_ids"].shape[1], 0 if answer is None else answer.shape[1]


@dataclass
class Request:
    """One image with its prompts, ready for the model.

    Args:
        facts: The columns that all rows of the request have, such as `image_id`.
        image_key: The same for requests about one image.
        image_tensors: The inputs that describe the image.
        prompts: The prompts; none if `errors` hold all that was asked.
        errors: (what was asked, why it cannot be answered).
    """

    facts: dict[str, Any]
    image_key: str = ""
    image_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    prompts: list[Prompt] = field(default_factory=list)
    errors: list[tuple[str | None, str]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the size of the image's largest input, without its first dimension."""
        return tuple(max(self.image_tensors.values(), key=torch.Tensor.numel).shape[1:])


class Asking:
    """Prepares requests by the processor alone, so that threads do it while the model works.

    Args:
        processor: Of the model.
        config: Of the model, for its context.
        max_new_tokens: Room for a generated answer; None where the answer's wording is given.
        one_prompt_per_expression: Ask for each expression in a separate prompt.
    """

    prompt = "refer"

    def __init__(self, processor, config, max_new_tokens: int | None = None, one_prompt_per_expression: bool = False):
        self.processor, self.max_new_tokens, self.is_one_by_one = processor, max_new_tokens, one_prompt_per_expression
        self.context = context_length(config.text_config) or math.inf

    def about_expressions(self, image: Any, expressions: Sequence[str], facts: dict[str, Any]) -> Request:
        """Return the request for expressions in an image, in as many prompts as they need.

        What cannot be asked (an empty expression, one with a special token, one longer than the context) is among the
        errors of the request, and so are all expressions of an image that cannot be read.
        """
        request, asked = Request(facts), []
        try:
            if len(expressions) > MAX_EXPRESSIONS:
                check_expressions(expressions)
            picture = self._read(image, request)
        except (ValueError, OSError) as error:
            unanswered: list[str | None] = [text if isinstance(text, str) else None for text in expressions]
            request.errors += [(text, str(error)) for text in unanswered or [None]]
            return request
        if not expressions:
            request.errors.append((None, "There is no expression; give one at least."))
        for text in expressions:
            try:
                check_text(text)
                self.processor.normalize_expression(text, self.prompt)
                asked.append(text)
            except ValueError as error:
                request.errors.append((text if isinstance(text, str) else None, str(error)))
        for group in [[text] for text in asked] if self.is_one_by_one else [asked]:
            self._add_prompts(request, picture, group)
        return request

    def about_question(self, image: Any, question: str, facts: dict[str, Any]) -> Request:
        """Return the request for a free question about an image."""
        request = Request(facts)
        try:
            check_text(question, "question")
            picture = self._read(image, request)
            content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            prompt = self._prompt(request, inputs, None)
            self._check_fit(prompt)
            request.prompts.append(prompt)
        except (ValueError, OSError) as error:
            request.errors.append((None, str(error)))
        return request

    def _read(self, image: Any, request: Request) -> Image.Image:
        """Return an image in any form as an upright RGB image, and note its size and what tells it from others."""
        (picture,) = self.processor.sam_image_processor.read_images([readable(image)])
        request.facts |= {"height": picture.height, "width": picture.width}
        digest = hashlib.sha256(picture.tobytes())
        digest.update(repr(picture.size).encode())
        request.image_key = digest.hexdigest()
        return picture

    def _add_prompts(self, request: Request, picture: Image.Image, expressions: list[str]) -> None:
        """Add the prompts for expressions: one, or, where that is too long, those of each half of them."""
        if not expressions:
            return
        inputs = self.processor(images=[picture], expressions=[expressions], prompt=self.prompt, return_tensors="pt")
        prompt = self._prompt(request, inputs, expressions)
        try:
            self._check_fit(prompt)
            request.prompts.append(prompt)
        except ValueError as error:
            if len(expressions) == 1:
                request.errors.append((expressions[0], str(error)))
                return
            request.facts["is_split"] = True
            half = (len(expressions) + 1) // 2
            self._add_prompts(request, picture, expressions[:half])
            self._add_prompts(request, picture, expressions[half:])

    def _prompt(self, request: Request, inputs: Any, expressions: list[str] | None) -> Prompt:
        """Return the text of the processor's output, and keep its image."""
        no_image = (*TEXTS, "expressions", "image_index")
        request.image_tensors = {
            name: value for name, value in inputs.items() if name not in no_image and "token_type_ids" not in name
        }
        return Prompt({name: inputs[name] for name in TEXTS if name in inputs}, expressions)

    def _check_fit(self, prompt: Prompt) -> None:
        """Raise ValueError if a prompt does not fit the model's context with its answer."""
        length, answer = prompt.lengths
        answer = self.max_new_tokens or answer
        if length + answer > self.context:
            raise ValueError(
                f"The prompt has {length} tokens and its answer {answer}, which is more than the model's context of "
                f"{self.context}; shorten it."
            )


def readable(image: Any) -> Any:
    """Return an image whose file lies elsewhere, such as on the Hub or in an archive, as its bytes; others as they are.

    Raises:
        OSError: The file cannot be read.
    """
    if isinstance(image, Mapping) and image.get("bytes") is None and "://" in (image.get("path") or ""):
        with fsspec.open(image["path"], "rb") as file:
            return {**image, "bytes": file.read()}
    return image


def padding(shapes: Sequence[tuple[int, ...]], size: Callable[[tuple[int, ...]], float]) -> float:
    """Return the share of padding when things of these shapes are padded to the largest of each dimension.

    >>> padding([(8, 2), (10, 2)], sum)
    0.0833...
    """
    largest = tuple(max(sides) for sides in zip(*shapes, strict=True))
    return 1 - sum(map(size, shapes)) / (len(shapes) * size(largest))


def batches(
    entries: Sequence[Entry],
    shape: Callable[[Entry], tuple[int, ...]],
    most: int,
    size: Callable[[tuple[int, ...]], float] = math.prod,
    order: Callable[[Entry], Any] | None = None,
) -> list[list[Entry]]:
    """Return entries in batches of at most `most` with at most `MAX_PADDING` padding, similar ones together.

    The same entries always give the same batches.

    Args:
        shape: The shape of an entry; all have as many dimensions in a batch.
        size: What a shape costs: the product of its sides, or their sum.
        order: Sorts the entries of one shape further.

    >>> batches([(5,), (20,), (5,), (19,), (5,)], lambda entry: entry, most=2)
    [[(5,), (5,)], [(5,)], [(19,), (20,)]]
    """

    def key(entry: Entry) -> tuple:
        return len(shape(entry)), shape(entry), order(entry) if order is not None else 0

    found: list[list[Entry]] = []
    for entry in sorted(entries, key=key):
        if found and len(found[-1]) < most:
            shapes = [shape(other) for other in (*found[-1], entry)]
            if len({len(one) for one in shapes}) == 1 and padding(shapes, size) <= MAX_PADDING:
                found[-1].append(entry)
                continue
        found.append([entry])
    return found


def joined_texts(prompts: Sequence[Prompt], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return prompts as one batch: all end, and all answers begin, in the same column."""
    return {
        name: pad_sequence(
            [prompt.tensors[name][0] for prompt in prompts],
            batch_first=True,
            padding_value=pad_token_id if name.endswith("_ids") else 0,
            padding_side="right" if name.startswith("answer") else "left",
        )
        for name in prompts[0].tensors
    }


def joined_pictures(requests: Sequence[Request]) -> dict[str, torch.Tensor]:
    """Return the images of requests as one batch."""
    return {
        name: joined_images([request.image_tensors[name] for request in requests])
        for name in requests[0].image_tensors
    }
