"""peft's adapters where weights could be read without calling their module: embeddings, single tokens, SAM's mask decoder."""

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model

ATTENTION = r".*language_model\.layers\.\d+\.self_attn\.q_proj"


@pytest.fixture
def batch(processor, make_picture):
    masks = torch.zeros(2, 30, 40)
    masks[0, :10, :20] = 1
    talk = [
        {"role": "user", "content": "<image>\nred and blue?"},
        {"role": "assistant", "content": "Sure,red:[SEG], blue:[REJ]."},
    ]
    return processor(images=[make_picture()], conversations=[talk], masks=[masks], return_tensors="pt")


@pytest.fixture
def questions(processor, make_picture):
    return processor([make_picture()], expressions=[["red dog", "a cat"]], return_tensors="pt")


def train(adapted, batch, steps=3):
    """Take a few steps; return the names of the trained weights that did not move."""
    adapted.train()
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    before = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    for _ in range(steps):
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    return [name for name, value in trained.items() if torch.equal(value, before[name])]


def outputs_of(model, questions):
    outputs = model.segment(**questions)
    return torch.cat([*outputs.scores, *(masks.flatten() for masks in outputs.mask_logits)])


def slot_ids(processor):
    return [processor.seg_token_id, processor.rej_token_id]


ADAPTERS = {
    "LoRA on the embedding": lambda ids: LoraConfig(r=2, target_modules=r".*language_model\..*(q_proj|embed_tokens)"),
    "LoRA on embedding and head": lambda ids: LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]),
    "rows of the embedding": lambda ids: LoraConfig(
        r=2, target_modules=ATTENTION, trainable_token_indices={"embed_tokens": ids}
    ),
    "rows of embedding and head": lambda ids: LoraConfig(
        r=2, target_modules=ATTENTION, trainable_token_indices={"embed_tokens": ids, "lm_head": ids}
    ),
    "rows alone": lambda ids: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=ids),
    "the whole embedding": lambda ids: LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=["embed_tokens"]),
    "LoRA on SAM's tokens": lambda ids: LoraConfig(r=2, target_modules=["iou_token", "mask_tokens", "no_mask_embed"]),
    "rows of SAM's mask tokens": lambda ids: LoraConfig(
        r=2, target_modules=ATTENTION, trainable_token_indices={"mask_tokens": [0]}
    ),
    "SAM's norms": lambda ids: LNTuningConfig(target_modules=["upscale_layer_norm"]),
    "SAM's convolutions in full": lambda ids: LoraConfig(
        r=2, target_modules=ATTENTION, modules_to_save=["upscale_conv1", "upscale_conv2", "upscale_layer_norm"]
    ),
    "LoRA on the projectors": lambda ids: LoraConfig(
        r=2, target_modules=["multi_modal_projector", "mask_projector.0", "mask_projector.2"]
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_learn_count_and_come_back(make_model, processor, batch, questions, tmp_path, kind):
    plain = outputs_of(make_model(), questions)
    adapted = get_peft_model(make_model(), ADAPTERS[kind](slot_ids(processor)))
    torch.testing.assert_close(outputs_of(adapted.get_base_model(), questions), plain)  # begins as the model
    # The IoU estimate counts in no loss, so that its token never moves.
    assert [name for name in train(adapted, batch) if "iou_token" not in name] == []
    trained = outputs_of(adapted.get_base_model(), questions)
    assert not torch.allclose(trained, plain, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    torch.testing.assert_close(outputs_of(again.get_base_model(), questions), trained)
    merged = again.merge_and_unload()
    torch.testing.assert_close(outputs_of(merged, questions), trained, rtol=1e-3, atol=1e-3)


def test_only_the_rows_asked_for_change(make_model, processor, batch):
    model, ids = make_model(), slot_ids(processor)
    config = LoraConfig(r=2, target_modules=ATTENTION, trainable_token_indices={"embed_tokens": ids, "lm_head": ids})
    adapted = get_peft_model(make_model(), config)
    sizes = [value.numel() for name, value in adapted.named_parameters() if "trainable_tokens_delta" in name]
    assert sizes == [2 * model.config.text_config.hidden_size] * 2
    train(adapted, batch)
    merged = adapted.merge_and_unload()
    for one, other in (
        (merged.get_input_embeddings(), model.get_input_embeddings()),
        (merged.get_output_embeddings(), model.get_output_embeddings()),
    ):
        assert (one.weight != other.weight).any(1).nonzero().flatten().tolist() == ids


def test_rows_of_a_tied_embedding_are_rows_of_the_head(make_model, processor, batch):
    config = make_model().config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model, ids = type(make_model())(config), slot_ids(processor)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=ATTENTION, trainable_token_indices={"embed_tokens": ids})
    )
    assert train(adapted, batch) == []
    head, embedding = adapted.get_base_model().lm_head.weight, adapted.get_base_model().get_input_embeddings().weight
    assert torch.equal(head, embedding)


def test_an_adapter_that_would_have_no_effect_is_refused(make_model, questions):
    model = make_model()
    decoder = model.sam.mask_decoder

    class Wrapper(
        torch.nn.Module
    ):  # as peft's layers are built; peft 0.21 itself refuses LoRA on transposed convolutions
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.weight, self.bias = base_layer, base_layer.weight, base_layer.bias

    decoder.upscale_conv2 = Wrapper(decoder.upscale_conv2)
    with pytest.raises(ValueError, match="would have no effect"):
        model.segment(**questions)
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(make_model(), LoraConfig(target_modules=["upscale_conv1"]))
