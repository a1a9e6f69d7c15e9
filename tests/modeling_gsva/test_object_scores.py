"""SAM 2's object score: in every output, in results, and as a loss that is compared with one computed by hand."""

import math

import pytest
import tiny_bases as bases
import torch
from tiny_bases import IMAGE, REJ, SEG, make_gsva

from modeling_gsva import GsvaConfig
from modeling_gsva.losses_gsva import object_score_loss

SIZES = torch.tensor([[40, 50], [50, 30]])


@pytest.fixture(scope="module")
def model():
    return make_gsva("llava", bases.mask_config("sam2"))


@pytest.fixture(scope="module")
def inputs() -> dict:
    """Two conversations about an image each: `[SEG] [REJ] [SEG]` and `[REJ] [SEG]`."""
    words = [[1, *[IMAGE] * 16, 7, SEG, 8, REJ, 9, SEG, 2], [1, *[IMAGE] * 16, 7, REJ, 8, SEG, 2, 0, 0]]
    ids = torch.tensor(words)
    masks = [torch.zeros(3, 40, 50, dtype=torch.uint8), torch.zeros(2, 50, 30, dtype=torch.uint8)]
    masks[0][0, 5:20] = masks[0][2, :, 30:] = masks[1][1, 9] = 1  # the slots with a target: 0 and 2, 1
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    return {
        "input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100),
        "mask_labels": masks, "image_index": torch.arange(2), "original_sizes": SIZES, "reshaped_input_sizes": SIZES,
        "sam_pixel_values": pixels, **bases.make_images("llava"),
    }  # fmt: skip


def by_hand(model, inputs, outputs) -> float:
    """The mean over all five slots, each score from the decoder by itself."""
    total = 0.0
    hidden = model.language.run(
        **{k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values", "image_index")}
    )
    maps = model.get_sam_embeddings(inputs["sam_pixel_values"])
    flags = [[1, 0, 1], [0, 1]]
    for row, scores in enumerate(outputs.object_scores):
        places = [p for p, token in enumerate(inputs["input_ids"][row].tolist()) if token in (SEG, REJ)]
        for place, given, there in zip(places, scores.tolist(), flags[row], strict=True):
            state = hidden.last_hidden_state[row, place - 1 : place]
            score = float(model.masks.decode(model.mask_projector(state), maps, torch.tensor([row]))[2])
            assert score == pytest.approx(given, rel=1e-4, abs=1e-5)
            total += math.log(1 + math.exp(-score if there else score))
    return total / 5


@torch.no_grad()
def test_the_loss_equals_one_computed_by_hand(model, inputs):
    plain = model(**inputs)
    assert plain.object_score_loss is None
    assert [scores.isnan().tolist() for scores in plain.object_scores] == [[False, True, False], [True, False]]
    model.config.object_score_loss_weight = 0.5
    try:
        outputs = model(**inputs)
        expected = by_hand(model, inputs, outputs)
    finally:
        model.config.object_score_loss_weight = 0.0
    assert float(outputs.object_score_loss) == pytest.approx(0.5 * expected, rel=1e-5)
    parts = outputs.ce_loss + outputs.mask_bce_loss + outputs.mask_dice_loss + outputs.object_score_loss
    assert float(outputs.loss) == pytest.approx(float(parts), rel=1e-6)
    assert float(outputs.loss - outputs.object_score_loss) == pytest.approx(float(plain.loss), rel=1e-6)
    for masks, others in zip(outputs.mask_logits, plain.mask_logits):  # of [REJ] they stay constant zero
        torch.testing.assert_close(masks, others, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_head_of_the_object_score_and_the_states(inputs):
    model = make_gsva("llava", bases.mask_config("sam2")).train()
    model.sam.vision_encoder.requires_grad_(False)
    model.config.object_score_loss_weight = 1.0
    outputs = model(**inputs)
    outputs.object_score_loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for part in ("sam.mask_decoder.pred_obj_score_head.proj_out.weight", "sam.mask_decoder.obj_score_token.weight",
                 "mask_projector.0.weight", "vlm.model.language_model.layers.0.self_attn.q_proj.weight"):  # fmt: skip
        assert part in reached, part
    assert not any("output_hypernetworks_mlps" in name or "lm_head" in name for name in reached)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_every_parameter_of_the_decoder_gets_a_gradient(inputs, weight):
    """Distributed training waits for each."""
    model = make_gsva("llava", bases.mask_config("sam2")).train()
    model.sam.vision_encoder.requires_grad_(False)
    model.config.object_score_loss_weight = weight
    for ids in (inputs["input_ids"], inputs["input_ids"].masked_fill(inputs["input_ids"] == SEG, 11)):
        model.zero_grad()
        slots = [int(((row == SEG) | (row == REJ)).sum()) for row in ids]
        masks = [mask[:count] for mask, count in zip(inputs["mask_labels"], slots)]
        model(**{**inputs, "input_ids": ids, "mask_labels": masks}).loss.backward()
        without = {name for name, p in model.sam.mask_decoder.named_parameters() if p.grad is None}
        # The last layers of an image's maps, where no slot uses the image.
        assert all(name.startswith(("conv_s0", "conv_s1")) for name in without)


def test_micro_batches_add_up_to_the_whole_batch(model, inputs):
    model.config.object_score_loss_weight = 1.0
    try:
        with torch.no_grad():
            whole = model(**inputs).object_score_loss
            parts = []
            for row in range(2):
                one = {name: value[row : row + 1] for name, value in inputs.items()}
                one["image_index"] = torch.zeros(1, dtype=torch.long)
                parts.append(model(**one, num_masks_in_batch=5, num_slots_in_batch=5).object_score_loss)
    finally:
        model.config.object_score_loss_weight = 0.0
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)


def test_slots_that_truncation_cut_off_count_as_scores_of_zero():
    config = GsvaConfig(sam_config=bases.mask_config("sam2"), object_score_loss_weight=2.0)
    masks = [torch.ones(2, 4, 4, dtype=torch.uint8), torch.zeros(0, 4, 4, dtype=torch.uint8)]
    scores = (torch.tensor([3.0]), torch.zeros(0))
    expected = 2 * (math.log(1 + math.exp(-3)) + math.log(2)) / 2
    assert float(object_score_loss(config, scores, masks)) == pytest.approx(expected, rel=1e-6)
    assert float(object_score_loss(config, (torch.zeros(0),) * 2, [masks[1]] * 2)) == 0.0


@pytest.mark.parametrize("kind", ["sam", "sam_hq"])
def test_a_weight_without_an_object_score_is_refused(kind):
    message = (
        f"object_score_loss_weight=0.1, but a mask model of type '{kind}' has no object score.*sam2, sam3_tracker"
    )
    with pytest.raises(ValueError, match=message):
        GsvaConfig(sam_config=bases.mask_config(kind), object_score_loss_weight=0.1)
    with pytest.raises(ValueError, match="object_score_loss_weight=-1.0 is no weight; give 0 or a positive number"):
        GsvaConfig(sam_config=bases.mask_config("sam2"), object_score_loss_weight=-1.0)
    assert GsvaConfig(sam_config=bases.mask_config(kind)).object_score_loss_weight == 0


@pytest.mark.parametrize("method", ["slots", "teacher_forced"])
def test_segmentation_outputs_hold_it(model, inputs, method):
    prompts = {name: inputs[name] for name in ("sam_pixel_values", "image_index", "pixel_values")}
    ids = inputs["input_ids"]
    asked = {"input_ids": ids[:, :18], "answer_ids": torch.stack([ids[0, 18:22], ids[1, 18:22]])}
    outputs = model.segment(**prompts, **asked, method=method)
    for masks, objects, rejected in zip(outputs.mask_logits, outputs.object_scores, outputs.is_rejected, strict=True):
        assert objects.shape == rejected.shape == masks.shape[:1]
        assert torch.equal(objects.isnan(), rejected & (method == "slots"))
    sam = make_gsva("llava").segment(**prompts, **asked, method=method)
    assert sam.object_scores is None and sam.iou_scores is not None


@torch.no_grad()
def test_results_show_it_beside_the_score(make_model, processor, make_picture):
    asked = processor(images=[make_picture()], expressions=[["red dog", "a cat"]], return_tensors="pt")
    outputs = make_model().segment(**asked, threshold=-1e4)
    (plain,) = processor.post_process_segmentation(outputs, asked)
    assert all("object_score" not in entry for entry in plain)
    outputs.object_scores = (torch.tensor([1.5, float("nan")]),)
    (shown,) = processor.post_process_segmentation(outputs, asked)
    assert shown[0]["object_score"] == 1.5 and math.isnan(shown[1]["object_score"])
    assert [entry["score"] for entry in shown] == [entry["score"] for entry in plain]
