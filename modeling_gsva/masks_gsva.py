"""The mask side of a GSVA: one interface over SAM, SAM-HQ, SAM 2 and SAM 3's tracker."""

from collections.abc import Mapping
from contextlib import ExitStack
from reprlib import repr as shown  # short, and safe for values that are nested deeply or contain themselves
from typing import Any, TypeAlias

import torch
from accelerate.utils import align_module_device
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from .llava_v1_gsva import grad_if_trained
from .sam_attention_gsva import use_chunked_attention
from .sam_decoder_gsva import rows_of, share_images, used_by_weight

# An encoded image: SAM has one map, (images, channels, height, width); the others several, the one of lowest resolution, on
# which the decoder attends, first.
Maps: TypeAlias = torch.Tensor | list[torch.Tensor]


def main_map(maps: Maps) -> torch.Tensor:
    """Return the map on which the mask decoder attends, (images, channels, height, width)."""
    return maps if isinstance(maps, torch.Tensor) else maps[0]


class MaskAdapter:
    """
    SAM: everything that GSVA asks of a mask model.

    Args:
        sam: a model of transformers that has `vision_encoder`, `prompt_encoder` and `mask_decoder`.
    """

    def __init__(self, sam: nn.Module):
        self.sam, self.decoder = sam, sam.mask_decoder

    @staticmethod
    def prepare_config(config: PreTrainedConfig) -> None:
        """Change the configuration of a model before it is built, in place: also what is saved says how masks are made."""

    @staticmethod
    def prepare(sam: nn.Module) -> None:
        """Change a new model in place: SAM's faster attention and mask decoder."""
        use_chunked_attention(sam)
        share_images(sam)

    def encode(self, pixel_values: torch.Tensor) -> Maps:
        """Encode (images, 3, side, side)."""
        encoder = self.sam.vision_encoder
        with grad_if_trained(encoder):
            return self.maps(pixel_values.to(encoder.dtype))

    def maps(self, pixel_values: torch.Tensor) -> Maps:
        """Return the maps of images in the encoder's precision."""
        return self.sam.vision_encoder(pixel_values).last_hidden_state

    def empty(self, like: torch.Tensor) -> Maps:
        """Return the maps of one empty image, on the device and in the precision of `like`."""
        vision = self.sam.config.vision_config
        side = vision.image_size // vision.patch_size
        return like.new_zeros(1, vision.output_channels, side, side)

    def read_by_weight(self) -> list[nn.Module]:
        """Return the decoder's submodules whose weights are read without calling them, so that hooks on their calls do not run."""
        return used_by_weight(self.decoder)

    def decode(
        self, prompts: torch.Tensor, maps: Maps, slot_images: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Decode one mask per slot.

        Args:
            prompts: (slots, channels).
            maps: of the images, from `encode`.
            slot_images: (slots,) the image of each slot.

        Returns:
            Mask logits (slots, 4 height, 4 width), IoU estimates (slots,), and the logits (slots,) of an object being
            there, where the model has them.
        """
        sam, dtype = self.sam, self.sam.dtype
        by_weight = (sam.shared_image_embedding, *self.read_by_weight())
        with ExitStack() as onloaded:
            for module in by_weight:  # accelerate loads offloaded weights of modules that are called; these are not
                onloaded.enter_context(align_module_device(module))
            dense = rows_of(sam.prompt_encoder.no_mask_embed, 1, prompts.device).reshape(1, -1, 1, 1)
            positions = sam.get_image_wide_positional_embeddings().to(dtype)
            slot_images = slot_images.to(main_map(maps).device)
            return self.run_decoder(maps, positions, prompts.to(dtype), dense, slot_images)

    def run_decoder(self, maps, positions, prompts, dense, slot_images):
        """Call the mask decoder; its first argument positional, as peft's wrapper of a fully trained module needs it."""
        masks, iou = self.decoder(maps.to(prompts.dtype), positions, prompts[:, None], dense, False, slot_images)
        return masks[:, 0], iou[:, 0], None


class RowsAdapter(MaskAdapter):
    """Mask models that keep transformers' own decoder, which reads its tokens' embeddings by weight."""

    @staticmethod
    def prepare(sam: nn.Module) -> None:
        pass

    def read_by_weight(self) -> list[nn.Module]:
        return [module for module in self.decoder.modules() if isinstance(module, nn.Embedding)]

    def run_rows(self, maps, positions, prompts, dense, slot_images, extra):
        """Call transformers' own decoder with every slot as a row of the batch."""
        main = main_map(maps).to(prompts.dtype)[slot_images]
        rows = positions.expand(len(main), -1, -1, -1)
        outputs = self.decoder(main, rows, prompts[:, None, None], dense, False, **extra)
        objects = outputs[3][:, 0, 0] if len(outputs) > 3 else None
        return outputs[0][:, 0, 0], outputs[1][:, 0, 0], objects


class SamHqAdapter(RowsAdapter):
    """SAM-HQ, whose decoder also reads the outputs of the encoder's global blocks."""

    def maps(self, pixel_values: torch.Tensor) -> Maps:
        outputs = self.sam.vision_encoder(pixel_values, return_dict=True)
        blocks = [block.permute(0, 3, 1, 2) for block in outputs.intermediate_embeddings]
        return [outputs.last_hidden_state, *blocks]

    def empty(self, like: torch.Tensor) -> Maps:
        vision = self.sam.config.vision_config
        side, blocks = vision.image_size // vision.patch_size, len(vision.global_attn_indexes)
        inner = [like.new_zeros(1, vision.hidden_size, side, side) for _ in range(blocks)]
        return [like.new_zeros(1, vision.output_channels, side, side), *inner]

    def run_decoder(self, maps, positions, prompts, dense, slot_images):
        blocks = [block.to(prompts.dtype)[slot_images].permute(0, 2, 3, 1) for block in maps[1:]]
        extra = {"hq_token_only": False, "intermediate_embeddings": blocks}
        return self.run_rows(maps, positions, prompts, dense, slot_images, extra)


class Sam2Adapter(RowsAdapter):
    """SAM 2 and SAM 3's tracker, whose decoders add maps of higher resolution and tell whether there is an object."""

    @staticmethod
    def prepare_config(config: PreTrainedConfig) -> None:
        # In evaluation it would show masks of tokens that training never touches.
        config.mask_decoder_config.dynamic_multimask_via_stability = False

    def maps(self, pixel_values: torch.Tensor) -> Maps:
        # get_image_embeddings without its no_grad, so that the encoder can be trained
        sam = self.sam
        maps = list(sam.get_image_features(pixel_values, return_dict=True).fpn_hidden_states)
        maps[-1] = maps[-1] + sam.no_memory_embedding
        sizes = sam.backbone_feature_sizes
        maps = [part.permute(1, 2, 0).reshape(len(pixel_values), -1, *size) for part, size in zip(maps, sizes)]
        return maps[::-1]

    def empty(self, like: torch.Tensor) -> Maps:
        config = self.sam.config
        channels = config.vision_config.fpn_hidden_size
        sizes = self.sam.backbone_feature_sizes[::-1]
        return [
            like.new_zeros(1, width, *size) for width, size in zip((channels, channels // 4, channels // 8), sizes)
        ]

    def run_decoder(self, maps, positions, prompts, dense, slot_images):
        high = [part.to(prompts.dtype)[slot_images] for part in maps[:0:-1]]
        return self.run_rows(maps, positions, prompts, dense, slot_images, {"high_resolution_features": high})


MASK_ADAPTERS = {"sam": MaskAdapter, "sam_hq": SamHqAdapter, "sam2": Sam2Adapter, "sam3_tracker": Sam2Adapter}


# Types of configurations that hold a mask model for single images among other things, and the type that is read from them.
# facebook/sam2.1-* say sam2_video, and their weights are Sam2Model's beside a memory for videos; facebook/sam3 says sam3_video,
# and holds a detector and a tracker.
READ_AS = {"sam2_video": "sam2", "sam3_video": "sam3_tracker", "sam3_tracker_video": "sam3_tracker"}
# What to give in place of models that are known, and cannot be prompted by a hidden state.
INSTEAD = {
    "sam3": "it is SAM 3's detector, which finds objects by words; give a directory of SAM 3 that holds its tracker "
    "(model_type sam3_video or sam3_tracker), as facebook/sam3 is",
    "sam3_lite_text": "it is a detector by words; give a directory of SAM 3 that holds its tracker (sam3_video)",
    "edgetam": "give facebook/sam2.1-hiera-tiny, whose decoder is the same",
    "edgetam_video": "give facebook/sam2.1-hiera-tiny, whose decoder is the same",
    "efficientsam": "transformers has no such model; give facebook/sam2.1-hiera-tiny, which is small as well",
    "mobilesam": "transformers has no such model; give facebook/sam2.1-hiera-tiny, which is small as well",
}


def mask_adapter_class(model_type: str) -> type[MaskAdapter]:
    """
    Return the adapter of a mask model's type.

    Raises:
        ValueError: another type, with the types that can be used.
    """
    if model_type not in MASK_ADAPTERS:
        hint = "read its configuration with mask_config_of" if model_type in READ_AS else _instead(model_type)
        raise ValueError(
            f"A mask model of type {shown(model_type)} cannot be prompted by GSVA; take one of {', '.join(MASK_ADAPTERS)}"
            + (f": {hint}." if hint else ".")
        )
    return MASK_ADAPTERS[model_type]


def _instead(model_type: Any) -> str | None:
    """Return what to give in place of a model, however its name is written (EfficientSAM, efficient_sam)."""
    name = str(model_type).lower()
    return INSTEAD.get(name) or INSTEAD.get(name.replace("_", "").replace("-", ""))


def mask_config_of(config: Mapping[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """
    Return the configuration of a mask model from what its directory's config.json says, which may be of a model for videos.

    Its `dynamic_multimask_via_stability` is off, see `Sam2Adapter`.

    Raises:
        ValueError: a model that GSVA cannot prompt, or a configuration that does not describe one.
    """
    values = dict(config) if isinstance(config, Mapping) else config.to_dict()
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(
            f"The mask model's configuration names no model_type (its fields are {shown(sorted(map(str, values)))}); give a "
            f"directory of transformers with a model of one of these types: {', '.join(MASK_ADAPTERS)}."
        )
    if kind == "sam3_video":
        values = values.get("tracker_config")
        if not isinstance(values, Mapping):
            raise ValueError(
                f"tracker_config of sam3_video is {shown(values)}, not a configuration; download it again."
            )
    adapter = mask_adapter_class(READ_AS.get(kind, kind))
    if kind in READ_AS:
        parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
        values = {
            name: values[name] for name in (*parts, "initializer_range", "dtype") if values.get(name) is not None
        }
        for name in parts[1:]:  # whose types are those of the model for videos
            values[name] = {key: value for key, value in dict(values.get(name, {})).items() if key != "model_type"}
    values.pop("model_type", None)
    try:
        found = AutoConfig.for_model(READ_AS.get(kind, kind), **values)
    except (TypeError, ValueError, LookupError, AttributeError, StrictDataclassError) as error:
        raise ValueError(
            f"The configuration does not describe a mask model of type {kind!r} ({error}); download it again."
        ) from error
    adapter.prepare_config(found)
    return found


__all__ = ["MaskAdapter", "main_map", "mask_adapter_class", "mask_config_of"]
