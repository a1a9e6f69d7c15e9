"""The mask side of a GSVA: one interface over SAM, SAM-HQ, SAM 2 and SAM 3's tracker."""

from contextlib import ExitStack
from typing import TypeAlias

import torch
from accelerate.utils import align_module_device
from torch import nn

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
    def prepare(sam: nn.Module) -> None:
        # In evaluation it would show masks of tokens that training never touches.
        sam.mask_decoder.dynamic_multimask_via_stability = False

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


def mask_adapter_class(model_type: str) -> type[MaskAdapter]:
    """
    Return the adapter of a mask model's type.

    Raises:
        ValueError: another type, with the types that can be used.
    """
    if model_type not in MASK_ADAPTERS:
        raise ValueError(
            f"A mask model of type {model_type!r} cannot be prompted by GSVA; take one of {', '.join(MASK_ADAPTERS)}. "
            "Directories of SAM 2 and SAM 3 that say sam2_video or sam3_video are read as Sam2Model and Sam3TrackerModel."
        )
    return MASK_ADAPTERS[model_type]


__all__ = ["MaskAdapter", "main_map", "mask_adapter_class"]
