"""GSVA with each mask model of the SAM family against the library's own forward pass with the same prompt embedding."""

import pytest
import tiny_bases as bases
import torch
from tiny_bases import IMAGE, INDEX, REJ, SEG, conversation, images_in, make_gsva, padded_rows, rms

from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration

SLOTS = torch.tensor([1, 0, 1, 1, 0])  # the image of each slot


@pytest.fixture(scope="module", params=bases.MASK_MODELS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind) -> GsvaForConditionalGeneration:
    return make_gsva("llava", bases.mask_config(kind))


@pytest.fixture(scope="module")
def pixels(kind) -> torch.Tensor:
    side = bases.SIDES[kind]
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(4))


def librarys_own(model, pixels, prompts, image, monkeypatch):
    """The mask model's forward pass over one image, its prompt encoder giving our embeddings in place of a point's."""
    sam, own = model.sam, prompts[SLOTS == image]
    dense = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    size = model.masks.encode(pixels)
    size = (size if isinstance(size, torch.Tensor) else size[0]).shape[-2:]
    given = own[None, :, None], dense.expand(1, -1, *size)
    monkeypatch.setattr(sam.prompt_encoder, "forward", lambda *args, **kwargs: given)
    points = torch.zeros(1, len(own), 1, 2)
    outputs = sam(pixel_values=pixels[image : image + 1], input_points=points, multimask_output=False)
    monkeypatch.undo()
    return outputs


@torch.no_grad()
def test_masks_equal_the_librarys_own(model, kind, pixels, monkeypatch):
    prompts = torch.randn(len(SLOTS), 32, generator=torch.Generator().manual_seed(5))
    maps = model.get_sam_embeddings(pixels)
    masks, iou, objects = model.masks.decode(prompts, maps, SLOTS)
    assert (objects is not None) == (kind in ("sam2", "sam3_tracker"))
    for image in range(2):
        expected = librarys_own(model, pixels, prompts, image, monkeypatch)
        assert rms(masks[SLOTS == image], expected.pred_masks[0, :, 0]) < 5e-5
        assert rms(iou[SLOTS == image], expected.iou_scores[0, :, 0]) < 5e-5
        if objects is not None:
            assert rms(objects[SLOTS == image], expected.object_score_logits[0, :, 0]) < 5e-5
    assert rms(masks[0], masks[1]) > 0.01  # images and prompts matter


@torch.no_grad()
def test_maps_equal_the_librarys_own(model, kind, pixels):
    expected = model.sam.get_image_embeddings(pixels)
    maps = model.get_sam_embeddings(pixels)
    if kind == "sam":
        assert rms(maps, expected) < 1e-5
    elif kind == "sam_hq":
        assert rms(maps[0], expected[0]) < 1e-5 and len(maps) == 5
        for given, block in zip(maps[1:], expected[1], strict=True):
            assert rms(given.permute(0, 2, 3, 1), block) < 1e-5
    else:
        assert [part.shape[-1] for part in maps] == [4, 8, 16]  # the library gives the highest resolution first
        for given, part in zip(maps, expected[::-1], strict=True):
            assert rms(given, part) < 1e-5
    empty = model.masks.empty(torch.zeros(1))
    shapes = [part.shape[1:] for part in ([maps] if kind == "sam" else maps)]
    assert [part.shape[1:] for part in ([empty] if kind == "sam" else empty)] == shapes


def test_sam_2_shows_the_mask_that_is_trained(model, kind):
    """With `dynamic_multimask_via_stability` evaluation would show masks of tokens that training never touches."""
    if kind in ("sam2", "sam3_tracker"):
        assert model.sam.mask_decoder.dynamic_multimask_via_stability is False


@pytest.fixture(scope="module")
def inputs(model, pixels) -> dict:
    images, generator = bases.make_images("llava"), torch.Generator().manual_seed(3)

    def words(number: int) -> list[int]:
        return torch.randint(5, 280, (number,), generator=generator).tolist()

    prompts = [[1, *words(3), *[IMAGE] * 16, *words(4 + row)] for row in range(3)]
    ids, mask = padded_rows(prompts, left=True)
    answers, answer_mask = padded_rows([[*words(2), SEG, 9, REJ, 2] for _ in range(3)], left=False)
    return {
        "input_ids": ids, "attention_mask": mask, "answer_ids": answers, "answer_attention_mask": answer_mask,
        "image_index": torch.tensor(INDEX), "sam_pixel_values": pixels, **images,
    }  # fmt: skip


def test_segment_saved_and_loaded(model, inputs, tmp_path):
    outputs = model.segment(**inputs, threshold=-1e4)
    model.save_pretrained(tmp_path)
    again = GsvaForConditionalGeneration.from_pretrained(tmp_path)
    for masks, loaded in zip(outputs.mask_logits, again.segment(**inputs, threshold=-1e4).mask_logits):
        assert masks.shape[0] == 2 and masks.abs().max() > 0
        assert torch.equal(masks, loaded)
    for row, image in enumerate(INDEX):
        tokens, begin = conversation(inputs, row)
        alone = {
            "input_ids": tokens[None, :begin], "answer_ids": tokens[None, begin:], "image_index": torch.tensor([0]),
            "sam_pixel_values": inputs["sam_pixel_values"][image : image + 1],
            **bases.images_of(images_in(inputs), [image]),
        }  # fmt: skip
        assert rms(model.segment(**alone, threshold=-1e4).mask_logits[0], outputs.mask_logits[row]) < 1e-4


@pytest.mark.parametrize("masked", [True, False])
def test_training_reaches_the_mask_decoder_in_every_batch(kind, inputs, masked):
    model = make_gsva("llava", bases.mask_config(kind)).train()
    model.sam.vision_encoder.requires_grad_(False)
    ids = torch.cat([inputs["input_ids"], inputs["answer_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], inputs["answer_attention_mask"]], 1)
    if not masked:
        ids = ids.masked_fill(ids == SEG, 11).masked_fill(ids == REJ, 12)
    sizes = torch.tensor([[40, 50], [50, 30]])
    truths = [torch.ones(2 if masked else 0, *sizes[image], dtype=torch.uint8) for image in INDEX]
    outputs = model(
        input_ids=ids, attention_mask=mask, labels=ids, image_index=inputs["image_index"], mask_labels=truths,
        sam_pixel_values=inputs["sam_pixel_values"], original_sizes=sizes, reshaped_input_sizes=sizes,
        **images_in(inputs),
    )  # fmt: skip
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.sam.mask_decoder.named_parameters() if "transformer" in name}
    assert all(gradient is not None for gradient in gradients.values())
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values()) == masked


@pytest.mark.parametrize("kind", ["sam2_video", "edgetam", "clip"])
def test_other_mask_models_are_refused_by_name(kind):
    from modeling_gsva.masks_gsva import mask_adapter_class

    with pytest.raises(
        ValueError, match=f"type '{kind}' cannot be prompted by GSVA; take one of sam, sam_hq, sam2, sam3_tracker"
    ):
        mask_adapter_class(kind)


def test_bases_that_lack_the_contract_are_refused_by_name():
    from transformers import AutoConfig, AutoModelForCausalLM

    from modeling_gsva.language_gsva import LanguageAdapter

    text = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **bases.TEXT))
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM.*it lacks get_image_features, mm_encoder_outputs, config.image_token_id"
    ):
        LanguageAdapter(text)


def test_a_config_of_before_is_read():
    """With the fields of LLaVA v1 in place of `vlm_config`."""
    fields = {
        "text_config": {"model_type": "llama", **bases.TEXT},
        "vision_config": {"model_type": "clip_vision_model", **bases.TOWER},
    }
    ids = {"image_token_id": 320, "seg_token_id": SEG, "rej_token_id": REJ, "vision_feature_layer": -1}
    config = GsvaConfig(**fields, **ids, sam_config=bases.mask_config("sam"), tie_word_embeddings=True)
    assert config.vlm_config.model_type == "gsva_llava_v1" and config.vlm_config.image_token_id == 320
    assert config.vlm_config.vision_feature_layer == config.vision_feature_layer == -1
    assert config.tie_word_embeddings and config.text_config.hidden_size == 32 and config.image_seq_length == 16
    again = GsvaConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_a_plain_bases_directory_asks_for_a_configuration(tmp_path):
    bases.make_base("llava").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'llava', not a GSVA. To start from it, pass config="):
        GsvaForConditionalGeneration.from_pretrained(tmp_path)
