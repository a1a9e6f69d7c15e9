"""Write a converted model: safetensors shard by shard, LoRA merged or as an adapter, and the model card."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm import tqdm

from data_scripts.files import render, write_text

from .reading import SAFETENSORS_DTYPES, LazyTensor, advise, as_bytes

CARD = Path(__file__).parent / "templates" / "converted_card.md.jinja"
ADAPTER = "adapter"


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return a tensor in another type.

    Raises:
        ValueError: A finite number of the tensor `name` is beyond the range of float16.
    """
    if tensor.dtype == dtype:
        return tensor.contiguous()
    converted = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(converted).all() and torch.isfinite(tensor).all():
        raise ValueError(f"{name} has values beyond float16's 65504; choose --dtype bfloat16 or float32.")
    return converted


def safetensors_header(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the beginning of a safetensors file: the length of a JSON text, and the text (format of safetensors 0.x)."""
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_shards(directory: Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype, max_shard_size: str) -> int:
    """Write safetensors shards and their index with one tensor in memory at a time. Return the number of bytes written."""
    planned = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    total = plan.metadata["total_size"]
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing", disable=not sys.stderr.isatty()) as bar:
        for file, names in plan.filename_to_tensors.items():
            # `save_file` needs all tensors of a file at once. With the header known, they are written one after the other.
            header = safetensors_header({name: planned[name] for name in names})
            with (directory / file).open("wb") as shard:
                shard.write(header)
                for name in names:
                    tensor = in_dtype(tensors[name].read(), dtype, name)
                    shard.write(as_bytes(tensor))
                    bar.update(tensor.nbytes)
                shard.flush()
                os.fsync(shard.fileno())  # whole on disk before the directory gets its name
                advise(shard, "POSIX_FADV_DONTNEED")
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return total


def merge_lora(base: LazyTensor, pair: Mapping[str, LazyTensor], alpha: float) -> LazyTensor:
    """Return W + alpha / r · B A, computed in float32 and rounded once."""

    def read() -> torch.Tensor:
        a, b = pair["A"].read().float(), pair["B"].read().float()
        return base.read().float().addmm(b, a, alpha=alpha / a.shape[0])

    return LazyTensor(base.shape, base.dtype, read)


def write_adapter(
    directory: Path, lora: Mapping[str, Mapping[str, LazyTensor]], alpha: float, dtype: torch.dtype
) -> None:
    """Write LoRA as an adapter for PEFT.

    Args:
        lora: `{our name of the adapted weight: {"A": LazyTensor, "B": LazyTensor}}`.

    Raises:
        ValueError: The weights have several ranks, which one adapter cannot have.
    """
    from peft import LoraConfig

    ranks = {pair["A"].shape[0] for pair in lora.values()}
    if len(ranks) > 1:
        raise ValueError(
            f"--keep_lora needs one rank, the checkpoint has {sorted(ranks)}; leave it out to merge them."
        )
    LoraConfig(
        r=ranks.pop(),
        lora_alpha=alpha,
        lora_dropout=0.05,  # main.py of the original: --lora_dropout 0.05
        target_modules=sorted(name.removesuffix(".weight") for name in lora),
        task_type="CAUSAL_LM",
        base_model_name_or_path=None,  # the folder above, whatever its name
        inference_mode=True,
    ).save_pretrained(directory)
    tensors = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight": in_dtype(tensor.read(), dtype, name)
        for name, pair in lora.items()
        for side, tensor in pair.items()
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def write_card(directory: Path, name: str, summary: Mapping[str, Any], is_start: bool, has_adapter: bool) -> None:
    """Write README.md, the model card.

    Args:
        name: The directory or Hub repository that the card's example loads.
        summary: The rows of the card's table.
        is_start: The weights are those that training starts from.
        has_adapter: LoRA is not merged into the weights but lies in adapter/.
    """
    facts = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in summary.items()}
    text = render(CARD, name=name, facts=facts, is_start=is_start, has_adapter=has_adapter)
    write_text(directory / "README.md", text)
