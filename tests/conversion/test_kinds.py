"""Checkpoints of other models, and those given to the wrong option, are named."""

import json

import pytest
import torch
from paths import FIXTURES

from conversion.keys import PREFIXES
from conversion.kinds import kind_of
from conversion.reading import CheckpointSource

SAM_2 = ["image_encoder.trunk.blocks.0.norm1.weight", "memory_attention.layers.0.norm1.weight"]
MOBILE_SAM = [
    "image_encoder.patch_embed.seq.0.c.weight",
    "image_encoder.layers.0.blocks.0.conv1.c.weight",
    "mask_decoder.iou_token.weight",
]
SAM = ["image_encoder.blocks.0.norm1.weight", "image_encoder.pos_embed", "mask_decoder.iou_token.weight"]
LLAVA = ["model.layers.0.input_layernorm.weight", "model.norm.weight"]
LLAVA_1_5 = [*LLAVA, "model.mm_projector.0.weight", "model.mm_projector.2.weight"]
CLIP = ["text_model.final_layer_norm.weight", "vision_model.encoder.layers.0.layer_norm1.weight"]
LORA = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"

# option, names of the tensors, words of the message
OTHERS = {
    "SAM 2": ("--sam", SAM_2, "it is SAM 2,.*sam_vit_h_4b8939.pth"),
    "SAM 2 of transformers": ("--sam", ["vision_encoder.backbone.blocks.0.x", "mask_decoder.iou_token.weight"], "it is SAM 2,"),
    "MobileSAM": ("--sam", MOBILE_SAM, "it is MobileSAM,"),
    "EfficientSAM": ("--sam", [*SAM, "mask_decoder.final_output_upscaling_layers.0.0.weight"], "it is EfficientSAM,.*--sam also"),
    "SAM-HQ": ("--sam", [*SAM, "mask_decoder.hf_token.weight"], "it is SAM-HQ,"),
    "SAM of transformers": ("--sam", ["vision_encoder.layers.0.attn.rel_pos_h"], "SAM in the format of transformers"),
    "SAM with another encoder": ("--sam", ["image_encoder.backbone.stages.0.x", "mask_decoder.iou_token.weight"],
                                 "another image encoder"),
    "SAM as checkpoint": ("--checkpoint", SAM, "it is SAM of segment-anything,.*Pass it with --sam"),
    "SAM as LLaVA": ("--llava", SAM, "Pass it with --sam"),
    "SAM as CLIP": ("--clip", SAM, "Pass it with --sam"),
    "LLaVA as SAM": ("--sam", LLAVA, "it is LLaVA or LLaMA,.*Pass it with --llava"),
    "LLaVA as CLIP": ("--clip", LLAVA, "Pass it with --llava"),
    "CLIP as SAM": ("--sam", CLIP, "it is CLIP,.*Pass it with --clip"),
    "CLIP as checkpoint": ("--checkpoint", CLIP, "Pass it with --clip"),
    "OpenAI's CLIP": ("--clip", ["visual.transformer.resblocks.0.ln_1.weight"], "OpenAI or open_clip"),
    "SigLIP": ("--clip", ["vision_model.embeddings.patch_embedding.bias"], "it is SigLIP,"),
    "LLaVA 1.5": ("--llava", LLAVA_1_5, "LLaVA-1.5's projector"),
    "LLaVA 1.5's projector alone": ("--llava", ["model.mm_projector.0.weight"], "LLaVA-1.5's projector"),
    "LLaVA of transformers": ("--llava", ["language_model.model.layers.0.x", "multi_modal_projector.linear_1.weight"],
                              "LLaVA in the format of transformers"),
    "Meta's LLaMA": ("--llama", ["tok_embeddings.weight", "layers.0.attention.wq.weight"], "LLaMA in Meta's format"),
    "GPTQ": ("--checkpoint", [*LLAVA, "model.layers.0.self_attn.q_proj.qweight"], "quantized by GPTQ"),
    "bitsandbytes": ("--checkpoint", [*LLAVA, "model.layers.0.self_attn.q_proj.weight.absmax"], "quantized by bitsandbytes"),
    "converted": ("--checkpoint", ["mask_projector.0.weight", "model.language_model.norm.weight"], "it is a converted model"),
    "adapter of ours": ("--checkpoint", [LORA, "base_model.model.mask_projector.0.weight"], "it is an adapter of a converted model"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_are_named(case, tmp_path):
    option, names, message = OTHERS[case]
    torch.save({name: torch.ones(2) for name in names}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message) as error:
        CheckpointSource(option, tmp_path / "weights.pth", PREFIXES.get(option, ""))
    assert str(tmp_path / "weights.pth") in str(error.value) and option in str(error.value)


def test_the_original_s_own_checkpoints_are_recognised():
    keys = list(json.loads((FIXTURES / "original_keys.json").read_text()))
    sam, clip = PREFIXES["--sam"], PREFIXES["--clip"]
    parts = {
        "--checkpoint": keys,
        "--sam": [key.removeprefix(sam) for key in keys if key.startswith(sam)],
        "--clip": [key.removeprefix(clip) for key in keys if key.startswith(clip)],
        "--llava": [key for key in keys if key.startswith(("model.layers", "model.norm", "model.mm_proj", "lm_head"))],
    }
    for option, names in parts.items():
        assert option in kind_of(names)[0].options
    assert kind_of(["resnet.layer1.weight"]) is None
