"""Device maps, offloading and quantization of a GSVA over other bases and mask models."""

import copy

import pytest
import tiny_bases as bases
import torch
from transformers import BitsAndBytesConfig

from modeling_gsva import GsvaForConditionalGeneration

PAIRS = (
    ("llava", "sam2"), ("llava_next", "sam_hq"), ("llava_onevision", "sam"), ("qwen2_5_vl", "sam2"), ("qwen3_vl", "sam3_tracker"), ("internvl", "sam2"),
    ("smolvlm", "sam"), ("gemma3", "sam2"), ("paligemma", "sam"),
)  # fmt: skip


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def model(pair) -> GsvaForConditionalGeneration:
    return bases.make_gsva(pair[0], bases.mask_config(pair[1]))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("parts", [{"vlm": "disk", "sam": "cpu"}, {"vlm": "cpu", "sam": "disk"}], ids=["vlm", "sam"])
def test_offloaded_parts_give_the_same_masks(pair, model, folder, parts, tmp_path):
    inputs = bases.make_inputs(model, pair[0], bases.SIDES[pair[1]])
    placed = GsvaForConditionalGeneration.from_pretrained(
        folder, device_map={**parts, "mask_projector": "cpu"}, offload_folder=tmp_path
    )
    assert any(parameter.device.type == "meta" for parameter in placed.parameters())
    outputs, expected = (one.segment(**copy.copy(inputs), threshold=-1e4) for one in (placed, model))
    for given, truth in zip(outputs.mask_logits, expected.mask_logits, strict=True):
        assert torch.equal(given, truth) and truth.abs().min() > 0
    for given, truth in zip(outputs.scores, expected.scores, strict=True):
        assert torch.equal(given, truth)


def test_only_the_language_models_layers_are_quantized(model, folder):
    from bitsandbytes.nn import Linear4bit

    config = BitsAndBytesConfig(load_in_4bit=True)
    small = GsvaForConditionalGeneration.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    quantized = {name for name, module in small.named_modules() if isinstance(module, Linear4bit)}
    decoder = next(name for name, module in model.named_modules() if module is model.vlm.get_decoder())
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(f"{decoder}.layers.")
    }
    assert quantized == linears and len(linears) >= 4 * 7
