"""GsvaConfig: the sizes, token ids and loss weights of a GSVA model."""

import math
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .image_processing_gsva import mask_input_size
from .llava_v1_gsva import V1_FIELDS, LlavaV1Config

if TYPE_CHECKING:
    SubConfig = Any  # reading gives a configuration
    TokenId = int
else:
    SubConfig = dict | PreTrainedConfig | None  # the types that a caller may give
    TokenId = int | None  # None gets the error of __post_init__


# Types of mask models that tell whether there is an object.
WITH_OBJECT_SCORE = ("sam2", "sam3_tracker")


def _set_dtype(config: Any, dtype: Any) -> None:
    config.dtype = dtype
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            _set_dtype(getattr(config, name), dtype)


def _without_folders(values: dict[str, Any]) -> dict[str, Any]:
    """Return a part's configuration as a dict with an empty `_name_or_path` in all of its levels."""
    return {
        name: _without_folders(value) if isinstance(value, dict) else "" if name == "_name_or_path" else value
        for name, value in values.items()
    }


@strict
class GsvaConfig(PreTrainedConfig):
    r"""
    Configuration of [`GsvaForConditionalGeneration`]: a vision-language model that reads images and text, and prompts a SAM
    mask decoder with the hidden state that predicts each `[SEG]`.

    The training arguments, not the configuration, say which parts are frozen.

    Args:
        vlm_config (`dict` or `PreTrainedConfig`): the vision-language model, any that `AutoModelForImageTextToText` builds,
            or the original's LLaVA v1 (`LlavaV1Config`, the default).
        sam_config (`dict` or `PreTrainedConfig`): the segmentation model, SAM ViT-H at 1024 px in the paper.
        seg_token_id (`int`): id of `[SEG]`, the slot of an expression that has a target.
        rej_token_id (`int`): id of `[REJ]`, the slot of an expression that has none.
        ce_loss_weight, bce_loss_weight, dice_loss_weight (`float`): weights of the three loss parts
            (1.0, 2.0 and 0.5 in the original's training script).
        object_score_loss_weight (`float`): weight of the binary cross-entropy of the mask model's object score against
            whether the slot has a target, a second sign of absence beside `[REJ]` (SAM 2 and SAM 3's tracker only).
        rejected_slot_loss (`str`): how a slot whose true mask is empty counts in the mask losses. `"zero_logits"`, as in
            the original: as a mask of constant zero logits (a constant offset of the loss that also counts in the
            mean over masks). `"ignore"`: not at all.
        rejection (`dict`, *optional*): the calibration of rejection that `python -m evaluation.calibrate` writes.
            `threshold` is the log-odds of `[SEG]` below which `segment` rejects an expression; the probability that the
            expression is there is `sigmoid(score / temperature + offset)`. Its other entries say on which data it was
            fitted. None: threshold 0, temperature 1 and offset 0.
        sam_attention (`str`): how SAM's encoder adds its position bias, with equal results. `"auto"` counts which way is the
            cheapest on the device; the others force it: `"augmented"` (appended to queries and keys), `"flex"` (flex
            attention) or `"chunks"` (written out piece by piece). Mask models without such a bias do not read it.
        vision_config, text_config, image_token_id, vision_feature_layer, vision_feature_select_strategy,
            tie_word_embeddings: fields of [`LlavaV1Config`], in place of `vlm_config`. Directories that were saved before
            there were other bases hold them.
    """

    model_type = "gsva"
    # Outputs that a plain Trainer cannot join over batches (another number of slots in each), when it gathers predictions.
    keys_to_ignore_at_inference = [
        *("ce_loss", "mask_bce_loss", "mask_dice_loss", "mask_logits", "iou_scores", "mask_ious", "slot_logits"),
        *(
            "object_score_loss",
            "object_scores",
            "slot_positions",
            "past_key_values",
            "cache",  # its name from transformers 5.24 on
            "hidden_states",
            "attentions",
            "image_hidden_states",
        ),
    ]
    sub_configs_defaults = {
        "vlm_config": SubConfigSpec(config_class=AutoConfig, model_type="llava"),
        "sam_config": SubConfigSpec(config_class=AutoConfig, model_type="sam"),
    }

    vlm_config: SubConfig = None
    sam_config: SubConfig = None
    seg_token_id: TokenId = 32000
    rej_token_id: TokenId = 32001
    ce_loss_weight: float = 1.0
    bce_loss_weight: float = 2.0
    dice_loss_weight: float = 0.5
    object_score_loss_weight: float = 0.0
    rejected_slot_loss: Literal["zero_logits", "ignore"] = "zero_logits"
    rejection: dict | None = None
    sam_attention: Literal["auto", "augmented", "flex", "chunks"] = "auto"

    def __post_init__(self, **kwargs):
        v1_fields = {name: kwargs.pop(name) for name in V1_FIELDS if name in kwargs}
        if self.vlm_config is None:
            self.vlm_config = LlavaV1Config(**v1_fields)
        elif isinstance(self.vlm_config, dict) and self.vlm_config.get("model_type") == LlavaV1Config.model_type:
            self.vlm_config = LlavaV1Config(**self.vlm_config)
        super().__post_init__(**kwargs)
        self.set_parts_dtype()
        for name, token in (("seg_token_id", "[SEG]"), ("rej_token_id", "[REJ]")):
            if getattr(self, name) is None:
                raise ValueError(
                    f"The model has no {token} in its vocabulary ({name}=None), so it cannot "
                    f"{'reject' if token == '[REJ]' else 'segment'}; add the token and train it, or take a GSVA model."
                )
        if self.seg_token_id == self.rej_token_id:
            raise ValueError(
                f"seg_token_id and rej_token_id are both {self.seg_token_id}: a slot could not be rejected. Take them "
                "from the tokenizer with convert_tokens_to_ids('[SEG]') and ('[REJ]'); a tokenizer that gives one id "
                "for both lacks these tokens."
            )
        for name in ("seg_token_id", "rej_token_id"):
            if not 0 <= getattr(self, name) < self.text_config.vocab_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} lies outside the vocabulary of {self.text_config.vocab_size} tokens. "
                    "Add the token to the tokenizer and resize the embedding, or correct text_config.vocab_size."
                )
        self._check_rejection()
        self.check_object_score()

    def check_object_score(self) -> None:
        """Raise ValueError for an `object_score_loss_weight` without an object score to train, or one that is no weight."""
        weight, kind = self.object_score_loss_weight, self.sam_config.model_type
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"object_score_loss_weight={weight!r} is no weight; give 0 or a positive number.")
        if weight and kind not in WITH_OBJECT_SCORE:
            raise ValueError(
                f"object_score_loss_weight={weight!r}, but a mask model of type {kind!r} has no object score to train; set it "
                f"to 0, or take one of {', '.join(WITH_OBJECT_SCORE)}."
            )

    def _check_rejection(self) -> None:
        """Raise ValueError for a calibration whose values are not finite numbers, or whose temperature is not positive."""
        for name in ("threshold", "temperature", "offset"):
            value = self.rejection_values[name]
            if (
                not isinstance(value, (int, float))
                or not math.isfinite(value)
                or (name == "temperature" and value <= 0)
            ):
                raise ValueError(
                    f"rejection[{name!r}]={value!r} is not a finite{' positive' * (name == 'temperature')} number; calibrate "
                    "again with `python -m evaluation.calibrate`, or set rejection to null."
                )

    @property
    def rejection_values(self) -> dict[str, float]:
        """Return threshold, temperature and offset of rejection; 0, 1 and 0 where the model is not calibrated."""
        values = {"threshold": 0.0, "temperature": 1.0, "offset": 0.0}
        return {name: (self.rejection or {}).get(name, value) for name, value in values.items()}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Overrides the parent to refuse the directory of another model, of which transformers would read nothing."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} holds a model of type {model_type!r}, not a GSVA. To start from it, "
                "pass config=GsvaConfig(vlm_config=..., sam_config=..., seg_token_id=..., rej_token_id=...)."
            )
        return config_dict, kwargs

    def set_parts_dtype(self) -> None:
        """Give every part the dtype of the configuration that holds it; transformers does so for one level only."""
        for part in (self.vlm_config, self.sam_config):
            if part.dtype is not None:
                _set_dtype(part, part.dtype)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """Return the language model's configuration."""
        return self.vlm_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def text_config(self) -> Any:
        """The language model's configuration."""
        return self.get_text_config()

    @property
    def vision_config(self) -> Any:
        """The configuration of the vision-language model's vision tower."""
        return self.vlm_config.vision_config

    @property
    def image_token_id(self) -> int:
        """Id of `<image>` in the text; features replace it."""
        return self.vlm_config.image_token_id

    @property
    def vision_feature_layer(self) -> Any:
        """See [`LlavaV1Config`]."""
        return self.vlm_config.vision_feature_layer

    @property
    def vision_feature_select_strategy(self) -> str:
        """See [`LlavaV1Config`]."""
        return self.vlm_config.vision_feature_select_strategy

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the language head shares the embedding's weights."""
        return bool(getattr(self.vlm_config, "tie_word_embeddings", False))

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool):
        self.vlm_config.tie_word_embeddings = value

    def to_dict(self) -> dict[str, Any]:
        """
        Overrides the parent to add `tie_word_embeddings`, which peft reads there, and to leave out the folders that the parts
        were loaded from: in a saved directory they would tell of the machine that saved it.
        """
        values = {name: _without_folders(value) if isinstance(value, dict) else value
                  for name, value in super().to_dict().items()}  # fmt: skip
        return {**values, "tie_word_embeddings": self.tie_word_embeddings}

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None):
        """SAM only supports eager and sdpa, so other implementations are applied to the vision-language model only."""
        if isinstance(value, str) and value not in ("eager", "sdpa"):
            value = {"vlm_config": value}
        elif isinstance(value, dict) and not value.keys() <= {"", "vlm_config", "sam_config"}:
            parts = {name: kind for name, kind in value.items() if name not in ("", "vlm_config", "sam_config")}
            value = {**{name: kind for name, kind in value.items() if name not in parts}, "vlm_config": parts}
        PreTrainedConfig._attn_implementation.fset(self, value)

    @property
    def mask_input_size(self) -> int:
        """Side of the mask model's square input in pixels."""
        return mask_input_size(self.sam_config)

    @property
    def image_seq_length(self) -> int:
        """Return the number of placeholder positions of one image in the text (256 for ViT-L/14 at 224 px)."""
        return self.vlm_config.image_seq_length


__all__ = ["GsvaConfig"]
