"""Directories of tiny random models, as transformers writes them: bases of every family with their processors, mask models."""

from pathlib import Path

import tiny_bases as bases
import torch
from tiny_processors import HAS_TORCHVISION, WITH_PILLOW, base_processor, byte_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

# Families whose processors can be made here.
WITH_PROCESSOR = (*bases.FIRST_RANK, *bases.SECOND_RANK) if HAS_TORCHVISION else WITH_PILLOW


def base_model(family: str, padding: int | None = 20, **options):
    """Return a tiny base over the vocabulary of its processor's tokenizer.

    Args:
        padding: number of rows beyond the tokenizer.
        options: of the text configuration.
    """
    config, tokenizer = bases.base_config(family), byte_tokenizer(family.split()[0])
    text = config.get_text_config()
    text.vocab_size, text.max_position_embeddings = len(tokenizer) + padding, 2048
    config.image_token_id = tokenizer.convert_tokens_to_ids(image_token(tokenizer))
    for name in ("vision_start_token_id", "vision_end_token_id", "video_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None and hasattr(config, name):
            setattr(config, name, token)
    for name, value in options.items():
        setattr(text, name, value)
        if name == "tie_word_embeddings":
            config.tie_word_embeddings = value
    torch.manual_seed(0)
    model = bases.randomize(AutoModelForImageTextToText.from_config(config))
    model.tie_weights()
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def image_token(tokenizer) -> str:
    """Return the token that stands for a piece of an image in `input_ids`."""
    return getattr(tokenizer, "context_image_token", None) or tokenizer.image_token


def write_base(folder: Path, family: str, padding: int = 20, **options) -> Path:
    """Save a base, with its processor where that can be made. See `base_model`."""
    base_model(family, padding, **options).save_pretrained(folder)
    if family.split()[0] in WITH_PROCESSOR:
        base_processor(family.split()[0]).save_pretrained(folder)
    return folder


def write_mask_model(folder: Path, kind: str) -> Path:
    """Save a tiny mask model of the SAM family."""
    torch.manual_seed(2)
    model = bases.randomize(AutoModel.from_config(AutoConfig.for_model(**bases.mask_config(kind))))
    model.save_pretrained(folder)
    return folder
