"""Make a batch of rows of token ids, with the tokenizer's padding."""

import torch


def padded(processor, rows: list[list[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, (rows, length)."""
    batch = processor.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]
