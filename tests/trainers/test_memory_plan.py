"""The memory plan against real tensors, real quantized weights, and arithmetic by hand."""

import pytest
import tiny_bases
import torch
from paths import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from trainers.arguments import ModelArguments, parse_arguments
from trainers.freezing import prepare_for_training
from trainers.memory_plan import (
    GIB,
    LiveBytes,
    Sizes,
    Strategy,
    activation_bytes,
    architecture,
    count,
    image_tokens,
    memory_of,
    plan,
    planned_config,
    sizes_of,
    trained_model,
    without_content,
)

ACCELERATE = ROOT / "configs" / "accelerate"


def test_live_bytes_follow_what_is_alive():
    with LiveBytes() as counter:
        a = torch.zeros(100)  # 400 bytes
        b = a + 1
        view = b[:50]
        assert counter.live == 800
        del a, b
        assert counter.live == 400  # the view keeps its storage
        del view
        c = torch.zeros(10)
        assert counter.live == 40 and c.numel() == 10
    assert counter.peak == 800


@pytest.mark.parametrize("checkpointed", [False, True])
def test_without_content_the_count_is_that_of_real_tensors(make_model, checkpointed):
    args = ModelArguments(lora_dropout=0.0)
    real = prepare_for_training(make_model(), args)
    shape = {"images": 2, "length": 40, "slots": 3, "half": False, "side": 48}
    if checkpointed:
        real.activation_checkpointing_enable()
    with torch.random.fork_rng():
        counted = activation_bytes(real, **shape)
    planned = trained_model(make_model().config, args, half=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_content(planned)
        if checkpointed:
            planned.activation_checkpointing_enable()
        # Kernels that only tell shapes may take another road than those that compute.
        assert activation_bytes(planned, **shape) == pytest.approx(counted, rel=0.05)


def test_sizes_are_those_of_the_model_that_is_trained(make_model):
    model = prepare_for_training(make_model(), ModelArguments())
    sizes = sizes_of(trained_model(make_model().config, ModelArguments(), half=False), None)
    tensors = [*model.parameters(), *model.buffers()]
    assert sizes.weights == sum(t.numel() * t.element_size() for t in tensors)
    assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.trained_bytes == 4 * sizes.trained


def test_half_precision_keeps_what_is_trained_in_float32(make_model):
    config = make_model().config
    single = sizes_of(trained_model(config, ModelArguments(), half=False), None)
    mixed = sizes_of(trained_model(config, ModelArguments(dtype="bfloat16"), half=True), None)
    assert mixed.trained_bytes == single.trained_bytes
    assert 0.5 * single.frozen_bytes <= mixed.frozen_bytes < 0.55 * single.frozen_bytes  # rotary tables stay float32


def test_quantized_weights_take_what_bitsandbytes_makes_of_them():
    """A layer of a size for which the constant parts of its state weigh little."""
    import bitsandbytes as bnb

    from trainers.memory_plan import _quantized_bytes

    weight = torch.randn(1024, 2048)
    data, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    scales = [state.absmax, state.state2.absmax]
    real = sum(t.numel() * t.element_size() for t in (data, *scales))
    assert _quantized_bytes(weight, "4bit") == pytest.approx(real, rel=1e-3)
    assert _quantized_bytes(weight, "8bit") == 1024 * 2048 + 4 * 1024


def test_the_papers_sizes():
    """Parameters of LLaMA 7B and 13B with 32,004 rows, of CLIP ViT-L/14 and of SAM ViT-H, each counted by hand."""
    for name, hidden, wide, layers in (("7b", 4096, 11008, 32), ("13b", 5120, 13824, 40)):
        config = architecture(name)
        with torch.device("meta"):
            from modeling_gsva import GsvaForConditionalGeneration

            model = GsvaForConditionalGeneration(config)
        llama = layers * (4 * hidden**2 + 3 * hidden * wide + 2 * hidden) + hidden + 32004 * hidden
        assert sum(p.numel() for p in model.model.language_model.parameters()) == llama
        assert model.lm_head.weight.numel() == 32004 * hidden
        assert sum(p.numel() for p in model.model.multi_modal_projector.parameters()) == 1024 * hidden + hidden
        assert sum(p.numel() for p in model.mask_projector.parameters()) == hidden**2 + hidden + 256 * hidden + 256
        # 303,179,776: CLIP ViT-L/14's vision tower without projection; 637,026,048: SAM ViT-H's image encoder.
        assert sum(p.numel() for p in model.model.vision_tower.parameters()) == 303_179_776
        assert sum(p.numel() for p in model.sam.vision_encoder.parameters()) == 637_026_048


#          strategy, processes -> weights, gradients, optimizer, buffers of 100 frozen bytes and 10 trained float32
SHARED = [
    ("one_gpu", None, (140, 40, 80, 0)),
    ("ddp", 8, (140, 40, 80, 40)),
    ("zero2", 4, (120, 5, 30, 2 * 2 * 10**9)),  # the two buffers of deepspeed_zero2.json
    ("zero3", 4, (30, 5, 30, 2 * 35)),  # all 35 parameters are fewer than those that stay gathered
    ("fsdp2", 4, (35, 10, 20, 50 + 2 * 7)),
]


@pytest.mark.parametrize(("name", "processes", "expected"), SHARED, ids=[row[0] for row in SHARED])
def test_sharing_out_by_hand(name, processes, expected, monkeypatch):
    monkeypatch.chdir(ACCELERATE.parent.parent)
    strategy = Strategy.read(ACCELERATE / f"{name}.yaml", processes)
    sizes = Sizes(100, 10, 40, 35, layer_bytes=7, root_bytes=50, dequantized=0)
    memory = memory_of(sizes, 1000, strategy)
    assert (memory.weights, memory.gradients, memory.optimizer, memory.buffers) == expected
    assert memory.total == sum(expected) + 1000
    if name.startswith("zero"):  # in float32 weights, gradients and buffers take 4 bytes
        single = memory_of(sizes, 1000, strategy, half=False)
        assert single.gradients == 2 * memory.gradients and single.optimizer == memory.optimizer
        assert single.weights == (140 if name == "zero2" else 35)


def test_the_table(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(ACCELERATE.parent.parent)
    make_model().config.save_pretrained(tmp_path)
    words = ["--plan", "--model", str(tmp_path), "--max_length", "40", "--per_device_train_batch_size", "1"]
    words += ["--plan_strategy", str(ACCELERATE / "one_gpu.yaml"), "--plan_memory", "6"]
    table = plan(*parse_arguments(words)).splitlines()
    assert len(table) == 3 and table[2].startswith("one_gpu") and table[2].endswith("6 GiB")
    too_small = plan(*parse_arguments([*words[:-1], "1"])).splitlines()
    assert too_small[2].endswith("none")
    assert GIB == 2**30


@pytest.mark.parametrize(("family", "tokens"), [("gemma3", 4), ("qwen3_vl", 0), ("smolvlm", 0)])
def test_bases_whose_configurations_have_other_fields(family, tokens, tmp_path):
    """Those of LLaVA v1 are for LLaVA v1; an image's tokens are known where the base says how many it takes."""
    model = tiny_bases.make_gsva(family, tiny_bases.mask_config("sam2"))
    model.config.save_pretrained(tmp_path)
    words = ["--plan", "--model", str(tmp_path), "--max_length", "40", "--per_device_train_batch_size", "2"]
    sizes, activations = count(*parse_arguments(words))
    prepared = prepare_for_training(model, ModelArguments())
    assert sizes.weights == sum(t.numel() * t.element_size() for t in [*prepared.parameters(), *prepared.buffers()])
    assert sizes.trained == sum(p.numel() for p in prepared.parameters() if p.requires_grad) and sizes.layer_bytes > 0
    assert activations > 4 * 2 * 40 * model.config.text_config.vocab_size  # the logits alone
    assert image_tokens(model.config) == tokens
    assert f"{tokens or 'an unknown number of them'}" in plan(*parse_arguments(words)).splitlines()[1]


def test_the_plan_needs_a_size_and_a_config(tmp_path):
    with pytest.raises(ValueError, match="--architecture 7b, 13b, .* or smolvlm"):
        planned_config(ModelArguments(model=str(tmp_path / "nothing")))
    assert planned_config(ModelArguments(model="nothing", architecture="13b")).text_config.hidden_size == 5120
    (tmp_path / "x.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match="is no accelerate config"):
        Strategy.read(tmp_path / "x.yaml")
