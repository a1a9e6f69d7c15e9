"""From a row of facts to a training example: which expressions, which wording, in which order.

Every transform is a pure function of (row, seed, epoch, index): the same numbers give the same example in any worker,
on any rank, after any resume. The wordings are GSVA's (LeapLabTHU/GSVA at 618dc79, model/llava/constants.py and
data/*_dataset.py) and can be replaced. `Qn` in a comment is a quirk of the original's training data that is kept or
put right on purpose; `data_scripts/README.md` lists them.

An example is `{"image", "image_id", "conversations", "masks"}`: the picture (PIL, RGB, upright; None if no
conversation shows it), its name, conversations as lists of `{"role": "user" | "assistant", "content": str}`, and for
each conversation a uint8 array (slots, height, width) with one mask for each `[SEG]` or `[REJ]` in its answers.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from PIL import Image, ImageOps

from .schema import check_size, decode_mask, mask_area, shown

Example = dict[str, Any]


class PictureError(ValueError):
    """A picture that is missing, damaged, or not of the size that its annotations state."""


class Draws:
    """The random choices of one example, determined by the numbers in `key`.

    >>> Draws(0, 1, 2).subset(5, 3) == Draws(0, 1, 2).subset(5, 3)
    True
    """

    def __init__(self, *key: int):
        self.generator = np.random.default_rng(key)

    def subset(self, n: int, k: int) -> list[int]:
        """`k` of `n` in random order; all of them in their own order when there are fewer than `k`."""
        return self.generator.permutation(n)[:k].tolist() if n >= k else list(range(n))

    def index(self, n: int, of: str) -> int:
        """One of `n`; `of` says what is chosen."""
        return int(self.generator.integers(n))

    def chance(self, of: str) -> float:
        """A number in [0, 1)."""
        return float(self.generator.random())

    def weighted(self, weights: Sequence[float], of: str) -> int:
        """The place of one of `weights`, drawn in proportion to them."""
        edges = np.cumsum(weights) / np.sum(weights)
        return int(np.searchsorted(edges, self.generator.random(), side="right"))


# what the processor reads as tokens of its own; data may hold it as ordinary text (Q36)
_RESERVED = re.compile(r"<(/?s|unk|pad|image|im_start|im_end)>|\[(SEG|REJ)\]", re.IGNORECASE)


def escape(text: str) -> str:
    """Take the brackets off everything in a text that would be read as a special token.

    >>> escape("the <image> of a [SEG] sign")
    'the image of a SEG sign'
    """
    return _RESERVED.sub(lambda match: (match[1] or match[2]).lstrip("/"), text)


def clean_expression(text: str) -> str:
    """An expression without blanks and dots at its ends; may be empty, then there is nothing to ask for.

    The original strips blanks before dots only, so "a ." kept a blank and "..." became an empty name (Q22).

    >>> clean_expression(" The man. .")
    'The man'
    """
    return escape(text).strip(" \t\r\n.")


@dataclass(frozen=True)
class Wording:
    """Question and answer templates for several expressions in one picture; one of each is drawn per example.

    `questions` have one `{}` for the joined names. An answer is an opening and a part with `{}` for one name and
    `[SEG]` for its slot, drawn together. The question is lower-cased, the answer is not (Q20).
    """

    # SHORT_QUESTION_LIST_MODE4
    questions: tuple[str, ...] = (
        "<image>\nCan you segment {} in this image?",
        "<image>\nPlease segment {} in this image.",
        "<image>\nWhat are {} in this image? Please respond with segmentation masks.",
        "<image>\nWhat are {} in this image? Please output segmentation masks.",
    )
    # ANSWER_LIST_MODE4_START, ANSWER_LIST_MODE4_TEMPLATE
    answers: tuple[tuple[str, str], ...] = (
        ("The segmentation results are", "{} [SEG]"),
        ("Sure, they are", "{}:[SEG]"),
        ("Sure,", "the mask of {} is [SEG]"),
        ("Sure,", "the segmentation of {} is [SEG]"),
        ("Sure,", "the referred {} is [SEG]"),
    )
    separator: str = ", "

    def question(self, template: int, names: Sequence[str]) -> str:
        return self.questions[template].replace("{}", ", ".join(names).lower())

    def part(self, template: str, name: str, present: bool) -> str:
        # only the slot turns into [REJ]; the original rewrites "SEG" within the name, too (Q19)
        return template.replace("[SEG]", "[SEG]" if present else "[REJ]").replace("{}", name)

    def answer(self, template: int, names: Sequence[str], present: Sequence[bool]) -> str:
        opening, part = self.answers[template]
        parts = (self.part(part, name, there) for name, there in zip(names, present, strict=True))
        return f"{opening} {self.separator.join(parts)}."


# the original joins the answers of the semantic sets without a blank (Q21)
SEMANTIC_WORDING = Wording(separator=",")


@dataclass(frozen=True)
class ReasoningWording:
    """Templates for one expression per conversation, with or without an explanation in words (ReasonSeg)."""

    # SHORT_QUESTION_LIST: a phrase, lower-cased
    phrase_questions: tuple[str, ...] = (
        "<image>\nCan you segment the {} in this image?",
        "<image>\nPlease segment the {} in this image.",
        "<image>\nWhat is {} in this image? Please respond with segmentation mask.",
        "<image>\nWhat is {} in this image? Please output segmentation mask.",
    )
    # LONG_QUESTION_LIST: a sentence, as it stands
    sentence_questions: tuple[str, ...] = (
        "<image>\n{} Please respond with segmentation mask.",
        "<image>\n{} Please output segmentation mask.",
    )
    # EXPLANATORY_QUESTION_LIST; "explaination" is the original's spelling (Q39)
    explanatory_questions: tuple[str, ...] = (
        "Please output segmentation mask and explain why.",
        "Please output segmentation mask and explain the reason.",
        "Please output segmentation mask and give some explaination.",
    )
    # ANSWER_LIST
    answers: tuple[str, ...] = (
        "It is [SEG].",
        "Sure, [SEG].",
        "Sure, it is [SEG].",
        "Sure, the segmentation result is [SEG].",
        "[SEG].",
    )


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """A picture whose header has been read and whose pixels have not, from a path or its bytes.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It is no picture, or one of more pixels than `schema.max_image_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError:
        raise
    except (
        OSError,
        SyntaxError,
        ValueError,
        ArithmeticError,
        LookupError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    try:
        check_size((image.height, image.width))
    except ValueError:
        image.close()
        raise
    return image


@overload
def read_image(image: None, size: tuple[int, int] | None = None) -> None: ...
@overload
def read_image(image: dict | Image.Image, size: tuple[int, int] | None = None) -> Image.Image: ...
def read_image(image: Any, size: tuple[int, int] | None = None) -> Image.Image | None:
    """A row's `image` field (None, a PIL picture, or `{"path", "bytes"}`) as an upright RGB picture.

    The EXIF orientation is applied, as OpenCV does for the original.

    Args:
        image: The field, decoded or not.
        size: (height, width) that the annotations state, if any.

    Raises:
        PictureError: The file is missing or damaged, or of another size; the message names it.
    """
    if image is None:
        return None
    name = getattr(image, "filename", "") or "a picture"
    try:
        if isinstance(image, dict):
            name = image.get("path") or name
            source = image.get("bytes") if image.get("bytes") is not None else image.get("path")
            if not isinstance(source, (str, bytes)):
                raise ValueError(f"neither its path nor its bytes are given: {shown(image)}")
            image = open_image(source)
        elif isinstance(image, Image.Image):
            check_size((image.height, image.width))
        else:
            raise ValueError(f"a picture is a path and bytes, got {shown(image)}")
        image = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise PictureError(f"The picture {name} is missing; put it there or take its record out.") from None
    except (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, struct.error) as error:
        raise PictureError(f"The picture {name} cannot be read ({error}); download it again.") from None
    if size is not None and image.size != (size[1], size[0]):
        raise PictureError(
            f"The picture {name} is {image.size[1]} x {image.size[0]} (height x width, upright), but its annotations "
            f"are for {size[0]} x {size[1]}; take picture and annotations from one release."
        )
    return image


def _talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Transform:
    """What all transforms share: reading the picture last, when it is known that there is something to ask."""

    def words(self, row: dict[str, Any], draws: Draws) -> tuple[list[list[dict]], list[np.ndarray]] | None:
        """Conversations and their masks, or None when the row has nothing to ask for."""
        raise NotImplementedError

    def example(self, row: dict[str, Any], draws: Draws) -> Example | None:
        """The example that `draws` picks from a row, or None when the row has nothing to ask for."""
        worded = self.words(row, draws)
        if worded is None:
            return None
        conversations, masks = worded
        shown = any("<image>" in turn["content"] for turns in conversations for turn in turns)
        size = (row["height"], row["width"]) if "height" in row else None
        return {
            "image": read_image(row["image"], size) if shown else None,
            "image_id": row["image_id"],
            "conversations": conversations,
            "masks": masks,
        }

    def __call__(self, row: dict[str, Any], seed: int = 0, epoch: int = 0, index: int = 0) -> Example | None:
        return self.example(row, Draws(seed, epoch, index))


class ReferringTransform(Transform):
    """Several expressions of one picture in one question, absent ones answered with [REJ].

    Args:
        wording: The templates.
        num_expressions: How many expressions to ask for at most (the original's num_classes_per_sample).
        all_absent: Whether a question may have no present expression at all. The original never asks one (Q18); with
            it on, the model also learns to reject a lone absent expression.
    """

    def __init__(self, wording: Wording | None = None, num_expressions: int = 3, all_absent: bool = False):
        self.wording = wording or Wording()
        self.num_expressions = num_expressions
        self.all_absent = all_absent

    def candidates(self, row: dict[str, Any]) -> list[tuple[str, dict]]:
        """The expressions that can be asked for, with their names; blank ones cannot (Q22, Q23)."""
        named = ((clean_expression(entry["text"]), entry) for entry in row["expressions"])
        return [(name, entry) for name, entry in named if name]

    def name(self, name: str, entry: dict, draws: Draws) -> str:
        return name

    def words(self, row: dict[str, Any], draws: Draws) -> tuple[list[list[dict]], list[np.ndarray]] | None:
        candidates = self.candidates(row)
        if not candidates:
            return None
        chosen = [candidates[i] for i in draws.subset(len(candidates), self.num_expressions)]
        names = [self.name(name, entry, draws) for name, entry in chosen]
        answer = draws.index(len(self.wording.answers), "answer template")
        question = draws.index(len(self.wording.questions), "question")
        present = [mask_area(entry["mask"]) > 0 for _, entry in chosen]
        if not any(present) and not self.all_absent:
            return None
        talk = _talk(self.wording.question(question, names), self.wording.answer(answer, names, present))
        return [talk], [np.stack([decode_mask(entry["mask"]) for _, entry in chosen])]


class SemanticTransform(ReferringTransform):
    """Several classes or parts of one picture in one question; all of them are there, so no [REJ].

    A part is named "OBJECT PART" or "the PART of the OBJECT", evenly. Instances of one class have the same name and
    each its own mask (Q25); a class is its number in the label map, not its name (Q26).
    """

    def __init__(self, wording: Wording | None = None, num_expressions: int = 3):
        super().__init__(wording or SEMANTIC_WORDING, num_expressions)

    def candidates(self, row: dict[str, Any]) -> list[tuple[str, dict]]:
        # an annotation without a pixel (the original draws another picture when it cannot be decoded) is not asked for
        return [(escape(entry["text"]), entry) for entry in row["expressions"] if mask_area(entry["mask"])]

    def name(self, name: str, entry: dict, draws: Draws) -> str:
        if entry.get("part") is None:
            return name
        part = escape(entry["part"])
        return f"{name} {part}" if draws.chance("part") < 0.5 else f"the {part} of the {name}"


class ReasoningTransform(Transform):
    """One conversation for each of up to `num_expressions` texts of a picture, which share the picture's mask.

    Args:
        wording: The templates.
        num_expressions: How many of the texts at most.
        explanatory: For a picture with an explanation, the chance of asking in words only, without a mask; the rest
            is evenly with and without the explanation in the answer. -1 leaves explanations out.
    """

    def __init__(self, wording: ReasoningWording | None = None, num_expressions: int = 3, explanatory: float = 0.1):
        self.wording = wording or ReasoningWording()
        self.num_expressions = num_expressions
        self.explanatory = explanatory

    def words(self, row: dict[str, Any], draws: Draws) -> tuple[list[list[dict]], list[np.ndarray]] | None:
        entries = [entry for entry in row["expressions"] if entry["text"].strip()]
        if not entries:
            return None
        chosen = [entries[i] for i in draws.subset(len(entries), self.num_expressions)]
        style = 0  # the mask alone; 1: with the explanation; 2: the explanation alone (Q38: for each of the texts)
        if chosen[0].get("explanation") and self.explanatory >= 0:
            style = 2 if draws.chance("style") < self.explanatory else draws.index(2, "style")
        conversations, masks = [], []
        for entry in chosen:
            text, explanation = escape(entry["text"]), escape(entry.get("explanation") or "")
            questions = self.wording.sentence_questions if entry["is_sentence"] else self.wording.phrase_questions
            template = questions[draws.index(len(questions), "question")]
            question = template.replace("{}", text if entry["is_sentence"] else text.lower())
            answer = explanation
            if style < 2:
                answer = self.wording.answers[draws.index(len(self.wording.answers), "answer")]
            if style == 1:
                why = draws.index(len(self.wording.explanatory_questions), "explanatory question")
                question = f"<image>\n{text} {self.wording.explanatory_questions[why]}"
                answer = f"{answer} {explanation}"
            elif style == 2:
                question = f"<image>\n{text}"
            conversations.append(_talk(question, answer))
            mask = decode_mask(entry["mask"])[None]
            masks.append(mask if style < 2 else mask[:0])
        return conversations, masks


class ConversationTransform(Transform):
    """A free conversation about a picture, or about none; no masks."""

    def words(self, row: dict[str, Any], draws: Draws) -> tuple[list[list[dict]], list[np.ndarray]] | None:
        turns = []
        for turn in row["conversation"]:
            # the picture comes first, once, in each turn that shows it; everything else in brackets is text
            content = escape(turn["text"].replace("<image>", ""))
            if "<image>" in turn["text"]:
                content = f"<image>\n{content.strip()}".strip()
            turns.append({"role": turn["role"], "content": content})
        if turns and turns[0]["role"] == "assistant":
            turns = turns[1:]
        if len(turns) % 2:  # a question without an answer teaches nothing (Q35)
            turns = turns[:-1]
        return ([turns], [np.zeros((0, 0, 0), np.uint8)]) if turns else None


def path_of(row: dict[str, Any]) -> str:
    """Where a row's picture lies, for messages."""
    image = row.get("image")
    path = image.get("path") if isinstance(image, dict) else getattr(image, "filename", None)
    return os.fspath(path) if path else f"picture {row.get('image_id')}"
