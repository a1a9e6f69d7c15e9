"""GSVA with each mask model of the SAM family against the library's own forward pass with the same prompt embedding."""

import json

import pytest
import tiny_bases as bases
import torch
from peft import LoraConfig, get_peft_model
from tiny_bases import IMAGE, INDEX, REJ, SEG, conversation, images_in, make_gsva, padded_rows, rms
from transformers import AutoConfig, AutoModel

from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration
from modeling_gsva.masks_gsva import mask_adapter_class, mask_config_of

SLOTS = torch.tensor([1, 0, 1, 1, 0])  # the image of each slot
PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


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


def test_sam_2_shows_the_mask_that_is_trained(model, kind, tmp_path):
    """With `dynamic_multimask_via_stability` evaluation would show masks of tokens that training never touches."""
    model.sam.save_pretrained(tmp_path)  # whoever loads this part alone gets the same masks
    for sam in (model.sam, AutoModel.from_pretrained(tmp_path)):
        shown = getattr(sam.mask_decoder, "dynamic_multimask_via_stability", False)
        written = getattr(sam.config.mask_decoder_config, "dynamic_multimask_via_stability", False)
        assert shown is written is False
    assert not model.config.to_dict()["sam_config"]["mask_decoder_config"].get("dynamic_multimask_via_stability")


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


@pytest.mark.parametrize("place", [{"": "disk"}, {"vlm": "cpu", "sam": "disk", "mask_projector": "disk"}])
def test_offloaded_weights_give_the_same_masks(model, inputs, place, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    placed = GsvaForConditionalGeneration.from_pretrained(
        tmp_path / "saved", device_map=place, offload_folder=tmp_path / "offload"
    )
    meta = {name for name, parameter in placed.named_parameters() if parameter.device.type == "meta"}
    assert any(name.startswith("sam.") for name in meta)
    outputs, expected = (m.segment(**inputs, threshold=-1e4) for m in (placed, model))
    for given, truth in zip(outputs.mask_logits, expected.mask_logits):
        assert rms(given, truth) < 1e-6
    assert all(placed.get_parameter(name).device.type == "meta" for name in meta)  # and are gone again


def test_a_decoder_that_peft_trains_in_full(kind, inputs):
    """peft wraps it (ModulesToSave), and holds a copy of the same class."""
    model = make_gsva("llava", bases.mask_config(kind))
    expected = model.segment(**inputs, threshold=-1e4)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mask_decoder"]))
    assert "ModulesToSave" in type(model.sam.mask_decoder).__name__
    for given, truth in zip(model.segment(**inputs, threshold=-1e4).mask_logits, expected.mask_logits):
        assert torch.equal(given, truth)
    trained = {name for name, p in peft.named_parameters() if p.requires_grad and "mask_decoder" in name}
    assert len(trained) == len(list(model.sam.mask_decoder.original_module.parameters()))


def test_what_the_maps_depend_on_is_trained_when_it_is_not_frozen(kind, pixels):
    """Also the last layers of SAM 2's maps, which are part of its decoder, behind a frozen encoder."""
    model = make_gsva("llava", bases.mask_config(kind))
    parts = model.masks.encoding_parts()
    assert "vision_encoder" in parts and len(parts) == (4 if model.masks.has_objects else 1)
    for frozen in (False, True):
        model.zero_grad()
        model.sam.vision_encoder.requires_grad_(not frozen)
        maps = model.get_sam_embeddings(pixels)
        maps = [maps] if isinstance(maps, torch.Tensor) else maps
        reached = [part for part in maps if part.requires_grad]
        assert bool(reached) == (not frozen or model.masks.has_objects)
        if reached:
            sum(part.sin().sum() for part in reached).backward()
        for name, part in parts.items():
            parameters = [part] if isinstance(part, torch.nn.Parameter) else list(part.parameters())
            unused = kind == "sam3_tracker" and name == "no_memory_embedding"
            expected = not unused and not (frozen and name == "vision_encoder")
            assert any(p.grad is not None for p in parameters) == expected


def test_the_decoder_of_sam_2_compiles_whole():
    model = make_gsva("llava", bases.mask_config("sam2"))
    states, pixels = torch.randn(len(SLOTS), 32), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = model.get_sam_embeddings(pixels)
        expected = model.decode_masks(states, maps, SLOTS)
        torch._dynamo.reset()
        model.sam.mask_decoder.compile(fullgraph=True, backend="eager")
        given = model.decode_masks(states, maps, SLOTS)
        assert not torch._dynamo.utils.counters["graph_break"]
        torch._dynamo.reset()
    for value, truth in zip(given, expected):
        assert rms(value, truth) < 1e-5


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
    with pytest.raises(
        ValueError, match=f"type '{kind}' cannot be prompted by GSVA; take one of sam, sam_hq, sam2, sam3_tracker"
    ):
        mask_adapter_class(kind)


@pytest.mark.parametrize("kind", bases.MASK_MODELS)
def test_the_configuration_of_a_mask_model_is_read(kind):
    expected = AutoConfig.for_model(**bases.mask_config(kind))
    if kind in ("sam2", "sam3_tracker"):
        expected.mask_decoder_config.dynamic_multimask_via_stability = False
    assert mask_config_of(bases.mask_config(kind)).to_dict() == expected.to_dict()
    assert mask_config_of(AutoConfig.for_model(**bases.mask_config(kind))).to_dict() == expected.to_dict()


@pytest.mark.parametrize("kind, single", [("sam2", "sam2_video"), ("sam3_tracker", "sam3_tracker_video")])
def test_configurations_of_models_for_videos_are_read_as_those_for_images(kind, single):
    """facebook/sam2.1-* say sam2_video, facebook/sam3 holds its tracker in sam3_video."""
    parts = {name: part for name, part in bases.mask_config(kind).items() if name in PARTS}
    for name in PARTS[1:]:
        parts[name]["model_type"] = parts[name]["model_type"].replace(kind, single)
    for_videos = AutoConfig.for_model(single, **parts, num_maskmem=3, image_size=bases.SIDES[kind])
    assert for_videos.to_dict()["memory_attention_num_layers"] == 4
    given = [for_videos, json.loads(for_videos.to_json_string(use_diff=False))]
    if kind == "sam3_tracker":
        given.append(
            {"model_type": "sam3_video", "detector_config": {"model_type": "sam3"}, "tracker_config": given[1]}
        )
    for config in given:
        found = mask_config_of(config)
        assert found.model_type == kind and "memory_attention_num_layers" not in found.to_dict()
        for name in PARTS:
            left, right = (getattr(c, name).to_dict() for c in (found, mask_config_of(bases.mask_config(kind))))
            assert left == right


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"model_type": "sam3", "text_config": {}},
            "'sam3' cannot be .*detector, which finds objects by words; give a dir",
        ),
        ({"model_type": "sam3_lite_text"}, "'sam3_lite_text' cannot be .*detector"),
        ({"model_type": "edgetam_video"}, "'edgetam_video' cannot be .*give facebook/sam2.1-hiera-tiny"),
        (
            {"model_type": "efficient_sam"},
            "'efficient_sam' cannot be .*no such model; give facebook/sam2.1-hiera-tiny",
        ),
        ({"model_type": "llama"}, "'llama' cannot be prompted by GSVA; take one of sam, sam_hq, sam2, sam3_tracker.$"),
        ({"hidden_size": 4}, r"names no model_type .its fields are \['hidden_size'\].; give a directory"),
        ({"model_type": "sam2_video", "vision_config": 7}, "does not describe a mask model of type 'sam2_video' "),
        (
            {"model_type": "sam2", "mask_decoder_config": {"hidden_size": "x"}},
            "does not describe .*'sam2' .*hidden_size",
        ),
        ({"model_type": "sam3_video", "tracker_config": [7]}, r"tracker_config of sam3_video is \[7\]"),
    ],
)
def test_configurations_that_do_not_do_are_refused(config, message):
    with pytest.raises(ValueError, match=message.replace("\n", " ")):
        mask_config_of(config)


def test_bases_that_lack_the_contract_are_refused_by_name():
    from transformers import AutoModelForCausalLM

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
