"""Tiny random vision-language models of every family that can be the base of a GSVA, and mask models, by transformers alone."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration

VOCABULARY, IMAGE, SEG, REJ, VIDEO, VISION_START, VISION_END = 320, 290, 291, 292, 293, 288, 289
HIDDEN, PIXELS, PATCH = 32, 28, 7
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": PIXELS,
    "patch_size": PATCH,
}  # fmt: skip
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_TOWER = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "intermediate_size": 48, "out_hidden_size": HIDDEN, "in_channels": 3,
}  # fmt: skip
QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
FIRST_RANK = (
    "llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3",
)  # fmt: skip
SECOND_RANK = ("paligemma", "lfm2_vl", "qwen3_5")
# Beyond a window of 12 tokens, which the conversations of the tests are longer than.
WINDOWED = ("llava mistral", "llava qwen2", "llava gemma2", "gemma3 windowed")


def _configuration(family: str) -> dict:
    """Return the arguments of `AutoConfig.for_model` beside the model's type."""
    llava = {"vision_config": {**TOWER, "model_type": "clip_vision_model"}, "image_token_index": IMAGE}
    mistral = {**TEXT, "model_type": "mistral", "sliding_window": None}
    qwen2 = {**TEXT, "model_type": "qwen2"}
    gemma3 = {
        **TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    two = {"text_config": {**gemma3, "sliding_window": 512}, "vision_config": {**TOWER, "vision_use_head": False}}
    two |= {"image_token_index": IMAGE, "mm_tokens_per_image": 4, "boi_token_index": 288, "eoi_token_index": 289}
    mrope = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
    qwen3 = {**TEXT, "head_dim": 8, "rope_parameters": {**mrope["rope_parameters"], "mrope_interleaved": True}}
    positions = {**QWEN_TOWER, "num_position_embeddings": 16}
    hybrid = {
        **TEXT, "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "rope_parameters": {
            **ROPE, "mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.25,
        },
    }  # fmt: skip
    gemma2 = {**TEXT, "model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 12}
    num_patches = {k: v for k, v in SIGLIP.items() if k != "image_size"} | {
        "model_type": "siglip2_vision_model",
        "num_patches": 16,
    }
    return {
        "llava": {**llava, "text_config": {**TEXT, "model_type": "llama"}},
        "llava mistral": {**llava, "text_config": {**mistral, "sliding_window": 12}},
        "llava qwen2": {
            **llava, "text_config": {**qwen2, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
        },
        "llava gemma2": {**llava, "text_config": gemma2},
        "llava_next": {**llava, "text_config": mistral, "image_grid_pinpoints": PINPOINTS},
        "llava_onevision": {
            **llava, "text_config": qwen2, "vision_config": SIGLIP, "video_token_index": VIDEO,
            "image_grid_pinpoints": [[28, 28], *PINPOINTS], "vision_aspect_ratio": "anyres_max_9",
        },
        "qwen2_5_vl": {
            "text_config": {**TEXT, **mrope}, **QWEN_TOKENS,
            "vision_config": {**QWEN_TOWER, "window_size": 28, "fullatt_block_indexes": [1]},
        },
        "qwen3_vl": {
            "text_config": qwen3, "vision_config": {**positions, "deepstack_visual_indexes": [0, 1]}, **QWEN_TOKENS,
        },
        "qwen3_5": {"text_config": hybrid, "vision_config": positions, **QWEN_TOKENS},
        "internvl": {
            "text_config": qwen2, "image_token_id": IMAGE, "image_seq_length": 4, "tie_word_embeddings": False,
            "vision_config": {**TOWER, "image_size": [PIXELS] * 2, "patch_size": [PATCH] * 2},
        },
        "smolvlm": {
            "text_config": {**TEXT, "model_type": "llama"}, "vision_config": TOWER, "image_token_id": IMAGE, "scale_factor": 2,
        },
        "gemma3": two,
        "gemma3 windowed": {**two, "text_config": {**gemma3, "sliding_window": 12}},
        "paligemma": {
            "text_config": {**TEXT, "model_type": "gemma", "head_dim": 8}, "image_token_index": IMAGE,
            "vision_config": {**SIGLIP, "projection_dim": HIDDEN}, "projection_dim": HIDDEN,
        },
        "lfm2_vl": {
            "text_config": {**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2},
            "vision_config": num_patches, "image_token_id": IMAGE, "downsample_factor": 2, "projector_hidden_size": 32,
        },
    }[family]  # fmt: skip


def base_config(family: str):
    """Return the configuration of a tiny model."""
    return AutoConfig.for_model(family.split()[0], **_configuration(family))


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Draw weights that are large enough for inputs to matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.12)
            elif "norm" not in name and "A_log" not in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def make_base(family: str):
    """Return a tiny model with random weights; no two runs differ."""
    torch.manual_seed(0)
    model = randomize(AutoModelForImageTextToText.from_config(base_config(family)))
    model.tie_weights()
    return model


def make_images(family: str, count: int = 2) -> dict[str, torch.Tensor]:
    """Return the inputs for some images as the family's processor gives them, each image once."""
    generator = torch.Generator().manual_seed(7)
    kind = family.split()[0]

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    if kind in ("llava_next", "llava_onevision"):
        sizes = torch.tensor([[60, 90], [90, 60]])[:count]
        return {"pixel_values": random(count, 5, 3, PIXELS, PIXELS), "image_sizes": sizes}
    if kind in ("qwen2_5_vl", "qwen3_vl", "qwen3_5"):
        grids = torch.tensor([[1, 4, 6], [1, 8, 4]])[:count]
        return {"pixel_values": random(int(grids.prod(1).sum()), 3 * 2 * PATCH**2), "image_grid_thw": grids}
    if kind == "smolvlm":
        return {"pixel_values": random(count, 1, 3, PIXELS, PIXELS)}
    if kind == "lfm2_vl":
        shapes = torch.tensor([[4, 4]] * count)
        mask = torch.ones(count, 16, dtype=torch.long)
        return {
            "pixel_values": random(count, 16, 3 * PATCH**2),
            "spatial_shapes": shapes,
            "pixel_attention_mask": mask,
        }
    return {"pixel_values": random(count, 3, PIXELS, PIXELS)}


def images_of(images: dict[str, torch.Tensor], index: list[int]) -> dict[str, torch.Tensor]:
    """Return the images of conversations one after another, as a processor gives them that knows nothing of sharing."""
    if "image_grid_thw" in images:
        parts = images["pixel_values"].split(images["image_grid_thw"].prod(1).tolist())
        return {
            "pixel_values": torch.cat([parts[n] for n in index]),
            "image_grid_thw": images["image_grid_thw"][index],
        }
    return {name: value[index] for name, value in images.items()}


# ---- mask models ------------------------------------------------------------------------------------------------------
PROMPTS = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
DECODER = {
    "hidden_size": 32, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 32,
}  # fmt: skip
SIZES = [[16, 16], [8, 8], [4, 4]]
MASK_MODELS = ("sam", "sam_hq", "sam2", "sam3_tracker")
SIDES = {"sam": 64, "sam_hq": 64, "sam2": 64, "sam3_tracker": 56}  # of their inputs in pixels


def mask_config(kind: str) -> dict:
    """Return the configuration of a tiny mask model as a dict."""
    vit = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
        "output_channels": 32, "mlp_dim": 16, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 16,
    }  # fmt: skip
    hiera = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [4, 2, 4, 2], "global_attention_blocks": [3],
    }  # fmt: skip
    sam3 = {
        "model_type": "sam3_vit_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "window_size": 2, "global_attn_indexes": [1],
        "pretrain_image_size": 56,
    }  # fmt: skip
    neck = {"fpn_hidden_size": 32, "backbone_feature_sizes": SIZES}
    vision = {
        "sam": vit,
        "sam_hq": {**vit, "num_hidden_layers": 4, "global_attn_indexes": [0, 1, 2, 3]},
        "sam2": {
            "model_type": "sam2_vision_model", "backbone_config": hiera, "backbone_channel_list": [64, 32, 16, 8], **neck,
        },
        "sam3_tracker": {"backbone_config": sam3, "scale_factors": [4.0, 2.0, 1.0, 0.5], **neck},
    }[kind]  # fmt: skip
    prompts = {**PROMPTS, "image_size": 56, "patch_size": 14} if kind == "sam3_tracker" else PROMPTS
    decoder = {**DECODER, "vit_dim": 16} if kind == "sam_hq" else DECODER
    config = AutoConfig.for_model(
        kind, vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    return config.to_dict()


# ---- whole models and their inputs ----
INDEX = [0, 0, 1]  # the images of three conversations


def rms(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference relative to the expected values."""
    given, expected = given.detach().double(), expected.detach().double()
    return float((given - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def make_gsva(family: str, sam: dict | None = None) -> GsvaForConditionalGeneration:
    """Return a GSVA over a tiny base, with SAM's masks unless another mask model's configuration is given."""
    base, sam = make_base(family), sam or mask_config("sam")
    config = GsvaConfig(vlm_config=base.config.to_dict(), sam_config=sam, seg_token_id=SEG, rej_token_id=REJ)
    torch.manual_seed(1)
    model = randomize(GsvaForConditionalGeneration(config))
    model.vlm.load_state_dict(base.state_dict())
    model.tie_weights()
    return model


def padded_rows(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return ids, mask


def images_in(inputs: dict) -> dict[str, torch.Tensor]:
    texts = ("input_ids", "attention_mask", "answer_ids", "answer_attention_mask", "image_index", "sam_pixel_values")
    return {name: value for name, value in inputs.items() if name not in texts}


def conversation(inputs: dict, row: int) -> tuple[torch.Tensor, int]:
    """Tokens of a conversation without padding, and where its answer begins."""
    prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
    answer = inputs["answer_ids"][row][inputs["answer_attention_mask"][row].bool()]
    return torch.cat([prompt, answer]), len(prompt)


def make_inputs(model: GsvaForConditionalGeneration, family: str, side: int = 64) -> dict[str, torch.Tensor]:
    """Return three prompts over two images, left-padded, that share their beginnings, and right-padded answers of two slots.

    Args:
        side: Of the mask model's input in pixels (`SIDES`).
    """
    images, generator = make_images(family), torch.Generator().manual_seed(3)
    with torch.no_grad():
        features = model.language.encode(images).features.pooler_output
    counts = [len(features[image]) for image in range(2)]

    def words(number: int) -> list[int]:
        return torch.randint(5, 280, (number,), generator=generator).tolist()

    before = [1, *words(4), VISION_START]
    prompts = [
        [*before, *[IMAGE] * counts[image], VISION_END, 17, 18, *words(5 + 2 * row)] for row, image in enumerate(INDEX)
    ]
    answers = [[*words(2 + row), SEG, *words(3), SEG, 9, 2] for row in range(3)]
    ids, mask = padded_rows(prompts, left=True)
    answer_ids, answer_mask = padded_rows(answers, left=False)
    return {
        "input_ids": ids, "attention_mask": mask, "answer_ids": answer_ids, "answer_attention_mask": answer_mask,
        "image_index": torch.tensor(INDEX), "sam_pixel_values": torch.randn(2, 3, side, side, generator=generator), **images,
    }  # fmt: skip
