"""Turn a directory of ours back into one file in the original's layout."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from data_scripts.files import replacing

from .bases import COPY_AGAIN, check_lora
from .configs import empty_model
from .keys import full_name, to_original
from .kinds import kind_of
from .reading import WeightFile, listed, read_json, weight_files
from .writing import ADAPTER, check_output, check_room, in_dtype, naming_output

PEFT_PREFIX = "base_model.model."


def reverse(args: argparse.Namespace) -> dict:
    """Write one .bin in the original's layout from a directory of ours, and return the summary that is printed.

    LoRA that the directory keeps in adapter/ stands beside the base weights in the file.

    Raises:
        ValueError: The directory holds no whole model of ours, or numbers that are not finite.
        OSError: The directory cannot be read, or the output exists or cannot be written.
    """
    directory, output = Path(args.checkpoint), Path(args.output)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a directory; --reverse writes one file, for example gsva.bin.")
    check_output(output)
    adapter = directory / ADAPTER
    lora = read_json(adapter / "adapter_config.json")
    # An adapter that training left there names its base model, and is already merged into the weights above it.
    is_unmerged = bool(lora) and lora.get("base_model_name_or_path") is None
    prefix = PEFT_PREFIX if args.peft_names or is_unmerged else ""
    state = _read_model(directory, None if args.dtype == "auto" else getattr(torch, args.dtype))
    if is_unmerged:
        state |= _read_adapter(adapter, set(state))
    state = {prefix + name: tensor for name, tensor in state.items()}
    check_room(output, sum(tensor.nbytes for tensor in state.values()))
    with naming_output(output), replacing(output) as temporary, temporary.open("wb") as file:
        torch.save(state, file)  # to a file object: with a path, its random name would stand in the archive
    if is_unmerged:  # alpha is not in the file, and another alpha would scale the adapter
        load_with = f"--lora_r {lora['r']} --lora_alpha {lora['lora_alpha']:g}"
    else:
        load_with = "any --lora_r (new adapters start at zero)" if prefix else "--lora_r 0"
    return {"tensors": len(state), "bytes": output.stat().st_size, "load with": load_with}


def _read_model(directory: Path, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return the tensors of a directory of ours under the original's names. Those of safetensors are mapped, not read."""
    files = {file: WeightFile(file) for file in weight_files(directory)}
    keys = {key: weights for weights in files.values() for key in weights.tensors()}
    names = {key: to_original(key) for key in keys}
    if unknown := [key for key, name in names.items() if name is None]:
        kind = kind_of([full_name(key) for key in unknown])
        raise ValueError(
            (f"{directory} is {kind[0].name}: it" if kind else str(directory))
            + f" holds tensors the original has no place for: {listed(unknown, 4)}. --reverse takes a directory that this "
            "program or training wrote."
        )
    expected = {to_original(name) for name in _parameters(directory)}
    if missing := sorted(str(name) for name in expected - set(names.values())):
        raise ValueError(
            f"{directory} lacks {len(missing)} parameters of the model: {listed(missing, 4)}. {COPY_AGAIN}"
        )
    state = {}
    for key, weights in keys.items():
        name, tensor = str(names[key]), weights.read(key)  # torch.save takes one after the other
        state[name] = tensor if dtype is None else in_dtype(tensor, dtype, name)
    return state


def _parameters(directory: Path) -> list[str]:
    from modeling_gsva import GsvaConfig

    config = read_json(directory / "config.json")
    if config.get("model_type") != GsvaConfig.model_type:
        raise ValueError(
            f"{directory} has no config.json of a GSVA: --reverse takes a directory that this program or training wrote."
        )
    return list(empty_model(GsvaConfig.from_pretrained(directory), directory / "config.json")[1])


def _read_adapter(directory: Path, parameters: set[str]) -> dict[str, torch.Tensor]:
    """Return LoRA's matrices under the names that PEFT gives them in the original, without its prefix."""
    state: dict[str, torch.Tensor] = {}
    lora: dict[str, dict[str, str]] = {}
    weights = WeightFile(directory / "adapter_model.safetensors")
    for key in weights.tensors():
        part = re.fullmatch(r"base_model\.model\.(?:vlm\.)?(.+)\.lora_([AB])\.weight", key)
        name = to_original(f"{part[1]}.weight") if part else None
        if part is None or name is None:
            raise ValueError(f"{directory}: {key!r} is no LoRA tensor the original knows.")
        lora.setdefault(name, {})[part[2]] = key
        state[f"{name.removesuffix('.weight')}.lora_{part[2]}.default.weight"] = weights.read(key)
    check_lora(lora, parameters, str(directory))
    return state
