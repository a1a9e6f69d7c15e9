"""SAM's attention in chunks against transformers' eager and sdpa attention."""

import pytest
import torch
from transformers import AutoModel, SamConfig
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionEncoder

import modeling_gsva.sam_attention_gsva as chunked


def make_encoder(implementation, **options):
    """Windows of 5 that do not divide 12 patches, one global layer; position tables that matter."""
    config = SamConfig(
        vision_config={
            "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "global_attn_indexes": [1],
            "mlp_dim": 48, "image_size": 96, "patch_size": 8, "window_size": 5, "output_channels": 16, **options,
        }
    ).vision_config  # fmt: skip
    config._attn_implementation = implementation
    torch.manual_seed(0)
    encoder = SamVisionEncoder(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.fixture(params=[1, 700, 10_000, 2**20], ids=lambda n: f"{n} elements")
def budget(request, monkeypatch):
    """From one row of one head at a time to everything at once; 700 splits the rows, 10 000 the windows unevenly."""
    monkeypatch.setitem(chunked.BIAS_ELEMENTS, "cpu", request.param)


@pytest.mark.parametrize("options", [{}, {"use_rel_pos": False}, {"qkv_bias": False}], ids=str)
def test_equals_eager(budget, options):
    eager, ours = make_encoder("eager", **options), make_encoder("sdpa", **options)
    chunked.use_gsva_attention(ours)
    assert all(type(layer.attn) is chunked.GsvaSamVisionAttention for layer in ours.layers)
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(pixels).last_hidden_state, eager(pixels).last_hidden_state, atol=1e-5, rtol=1e-5
        )


def test_gradients_equal_sdpa(budget):
    """In float64, where transformers' eager one still has its softmax in float32."""
    plain, ours = (make_encoder("sdpa").double() for _ in range(2))
    chunked.use_gsva_attention(ours)
    pixels = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    gradients = []
    for encoder in (plain, ours):
        encoder(pixels).last_hidden_state.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[1]["layers.1.attn.rel_pos_w"].abs().max() > 0.01


def test_half_precision_equals_sdpa(budget):
    plain, ours = (make_encoder("sdpa").bfloat16() for _ in range(2))
    chunked.use_gsva_attention(ours)
    pixels = torch.randn(1, 3, 96, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted, found = plain(pixels).last_hidden_state, ours(pixels).last_hidden_state
    assert found.dtype == torch.bfloat16
    # the spread of the outputs is 1; bf16 keeps 8 bits
    torch.testing.assert_close(found, wanted, atol=2**-5, rtol=2**-5)


def test_attention_dropout_only_in_training():
    ours = make_encoder("sdpa", attention_dropout=0.5)
    chunked.use_gsva_attention(ours)
    pixels = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours(pixels).last_hidden_state, ours(pixels).last_hidden_state)
        ours.train()
        assert not torch.equal(ours(pixels).last_hidden_state, ours(pixels).last_hidden_state)


def test_saved_and_loaded(model, tmp_path):
    """The model has it from the start, saves transformers' own names, and has it again after loading."""
    from modeling_gsva import GsvaForConditionalGeneration

    assert type(model.sam.vision_encoder.layers[0].attn) is chunked.GsvaSamVisionAttention
    plain = AutoModel.from_config(model.config.sam_config)
    assert set(model.sam.state_dict()) == set(plain.state_dict())
    model.save_pretrained(tmp_path)
    loaded = GsvaForConditionalGeneration.from_pretrained(tmp_path)
    assert all(type(layer.attn) is chunked.GsvaSamVisionAttention for layer in loaded.sam.vision_encoder.layers)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.get_sam_embeddings(pixels), loaded.get_sam_embeddings(pixels))

    eager = GsvaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    assert all(type(layer.attn) is SamVisionAttention for layer in eager.sam.vision_encoder.layers)
    outputs = eager.sam.vision_encoder(pixels, output_attentions=True)
    assert [attention.shape for attention in outputs.attentions] == [(2, 64, 64)] * 2  # (heads, patches, patches)
    torch.testing.assert_close(outputs.last_hidden_state, model.get_sam_embeddings(pixels), atol=1e-5, rtol=1e-5)
