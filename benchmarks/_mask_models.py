"""The mask models of `benchmarks/eval.py`: SAM's and SAM 2's true sizes with their floating point operations, and the small ones."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedConfig, Sam2Config, SamConfig

SIDE = 1024
# facebookresearch/segment-anything, build_sam.py: width, depth, heads and global layers of ViT.
VITS = {
    "SAM ViT-B": (768, 12, 12, (2, 5, 8, 11)),
    "SAM ViT-L": (1024, 24, 16, (5, 11, 17, 23)),
    "SAM ViT-H": (1280, 32, 16, (7, 15, 23, 31)),
}
# facebookresearch/sam2, configs/sam2.1/*.yaml and modeling/backbones/hieradet.py: width and heads of the first stage, blocks of
# each stage, global blocks, windows of each stage, and the side of the positions' background.
HIERAS = {
    "SAM 2.1 T": (96, 1, (1, 2, 7, 2), (5, 7, 9), (8, 4, 14, 7), 7),
    "SAM 2.1 S": (96, 1, (1, 2, 11, 2), (7, 10, 13), (8, 4, 14, 7), 7),
    "SAM 2.1 B+": (112, 2, (2, 3, 16, 3), (12, 16, 20), (8, 4, 14, 7), 14),
    "SAM 2.1 L": (144, 2, (2, 6, 36, 4), (23, 33, 43), (8, 4, 16, 8), 7),
}
# The benchmark's own, with about a fifth of the layers of ViT-H and Hiera B+ and a seventh and a ninth of their widths. The small
# Hiera is narrower, because what follows its blocks does not shrink with its width: so the small ViT takes 8.95 times its
# operations, and ViT-H 9.22 times those of Hiera B+.
SMALL_VIT = (192, 6, 6, (2, 5))
SMALL_HIERA = (12, 2, (1, 1, 3, 1), (3,), (8, 4, 14, 7), 14)


def vit_config(width: int, depth: int, heads: int, global_layers: tuple[int, ...]) -> SamConfig:
    """Return SAM's configuration at 1024 px."""
    vision = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "mlp_dim": 4 * width,
              "global_attn_indexes": list(global_layers), "image_size": SIDE, "patch_size": 16, "window_size": 14,
              "output_channels": 256, "initializer_range": 0.02}  # fmt: skip
    return SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 256},
        mask_decoder_config={"layer_norm_eps": 1e-5},
    )


def hiera_config(width, heads, blocks, global_blocks, windows, background) -> Sam2Config:
    """Return SAM 2's configuration at 1024 px; width and heads double in each stage."""
    widths = [width * 2**stage for stage in range(4)]
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": width, "num_attention_heads": heads,
                "blocks_per_stage": list(blocks), "embed_dim_per_stage": widths,
                "num_attention_heads_per_stage": [heads * 2**stage for stage in range(4)],
                "window_size_per_stage": list(windows), "global_attention_blocks": list(global_blocks),
                "window_positional_embedding_background_size": [background] * 2, "image_size": [SIDE] * 2}  # fmt: skip
    return Sam2Config(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": widths[::-1],
        }
    )


def encoder_cost(config: PreTrainedConfig) -> dict[str, float]:
    """
    Count the parameters of a mask model's image encoder and its floating point operations for one image (two for a
    multiplication with an addition), on tensors without data.
    """
    vision = config.vision_config
    vision._attn_implementation = "eager"
    with torch.device("meta"):
        encoder = AutoModel.from_config(vision, attn_implementation="eager").eval()
        pixels = torch.empty(1, 3, SIDE, SIDE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(pixels)
    return {
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "operations": counter.get_total_flops(),
    }


def true_costs() -> dict[str, dict[str, float]]:
    """Return `encoder_cost` of the published models."""
    configs = {name: vit_config(*sizes) for name, sizes in VITS.items()}
    configs |= {name: hiera_config(*sizes) for name, sizes in HIERAS.items()}
    return {name: encoder_cost(config) for name, config in configs.items()}
