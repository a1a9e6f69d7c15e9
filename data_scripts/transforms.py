"""Make a training example from a row: choose the expressions, their wording and their order.

Every transform is a pure function of (row, seed, epoch, index): the same numbers give the same example in any worker,
on any rank, after any resume. The default wordings (`wordings.py`) are the original's. `Qn` in a comment is a quirk of
the original's training data that is kept or corrected on purpose; `data_scripts/README.md` lists them.

An example is `{"image", "image_id", "conversations", "masks"}`: the image (PIL, RGB, upright; None if no conversation
shows it), its id, conversations as lists of `{"role": "user" | "assistant", "content": str}`, and for each conversation
a uint8 array (slots, height, width) with one mask per `[SEG]` or `[REJ]` in its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .images import PictureError, open_image, read_image  # noqa: F401  # importable from here, as before
from .masks import decode_mask, mask_area
from .negatives import Negatives
from .wordings import SEMANTIC_WORDING, ReasoningWording, Wording, clean_expression, escape

Example = dict[str, Any]


class Draws:
    """The random choices of one example, determined by the numbers of `key`.

    The argument `of` of the methods names the choice for subclasses that record or replay choices.

    >>> Draws(0, 1, 2).subset(5, 3) == Draws(0, 1, 2).subset(5, 3)
    True
    """

    def __init__(self, *key: int):
        self.generator = np.random.default_rng(key)

    def subset(self, n: int, k: int) -> list[int]:
        """Return `k` of the numbers below `n` in random order; if `n` is below `k`, all of them in order."""
        return self.generator.permutation(n)[:k].tolist() if n >= k else list(range(n))

    def index(self, n: int, of: str) -> int:
        """Return one of the numbers below `n`."""
        return int(self.generator.integers(n))

    def chance(self, of: str) -> float:
        """Return a number in [0, 1)."""
        return float(self.generator.random())

    def weighted(self, weights: Sequence[float], of: str) -> int:
        """Return the index of one of `weights`, drawn in proportion to them."""
        edges = np.cumsum(weights) / np.sum(weights)
        return int(np.searchsorted(edges, self.generator.random(), side="right"))


def _round(question: str, answer: str) -> list[dict[str, str]]:
    """Return a conversation of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Transform:
    """The base class of all transforms. The image is read last, once there is something to ask about it (Q45)."""

    def words(self, row: dict[str, Any], draws: Draws) -> tuple[list[list[dict]], list[np.ndarray]] | None:
        """Return conversations and their masks, or None if the row has nothing to ask for."""
        raise NotImplementedError

    def example(self, row: dict[str, Any], draws: Draws) -> Example | None:
        """Return the example that `draws` selects from a row, or None if the row has nothing to ask for."""
        worded = self.words(row, draws)
        if worded is None:
            return None
        conversations, masks = worded
        shows_image = any("<image>" in turn["content"] for turns in conversations for turn in turns)
        size = (row["height"], row["width"]) if "height" in row else None
        return {
            "image": read_image(row["image"], size) if shows_image else None,
            "image_id": row["image_id"],
            "conversations": conversations,
            "masks": masks,
        }

    def __call__(self, row: dict[str, Any], seed: int = 0, epoch: int = 0, index: int = 0) -> Example | None:
        return self.example(row, Draws(seed, epoch, index))


class ReferringTransform(Transform):
    """Several expressions about one image in one question. Absent ones are answered with [REJ].

    Args:
        wording: The templates.
        num_expressions: The largest number of expressions in a question (the original's num_classes_per_sample).
        all_absent: Whether all expressions of a question may be absent. The original never asks such a question (Q18);
            with True, the model also learns to reject a single absent expression.
        drop_no_targets: Whether to leave out the expressions that have no target, as if the data did not have them.

    Attributes:
        negatives: Draws absent expressions for each question; None (the default) adds none.
    """

    negatives: Negatives | None = None

    def __init__(
        self,
        wording: Wording | None = None,
        num_expressions: int = 3,
        all_absent: bool = False,
        drop_no_targets: bool = False,
    ):
        self.wording = wording or Wording()
        self.num_expressions = num_expressions
        self.all_absent = all_absent
        self.drop_no_targets = drop_no_targets

    def candidates(self, row: dict[str, Any]) -> list[tuple[str, dict]]:
        """Return (name, entry) of the expressions that can be asked for; blank ones cannot (Q22, Q23)."""
        named = ((clean_expression(entry["text"]), entry) for entry in row["expressions"])
        return [
            (name, entry)
            for name, entry in named
            if name and not (self.drop_no_targets and not mask_area(entry["mask"]))
        ]

    def name(self, name: str, entry: dict, draws: Draws) -> str:
        """Return the wording of one name in the conversation."""
        return name

    def choose(self, row: dict[str, Any], draws: Draws) -> list[tuple[str, dict]]:
        """Return (name, entry) of the expressions of a question: of the image's own, and of drawn absent ones."""
        if self.drop_no_targets:
            row = {**row, "expressions": [entry for entry in row["expressions"] if mask_area(entry["mask"])]}
        candidates = self.candidates(row)
        chosen = [candidates[i] for i in draws.subset(len(candidates), self.num_expressions)]
        return chosen if self.negatives is None else self.negatives.add(row, chosen, self.num_expressions, draws)

    def words(self, row: dict[str, Any], draws: Draws) -> tuple[list[list[dict]], list[np.ndarray]] | None:
        chosen = self.choose(row, draws)
        if not chosen:
            return None
        names = [self.name(name, entry, draws) for name, entry in chosen]
        answer = draws.index(len(self.wording.answers), "answer template")
        question = draws.index(len(self.wording.questions), "question")
        present = [mask_area(entry["mask"]) > 0 for _, entry in chosen]
        if not any(present) and not self.all_absent:
            return None
        talk = _round(self.wording.question(question, names), self.wording.answer(answer, names, present))
        return [talk], [np.stack([decode_mask(entry["mask"]) for _, entry in chosen])]


class SemanticTransform(ReferringTransform):
    """Several classes or parts in one image in one question. All of them are present, so there is no [REJ].

    A part is called "OBJECT PART" or "the PART of the OBJECT" with equal chance. Instances of one class share a name and
    have a mask each (Q25). Classes are distinguished by their numbers in the label map, not by their names (Q26).
    """

    def __init__(self, wording: Wording | None = None, num_expressions: int = 3):
        super().__init__(wording or SEMANTIC_WORDING, num_expressions)

    def candidates(self, row: dict[str, Any]) -> list[tuple[str, dict]]:
        # An annotation without a pixel is not asked for; where it cannot be decoded, the original draws another image.
        return [(escape(entry["text"]), entry) for entry in row["expressions"] if mask_area(entry["mask"])]

    def name(self, name: str, entry: dict, draws: Draws) -> str:
        if entry.get("part") is None:
            return name
        part = escape(entry["part"])
        return f"{name} {part}" if draws.chance("part") < 0.5 else f"the {part} of the {name}"


class ReasoningTransform(Transform):
    """One conversation for each of up to `num_expressions` texts about an image, which share one mask.

    Args:
        wording: The templates.
        num_expressions: The largest number of texts.
        explanatory: For an image with an explanation, the chance of an answer in words only, without a mask. The other
            answers have the explanation in half of the cases. -1 leaves explanations out.
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
        style = 0  # 0: the mask alone; 1: with the explanation; 2: the explanation alone (Q38: for each of the texts)
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
            conversations.append(_round(question, answer))
            mask = decode_mask(entry["mask"])[None]
            masks.append(mask if style < 2 else mask[:0])
        return conversations, masks


class ConversationTransform(Transform):
    """A free conversation with or without an image; no masks."""

    def words(self, row: dict[str, Any], draws: Draws) -> tuple[list[list[dict]], list[np.ndarray]] | None:
        turns = []
        for turn in row["conversation"]:
            # The image comes first, once, in each turn that shows it; other special tokens are ordinary text.
            content = escape(turn["text"].replace("<image>", ""))
            if "<image>" in turn["text"]:
                content = f"<image>\n{content.strip()}".strip()
            turns.append({"role": turn["role"], "content": content})
        if turns and turns[0]["role"] == "assistant":
            turns = turns[1:]
        if len(turns) % 2:  # a question without an answer teaches nothing (Q35)
            turns = turns[:-1]
        return ([turns], [np.zeros((0, 0, 0), np.uint8)]) if turns else None
