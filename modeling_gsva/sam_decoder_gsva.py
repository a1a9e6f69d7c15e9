"""SAM's mask decoder for many prompts of the same image: projections of the image are computed once for all of them."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.sam.modeling_sam import SamAttention, SamMaskDecoder, SamTwoWayAttentionBlock

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


def _attend(attention: SamAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend between projected (N, length, C) tensors and apply the output projection."""
    query, key, value = (
        x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    output = F.scaled_dot_product_attention(
        query, key, value, scale=attention.scaling
    )  # (N, heads, length, C / heads)
    return attention.out_proj(output.transpose(1, 2).flatten(2))


def _project(
    layer: SamTwoWayAttentionBlock, pixels: torch.Tensor, positions: torch.Tensor
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


class SharedImageMaskDecoder(SamMaskDecoder):
    """
    SAM's mask decoder that takes the slots of several images at once.

    Parameters and results are those of transformers' class, whose forward repeats the image for every prompt. Here all
    slots of an image share the first layer's projections of it, three of the ten large ones that a slot needs.
    """

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
            image_embeddings: (images, C, height, width).
            image_positional_embeddings: (1, C, height, width).
            sparse_prompt_embeddings: (slots, prompts, C).
            dense_prompt_embeddings: (1, C, 1, 1) or (1, C, height, width).
            multimask_output: three masks per slot instead of one.
            slot_images: (slots,) the image of each slot; None passes the arguments on to transformers' class.

        Returns:
            Mask logits (slots, masks, 4 height, 4 width) and IoU estimates (slots, masks).
        """
        if slot_images is None:
            return super().forward(
                image_embeddings, image_positional_embeddings, sparse_prompt_embeddings, dense_prompt_embeddings,
                multimask_output, **kwargs,
            )  # fmt: skip
        size = image_embeddings.shape[-2:]
        pixels = (image_embeddings + dense_prompt_embeddings).flatten(2).transpose(1, 2).contiguous()  # (I, P, C)
        positions = image_positional_embeddings.flatten(2).transpose(1, 2).contiguous()  # (1, P, C)
        of_image = (pixels, *_project(self.transformer.layers[0], pixels, positions))
        device = sparse_prompt_embeddings.device
        own = torch.cat([rows_of(self.iou_token, 1, device), rows_of(self.mask_tokens, self.num_mask_tokens, device)])
        tokens = torch.cat([own.expand(slot_images.shape[0], -1, -1), sparse_prompt_embeddings], 1).to(own.dtype)
        if torch.compiler.is_compiling():  # a graph is for any number of slots and cannot read their images' numbers
            pieces = [self._decode(tokens, [values[slot_images] for values in of_image], positions, size)]
        else:
            pieces = []
            step = slots_at_a_time(pixels)
            for some, images in zip(tokens.split(step), slot_images.split(step)):
                # A single slot needs no copies of its image.
                taken = [values[int(images)][None] if step == 1 else values[images] for values in of_image]
                pieces.append(self._decode(some, taken, positions, size))
        masks, iou = (torch.cat(parts) for parts in zip(*pieces))
        kept = slice(1, None) if multimask_output else slice(0, 1)
        return masks[:, kept], iou[:, kept]

    def _decode(self, tokens, of_image, positions, size):
        """Decode (N, tokens, C) and (N, P, C) pixels with their projections to N × all masks and N × all IoU estimates."""
        pixels, key, value, query = of_image
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

        # Both transposed convolutions (kernel and stride 2) and everything between them treat each pixel separately: the
        # pixels stay a list, and only the finished masks are laid out.
        upscaled = _spread(self.upscale_conv1, pixels)  # (N, P, 4, C / 4)
        # SAM's norm takes the channels second, and moves them last itself.
        upscaled = self.activation(self.upscale_layer_norm(upscaled.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        upscaled = self.activation(_spread(self.upscale_conv2, upscaled))  # (N, P, 4, 4, C / 8)
        # Multiply all mask tokens although one is used: a one-row matmul rounds differently depending on memory alignment.
        weights = torch.stack([mlp(states)[:, 1 + n] for n, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
        masks = weights @ upscaled.flatten(1, 3).transpose(1, 2)  # (N, masks, P · 16)
        masks = masks.unflatten(2, (*size, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
        masks = masks.reshape(*masks.shape[:2], 4 * size[0], 4 * size[1])
        return masks, self.iou_prediction_head(states)[:, 0]

    @staticmethod
    def _among_tokens(attention, placed, states):
        return _attend(attention, attention.q_proj(placed), attention.k_proj(placed), attention.v_proj(states))


def used_by_weight(decoder: SamMaskDecoder) -> list[nn.Module]:
    """Return the submodules whose weights are read without calling them, so that hooks on their calls do not run."""
    return [decoder.upscale_conv1, decoder.upscale_conv2]


def share_images(sam: nn.Module) -> None:
    """
    Give SAM's mask decoder the forward above, in place; see `use_chunked_attention` for the reason. Decoders of other
    classes stay as they are.
    """
    if type(sam.mask_decoder) is SamMaskDecoder:
        sam.mask_decoder.__class__ = SharedImageMaskDecoder
