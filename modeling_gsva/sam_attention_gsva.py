"""The image encoder of SAM and SAM-HQ with its relative position bias never written out whole, in three ways that give the same numbers."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention
from transformers.models.sam_hq.modeling_sam_hq import SamHQVisionSdpaAttention

# The two parts of the position bias of queries (N, length, C), by rows and by columns of the keys: (N, height, width, height)
# and (N, height, width, width). The bias of query q for the key in row r and column c is bias_h[q, r] + bias_w[q, c].
Bias: TypeAlias = tuple[torch.Tensor, torch.Tensor]

# Elements of the position bias that exist at a time in "chunks". On a CPU a chunk has to stay in the cache (4 MB in fp32), on a
# GPU it only has to be large enough to fill the device: SAM ViT-H's whole bias would take 1 GB a layer.
BIAS_ELEMENTS = {"cpu": 2**20, "default": 2**26}
# Elements of "augmented" queries, keys and values that exist at a time: 0.5 GB in bf16. All windows of eight images of ViT-H
# (211 million) run in one call, and a global layer three images at a time.
AUGMENTED_ELEMENTS = 2**28

# The ways to choose from by the type of the device. On a CPU chunks win by far: one global layer of six heads takes 0.21 s in
# chunks, 0.87 s augmented and 0.79 s in flex attention (two threads).
CANDIDATES: dict[str, tuple[str, ...]] = {
    "cpu": ("chunks",),
    "cuda": ("augmented", "flex", "chunks"),
    "default": ("chunks",),
}
# Operations of a matrix product in the time in which a GPU moves one byte to or from its memory, by the bytes of a number:
# H100 SXM, 989 TFLOP/s in bf16 and 67 in fp32, 3.35 TB/s (NVIDIA's data sheet; an A100 has 153 and 10).
OPERATIONS_PER_BYTE = {2: 295, 4: 20}
# Flex attention computes rows and columns of a key and adds two numbers for each score: some 8 operations outside the tensor
# cores, each of which takes the time of 15 within them (989 / 67 TFLOP/s).
FLEX_OPERATIONS = 8 * 15
FLEX_BLOCK = 128  # flex attention computes whole blocks of scores
# Where flex attention is compiled by itself, in an encoder that is not. Elsewhere it would make the first image wait for minutes.
FLEX_COMPILED = ("cuda",)


def costs(count: int, height: int, width: int, channels: int, itemsize: int) -> dict[str, tuple[int, int]]:
    """
    Count what each way costs beside what all have in common, as (operations, bytes moved to and from the device's memory).

    Args:
        count: number of attentions, images (or windows) times heads.
        height, width: size of an image or window in patches.
        channels: width of a head.
        itemsize: bytes of a number.

    >>> {way: numbers for way, numbers in costs(16, 64, 64, 80, 2).items() if way != "flex"}  # a global layer of ViT-H
    {'augmented': (223338299392, 218103808), 'chunks': (85899345920, 1115684864)}
    """
    length = height * width
    scores, numbers = count * length**2, count * length
    wide = _augmented_width(channels, height, width)
    blocks = -(-length // FLEX_BLOCK) * FLEX_BLOCK
    in_flex = 1 << (channels - 1).bit_length()  # its kernels take heads of a power of two
    moves = (
        2 if length % 8 == 0 else 4
    )  # the bias is written and read, and copied where its rows do not begin at 16 bytes
    return {
        # Queries, keys and values are copied into wider ones, and so is the output into a narrower one.
        "augmented": (4 * scores * wide, 8 * numbers * wide * itemsize),
        "flex": (
            count * blocks**2 * (4 * in_flex + FLEX_OPERATIONS),
            numbers * (4 * channels + 2 * (height + width)) * itemsize,
        ),
        "chunks": (4 * scores * channels, (moves * scores + 4 * numbers * channels) * itemsize),
    }


def choose_way(hidden_states: torch.Tensor, dtype: torch.dtype, heads: int, channels: int) -> str:
    """
    Return the way that takes least by `costs`, for (batch, height, width, channels) on their device.

    Flex attention counts only where the encoder is compiled: compiling it alone would make the first image wait for minutes.
    Flash attention, on which the count of "augmented" rests, takes heads up to 256 wide, in half precision.
    """
    batch, height, width, _ = hidden_states.shape
    ways = CANDIDATES.get(hidden_states.device.type, CANDIDATES["default"])
    fits = {
        "augmented": _augmented_width(channels, height, width) <= 256,
        "flex": torch.compiler.is_compiling() and channels >= 16,
        "chunks": True,
    }
    ways = tuple(way for way in ways if fits[way])
    if len(ways) == 1:
        return ways[0]
    counted = costs(batch * heads, height, width, channels, dtype.itemsize)
    rate = OPERATIONS_PER_BYTE.get(dtype.itemsize, OPERATIONS_PER_BYTE[4])
    return min(ways, key=lambda way: counted[way][0] / rate + counted[way][1])


def _augmented_width(channels: int, height: int, width: int) -> int:
    return -(-(channels + height + width) // 8) * 8


def in_chunks(query, key, value, bias: Bias | None, size: tuple[int, int], dropout: float = 0.0) -> torch.Tensor:
    """
    Attend with the bias written out for a few heads and rows of queries at a time, so that it never leaves the cache.

    Args:
        query, key, value: (N, height · width, C), N being images (or windows) times heads.
        bias: see `Bias`; None for none.
        size: (height, width).
        dropout: share of the attention weights that is dropped.
    """
    (height, width), length = size, query.shape[1]
    budget = BIAS_ELEMENTS.get(query.device.type, BIAS_ELEMENTS["default"])
    rows = min(max(budget // (width * length), 1), height)
    heads = max(budget // (rows * width * length), 1)
    outputs = []
    for first in range(0, len(query), heads):
        n = slice(first, first + heads)
        pieces = []
        for top in range(0, height, rows):
            h = slice(top, top + rows)
            mask = None
            if bias is not None:
                by_row, by_column = bias[0][n, h, :, :, None], bias[1][n, h, :, None, :]
                mask = (by_row + by_column).flatten(3).flatten(1, 2)[None]
            piece = query[n, top * width : (top + rows) * width]
            pieces.append(F.scaled_dot_product_attention(piece[None], key[None, n], value[None, n], mask, dropout)[0])
        outputs.append(torch.cat(pieces, 1))
    return torch.cat(outputs)


def augmented(query, key, value, bias: Bias | None, size: tuple[int, int], dropout: float = 0.0) -> torch.Tensor:
    """
    Attend without any bias: append it to the queries, and to each key a one at its row and at its column, so that their product
    adds the right two numbers to each score. Flash attention then does the whole. Arguments are those of `in_chunks`.
    """
    if bias is None:
        return F.scaled_dot_product_attention(query[None], key[None], value[None], None, dropout)[0]
    (height, width), channels = size, query.shape[-1]
    scale = channels**-0.5  # by which the product is multiplied
    places = (
        torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, 0),
        torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1),
    )
    wide = _augmented_width(channels, height, width)
    images = max(AUGMENTED_ELEMENTS // (3 * query.shape[1] * wide), 1)
    outputs = []
    for first in range(0, len(query), images):
        n = slice(first, first + images)
        parts = [query[n], *(part[n].flatten(1, 2) / scale for part in bias)]
        keys = [key[n], *(place.expand(len(key[n]), -1, -1) for place in places)]
        q, k, v = (
            F.pad(values, (0, wide - values.shape[-1]))
            for values in (torch.cat(parts, 2), torch.cat(keys, 2), value[n])
        )
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], None, dropout, scale=scale)[0]
        outputs.append(attended[..., :channels])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention)


def in_flex(query, key, value, bias: Bias | None, size: tuple[int, int], dropout: float = 0.0) -> torch.Tensor:
    """
    Attend in PyTorch's flex attention, which adds the two numbers of the bias to each score where it computes it. It knows no
    dropout, with which "augmented" is taken. Arguments are those of `in_chunks`.
    """
    if bias is None or dropout:
        return augmented(query, key, value, bias, size, dropout)
    width = size[1]
    by_row, by_column = (part.flatten(1, 2) for part in bias)  # (N, queries, rows or columns of keys)

    def add_bias(score, batch, number, place, key_place):
        return score + by_row[number, place, key_place // width] + by_column[number, place, key_place % width]

    inputs = query[None], key[None], value[None]
    if torch.compiler.is_compiling():
        return flex_attention(*inputs, score_mod=add_bias)[0]
    if query.device.type in FLEX_COMPILED:
        return _compiled_flex()(*inputs, score_mod=add_bias)[0]
    # Uncompiled it writes out all scores, which serves comparisons on a CPU. By itself it would trace each shape anew.
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile.*")
        return flex_attention(*inputs, score_mod=add_bias)[0]


WAYS: dict[str, Callable] = {"augmented": augmented, "flex": in_flex, "chunks": in_chunks}


class PositionBiasAttention(nn.Module):
    """
    Attention with SAM's relative position bias, in the way that its device and shape make the cheapest: what stands before
    transformers' class in each class of `GSVA_ATTENTION`.

    The bias and the attention weights of a global layer (heads × 4096 × 4096), written out, take most of the encoder's time.
    Parameters and results are those of transformers' class. Attention weights are not returned: load with
    `attn_implementation="eager"` to get them. `way` is "auto" (`choose_way`), or one of `WAYS`.
    """

    way: str = "auto"

    def get_rel_pos(self, q_size: int, k_size: int, rel_pos: torch.Tensor) -> torch.Tensor:
        """Overrides the parent, which makes its indices on the CPU: the device would wait for them, twice a layer."""
        if q_size != k_size or len(rel_pos) != 2 * k_size - 1:
            return super().get_rel_pos(q_size, k_size, rel_pos)
        places = torch.arange(k_size, device=rel_pos.device)
        return rel_pos[places[:, None] - places[None] + (k_size - 1)]

    def forward(self, hidden_states: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor, None]:
        """Attend within (batch, height, width, channels); the output has the same shape."""
        if (
            torch.compiler.is_exporting()
        ):  # the number of chunks depends on the batch size, which an export leaves open
            return super().forward(hidden_states, output_attentions)
        batch, height, width, _ = hidden_states.shape
        length = height * width
        qkv = self.qkv(hidden_states).reshape(batch, length, 3, self.num_attention_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.reshape(
            3, batch * self.num_attention_heads, length, -1
        )  # 3 × (N = batch · heads, L, C)
        bias: Bias | None = None
        if self.use_rel_pos:
            queries = query.unflatten(1, (height, width))
            # Contiguous, so that their sums are contiguous and need no copy to become (N, queries, keys).
            by_row = torch.einsum("nhwc,hkc->nhwk", queries, self.get_rel_pos(height, height, self.rel_pos_h))
            by_column = torch.einsum("nhwc,wkc->nhwk", queries, self.get_rel_pos(width, width, self.rel_pos_w))
            bias = by_row.contiguous(), by_column.contiguous()
        way = self.way
        if way == "auto":
            way = choose_way(hidden_states, query.dtype, self.num_attention_heads, query.shape[-1])
        output = WAYS[way](query, key, value, bias, (height, width), self.dropout if self.training else 0.0)
        output = output.reshape(batch, self.num_attention_heads, height, width, -1)
        return self.proj(output.permute(0, 2, 3, 1, 4).flatten(3)), None


class GsvaSamVisionAttention(PositionBiasAttention, SamVisionSdpaAttention):
    """SAM's, see `PositionBiasAttention`."""


class GsvaSamHQVisionAttention(PositionBiasAttention, SamHQVisionSdpaAttention):
    """SAM-HQ's, see `PositionBiasAttention`."""


# Ours by transformers' class, for every mask model that has this attention.
GSVA_ATTENTION: dict[type[nn.Module], type[PositionBiasAttention]] = {
    SamVisionSdpaAttention: GsvaSamVisionAttention,
    SamHQVisionSdpaAttention: GsvaSamHQVisionAttention,
}


def use_gsva_attention(sam: nn.Module, way: str = "auto") -> None:
    """
    Give a mask model's vision layers the attention above, in place; only transformers' "sdpa" attention is replaced, and a mask
    model with other attention stays as it is.

    Changing the class of a finished module keeps its parameters and hooks. A subclass of `SamModel` would have to build
    these parts a second time, and an entry in transformers' `SAM_VISION_ATTENTION_CLASSES` would change every SAM of the
    process.

    Args:
        sam: the model, or its encoder. One that has the attention already gets the other way.
        way: "auto", or one of `WAYS` whatever device and shape are.

    Raises:
        ValueError: another way.
    """
    if way != "auto" and way not in WAYS:
        raise ValueError(f"sam_attention={way!r} is not known; choose 'auto' or one of {', '.join(map(repr, WAYS))}.")
    for module in sam.modules():
        if type(module) in GSVA_ATTENTION:
            module.__class__ = GSVA_ATTENTION[type(module)]
        if isinstance(module, PositionBiasAttention):
            module.way = way
