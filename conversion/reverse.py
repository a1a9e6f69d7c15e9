"""Turn a directory of ours back into one file in the original's layout."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from safetensors import safe_open

from data_scripts.files import replacing

from .keys import to_original
from .reading import listed, read_json, weight_files
from .writing import ADAPTER, in_dtype

PEFT_PREFIX = "base_model.model."


def reverse(args: argparse.Namespace) -> dict:
    """Write one .bin in the original's layout from a directory of ours, and return the summary that is printed.

    LoRA that the directory keeps in adapter/ stands beside the base weights in the file.

    Raises:
        ValueError: A tensor that the original has no place for.
        OSError: The directory cannot be read, or the output cannot be written.
    """
    directory, output = Path(args.checkpoint), Path(args.output)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a directory; --reverse writes one file, for example gsva.bin.")
    adapter = directory / ADAPTER
    lora = read_json(adapter / "adapter_config.json")
    # An adapter that training left there names its base model, and is already merged into the weights above it.
    is_unmerged = bool(lora) and lora.get("base_model_name_or_path") is None
    prefix = PEFT_PREFIX if args.peft_names or is_unmerged else ""
    state = _read_model(directory, prefix, None if args.dtype == "auto" else getattr(torch, args.dtype))
    if is_unmerged:
        state |= _read_adapter(adapter, prefix)
    with replacing(output) as temporary, temporary.open("wb") as file:
        torch.save(state, file)  # to a file object: with a path, its random name would stand in the archive
    if is_unmerged:  # alpha is not in the file, and another alpha would scale the adapter
        load_with = f"--lora_r {lora['r']} --lora_alpha {lora['lora_alpha']:g}"
    else:
        load_with = "any --lora_r (new adapters start at zero)" if prefix else "--lora_r 0"
    return {"tensors": len(state), "bytes": output.stat().st_size, "load with": load_with}


def _read_model(directory: Path, prefix: str, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    state, unknown = {}, []
    for file in weight_files(directory):
        with safe_open(file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                name = to_original(key)
                if name is None:
                    unknown.append(key)
                    continue
                tensor = handle.get_tensor(key)  # mapped, not read: torch.save takes one after the other
                state[prefix + name] = tensor if dtype is None else in_dtype(tensor, dtype, name)
    if unknown:
        raise ValueError(f"{directory} holds tensors the original has no place for: {listed(unknown)}.")
    return state


def _read_adapter(directory: Path, prefix: str) -> dict[str, torch.Tensor]:
    state = {}
    with safe_open(directory / "adapter_model.safetensors", "pt") as handle:
        for key in handle.keys():  # noqa: SIM118 (not a dict)
            part = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", key)
            name = to_original(f"{part[1]}.weight") if part else None
            if part is None or name is None:
                raise ValueError(f"{directory}: {key!r} is no LoRA tensor the original knows.")
            state[f"{prefix}{name.removesuffix('.weight')}.{part[2]}.default.weight"] = handle.get_tensor(key)
    return state
