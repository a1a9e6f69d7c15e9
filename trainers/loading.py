"""Load models: quantized ones, and adapters, which are merged into their base."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.utils.peft_utils import find_adapter_config_file

from conversion.adapters import load_adapter
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor

from .arguments import ModelArguments
from .output_folder import ADAPTER

# The base and the mask model of the presets that begin with them, by their architecture.
STARTS = {
    "llava15_sam2": ("llava-hf/llava-1.5-7b-hf", "facebook/sam2.1-hiera-base-plus"),
    "qwen3vl_4b_sam2": ("Qwen/Qwen3-VL-4B-Instruct", "facebook/sam2.1-hiera-base-plus"),
    "smolvlm_500m_sam2": ("HuggingFaceTB/SmolVLM-500M-Instruct", "facebook/sam2.1-hiera-tiny"),
}


def quantization_config(kind: str, dtype: str) -> BitsAndBytesConfig:
    """
    Return the settings of bitsandbytes. The model itself says which modules are not quantized (`NOT_QUANTIZED`).

    Args:
        kind: "4bit" (nf4 with doubly quantized scales, as QLoRA: arXiv 2305.14314, section 3) or "8bit" (LLM.int8).
        dtype: Type of the arithmetic, as in the model arguments; "auto" is bfloat16.
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
    """Return whether a directory, or a repository of the Hub, holds an adapter instead of a model."""
    try:
        return find_adapter_config_file(str(name)) is not None
    except OSError:  # it holds neither; loading it raises an error
        return False


def base_of(directory: str | Path) -> str:
    """Return the base model that an adapter names. An adapter without a name is in the folder of its base."""
    return PeftConfig.from_pretrained(str(directory)).base_model_name_or_path or str(Path(directory).resolve().parent)


def unmerged_adapter(directory: str | Path) -> Path | None:
    """Return the path of an adapter that is not yet merged into the model beside it, or None.

    Such adapters (`convert_checkpoint.py --keep_lora`) name no base model.
    """
    folder = Path(directory) / ADAPTER
    if not (folder / "adapter_config.json").is_file():
        return None
    return folder if PeftConfig.from_pretrained(str(folder)).base_model_name_or_path is None else None


def merge(base: nn.Module, directory: str | Path) -> nn.Module:
    """Return the base with the adapter of `directory` merged into its weights.

    Raises:
        ValueError: The adapter is damaged, lacks weights, or belongs to another base.
    """
    return load_adapter(base, directory).merge_and_unload()


@contextmanager
def whole_weights() -> Iterator[None]:
    """
    Load models whole in each process, also with DeepSpeed ZeRO-3.

    transformers would shard the weights while it loads them, which waits for all processes. Only the main process loads the
    model that gathers the trained weights, and an evaluation before training needs whole weights.
    """
    # It has no other way to restore the configuration than this reference.
    reference = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = reference


def why_not_loaded(args: ModelArguments, error: OSError) -> str:
    """Return why a model cannot be loaded and what to do; the text continues a sentence that begins with the model's name."""
    if args.architecture in STARTS and not Path(args.model).exists():
        base, sam = STARTS[args.architecture]
        return (
            f"is neither on this machine nor on the Hub. Make it first: python convert_checkpoint.py --base {base} --sam {sam} "
            f"--output {args.model}"
        )
    return (
        f"cannot be loaded ({error}). Give a directory that save_pretrained or convert_checkpoint.py wrote, or a Hub id; "
        "convert_checkpoint.py --base BASE --sam MASK_MODEL --output DIR makes one of a vision-language model and a mask model."
    )


def load_model(
    args: ModelArguments, device: torch.device | str | None = None
) -> tuple[GsvaProcessor, GsvaForConditionalGeneration]:
    """
    Return processor and model, by default on the device of this process.

    A local directory is read by the project's classes, anything else as remote code. An adapter's directory gives the base
    with the adapter merged into it, and so does a converted model beside an unmerged adapter.

    Raises:
        ValueError: `args.model` is not a GSVA model, or cannot be read; its mask model has no object score to be trained.
    """
    if is_adapter(args.model):
        if args.quantization:
            raise ValueError(
                f"model={args.model!r} is an adapter, which cannot be merged into a quantized base: train from the merged "
                "model in the folder above it."
            )
        base = args.base_model or base_of(args.model)
        try:
            processor, model = load_model(replace(args, model=base, base_model=None), device)
            if unmerged_adapter(base) is not None:  # load_model has merged it
                return processor, model
        except ValueError as error:
            raise ValueError(
                f"model={args.model!r} is an adapter; name its base with --base_model: {error}"
            ) from error
        return processor, merge(model, args.model)
    adapter = unmerged_adapter(args.model)
    if adapter is not None and args.quantization:
        raise ValueError(
            f"model={args.model!r} keeps its LoRA in {adapter}, which cannot be merged into a quantized base: convert the "
            "checkpoint without --keep_lora."
        )
    options: dict[str, Any] = {"dtype": args.dtype}
    if args.quantization:
        options["quantization_config"] = quantization_config(args.quantization, args.dtype)
        options["device_map"] = {"": PartialState().device}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    try:
        with whole_weights():
            if Path(args.model).is_dir():
                processor = GsvaProcessor.from_pretrained(args.model)
                model = GsvaForConditionalGeneration.from_pretrained(args.model, **options)
            else:
                processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
                model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, **options)
    except OSError as error:
        raise ValueError(f"model={args.model!r} {why_not_loaded(args, error)}") from error
    if args.object_score_loss_weight is not None:
        model.config.object_score_loss_weight = args.object_score_loss_weight
        model.config.check_object_score()
    if adapter is not None:
        model = merge(model, adapter)
    return processor, model if args.quantization else model.to(device or PartialState().device)
