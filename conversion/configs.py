"""Describe the model: configurations and image processor, from the bases' JSON files and from the sizes of tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError

from .reading import read_json, short_repr

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlamaConfig, SamConfig

    from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaImageProcessor

Shapes = Mapping[str, tuple[int, ...]]

ARCHITECTURES = Path(__file__).resolve().parent.parent / "configs" / "architectures"

# Values of LLaVA's mm_vision_select_feature (without or with the class token) and transformers' names for them.
SELECTED_FEATURES = {"patch": "default", "cls_patch": "full"}

# Fields of LLaVA's config.json that describe the language model.
_LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "bos_token_id",
    "eos_token_id",
)
# Sizes that a config.json states, and the tensor and its dimension with the same size. None: the number of layers.
_LLAMA_SIZES = {
    "hidden_size": ("norm.weight", 0),
    "intermediate_size": ("layers.0.mlp.gate_proj.weight", 0),
    "num_hidden_layers": None,
}
_CLIP_SIZES = {
    "hidden_size": ("embeddings.patch_embedding.weight", 0),
    "patch_size": ("embeddings.patch_embedding.weight", 2),
    "intermediate_size": ("encoder.layers.0.mlp.fc1.weight", 0),
    "num_hidden_layers": None,
}


def clip_large() -> dict:
    """Return the sizes of CLIP ViT-L/14, the vision tower of every published GSVA checkpoint."""
    config = json.loads((ARCHITECTURES / "7b.json").read_text(encoding="utf-8"))["vision_config"]
    return {name: value for name, value in config.items() if name != "model_type"}


def check_sizes(path: Path, config: dict, shapes: Shapes, prefix: str, sizes: dict) -> None:
    """Compare a config.json with the tensors before a model is made: one of a million layers would take for ever.

    Raises:
        ValueError: The file and the tensors have different sizes.
    """
    layers = {m[1] for name in shapes if (m := re.match(re.escape(prefix) + r"(?:encoder\.)?layers\.(\d+)\.", name))}
    for name, place in sizes.items():
        shape = () if place is None else shapes.get(prefix + place[0], ())
        size = len(layers) if place is None else shape[place[1]] if len(shape) > place[1] else None
        if name in config and size is not None and config[name] != size:
            raise ValueError(
                f"{path} says {name} is {short_repr(config[name])}, the tensors say {size}; pass the directory of the base "
                "the checkpoint was made from."
            )


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Name the file in errors that transformers raises for its content."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ValueError(f"{path} does not describe a model ({error}); download it again.") from error


def llama_config(directory: Path, vocab_size: int, shapes: Shapes) -> tuple[LlamaConfig, dict]:
    """Return the language model's configuration and the whole content of LLaVA's config.json.

    Raises:
        FileNotFoundError: There is no config.json in `directory`.
        ValueError: It does not describe the tensors.
    """
    from transformers import LlamaConfig

    path = directory / "config.json"
    original = read_json(path)
    if not original:
        raise FileNotFoundError(f"{path} is missing: head counts and norms cannot be read from tensors.")
    values = {name: original[name] for name in _LLAMA_FIELDS if original.get(name) is not None}
    check_sizes(path, values, shapes, "model.language_model.", _LLAMA_SIZES)
    # The original pads with <unk> (main.py: tokenizer.pad_token = tokenizer.unk_token), whatever the base says.
    with naming(path):
        return LlamaConfig(**values, vocab_size=vocab_size, pad_token_id=0), original


def vision_features(directory: Path, llava_config: dict) -> dict:
    """Return the fields of `GsvaConfig` that say which hidden states of CLIP LLaVA takes.

    Raises:
        ValueError: mm_vision_select_feature has an unknown value.
    """
    feature = llava_config.get("mm_vision_select_feature", "patch")
    if not isinstance(feature, str) or feature not in SELECTED_FEATURES:
        raise ValueError(
            f"{directory / 'config.json'}: mm_vision_select_feature is {short_repr(feature)}; known values are "
            f"{', '.join(SELECTED_FEATURES)}."
        )
    return {
        "vision_feature_layer": llava_config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECTED_FEATURES[feature],
    }


def clip_config(directory: Path | None, shapes: Shapes) -> CLIPVisionConfig:
    """Return the vision tower's configuration: that of `directory`, CLIP ViT-L/14 if None.

    Raises:
        FileNotFoundError: There is no config.json in `directory`.
        ValueError: It does not describe the tensors; no directory is given, and the tensors are not ViT-L/14's.
    """
    from transformers import CLIPVisionConfig

    large = clip_large()
    if directory is not None:
        path = directory / "config.json"
        config = read_json(path)
        if not config:
            raise FileNotFoundError(f"{path} is missing: CLIP's head count cannot be read from tensors.")
        config = config.get("vision_config", config)
        if not isinstance(config, dict):
            raise ValueError(f"{path}: vision_config must be an object, got {short_repr(config)}.")
        check_sizes(path, config, shapes, "model.vision_tower.", _CLIP_SIZES)
    elif shapes.get("model.vision_tower.embeddings.patch_embedding.weight", (1024, 3, 14, 14)) == (1024, 3, 14, 14):
        config = large
    else:
        raise ValueError(
            "The vision tower is not CLIP ViT-L/14, so the number of its heads is unknown: pass --clip DIR (its "
            "config.json is enough if the checkpoint has the weights)."
        )
    fields = {*large, "num_channels", "attention_dropout", "initializer_range", "initializer_factor"}
    with naming((directory or Path()) / "config.json"):
        return CLIPVisionConfig(**{name: value for name, value in config.items() if name in fields})


def sam_config(shapes: Shapes) -> SamConfig:
    """Return SAM's configuration with sizes read from its tensors: ViT-H, L, B or another encoder of segment-anything.

    Raises:
        ValueError: A tensor that determines a size is missing, or has another number of dimensions.
    """
    from transformers import SamConfig

    encoder, decoder = "sam.vision_encoder.", "sam.mask_decoder."
    try:
        dim, channels, patch, _ = shapes[encoder + "patch_embed.projection.weight"]
        grid = shapes[encoder + "pos_embed"][1]
        depth = 1 + max(int(m[1]) for m in map(re.compile(re.escape(encoder) + r"layers\.(\d+)\.").match, shapes) if m)
        spans, head_dims = zip(*(shapes[f"{encoder}layers.{i}.attn.rel_pos_h"] for i in range(depth)))
        mlp_dim, hidden = shapes[decoder + "transformer.layers.0.mlp.lin1.weight"]
        mask_tokens = shapes[decoder + "mask_tokens.weight"][0]
        layer = re.compile(re.escape(decoder) + r"transformer\.layers\.\d+\.layer_norm4\.weight")
        layers = sum(bool(layer.fullmatch(name)) for name in shapes)
        positions = shapes["sam.shared_image_embedding.positional_embedding"][1]
        encoder_mlp_dim = shapes[encoder + "layers.0.mlp.lin1.weight"][0]
        output_channels = shapes[encoder + "neck.conv1.weight"][0]
        mask_channels = shapes["sam.prompt_encoder.mask_embed.conv3.weight"][1]
        iou_hidden = shapes[decoder + "iou_prediction_head.proj_in.weight"][0]
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"SAM's sizes cannot be read from its tensors ({error}): pass a whole segment-anything .pth with --sam."
        ) from error
    # A relative position table has 2 * side - 1 rows: layers with the whole grid attend globally, the others in windows.
    whole = 2 * grid - 1
    windows = {(span + 1) // 2 for span in spans if span != whole}
    if len(windows) > 1:
        raise ValueError(f"SAM's encoder has windows of several sizes {sorted(windows)}; segment-anything has one.")
    return SamConfig(
        vision_config={
            "hidden_size": dim,
            "num_channels": channels,
            "patch_size": patch,
            "image_size": grid * patch,
            "num_hidden_layers": depth,
            "num_attention_heads": dim // head_dims[0],
            "mlp_dim": encoder_mlp_dim,
            "output_channels": output_channels,
            "num_pos_feats": positions,
            "window_size": windows.pop() if windows else grid,
            "global_attn_indexes": [i for i, span in enumerate(spans) if span == whole],
            # transformers' default of 1e-10 is meant for loading only
            "initializer_range": 0.02,
        },
        prompt_encoder_config={
            "hidden_size": hidden,
            "image_size": grid * patch,
            "patch_size": patch,
            "mask_input_channels": mask_channels,
        },
        # 1e-5 is torch's default, which segment-anything leaves in the decoder's transformer; transformers has 1e-6.
        mask_decoder_config={
            "hidden_size": hidden,
            "mlp_dim": mlp_dim,
            "num_hidden_layers": layers,
            "layer_norm_eps": 1e-5,
            "num_multimask_outputs": mask_tokens - 1,
            "iou_head_hidden_dim": iou_hidden,
        },
    )


def empty_model(
    config: GsvaConfig, path: str | Path
) -> tuple[GsvaForConditionalGeneration, dict[str, tuple[int, ...]]]:
    """Return the model without memory for its weights, and the shape of each tensor that it is saved with.

    Args:
        path: The files that describe the model, for messages.
    """
    from transformers.initialization import no_init_weights

    from modeling_gsva import GsvaForConditionalGeneration

    with naming(path), torch.device("meta"), no_init_weights():
        model = GsvaForConditionalGeneration(config)
    tied = set(model.all_tied_weights_keys)
    weights = {model.saved_name(name): value for name, value in model.state_dict().items() if name not in tied}
    return model, {name: tuple(value.shape) for name, value in weights.items()}


def image_processor(clip: Path | None, image_size: int, sam_size: int) -> GsvaImageProcessor:
    """Return the image processor, with the preprocessing of CLIP's directory if it has any, else the original's constants.

    Args:
        image_size: Side of CLIP's input in pixels.
        sam_size: Side of SAM's input in pixels.

    Raises:
        ValueError: preprocessor_config.json has a value that is not a mean, standard deviation or resampling filter.
    """
    from modeling_gsva import GsvaImageProcessor

    content = read_json(clip / "preprocessor_config.json") if clip else {}
    options = {name: content[name] for name in ("image_mean", "image_std", "resample") if name in content}
    for name, value in options.items():
        numbers = [value] if name == "resample" else value
        filters = range(6) if name == "resample" else None  # PIL.Image.Resampling
        if (
            not isinstance(numbers, list)
            or len(numbers) != (1 if filters else 3)
            or any(type(number) not in (int, float) or not -1e3 < number < 1e3 for number in numbers)
            or (filters and value not in filters)
            or (name == "image_std" and min(numbers) < 1e-3)
        ):
            raise ValueError(f"{clip}/preprocessor_config.json: {name} is {short_repr(value)}; download it again.")
    return GsvaImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        sam_size={"longest_edge": sam_size},
        **options,
    )
