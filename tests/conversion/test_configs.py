"""Configurations read from tensors."""

import json

import pytest
import torch
from paths import FIXTURES

from conversion import to_ours
from conversion.configs import sam_config

# ViT-B, L and H of segment-anything's build_sam.py: width, depth, heads, layers with global attention.
SAM_SIZES = {
    "B": (768, 12, 12, [2, 5, 8, 11]),
    "L": (1024, 24, 16, [5, 11, 17, 23]),
    "H": (1280, 32, 16, [7, 15, 23, 31]),
}


@pytest.mark.parametrize("size", SAM_SIZES)
def test_sam_is_recognised_by_its_tensors(size):
    from transformers import SamModel

    dim, depth, heads, whole = SAM_SIZES[size]
    keys = json.loads((FIXTURES / "original_keys.json").read_text())
    encoder = "sam.vision_encoder.layers."
    shapes = {to_ours(k): tuple(s) for k, s in keys.items() if "visual_model" in k and "image_encoder.blocks" not in k}
    shapes["sam.vision_encoder.patch_embed.projection.weight"] = (dim, 3, 16, 16)
    shapes["sam.vision_encoder.patch_embed.projection.bias"] = (dim,)
    shapes["sam.vision_encoder.pos_embed"] = (1, 64, 64, dim)
    shapes["sam.vision_encoder.neck.conv1.weight"] = (256, dim, 1, 1)
    for i in range(depth):
        shapes[f"{encoder}{i}.attn.rel_pos_h"] = (127 if i in whole else 27, dim // heads)
        shapes[f"{encoder}{i}.mlp.lin1.weight"] = (4 * dim, dim)
    config = sam_config(shapes)
    vision = config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (dim, depth, heads)
    assert (vision.global_attn_indexes, vision.window_size, vision.image_size, vision.mlp_dim) == (
        whole,
        14,
        1024,
        4 * dim,
    )
    with torch.device("meta"):
        model = SamModel(config)
    built = {f"sam.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: built.get(name) for name in shapes} == shapes
