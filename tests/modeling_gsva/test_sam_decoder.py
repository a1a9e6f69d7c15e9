"""SAM's mask decoder with shared images against transformers' own."""

import copy

import pytest
import torch
from transformers import SamConfig, SamModel

import modeling_gsva.sam_decoder_gsva as shared

IMAGES, SLOTS = 3, [2, 0, 2, 2, 1]  # slots by image, in no order, one image with a single one
MAP = 6 * 5 * 32 * 8  # bytes of a slot's map below, in float64


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
    monkeypatch.setitem(shared.MAP_BYTES, "cpu", step * MAP)
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


@pytest.mark.parametrize(
    ("side", "channels", "dtype", "device", "slots"),
    [
        (64, 256, torch.float32, "cpu", 1),  # SAM's own
        (64, 256, torch.bfloat16, "cpu", 2),
        (8, 64, torch.float32, "cpu", 256),  # assets/tiny_gsva: more than a batch of 192 has
        (128, 256, torch.float32, "cpu", 1),  # larger than the budget: one all the same
        (64, 256, torch.float32, "meta", 64),  # any other device
        (64, 256, torch.bfloat16, "meta", 128),
    ],
)
def test_the_bytes_of_their_maps_decide_how_many_slots_are_decoded_at_a_time(side, channels, dtype, device, slots):
    pixels = torch.empty(3, side * side, channels, dtype=dtype, device=device)
    assert shared.slots_at_a_time(pixels) == slots


def test_pieces_are_as_large_as_the_budget_allows(inputs, monkeypatch):
    """Seven slots at two at a time and a half: three pieces of two, and one."""
    widths, sam = [], make_sam()
    shared.share_images(sam)
    decode = shared.SharedImageMaskDecoder._decode
    monkeypatch.setattr(
        shared.SharedImageMaskDecoder,
        "_decode",
        lambda self, tokens, *rest: widths.append(len(tokens)) or decode(self, tokens, *rest),
    )
    monkeypatch.setitem(shared.MAP_BYTES, "cpu", 5 * MAP // 2)
    embeddings, positions, prompts, no_mask = inputs
    prompts, images = prompts[[0, 1, 2, 3, 4, 0, 1]], torch.tensor([*SLOTS, 0, 1])
    masks, _ = sam.mask_decoder(embeddings, positions, prompts, no_mask, False, images)
    assert widths == [2, 2, 2, 1] and len(masks) == 7


def test_gradients_equal(inputs, monkeypatch):
    """Of every parameter and of the image, which several slots share."""
    monkeypatch.setitem(shared.MAP_BYTES, "cpu", 2 * MAP)
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
