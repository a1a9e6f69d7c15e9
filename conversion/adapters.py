"""Read PEFT adapters of converted or trained models, and refuse those that are not whole or belong to another base."""

from __future__ import annotations

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

    PEFT itself leaves weights that the file lacks at their random or zero start.

    Args:
        base: The model the adapter was trained on.
        adapter: A directory, or a repository of the Hub.

    Raises:
        ValueError: The file is damaged, lacks weights, has others, or numbers that are not finite, or its trained parts
            belong to another base than `base`. The message names them.
    """
    from peft import PeftModel, get_peft_model_state_dict

    weights = read_adapter(adapter)
    names = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in weights.items()}
    refuse_other_base(_lazy(names), _lazy(base.state_dict()), f"the adapter {adapter}", "the model under it")
    model = PeftModel.from_pretrained(base, str(adapter))
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
    return model


def read_adapter(adapter: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter's file under the names they have there.

    Raises:
        ValueError: There is no such file, it cannot be read, or numbers are not finite.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(adapter), allow_patterns=["adapter_config.json", *WEIGHTS]))
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"The adapter {adapter} has no weights ({' or '.join(WEIGHTS)}): copy or download it again.")
    read_json(folder / "adapter_config.json")
    weights = WeightFile(file)
    return {key: weights.read(key) for key in weights.tensors()}


def _lazy(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {
        key: LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach().cpu)
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and not tensor.is_meta
    }
