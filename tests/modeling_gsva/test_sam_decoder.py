"""The mask decoders with shared images against transformers' own: SAM's, SAM 2's and that of SAM 3's tracker."""

import copy

import pytest
import torch
from tiny_bases import mask_config
from transformers import AutoConfig, AutoModel, SamConfig, SamModel

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


@pytest.fixture(params=["sam2", "sam3_tracker"])
def sam2(request):
    """The mask model of SAM 2 or SAM 3, random."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(**mask_config(request.param))).eval().double()
    for parameter in model.mask_decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.mask_decoder.dynamic_multimask_via_stability = False
    return model


@pytest.fixture
def finer():
    """Maps of twice and four times the resolution; the highest first."""
    torch.manual_seed(2)
    return [torch.randn(IMAGES, 4, 24, 20).double(), torch.randn(IMAGES, 8, 12, 10).double()]


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


# ---- SAM 2 and SAM 3 ---------------------------------------------------------------------------------------------------
def of_transformers_sam2(sam, inputs, finer, multimask):
    (embeddings, positions, prompts, no_mask), rows = inputs, torch.tensor(SLOTS)
    places = positions.expand(len(rows), -1, -1, -1)
    maps = [part[rows] for part in finer]
    masks, iou, _, objects = sam.mask_decoder(embeddings[rows], places, prompts[:, None], no_mask, multimask, maps)
    return masks[:, 0], iou[:, 0], objects[:, 0]


@pytest.mark.parametrize("step", [1, 2, 64])
@pytest.mark.parametrize("multimask", [False, True])
def test_sam_2s_equals_transformers(sam2, inputs, finer, monkeypatch, step, multimask):
    monkeypatch.setitem(shared.MAP_BYTES, "cpu", step * MAP)
    ours = copy.deepcopy(sam2)
    shared.share_images(ours)
    assert isinstance(ours.mask_decoder, shared.SharedImages) and isinstance(
        ours.mask_decoder, type(sam2.mask_decoder)
    )
    wanted = of_transformers_sam2(sam2, inputs, finer, multimask)
    found = ours.mask_decoder(*inputs, multimask, finer, torch.tensor(SLOTS))
    assert found[0].shape == (len(SLOTS), 3 if multimask else 1, 24, 20) and found[2].shape == (len(SLOTS), 1)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    again = of_transformers_sam2(ours, inputs, finer, multimask)  # without slot_images it is transformers' class
    torch.testing.assert_close(again, wanted, atol=0, rtol=0)


@torch.no_grad()
def test_sam_2s_is_within_1e_5_in_single_precision(sam2, inputs, finer):
    sam2 = sam2.float()
    inputs, finer = tuple(value.float() for value in inputs), [value.float() for value in finer]
    wanted = of_transformers_sam2(sam2, inputs, finer, False)
    shared.share_images(sam2)
    for given, truth in zip(sam2.mask_decoder(*inputs, False, finer, torch.tensor(SLOTS)), wanted, strict=True):
        assert float((given - truth).abs().max() / truth.abs().max()) < 1e-5


def test_sam_2s_gradients_equal(sam2, inputs, finer, monkeypatch):
    """Of every parameter and of all maps, which several slots share."""
    monkeypatch.setitem(shared.MAP_BYTES, "cpu", 2 * MAP)
    gradients = []
    for kind in ("plain", "ours"):
        sam, maps = copy.deepcopy(sam2), [value.clone().requires_grad_() for value in (inputs[0], *finer)]
        given = (maps[0], *inputs[1:])
        if kind == "plain":
            masks, iou, objects = of_transformers_sam2(sam, given, maps[1:], False)
        else:
            shared.share_images(sam)
            masks, iou, objects = sam.mask_decoder(*given, False, maps[1:], torch.tensor(SLOTS))
        (masks.sin().sum() + iou.square().sum() + objects.sin().sum()).backward()
        named = {name: parameter.grad for name, parameter in sam.mask_decoder.named_parameters()}
        gradients.append(named | {f"map {number}": part.grad for number, part in enumerate(maps)})
    # conv_s0 and conv_s1 belong to the maps of an image, of which they are the last layers.
    without = {name for name, gradient in gradients[1].items() if gradient is None}
    assert without == {f"{name}.{kind}" for name in ("conv_s0", "conv_s1") for kind in ("weight", "bias")}
    for name in gradients[0].keys() - without:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("side", [4, 6])
def test_finer_maps_are_laid_out_as_transposed_convolutions_do(side):
    """A map that is a number per pixel, against two convolutions that copy each pixel."""
    size, count = (side, 3), side * 3
    numbers = torch.arange(count * 16.0).reshape(1, 1, 4 * side, 12)
    laid = shared._laid_out(numbers, size)
    assert laid.shape == (1, count, 16, 1)
    masks = laid.unflatten(2, (2, 2, 2, 2)).reshape(1, *size, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
    assert torch.equal(masks.reshape(1, 1, 4 * side, 12), numbers)
