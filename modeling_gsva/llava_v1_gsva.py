"""
The original's vision-language model, LLaVA v1, as one of the bases of a GSVA: CLIP, a linear projector and LLaMA.

It differs from transformers' `llava` in the projector, and in `<image>`, whose id may lie beyond the embedding.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.configuration_utils import SubConfigSpec
from transformers.generation import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .loading_gsva import StrictLoadingMixin

SubConfig: Any
if TYPE_CHECKING:
    SubConfig = Any  # reading gives a configuration
else:
    SubConfig = dict | PreTrainedConfig | None  # the types that a caller may give


@strict
class LlavaV1Config(PreTrainedConfig):
    r"""
    Configuration of [`LlavaV1ForConditionalGeneration`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`): the vision tower, CLIP ViT-L/14 at 224 px in the paper.
        text_config (`dict` or `PreTrainedConfig`): the language model, LLaMA 7B or 13B in the paper. Its vocabulary
            size is the number of rows of the embedding, with `[SEG]` and `[REJ]`.
        image_token_id (`int`): id of `<image>`. Features always replace it, so it may lie beyond the embedding.
        vision_feature_layer (`int`): which hidden state of the vision tower is read (LLaVA: the last but one).
        vision_feature_select_strategy (`str`): `"default"` drops the class token, `"full"` keeps it.
    """

    model_type = "gsva_llava_v1"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        # LLaMA's vocabulary and the tokens GSVA adds, <image> excepted.
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", init_kwargs={"vocab_size": 32004}),
    }

    vision_config: SubConfig = None
    text_config: SubConfig = None
    image_token_id: int = 32004
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    tie_word_embeddings: bool = False

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Overrides the parent to find this model's part in the directory of a whole GSVA."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "gsva":
            config_dict = config_dict.get("vlm_config") or {**config_dict, "model_type": cls.model_type}
            config_dict = {
                name: value for name, value in config_dict.items() if name in (*V1_FIELDS, "model_type", "dtype")
            }
        return config_dict, kwargs

    @property
    def image_seq_length(self) -> int:
        """Number of placeholder positions of one image in the text (256 for ViT-L/14 at 224 px)."""
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return patches + (self.vision_feature_select_strategy == "full")


AutoConfig.register(LlavaV1Config.model_type, LlavaV1Config, exist_ok=True)

# The fields that GsvaConfig held itself when LLaVA v1 was the only base.
V1_FIELDS = (
    "vision_config",
    "text_config",
    "image_token_id",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "tie_word_embeddings",
)


@dataclass
class GsvaModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`GsvaModel`]: the language model's, with `image_hidden_states`, the projected image features, one
    (positions, hidden) tensor per placeholder run of the text.
    """

    image_hidden_states: list[torch.Tensor] | None = None


def grad_if_trained(module: nn.Module):
    """Build no graph for a frozen tower, even if a hook on its inputs asks for one (peft's enable_input_require_grads)."""
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
    return torch.set_grad_enabled(trained)


class LlavaV1PreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    config_class = LlavaV1Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True


class GsvaModel(LlavaV1PreTrainedModel):
    """Vision tower, projector and language model: from images and text to hidden states."""

    def __init__(self, config: LlavaV1Config):
        config = getattr(config, "vlm_config", None) or config  # of a whole GSVA
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # LLaVA v1's projector is a single linear layer.
        self.multi_modal_projector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # A whole model's directory also holds these parts. (The whole model would inherit a class attribute for it.)
        others = ("lm_head.", "sam.", "mask_projector.")
        loading_info.unexpected_keys = {name for name in loading_info.unexpected_keys if not name.startswith(others)}
        super()._adjust_missing_and_unexpected_keys(loading_info)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode (images, 3, height, width) as (images, positions, vision hidden), the projector's input."""
        return self._vision_outputs(pixel_values).last_hidden_state

    def _vision_outputs(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs):
        """Return the vision tower's output, with the projector's input as its `last_hidden_state`."""
        layer, pixel_values = self.config.vision_feature_layer, pixel_values.to(self.vision_tower.dtype)
        every = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with grad_if_trained(self.vision_tower):
            outputs = self.vision_tower(
                pixel_values, output_hidden_states=every or [layer], return_dict=True, **kwargs
            )
            features = outputs.hidden_states[layer]
            default = self.config.vision_feature_select_strategy == "default"
            outputs.last_hidden_state = features[:, 1:] if default else features
        return outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Encode each image once and project it into the language model's space.

        Args:
            pixel_values: (images, 3, height, width); or
            vision_features: (images, positions, vision hidden), kept from [`GsvaModel.get_vision_features`].
            image_index: (conversations,) the image of each conversation, -1 for none; by default one each, in order.

        Returns:
            An output whose `pooler_output` lists one (positions, hidden) tensor per conversation that has an image (an empty
            one if none has), and whose `last_hidden_state` is `vision_features`; on demand also the vision tower's hidden states and attentions.
        """
        tower = {}
        if vision_features is None:
            tower = self._vision_outputs(pixel_values, **kwargs)
            vision_features = tower.last_hidden_state
        features = self.multi_modal_projector(vision_features.to(self.multi_modal_projector.weight.dtype))
        if image_index is None:
            per_text = list(features)
        else:
            indices = image_index.tolist()
            if indices and max(indices) >= len(features):
                raise ValueError(
                    f"image_index points to image {max(indices)}, but only {len(features)} images were given."
                )
            # Images that no conversation shows give an empty tensor, so that the projector has a (zero) gradient all the same.
            per_text = [features[i] for i in indices if i >= 0] or [features[:0].flatten(0, 1)]
        return BaseModelOutputWithPooling(
            last_hidden_state=vision_features,
            pooler_output=per_text,
            hidden_states=tower.get("hidden_states"),
            attentions=tower.get("attentions"),
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Return (conversations, length) booleans, True at `<image>`; raise if there are not as many as features."""
        mask = self.find_token(self.config.image_token_id, input_ids, inputs_embeds)
        if mask.sum() != image_features.shape[0]:
            raise ValueError(
                f"The text holds {int(mask.sum())} image placeholder tokens, but the images give {image_features.shape[0]} "
                f"features ({self.config.image_seq_length} each). Build the inputs with the processor, with one <image> "
                "in each conversation that has an image (truncation must not cut it)."
            )
        return mask

    def find_token(
        self, token_id: int, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Return (conversations, length) booleans, True at the token; without ids it is found by its embedding."""
        if input_ids is not None:
            return input_ids == token_id
        token_id = torch.tensor(self._embeddable(token_id), device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token_id)).all(-1)

    def _begins_with_image(self, input_ids: torch.LongTensor | None, cache: Cache | None) -> bool:
        """Return whether there is `<image>` at the beginning of a text; behind a cache (5.24's name of it) nothing is read."""
        return input_ids is not None and cache is None and bool((input_ids == self.config.image_token_id).any())

    def _embeddable(self, token_ids):
        """Replace ids beyond the embedding: the original's `<image>` has no row there, and its row is never used."""
        vocab_size = self.config.text_config.vocab_size  # peft's wrappers of the embedding do not tell their size
        if isinstance(token_ids, int):
            return token_ids if token_ids < vocab_size else 0
        return token_ids.masked_fill(token_ids >= vocab_size, 0)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        vision_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GsvaModelOutputWithPast:
        """
        Args:
            input_ids: (conversations, length); or `inputs_embeds` (conversations, length, hidden).
            pixel_values, image_index, vision_features: see [`GsvaModel.get_image_features`].
            mm_encoder_outputs: `{"image": output of get_image_features}`, which `generate` computes once.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(self._embeddable(input_ids))  # (B, L, H)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if image_outputs is None and (pixel_values is not None or vision_features is not None):
            image_outputs = self.get_image_features(pixel_values, image_index, vision_features, return_dict=True)
        if image_outputs is not None and len(image_outputs.pooler_output):
            features = torch.cat(list(image_outputs.pooler_output)).to(inputs_embeds)  # (placeholders, H)
            placeholders = self.get_placeholder_mask(input_ids, inputs_embeds, features)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders.unsqueeze(-1), features)
        elif self._begins_with_image(input_ids, kwargs.get("cache", past_key_values)):
            raise ValueError("The text holds image placeholder tokens, but no image was given: pass pixel_values.")
        elif self.training:
            # Distributed training waits for the gradient of every parameter, in batches without an image as well.
            weight = self.multi_modal_projector.weight
            unused = self.multi_modal_projector(weight.new_zeros(1, self.config.vision_config.hidden_size))
            inputs_embeds = inputs_embeds + 0.0 * unused.sum().to(inputs_embeds)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return GsvaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state.to(inputs_embeds.device),  # of a model over several devices
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_outputs.pooler_output if image_outputs is not None else None,
        )


class LlavaV1ForConditionalGeneration(LlavaV1PreTrainedModel, GenerationMixin):
    """[`GsvaModel`] with its language head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LlavaV1Config):
        super().__init__(config)
        self.model = GsvaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values=None, image_index=None, vision_features=None, **kwargs):
        """See [`GsvaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_index, vision_features, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        vision_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: (conversations, length) token ids, -100 where nothing is learned.
            input_ids and other arguments: see [`GsvaModel.forward`].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_index=image_index,
            vision_features=vision_features,
            mm_encoder_outputs=mm_encoder_outputs,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _get_candidate_generator(self, *args, **kwargs):
        """Keep prompt lookup from proposing `<image>`, which the prompt holds but the vocabulary may not."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator):
            generator.vocab_size = max(generator.vocab_size, self.config.image_token_id + 1)
            no_image = SuppressTokensLogitsProcessor([self.config.image_token_id])
            generator.logits_processor = LogitsProcessorList([*generator.logits_processor, no_image])
        return generator


__all__ = ["GsvaModel", "LlavaV1Config", "LlavaV1ForConditionalGeneration"]
