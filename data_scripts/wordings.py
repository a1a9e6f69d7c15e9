"""Question and answer templates, and the texts that are put into them.

The templates are GSVA's (LeapLabTHU/GSVA at 618dc79, model/llava/constants.py and data/*_dataset.py). `Qn` in a comment is
a quirk of the original's training data that is kept or corrected on purpose; `data_scripts/README.md` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# The processor reads these as special tokens; in data they may be ordinary text (Q36).
_RESERVED = re.compile(r"<(/?s|unk|pad|image|im_start|im_end)>|\[(SEG|REJ)\]", re.IGNORECASE)


def escape(text: str) -> str:
    """Remove the brackets from every part of a text that would be read as a special token.

    >>> escape("the <image> of a [SEG] sign")
    'the image of a SEG sign'
    """
    return _RESERVED.sub(lambda match: (match[1] or match[2]).lstrip("/"), text)


def clean_expression(text: str) -> str:
    """Return an expression without blanks and dots at its ends. An empty result cannot be asked for.

    The original strips blanks only before it strips dots, so "a ." keeps a blank and "..." becomes an empty name (Q22).

    >>> clean_expression(" The man. .")
    'The man'
    """
    return escape(text).strip(" \t\r\n.")


@dataclass(frozen=True)
class Wording:
    """Question and answer templates for several expressions about one image; one of each is drawn per example.

    Each question has one `{}` for the joined names. Each answer is an opening and a part, in which `{}` stands for one
    name and `[SEG]` for its slot. Names are lower-cased in the question, not in the answer (Q20).
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
        """Return question number `template` about `names`."""
        return self.questions[template].replace("{}", ", ".join(names).lower())

    def part(self, template: str, name: str, present: bool) -> str:
        """Return one name with its slot: [SEG], or [REJ] if the name is absent."""
        # Only the slot becomes [REJ]. The original also rewrites "SEG" within the name (Q19).
        return template.replace("[SEG]", "[SEG]" if present else "[REJ]").replace("{}", name)

    def answer(self, template: int, names: Sequence[str], present: Sequence[bool]) -> str:
        """Return answer number `template` with a slot for each of `names`."""
        opening, part = self.answers[template]
        parts = (self.part(part, name, is_present) for name, is_present in zip(names, present, strict=True))
        return f"{opening} {self.separator.join(parts)}."


# The original joins the answers of the semantic sets without a blank (Q21).
SEMANTIC_WORDING = Wording(separator=",")


@dataclass(frozen=True)
class ReasoningWording:
    """Templates for one expression per conversation, with or without an explanation in words (ReasonSeg)."""

    # SHORT_QUESTION_LIST, for a phrase, which is lower-cased
    phrase_questions: tuple[str, ...] = (
        "<image>\nCan you segment the {} in this image?",
        "<image>\nPlease segment the {} in this image.",
        "<image>\nWhat is {} in this image? Please respond with segmentation mask.",
        "<image>\nWhat is {} in this image? Please output segmentation mask.",
    )
    # LONG_QUESTION_LIST, for a sentence, which is not changed
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
