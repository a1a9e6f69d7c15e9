"""Rows for `[SEG]` and `[REJ]` in a base's embedding and language head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from modeling_gsva.prompts_gsva import REJ_TOKEN, SEG_TOKEN

from .reading import LazyTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Standard deviation of the noise on a new row, relative to that of the old rows in each column.
NOISE = 0.1
NUMBERS_AT_A_TIME = 2**18  # of a table, in float64


@dataclass(frozen=True)
class SlotTokens:
    """The tokens of a base with those of GSVA.

    Attributes:
        seg, rej: Ids of `[SEG]` and `[REJ]`.
        new: Those of the two ids that the base's tokenizer did not have.
        old_count: One more than the highest id that the base's tokenizer had; a table may have rows beyond it, as padding.
        count: One more than the highest id now.
    """

    seg: int
    rej: int
    new: tuple[int, ...]
    old_count: int
    count: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, old_vocabulary: dict[str, int]) -> SlotTokens:
        """Return them for a tokenizer to which the tokens were added, and the vocabulary that it had before."""
        seg, rej = tokenizer.convert_tokens_to_ids([SEG_TOKEN, REJ_TOKEN])
        known = {old_vocabulary.get(SEG_TOKEN), old_vocabulary.get(REJ_TOKEN)}
        return cls(
            seg=seg,
            rej=rej,
            new=tuple(token for token in (seg, rej) if token not in known),
            old_count=max(old_vocabulary.values(), default=-1) + 1,
            count=max(tokenizer.get_vocab().values()) + 1,
        )


def with_new_rows(table: torch.Tensor, rows: int, tokens: SlotTokens, seed: int) -> LazyTensor:
    """Return a table of tokens (rows, width), or the bias of a language head (rows,), with rows for new tokens.

    A new row is the mean of the base's tokens and a little noise. With the mean, a language head gives a new token at most
    about the probability of an average one, so that the base's answers hardly change before training (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models"). The noise tells `[SEG]` from `[REJ]`: with equal rows
    their log-odds would always be 0, and no slot could be found by its embedding. Rows that the base has as padding beyond
    its tokenizer were never trained, and may be zeros or anything else; where a new token falls on one, it is drawn like a
    row that is added.

    Args:
        rows: Number of rows of the result; at least those of `table`.
    """
    ids = sorted({token for token in tokens.new if token < rows} | set(range(len(table), rows)))
    if not ids:
        return LazyTensor.of(table)

    def read() -> torch.Tensor:
        old = table.detach()[: min(tokens.old_count, len(table))]
        mean, deviation = _mean_and_deviation(old)
        noise = torch.randn(
            len(ids), *table.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        grown = table.new_zeros(rows, *table.shape[1:])
        grown[: len(table)] = table.detach()
        grown[ids] = (mean + NOISE * deviation * noise).to(grown.dtype)
        return grown

    return LazyTensor((rows, *table.shape[1:]), table.dtype, read)


def _mean_and_deviation(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each column in float64, with a few rows in that type at a time."""
    width = max(1, table[0].numel()) if len(table) else 1
    parts = table.split(max(1, NUMBERS_AT_A_TIME // width))
    start = table.new_zeros(table.shape[1:], dtype=torch.float64)
    mean = sum((part.double().sum(0) for part in parts), start) / len(table)
    squares = sum(((part.double() - mean).square().sum(0) for part in parts), torch.zeros_like(mean))
    return mean, (squares / len(table)).sqrt()
