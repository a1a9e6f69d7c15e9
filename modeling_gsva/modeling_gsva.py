"""GSVA: a LLaVA-like model that prompts SAM's mask decoder with the hidden state of each `[SEG]`, and rejects with `[REJ]`."""

import math
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_gsva import GsvaConfig
from .image_processing_gsva import upscale_mask_logits
from .pipeline_gsva import CUSTOM_PIPELINES
from .sam_attention_gsva import use_chunked_attention
from .sam_decoder_gsva import share_images, used_by_weight

# Constants of the original's losses (model/llava/model/modeling_lisa_gsva.py): the areas of the dice loss are divided by
# 1000 and smoothed by 1e-6, the mean over masks by 1e-8.
DICE_SCALE = 1000.0
DICE_EPS = 1e-6
MASK_COUNT_EPS = 1e-8

# Inputs that only the masks need: the language model never sees them, so `generate` sets them aside.
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

# What quantization on loading leaves alone unless the caller's configuration says otherwise: only the language model's
# layers are. CLIP and SAM lose masks in 4 bit, and the rest is small or trained in full. By prefix, as transformers'
# quantizers match names, those of GsvaModel alone as well.
NOT_QUANTIZED = (
    "vision_tower",
    "multi_modal_projector",
    "model.vision_tower",
    "model.multi_modal_projector",
    "model.language_model.embed_tokens",
    "lm_head",
    "sam",
    "mask_projector",
)
# The names that transformers' quantization configurations have for it.
SKIP_OPTIONS = ("llm_int8_skip_modules", "modules_to_not_convert")
MAX_NAMES = 12  # how many weights of a kind an error names

# The saved model answers to each of them (PEFT asks for AutoModelForCausalLM). All give the whole model, masks included.
AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMaskGeneration")


@dataclass
class GsvaModelOutputWithPast(BaseModelOutputWithPast):
    """
    The language model's output, with `image_hidden_states`: the projected image features, one (positions, hidden)
    tensor per placeholder run of the text.
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
        mask_ious: (masks,) the IoU of each predicted mask with its true one at the picture's own size, given `mask_labels`;
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


@dataclass
class GsvaSegmentationOutput(ModelOutput):
    """
    Output of [`GsvaForConditionalGeneration.segment`], one entry per conversation.

    Args:
        method: how the answers came about: "slots", "generate" or "teacher_forced".
        sequences: (conversations, length) token ids of prompt and answer as the model gave it, padded.
        answer_starts: (conversations,) position at which each answer begins in `sequences`.
        mask_logits: per conversation (slots, height, width) low-resolution logits; constant zero where rejected.
        scores: per conversation (slots,) log-odds of `[SEG]` against `[REJ]`.
        is_rejected: per conversation (slots,) booleans.
        iou_scores: per conversation (slots,), the mask decoder's own estimate of its mask's IoU.
        image_index: (conversations,) which image each conversation is about, -1 for none.
    """

    method: str | None = None
    sequences: torch.LongTensor | None = None
    answer_starts: torch.LongTensor | None = None
    mask_logits: tuple[torch.Tensor, ...] | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    is_rejected: tuple[torch.Tensor, ...] | None = None
    iou_scores: tuple[torch.Tensor, ...] | None = None
    image_index: torch.LongTensor | None = None


def _note_dtype(config, dtype: torch.dtype):
    """In every part's config, as loading does: what is saved first is then what is saved after loading."""
    for name in config.sub_configs:
        part = getattr(config, name)
        part.dtype = dtype
        _note_dtype(part, dtype)


def _grad_if_trained(module: nn.Module):
    """A frozen tower builds no graph, whatever hooks on its inputs ask for (peft's enable_input_require_grads does)."""
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
    return torch.set_grad_enabled(trained)


@contextmanager
def _onloaded(*modules: nn.Module):
    """accelerate brings offloaded weights when their module is called; this brings them to be read from outside it."""
    hooked = [(module, module._hf_hook) for module in modules if hasattr(module, "_hf_hook")]
    for module, hook in hooked:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooked:
            hook.post_forward(module, None)


class GsvaWeightsError(ValueError, RuntimeError):
    """A checkpoint does not hold the weights of the model; `wrong` has all their names by kind."""

    def __init__(self, model_class: type, source, wrong: dict[str, list[str]]):
        self.wrong = wrong
        found = [
            f"{len(names)} {kind}: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}"
            for kind, names in wrong.items()
            if names
        ]
        super().__init__(
            f"The weights of {str(source)!r} are not those of {model_class.__name__}. {'; '.join(found)}. Save the model again "
            "with save_pretrained, convert an original checkpoint with convert_checkpoint.py, or check that config.json is the "
            "weights' own. To go on all the same, what does not fit being initialized at random: strict=False, for shapes "
            "ignore_mismatched_sizes=True."
        )


def _with_default_skips(quantization_config):
    """A copy that leaves NOT_QUANTIZED alone, unless it names modules itself or its method has no such option."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = deepcopy(quantization_config)
    for option in SKIP_OPTIONS:
        if getattr(quantization_config, option, ()) is None:
            setattr(quantization_config, option, list(NOT_QUANTIZED))
    return quantization_config


class GsvaPreTrainedModel(PreTrainedModel):
    config_class = GsvaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _can_compile_fullgraph = True  # with a static cache; tests/modeling_gsva/test_compile.py

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        As a model inside transformers, for what custom code is treated apart in does not concern this one: missing weights
        of modules without parameters of their own would not be initialized as their class wants (CLIP's).
        """
        return False

    @property
    def device(self) -> torch.device:
        """Where inputs belong; of a model in parts (`device_map`) where accelerate takes them, offloaded parts or not."""
        place = getattr(getattr(self, "_hf_hook", None), "execution_device", None)
        return super().device if place is None else torch.device(place)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        strict: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        quantization_config=None,
        **kwargs,
    ):
        """
        [`PreTrainedModel.from_pretrained`], but weights that are missing, unexpected or mis-shaped are an error.

        Args:
            strict: False loads what fits, initializes the rest at random and leaves it at transformers' warning. By
                default True, unless `output_loading_info` hands the report to the caller or `state_dict` is empty.
            ignore_mismatched_sizes: allows mis-shaped weights, which are then initialized at random.
            quantization_config: unless it says itself what to leave alone, only the language model's layers are quantized.

        Raises:
            GsvaWeightsError: a `ValueError` with the names (and a `RuntimeError`, as transformers' for shapes).
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = _with_default_skips(quantization_config)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            ignore_mismatched_sizes=True,  # checked below, with names
            output_loading_info=True,
            **kwargs,
        )
        # Of an adapter `info` only tells about the adapter, the reports about its base as well.
        reports = [info, *(report.to_dict() for report in vars(model).pop("_load_reports", ()))]
        if strict is None:
            strict = not output_loading_info and kwargs.get("state_dict") != {}
        shapes = {
            name: f"{name} (saved {tuple(a)}, model {tuple(b)})"
            for r in reports
            for name, a, b in r["mismatched_keys"]
        }
        wrong = {
            "missing": sorted({name for report in reports for name in report["missing_keys"]} - shapes.keys())
            if strict
            else [],
            "unexpected": sorted({name for report in reports for name in report["unexpected_keys"]}) if strict else [],
            "mis-shaped": [] if ignore_mismatched_sizes else [shapes[name] for name in sorted(shapes)],
        }
        if any(wrong.values()):
            raise GsvaWeightsError(cls, pretrained_model_name_or_path, wrong)
        return (model, info) if output_loading_info else model

    def mark_tied_weights_as_initialized(self, loading_info) -> None:
        """The first that transformers does with a report on loading: kept for `from_pretrained`, which gets only the last."""
        self.__dict__.setdefault("_load_reports", []).append(loading_info)
        if loading_info.conversion_errors:  # a quantized weight that lacks a piece: what comes next would break on it
            unreadable = [f"{name} ({why.splitlines()[-1]})" for name, why in loading_info.conversion_errors.items()]
            loading_info.conversion_errors.clear()
            raise GsvaWeightsError(type(self), self.name_or_path, {"unreadable": sorted(unreadable)})
        super().mark_tied_weights_as_initialized(loading_info)


class GsvaModel(GsvaPreTrainedModel):
    """Vision tower, projector and language model: reads images and text, gives hidden states."""

    def __init__(self, config: GsvaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        # LLaVA v1's projector is a single linear layer.
        self.multi_modal_projector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        # From the whole model's directory it takes its own part. (As a class attribute the whole model would inherit it.)
        own = {
            name
            for name in loading_info.unexpected_keys
            if not name.startswith(("lm_head.", "sam.", "mask_projector."))
        }
        loading_info.unexpected_keys = own
        super()._adjust_missing_and_unexpected_keys(loading_info)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, 3, height, width) → (images, positions, vision hidden), what the projector reads."""
        return self._vision_outputs(pixel_values).last_hidden_state

    def _vision_outputs(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs):
        """The vision tower's output, with what the projector reads as its `last_hidden_state`."""
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
        Encodes each image once and projects it into the language model's space.

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
        """(conversations, length) booleans, True at `<image>`; raises when placeholders and features differ in number."""
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
        """(conversations, length) booleans, True where the token stands, which without ids its embedding tells."""
        if input_ids is not None:
            return input_ids == token_id
        token_id = torch.tensor(self._embeddable(token_id), device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token_id)).all(-1)

    def _embeddable(self, token_ids):
        """`<image>` may lie beyond the embedding (the original's placeholder has no row): its row is never read."""
        vocab_size = self.get_input_embeddings().num_embeddings
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
            mm_encoder_outputs: `{"image": output of get_image_features}`, what `generate` keeps.
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
            # Distributed training waits for every parameter's gradient, also in a batch without an image.
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


def _check_padding(attention_mask: torch.Tensor):
    if not attention_mask[:, -1].all():
        raise ValueError(
            "Prompts are padded on the right, but answers follow them: pad them on the left (padding_side='left'), as "
            "processor(images=..., expressions=...) does."
        )


def _common_length(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with alike."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows)))


class _Reader:
    """
    Reads conversations piece by piece with a key-value cache.

    What the prompts of one image begin with, the image with it, is read once for all of them. Pieces are padded on the
    left, so that each ends in the last column; padding is masked in the cache for good.

    Args:
        sequences, attention_mask: (conversations, length), prompts padded on the left up to column `start`. Tokens may
            still be changed until they are read.
        start: where answers begin. The last token of a prompt is never shared, as it predicts the answer's first one.
        image_index, vision_features: see [`GsvaModel.get_image_features`].
    """

    def __init__(self, model: GsvaModel, sequences, attention_mask, start: int, image_index, vision_features):
        self.model, self.sequences, self.attention_mask = model, sequences, attention_mask
        self.positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        self.begins = [start - length for length in attention_mask[:, :start].sum(1).tolist()]
        self.images = {"image_index": image_index, "vision_features": vision_features}
        self.cache = DynamicCache(config=model.config.text_config)
        self.cached = attention_mask[:, :0]  # the mask of what the cache holds

        image_id = model.config.image_token_id
        prompts = [row[begin : start - 1] for row, begin in zip(sequences.tolist(), self.begins)]
        groups: dict[tuple, list[int]] = {}  # rows of the same image whose prompts agree up to the end of the image
        for row, (prompt, image) in enumerate(zip(prompts, image_index.tolist())):
            through_image = max((n + 1 for n, token in enumerate(prompt) if token == image_id), default=0)
            groups.setdefault((image, *prompt[:through_image]), []).append(row)
        # A prompt alone is read up to the end of its image, a text alone whole.
        common = [
            _common_length([prompts[row] for row in rows]) if len(rows) > 1 else len(key) - 1 or len(prompts[rows[0]])
            for key, rows in groups.items()
        ]
        if len(groups) < len(sequences) and any(common) and not (sequences[:, start - 1] == image_id).any():
            firsts = [rows[0] for rows in groups.values()]
            shared = _Reader(
                model, sequences[firsts], attention_mask[firsts], start, image_index[firsts], vision_features
            )
            shared.read([begin + length for begin, length in zip(shared.begins, common)])
            group_of = dict(sorted((row, n) for n, rows in enumerate(groups.values()) for row in rows))
            self._take(shared, list(group_of.values()))
            self.begins = [begin + common[group_of[row]] for row, begin in enumerate(self.begins)]

    def _take(self, other: "_Reader", rows: list[int]):
        """Goes on from what `other` has read, one of its rows for each of ours."""
        self.cache, self.cached, self.images = other.cache, other.cached[rows], {}
        self.cache.batch_select_indices(torch.tensor(rows, device=self.cached.device))

    def read(self, ends: list[int] | None = None) -> torch.Tensor:
        """
        Reads each row on to its column of `ends`, by default all of it.

        Returns:
            (conversations, width, hidden) states; column p of row r of the sequences is at p - ends[r].
        """
        ends = [self.sequences.shape[1]] * len(self.begins) if ends is None else ends
        width = max(end - begin for begin, end in zip(self.begins, ends))
        ids, mask, position_ids = (self.positions.new_zeros(len(ends), width) for _ in range(3))
        for row, (begin, end) in enumerate(zip(self.begins, ends)):
            if end > begin:
                ids[row, begin - end :] = self.sequences[row, begin:end]
                mask[row, begin - end :] = self.attention_mask[row, begin:end]
                position_ids[row, begin - end :] = self.positions[row, begin:end]
        self.cached = torch.cat([self.cached, mask.to(self.cached)], 1)
        outputs = self.model(
            ids, self.cached, position_ids=position_ids, past_key_values=self.cache, use_cache=True, **self.images
        )
        self.images, self.begins = {}, ends
        return outputs.last_hidden_state

    def go_back(self, rows: list[int], column: int, sequences: torch.LongTensor):
        """After reading all: keeps these rows only and reads on from `column`, where their other `sequences` begin."""
        forgotten = self.sequences.shape[1] - column
        self.cache.crop(-forgotten)
        self.cached = self.cached[:, :-forgotten]
        self._take(self, rows)
        self.sequences, self.attention_mask = sequences[rows], self.attention_mask[rows]
        self.positions = self.positions[rows]
        self.begins = [column] * len(rows)


class GsvaForConditionalGeneration(GsvaPreTrainedModel, GenerationMixin):
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
        """As everywhere in transformers; the saved directory names its Auto classes and its pipeline."""
        names = dict.fromkeys(AUTO_CLASSES, f"{__name__.rpartition('.')[2]}.{type(self).__name__}")
        self.config.auto_map = {**names, **(getattr(self.config, "auto_map", None) or {})}
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
        """(images, 3, side, side) → (images, channels, height, width), SAM's image embedding."""
        encoder = self.sam.vision_encoder
        with _grad_if_trained(encoder):
            return encoder(sam_pixel_values.to(encoder.dtype)).last_hidden_state

    def decode_masks(
        self, slot_states: torch.Tensor, sam_embeddings: torch.Tensor, slot_images: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The one place where masks are made: hidden state → prompt → SAM's mask decoder.

        Args:
            slot_states: (slots, hidden), the hidden states that predict each `[SEG]`.
            sam_embeddings: (images, channels, height, width).
            slot_images: (slots,) the image of each slot.

        Returns:
            Low-resolution mask logits (slots, 4 height, 4 width) and the decoder's IoU estimates (slots,).
        """
        sam, decoder_dtype = self.sam, self.sam.dtype
        prompts = self.mask_projector(slot_states).to(decoder_dtype)[:, None]  # (S, 1 token, C)
        with _onloaded(
            sam.prompt_encoder.no_mask_embed, sam.shared_image_embedding, *used_by_weight(sam.mask_decoder)
        ):
            no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
            # By position: peft's wrapper of a fully trained module takes its first argument so.
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
        """The masks of one state (1, hidden) in an empty picture, for what has to take part in the loss with no weight."""
        vision = self.config.sam_config.vision_config
        side = vision.image_size // vision.patch_size
        embedding = state.new_zeros(1, vision.output_channels, side, side)
        return self.decode_masks(state, embedding, torch.zeros(1, dtype=torch.long, device=state.device))

    def _one_image_each(self, input_ids, sam_embeddings) -> torch.LongTensor:
        """(conversations,): the image of each where it is not told."""
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
        """(conversations, length): the ids of `[SEG]` and `[REJ]` where their embeddings stand, -1 elsewhere."""
        ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        for token_id in (self.config.seg_token_id, self.config.rej_token_id):
            ids[self.model.find_token(token_id, None, inputs_embeds)] = token_id
        return ids

    def find_slots(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """(all slots, 2): conversation and position of every `[SEG]` and `[REJ]`, in reading order."""
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
        shift_labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GsvaOutput:
        """
        Args:
            input_ids, attention_mask: (conversations, length); every `<image>` expanded by the processor.
            labels: (conversations, length) token ids, -100 where nothing is learned. Gives the loss.
            pixel_values: (images, 3, h, w) for the vision tower; or `vision_features` kept from it.
            sam_pixel_values: (images, 3, H, W) for SAM; or `sam_embeddings` kept from it. Gives the masks.
            image_index: (conversations,) which image each conversation is about, -1 for none. Default: one each, in order.
            original_sizes, reshaped_input_sizes: (images, 2) as (height, width), needed for the mask losses.
            mask_labels: per conversation the true masks (slots, height, width) at the picture's own size, an empty
                one for a no-target expression. Where truncation cut slots off, their empty masks still count as in the
                original, their real ones are left out (the original raises).
            num_items_in_batch, num_masks_in_batch: numbers of supervised tokens and of masks of the whole optimizer
                step. Given them, micro-batches add up to exactly the loss of one big batch; without them each batch is
                averaged by itself, as the original does.
            shift_labels: (conversations, length), `labels` already aligned with the positions that predict them, where
                a sequence is trained in shards.
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
        hidden = outputs.last_hidden_state  # (B, L, H)
        result = GsvaOutput(
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
        if labels is None or not self.training:
            result.logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
            result.loss = result.ce_loss = self._ce_loss(hidden, targets, num_items_in_batch)

        masks = None
        if sam_pixel_values is not None or sam_embeddings is not None:
            if input_ids is None:
                input_ids = self._slot_ids(inputs_embeds)
            if sam_embeddings is None:
                sam_embeddings = self.get_sam_embeddings(sam_pixel_values)
            if image_index is None:
                image_index = self._one_image_each(input_ids, sam_embeddings)
            slots = self.find_slots(input_ids)  # (S, 2)
            states = hidden[slots[:, 0], slots[:, 1] - 1]  # (S, H): the position that predicts the slot
            is_seg = input_ids[slots[:, 0], slots[:, 1]] == self.config.seg_token_id
            masks, iou = self._slot_masks(states, is_seg, sam_embeddings, image_index[slots[:, 0]])
            counts = torch.bincount(slots[:, 0], minlength=len(input_ids)).tolist()
            result.slot_positions = slots
            result.slot_logits = self._slot_logits(states)
            result.mask_logits, result.iou_scores = masks.split(counts), iou.split(counts)
            if labels is not None and mask_labels is not None:
                result.mask_bce_loss, result.mask_dice_loss, result.mask_ious = self._mask_losses(
                    result.mask_logits,
                    mask_labels,
                    image_index,
                    original_sizes,
                    reshaped_input_sizes,
                    num_masks_in_batch,
                )
                result.loss = result.loss + result.mask_bce_loss + result.mask_dice_loss
        if self.training and labels is not None:
            # As above: a batch may hold no mask, and the IoU estimates never count in the loss.
            if masks is None or not is_seg.any():
                masks, iou = self._decode_nothing(hidden[:1, 0])
            result.loss = result.loss + 0.0 * (masks.sum() + iou.sum())
        return GsvaOutput(**result)  # as a tuple in the order of the fields

    def _slot_logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(states)[:, [self.config.seg_token_id, self.config.rej_token_id]].float()

    def _slot_masks(self, states, is_seg, sam_embeddings, slot_images):
        """Masks of the `[SEG]` slots, constant zero logits for `[REJ]`: (slots, h, w), and IoU estimates (slots,)."""
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
        """Cross-entropy over the supervised tokens (which are `targets`); logits exist at these positions only."""
        supervised = targets != -100
        logits = self.lm_head(hidden[supervised]).float()
        total = F.cross_entropy(logits, targets[supervised].to(logits.device), reduction="sum")
        return self.config.ce_loss_weight * total / (supervised.sum().clamp(min=1) if num_items is None else num_items)

    def _mask_losses(
        self, mask_logits, mask_labels, image_index, original_sizes, reshaped_input_sizes, num_masks=None
    ):
        """
        BCE and dice, summed over all masks and divided by their number (see the constants above), and the IoUs of the
        masks that are there. Only one conversation's masks exist at the picture's size at a time, backwards too.
        """
        if len(mask_labels) != len(mask_logits):
            raise ValueError(
                f"{len(mask_logits)} conversations but {len(mask_labels)} entries in mask_labels; give one each."
            )
        input_size = self.config.sam_config.vision_config.image_size
        bce_sum = dice_sum = mask_logits[0].new_zeros((), dtype=torch.float32)
        count, ious = 0, [bce_sum.new_zeros(0)]
        for index, (logits, truth) in enumerate(zip(mask_logits, mask_labels)):
            if len(truth) == 0:
                continue
            image = int(image_index[index])
            original_size = tuple(original_sizes[image].tolist())
            if tuple(truth.shape[1:]) != original_size:
                raise ValueError(
                    f"mask_labels[{index}] has masks of size {tuple(truth.shape[1:])}, but its image is "
                    f"{original_size} (height, width). Give masks at the picture's own size."
                )
            if len(logits) > len(truth):
                raise ValueError(
                    f"Conversation {index} has {len(logits)} [SEG]/[REJ] slots but {len(truth)} masks; give one mask per "
                    "slot, an empty one for [REJ]."
                )
            truth = truth.to(logits.device)
            empty = ~truth.bool().flatten(1).any(1)  # any() of bytes gives bytes
            # Decided by the mask being empty, as in the original; a slot that truncation cut off has no logits.
            kept = [n for n in range(len(logits)) if not empty[n]]
            if kept:
                bce, dice, iou = upscaled_mask_losses(
                    logits[kept], truth[kept], reshaped_input_sizes[image].tolist(), original_size, input_size
                )
                bce_sum, dice_sum, count = bce_sum + bce, dice_sum + dice, count + len(kept)
                ious.append(iou)
            if self.config.rejected_slot_loss == "zero_logits" and (number := int(empty.sum())):
                # What mask_losses gives for logits and a mask of nothing but zeros.
                area = 0.5 * math.prod(original_size) / DICE_SCALE
                bce_sum, count = bce_sum + number * math.log(2), count + number
                dice_sum = dice_sum + number * (1 - DICE_EPS / (area + DICE_EPS))
        shared = (count if num_masks is None else num_masks) + MASK_COUNT_EPS
        bce, dice = self.config.bce_loss_weight * bce_sum / shared, self.config.dice_loss_weight * dice_sum / shared
        return bce, dice, torch.cat(ious)

    def generate(self, inputs: torch.Tensor | None = None, **kwargs):
        """
        [`GenerationMixin.generate`] with every of its strategies. Inputs that only masks need are set aside, so that
        `model.generate(**inputs)` takes what `model.segment(**inputs)` takes; `segment_sequences` gives the masks.

        Raises:
            ValueError: prompts padded on the right.
        """
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.ndim == 2:
            _check_padding(attention_mask)
        return super().generate(
            inputs, **{name: value for name, value in kwargs.items() if name not in MASK_ONLY_INPUTS}
        )

    def _get_candidate_generator(self, *args, **kwargs):
        """Prompt lookup must not propose `<image>`, which stands in the prompt but may lie beyond the vocabulary."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator):
            generator.vocab_size = max(generator.vocab_size, self.config.image_token_id + 1)
            no_image = SuppressTokensLogitsProcessor([self.config.image_token_id])
            generator.logits_processor = LogitsProcessorList([*generator.logits_processor, no_image])
        return generator

    @torch.no_grad()
    def segment(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        answer_ids: torch.LongTensor | None = None,
        answer_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        vision_features: torch.Tensor | None = None,
        sam_embeddings: torch.Tensor | None = None,
        method: str = "slots",
        threshold: float = 0.0,
        original_sizes=None,
        reshaped_input_sizes=None,
        expressions=None,
        **generate_kwargs,
    ) -> GsvaSegmentationOutput:
        """
        Answers with masks. `model.segment(**processor(images=..., expressions=..., return_tensors="pt"))`.

        Args:
            input_ids, attention_mask: (conversations, length) prompts, padded on the left.
            answer_ids, answer_attention_mask: (conversations, length) the answers' wording, padded on the right, a
                `[SEG]` or `[REJ]` standing where each slot is. `slots` only looks at where the slots are.
            pixel_values, sam_pixel_values, image_index: see `forward`. Every image is encoded once.
            method: "slots": the answer's wording is given, each slot is the model's own choice and later slots see that
                choice. "generate": the answer is generated from the question alone, `generate_kwargs` go to `generate`.
                "teacher_forced", the original's published protocol: the slots of `answer_ids` (the gold ones) are in the
                input when later ones are decided, and masks come from a second pass in which every slot is `[SEG]`.
            threshold: a slot is rejected when its log-odds of `[SEG]` against `[REJ]` are below it ("slots"). Later slots
                see the likelier token of earlier ones whatever the threshold, so that no score depends on it.
            original_sizes, reshaped_input_sizes, expressions: not used here, for `post_process_segmentation`.

        Raises:
            ValueError: unknown method, answers missing where the method needs them, prompts padded on the right.
        """
        if method not in ("slots", "generate", "teacher_forced"):
            raise ValueError(f"method={method!r} is not known; choose 'slots', 'generate' or 'teacher_forced'.")
        if method != "generate" and answer_ids is None:
            raise ValueError(
                f"method={method!r} needs answer_ids, the answers' wording: build the inputs with processor(images=..., "
                "expressions=...), or use method='generate' for free questions."
            )
        if method != "generate" and generate_kwargs:
            raise ValueError(f"{sorted(generate_kwargs)} only apply to method='generate', not to {method!r}.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        _check_padding(attention_mask)
        if sam_embeddings is None and sam_pixel_values is not None:
            sam_embeddings = self.get_sam_embeddings(sam_pixel_values)
        if vision_features is None and pixel_values is not None:
            vision_features = self.model.get_vision_features(pixel_values)
        if image_index is None:
            image_index = self._one_image_each(input_ids, sam_embeddings)
        images = {"vision_features": vision_features, "sam_embeddings": sam_embeddings, "image_index": image_index}

        if method == "generate":
            if vision_features is not None:
                image_features = self.get_image_features(None, image_index, vision_features, return_dict=True)
                generate_kwargs["mm_encoder_outputs"] = {"image": image_features}
            sequences = self.generate(input_ids, attention_mask=attention_mask, **generate_kwargs)
            sequences = sequences if isinstance(sequences, torch.Tensor) else sequences.sequences
            return self.segment_sequences(sequences, attention_mask, **images)
        assert answer_ids is not None  # seen to above
        if answer_attention_mask is None:
            answer_attention_mask = torch.ones_like(answer_ids)
        answer_ids, answer_attention_mask = answer_ids.to(input_ids), answer_attention_mask.to(attention_mask)
        if method == "slots":
            return self._segment_slots(
                input_ids, attention_mask, answer_ids, answer_attention_mask, threshold, **images
            )
        sequences = torch.cat([input_ids, answer_ids], 1)
        mask = torch.cat([attention_mask, answer_attention_mask], 1)
        return self._segment_teacher_forced(sequences, mask, input_ids.shape[1], **images)

    @torch.no_grad()
    def segment_sequences(
        self,
        sequences: torch.LongTensor,
        attention_mask: torch.Tensor,
        image_index: torch.LongTensor,
        vision_features: torch.Tensor | None = None,
        sam_embeddings: torch.Tensor | None = None,
    ) -> GsvaSegmentationOutput:
        """
        Masks for what `generate` returned, whatever its strategy: one pass over the finished sequences, whose hidden
        states equal those of the steps that wrote them.

        Args:
            sequences: (conversations × returned, prompt + new) ids.
            attention_mask: (conversations, prompt) of the prompts.
            image_index: (conversations,) the image of each, -1 for none.
            vision_features, sam_embeddings: from `model.get_vision_features` and `get_sam_embeddings`.
        """
        copies, start = len(sequences) // len(attention_mask), attention_mask.shape[1]  # num_return_sequences
        attention_mask = attention_mask.repeat_interleave(copies, 0)
        image_index = image_index.repeat_interleave(copies, 0)
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        answers = sequences[:, start:]
        is_end = torch.zeros_like(answers, dtype=torch.bool)
        for token in {pad, *(eos if isinstance(eos, list) else [eos])} - {None}:
            is_end |= answers == token
        alive = torch.cumsum(is_end, 1) - is_end.long() == 0  # up to and including the first end
        mask = torch.cat([attention_mask, alive.to(attention_mask)], 1)
        slots = self._answer_slots(sequences, mask, start)
        hidden = _Reader(self.model, sequences, mask, start, image_index, vision_features).read()
        states = hidden[slots[:, 0], slots[:, 1] - 1 - sequences.shape[1]]
        rejected = sequences[slots[:, 0], slots[:, 1]] == self.config.rej_token_id
        return self._output(
            "generate", sequences, start, slots, states, rejected, ~rejected, image_index, sam_embeddings
        )

    def _segment_teacher_forced(self, sequences, attention_mask, start, image_index, vision_features, sam_embeddings):
        """
        The original's `validate`/`eval_gres` (quirk Q3 of its data pipeline: gold answers are in the input). A slot is
        decided by the arg-max over the whole vocabulary one position earlier; any other token than the gold one counts
        as the opposite decision. Masks come from a second pass in which every slot is `[SEG]`.
        """
        seg_id, rej_id = self.config.seg_token_id, self.config.rej_token_id
        slots = self._answer_slots(sequences, attention_mask, start)
        rows, columns = slots[:, 0], slots[:, 1] - 1 - sequences.shape[1]
        reader = _Reader(self.model, sequences, attention_mask, start, image_index, vision_features)
        states = reader.read()[rows, columns]
        gold, said = sequences[rows, slots[:, 1]], self.lm_head(states).argmax(-1)
        rejected = torch.where(gold == rej_id, said == rej_id, said != seg_id)
        scores = self._slot_scores(states)
        # The second pass differs behind a gold [REJ], and matters where another slot comes after it.
        places = slots.tolist()
        absent = [place for place, token in zip(places, gold.tolist()) if token == rej_id]
        first = dict(reversed(absent))
        again = sorted({row for row, column in places if column > first.get(row, column)})
        if again:
            column = min(first[row] for row in again)
            reader.go_back(again, column, sequences.index_put(tuple(slots.T), gold.new_tensor(seg_id)))
            hidden = reader.read()
            for n, (row, place) in enumerate(places):
                if row in again and place > column:
                    states[n] = hidden[again.index(row), columns[n]]
        every = torch.ones_like(rejected)
        return self._output(
            "teacher_forced", sequences, start, slots, states, rejected, every, image_index, sam_embeddings, scores
        )

    def _segment_slots(
        self,
        input_ids,
        attention_mask,
        answer_ids,
        answer_attention_mask,
        threshold,
        image_index,
        vision_features,
        sam_embeddings,
    ):
        """
        Walks the slots with a key-value cache. Step k feeds every conversation what lies between its slots k-1 and k
        (the chosen token of slot k-1 first) and reads the choice for slot k at the last position. What is fed is always
        the likelier token; `threshold` only decides what is reported, so that scores do not depend on it.
        """
        seg_id, rej_id = self.config.seg_token_id, self.config.rej_token_id
        start = input_ids.shape[1]
        sequences = torch.cat([input_ids, answer_ids], 1)
        alive = torch.cat([attention_mask, answer_attention_mask], 1)
        slots = self._answer_slots(sequences, alive, start)
        per_row = [slots[slots[:, 0] == row, 1].tolist() for row in range(len(sequences))]
        states = input_ids.new_zeros(len(slots), self.config.text_config.hidden_size, dtype=self.dtype)
        scores = torch.zeros(len(slots), device=states.device)
        order = {place: n for n, place in enumerate(map(tuple, slots.tolist()))}
        reader = _Reader(self.model, sequences, alive, start, image_index, vision_features)
        for step in range(max(map(len, per_row), default=0)):
            # Where no slot is left nothing is fed, but for the prompt: all images are taken up in the first step.
            begins = reader.begins
            ends = [
                places[step] if step < len(places) else max(begin, start) for places, begin in zip(per_row, begins)
            ]
            last = reader.read(ends)[:, -1]  # (B, H)
            likely = self._slot_scores(last)
            for row, places in enumerate(per_row):
                if step < len(places):
                    sequences[row, places[step]] = rej_id if likely[row] < 0 else seg_id
                    place = order[row, places[step]]
                    states[place], scores[place] = last[row], likely[row]
        rejected = scores < threshold
        sequences[slots[:, 0], slots[:, 1]] = torch.where(rejected, rej_id, seg_id)
        return self._output(
            "slots", sequences, start, slots, states, rejected, ~rejected, image_index, sam_embeddings, scores
        )

    def _answer_slots(self, sequences, attention_mask, start):
        """(slots, 2): conversation and position of each slot from position `start` on."""
        slots = self.find_slots(sequences.masked_fill(attention_mask == 0, -1))
        return slots[slots[:, 1] >= start]

    def _slot_scores(self, states):
        logits = self._slot_logits(states)
        return logits[:, 0] - logits[:, 1]

    def _output(
        self, method, sequences, start, slots, states, rejected, has_mask, image_index, sam_embeddings, scores=None
    ):
        counts = torch.bincount(slots[:, 0], minlength=len(sequences)).tolist()
        result = GsvaSegmentationOutput(
            method=method,
            sequences=sequences,
            answer_starts=torch.full((len(sequences),), start, device=sequences.device),
            scores=(self._slot_scores(states) if scores is None else scores).split(counts),
            is_rejected=rejected.split(counts),
            image_index=image_index,
        )
        if sam_embeddings is not None:
            # A free answer may say [SEG] where there is no image to segment.
            slot_images = image_index[slots[:, 0]]
            masks, iou = self._slot_masks(states, has_mask & (slot_images >= 0), sam_embeddings, slot_images)
            result.mask_logits, result.iou_scores = masks.split(counts), iou.split(counts)
        return result


def mask_losses(logits: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sums over masks of the binary cross-entropy (mean over a mask's pixels) and of the dice loss.

    Args:
        logits: (masks, height, width) before the sigmoid.
        truth: (masks, height, width) of 0 and 1.
    """
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").flatten(1).mean(1).sum()
    probability, truth = logits.sigmoid().flatten(1), truth.flatten(1)
    overlap = 2 * (probability * truth).sum(1) / DICE_SCALE
    area = (probability.sum(1) + truth.sum(1)) / DICE_SCALE
    return bce, (1 - (overlap + DICE_EPS) / (area + DICE_EPS)).sum()


def upscaled_mask_losses(
    logits: torch.Tensor, truth: torch.Tensor, reshaped_input_size, original_size, input_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    `mask_losses` at the picture's own size, and the IoU of each mask there. Autograd keeps the low-resolution logits and
    the truth as given; what has the picture's size in float32 is made again on the way back.

    Args:
        logits: (masks, low height, low width) before the sigmoid.
        truth: (masks, height, width) of 0 and 1, of any type.
        reshaped_input_size, original_size, input_size: See `upscale_mask_logits`.

    Returns:
        Sums of BCE and dice, and IoUs (masks,) without a gradient.
    """

    def losses(logits):
        upscaled = upscale_mask_logits(logits, reshaped_input_size, original_size, input_size)
        with torch.no_grad():
            said, true = upscaled > 0, truth > 0
            iou = (said & true).flatten(1).sum(1) / (said | true).flatten(1).sum(1)
        return *mask_losses(upscaled, truth.float()), iou

    return checkpoint(losses, logits, use_reentrant=False, preserve_rng_state=False)


__all__ = ["GsvaPreTrainedModel", "GsvaModel", "GsvaForConditionalGeneration"]
