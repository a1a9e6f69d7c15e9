"""LoRA and QLoRA: the quantized base, and adapters that are saved small, loaded over the base, and merged."""

import shutil
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils.peft_utils import find_adapter_config_file

ADAPTER = "adapter"


def quantization_config(kind: str, dtype: str) -> BitsAndBytesConfig:
    """
    Args:
        kind: "4bit" (nf4 with doubly quantized scales, as QLoRA: arXiv 2305.14314, section 3) or "8bit" (LLM.int8).
        dtype: Of the arithmetic, as in the model arguments; "auto" is bfloat16.

    What stays unquantized is the model's own decision (`NOT_QUANTIZED` in modeling_gsva.py).
    """
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
    )


def is_adapter(name: str | Path) -> bool:
    """Whether a directory, or a repository of the Hub, holds an adapter instead of a model."""
    try:
        return find_adapter_config_file(str(name)) is not None
    except OSError:  # neither; whoever loads it says so
        return False


def base_of(directory: str | Path) -> str:
    """The model that an adapter was trained on, as it was named then; one that names none lies in its base's folder."""
    return PeftConfig.from_pretrained(str(directory)).base_model_name_or_path or str(Path(directory).resolve().parent)


def kept_apart(directory: str | Path) -> Path | None:
    """The adapter in a model's directory that its weights lack (`convert_checkpoint.py --keep_lora` names no base in it)."""
    folder = Path(directory) / ADAPTER
    named = (folder / "adapter_config.json").is_file() and PeftConfig.from_pretrained(
        str(folder)
    ).base_model_name_or_path
    return folder if named is None else None


def save_adapter(model: PeftModel, output_dir: Path) -> Path:
    """`OUTPUT_DIR/adapter`: LoRA and the parts trained in full, without the base; written aside and moved."""
    folder, aside = output_dir / ADAPTER, output_dir / f".{ADAPTER}"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, save_embedding_layers=False)  # they are in it already, as modules_to_save
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return folder


def merge(base: nn.Module, directory: str | Path) -> nn.Module:
    """The base with the adapter of `directory` merged into its weights."""
    return PeftModel.from_pretrained(base, str(directory)).merge_and_unload()


def cast_trained(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What is trained in `dtype`, the frozen rest as it is. Two types in one model need autocast (bf16, fp16)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model
