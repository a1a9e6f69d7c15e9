"""The language side of a GSVA: one interface over every vision-language model of transformers, and over LLaVA v1."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import ModelOutput

from .llava_v1_gsva import LlavaV1Config, LlavaV1ForConditionalGeneration

# Inputs of an image that the forward pass wants beside the encoded image: Qwen's grids, from which positions are made.
PER_IMAGE_INPUTS = ("image_grid_thw",)
# The image is the prefix of a prefix language model: its positions and the prompt's attend to each other both ways, and
# only the answer (token type 1) is causal. So a prefix cannot be run before the prompt is known.
PREFIX_LANGUAGE_MODELS = ("paligemma",)
# Layers whose cache can be shared. The states of others (convolutions, linear attention) run through padding and cannot go back.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Output layers that squash their logits by the text configuration's `final_logit_softcapping`.
SOFTCAPPED = ("gemma3", "paligemma")


def build_vlm(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the vision-language model of a configuration, with new weights."""
    # CODEPATH: the original's checkpoints are LLaVA v1, which transformers does not have; it builds every other base.
    if isinstance(config, LlavaV1Config) or config.model_type == LlavaV1Config.model_type:
        return LlavaV1ForConditionalGeneration(config)
    return AutoModelForImageTextToText.from_config(config)


@dataclass
class EncodedImages:
    """
    Images after the vision tower and the projector.

    Args:
        features: output of the model's `get_image_features`, each image once.
        per_image: the inputs of PER_IMAGE_INPUTS, one row per image.
    """

    features: ModelOutput
    per_image: dict[str, torch.Tensor] = field(default_factory=dict)


class LanguageAdapter:
    """
    Everything that GSVA asks of a vision-language model.

    Args:
        vlm: a `...ForConditionalGeneration` whose `base_model` has `get_image_features` and takes `mm_encoder_outputs`.

    Raises:
        ValueError: a model that lacks one of them, or has no image token.
    """

    images_are_alike = False  # whether every image takes the same number of placeholders

    def __init__(self, vlm: PreTrainedModel):
        self.vlm, self.base, self.config = vlm, vlm.base_model, vlm.config
        self.text_config = vlm.config.get_text_config(decoder=True)
        self.arguments = set(inspect.signature(self.base.forward).parameters)
        missing = [] if hasattr(self.base, "get_image_features") else ["get_image_features"]
        missing += [] if "mm_encoder_outputs" in self.arguments else ["mm_encoder_outputs"]
        missing += [] if getattr(vlm.config, "image_token_id", None) is not None else ["config.image_token_id"]
        if missing:
            raise ValueError(
                f"{type(vlm).__name__} (model type {vlm.config.model_type!r}) cannot be the base of a GSVA: it lacks "
                f"{', '.join(missing)}. Take a vision-language model that encodes its images apart from the text, such as llava, "
                "qwen3_vl, internvl or smolvlm."
            )
        self.image_token_id: int = vlm.config.image_token_id

    @property
    def image_inputs(self) -> tuple[str, ...]:
        """The arguments of `get_image_features` that describe images."""
        parameters = inspect.signature(self.base.get_image_features).parameters.values()
        options = ("vision_feature_layer", "vision_feature_select_strategy", "return_dict")
        return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in options)

    @property
    def shares_prefix(self) -> bool:
        """Whether prompts that begin alike may share a key-value cache of their beginning."""
        layers = set(getattr(self.text_config, "layer_types", None) or ())
        return self.config.model_type not in PREFIX_LANGUAGE_MODELS and layers <= ATTENTION_LAYERS

    @property
    def resumes_generation(self) -> bool:
        """Return whether `generate` begins right behind a cache, without inputs for what the cache holds."""
        return False

    @property
    def other_inputs(self) -> tuple[str, ...]:
        """Inputs of the processor beside ids, mask and pixels: descriptions of images, and types of tokens."""
        types = ("mm_token_type_ids", "token_type_ids")
        return tuple(name for name in (*self.image_inputs, *types) if name != "pixel_values")

    @property
    def has_windows(self) -> bool:
        """Whether some layers attend within a sliding window, so that the cache must keep all and masks go by position."""
        layers = DynamicCache(config=self.text_config).layers
        return any(getattr(layer, "is_sliding", False) for layer in layers)

    def window_masks(
        self, cached: torch.Tensor, columns: torch.Tensor, width: int, is_image: torch.Tensor | None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """
        Return additive attention masks (conversations, 1, width, cached) for the last `width` of the cached tokens.

        Args:
            cached: (conversations, cached), 0 at padding.
            columns: (conversations, cached), the place of each token in its conversation without padding.
            is_image: (conversations, width), 1 at tokens of an image, which attend to each other both ways; or None.
        """
        count = cached.shape[1]
        order = torch.arange(count, device=cached.device)
        queries = order[count - width :, None]
        allowed = (order <= queries) & cached.bool()[:, None]  # (B, width, cached)
        distance = columns[:, count - width :, None] - columns[:, None]
        near = allowed & (distance < self.text_config.sliding_window)
        # CODEPATH: in Gemma 3 the tokens of an image see each other both ways; other bases with a window are causal.
        if is_image is not None and self.config.model_type == "gemma3":
            both = F.pad(is_image[:, :, None] * is_image[:, None], (count - width, 0)).bool()
            allowed, near = allowed | both, near | both
        itself = order == queries  # padding attends to itself: a row without any would be NaN

        def additive(mask):
            mask = mask | (itself & ~mask.any(-1, keepdim=True))
            lowest = torch.finfo(self.base.dtype).min
            return torch.zeros(mask.shape, dtype=self.base.dtype, device=mask.device).masked_fill(~mask, lowest)[
                :, None
            ]

        if self.text_config.model_type in ("mistral", "phi3"):  # all layers alike
            return additive(near)
        return {"full_attention": additive(allowed), "sliding_attention": additive(near)}

    def encode(self, inputs: dict[str, Any]) -> Any:
        """Encode each image once, as [`EncodedImages`]; None without images. `inputs` are the model's processor's."""
        given = {name: inputs[name] for name in self.image_inputs if inputs.get(name) is not None}
        if not any(name.startswith("pixel_values") for name in given):
            return None
        given["pixel_values"] = given["pixel_values"].to(self.base.dtype)
        with align_module_device(self.base):  # LLaVA-NeXT reads its `image_newline` here, which may be offloaded
            features = self.base.get_image_features(**given, return_dict=True)
        return EncodedImages(features, {name: given[name] for name in PER_IMAGE_INPUTS if name in given})

    def select(self, images: Any, image_index: torch.LongTensor, input_ids: torch.LongTensor) -> dict[str, Any]:
        """
        Return the arguments of the forward pass that carry the images of these conversations.

        Images are told apart by their numbers of placeholders: some models encode an image in tiles and do not keep how many.

        Args:
            image_index: (conversations,) the image of each, -1 for none.
            input_ids: (conversations, length).

        Raises:
            ValueError: placeholders that are not as many as the features of the images.
        """
        index = [image for image in image_index.tolist() if image >= 0]
        if images is None or not index:
            return {}
        counts = (input_ids == self.image_token_id).sum(1).tolist()
        lengths = {image: count for image, count in zip(image_index.tolist(), counts) if image >= 0}
        features = images.features.pooler_output
        per_image = [len(part) for part in features]
        if any(lengths[image] != (per_image[image] if image < len(per_image) else -1) for image in lengths):
            per_image = [lengths.get(image, -1) for image in range(max(lengths) + 1)]  # of tiles
        total = sum(len(part) for part in features)
        if min(per_image) < 0 or sum(per_image) != total:
            raise ValueError(
                f"The images give {total} features, but the text holds {[lengths[image] for image in sorted(lengths)]} "
                "placeholder tokens for them. Build the inputs with the processor, one <image> in each conversation that has "
                "an image, and every image in one conversation at least."
            )

        def pick(parts):
            split = torch.cat(list(parts)).split(per_image)
            picked = [split[image] for image in index]
            return torch.cat(picked)[None] if isinstance(parts, torch.Tensor) else picked

        kept = {"pooler_output": pick(features)}
        if getattr(images.features, "deepstack_features", None) is not None:
            kept["deepstack_features"] = [pick(layer) for layer in images.features.deepstack_features]
        per_row = {name: value[index] for name, value in images.per_image.items()}
        return {"mm_encoder_outputs": {"image": type(images.features)(**kept)}, **per_row}

    def token_types(self, input_ids: torch.LongTensor, is_answer: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Return the types of tokens that the model tells apart: those of the image, or of the answer in a prefix model.

        Args:
            is_answer: (conversations, length) booleans, True from the first token of the answer on.
        """
        is_image = (input_ids == self.image_token_id).long()
        types = {}
        if "mm_token_type_ids" in self.arguments:
            types["mm_token_type_ids"] = is_image
        if "token_type_ids" in self.arguments:
            is_prefix_model = self.config.model_type in PREFIX_LANGUAGE_MODELS
            types["token_type_ids"] = is_answer.long() if is_prefix_model else is_image
        return types

    def positions(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> torch.LongTensor:
        """
        Return the positions of whole conversations, (conversations, length) or (axes, conversations, length).

        Args:
            inputs: their token types and the grids of their images.
        """
        grids = {name: inputs[name] for name in PER_IMAGE_INPUTS if name in inputs}
        types = {name: value for name, value in inputs.items() if name.endswith("token_type_ids")}
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, **grids, **types}
        positions = self.vlm._prepare_position_ids_for_generation(input_ids, arguments)
        return positions + (self.config.model_type in PREFIX_LANGUAGE_MODELS)  # whose positions begin with 1

    def whole_inputs(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        is_answer: torch.Tensor,
        images: EncodedImages | None,
        image_index: torch.LongTensor,
    ) -> dict[str, Any]:
        """Return all arguments of one forward pass over whole conversations."""
        inputs = {**self.select(images, image_index, input_ids), **self.token_types(input_ids, is_answer)}
        positions = self.positions(input_ids, attention_mask, inputs)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions, **inputs}

    def run(
        self, image_index=None, vision_features=None, mm_encoder_outputs=None, labels=None, **inputs
    ) -> ModelOutput:
        """
        Run the model on a batch as the processor makes it, images included.

        Args:
            image_index: (conversations,) the image of each, -1 for none; by default one each, in order.
            vision_features: images from `encode`, in place of their pixels.
            mm_encoder_outputs: images as the model's own forward pass takes them.
            labels: (conversations, length), from which a prefix model takes where answers begin.
            inputs: arguments of the model's forward pass, and images.
        """
        images = vision_features if vision_features is not None else self.encode(inputs)
        inputs = {name: value for name, value in inputs.items() if value is not None and name not in self.image_inputs}
        input_ids = inputs.get("input_ids")
        if mm_encoder_outputs is not None:
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        elif input_ids is not None and inputs.get("past_key_values") is None:
            if image_index is None:
                image_index = torch.arange(len(input_ids), device=input_ids.device)
            mask = inputs.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask
            answer = torch.zeros_like(input_ids) if labels is None else (labels != -100).long().cumsum(1)
            inputs = {**self.whole_inputs(input_ids, mask, answer > 0, images, image_index), **inputs}
        return self.hidden(**inputs)

    def generate_inputs(
        self, input_ids: torch.LongTensor, images: EncodedImages | None, image_index: torch.LongTensor
    ) -> dict[str, Any]:
        """Return the arguments of `generate` beside prompts and their mask."""
        types = self.token_types(input_ids, torch.zeros_like(input_ids, dtype=torch.bool))
        return {**self.select(images, image_index, input_ids), **types}

    def hidden(self, **inputs) -> ModelOutput:
        """Run the model without its head."""
        return self.base(**inputs, return_dict=True)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return (..., vocabulary) logits of hidden states (..., hidden)."""
        logits = self.vlm.get_output_embeddings()(states)
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        # CODEPATH: Gemma 3 and PaliGemma cap their logits; the others give those of the head.
        if cap is not None and self.config.model_type in SOFTCAPPED:
            logits = torch.tanh(logits / cap) * cap
        return logits


class LlavaV1Adapter(LanguageAdapter):
    """
    LLaVA v1, whose images are kept between vision tower and projector: the projector is trained while the tower's output may
    come from a cache.
    """

    shares_prefix = True
    images_are_alike = True

    @property
    def resumes_generation(self) -> bool:
        """Return whether `generate` begins right behind a cache: not where layers attend within a sliding window."""
        return not self.has_windows

    def run(
        self, image_index=None, vision_features=None, mm_encoder_outputs=None, labels=None, **inputs
    ) -> ModelOutput:
        """Run `GsvaModel`, which takes images, kept features and `image_index` itself."""
        images = {"image_index": image_index, "vision_features": vision_features}
        return self.hidden(**images, mm_encoder_outputs=mm_encoder_outputs, **inputs)

    def encode(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Return (images, positions, vision hidden), the projector's input."""
        if inputs.get("vision_features") is not None or inputs.get("pixel_values") is None:
            return inputs.get("vision_features")
        return self.base.get_vision_features(inputs["pixel_values"])

    def select(self, images, image_index, input_ids) -> dict[str, Any]:
        """Return the images for `GsvaModel.forward`, which projects and counts them itself."""
        return {} if images is None else {"vision_features": images, "image_index": image_index}

    def generate_inputs(self, input_ids, images, image_index) -> dict[str, Any]:
        """Return the projected images: they must not be projected again at each step."""
        if images is None:
            return {}
        features = self.base.get_image_features(None, image_index, images, return_dict=True)
        return {"mm_encoder_outputs": {"image": features}}


def adapter_for(vlm: nn.Module) -> LanguageAdapter:
    """Return the adapter of a vision-language model."""
    kind = LlavaV1Adapter if vlm.config.model_type == LlavaV1Config.model_type else LanguageAdapter
    return kind(vlm)


__all__ = ["EncodedImages", "LanguageAdapter", "adapter_for", "build_vlm"]
