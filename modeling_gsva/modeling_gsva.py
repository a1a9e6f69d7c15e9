"""GSVA: a LLaVA-like model that prompts SAM's mask decoder with the hidden state of each `[SEG]`, and rejects with `[REJ]`."""

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_gsva import GsvaConfig
from .loading_gsva import GsvaWeightsError, StrictLoadingMixin
from .losses_gsva import batch_mask_losses, mask_losses, upscaled_mask_losses
from .pipeline_gsva import CUSTOM_PIPELINES
from .sam_attention_gsva import use_chunked_attention
from .sam_decoder_gsva import rows_of, share_images, used_by_weight
from .segmentation_gsva import (
    ConversationCache,
    GsvaSegmentationOutput,
    SegmentationMixin,
    check_context,
    check_padding,
)

# Inputs that only the masks need: the language model has no use for them, so `generate` drops them.
MASK_ONLY_INPUTS = (
    "sam_pixel_values",
    "sam_embeddings",
    "original_sizes",
    "reshaped_input_sizes",
    "mask_labels",
    "answer_ids",
    "answer_attention_mask",
    "expressions",
)

# The Auto classes that load a saved model (PEFT asks for AutoModelForCausalLM). All give the whole model with its masks.
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMaskGeneration")


@dataclass
class GsvaModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of [`GsvaModel`]: the language model's, with `image_hidden_states`, the projected image features, one
    (positions, hidden) tensor per placeholder run of the text.
    """

    image_hidden_states: list[torch.Tensor] | None = None


@dataclass
class GsvaOutput(ModelOutput):
    """
    Output of [`GsvaForConditionalGeneration`].

    Args:
        loss: scalar, the weighted sum of the three parts; given `labels`.
        ce_loss, mask_bce_loss, mask_dice_loss: scalars, the weighted parts.
        logits: (conversations, length, vocabulary). None while training with labels: there they are computed at the
            supervised positions only, for the loss.
        mask_logits: per conversation a (slots, height, width) tensor at the mask decoder's low resolution, given SAM
            inputs; constant zero for `[REJ]`.
        iou_scores: per conversation a (slots,) tensor, the mask decoder's own estimate; 0 for `[REJ]`.
        mask_ious: (masks,) the IoU of each predicted mask with its true one at the image's own size, given `mask_labels`;
            of the slots whose true mask is not empty, in reading order.
        slot_logits: (all slots, 2), the logits of `[SEG]` and `[REJ]` at the position that predicts each slot.
        slot_positions: (all slots, 2), conversation and position of each slot in `input_ids`.
    """

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    mask_bce_loss: torch.Tensor | None = None
    mask_dice_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mask_logits: tuple[torch.Tensor, ...] | None = None
    iou_scores: tuple[torch.Tensor, ...] | None = None
    mask_ious: torch.Tensor | None = None
    slot_logits: torch.Tensor | None = None
    slot_positions: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: list[torch.Tensor] | None = None


class GsvaKwargs(TransformersKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict, which mypy cannot see
    """
    Arguments of [`GsvaForConditionalGeneration.forward`] that its signature must not name: transformers' `Trainer` takes
    every parameter whose name holds "label" for one that each batch has, and returns no evaluation loss without it.
    """

    shift_labels: torch.LongTensor | None


def _note_dtype(config, dtype: torch.dtype):
    """Set it in every part's config, as loading does, so that a model saves the same config before and after loading."""
    for name in config.sub_configs:
        part = getattr(config, name)
        part.dtype = dtype
        _note_dtype(part, dtype)


def _grad_if_trained(module: nn.Module):
    """Build no graph for a frozen tower, even if a hook on its inputs asks for one (peft's enable_input_require_grads)."""
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
    return torch.set_grad_enabled(trained)


class GsvaPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    config_class = GsvaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _can_compile_fullgraph = True  # with a static cache; tests/modeling_gsva/test_compile.py

    @property
    def device(self) -> torch.device:
        """The device for inputs; under a `device_map` the one on which accelerate runs the model, offloaded or not."""
        place = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return super().device if place is None else torch.device(place)


class GsvaModel(GsvaPreTrainedModel):
    """Vision tower, projector and language model: from images and text to hidden states."""

    def __init__(self, config: GsvaConfig):
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
        with _grad_if_trained(self.vision_tower):
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
            An output whose `pooler_output` lists one (positions, hidden) tensor per conversation that has an image, and
            whose `last_hidden_state` is `vision_features`; on demand also the vision tower's hidden states and attentions.
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
            per_text = [features[i] for i in indices if i >= 0]
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
        elif input_ids is not None and past_key_values is None and (input_ids == self.config.image_token_id).any():
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


class GsvaForConditionalGeneration(GsvaPreTrainedModel, SegmentationMixin, GenerationMixin):
    r"""
    GSVA with its language head and its mask decoder.

    Example:

    ```python
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)
    inputs = processor(images=[image], expressions=[["the red circle", "the unicorn"]], return_tensors="pt")
    results = processor.post_process_segmentation(model.segment(**inputs), inputs)
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: GsvaConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.model = GsvaModel(config)
        self.lm_head = nn.Linear(hidden_size, config.text_config.vocab_size, bias=False)
        self.sam = AutoModel.from_config(config.sam_config)
        use_chunked_attention(self.sam)
        share_images(self.sam)
        prompt_size = config.sam_config.prompt_encoder_config.hidden_size
        # text_hidden_fcs of the original
        self.mask_projector = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, prompt_size)
        )
        self.post_init()

    def save_pretrained(self, save_directory, **kwargs):
        """Overrides [`PreTrainedModel.save_pretrained`] to name the Auto classes and the pipeline in `config.json`."""
        file = type(self).__module__.rpartition(".")[2]  # of a subclass: transformers copies its file
        names = dict.fromkeys(AUTO_CLASSES, f"{file}.{type(self).__name__}")
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **names}
        self.config.custom_pipelines = deepcopy(CUSTOM_PIPELINES)
        _note_dtype(self.config, self.dtype)
        super().save_pretrained(save_directory, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values=None, image_index=None, vision_features=None, **kwargs):
        """See [`GsvaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_index, vision_features, **kwargs)

    def get_sam_embeddings(self, sam_pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode (images, 3, side, side) as SAM's image embedding, (images, channels, height, width)."""
        encoder = self.sam.vision_encoder
        with _grad_if_trained(encoder):
            return encoder(sam_pixel_values.to(encoder.dtype)).last_hidden_state

    def decode_masks(
        self, slot_states: torch.Tensor, sam_embeddings: torch.Tensor, slot_images: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Decode masks: hidden state → prompt → SAM's mask decoder. All masks are made here.

        Args:
            slot_states: (slots, hidden), the hidden states that predict each `[SEG]`.
            sam_embeddings: (images, channels, height, width).
            slot_images: (slots,) the image of each slot.

        Returns:
            Low-resolution mask logits (slots, 4 height, 4 width) and the decoder's IoU estimates (slots,).
        """
        sam, decoder_dtype = self.sam, self.sam.dtype
        prompts = self.mask_projector(slot_states).to(decoder_dtype)[:, None]  # (S, 1 token, C)
        by_weight = (sam.shared_image_embedding, *used_by_weight(sam.mask_decoder))
        with ExitStack() as onloaded:
            for module in by_weight:  # accelerate loads offloaded weights of modules that are called; these are not
                onloaded.enter_context(align_module_device(module))
            no_mask = rows_of(sam.prompt_encoder.no_mask_embed, 1, prompts.device).reshape(1, -1, 1, 1)
            # Positional arguments: peft's wrapper of a fully trained module needs the first one so.
            masks, iou = sam.mask_decoder(
                sam_embeddings.to(decoder_dtype),
                sam.get_image_wide_positional_embeddings().to(decoder_dtype),
                prompts,  # sparse
                no_mask,  # dense
                False,  # multimask_output
                slot_images.to(sam_embeddings.device),
            )
        return masks[:, 0], iou[:, 0]

    def _decode_nothing(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Run the mask decoder on a dummy image with one state (1, hidden), so that its parameters get a (zero) gradient in
        batches without masks.
        """
        vision = self.config.sam_config.vision_config
        side = vision.image_size // vision.patch_size
        embedding = state.new_zeros(1, vision.output_channels, side, side)
        return self.decode_masks(state, embedding, torch.zeros(1, dtype=torch.long, device=state.device))

    def _one_image_each(self, input_ids, sam_embeddings) -> torch.LongTensor:
        """Return (conversations,), the image of each when the caller gives no `image_index`."""
        index = torch.arange(len(input_ids), device=input_ids.device)
        if sam_embeddings is None:
            return torch.full_like(index, -1)
        placeholders = (input_ids == self.config.image_token_id).sum(1)
        if len(sam_embeddings) != len(index) or (placeholders != placeholders[0]).any():
            raise ValueError(
                f"{len(index)} conversations but {len(sam_embeddings)} images, not one in each: pass image_index, the image in "
                "which each conversation's masks are made (-1 for none)."
            )
        return index

    def _slot_ids(self, inputs_embeds: torch.Tensor) -> torch.LongTensor:
        """Return (conversations, length): the ids of `[SEG]` and `[REJ]` at their embeddings, -1 elsewhere."""
        ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        for token_id in (self.config.seg_token_id, self.config.rej_token_id):
            ids[self.model.find_token(token_id, None, inputs_embeds)] = token_id
        return ids

    def find_slots(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Return (all slots, 2): conversation and position of every `[SEG]` and `[REJ]`, in reading order."""
        is_slot = (input_ids == self.config.seg_token_id) | (input_ids == self.config.rej_token_id)
        is_slot[:, 0] = False  # nothing predicts the first position
        return is_slot.nonzero()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        original_sizes: torch.LongTensor | None = None,
        reshaped_input_sizes: torch.LongTensor | None = None,
        mask_labels: list[torch.Tensor] | None = None,
        vision_features: torch.Tensor | None = None,
        sam_embeddings: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_masks_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[GsvaKwargs],
    ) -> GsvaOutput:
        """
        Args:
            input_ids, attention_mask: (conversations, length); every `<image>` expanded by the processor.
            labels: (conversations, length) token ids, -100 where nothing is learned. Gives the loss.
            pixel_values: (images, 3, h, w) for the vision tower; or `vision_features` kept from it.
            sam_pixel_values: (images, 3, H, W) for SAM; or `sam_embeddings` kept from it. Gives the masks.
            image_index: (conversations,) which image each conversation is about, -1 for none; by default one each, in
                order.
            original_sizes, reshaped_input_sizes: (images, 2) as (height, width), needed for the mask losses.
            mask_labels: per conversation the true masks (slots, height, width) at the image's own size, an empty
                one for a no-target expression. A slot that truncation cut off (the processor's `max_length` shortens the
                text and leaves the masks) counts as a mask of constant zero logits, as in the original.
            num_items_in_batch, num_masks_in_batch: numbers of supervised tokens and of masks of the whole optimizer
                step. Given them, micro-batches add up to exactly the loss of one big batch; without them each batch is
                averaged by itself, as the original does. Given only the number of tokens (by a plain `Trainer`), the mean
                over a batch's masks counts by its part of these tokens.
            shift_labels: (conversations, length), `labels` already aligned with the positions that predict them, where
                a sequence is trained in shards.
        """
        shift_labels = kwargs.pop("shift_labels", None)
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
        hidden = outputs.last_hidden_state  # (B, L, H)
        passed_on = ("past_key_values", "hidden_states", "attentions", "image_hidden_states")
        result = GsvaOutput(**{name: outputs.get(name) for name in passed_on})
        if labels is None or not self.training:
            result.logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        if labels is not None:
            if shift_labels is None:
                shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
            result.loss = result.ce_loss = self._ce_loss(hidden, shift_labels, num_items_in_batch)

        decoded = None
        if sam_pixel_values is not None or sam_embeddings is not None:
            ids = self._slot_ids(inputs_embeds) if input_ids is None else input_ids
            if sam_embeddings is None:
                sam_embeddings = self.get_sam_embeddings(sam_pixel_values)
            if image_index is None:
                image_index = self._one_image_each(ids, sam_embeddings)
            decoded = self._add_masks(result, hidden, ids, sam_embeddings, image_index)
            if labels is not None and mask_labels is not None:
                sizes = original_sizes, reshaped_input_sizes
                part = 1.0
                if num_masks_in_batch is None and num_items_in_batch is not None:
                    part = (shift_labels != -100).sum() / num_items_in_batch
                self._add_mask_losses(result, mask_labels, image_index, *sizes, num_masks_in_batch, part)
        if self.training and labels is not None:
            # A batch may hold no mask, and the IoU estimates never count in the loss; see GsvaModel.forward.
            masks, iou = decoded or self._decode_nothing(hidden[:1, 0])
            result.loss = result.loss + 0.0 * (masks.sum() + iou.sum())
        return GsvaOutput(**result)  # as a tuple in the order of the fields

    def _add_masks(self, result: GsvaOutput, hidden, input_ids, sam_embeddings, image_index):
        """Put the slots' masks and logits into `result`; return masks and IoU estimates, or None without `[SEG]`."""
        slots = self.find_slots(input_ids)  # (S, 2)
        states = hidden[slots[:, 0], slots[:, 1] - 1]  # (S, H): the position that predicts the slot
        is_seg = input_ids[slots[:, 0], slots[:, 1]] == self.config.seg_token_id
        masks, iou = self._slot_masks(states, is_seg, sam_embeddings, image_index[slots[:, 0]])
        counts = torch.bincount(slots[:, 0], minlength=len(input_ids)).tolist()
        result.slot_positions = slots
        result.slot_logits = self._slot_logits(states)
        result.mask_logits, result.iou_scores = masks.split(counts), iou.split(counts)
        return (masks, iou) if is_seg.any() else None

    def _add_mask_losses(
        self, result: GsvaOutput, mask_labels, image_index, original_sizes, reshaped_sizes, num_masks, part=1.0
    ):
        assert result.mask_logits is not None  # of _add_masks
        bce, dice, result.mask_ious = batch_mask_losses(
            self.config, result.mask_logits, mask_labels, image_index, original_sizes, reshaped_sizes, num_masks
        )
        result.mask_bce_loss, result.mask_dice_loss = part * bce, part * dice
        result.loss = result.loss + result.mask_bce_loss + result.mask_dice_loss

    def _slot_logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(states)[:, [self.config.seg_token_id, self.config.rej_token_id]].float()

    def _slot_masks(self, states, is_seg, sam_embeddings, slot_images):
        """Return masks (slots, h, w), constant zero logits for `[REJ]`, and IoU estimates (slots,)."""
        if (is_seg & (slot_images < 0)).any():
            raise ValueError(
                "A conversation without an image (image_index -1) holds [SEG]: there is nothing to segment."
            )
        side = sam_embeddings.shape[-1] * 4  # SAM's decoder upscales its embedding twice by 2
        masks = states.new_zeros(len(states), side, side, dtype=self.sam.dtype)
        iou = masks.new_zeros(len(states))
        if is_seg.any():
            seg_masks, seg_iou = self.decode_masks(states[is_seg], sam_embeddings, slot_images[is_seg])
            masks = masks.masked_scatter(is_seg[:, None, None], seg_masks.to(masks))  # autocast may differ
            iou = iou.masked_scatter(is_seg, seg_iou.to(iou))
        return masks, iou

    def _ce_loss(self, hidden, targets, num_items=None):
        """Return the cross-entropy over the tokens of `targets` but -100; only their logits are computed."""
        supervised = targets != -100
        logits = self.lm_head(hidden[supervised]).float()
        total = F.cross_entropy(logits, targets[supervised].to(logits.device), reduction="sum")
        return self.config.ce_loss_weight * total / (supervised.sum().clamp(min=1) if num_items is None else num_items)

    def generate(self, inputs: torch.Tensor | None = None, **kwargs):
        """
        Generate text like [`GenerationMixin.generate`], with any of its strategies. Inputs that only masks need are
        dropped, so that `model.generate(**inputs)` takes the same as `model.segment(**inputs)`; `segment_sequences` makes
        the masks.

        Raises:
            ValueError: prompts padded on the right.
        """
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.ndim == 2:
            check_padding(attention_mask)
            self.check_generation(attention_mask, kwargs)
        return super().generate(
            inputs, **{name: value for name, value in kwargs.items() if name not in MASK_ONLY_INPUTS}
        )

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        """Also refuse prompts that do not fit the language model's context with the longest answer asked for."""
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        check_context(self.config, input_ids_length, generation_config.max_length - input_ids_length)

    def _get_candidate_generator(self, *args, **kwargs):
        """Keep prompt lookup from proposing `<image>`, which the prompt holds but the vocabulary may not."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator):
            generator.vocab_size = max(generator.vocab_size, self.config.image_token_id + 1)
            no_image = SuppressTokensLogitsProcessor([self.config.image_token_id])
            generator.logits_processor = LogitsProcessorList([*generator.logits_processor, no_image])
        return generator


__all__ = [
    "ConversationCache",
    "GsvaForConditionalGeneration",
    "GsvaModel",
    "GsvaPreTrainedModel",
    "GsvaSegmentationOutput",
    "GsvaWeightsError",
    "mask_losses",
    "upscaled_mask_losses",
]
