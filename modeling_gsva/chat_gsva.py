"""Chats: checks of their messages and of the files they name, and answers read while they are written."""

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from reprlib import repr as shown  # short, and safe for values that are nested deeply or contain themselves
from typing import Self

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class AnswerClosed(ValueError):
    """The answer was closed before it was finished."""


class _StopWriting(StoppingCriteria):
    """Ends `generate` at the next token once the event is set, by an error, so that no masks are made."""

    def __init__(self, closed: threading.Event):
        self.closed = closed

    def __call__(self, input_ids, scores, **kwargs):
        if self.closed.is_set():
            raise AnswerClosed("The answer was closed before it was finished, so that it has no results.")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class StreamedAnswer:
    """
    A free answer while it is written, from [`GsvaProcessor.stream`].

    Iterate over it for the text, piece by piece; then, or instead, read `results`, its masks. `close()`, leaving a `with`,
    or dropping the last reference to it ends the writing; the thread is gone when `close()` returns.
    """

    def __init__(self, processor, model, inputs, stopping_criteria=(), **generate_kwargs):
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed = threading.Event()
        criteria = StoppingCriteriaList([*(stopping_criteria or ()), _StopWriting(closed)])

        def write():  # must not hold the answer itself, which ends the writing when nobody else does
            try:
                outputs = model.segment(
                    **inputs, method="generate", streamer=streamer, stopping_criteria=criteria, **generate_kwargs
                )
            except BaseException:
                streamer.on_finalized_text("", stream_end=True)  # else the reader would wait for ever
                raise
            return processor.post_process_segmentation(outputs, inputs)

        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answer")
        self._streamer, self._thread = streamer, pool
        self._results = pool.submit(write)
        self._stop = weakref.finalize(self, closed.set)
        pool.shutdown(wait=False)

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces of text; raise the error, if any, with which the answer ended, unless it was closed."""
        yield from self._streamer
        if self._results.done() and not isinstance(self._results.exception(), (AnswerClosed, type(None))):
            self._results.result()

    @property
    def results(self) -> list[list[dict]]:
        """
        Return the output of `post_process_segmentation`: per image, each `[SEG]` and `[REJ]` with the phrase before it.

        Raises:
            AnswerClosed: a `ValueError`, where the answer was closed before it was finished.
        """
        return self._results.result()

    def close(self) -> None:
        """End the writing at the next token, and wait for its thread; what is finished already stays."""
        self._stop()
        self._thread.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _files_named(part) -> Iterator[str]:
    """Yield every string in a part of a chat message that transformers would open as a path."""
    if isinstance(part, (str, os.PathLike)):
        if not str(part).startswith(("http://", "https://")) and os.path.exists(part):
            yield os.fspath(part)
    elif isinstance(part, Mapping):
        for name, value in part.items():
            if name not in ("type", "text"):
                yield from _files_named(value)
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from _files_named(value)


def check_chat_files(conversation) -> None:
    """
    Raise ValueError if a message names a file outside the trusted folders.

    Chats are often written by somebody else: a path in one must lead into the working directory, or into a folder that the
    environment's `GSVA_TRUSTED_FOLDERS` lists (separated as PATH is; `/` for all). data_scripts reads the same variable with
    separate code, because this file is copied into saved directories.
    """
    messages = [conversation]
    while messages and isinstance(messages[0], (list, tuple)):
        messages = [message for one in messages for message in one]
    trusted = [os.getcwd(), *filter(None, os.environ.get("GSVA_TRUSTED_FOLDERS", "").split(os.pathsep))]
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for file in _files_named(content if isinstance(content, (list, tuple)) else []):
            real = os.path.realpath(file)
            if not any(real.startswith(os.path.join(os.path.realpath(folder), "")) for folder in trusted):
                raise ValueError(
                    f"A message names the file {file!r}, which leads out of the working directory. Pass the image itself, "
                    f"or list folders that chats may name in the environment variable GSVA_TRUSTED_FOLDERS."
                )


def check_contents(conversation) -> None:
    """
    Raise ValueError unless a conversation, or each of a batch, lists messages whose content is a string or a list of parts
    of type text or image. Who speaks when is left to the chat template.
    """
    if not isinstance(conversation, (list, tuple)):
        raise ValueError(
            f"The conversation is {shown(conversation)}; give a list of messages, or a batch of such lists."
        )
    if not conversation:
        raise ValueError("The conversation is empty; ask something.")
    if any(isinstance(message, (list, tuple)) for message in conversation):
        for messages in conversation:
            check_contents(messages)
        return
    for number, message in enumerate(conversation, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"Message {number} is {shown(message)}; give {{'role': ..., 'content': ...}}.")
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else [{"type": "text", "text": content}]:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and not is_utf8(part.get("text")):
                raise ValueError(
                    f"Message {number} holds {shown(part.get('text'))} instead of text; content is a string of UTF-8, or a "
                    "list of parts of type text or image."
                )
            if not isinstance(part, Mapping):
                raise ValueError(
                    f"Message {number} has the part {shown(part)}; give {{'type': 'text', 'text': ...}} or {{'type': "
                    "'image', 'image': ...}."
                )
            if kind not in ("text", "image"):
                raise ValueError(f"Message {number} has a part of type {shown(kind)}; text and image are known.")
            if kind == "image" and "image" in part and part["image"] is None:
                raise ValueError(
                    f"Message {number} has an image that is None; give an image, a path or a URL, or leave 'image' out and "
                    "pass images=[...] beside the conversation."
                )


def check_messages(messages, where: str) -> None:
    """Raise ValueError unless `messages` lists {"role", "content"}, each content a string or a list of parts."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{where} is {shown(messages)}; give a list of messages {{'role': ..., 'content': ...}}.")
    for n, message in enumerate(messages):
        role, content = (message.get(k) for k in ("role", "content")) if isinstance(message, Mapping) else (None, None)
        is_role = role in ("user", "assistant") or (role == "system" and n == 0) if isinstance(role, str) else False
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not is_role or not isinstance(parts, (list, tuple)) or any(
            not isinstance(part, Mapping)
            or part.get("type") not in ("text", "image")
            or (part["type"] == "text" and not is_utf8(part.get("text")))
            for part in parts
        ):  # fmt: skip
            raise ValueError(
                f"{where}, message {n}, is {shown(message)}; it needs a 'role', user or assistant (or system, of the first), "
                f"and a 'content', a text or a list of parts of type text or image."
            )


def is_utf8(text) -> bool:
    """Return whether it is a string that can be written as UTF-8 (halves of surrogate pairs cannot)."""
    return isinstance(text, str) and text == text.encode("utf-8", "ignore").decode("utf-8")


__all__ = ["AnswerClosed", "StreamedAnswer", "check_chat_files", "check_contents", "check_messages", "is_utf8"]
