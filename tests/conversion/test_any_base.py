"""`--base` and `--sam` make the start of a GSVA: the base is still itself, new rows are drawn, and the directory loads and segments."""

import json
from pathlib import Path

import pytest
import tiny_bases as bases
import tiny_directories as tiny
import torch
from tiny_bases import rms
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from conversion.any_base import build_start, check_contract, open_mask_model
from conversion.directories import find_base, require_weights
from conversion.new_rows import SlotTokens
from conversion.writing import write_shards
from convert_checkpoint import main
from modeling_gsva import GsvaForConditionalGeneration

FAMILIES = (*bases.FIRST_RANK, *bases.SECOND_RANK)
CASES = [(family, bases.MASK_MODELS[n % 4], (20, 0)[n % 2]) for n, family in enumerate(FAMILIES)]
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def convert(base: Path, sam: Path, output: Path, *options: str) -> GsvaForConditionalGeneration:
    """Run the command line, and load what it wrote."""
    main(["--base", str(base), "--sam", str(sam), "--output", str(output), *options])
    return AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True, dtype="auto").eval()


@pytest.fixture(scope="module")
def mask_models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mask_models")
    return {kind: tiny.write_mask_model(folder / kind, kind) for kind in bases.MASK_MODELS}


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A base with padding rows; tests do not change it."""
    return tiny.write_base(tmp_path_factory.mktemp("bases") / "llava", "llava")


def assert_the_base_is_itself(base, ours, inputs: dict) -> None:
    with torch.no_grad():
        expected = base(**inputs, output_hidden_states=True, use_cache=False)
        given = ours(**inputs, output_hidden_states=True, use_cache=False)
    assert rms(given.hidden_states[-1], expected.hidden_states[-1]) < 1e-6
    new = {ours.config.seg_token_id, ours.config.rej_token_id}
    kept = [token for token in range(expected.logits.shape[-1]) if token not in new]
    assert rms(given.logits[..., kept], expected.logits[..., kept]) < 1e-6
    options = {**OPTIONS, "suppress_tokens": sorted(new), "eos_token_id": None}
    assert torch.equal(ours.generate(**inputs, **options), base.generate(**inputs, **options))


def assert_rows_are_right(base, ours, tokens: SlotTokens) -> None:
    """New rows are near the mean of the tokens; the base's are as they were, tied or not as they were."""
    old = base.get_input_embeddings().weight
    rows = max(len(old), tokens.count)
    assert ours.config.text_config.vocab_size == rows == ours.vlm.config.get_text_config().vocab_size
    tables = [(old, ours.get_input_embeddings().weight)]
    assert (ours.lm_head.weight is tables[0][1]) == (base.get_output_embeddings().weight is old)
    if base.get_output_embeddings().weight is not old:
        tables.append((base.get_output_embeddings().weight, ours.lm_head.weight))
    for before, after in tables:
        assert len(after) == rows
        same = [token for token in range(len(before)) if token not in (tokens.seg, tokens.rej)]
        assert torch.equal(after[same], before[same])
        known = before[: tokens.old_count]
        for token in {tokens.seg, tokens.rej, *range(len(before), rows)}:
            assert 0 < (after[token] - known.mean(0)).div(known.std(0)).abs().max() < 0.5
        assert (after[tokens.seg] - after[tokens.rej]).abs().min() > 0


def conversation_inputs(processor, picture) -> dict:
    """Return what the base's own processor makes of a question about an image."""
    if processor.chat_template is None:
        return dict(processor(images=picture, text="<image>what is red?", return_tensors="pt"))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what is red?"}]
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )
    )  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in tiny.WITH_PROCESSOR], ids=lambda case: case[0])
def test_each_family_by_the_command_line(case, mask_models, make_picture, tmp_path):
    family, kind, padding = case
    directory = tiny.write_base(tmp_path / "base", family, padding)
    base = AutoModelForImageTextToText.from_pretrained(directory)
    own = AutoProcessor.from_pretrained(directory)
    ours = convert(directory, mask_models[kind], tmp_path / "start")
    assert_the_base_is_itself(base, ours, conversation_inputs(own, make_picture(1, 60, 40)))
    processor = AutoProcessor.from_pretrained(tmp_path / "start", trust_remote_code=True)
    assert (ours.config.seg_token_id, ours.config.rej_token_id) == (processor.seg_token_id, processor.rej_token_id)
    assert_rows_are_right(base, ours, SlotTokens.of(processor.tokenizer, own.tokenizer.get_vocab()))
    weights = AutoModel.from_pretrained(mask_models[kind]).state_dict()
    assert all(torch.equal(ours.sam.state_dict()[name], value) for name, value in weights.items())
    assert ours.generation_config.to_dict() == base.generation_config.to_dict()
    assert processor.image_processor.to_dict() == own.image_processor.to_dict()
    assert own.chat_template in (None, processor.chat_template)
    pictures = [make_picture(2, 50, 40), make_picture(3, 30, 60)]
    inputs = processor(images=pictures, expressions=[["the man", "a unicorn"], ["red"]], return_tensors="pt")
    results = processor.post_process_segmentation(ours.segment(**inputs, threshold=-1e9), inputs)
    assert [[entry["mask"].shape for entry in image] for image in results] == [[(40, 50)] * 2, [(60, 30)]]
    assert results[0][0]["mask"].any() and not results[0][0]["is_rejected"]


@pytest.mark.parametrize("case", [case for case in CASES if case[0] not in tiny.WITH_PROCESSOR], ids=lambda case: case[0])
def test_each_family_without_its_processor(case, mask_models, tmp_path):
    """Their processors need torchvision; the weights and the configuration do not."""
    family, kind, padding = case
    path = tiny.write_base(tmp_path / "base", family, padding)
    base = AutoModelForImageTextToText.from_pretrained(path)
    directory, config = find_base(str(path))
    check_contract(directory, config)
    require_weights(directory)
    old = len(base.get_input_embeddings().weight) - padding
    tokens = SlotTokens(seg=old, rej=old + 1, new=(old, old + 1), old_count=old, count=old + 2)
    start = build_start(directory, config, open_mask_model(str(mask_models[kind])), tokens, 0, None)
    start.model.save_pretrained(tmp_path / "start", state_dict={})
    write_shards(tmp_path / "start", start.tensors, None, "100KB")
    ours = GsvaForConditionalGeneration.from_pretrained(tmp_path / "start")
    images, image = bases.make_images(family, 1), config.image_token_id
    with torch.no_grad():
        features = torch.cat(list(ours.language.encode(images).features.pooler_output))
    ids = torch.tensor([[1, 40, 41, *[image] * len(features), 42, 43, 44]])
    types = {"mm_token_type_ids": (ids == image).long()} if "qwen" in family else {}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images, **types}
    assert_the_base_is_itself(base, ours, inputs)
    assert_rows_are_right(base, ours, tokens)


def test_the_saved_names_are_those_of_save_pretrained(mask_models, llava, tmp_path):
    ours = convert(llava, mask_models["sam2"], tmp_path / "start")
    ours.save_pretrained(tmp_path / "again")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        first, second = (tmp_path / folder / name for folder in ("start", "again"))
        if name.endswith("json"):
            assert json.loads(first.read_text()) == json.loads(second.read_text())
            continue
        from safetensors.torch import load_file

        weights, again = load_file(first), load_file(second)
        assert weights.keys() == again.keys()
        assert all(torch.equal(value, again[name]) for name, value in weights.items())
