"""Recognise checkpoints of other models, and those given to the wrong option, by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

_LLAVA = ("--llava", "--llama", "--llava_delta")


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    Attributes:
        name: As messages call it.
        sign: A pattern that the name of a tensor begins with, without the prefixes of wrappers, in checkpoints of this kind
            and in no other that stands below it in `KINDS`.
        options: The options that take it; none for a checkpoint that cannot be converted.
        advice: A sentence on what to do with one that was given to another option.
    """

    name: str
    sign: str
    options: tuple[str, ...]
    advice: str


_SAM_ADVICE = (
    "Pass sam_vit_h_4b8939.pth of segment-anything (or ViT-L or B) with --sam. With --base, --sam also takes a directory or Hub id "
    "of SAM, SAM-HQ, SAM 2 or SAM 3 in the format of transformers, such as facebook/sam2.1-hiera-base-plus."
)
_LLAVA_ADVICE = (
    "GSVA was made from LLaVA v1 with one linear layer, for example liuhaotian/LLaVA-Lightning-7B-delta-v1-1. To start from "
    "another, pass it in the format of transformers with --base, for example llava-hf/llava-1.5-7b-hf."
)
_CLIP_ADVICE = "Pass the directory of openai/clip-vit-large-patch14 with --clip."
_QUANTIZED_ADVICE = "Pass the checkpoint before it was quantized."

# Tested from top to bottom: the first kind with a sign in the checkpoint is it.
KINDS = (
    Kind("a checkpoint quantized by GPTQ or AWQ", r".*\.(qweight|qzeros)$", (), _QUANTIZED_ADVICE),
    Kind("a checkpoint quantized by bitsandbytes", r".*\.(SCB|absmax|quant_state\b.*)$", (), _QUANTIZED_ADVICE),
    Kind(
        "an adapter of a converted model",
        r"(vlm\.)?model\.language_model\.layers\..*\.lora_[AB]\.",
        (),
        "It needs no conversion: run_gres.py --model takes it.",
    ),
    Kind(
        "a converted model",
        r"(mask_projector|(vlm\.)?model\.language_model|sam)\.",
        (),
        "It needs no conversion: the Auto classes load it, and --reverse turns it into a file of the original.",
    ),
    Kind(
        "SAM 2",
        r"(image_encoder\.trunk|memory_attention|memory_encoder|sam_mask_decoder|vision_encoder\.backbone)\.",
        (),
        _SAM_ADVICE,
    ),
    Kind("SAM 3", r"(detector|tracker_model|detector_model)\.", (), _SAM_ADVICE),
    Kind("MobileSAM", r"image_encoder\.(layers\.\d+\.blocks|patch_embed\.seq)\.", (), _SAM_ADVICE),
    # https://github.com/yformer/EfficientSAM: efficient_sam/efficient_sam_decoder.py
    Kind("EfficientSAM", r"mask_decoder\.final_output_upscaling_layers\.", (), _SAM_ADVICE),
    Kind(
        "SAM-HQ", r"mask_decoder\.(hf_|hq_|compress_vit_feat|embedding_encoder|embedding_maskfeature)", (), _SAM_ADVICE
    ),
    Kind(
        "SAM in the format of transformers",
        r"(shared_image_embedding\.|vision_encoder\.layers\.\d+\.attn\.rel_pos_h)",
        (),
        _SAM_ADVICE,
    ),
    Kind(
        "SAM with another image encoder than segment-anything's",
        r"image_encoder\.(?!pos_embed$|patch_embed\.proj\.|blocks\.\d|neck\.\d)",
        (),
        _SAM_ADVICE,
    ),
    Kind("LLaVA-1.5's projector of two layers", r"model\.mm_projector\.\d\.", (), _LLAVA_ADVICE),
    Kind(
        "LLaVA in the format of transformers",
        r"(model\.)?(multi_modal_projector\.|language_model\.model\.|vision_tower\.vision_model\.)",
        (),
        _LLAVA_ADVICE,
    ),
    Kind(
        "GSVA in the original's layout",
        r"model\.(text_hidden_fcs|visual_model)\.",
        ("--checkpoint", *_LLAVA),
        "Pass it with --checkpoint.",
    ),
    Kind(
        "SAM of segment-anything",
        r"(image_encoder|prompt_encoder|mask_decoder)\.",
        ("--sam",),
        "Pass it with --sam.",
    ),
    Kind(
        "LLaMA in Meta's format",
        r"(tok_embeddings|layers\.\d+\.(attention\.w[qkvo]|feed_forward\.w\d))\.",
        (),
        "Pass LLaMA in the format of transformers (its convert_llama_weights_to_hf.py makes it).",
    ),
    Kind("SigLIP", r"vision_model\.(head\.|embeddings\.patch_embedding\.bias)", (), _CLIP_ADVICE),
    Kind("CLIP in the format of OpenAI or open_clip", r"(visual|transformer\.resblocks)\.", (), _CLIP_ADVICE),
    Kind("CLIP", r"(vision_model|text_model)\.", ("--clip",), "Pass it with --clip."),
    # LoRA alone of a GSVA has these names, too.
    Kind("LLaVA or LLaMA", r"model\.(layers|embed_tokens|norm)\.", ("--checkpoint", *_LLAVA), "Pass it with --llava."),
)


def kind_of(names: Collection[str]) -> tuple[Kind, str] | None:
    """Return the kind of a checkpoint and the name by which it is recognised, or None for an unknown one.

    Args:
        names: The names of its tensors, without the prefixes of wrappers.

    >>> kind_of(["image_encoder.trunk.blocks.0.norm1.weight"])[0].name
    'SAM 2'
    """
    return next(((kind, name) for kind in KINDS for name in names if re.match(kind.sign, name)), None)


def refuse_other_kinds(names: Collection[str], option: str, path: object) -> None:
    """Raise ValueError if tensors with these names belong to another model, or to another option than `option`."""
    recognised = kind_of(names)
    if recognised is None or option in recognised[0].options:
        return
    kind, sign = recognised
    problem = "which is for another option" if kind.options else "whose tensors are no parameters of GSVA"
    raise ValueError(f"{option} {path} holds {sign}: it is {kind.name}, {problem}. {kind.advice}")
