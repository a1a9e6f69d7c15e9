"""Read PEFT adapters of converted or trained models, and refuse those that are not whole or belong to another base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .bases import COPY_AGAIN, refuse_other_base
from .reading import LazyTensor, WeightFile, listed, read_json

if TYPE_CHECKING:
    from peft import PeftModel

PEFT_PREFIX = "base_model.model."
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def load_adapter(base: torch.nn.Module, adapter: str | Path) -> PeftModel:
    """Return a model with an adapter on it, after comparing the adapter's file with what the model needs.

    `PeftModel.from_pretrained` leaves LoRA that the file lacks at its start, which changes nothing.

    Args:
        base: The model the adapter was trained on. It is changed in place, as by `get_peft_model`.
        adapter: A directory, or a repository of the Hub.

    Raises:
        ValueError: The file is damaged, lacks weights, has others, or numbers that are not finite, or its trained parts
            belong to another base than `base`. The message names them.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    folder = adapter_folder(adapter)
    weights = {PEFT_PREFIX + _name_in_model(base, key): tensor for key, tensor in read_adapter(folder).items()}
    saved_name = getattr(base, "saved_name", str)
    names = {saved_name(key.removeprefix(PEFT_PREFIX)): tensor for key, tensor in weights.items()}
    parts = {saved_name(name): tensor for name, tensor in base.state_dict().items()}
    refuse_other_base(_lazy(names), _lazy(parts), f"the adapter {adapter}", "the model under it")
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    model = get_peft_model(base, config)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if missing := [key for key in expected if key not in weights]:
        raise ValueError(
            f"The adapter {adapter} lacks {len(missing)} of {len(expected)} tensors: {listed(missing, 4)}. {COPY_AGAIN}"
        )
    if unknown := [key for key in weights if key not in expected]:
        raise ValueError(
            f"The adapter {adapter} holds {len(unknown)} tensors that its adapter_config.json does not describe: "
            f"{listed(unknown, 4)}. The two files are of different adapters: copy or download both again."
        )
    if wrong := [key for key in weights if weights[key].shape != expected[key].shape]:
        raise ValueError(
            f"The adapter {adapter} does not fit the model: {wrong[0]} is {tuple(weights[wrong[0]].shape)}, the model says "
            f"{tuple(expected[wrong[0]].shape)} ({len(wrong)} tensors of another shape). Pass the base it was trained on."
        )
    set_peft_model_state_dict(model, weights)
    return model.eval()


def adapter_folder(adapter: str | Path) -> Path:
    """Return the directory of an adapter, that of a Hub repository after downloading its two files."""
    folder = Path(adapter)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(adapter), allow_patterns=["adapter_config.json", *WEIGHTS]))
    return folder


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter's file under the names they have there.

    Raises:
        ValueError: There is no such file, a file cannot be read, or numbers are not finite.
    """
    if not read_json(folder / "adapter_config.json"):
        raise ValueError(
            f"{folder} has no adapter_config.json: it is no adapter, or not whole. Copy or download it again."
        )
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"The adapter {folder} has no weights ({' or '.join(WEIGHTS)}): copy or download it again.")
    weights = WeightFile(file)
    return {key: weights.read(key) for key in weights.tensors()}


def _name_in_model(base: torch.nn.Module, key: str) -> str:
    """Return the name of a tensor of an adapter in the model; adapters of converted directories have those of their files."""
    name = key.removeprefix(PEFT_PREFIX)
    for pattern, replacement in getattr(base, "_checkpoint_conversion_mapping", {}).items():
        name = re.sub(pattern, replacement, name)
    return name


def _lazy(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {
        key: LazyTensor.of(tensor)
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.is_meta
    }
