"""The mask side of a GSVA: one interface over SAM, SAM-HQ, SAM 2 and SAM 3's tracker."""

from collections.abc import Mapping
from contextlib import ExitStack
from operator import attrgetter
from reprlib import repr as shown  # short, and safe for values that are nested deeply or contain themselves
from typing import Any, TypeAlias

import torch
from accelerate.utils import align_module_device
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_outputs import ModelOutput

from .configuration_gsva import WITH_OBJECT_SCORE
from .llava_v1_gsva import grad_if_trained
from .sam_attention_gsva import use_gsva_attention
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

    encoding: tuple[str, ...] = ("vision_encoder",)  # the parts on which the maps of an image depend
    shares_images = True  # whether the mask decoder gets the one that shares images

    def __init__(self, sam: nn.Module):
        self.sam, self.decoder = sam, sam.mask_decoder

    @staticmethod
    def prepare_config(config: PreTrainedConfig) -> None:
        """Change the configuration of a model before it is built, in place: also what is saved says how masks are made."""

    @classmethod
    def prepare(cls, sam: nn.Module, attention: str = "auto") -> None:
        """
        Change a new model in place: the faster attention where its encoder has SAM's, in the way that `attention` names, and the
        mask decoder that shares images.
        """
        use_gsva_attention(sam, attention)
        if cls.shares_images:
            share_images(sam)

    @property
    def has_objects(self) -> bool:
        """Whether the decoder tells if there is an object."""
        return self.sam.config.model_type in WITH_OBJECT_SCORE

    def encoding_parts(self) -> dict[str, nn.Module | nn.Parameter]:
        """Return by name the parts of the mask model on which the maps of an image depend."""
        return {name: attrgetter(name)(self.sam) for name in self.encoding}

    def encode(self, pixel_values: torch.Tensor) -> Maps:
        """Encode (images, 3, side, side)."""
        encoder = self.sam.vision_encoder
        with grad_if_trained(encoder):
            outputs = encoder(pixel_values.to(encoder.dtype), return_dict=True)
        with align_module_device(self.sam):  # see `decode`
            return self.maps(outputs)

    def maps(self, outputs: ModelOutput) -> Maps:
        """Return the maps of images from the encoder's outputs."""
        return outputs.last_hidden_state

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


class SamHqAdapter(MaskAdapter):
    """
    SAM-HQ, whose decoder also reads the outputs of the encoder's global blocks. It keeps transformers' own decoder, which gets a
    copy of the image for every slot and reads its tokens' embeddings by weight.
    """

    shares_images = False

    def read_by_weight(self) -> list[nn.Module]:
        return [module for module in self.decoder.modules() if isinstance(module, nn.Embedding)]

    def maps(self, outputs: ModelOutput) -> Maps:
        blocks = [block.permute(0, 3, 1, 2) for block in outputs.intermediate_embeddings]
        return [outputs.last_hidden_state, *blocks]

    def empty(self, like: torch.Tensor) -> Maps:
        vision = self.sam.config.vision_config
        side, blocks = vision.image_size // vision.patch_size, len(vision.global_attn_indexes)
        inner = [like.new_zeros(1, vision.hidden_size, side, side) for _ in range(blocks)]
        return [like.new_zeros(1, vision.output_channels, side, side), *inner]

    def run_decoder(self, maps, positions, prompts, dense, slot_images):
        image, *blocks = (part.to(prompts.dtype)[slot_images] for part in maps)
        extra = {"hq_token_only": False, "intermediate_embeddings": [block.permute(0, 2, 3, 1) for block in blocks]}
        positions = positions.expand(len(image), -1, -1, -1)
        masks, iou = self.decoder(image, positions, prompts[:, None, None], dense, False, **extra)
        return masks[:, 0, 0], iou[:, 0, 0], None


class Sam2Adapter(MaskAdapter):
    """SAM 2 and SAM 3's tracker, whose decoders add maps of higher resolution and tell whether there is an object."""

    encoding = ("vision_encoder", "no_memory_embedding", "mask_decoder.conv_s0", "mask_decoder.conv_s1")

    @staticmethod
    def prepare_config(config: PreTrainedConfig) -> None:
        # In evaluation it would show masks of tokens that training never touches.
        config.mask_decoder_config.dynamic_multimask_via_stability = False

    def maps(self, outputs: ModelOutput) -> Maps:
        # What get_image_embeddings does, but without its no_grad, so that the encoder can be trained. The last layers of two
        # maps are part of the mask decoder.
        finest, finer, image, *unused = outputs.fpn_hidden_states
        if not unused:  # SAM 3 has a fourth map, to which transformers (5.23) adds this, and which it drops then
            image = image + self.sam.no_memory_embedding.reshape(1, -1, 1, 1)
        return [image, self.decoder.conv_s1(finer), self.decoder.conv_s0(finest)]

    def empty(self, like: torch.Tensor) -> Maps:
        config = self.sam.config
        channels = config.vision_config.fpn_hidden_size
        sizes = self.sam.backbone_feature_sizes[::-1]
        return [
            like.new_zeros(1, width, *size) for width, size in zip((channels, channels // 4, channels // 8), sizes)
        ]

    def run_decoder(self, maps, positions, prompts, dense, slot_images):
        image, *finer = (part.to(prompts.dtype) for part in maps)
        masks, iou, objects = self.decoder(image, positions, prompts[:, None], dense, False, finer[::-1], slot_images)
        return masks[:, 0], iou[:, 0], objects[:, 0]


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
