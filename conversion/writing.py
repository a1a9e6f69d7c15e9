"""Write a converted model: safetensors shard by shard, LoRA merged or as an adapter, and the model card."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm import tqdm

from data_scripts.files import refuse_existing, render, write_json, write_text

from .reading import SAFETENSORS_DTYPES, LazyTensor, advise, as_bytes, is_finite, read_json

if TYPE_CHECKING:
    from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor

TEMPLATES = Path(__file__).parent / "templates"
CARD, START_CARD = TEMPLATES / "converted_card.md.jinja", TEMPLATES / "start_card.md.jinja"
ADAPTER = "adapter"


def check_output(output: Path) -> None:
    """Raise OSError before the long work if `output` exists or cannot be written."""
    refuse_existing(output)
    try:
        os.lstat(output)
    except FileNotFoundError:
        pass  # as it should be
    except OSError as error:  # the name is too long, or a folder in it is a file
        raise OSError(f"{output} cannot be written ({error.strerror}): choose another --output.") from error
    folder = next(parent for parent in output.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{output} cannot be written: {folder} is a file, not a folder. Choose another --output."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{output} cannot be written: {folder} is read-only. Choose another --output.")


def check_room(output: Path, size: int) -> None:
    """Raise OSError if the disk of `output` has less than `size` bytes free."""
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"{output} needs {size / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free: nothing was written. Free space or "
            "choose another --output."
        )


@contextmanager
def naming_output(output: Path) -> Iterator[None]:
    """Say in one sentence which output could not be written, why, and that nothing of it is left behind.

    Raises:
        OSError: The block raised an OSError, or an error of a Rust library (tokenizers, safetensors) that stands for one.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif match := re.search(r"\(os error (\d+)\)", str(error)):
            reason = os.strerror(int(match[1]))
        else:
            raise
        raise OSError(
            f"{output} was not written ({reason}): nothing of it is left behind. Free space or choose another --output, and run "
            "the command again."
        ) from error


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return a tensor of finite numbers in another type.

    Raises:
        ValueError: A number of the tensor `name` is beyond the range of that type.
    """
    if tensor.dtype == dtype:
        return tensor.contiguous()
    converted = tensor.to(dtype)
    if not is_finite(converted):
        raise ValueError(
            f"{name} has values beyond {str(dtype).removeprefix('torch.')}'s {torch.finfo(dtype).max:.5g}; choose a --dtype "
            "with a larger range: bfloat16 or float32."
        )
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


def _planned(tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return tensors without memory for the plan of files; `dtype` None stands for each tensor's own."""
    return {name: torch.empty(part.shape, dtype=dtype or part.dtype, device="meta") for name, part in tensors.items()}


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None) -> Iterator[int]:
    """Write one safetensors file with one tensor in memory at a time. Yield the number of bytes after each tensor.

    `save_file` of safetensors needs all tensors of a file at once. With the header known, they can be written one by one.
    """
    planned = _planned(tensors, dtype)
    with path.open("wb") as file:
        file.write(safetensors_header(planned))
        for name, lazy in tensors.items():
            tensor = in_dtype(lazy.read(), planned[name].dtype, name)
            file.write(as_bytes(tensor))
            yield tensor.nbytes
        file.flush()
        os.fsync(file.fileno())  # whole on disk before the directory gets its name
        advise(file, "POSIX_FADV_DONTNEED")


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Switch transformers' progress bars off for a block; they count the files of weights that are read or written."""
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_progress:
            logging.enable_progress_bar()


def write_directory(
    folder: Path,
    model: GsvaForConditionalGeneration,
    processor: GsvaProcessor,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None,
    max_shard_size: str,
) -> int:
    """Write configuration, code, processor and weights. Return the bytes of the weights.

    Args:
        model: Without memory for its weights, in the precision that config.json is to name.
        dtype: Of the weights; None stands for each tensor's own.
    """
    with without_progress_bar():  # it would count the files of weights, and there are none
        model.save_pretrained(folder, state_dict={})  # everything but the weights
    processor.save_pretrained(folder)
    return write_shards(folder, tensors, dtype, max_shard_size)


def write_shards(
    directory: Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None, max_shard_size: str
) -> int:
    """Write safetensors shards and their index with one tensor in memory at a time. Return the number of bytes written."""
    plan = split_torch_state_dict_into_shards(_planned(tensors, dtype), max_shard_size=max_shard_size)
    total = plan.metadata["total_size"]
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing", disable=not sys.stderr.isatty()) as bar:
        for file, names in plan.filename_to_tensors.items():
            for written in write_safetensors(directory / file, {name: tensors[name] for name in names}, dtype):
                bar.update(written)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return total


def merge_lora(base: LazyTensor, pair: Mapping[str, LazyTensor], alpha: float) -> LazyTensor:
    """Return W + alpha / r · B A, computed in float32 and rounded once.

    Reading it raises ValueError if the sum is beyond the range of float32.
    """

    def read() -> torch.Tensor:
        a, b = pair["A"].read().float(), pair["B"].read().float()
        merged = base.read().float().addmm(b, a, alpha=alpha / a.shape[0])
        if not is_finite(merged):
            raise ValueError(
                f"LoRA with --lora_alpha {alpha:g} gives weights beyond float32: give the alpha of the training."
            )
        return merged

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
    config = directory / "adapter_config.json"  # peft writes the modules in another order each time
    content = read_json(config)
    write_json(config, content | {"target_modules": sorted(content["target_modules"])}, indent=2)
    tensors = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight": tensor
        for name, pair in lora.items()
        for side, tensor in pair.items()
    }
    for _ in write_safetensors(directory / "adapter_model.safetensors", dict(sorted(tensors.items())), dtype):
        pass


def write_card(directory: Path, template: Path, name: str, summary: Mapping[str, Any], **values: Any) -> None:
    """Write README.md, the model card.

    Args:
        template: CARD or START_CARD.
        name: The directory or Hub repository that the card's example loads.
        summary: The rows of the card's table.
        values: What else the template takes. Of CARD `is_start`: the weights are those that training starts from, and
            `has_adapter`: LoRA is not merged into the weights but lies in adapter/. Of START_CARD `base_models`: Hub ids, and
            `licence`: that of all parts, or None.
    """
    name = name.encode("utf-8", "replace").decode()  # a folder's name may hold bytes that are no text
    facts = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in summary.items()}
    write_text(directory / "README.md", render(template, name=name, facts=facts, **values))
