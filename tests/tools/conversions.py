"""Tiny random checkpoints in every form the original's users have, and the real command line run on them."""

import json
from pathlib import Path

import torch
from original_checkpoint import ALPHA, RANK
from safetensors.torch import load_file, save_file

from conversion import to_ours
from convert_checkpoint import main

FROZEN = ("model.layers.", "model.norm.", "model.mm_projector.", "model.vision_tower.", "model.visual_model.image_encoder.",
          "model.visual_model.prompt_encoder.")  # fmt: skip


def run(original: Path, checkpoint: Path, output: Path, *options: str) -> dict[str, torch.Tensor]:
    """The command line with the bases' configurations; returns the tensors written."""
    main(["--checkpoint", str(checkpoint), "--output", str(output), "--llava", str(original / "llava"), "--clip",
          str(original / "clip"), *options])  # fmt: skip
    return {key: value for file in sorted(output.glob("*.safetensors")) for key, value in load_file(file).items()}


def expected(original: Path, merged: bool = True) -> dict[str, torch.Tensor]:
    full, lora = (torch.load(original / f"{name}.pt", weights_only=True) for name in ("full", "lora"))
    if merged:
        for key in [key for key in lora if ".lora_A." in key]:
            module = key.split(".lora_A")[0]
            change = lora[key.replace("lora_A", "lora_B")] @ lora[key] * (ALPHA / RANK)
            full[f"{module}.weight"] = full[f"{module}.weight"] + change
    return {to_ours(key): value for key, value in full.items()}


def assert_equal(ours: dict, wanted: dict, tolerance: float = 1e-6) -> None:
    assert sorted(ours) == sorted(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(ours[key].float(), value.float(), atol=tolerance, rtol=tolerance, msg=key)


def peft_names(original: Path, base_layer: bool = False) -> dict[str, torch.Tensor]:
    full, lora = (torch.load(original / f"{name}.pt", weights_only=True) for name in ("full", "lora"))
    adapted = {key.split(".lora_")[0] + ".weight" for key in lora}
    middle = ".base_layer.weight" if base_layer else ".weight"
    full = {key.removesuffix(".weight") + middle if key in adapted else key: value for key, value in full.items()}
    return {f"base_model.model.{key}": value for key, value in (full | lora).items()}


def write_form(form: str, original: Path, target: Path) -> Path:
    """The same weights in one of the forms in which they go round."""
    state = peft_names(original, base_layer=form == "base_layer names")
    if form == "module prefix":
        state = {f"module.{key}": value for key, value in state.items()}
    if form == "inside a dictionary":
        state = {"state_dict": state, "epoch": 3}
    if form == "float16":
        state = {key: value.half() for key, value in state.items()}
    if form == "old torch format":
        torch.save(state, target / "gsva.bin", _use_new_zipfile_serialization=False)
        return target / "gsva.bin"
    if form == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, target / "gsva.safetensors")
        return target / "gsva.safetensors"
    if form in ("sharded with an index", "several files"):
        names = sorted(state)
        parts = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
        for file, keys in parts.items():
            torch.save({key: state[key] for key in keys}, target / file)
        if form == "several files":
            return target
        index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
        (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        return target / "pytorch_model.bin.index.json"
    torch.save(state, target / "gsva.bin")
    return target / "gsva.bin"


def sample_inputs(processor) -> dict:
    from PIL import Image

    return processor(
        images=[Image.new("RGB", (40, 30), "red")], expressions=[["the man", "a unicorn"]], return_tensors="pt"
    )


def load(directory: Path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    return AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval(), processor


def start(original: Path, output: Path, *options: str) -> dict[str, torch.Tensor]:
    """The command line without a checkpoint: where training starts."""
    main(["--output", str(output), "--llava", str(original / "llava"), "--clip", str(original / "clip"), "--sam",
          str(original / "sam.pth"), *options])  # fmt: skip
    return load_file(output / "model.safetensors")


FORMS = ["peft 0.4 names", "base_layer names", "module prefix", "inside a dictionary", "float16", "old torch format",
         "safetensors", "sharded with an index", "several files"]  # fmt: skip
