"""GsvaConfig: the sizes, token ids and loss weights of a GSVA model."""

import math
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

if TYPE_CHECKING:
    SubConfig = Any  # reading gives a configuration
    TokenId = int
else:
    SubConfig = dict | PreTrainedConfig | None  # the types that a caller may give
    TokenId = int | None  # None gets the error of __post_init__


@strict
class GsvaConfig(PreTrainedConfig):
    r"""
    Configuration of [`GsvaForConditionalGeneration`]: a Llama-like language model that reads an image through a
    CLIP-like vision tower and prompts a SAM mask decoder with the hidden state that predicts each `[SEG]`.

    The training arguments, not the configuration, say which parts are frozen.

    Args:
        vision_config (`dict` or `PreTrainedConfig`): the vision tower, CLIP ViT-L/14 at 224 px in the paper.
        text_config (`dict` or `PreTrainedConfig`): the language model, LLaMA 7B or 13B in the paper. Its vocabulary
            size is the number of rows of the embedding, with `[SEG]` and `[REJ]`.
        sam_config (`dict` or `PreTrainedConfig`): the segmentation model, SAM ViT-H at 1024 px in the paper.
        image_token_id (`int`): id of `<image>`. Features always replace it, so it may lie beyond the embedding.
        seg_token_id (`int`): id of `[SEG]`, the slot of an expression that has a target.
        rej_token_id (`int`): id of `[REJ]`, the slot of an expression that has none.
        vision_feature_layer (`int`): which hidden state of the vision tower is read (LLaVA: the last but one).
        vision_feature_select_strategy (`str`): `"default"` drops the class token, `"full"` keeps it.
        ce_loss_weight, bce_loss_weight, dice_loss_weight (`float`): weights of the three loss parts
            (1.0, 2.0 and 0.5 in the original's training script).
        rejected_slot_loss (`str`): how a slot whose true mask is empty counts in the mask losses. `"zero_logits"`, as in
            the original: as a mask of constant zero logits (a constant offset of the loss that also counts in the
            mean over masks). `"ignore"`: not at all.
        rejection (`dict`, *optional*): the calibration of rejection that `python -m evaluation.calibrate` writes.
            `threshold` is the log-odds of `[SEG]` below which `segment` rejects an expression; the probability that the
            expression is there is `sigmoid(score / temperature + offset)`. Its other entries say on which data it was
            fitted. None: threshold 0, temperature 1 and offset 0.
    """

    model_type = "gsva"
    # Outputs that a plain Trainer cannot join over batches (another number of slots in each), when it gathers predictions.
    keys_to_ignore_at_inference = [
        *("ce_loss", "mask_bce_loss", "mask_dice_loss", "mask_logits", "iou_scores", "mask_ious", "slot_logits"),
        *("slot_positions", "past_key_values", "hidden_states", "attentions", "image_hidden_states"),
    ]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        # LLaMA's vocabulary and the tokens GSVA adds, <image> excepted.
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", init_kwargs={"vocab_size": 32004}),
        "sam_config": SubConfigSpec(config_class=AutoConfig, model_type="sam"),
    }

    vision_config: SubConfig = None
    text_config: SubConfig = None
    sam_config: SubConfig = None
    image_token_id: int = 32004
    seg_token_id: TokenId = 32000
    rej_token_id: TokenId = 32001
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    ce_loss_weight: float = 1.0
    bce_loss_weight: float = 2.0
    dice_loss_weight: float = 0.5
    rejected_slot_loss: Literal["zero_logits", "ignore"] = "zero_logits"
    tie_word_embeddings: bool = False
    rejection: dict | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
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
        """Threshold, temperature and offset of rejection; 0, 1 and 0 where the model is not calibrated."""
        values = {"threshold": 0.0, "temperature": 1.0, "offset": 0.0}
        return {name: (self.rejection or {}).get(name, value) for name, value in values.items()}

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None):
        """SAM only supports eager and sdpa, so other implementations are applied to the two other models only."""
        if isinstance(value, str) and value not in ("eager", "sdpa"):
            value = {"text_config": value, "vision_config": value}
        PreTrainedConfig._attn_implementation.fset(self, value)

    @property
    def image_seq_length(self) -> int:
        """Return the number of placeholder positions of one image in the text (256 for ViT-L/14 at 224 px)."""
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return patches + (self.vision_feature_select_strategy == "full")


__all__ = ["GsvaConfig"]
