"""Missing, unexpected and mis-shaped weights are an error with names, by every way of loading."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from isolation import WITHOUT_PROJECT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from modeling_gsva import GsvaForConditionalGeneration, GsvaModel
from modeling_gsva.loading_gsva import MAX_NAMES, GsvaWeightsError

HEAD, LAST, STRANGE = "lm_head.weight", "mask_projector.2.bias", "sam.mask_decoder.stranger"


@pytest.fixture
def saved(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "saved")


def change(folder, drop=(), add=None, file="model.safetensors"):
    weights = load_file(folder / file)
    for name in drop:
        del weights[name]
    save_file({**weights, **(add or {})}, folder / file, metadata={"format": "pt"})
    return folder


def load(folder, **options):
    return GsvaForConditionalGeneration.from_pretrained(folder, **options)


def test_what_was_saved_comes_back_whole_and_equal(saved, model):
    again, report = load(saved, output_loading_info=True)
    assert not any(report.values())
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ([HEAD, LAST], {}, f"2 missing: {HEAD}, {LAST}\\. "),
        ([], {STRANGE: torch.zeros(3)}, f"1 unexpected: {STRANGE}\\. "),
        ([], {LAST: torch.zeros(7)}, f"1 mis-shaped: {LAST} \\(saved \\(7,\\), model \\(16,\\)\\)\\. "),
        ([HEAD], {STRANGE: torch.zeros(3)}, f"1 missing: {HEAD}; 1 unexpected: {STRANGE}\\. "),
    ],
)
def test_each_kind_is_an_error_with_names_and_the_way_out(saved, drop, add, message):
    change(saved, drop, add)
    with pytest.raises(ValueError, match=message) as error:
        load(saved)
    assert str(saved) in str(error.value) and "strict=False" in str(error.value)
    with pytest.raises(RuntimeError):  # what transformers raises for shapes
        AutoModelForImageTextToText.from_pretrained(saved)


def test_many_names_are_counted_and_the_error_keeps_them_all(saved):
    names = [name for name in load_file(saved / "model.safetensors") if name.startswith("sam.vision_encoder.")]
    assert len(names) > MAX_NAMES
    with pytest.raises(GsvaWeightsError, match=f"{len(names)} missing: .*, \\.\\.\\.") as error:
        load(change(saved, names))
    assert error.value.wrong["missing"] == sorted(names)
    assert str(error.value).count("sam.vision_encoder.") == MAX_NAMES


def test_who_asks_for_it_gets_a_half_loaded_model(saved, model):
    change(saved, [HEAD], {STRANGE: torch.zeros(3)})
    half = load(saved, strict=False)
    assert torch.equal(half.mask_projector[2].weight, model.mask_projector[2].weight)
    assert not torch.equal(half.lm_head.weight, model.lm_head.weight)
    assert (
        AutoModelForImageTextToText.from_pretrained(saved, strict=False).lm_head.weight.shape
        == half.lm_head.weight.shape
    )
    _, report = load(saved, output_loading_info=True)  # the report is read by whoever asked for it
    assert report["missing_keys"] == {f"vlm.{HEAD}"} and report["unexpected_keys"] == {STRANGE}
    with pytest.raises(ValueError, match="1 missing"):
        load(saved, output_loading_info=True, strict=True)


def test_mis_shaped_weights_have_their_own_switch(saved):
    change(saved, add={LAST: torch.zeros(7)})
    for options in ({"strict": False}, {"output_loading_info": True}):
        with pytest.raises(ValueError, match="1 mis-shaped"):
            load(saved, **options)
    again, report = load(saved, ignore_mismatched_sizes=True, output_loading_info=True)
    assert report["mismatched_keys"] == {(LAST, (7,), (16,))} and again.mask_projector[2].bias.shape == (16,)
    assert load(saved, ignore_mismatched_sizes=True).mask_projector[2].bias.shape == (16,)


def test_tied_weights_are_not_missing(make_model, tmp_path):
    tied = make_model()
    tied.config.text_config.tie_word_embeddings = tied.config.tie_word_embeddings = True
    tied = GsvaForConditionalGeneration(tied.config)
    tied.save_pretrained(tmp_path)
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    again = load(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    with pytest.raises(ValueError, match=r"missing: .*embed_tokens"):
        load(change(tmp_path, ["model.language_model.embed_tokens.weight"]))


def test_the_base_model_takes_its_part_of_the_whole_and_no_less(saved, model):
    part = GsvaModel.from_pretrained(saved)
    assert torch.equal(part.multi_modal_projector.weight, model.model.multi_modal_projector.weight)
    with pytest.raises(ValueError, match=r"1 missing: multi_modal_projector\.bias"):
        GsvaModel.from_pretrained(change(saved, ["model.multi_modal_projector.bias"]))
    part.save_pretrained(saved.parent / "part")
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight, mask_projector"):
        load(saved.parent / "part", config=model.config)


def test_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert torch.equal(load(tmp_path).lm_head.weight, model.lm_head.weight)
    change(tmp_path, [HEAD], file=index[HEAD])  # the index still names it
    with pytest.raises(ValueError, match=f"1 missing: {HEAD}"):
        load(tmp_path)
    (tmp_path / index[LAST]).unlink()
    with pytest.raises(OSError, match=index[LAST]):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["load_in_8bit", "load_in_4bit"])
def test_quantized_loading_is_strict_too(saved, kind):
    options = {"quantization_config": BitsAndBytesConfig(**{kind: True}), "device_map": {"": "cpu"}}
    load(saved, **options).save_pretrained(saved.parent / "small")
    load(saved.parent / "small")
    layer = "model.language_model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"2 missing: {HEAD}, {layer}"):
        load(change(saved, [layer, HEAD]), **options)
    small = saved.parent / "small"
    with pytest.raises(ValueError, match=f"1 missing: {HEAD}"):
        load(change(small, [HEAD]))
    with pytest.raises(ValueError, match=f"1 unreadable: {layer} "):
        load(change(small, [layer]))


def test_an_adapter_and_its_base_are_both_checked(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
    adapted = get_peft_model(load(saved), LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    adapted.save_pretrained(adapter := tmp_path / "adapter")
    assert adapted.peft_config["default"].base_model_name_or_path == str(saved)
    lora = next(name for name in load_file(adapter / "adapter_model.safetensors") if "lora_B" in name)
    assert load(adapter).lm_head.weight.shape == load(saved).lm_head.weight.shape
    change(saved, [HEAD])
    with pytest.raises(ValueError, match=f"1 missing: {HEAD}"):
        load(adapter)
    change(saved, add={HEAD: adapted.base_model.model.lm_head.weight.detach()})
    change(adapter, [lora], file="adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: .*lora_B"):
        load(adapter)


def test_transformers_gives_each_report_to_our_hook_before_it_uses_it(saved, monkeypatch):
    """`from_pretrained` collects the reports in `mark_tied_weights_as_initialized`, which has no other promise than this."""
    steps: list[str] = []

    def note(name):
        method = getattr(GsvaForConditionalGeneration, name)

        def noted(self, *args, **kwargs):
            steps.append(name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(GsvaForConditionalGeneration, name, noted)

    for name in (
        "mark_tied_weights_as_initialized",
        "_move_missing_keys_from_meta_to_device",
        "_initialize_missing_keys",
        "_adjust_missing_and_unexpected_keys",
    ):
        note(name)
    load(saved)
    assert steps == [
        "mark_tied_weights_as_initialized",
        "_move_missing_keys_from_meta_to_device",
        "_initialize_missing_keys",
        "_adjust_missing_and_unexpected_keys",
    ]


def test_an_empty_state_dict_asks_for_fresh_weights(model):
    fresh = GsvaForConditionalGeneration.from_pretrained(None, config=model.config, state_dict={})
    assert fresh.lm_head.weight.shape == model.lm_head.weight.shape
    with pytest.raises(ValueError, match="missing"):
        GsvaForConditionalGeneration.from_pretrained(
            None, config=model.config, state_dict={HEAD: model.lm_head.weight}
        )


REMOTE = (
    WITHOUT_PROJECT
    + """
import sys
from transformers import AutoModel
for options in ({}, {"strict": False}):
    try:
        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, **options)
        print("loaded", type(model).__module__.split(".")[0])
    except ValueError as error:
        print(type(error).__name__, error)
"""
)


def test_the_code_that_a_directory_carries_along_is_as_strict(saved, tmp_path):
    change(saved, [HEAD])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "code"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", REMOTE, str(saved)]
    finished = subprocess.run(
        command, check=True, timeout=600, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    refused, loaded = finished.stdout.splitlines()[-2:]
    assert refused.startswith("GsvaWeightsError") and f"1 missing: {HEAD}. " in refused
    assert loaded == "loaded transformers_modules"
