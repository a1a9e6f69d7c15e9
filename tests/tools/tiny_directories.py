"""Directories of tiny random models, as transformers writes them: bases of every family with their processors, mask models."""

from pathlib import Path

import tiny_bases as bases
import torch
from safetensors.torch import save_file
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


def write_sam3_video(folder: Path) -> dict[str, torch.Tensor]:
    """Save a tiny SAM 3 as facebook/sam3 has it, and return its weights: a detector by words and a tracker that has no encoder of
    its own but one more neck. (save_pretrained of a new model writes the tracker's prefix twice, other than the Hub's files.)
    """
    tracker = bases.mask_config("sam3_tracker")
    part = {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
            "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    detector = {"vision_config": tracker["vision_config"], "text_config": text, "geometry_encoder_config": part,
                "detr_encoder_config": part, "detr_decoder_config": {**part, "num_queries": 4},
                "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2}}  # fmt: skip
    of_video = {
        name: {key: value for key, value in tracker[name].items() if key != "model_type"}
        for name in ("prompt_encoder_config", "mask_decoder_config")
    }
    memory = {"memory_attention_hidden_size": 32, "memory_attention_num_layers": 1, "memory_encoder_hidden_size": 32,
              "memory_attention_feed_forward_hidden_size": 32, "memory_encoder_output_channels": 16, "image_size": 56,
              "mask_downsampler_embed_dim": 32, "memory_fuser_embed_dim": 32, "memory_fuser_intermediate_dim": 32}  # fmt: skip
    config = AutoConfig.for_model(
        "sam3_video",
        detector_config={"model_type": "sam3", **detector},
        tracker_config={
            "model_type": "sam3_tracker_video",
            "vision_config": tracker["vision_config"],
            **of_video,
            **memory,
        },
    )
    torch.manual_seed(2)
    weights = {
        name: value.clone() for name, value in bases.randomize(AutoModel.from_config(config)).state_dict().items()
    }
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return weights
