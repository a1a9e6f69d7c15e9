"""torch.compile: each part of the hot path compiles to one graph, and answers stay the same."""

import pytest
import torch
from transformers import CompileConfig, SamConfig

from modeling_gsva import GsvaForConditionalGeneration

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Of float32 mask logits of up to some hundreds on random weights, where the compiler orders sums anew.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def windowed(make_model):
    """With a windowed layer that has to pad its 8 × 8 patches, and a global one, as SAM ViT-H has."""
    config = make_model().config
    sam = config.sam_config.to_dict()
    sam["vision_config"] |= {"window_size": 3, "global_attn_indexes": [1]}
    config.sam_config = SamConfig(**sam)
    torch.manual_seed(0)
    return GsvaForConditionalGeneration(config).eval()


@pytest.fixture
def inputs(processor, make_picture):
    pictures = [make_picture(0), make_picture(1, 20, 50)]
    return processor(images=pictures, expressions=[["red dog", "a cat"], ["b"]], return_tensors="pt")


def assert_same(outputs, expected):
    assert torch.equal(outputs.sequences, expected.sequences)
    for given, truth in zip(outputs.mask_logits, expected.mask_logits):
        torch.testing.assert_close(given, truth, **TOLERANCE)


def test_no_graph_breaks_in_the_hot_path(windowed, inputs):
    """A break would be an error (`fullgraph`). Prefill, shared prefix, slot by slot and token by token."""
    methods = {"slots": {}, "teacher_forced": {}, "generate": {"max_new_tokens": 6}}
    expected = {method: windowed.segment(**inputs, method=method, **options) for method, options in methods.items()}
    for part in (windowed.model.language_model, windowed.sam.vision_encoder, windowed.sam.mask_decoder):
        part.compile(fullgraph=True, backend="eager")  # in place: names of weights stay
    for method, options in methods.items():
        assert_same(windowed.segment(**inputs, method=method, **options), expected[method])
    stats = torch._dynamo.utils.counters
    assert stats["stats"]["unique_graphs"] >= 3 and not stats["graph_break"]


def test_sams_encoder_is_one_graph_for_every_picture(windowed, inputs):
    expected = windowed.get_sam_embeddings(inputs["sam_pixel_values"])
    windowed.sam.vision_encoder.compile(fullgraph=True, backend="aot_eager")
    for _ in range(3):
        given = windowed.get_sam_embeddings(inputs["sam_pixel_values"])
    torch.testing.assert_close(given, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_decoding_with_a_static_cache_compiles_whole(make_model, inputs):
    """On a GPU `generate` does so by itself; here it is asked to."""
    model = make_model()
    expected = model.generate(**inputs, max_new_tokens=6)
    compiling = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiling._compile_all_devices = True
    given = model.generate(**inputs, max_new_tokens=6, cache_implementation="static", compile_config=compiling)
    assert torch.equal(given, expected)
    assert hasattr(model.vlm, "_compiled_call") and not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_code_gives_the_same_masks(windowed, processor, make_picture, device):
    """The real compiler (on a CPU it needs a C++ one)."""
    inputs = processor(images=[make_picture()], expressions=[["red dog"]], return_tensors="pt").to(device)
    model = windowed.to(device)
    expected = model.segment(**inputs)
    for part in (model.model.language_model, model.sam.vision_encoder):
        part.compile(fullgraph=True)
    assert_same(model.segment(**inputs), expected)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.gpu
def test_a_static_cache_compiles_by_itself_on_a_gpu(make_model, inputs):
    model, inputs = make_model().cuda(), inputs.to("cuda")
    expected = model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, cache_implementation="static"), expected)
    assert hasattr(model.vlm, "_compiled_call")
