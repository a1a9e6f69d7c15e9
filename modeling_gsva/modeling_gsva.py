"""GSVA: a LLaVA-like model that prompts SAM's mask decoder with the hidden state of each `[SEG]`, and rejects with `[REJ]`."""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_gsva import GsvaConfig
from .language_gsva import LanguageAdapter, adapter_for, build_vlm
from .llava_v1_gsva import GsvaModel
from .loading_gsva import GsvaWeightsError, StrictLoadingMixin
from .losses_gsva import batch_mask_losses, mask_losses, object_score_loss, upscaled_mask_losses
from .masks_gsva import MaskAdapter, main_map, mask_adapter_class
from .pipeline_gsva import CUSTOM_PIPELINES
from .segmentation_gsva import (
    ConversationCache,
    GsvaSegmentationOutput,
    SegmentationMixin,
    check_padding,
    check_training_length,
    counted,
)
from .transfer_gsva import to_device

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
class GsvaOutput(CausalLMOutputWithPast):
    """
    Output of [`GsvaForConditionalGeneration`].

    Args:
        loss: scalar, the weighted sum of the parts; given `labels`.
        ce_loss, mask_bce_loss, mask_dice_loss, object_score_loss: scalars, the weighted parts; the last one only where the
            configuration gives it a weight.
        logits: (conversations, length, vocabulary). None while training with labels: there they are computed at the
            supervised positions only, for the loss.
        mask_logits: per conversation a (slots, height, width) tensor at the mask decoder's low resolution, given SAM
            inputs; constant zero for `[REJ]`.
        iou_scores: per conversation a (slots,) tensor, the mask decoder's own estimate; 0 for `[REJ]`.
        object_scores: per conversation a (slots,) tensor, the mask decoder's logits of an object being there; NaN for `[REJ]`,
            for which it does not run, unless the object score is trained. None for mask models without them (SAM, SAM-HQ).
        mask_ious: (masks,) the IoU of each predicted mask with its true one at the image's own size, given `mask_labels`;
            of the slots whose true mask is not empty, in reading order.
        slot_logits: (all slots, 2), the logits of `[SEG]` and `[REJ]` at the position that predicts each slot.
        slot_positions: (all slots, 2), conversation and position of each slot in `input_ids`.
    """

    # loss, logits, hidden states, attentions and the cache are the parent's: transformers 5.24 names the cache anew, and renames
    # what others call past_key_values.
    ce_loss: torch.Tensor | None = None
    mask_bce_loss: torch.Tensor | None = None
    mask_dice_loss: torch.Tensor | None = None
    object_score_loss: torch.Tensor | None = None
    mask_logits: tuple[torch.Tensor, ...] | None = None
    iou_scores: tuple[torch.Tensor, ...] | None = None
    object_scores: tuple[torch.Tensor, ...] | None = None
    mask_ious: torch.Tensor | None = None
    slot_logits: torch.Tensor | None = None
    slot_positions: torch.Tensor | None = None
    image_hidden_states: list[torch.Tensor] | None = None


class GsvaKwargs(TransformersKwargs, total=False):  # type: ignore[call-arg]  # mypy does not follow transformers
    """
    Arguments of [`GsvaForConditionalGeneration.forward`] that its signature must not name: transformers' `Trainer` takes
    every parameter whose name holds "label" for one that each batch has, and returns no evaluation loss without it.
    """

    shift_labels: torch.LongTensor | None


# Names of the base's weights in saved directories, and in the model: a directory holds them under the names that they had when
# LLaVA v1 was the only base, which are those of most other bases, too.
SAVED_PARTS = ("model.", "lm_head.")
SAVED_NAMES = {
    f"^{re.escape(part)}": f"vlm.{part}" for part in SAVED_PARTS
}  # as regular expressions, for the libraries
register_checkpoint_conversion_mapping(
    "GsvaForConditionalGeneration", [WeightRenaming(*names) for names in SAVED_NAMES.items()], overwrite=True
)


class GsvaPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    config_class = GsvaConfig
    base_model_prefix = "vlm"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _can_compile_fullgraph = True  # with a static cache; tests/modeling_gsva/test_compile.py

    @property
    def device(self) -> torch.device:
        """Return the device for inputs; under a `device_map` the one on which accelerate runs the model, offloaded or not."""
        place = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return super().device if place is None else torch.device(place)


def in_two_rows(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Apply a function of (rows, hidden), a single row twice: a one-row matmul rounds differently by memory alignment."""
    if not torch.compiler.is_compiling() and len(rows) == 1:  # in this order: an export leaves the number open
        return function(rows.expand(2, -1))[:1]
    return function(rows)


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

    # The base's are added to it; peft asks the whole model for it before it looks at the parts.
    _tied_weights_keys: dict[str, str] = {}

    def __init__(self, config: GsvaConfig):
        super().__init__(config)
        config.set_parts_dtype()
        hidden_size = config.get_text_config().hidden_size
        self.vlm = build_vlm(config.vlm_config)
        sam_config = config.sam_config
        masks = mask_adapter_class(sam_config.model_type)
        masks.prepare_config(sam_config)
        self.sam = AutoModel.from_config(sam_config)
        masks.prepare(self.sam, config.sam_attention)
        prompt_size = sam_config.prompt_encoder_config.hidden_size
        # text_hidden_fcs of the original
        self.mask_projector = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, prompt_size)
        )
        self.post_init()

    def saved_name(self, name: str) -> str:
        """Return the name of a weight in saved directories; see `SAVED_PARTS`."""
        part = name.removeprefix("vlm.")
        return part if part != name and part.startswith(SAVED_PARTS) else name

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Let `load_state_dict` take the names of saved directories, too: transformers' `Trainer` resumes with them."""
        for name in [name for name in state_dict if name.startswith(tuple(prefix + part for part in SAVED_PARTS))]:
            state_dict[f"{prefix}vlm.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def _checkpoint_conversion_mapping(self) -> dict[str, str]:
        """peft reads this to load adapters that were saved under the names of saved directories."""
        return SAVED_NAMES

    @property
    def language(self) -> LanguageAdapter:
        """The interface to the vision-language model."""
        return adapter_for(self.vlm)

    @property
    def masks(self) -> MaskAdapter:
        """The interface to the mask model."""
        return mask_adapter_class(self.config.sam_config.model_type)(self.sam)

    @property
    def model(self) -> nn.Module:
        """The vision-language model without its language head."""
        return self.vlm.base_model

    @property
    def lm_head(self) -> nn.Module:
        """The language head of the vision-language model."""
        return self.vlm.get_output_embeddings()

    def save_pretrained(self, save_directory, **kwargs):
        """Overrides [`PreTrainedModel.save_pretrained`] to name the Auto classes and the pipeline in `config.json`."""
        file = type(self).__module__.rpartition(".")[2]  # of a subclass: transformers copies its file
        names = dict.fromkeys(AUTO_CLASSES, f"{file}.{type(self).__name__}")
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **names}
        self.config.custom_pipelines = deepcopy(CUSTOM_PIPELINES)
        # As loading does, so that a model saves the same configuration before and after loading.
        self.config.vlm_config.dtype = self.config.sam_config.dtype = self.dtype
        self.config.set_parts_dtype()
        super().save_pretrained(save_directory, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.vlm.set_output_embeddings(value)

    def get_image_features(self, *args, **kwargs):
        """See the vision-language model's `get_image_features`, of LLaVA v1 [`GsvaModel.get_image_features`]."""
        kwargs.setdefault("return_dict", self.config.return_dict)
        return self.vlm.base_model.get_image_features(*args, **kwargs)

    def get_sam_embeddings(self, sam_pixel_values: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """
        Encode (images, 3, side, side) as SAM's image embedding, (images, channels, height, width); mask models with several
        maps of an image give a list, the one on which the decoder attends first.
        """
        return self.masks.encode(sam_pixel_values)

    def decode_masks(
        self,
        slot_states: torch.Tensor,
        sam_embeddings: torch.Tensor | list[torch.Tensor],
        slot_images: torch.LongTensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Decode masks: hidden state → prompt → the mask decoder.

        Args:
            slot_states: (slots, hidden), the hidden states that predict each `[SEG]`.
            sam_embeddings: of the images, from `get_sam_embeddings`.
            slot_images: (slots,) the image of each slot.

        Returns:
            Low-resolution mask logits (slots, 4 height, 4 width) and the decoder's IoU estimates (slots,).
        """
        return self._decode(slot_states, sam_embeddings, slot_images)[:2]

    def _decode(self, slot_states, sam_embeddings, slot_images) -> tuple[torch.Tensor, ...]:
        """Do as `decode_masks`, and return object scores (slots,) or None as well. All masks are made here."""
        prompts = in_two_rows(self.mask_projector, slot_states)
        return self.masks.decode(prompts, sam_embeddings, slot_images)

    def _decode_nothing(self, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Run the mask decoder on a dummy image with one state (1, hidden), so that its parameters get a (zero) gradient in
        batches without masks.
        """
        return self._decode(state, self.masks.empty(state), torch.zeros(1, dtype=torch.long, device=state.device))

    def _one_image_each(self, input_ids, sam_embeddings) -> torch.LongTensor:
        """Return (conversations,), the image of each when the caller gives no `image_index`."""
        index = torch.arange(len(input_ids), device=input_ids.device)
        if sam_embeddings is None:
            return torch.full_like(index, -1)
        placeholders = (input_ids == self.config.image_token_id).sum(1)
        if not self.language.images_are_alike:
            placeholders = placeholders > 0
        sam_embeddings = main_map(sam_embeddings)
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
            embedding = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
            ids[(inputs_embeds == embedding).all(-1)] = token_id
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
        num_slots_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[GsvaKwargs],
    ) -> GsvaOutput:
        """
        Args:
            input_ids, attention_mask: (conversations, length); every `<image>` expanded by the processor.
            labels: (conversations, length) token ids, -100 where nothing is learned. Gives the loss.
            pixel_values: (images, 3, h, w) for the vision tower; or `vision_features` kept from it.
            sam_pixel_values: (images, 3, H, W) for SAM; or `sam_embeddings` kept from it. Gives the masks.
            image_index: (conversations,) the image of each conversation, -1 for none; by default one each, in order.
            original_sizes, reshaped_input_sizes: (images, 2) as (height, width), needed for the mask losses.
            mask_labels: per conversation the true masks (slots, height, width) at the image's own size, an empty
                one for a no-target expression. A slot that truncation cut off (the processor's `max_length` shortens the
                text and leaves the masks) counts as a mask of constant zero logits, as in the original.
            num_items_in_batch, num_masks_in_batch, num_slots_in_batch: numbers of supervised tokens, of masks that count in
                the mask losses and of slots with a true mask, empty or not, of the whole optimizer step. Given them, micro-batches add up to exactly the loss of one big batch; without them each batch is
                averaged by itself, as the original does. Given only the number of tokens (by a plain `Trainer`), the mean
                over a batch's masks counts by its part of these tokens.
            shift_labels: (conversations, length), `labels` aligned with the positions that predict them (sharded sequences).

        Raises:
            ValueError: labels of a conversation that is longer than the model's context; the positions of its image count.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        if labels is not None and input_ids is not None:
            check_training_length(self.config, input_ids.shape[1])
        outputs = self.language.run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_index=image_index,
            vision_features=vision_features,
            mm_encoder_outputs=mm_encoder_outputs,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (B, L, H)
        passed_on = ("past_key_values", "hidden_states", "attentions", "image_hidden_states")
        result = GsvaOutput(**{name: outputs.get(name) for name in passed_on})
        if labels is None or not self.training:
            result.logits = self.language.logits(slice_logits_to_keep(hidden, logits_to_keep))
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
            every_object = (
                bool(self.config.object_score_loss_weight) and labels is not None and mask_labels is not None
            )
            decoded = self._add_masks(result, hidden, ids, sam_embeddings, image_index, every_object)
            if labels is not None and mask_labels is not None:
                sizes = original_sizes, reshaped_input_sizes
                only_tokens = num_masks_in_batch is None and num_items_in_batch is not None
                part = (shift_labels != -100).sum() / num_items_in_batch if only_tokens else 1.0
                self._add_mask_losses(result, mask_labels, image_index, *sizes, num_masks_in_batch, part)
                if every_object:
                    self._add_object_score_loss(result, mask_labels, num_slots_in_batch, part)
        if self.training and labels is not None:
            # A batch may hold no mask, and the decoder's estimates may not count in the loss; see GsvaModel.forward.
            decoded = decoded or self._decode_nothing(hidden[:1, 0])
            result.loss = result.loss + 0.0 * sum(part.sum() for part in decoded if part is not None)
        return GsvaOutput(**result)  # as a tuple in the order of the fields

    def _add_masks(self, result: GsvaOutput, hidden, input_ids, sam_embeddings, image_index, every_object=False):
        """
        Put the slots' masks and logits into `result`, object scores of `[REJ]` as well if `every_object`; return what the mask
        decoder gave, or None if it did not run.
        """
        slots = self.find_slots(input_ids)  # (S, 2)
        states = hidden[slots[:, 0], slots[:, 1] - 1]  # (S, H): the position that predicts the slot
        is_seg = input_ids[slots[:, 0], slots[:, 1]] == self.config.seg_token_id
        # The language head before the mask decoder, as `forward` runs them where there is no slot: with sharded weights (ZeRO-3)
        # all processes must call the parts in one order.
        result.slot_positions, result.slot_logits = slots, self._slot_logits(states)
        return self._slot_masks(result, slots, states, is_seg, sam_embeddings, image_index, every_object)

    def _add_object_score_loss(self, result: GsvaOutput, mask_labels, num_slots, part=1.0):
        if result.object_scores is None:
            raise ValueError(
                f"object_score_loss_weight={self.config.object_score_loss_weight}, but the mask model "
                f"({self.config.sam_config.model_type}) has no object score to train; set it to 0."
            )
        loss = object_score_loss(self.config, result.object_scores, mask_labels, num_slots)
        result.object_score_loss = part * loss
        result.loss = result.loss + result.object_score_loss

    def _add_mask_losses(
        self, result: GsvaOutput, mask_labels, image_index, original_sizes, reshaped_sizes, num_masks, part=1.0
    ):
        bce, dice, result.mask_ious = batch_mask_losses(
            self.config, result.mask_logits or (), mask_labels, image_index, original_sizes, reshaped_sizes, num_masks
        )
        result.mask_bce_loss, result.mask_dice_loss = part * bce, part * dice
        result.loss = result.loss + result.mask_bce_loss + result.mask_dice_loss

    def _slot_logits(self, states: torch.Tensor) -> torch.Tensor:
        return in_two_rows(self.language.logits, states)[
            :, [self.config.seg_token_id, self.config.rej_token_id]
        ].float()

    def _slot_masks(self, result, slots, states, is_seg, sam_embeddings, image_index, every_object=False):
        """
        Put masks, constant zero logits for `[REJ]`, and the mask decoder's estimates into `result`, per conversation.

        Args:
            slots: (slots, 2), conversation and position of each.
            states: (slots, hidden), the states that predict them.
            is_seg: (slots,) booleans, the slots that get a mask.
            every_object: also get the object scores of the others that have an image.

        Returns:
            The mask decoder's outputs for the slots for which it ran, or None.
        """
        slot_images = image_index[slots[:, 0]]
        # One read for everything that the host must know.
        facts = torch.stack([slots[:, 0], is_seg.to(slots), slot_images.to(slots)], 1).tolist()
        if any(shown and image < 0 for _, shown, image in facts):
            raise ValueError(
                "A conversation without an image (image_index -1) holds [SEG]: there is nothing to segment."
            )
        counts = counted([[row, shown] for row, shown, _ in facts], len(image_index))
        runs = [n for n, (_, shown, image) in enumerate(facts) if shown or (every_object and image >= 0)]
        side = main_map(sam_embeddings).shape[-1] * 4  # SAM's decoder upscales its embedding twice by 2
        masks = states.new_zeros(len(states), side, side, dtype=self.sam.dtype)
        iou, objects = masks.new_zeros(len(states)), masks.new_full((len(states),), float("nan"))
        decoded = None
        if runs:
            places = to_device(runs, states.device)
            decoded = self._decode(states[places], sam_embeddings, slot_images[places])
            shown = [place for place, n in enumerate(runs) if facts[n][1]]
            of_shown: Any = slice(None) if len(shown) == len(runs) else to_device(shown, states.device)
            masks = masks.masked_scatter(is_seg[:, None, None], decoded[0][of_shown].to(masks))  # autocast may differ
            iou = iou.masked_scatter(is_seg, decoded[1][of_shown].to(iou))
            if decoded[2] is not None:
                objects = objects.index_copy(0, places, decoded[2].to(objects))
        result.mask_logits, result.iou_scores = masks.split(counts), iou.split(counts)
        if self.masks.has_objects:
            result.object_scores = objects.split(counts)
        return decoded

    def _ce_loss(self, hidden, targets, num_items=None):
        """Return the cross-entropy over the tokens of `targets` except -100; only their logits are computed."""
        supervised = targets != -100
        places = supervised.nonzero(as_tuple=True)
        logits = self.language.logits(hidden[places]).float()
        total = F.cross_entropy(logits, targets[places].to(logits.device), reduction="sum")
        return self.config.ce_loss_weight * total / (supervised.sum().clamp(min=1) if num_items is None else num_items)

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, **kwargs):
        """
        Generate text like [`GenerationMixin.generate`], with any of its strategies. Inputs that only masks need are
        dropped, so that `model.generate(**inputs)` takes the same as `model.segment(**inputs)`; `segment_sequences` makes
        the masks.

        Raises:
            ValueError: prompts padded on the right.
        """
        attention_mask, prompts = kwargs.get("attention_mask"), kwargs.get("input_ids", inputs)
        if attention_mask is None and prompts is not None:
            attention_mask = torch.ones_like(prompts)
        if attention_mask is not None and attention_mask.ndim == 2:
            check_padding(attention_mask)
            self.check_generation(attention_mask, kwargs)
        if (image_index := kwargs.pop("image_index", None)) is not None and prompts is not None:
            # The bases know an image for each conversation; here conversations share images, each encoded once.
            names = {*self.language.image_inputs, "pixel_values", "vision_features"} & kwargs.keys()
            images = self.language.encode({name: kwargs.pop(name) for name in names})
            kwargs |= self.language.generate_inputs(prompts, images, image_index)
        self.vlm.generation_config = self.generation_config
        return self.vlm.generate(
            inputs, **{name: value for name, value in kwargs.items() if name not in MASK_ONLY_INPUTS}
        )


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
