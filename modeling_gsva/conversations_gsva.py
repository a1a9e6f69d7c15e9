"""Conversations in the words of a base's own chat template, and what of them the assistant says."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

from .prompts_gsva import IMAGE_TOKEN, render_conversations

# How templates take the content of a message: lists of parts (llava-hf, Qwen, SmolVLM), for the user alone, or strings.
_LAYOUTS = (("user", "assistant", "system"), ("user",), ())
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Words that no template holds, to see where it puts them.
_QUESTION, _ANSWER = "What is 9f0e3c there?", "Sure,it is 5d7a1b."
PROBE = [{"role": "user", "content": f"{IMAGE_TOKEN}\n{_QUESTION}"}, {"role": "assistant", "content": _ANSWER}]


@dataclass
class AnsweredText:
    """
    A conversation as text.

    Args:
        text: the whole of it, each image as the processor's placeholder.
        answers: (begin, end) of what the assistant is to say, the token that ends the turn included, in characters.
    """

    text: str
    answers: list[tuple[int, int]]

    def pieces(self) -> list[str]:
        """Return the text in pieces, of which every second is an answer, without what follows the last answer."""
        cuts = [0, *(place for answer in self.answers for place in answer)]
        return [self.text[begin:end] for begin, end in pairwise(cuts)] or [self.text]


class ConversationFormat:
    """
    Renders conversations by a chat template, and finds the assistant's answers in them.

    Messages are `{"role", "content"}`, content a string in which `<image>` stands for the image, or a list of parts.

    Args:
        tokenizer: knows the special tokens, among them those that end a turn.
        chat_template: a Jinja template.
        image_token: the text in place of an image, which the processor expands.
        name: of the processor, for messages.

    Raises:
        ValueError: a template that loses the text or the image, or whose prompt is no beginning of the whole conversation; a
            tokenizer without end of sequence where the template has no end of a turn.
    """

    def __init__(self, tokenizer, chat_template: str, image_token: str, name: str):
        self.tokenizer, self.chat_template, self.image_token, self.name = tokenizer, chat_template, image_token, name
        self.special_tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_tokens |= set(tokenizer.all_special_tokens)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self.ends = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.marks_answers = bool(_GENERATION.search(chat_template))
        self.needs_end = False
        self.parts_of = self._find_layout()
        text = self.render(PROBE)
        self.needs_end = not self.ends.search(text, text.index(_ANSWER) + len(_ANSWER))
        if self.needs_end and tokenizer.eos_token is None:
            raise ValueError(
                f"Neither the chat template of {name} nor its tokenizer has a token that ends an answer, so that none would "
                "end. Set tokenizer.eos_token."
            )
        self.answered(PROBE)

    def _find_layout(self) -> tuple[str, ...]:
        """Return the roles whose content the template takes as a list of parts."""
        problem = "it loses the image or the text"
        for roles in _LAYOUTS:
            self.parts_of = roles
            try:
                text = self.render(PROBE)
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                problem = str(error)
                continue
            if all(text.count(part) == 1 for part in (self.image_token, _QUESTION, _ANSWER)) and "'type'" not in text:
                return roles
        raise ValueError(
            f"The chat template of {self.name} cannot place an image, a question and its answer, with content as a list of "
            f"parts or as a string ({problem}). Give another as chat_template; it must write {self.image_token!r} where the "
            "image is."
        )

    def messages(self, conversation: list[dict], is_continued: bool = False) -> list[dict]:
        """
        Return messages as the template takes them. Where it has no token that ends a turn, answers end with the tokenizer's
        end of sequence.

        Args:
            is_continued: leave the last message open.
        """
        prepared = []
        for number, message in enumerate(conversation, 1):
            role, parts = message.get("role"), self._parts(message.get("content"))
            if role == "assistant":
                for part in parts:
                    if part.get("type") == "text":
                        part["text"] = part["text"].strip()
                is_open = is_continued and number == len(conversation)
                if self.needs_end and not is_open and not self._text(parts).endswith(self.tokenizer.eos_token):
                    parts = [*parts[:-1], {"type": "text", "text": self._text(parts[-1:]) + self.tokenizer.eos_token}]
            content: Any = parts if role in self.parts_of else self._text(parts)
            prepared.append({**message, "content": content})
        return prepared

    def _parts(self, content: Any) -> list[dict]:
        """Return content as a list of parts; the template, not the text, says what stands between an image and its text."""
        if not isinstance(content, str):
            return [dict(part) for part in content or [] if isinstance(part, Mapping)]
        parts: list[dict] = []
        for number, text in enumerate(content.split(IMAGE_TOKEN)):
            if number:
                parts.append({"type": "image"})
            is_near_image = IMAGE_TOKEN in content
            text = text.strip() if is_near_image else text
            if text or not is_near_image:
                parts.append({"type": "text", "text": text})
        return parts

    def _text(self, parts: list[dict]) -> str:
        return "".join(self.image_token + "\n" if part.get("type") == "image" else part["text"] for part in parts)

    def render(self, conversation: list[dict], add_generation_prompt: bool = False) -> str:
        """Return a conversation as text, each image as the placeholder."""
        return self._render(conversation, add_generation_prompt)[0]

    def _render(self, conversation, add_generation_prompt=False) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the spans that the template marks as the assistant's."""
        texts, spans = render_conversations(
            conversations=[self.messages(conversation)],
            chat_template=self.chat_template,
            return_assistant_tokens_mask=self.marks_answers,
            add_generation_prompt=add_generation_prompt,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], list(spans[0]) if self.marks_answers else []

    def answered(self, conversation: list[dict]) -> AnsweredText:
        """
        Return a conversation with the places of its answers.

        The prompt of an answer is the conversation before it as it is rendered for an answer, so that the model is asked in
        the words that it learned. Where the template marks what is generated, only that is to be said.

        Raises:
            ValueError: a template by which a prompt is no beginning of the whole conversation.
        """
        whole, marked = self._render(conversation)
        answered = AnsweredText(whole, [])
        for number, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            prompt = self.render(conversation[:number], add_generation_prompt=True)
            through = self.render(conversation[: number + 1]) if number + 1 < len(conversation) else whole
            if not whole.startswith(prompt):
                self._refuse(prompt, whole)
            begin, end = len(prompt), self._end(whole, through, len(prompt), message)
            if self.marks_answers:
                spans = [span for span in marked if span[1] > begin and span[0] < end]
                if not spans:
                    continue
                if whole[begin : spans[0][0]].strip():
                    self._refuse(prompt, whole)
            answered.answers.append((begin, end))
        return answered

    def _end(self, whole: str, through: str, begin: int, message: dict) -> int:
        """Return where an answer ends in the text, the token that ends the turn included."""
        (prepared,) = self.messages([message])
        parts = prepared["content"]
        content = (parts if isinstance(parts, str) else self._text(parts)).strip()
        place = whole.find(content, begin)
        if self.needs_end and place < 0:
            raise ValueError(
                f"The chat template of {self.name} changes the words of an answer, {content[:60]!r}; give another as "
                "chat_template."
            )
        place = begin if place < 0 else place + len(content)
        limit = len(os.path.commonprefix([whole, through]))
        if limit < place:
            self._refuse(through, whole)
        if self.needs_end:
            return place
        end = self.ends.search(whole, place, limit)
        if end is None:
            raise ValueError(
                f"The chat template of {self.name} ends the turn {whole[begin:limit]!r} without a special token, but others "
                "with one; give another as chat_template."
            )
        return end.end()

    def _refuse(self, asked: str, whole: str) -> None:
        """Raise ValueError for a text with which the model is asked, and the conversation that it learns."""
        place = max(len(os.path.commonprefix([asked, whole])) - 20, 0)
        raise ValueError(
            f"The chat template of {self.name} renders {asked[place : place + 60]!r} where the model is to answer, but "
            f"{whole[place : place + 60]!r} in the whole conversation: it would be asked in other words than it learned. Give as "
            "chat_template one whose prompt is the beginning of the conversation (without thinking blocks), or each question "
            "in a conversation of its own."
        )


__all__ = ["PROBE", "AnsweredText", "ConversationFormat"]
