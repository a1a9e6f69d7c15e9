"""Adapters that are damaged, not whole, or of another base are refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.adapters import load_adapter, read_adapter

TARGETS = r".*language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"


@pytest.fixture(scope="module")
def adapter(make_model, tmp_path_factory):
    """An adapter as training leaves it: LoRA on q and v, mask decoder and mask projector in full."""
    from peft import LoraConfig, get_peft_model

    modules = ["mask_projector", "mask_decoder"]
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=TARGETS, modules_to_save=modules))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def changed(adapter, folder, change):
    """A copy of the adapter with other tensors."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    state = change(load_file(adapter / "adapter_model.safetensors"))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_whole_adapter_is_loaded(adapter, make_model):
    model = load_adapter(make_model(), adapter)
    weights = read_adapter(adapter)
    loaded = {name.replace(".default", "").replace(".modules_to_save", ""): p for name, p in model.named_parameters()}
    assert len(weights) > 8 and all(torch.equal(loaded[key], value) for key, value in weights.items() if key in loaded)
    assert sum(key in loaded for key in weights) == len(weights)


def drop(*words):
    return lambda state: {key: value for key, value in state.items() if not all(word in key for word in words)}


def set_nan(state):
    next(value for key, value in state.items() if "lora_A" in key).view(-1)[3] = float("nan")
    return state


@pytest.mark.parametrize("change, message", [
    (drop("layers.1.", "lora_"), r"lacks 4 of \d+ tensors: .*layers\.1\.self_attn\.q_proj\.lora_A"),
    (drop("lora_B"), r"lacks 4 of \d+ tensors: .*lora_B"),
    (drop("layers.0.self_attn.q_proj.lora_A"), r"lacks 1 of \d+ tensors"),
    (drop("mask_projector"), r"lacks 4 of \d+ tensors: .*mask_projector"),
    (drop("mask_decoder", "iou_token"), r"lacks 1 of \d+ tensors: .*iou_token"),
    (set_nan, r"1 of \d+ numbers of .*lora_A.* are not finite"),
    (lambda state: {key: value[:1] if "lora_A" in key else value for key, value in state.items()},
     r"lora_A.weight is \(1, 32\), the model says \(2, 32\)"),
    (lambda state: state | {"base_model.model.mystery.weight": torch.ones(1)}, "does not describe: base_model.model.mystery"),
])  # fmt: skip
def test_holes_are_named(change, message, adapter, make_model, tmp_path):
    folder = changed(adapter, tmp_path / "adapter", change)
    with pytest.raises(ValueError, match=message):
        load_adapter(make_model(), folder)


@pytest.mark.parametrize("content, message", [
    (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    (b"<!doctype html>", "is a web page"),
    (None, "is cut off: it has 2,000 of"),
])  # fmt: skip
def test_damaged_files_say_what_they_are(content, message, adapter, make_model, tmp_path):
    folder = changed(adapter, tmp_path / "adapter", lambda state: state)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:2000] if content is None else content)
    with pytest.raises(ValueError, match=message):
        load_adapter(make_model(), folder)
    file.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        load_adapter(make_model(), folder)
    (folder / "adapter_config.json").write_text("<html>")
    with pytest.raises(ValueError, match="adapter_config.json is a web page"):
        load_adapter(make_model(), folder)


def test_an_adapter_of_another_sam_is_refused(adapter, make_model):
    base = make_model()
    generator = torch.Generator().manual_seed(3)
    for parameter in base.sam.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    with pytest.raises(
        ValueError, match="the model under it is another model than the one that the trained parts of the adapter"
    ):
        load_adapter(base, adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
