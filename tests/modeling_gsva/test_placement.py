"""Precision, quantization, device maps and offloading give the same masks, on a CPU and, if there is one, on a GPU."""

import copy

import numpy as np
import pytest
import torch
from paths import BASE as TRAINED
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Root mean square difference to float32 over the root mean square of the mask logits, of trained weights (random ones
# blow rounding up): a few of the 8 (bfloat16) and 11 (float16) bits of a mantissa are lost in two encoders and a decoder.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}
MEMORY = {"cpu": 200_000}  # bytes, of 1,060,000 that the tiny model takes


@pytest.fixture(scope="module")
def inputs(processor, make_picture):
    pictures = [make_picture(0), make_picture(1, 20, 50)]
    return processor(images=pictures, expressions=[["red dog", "a cat"], ["b"]], return_tensors="pt")


@pytest.fixture(scope="module")
def expected(model, inputs):
    return model.segment(**inputs, threshold=-1e4)


def load(folder, **options):
    return GsvaForConditionalGeneration.from_pretrained(folder, **options)


def distance(outputs, expected) -> float:
    """Of the mask logits, relative: all slots have masks (a threshold that rejects nothing)."""
    given, truth = (torch.cat([m.flatten().float().cpu() for m in o.mask_logits]) for o in (outputs, expected))
    assert truth.abs().min() > 0
    return float((given - truth).pow(2).mean().sqrt() / truth.pow(2).mean().sqrt())


def test_auto_keeps_the_precision_of_the_checkpoint(model, tmp_path):
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    for options in ({}, {"dtype": "auto"}):
        again = load(tmp_path, **options)
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
        assert all(torch.equal(again.state_dict()[name], value) for name, value in half.state_dict().items())
    assert AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert {p.dtype for p in load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_segments_alike(make_picture, dtype, device):
    """
    Every part in `dtype`, as the original did, low-resolution mask logits included. Scores, and masks from their upscaling
    on, are in float32.
    """
    processor = GsvaProcessor.from_pretrained(TRAINED)
    pictures, expressions = [make_picture(0), make_picture(1, 20, 50)], [["the red circle", "all stars"], ["a dog"]]
    inputs = processor(images=pictures, expressions=expressions, return_tensors="pt")
    expected = load(TRAINED, dtype=torch.float32).segment(**inputs)
    half = load(TRAINED, dtype=dtype).to(device)
    assert {p.dtype for p in half.parameters()} == {dtype}
    outputs = half.segment(**copy.copy(inputs).to(device))
    assert distance(outputs, expected) < ROUNDING[dtype]
    assert {masks.dtype for masks in outputs.mask_logits} == {dtype}
    for scores, wanted in zip(outputs.scores, expected.scores):
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.cpu(), wanted, atol=0, rtol=ROUNDING[dtype])
    shown, truth = (processor.post_process_segmentation(o, inputs) for o in (outputs, expected))
    differing = [(a["mask"] != b["mask"]).mean() for x, y in zip(shown, truth) for a, b in zip(x, y)]
    assert np.max(differing) < ROUNDING[dtype]
    assert half.generate(**copy.copy(inputs).to(device), max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


PLACES = {
    "one device": {"": "cpu"},
    "all on disk": {"": "disk"},
    "masks on disk": {"vlm": "cpu", "sam": "disk", "mask_projector": "disk"},
    "language on disk": {"vlm": "disk", "sam": "cpu", "mask_projector": "cpu"},
    "auto": "auto",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["slots", "teacher_forced", "generate"])
def test_offloaded_parts_give_the_same_masks(model_dir, model, inputs, place, method, tmp_path):
    options = {"max_memory": MEMORY} if place == "auto" else {}
    placed = load(model_dir, device_map=PLACES[place], offload_folder=tmp_path, **options)
    if place == "auto":
        assert set(placed.hf_device_map.values()) == {"cpu", "disk"}
    meta = {name for name, parameter in placed.named_parameters() if parameter.device.type == "meta"}
    assert bool(meta) == (place != "one device")
    assert placed.device == torch.device("cpu")  # where inputs belong, also when the first weight lies on disk
    options = {"max_new_tokens": 8} if method == "generate" else {}
    outputs, wanted = (m.segment(**copy.copy(inputs).to(m.device), method=method, **options) for m in (placed, model))
    assert torch.equal(outputs.sequences, wanted.sequences)
    for given, truth in zip(outputs.mask_logits, wanted.mask_logits):
        assert torch.equal(given, truth)
    assert all(placed.get_parameter(name).device.type == "meta" for name in meta)  # and are gone again


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [{0: 400_000, "cpu": "1GB"}, {0: 400_000, "cpu": 300_000}])
def test_a_small_gpu_borrows_from_cpu_and_disk(model_dir, inputs, expected, memory, tmp_path):
    placed = load(model_dir, device_map="auto", max_memory=memory, offload_folder=tmp_path)
    assert {0, "cpu"} <= set(placed.hf_device_map.values())
    outputs = placed.segment(**copy.copy(inputs).to(placed.device), threshold=-1e4)
    assert distance(outputs, expected) < 1e-3


def test_no_layer_is_split(model):
    classes = {type(module).__name__ for module in model.modules()}
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer", "SamVisionLayer"} <= model._no_split_modules & classes


@pytest.fixture(scope="module")
def packable(model):
    """
    A model whose 4-bit weights bitsandbytes can repack, as it does in `Linear4bit.forward` on CPUs with AVX512-BF16: whole
    blocks of 64 columns (more than one block comes back from `save_pretrained` in another order) and of 32 rows.
    """
    config = copy.deepcopy(model.config)
    text = config.text_config
    text.hidden_size = text.intermediate_size = 64
    text.head_dim = text.hidden_size // text.num_attention_heads
    torch.manual_seed(0)
    return GsvaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["load_in_8bit", "load_in_4bit"])
def test_by_default_only_the_language_models_layers_are_quantized(packable, inputs, kind, device, tmp_path):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    packable.save_pretrained(model_dir := tmp_path / "whole")
    expected = packable.segment(**inputs, threshold=-1e4)
    options = {"bnb_4bit_quant_type": "nf4"} if kind == "load_in_4bit" else {}
    config = BitsAndBytesConfig(**{kind: True}, **options)
    small = load(model_dir, quantization_config=config, device_map={"": device}, dtype=torch.float32)
    names = {name for name, module in small.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}
    assert names == {
        f"vlm.model.language_model.layers.{layer}.{name}"
        for layer in range(2)
        for name in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    }
    quantized = [small.get_submodule(name) for name in names]
    assert all(layer.in_features == 64 and layer.out_features % 32 == 0 for layer in quantized)
    assert config.llm_int8_skip_modules is None  # the caller's own is left as it was
    outputs = small.segment(**copy.copy(inputs).to(device), threshold=-1e4)
    assert 0 < distance(outputs, expected) < 1  # 4 bits of random weights: alike, not equal

    small.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small", device_map={"": device})
    assert {n for n, module in again.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)} == names
    assert distance(again.segment(**copy.copy(inputs).to(device), threshold=-1e4), outputs) == 0


def test_who_names_modules_to_leave_alone_is_heard(model_dir):
    from bitsandbytes.nn import Linear4bit

    keep = [r"vlm\.model\.(?!vision_tower)", "vlm.lm_head", "sam", "mask_projector"]
    config = {"load_in_4bit": True, "quant_method": "bitsandbytes", "llm_int8_skip_modules": keep}
    small = load(model_dir, quantization_config=config, device_map={"": "cpu"})
    names = {name for name, module in small.named_modules() if isinstance(module, Linear4bit)}
    assert names and all(name.startswith("vlm.model.vision_tower.") for name in names)


@pytest.mark.parametrize(
    "kinds",
    [("eager", "sdpa", "eager"), ("sdpa", "eager", "sdpa")],
)
def test_attention_of_each_part(model_dir, inputs, expected, kinds):
    parts = dict(zip(("text_config", "vision_config", "sam_config"), kinds))
    mixed = load(model_dir, attn_implementation=parts)
    assert tuple(getattr(mixed.config, part)._attn_implementation for part in parts) == kinds
    layers = mixed.sam.vision_encoder.layers
    names = {"eager": "SamVisionAttention", "sdpa": "GsvaSamVisionAttention"}
    assert {type(layer.attn).__name__ for layer in layers} == {names[kinds[2]]}
    assert distance(mixed.segment(**inputs, threshold=-1e4), expected) < 1e-4


@pytest.mark.parametrize("kind", ["eager", "sdpa", "flex_attention"])
def test_one_name_reaches_every_part_that_has_it(model_dir, kind):
    """SAM has no other attention than these two: it keeps sdpa when the rest gets another."""
    for loader in (GsvaForConditionalGeneration, AutoModelForImageTextToText):
        config = loader.from_pretrained(model_dir, attn_implementation=kind).config
        assert config.text_config._attn_implementation == config.vision_config._attn_implementation == kind
        assert config.sam_config._attn_implementation == ("sdpa" if kind == "flex_attention" else kind)


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
def test_flash_attention_segments_alike(model_dir, inputs, expected):
    fast = load(model_dir, attn_implementation="flash_attention_2", dtype=torch.bfloat16, device_map={"": "cuda"})
    assert distance(fast.segment(**copy.copy(inputs).to("cuda"), threshold=-1e4), expected) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("device", DEVICES)
def test_a_static_cache_generates_the_same(model_dir, inputs, device):
    model = load(model_dir).to(device)
    here, options = copy.copy(inputs).to(device), {"cache_implementation": "static", "max_new_tokens": 12}
    assert torch.equal(model.generate(**here, max_new_tokens=12), model.generate(**here, **options))
    dynamic = model.segment(**here, method="generate", max_new_tokens=12)
    static = model.segment(**here, method="generate", **options)
    assert torch.equal(dynamic.sequences, static.sequences)
    assert all(torch.equal(a, b) for a, b in zip(dynamic.mask_logits, static.mask_logits))
