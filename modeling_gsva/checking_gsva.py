"""Checks of what the processor is given: each error names the entry and says what to give."""

import operator
from collections.abc import Mapping
from reprlib import repr as shown  # short, and safe for values that are nested deeply or contain themselves
from typing import Any, cast

import numpy as np
import torch

from .chat_gsva import check_messages


def check_max_length(max_length: Any) -> None:
    """Raise ValueError unless it is a number of tokens."""
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
        raise ValueError(f"max_length={max_length!r} must be a number of tokens, 1 or more.")


def check_expressions(images: list, expressions, no_targets) -> tuple[list[list[str]], list[list[bool]]]:
    """Return the expressions of each image and which of them have no target; raise ValueError where they do not fit."""
    if not images:
        raise ValueError(f"No image was given for {len(expressions)} list(s) of expressions; pass images=[...].")
    if not isinstance(expressions, (list, tuple)):
        raise ValueError(f"expressions is {shown(expressions)}; give a list of strings for each image.")
    if expressions and all(isinstance(expression, str) for expression in expressions):
        expressions = [cast(list[str], expressions)]
    if len(images) != len(expressions):
        raise ValueError(
            f"{len(images)} images but {len(expressions)} lists of expressions; give one list for each image."
        )
    no_targets = [None] * len(images) if no_targets is None else no_targets
    if not isinstance(no_targets, (list, tuple)):
        raise ValueError(f"no_targets is {shown(no_targets)}; give a list with true or false for each image.")
    if len(no_targets) != len(images):
        raise ValueError(f"{len(images)} images but {len(no_targets)} lists of no_targets; give one for each image.")
    texts_of, absent_of = [], []
    for index, (texts, absent) in enumerate(zip(expressions, no_targets)):
        if isinstance(texts, str):
            raise ValueError(f"expressions[{index}] is the string {texts!r}; give a list of strings for each image.")
        if not isinstance(texts, (list, tuple)):
            raise ValueError(f"expressions[{index}] is {shown(texts)}; give a list of strings for each image.")
        if not isinstance(absent, (list, tuple, np.ndarray, type(None))):
            raise ValueError(f"no_targets[{index}] is {shown(absent)}; give a list with true or false for each.")
        absent = [False] * len(texts) if absent is None else list(absent)
        if len(absent) != len(texts):
            raise ValueError(f"{len(texts)} expressions but {len(absent)} no_targets; give one for each.")
        texts_of.append(list(texts))
        absent_of.append(absent)
    return texts_of, absent_of


def check_conversations(conversations: Any, image_index: Any, num_images: int) -> list[int]:
    """Return the image of each conversation (-1 for none); raise ValueError where conversations and images do not fit."""
    if not isinstance(conversations, (list, tuple)) or not conversations:
        raise ValueError(f"conversations is {shown(conversations)}; give a list of conversations, one at least.")
    for index, messages in enumerate(conversations):
        check_messages(messages, f"Conversation {index}")
    image_index = list(range(len(conversations))) if image_index is None and num_images else image_index
    try:
        image_index = [-1] * len(conversations) if image_index is None else [operator.index(n) for n in image_index]
    except TypeError:
        raise ValueError(
            f"image_index is {shown(image_index)}; give for each conversation the number of its image, or -1."
        ) from None
    if len(image_index) != len(conversations):
        raise ValueError(
            f"{len(conversations)} conversations but image_index has {len(image_index)} entries; give one each."
        )
    for index, (messages, image) in enumerate(zip(conversations, image_index)):
        if not -1 <= image < num_images:
            raise ValueError(
                f"Conversation {index} points to image {image}, but {num_images} images were given; use 0 to "
                f"{num_images - 1}, or -1 for none."
            )
        has_placeholder = any(
            "<image>" in message["content"]
            if isinstance(message["content"], str)
            else any(part["type"] == "image" for part in message["content"])
            for message in messages
        )
        if has_placeholder != (image >= 0):
            raise ValueError(
                f"Conversation {index} {'holds' if has_placeholder else 'lacks'} <image>, but its image_index is "
                f"{image}; write <image> where, and only where, a conversation has an image."
            )
    return image_index


def check_masks(masks: Any, image_index: list[int], original_sizes: Any) -> list[torch.Tensor]:
    """Return the true masks of each conversation as (slots, height, width) bytes; raise ValueError where they do not fit."""
    if not hasattr(masks, "__len__") or isinstance(masks, (str, bytes, Mapping)):
        raise ValueError(f"masks is {shown(masks)}; give for each conversation an array (slots, height, width).")
    if len(masks) != len(image_index):
        raise ValueError(f"{len(image_index)} conversations but {len(masks)} entries in masks; give one each.")
    checked = []
    for index, (mask, image) in enumerate(zip(masks, image_index)):
        try:
            mask = torch.as_tensor(np.asarray(mask))
            if mask.ndim == 0 or mask.is_complex():
                raise TypeError("a single number" if mask.ndim == 0 else "complex numbers")
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"masks[{index}] is {shown(mask)}; give an array (slots, height, width) of 0 and 1 ({error})."
            ) from None
        size = tuple(int(side) for side in original_sizes[image]) if image >= 0 else None
        if len(mask) and not len(original_sizes):
            raise ValueError("Masks were given without images; pass images=[...].")
        if len(mask) and size is None:
            raise ValueError(
                f"masks[{index}] has shape {tuple(mask.shape)}, but conversation {index} has no image; give an empty list."
            )
        if len(mask) and (mask.ndim != 3 or tuple(mask.shape[1:]) != size):
            raise ValueError(
                f"masks[{index}] has shape {tuple(mask.shape)}, but its image is {size} (height, width); give "
                "(slots, height, width) at the image's own size, after EXIF orientation."
            )
        checked.append(mask.to(torch.uint8) if len(mask) else torch.zeros(0, *(size or (1, 1)), dtype=torch.uint8))
    return checked


__all__ = ["check_conversations", "check_expressions", "check_masks", "check_max_length"]
