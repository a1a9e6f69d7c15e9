"""The mask decoders of SAM, SAM 2 and SAM 3 for many prompts of an image: what depends on the image alone is computed once."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.sam.modeling_sam import SamMaskDecoder
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder
from transformers.models.sam3_tracker.modeling_sam3_tracker import Sam3TrackerMaskDecoder

# Bytes of the slots' maps (pixels x channels each) that are decoded at a time. SAM's own, 64 x 64 x 256 in float32, take
# 4 MB a slot: on a CPU one of them fits the cache (and its temporaries stay below the 32 MB from which the C library asks the
# system for new memory every time), so more at a time are slower. Small maps share the cost of a call: a training step of
# assets/tiny_gsva (16 KB a slot, 32 images of 6 expressions) takes 2.70 s with 1 slot at a time, 1.28 s with 16, 1.23 s with 64
# and 1.18 s with 192 (one thread, one run). A GPU takes 64 of SAM's own, each of which holds some 40 MB while it is decoded.
MAP_BYTES = {"cpu": 4 * 2**20, "default": 64 * 4 * 2**20}


def slots_at_a_time(pixels: torch.Tensor) -> int:
    """Return how many slots to decode at a time for images given as (images, pixels, channels)."""
    budget = MAP_BYTES.get(pixels.device.type, MAP_BYTES["default"])
    return max(budget // (pixels[0].numel() * pixels.element_size()), 1)


def _attend(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend between projected (N, length, C) tensors and apply the output projection."""
    query, key, value = (
        x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    output = F.scaled_dot_product_attention(
        query, key, value, scale=attention.scaling
    )  # (N, heads, length, C / heads)
    project = attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj  # SAM's and SAM 2's name
    return project(output.transpose(1, 2).flatten(2))


def _project(
    layer: nn.Module, pixels: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a layer's projections of the image: key and value for the tokens' attention, query for the image's attention."""
    placed = pixels + positions
    attention = layer.cross_attn_token_to_image
    return attention.k_proj(placed), attention.v_proj(pixels), layer.cross_attn_image_to_token.q_proj(placed)


def rows_of(embedding: nn.Module, count: int, device: torch.device) -> torch.Tensor:
    """Return the first `count` rows of an embedding, by a call: adapters on it (LoRA, trained tokens) act on calls only."""
    return embedding(torch.arange(count, device=device))


def _spread(convolution: nn.ConvTranspose2d, pixels: torch.Tensor) -> torch.Tensor:
    """
    Apply a transposed convolution of kernel and stride 2 to a list of pixels: (..., C) → (..., 4, channels), by rows.

    Raises:
        ValueError: an adapter on the convolution. Its weights are read without a call, so the adapter would do nothing.
    """
    if hasattr(convolution, "base_layer"):
        raise ValueError(
            "An adapter wraps a transposed convolution of SAM's mask decoder (upscale_conv1 or upscale_conv2), which the "
            "model does not call, so that the adapter would have no effect. Leave the layer out of target_modules, or "
            "train it in full with modules_to_save."
        )
    spread = torch.einsum("...i,iohw->...hwo", pixels, convolution.weight)
    return spread.flatten(-3, -2) + convolution.bias


def _laid_out(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Lay a map of higher resolution out like the pixels that `_spread` gives: (I, C, s height, s width) → (I, P, s², C), by
    halves: row and column of the half, of its half and so on, as transposed convolutions of stride 2 give them.
    """
    halvings = (features.shape[-1] // size[1]).bit_length() - 1
    axes = (*(2 for _ in range(halvings)),)
    cells = features.unflatten(3, (size[1], *axes)).unflatten(2, (size[0], *axes))  # (I, C, h, 2…, w, 2…)
    rows, columns = range(3, 3 + halvings), range(4 + halvings, 4 + 2 * halvings)
    order = [place for pair in zip(rows, columns) for place in pair]
    cells = cells.permute(0, 2, 3 + halvings, *order, 1)  # (I, h, w, 2, 2, …, C)
    return cells.flatten(3, -2).flatten(1, 2).contiguous()


_Decoder: Any = nn.Module if TYPE_CHECKING else object  # a mixin, whose other attributes type checkers would miss


class SharedImages(_Decoder):
    """
    The forward pass of a mask decoder that takes the slots of several images at once.

    Parameters and results are those of transformers' class, whose forward repeats the image for every prompt. Here all
    slots of an image share the first layer's projections of it, three of the ten large ones that a slot needs, and its maps of
    higher resolution are brought into the order of the pixels once.
    """

    own_tokens: tuple[str, ...] = ("iou_token", "mask_tokens")  # that come before the prompt's, in this order

    def decode(self, image, positions, prompts, dense, slot_images, high_resolution=()):
        """
        Decode all masks of each slot.

        Args:
            image: (images, C, height, width).
            positions: (1, C, height, width).
            prompts: (slots, prompts, C).
            dense: (1, C, 1, 1) or (1, C, height, width).
            slot_images: (slots,) the image of each slot.
            high_resolution: maps (images, C / 4, 2 height, 2 width) and (images, C / 8, 4 height, 4 width), or none.

        Returns:
            Mask logits (slots, all masks, 4 height, 4 width), IoU estimates (slots, all masks) and, of the decoders that have
            them, object scores (slots, 1).
        """
        size = tuple(image.shape[-2:])
        pixels = (image + dense).flatten(2).transpose(1, 2).contiguous()  # (I, P, C)
        positions = positions.flatten(2).transpose(1, 2).contiguous()  # (1, P, C)
        of_image = [pixels, *_project(self.transformer.layers[0], pixels, positions)]
        of_image += [_laid_out(features, size) for features in high_resolution]
        counts = {"mask_tokens": self.num_mask_tokens}
        own = [rows_of(getattr(self, name), counts.get(name, 1), prompts.device) for name in self.own_tokens]
        own = torch.cat(own)
        tokens = torch.cat([own.expand(slot_images.shape[0], -1, -1), prompts], 1).to(own.dtype)
        if torch.compiler.is_compiling():  # a graph is for any number of slots and cannot read their images' numbers
            pieces = [self._decode(tokens, [values[slot_images] for values in of_image], positions, size)]
        else:
            pieces = []
            step = slots_at_a_time(pixels)
            for some, images in zip(tokens.split(step), slot_images.split(step)):
                # A single slot needs no copies of its image.
                taken = [values[int(images)][None] if step == 1 else values[images] for values in of_image]
                pieces.append(self._decode(some, taken, positions, size))
        return [torch.cat(parts) for parts in zip(*pieces)]

    def _decode(self, tokens, of_image, positions, size):
        """Decode (N, tokens, C) and (N, P, C) pixels with what belongs to them to N × all masks and N × all estimates."""
        pixels, key, value, query, *high_resolution = of_image
        states = tokens
        for number, layer in enumerate(self.transformer.layers):
            if number:
                key, value, query = _project(layer, pixels, positions)
            placed = states if layer.skip_first_layer_pe else states + tokens
            mixed = self._among_tokens(layer.self_attn, placed, states)
            states = layer.layer_norm1(mixed if layer.skip_first_layer_pe else states + mixed)

            to_image = layer.cross_attn_token_to_image
            states = layer.layer_norm2(states + _attend(to_image, to_image.q_proj(states + tokens), key, value))
            states = layer.layer_norm3(states + layer.mlp(states))

            to_token = layer.cross_attn_image_to_token
            pixels = pixels + _attend(to_token, query, to_token.k_proj(states + tokens), to_token.v_proj(states))
            pixels = layer.layer_norm4(pixels)
        final = self.transformer.final_attn_token_to_image
        query, key = final.q_proj(states + tokens), final.k_proj(pixels + positions)
        states = self.transformer.layer_norm_final_attn(states + _attend(final, query, key, final.v_proj(pixels)))
        return self._masks(states, pixels, high_resolution, size), *self._estimates(states)

    def _masks(self, states, pixels, high_resolution, size):
        """Return N × all masks (4 height, 4 width) from the final states of tokens (N, tokens, C) and pixels (N, P, C)."""
        # Both transposed convolutions (kernel and stride 2) and everything between them treat each pixel separately: the
        # pixels stay a list, and only the finished masks are laid out.
        upscaled = _spread(self.upscale_conv1, pixels)  # (N, P, 4, C / 4)
        if high_resolution:
            upscaled = upscaled + high_resolution[0]
        # SAM's norm takes the channels second, and moves them last itself.
        upscaled = self.activation(self.upscale_layer_norm(upscaled.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        upscaled = _spread(self.upscale_conv2, upscaled)  # (N, P, 4, 4, C / 8)
        if high_resolution:
            upscaled = upscaled + high_resolution[1].unflatten(2, (4, 4))
        upscaled = self.activation(upscaled)
        # Multiply all mask tokens although one is used: a one-row matmul rounds differently depending on memory alignment.
        first = self.own_tokens.index("mask_tokens")
        mlps = self.output_hypernetworks_mlps
        weights = torch.stack([mlp(states)[:, first + n] for n, mlp in enumerate(mlps)], 1)
        masks = weights @ upscaled.flatten(1, 3).transpose(1, 2)  # (N, masks, P · 16)
        masks = masks.unflatten(2, (*size, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return masks.reshape(*masks.shape[:2], 4 * size[0], 4 * size[1])

    def _estimates(self, states):
        """Return what the decoder says of its masks, from the final states of tokens (N, tokens, C)."""
        return (self.iou_prediction_head(states)[:, self.own_tokens.index("iou_token")],)

    @staticmethod
    def _among_tokens(attention, placed, states):
        return _attend(attention, attention.q_proj(placed), attention.k_proj(placed), attention.v_proj(states))


class SharedImageMaskDecoder(SharedImages, SamMaskDecoder):
    """SAM's mask decoder, see [`SharedImages`]."""

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
        multimask_output: bool,
        slot_images: torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            image_embeddings, image_positional_embeddings, sparse_prompt_embeddings, dense_prompt_embeddings: as in `decode`.
            multimask_output: three masks per slot instead of one.
            slot_images: (slots,) the image of each slot; None passes the arguments on to transformers' class.

        Returns:
            Mask logits (slots, masks, 4 height, 4 width) and IoU estimates (slots, masks).
        """
        inputs = image_embeddings, image_positional_embeddings, sparse_prompt_embeddings, dense_prompt_embeddings
        if slot_images is None:
            return super().forward(*inputs, multimask_output, **kwargs)
        masks, iou = self.decode(*inputs, slot_images)
        kept = slice(1, None) if multimask_output else slice(0, 1)
        return masks[:, kept], iou[:, kept]


class SharedImagesWithObjects(SharedImages):
    """SAM 2's addition to [`SharedImages`]: maps of higher resolution, and a token that tells whether there is an object."""

    own_tokens = ("obj_score_token", "iou_token", "mask_tokens")

    def _estimates(self, states):
        return *super()._estimates(states), self.pred_obj_score_head(states)[:, 0]

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor,
        multimask_output: bool,
        high_resolution_features: list[torch.Tensor],
        slot_images: torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            image_embeddings, image_positional_embeddings, sparse_prompt_embeddings, dense_prompt_embeddings: as in `decode`.
            multimask_output: three masks per slot instead of one. Without it the one is that of the first mask token, whatever
                `dynamic_multimask_via_stability` says.
            high_resolution_features: (images, C / 8, 4 height, 4 width) and (images, C / 4, 2 height, 2 width).
            slot_images: (slots,) the image of each slot; None passes the arguments on to transformers' class.

        Returns:
            Mask logits (slots, masks, 4 height, 4 width), IoU estimates (slots, masks), object scores (slots, 1).
        """
        inputs = image_embeddings, image_positional_embeddings, sparse_prompt_embeddings, dense_prompt_embeddings
        if slot_images is None:
            return super().forward(*inputs, multimask_output, high_resolution_features, **kwargs)
        masks, iou, objects = self.decode(*inputs, slot_images, high_resolution_features[::-1])
        kept = slice(1, None) if multimask_output else slice(0, 1)
        return masks[:, kept], iou[:, kept], objects


class SharedImageSam2MaskDecoder(SharedImagesWithObjects, Sam2MaskDecoder):
    """SAM 2's mask decoder, see [`SharedImages`]."""


class SharedImageSam3MaskDecoder(SharedImagesWithObjects, Sam3TrackerMaskDecoder):
    """The mask decoder of SAM 3's tracker, see [`SharedImages`]."""


SHARED_DECODERS: dict[type, type] = {
    SamMaskDecoder: SharedImageMaskDecoder,
    Sam2MaskDecoder: SharedImageSam2MaskDecoder,
    Sam3TrackerMaskDecoder: SharedImageSam3MaskDecoder,
}


def used_by_weight(decoder: nn.Module) -> list[nn.Module]:
    """Return the submodules whose weights are read without calling them, so that hooks on their calls do not run."""
    return [decoder.upscale_conv1, decoder.upscale_conv2]


def share_images(sam: nn.Module) -> None:
    """
    Give the mask decoder of SAM, SAM 2 or SAM 3's tracker the forward above, in place; see `use_gsva_attention` for the
    reason. Decoders of other classes stay as they are.
    """
    shared = SHARED_DECODERS.get(type(sam.mask_decoder))
    if shared is not None:
        sam.mask_decoder.__class__ = shared
