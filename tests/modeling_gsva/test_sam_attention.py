"""The attention of SAM and SAM-HQ in our ways against transformers' eager and sdpa attention."""

import pytest
import tiny_bases as bases
import torch
from transformers import AutoModel, SamConfig, SamHQConfig
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionEncoder
from transformers.models.sam_hq.modeling_sam_hq import SamHQVisionAttention, SamHQVisionEncoder

import modeling_gsva.sam_attention_gsva as chunked
from modeling_gsva import GsvaForConditionalGeneration
from modeling_gsva.masks_gsva import MASK_ADAPTERS

KINDS = {
    "sam": (SamConfig, SamVisionEncoder, SamVisionAttention, chunked.GsvaSamVisionAttention),
    "sam_hq": (SamHQConfig, SamHQVisionEncoder, SamHQVisionAttention, chunked.GsvaSamHQVisionAttention),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def make_encoder(kind, implementation, **options):
    """Windows of 5 that do not divide 12 patches, one global layer; position tables that matter."""
    config_class, encoder_class, *_ = KINDS[kind]
    config = config_class(
        vision_config={
            "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "global_attn_indexes": [1],
            "mlp_dim": 48, "image_size": 96, "patch_size": 8, "window_size": 5, "output_channels": 16, **options,
        }
    ).vision_config  # fmt: skip
    config._attn_implementation = implementation
    torch.manual_seed(0)
    encoder = encoder_class(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.fixture(params=[1, 700, 10_000, 2**20], ids=lambda n: f"{n} elements")
def budget(request, monkeypatch):
    """From one row of one head at a time to everything at once; 700 splits the rows, 10 000 the windows unevenly."""
    monkeypatch.setitem(chunked.BIAS_ELEMENTS, "cpu", request.param)


@pytest.mark.parametrize("options", [{}, {"use_rel_pos": False}, {"qkv_bias": False}], ids=str)
def test_equals_eager(budget, options, kind):
    eager, ours = make_encoder(kind, "eager", **options), make_encoder(kind, "sdpa", **options)
    chunked.use_gsva_attention(ours)
    assert all(type(layer.attn) is KINDS[kind][-1] for layer in ours.layers)
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(pixels).last_hidden_state, eager(pixels).last_hidden_state, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("way", chunked.WAYS)
def test_the_whole_encoder_in_every_way(way, kind):
    """SAM-HQ's decoder also reads the outputs of the global blocks."""
    eager, ours = make_encoder(kind, "eager"), make_encoder(kind, "sdpa")
    chunked.use_gsva_attention(ours, way)
    assert {layer.attn.way for layer in ours.layers} == {way}
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = eager(pixels), ours(pixels)
    pairs = [(found.last_hidden_state, expected.last_hidden_state)]
    if kind == "sam_hq":
        pairs += zip(found.intermediate_embeddings, expected.intermediate_embeddings, strict=True)
        assert len(pairs) == 2  # one global layer
    assert all(bases.rms(given, wanted) < 1e-4 for given, wanted in pairs)


def test_gradients_equal_sdpa(budget, kind):
    """In float64, where transformers' eager one still has its softmax in float32."""
    plain, ours = (make_encoder(kind, "sdpa").double() for _ in range(2))
    chunked.use_gsva_attention(ours)
    pixels = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    gradients = []
    for encoder in (plain, ours):
        encoder(pixels).last_hidden_state.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[1]["layers.1.attn.rel_pos_w"].abs().max() > 0.01


def test_half_precision_equals_sdpa(budget, kind):
    plain, ours = (make_encoder(kind, "sdpa").bfloat16() for _ in range(2))
    chunked.use_gsva_attention(ours)
    pixels = torch.randn(1, 3, 96, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted, found = plain(pixels).last_hidden_state, ours(pixels).last_hidden_state
    assert found.dtype == torch.bfloat16
    # the spread of the outputs is 1; bf16 keeps 8 bits
    torch.testing.assert_close(found, wanted, atol=2**-5, rtol=2**-5)


def test_attention_dropout_only_in_training(kind):
    ours = make_encoder(kind, "sdpa", attention_dropout=0.5)
    chunked.use_gsva_attention(ours)
    pixels = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours(pixels).last_hidden_state, ours(pixels).last_hidden_state)
        ours.train()
        assert not torch.equal(ours(pixels).last_hidden_state, ours(pixels).last_hidden_state)


@pytest.mark.parametrize("kind", MASK_ADAPTERS)
def test_every_mask_model_with_this_attention_has_ours(kind):
    """It is known by its position tables; a new mask model whose class is not in `GSVA_ATTENTION` fails here."""
    model = bases.make_gsva("llava", bases.mask_config(kind))
    with_tables = [module for module in model.sam.modules() if hasattr(module, "rel_pos_h")]
    assert all(isinstance(module, chunked.PositionBiasAttention) for module in with_tables)
    assert bool(with_tables) == (kind in KINDS)


def test_an_export_takes_transformers_attention(kind):
    """With any number of images, which the number of chunks would fix."""
    encoder = make_encoder(kind, "sdpa")
    chunked.use_gsva_attention(encoder)
    images = torch.export.Dim("images")
    program = torch.export.export(encoder, (torch.randn(2, 3, 96, 96),), dynamic_shapes={"pixel_values": {0: images}})
    pixels = torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        expected, found = encoder(pixels).last_hidden_state, program.module()(pixels).last_hidden_state
    assert bases.rms(found, expected) < 1e-5


def test_saved_and_loaded(kind, tmp_path):
    """The model has it from the start, saves transformers' own names, and has it again after loading."""
    _, _, eager_class, our_class = KINDS[kind]
    model = bases.make_gsva("llava", bases.mask_config(kind))
    assert all(type(layer.attn) is our_class for layer in model.sam.vision_encoder.layers)
    plain = AutoModel.from_config(model.config.sam_config)
    assert set(model.sam.state_dict()) == set(plain.state_dict())
    model.save_pretrained(tmp_path)
    loaded = GsvaForConditionalGeneration.from_pretrained(tmp_path)
    assert all(type(layer.attn) is our_class for layer in loaded.sam.vision_encoder.layers)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = (one.sam.vision_encoder(pixels).last_hidden_state for one in (model, loaded))
        assert torch.equal(found, expected)
        # as transformers' "sdpa" attention, ours has no weights to return
        assert model.sam.vision_encoder(pixels, output_attentions=True).attentions == plain_attentions(plain, pixels)

        eager = GsvaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
        assert all(type(layer.attn) is eager_class for layer in eager.sam.vision_encoder.layers)
        outputs = eager.sam.vision_encoder(pixels, output_attentions=True)
    # 16 patches; SAM's first layer has four windows of four patches for each of its two heads
    shapes = {"sam": [(8, 4, 4), (2, 16, 16)], "sam_hq": [(2, 16, 16)] * 4}[kind]
    assert [attention.shape for attention in outputs.attentions] == shapes
    torch.testing.assert_close(outputs.last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def plain_attentions(plain, pixels):
    return plain.vision_encoder(pixels, output_attentions=True).attentions
