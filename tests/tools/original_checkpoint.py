"""A tiny random checkpoint in the layout of the original's users."""

import json
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, SamConfig

from convert_checkpoint import to_original
from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration

RANK, ALPHA = 2, 16.0


def make_original(root: Path, sentencepiece_model: Path) -> Path:
    """Write `full.pt` (plain names), `lora.pt` and the base directories into `root`, and return it."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14, "hidden_act": "quick_gelu", "projection_dim": 8}  # fmt: skip
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512}  # fmt: skip
    sam = SamConfig(
        vision_config={"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
                       "window_size": 2, "global_attn_indexes": [1], "output_channels": 32, "num_pos_feats": 16,
                       "mlp_dim": 64, "initializer_range": 0.02},
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 40, "iou_head_hidden_dim": 32, "layer_norm_eps": 1e-5},
    )  # fmt: skip
    torch.manual_seed(0)
    config = GsvaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text, vocab_size=324), sam_config=sam,
                        image_token_id=324, seg_token_id=320, rej_token_id=321)  # fmt: skip
    model = GsvaForConditionalGeneration(config)
    full = {to_original(model.saved_name(name)): torch.randn_like(value) * 0.1 + value for name, value in model.state_dict().items()
            if name not in model.all_tied_weights_keys}  # fmt: skip
    torch.save(full, root / "full.pt")
    lora = {f"model.layers.{i}.self_attn.{module}.lora_{side}.default.weight":
            torch.randn((RANK, 32) if side == "A" else (32, RANK)) * 0.3
            for i in range(2) for module in ("q_proj", "v_proj") for side in "AB"}  # fmt: skip
    torch.save(lora, root / "lora.pt")

    (root / "clip").mkdir()
    place = "model.vision_tower.vision_tower."
    clip = {key.removeprefix(place): value for key, value in full.items() if key.startswith(place)}
    clip |= {"vision_model.embeddings.position_ids": torch.arange(5)[None], "logit_scale": torch.tensor(4.6),
             "text_model.final_layer_norm.weight": torch.ones(8), "visual_projection.weight": torch.zeros(8, 16)}  # fmt: skip
    torch.save(clip, root / "clip/pytorch_model.bin")
    (root / "clip/config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    place = "model.visual_model."
    sam = {key.removeprefix(place): value for key, value in full.items() if key.startswith(place)}
    sam = {key: value * 0.5 if "mask_decoder" in key else value for key, value in sam.items()}
    torch.save(sam, root / "sam.pth")

    (root / "llava").mkdir()
    (root / "llava/tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    (root / "llava/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (root / "llava/config.json").write_text(json.dumps({**text, "vocab_size": 320, "model_type": "llava", "bos_token_id": 1,
                                                        "eos_token_id": 2, "mm_vision_select_layer": -2}))  # fmt: skip
    llava = {
        key: value
        for key, value in full.items()
        if key.startswith(("model.layers", "model.norm", "model.mm_projector"))
    }
    llava |= {key: full[key][:320] * 0.5 for key in ("model.embed_tokens.weight", "lm_head.weight")}
    llava["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(llava, root / "llava/pytorch_model.bin")
    return root
