"""SAM's mask decoder with shared images against transformers' own."""

import copy

import pytest
import torch
from transformers import SamConfig, SamModel

import modeling_gsva.sam_decoder_gsva as shared

IMAGES, SLOTS = 3, [2, 0, 2, 2, 1]  # slots by image, in no order, one image with a single one


def make_sam() -> SamModel:
    config = SamConfig(
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "global_attn_indexes": [0], "mlp_dim": 16,
            "image_size": 48, "patch_size": 8, "output_channels": 32, "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 48, "patch_size": 8},
        mask_decoder_config={
            "hidden_size": 32, "mlp_dim": 24, "num_attention_heads": 4, "iou_head_hidden_dim": 20, "num_hidden_layers": 3,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    sam = SamModel(config).eval().double()
    for parameter in sam.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return sam


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    embeddings = torch.randn(IMAGES, 32, 6, 5, dtype=torch.float64)  # rows and columns must not be mixed up
    return (
        embeddings,
        torch.randn(1, 32, 6, 5).double(),
        torch.randn(len(SLOTS), 2, 32).double(),
        torch.randn(1, 32, 1, 1).double(),
    )


def of_transformers(sam, embeddings, positions, prompts, no_mask, multimask):
    rows = torch.tensor(SLOTS)
    masks, iou = sam.mask_decoder(
        embeddings[rows], positions.expand(len(rows), -1, -1, -1), prompts[:, None], no_mask, multimask
    )
    return masks[:, 0], iou[:, 0]


@pytest.mark.parametrize("step", [1, 2, 64])
@pytest.mark.parametrize("multimask", [False, True])
def test_equals_transformers(inputs, monkeypatch, step, multimask):
    monkeypatch.setitem(shared.SLOTS_AT_A_TIME, "cpu", step)
    plain = make_sam()
    ours = copy.deepcopy(plain)
    shared.share_images(ours)
    assert type(ours.mask_decoder) is shared.SharedImageMaskDecoder
    wanted = of_transformers(plain, *inputs, multimask)
    found = ours.mask_decoder(*inputs, multimask, torch.tensor(SLOTS))
    assert found[0].shape == (len(SLOTS), 3 if multimask else 1, 24, 20)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    again = of_transformers(ours, *inputs, multimask)  # without slot_images it is transformers' class
    torch.testing.assert_close(again, wanted, atol=0, rtol=0)


def test_gradients_equal(inputs, monkeypatch):
    """Of every parameter and of the image, which several slots share."""
    monkeypatch.setitem(shared.SLOTS_AT_A_TIME, "cpu", 2)
    gradients = []
    for kind in ("plain", "ours"):
        sam, (embeddings, *others) = make_sam(), inputs
        embeddings = embeddings.clone().requires_grad_()
        if kind == "plain":
            masks, iou = of_transformers(sam, embeddings, *others, False)
        else:
            shared.share_images(sam)
            masks, iou = sam.mask_decoder(embeddings, *others, False, torch.tensor(SLOTS))
        (masks.sin().sum() + iou.square().sum()).backward()
        named = sam.mask_decoder.named_parameters()
        gradients.append({name: parameter.grad for name, parameter in named} | {"image": embeddings.grad})
    assert all(gradient is not None for gradient in gradients[1].values()), "distributed training waits for each"
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-8, rtol=1e-8)
