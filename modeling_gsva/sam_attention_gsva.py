"""SAM's image encoder with its attention computed in chunks: the same numbers in a third of the time on a CPU."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

# Elements of the position bias that exist at a time. On a CPU a chunk has to stay in the cache (4 MB in fp32), on a GPU it
# only has to be large enough to fill the device: SAM ViT-H's whole bias would take 1 GB a layer.
BIAS_ELEMENTS = {"cpu": 2**20, "default": 2**26}


class ChunkedSamVisionAttention(SamVisionSdpaAttention):
    """
    SAM's attention with relative position bias, a few heads and rows of queries at a time.

    Bias and attention weights of a chunk never leave the cache; written out for a whole global layer (heads × 4096 × 4096)
    they take most of the encoder's time. Parameters and results are those of transformers' class. Attention weights are
    not returned: load with `attn_implementation="eager"` to get them.
    """

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
        if self.use_rel_pos:
            queries = query.unflatten(1, (height, width))
            # Contiguous, so that their sums are contiguous and need no copy to become (N, queries, keys).
            bias_h, bias_w = (
                torch.einsum(equation, queries, self.get_rel_pos(size, size, table)).contiguous()  # (N, h, w, size)
                for equation, size, table in (
                    ("nhwc,hkc->nhwk", height, self.rel_pos_h),
                    ("nhwc,wkc->nhwk", width, self.rel_pos_w),
                )
            )

        budget = BIAS_ELEMENTS.get(hidden_states.device.type, BIAS_ELEMENTS["default"])
        rows = min(max(budget // (width * length), 1), height)
        heads = max(budget // (rows * width * length), 1)
        outputs = []
        for first in range(0, len(query), heads):
            n = slice(first, first + heads)
            pieces = []
            for top in range(0, height, rows):
                h = slice(top, top + rows)
                bias = None
                if self.use_rel_pos:
                    bias = (bias_h[n, h, :, :, None] + bias_w[n, h, :, None, :]).flatten(3).flatten(1, 2)[None]
                piece = query[n, top * width : (top + rows) * width]
                dropout = self.dropout if self.training else 0.0
                pieces.append(
                    F.scaled_dot_product_attention(piece[None], key[None, n], value[None, n], bias, dropout)[0]
                )
            outputs.append(torch.cat(pieces, 1))
        output = torch.cat(outputs).reshape(batch, self.num_attention_heads, height, width, -1)
        return self.proj(output.permute(0, 2, 3, 1, 4).flatten(3)), None


def use_chunked_attention(sam: nn.Module) -> None:
    """
    Give SAM's vision layers the attention above, in place; only transformers' "sdpa" attention is replaced.

    Changing the class of a finished module keeps its parameters and hooks. A subclass of `SamModel` would have to build
    these parts a second time, and an entry in transformers' `SAM_VISION_ATTENTION_CLASSES` would change every SAM of the
    process.
    """
    for module in sam.modules():
        if type(module) is SamVisionSdpaAttention:
            module.__class__ = ChunkedSamVisionAttention
