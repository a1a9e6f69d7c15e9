"""The ways in which SAM's attention adds its position bias: equal numbers, and the choice among them by what they cost."""

import copy

import pytest
import torch

import modeling_gsva.sam_attention_gsva as attention
from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration

SHAPES = {"global": (4, 12, 12, 8), "window": (30, 5, 5, 8), "not square": (4, 6, 9, 20)}  # N, height, width, channels


def rms(values: torch.Tensor) -> float:
    return float(values.float().square().mean().sqrt())


def drawn(count, height, width, channels, dtype=torch.float32, grad=False):
    """Queries, keys, values and a bias that matters."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(count, height * width, channels, generator=generator).to(dtype).requires_grad_(grad)
        for _ in range(3)
    )
    bias = tuple(
        torch.randn(count, height, width, side, generator=generator).to(dtype).requires_grad_(grad)
        for side in (height, width)
    )
    return query, key, value, bias, (height, width)


def eager(query, key, value, bias, size):
    """The definition: softmax of the scaled products and the whole bias."""
    scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + (bias[0][..., :, None] + bias[1][..., None, :]).flatten(3).flatten(1, 2)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("way", attention.WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_equals_the_definition(way, shape):
    inputs = drawn(*SHAPES[shape])
    expected = eager(*inputs)
    assert rms(attention.WAYS[way](*inputs) - expected) < 1e-6 < 1e-4 * rms(expected)
    without = *inputs[:3], None, inputs[4]
    assert rms(attention.WAYS[way](*without) - eager(*without)) < 1e-6
    assert rms(eager(*without) - expected) > 0.1


@pytest.mark.parametrize("way", ["augmented", "chunks"])  # flex attention has no gradients on a CPU
def test_every_gradient_equals_that_of_the_definition(way):
    gradients = []
    for attend in (eager, attention.WAYS[way]):
        *tensors, bias, size = drawn(*SHAPES["window"], dtype=torch.float64, grad=True)
        attend(*tensors, bias, size).square().sum().backward()
        gradients.append([tensor.grad for tensor in (*tensors, *bias)])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("way", attention.WAYS)
def test_half_precision_stays_as_near_as_the_usual_way(way):
    """Against fp32, rounding its bias once or twice must not cost more than the sum of rounded parts does."""
    inputs = drawn(*SHAPES["global"])
    expected = eager(*inputs)
    query, key, value, bias, size = drawn(*SHAPES["global"], dtype=torch.bfloat16)
    distances = {name: rms(run(query, key, value, bias, size) - expected) for name, run in attention.WAYS.items()}
    assert distances[way] < 1.5 * distances["chunks"] < 0.05


@pytest.mark.parametrize("limit", [1, 3 * 25 * 24 * 7, 2**28])
def test_augmented_in_pieces(limit, monkeypatch):
    """From one attention at a time to all of them; 7 do not divide 30."""
    inputs = drawn(*SHAPES["window"])
    whole = attention.augmented(*inputs)
    monkeypatch.setattr(attention, "AUGMENTED_ELEMENTS", limit)
    assert rms(attention.augmented(*inputs) - whole) < 1e-6


def test_dropout_is_not_lost_in_flex():
    inputs = drawn(*SHAPES["global"])
    assert not torch.equal(attention.in_flex(*inputs, dropout=0.5), attention.in_flex(*inputs, dropout=0.5))


def test_whole_encoder_in_every_way(model):
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = model.get_sam_embeddings(pixels)
    for way in attention.WAYS:
        config = GsvaConfig(**{**model.config.to_dict(), "sam_attention": way})
        other = GsvaForConditionalGeneration(config).eval()
        other.load_state_dict(model.state_dict())
        assert {layer.attn.way for layer in other.sam.vision_encoder.layers} == {way}
        with torch.no_grad():
            assert rms(other.get_sam_embeddings(pixels) - expected) < 1e-4 * rms(expected)


def test_saved_and_given(model_dir):
    assert GsvaForConditionalGeneration.from_pretrained(model_dir).config.sam_attention == "auto"
    forced = GsvaForConditionalGeneration.from_pretrained(model_dir, sam_attention="augmented")
    assert {layer.attn.way for layer in forced.sam.vision_encoder.layers} == {"augmented"}
    attention.use_gsva_attention(forced.sam, "chunks")
    assert {layer.attn.way for layer in forced.sam.vision_encoder.layers} == {"chunks"}
    with pytest.raises(
        ValueError, match="'fastest' is not known; choose 'auto' or one of 'augmented', 'flex', 'chunks'"
    ):
        attention.use_gsva_attention(forced.sam, "fastest")


def chosen(batch, side, channels, dtype, heads=16):
    return attention.choose_way(
        torch.empty(batch, side, side, heads * channels, device="meta"), dtype, heads, channels
    )


def test_choice_on_a_cpu_is_chunks(model):
    hidden = torch.empty(1, 64, 64, 1280)
    assert attention.choose_way(hidden, torch.float32, 16, 80) == "chunks"


def test_choice_on_a_gpu_follows_the_count(monkeypatch):
    """ViT-H's layers: 64 x 64 patches, and 25 windows of 14 x 14."""
    monkeypatch.setitem(attention.CANDIDATES, "meta", attention.CANDIDATES["cuda"])
    for batch, side in ((1, 64), (8, 64), (25, 14), (200, 14)):
        assert chosen(batch, side, 80, torch.bfloat16) == "augmented"
        assert chosen(batch, side, 80, torch.float32) == "chunks"  # no flash kernels, and operations cost more
    assert chosen(1, 100, 80, torch.bfloat16) == "chunks"  # 80 + 100 + 100 is wider than flash attention's heads
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(8, 64, 80, torch.bfloat16) == chosen(200, 14, 80, torch.bfloat16) == "flex"
    assert chosen(8, 64, 8, torch.bfloat16) != "flex"  # its kernels begin at 16


def test_no_bias_is_ever_whole(monkeypatch):
    """The count of a global layer of ViT-H: what the whole bias takes is far above what any way moves or holds."""
    counted = attention.costs(16, 64, 64, 80, 2)
    whole = 16 * 4096**2 * 2
    assert whole == 536_870_912
    assert counted["augmented"][1] < whole / 2 and counted["flex"][1] < whole / 6
    assert attention.BIAS_ELEMENTS["default"] * 2 == whole / 4


@pytest.mark.parametrize("way", ["auto", "flex"])
def test_compiles_as_one_graph(model, monkeypatch, way):
    """With dynamo alone: which kernels it becomes on a GPU, `python -m benchmarks gpu` tries. "auto" counts as it does there."""
    monkeypatch.setitem(attention.CANDIDATES, "cpu", attention.CANDIDATES["cuda"])
    layer = copy.deepcopy(model.sam.vision_encoder.layers[0].attn)
    states = torch.randn(2, 8, 8, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.way = "chunks"
        expected = layer(states)[0]
        layer.way = way
        found = torch.compile(layer, backend="eager", fullgraph=True)(states)[0]
    assert rms(found - expected) < 1e-4 * rms(expected)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("shape", SHAPES)
def test_flex_s_compiled_kernels(shape, monkeypatch):
    """On a CPU they are of C++. PyTorch 2.13 fails to make those for sizes left open, or within an encoder that is compiled."""
    torch.compiler.reset()
    inputs = drawn(*SHAPES[shape])
    expected = eager(*inputs)
    monkeypatch.setattr(attention, "FLEX_COMPILED", ("cpu",))
    with torch.no_grad():
        found = attention.in_flex(*inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert rms(found - expected) < 1e-6 < 1e-4 * rms(expected)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("way", ["augmented", "chunks"])
def test_compiled_layers_give_the_same(model, way):
    """By PyTorch's own compiler, a layer at a time."""
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected, other = model.get_sam_embeddings(pixels), copy.deepcopy(model)
    attention.use_gsva_attention(other.sam, way)
    for layer in other.sam.vision_encoder.layers:
        layer.compile(fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert rms(other.get_sam_embeddings(pixels) - expected) < 1e-4 * rms(expected)


def test_indices_are_made_on_the_device(model):
    """transformers makes them on the CPU; the tables are those of its class."""
    layer = model.sam.vision_encoder.layers[0].attn
    for size in (8, 5):  # the table's own, and one to which it is interpolated
        expected = super(attention.GsvaSamVisionAttention, layer).get_rel_pos(size, size, layer.rel_pos_h)
        assert torch.equal(layer.get_rel_pos(size, size, layer.rel_pos_h), expected)
