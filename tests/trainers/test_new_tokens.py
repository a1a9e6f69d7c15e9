"""`--train_tokens new`: only the rows of [SEG] and [REJ] learn, in a run with checkpoints, resumed, as adapter and merged."""

import json
import shutil

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file

import run_gres
from trainers.arguments import ModelArguments
from trainers.freezing import merge_lora, parts_table, prepare_for_training
from trainers.loading import load_model
from trainers.memory_plan import Strategy, architecture, memory_of, sizes_of, trained_model
from trainers.run_record import read_record

NEW = ModelArguments(train_tokens="new", lora_dropout=0.0)


@pytest.fixture(scope="module")
def words(model_dir, tmp_path_factory):
    options = json.dumps({"size": 8, "cache_dir": str(tmp_path_factory.mktemp("cache"))})
    return ["--model", str(model_dir), "--dataset_options", options, "--do_train", "--use_cpu", "--threads", "1", "--disable_tqdm",
            "true", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--max_steps", "4", "--save_steps", "2",
            "--train_tokens", "new"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run_gres.main([*words, "--output_dir", str(folder)]) == 0
    return folder


def rows_that_differ(one, other):
    return (one != other).any(1).nonzero().flatten().tolist()


def test_only_the_new_rows_differ_from_the_base(finished, model_dir, processor):
    base, trained = load_file(model_dir / "model.safetensors"), load_file(finished / "model.safetensors")
    slots = sorted((processor.seg_token_id, processor.rej_token_id))
    assert base.keys() == trained.keys()
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert rows_that_differ(base[name], trained[name]) == slots
    assert not torch.equal(base["mask_projector.0.weight"], trained["mask_projector.0.weight"])


def test_the_adapter_holds_rows_and_loads_over_its_base(finished, model_dir):
    adapter = load_file(finished / "adapter" / "adapter_model.safetensors")
    rows = [tuple(tensor.shape) for name, tensor in adapter.items() if "embed_tokens" in name or "lm_head" in name]
    hidden = load_file(model_dir / "model.safetensors")["lm_head.weight"].shape[1]
    assert rows == [(2, hidden), (2, hidden)]
    expected = load_model(ModelArguments(model=str(finished)), "cpu")[1].state_dict()
    found = load_model(ModelArguments(model=str(finished / "adapter")), "cpu")[1].state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


def test_a_resumed_run_ends_with_the_same_weights(words, finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-4")
    (run / "model.safetensors").unlink()
    assert run_gres.main([*words[:-1], "all", "--output_dir", str(run)]) == 1
    assert "train_tokens: 'new' then, 'all' now" in capsys.readouterr().err
    assert run_gres.main([*words, "--output_dir", str(run)]) == 0
    expected, found = load_file(finished / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_record(run)["kept"]["train_tokens"] == "new"


def test_tied_rows_are_trained_once(make_model):
    config = make_model().config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = prepare_for_training(type(make_model())(config), NEW)
    rows = {
        name: parameter
        for name, parameter in model.named_parameters()
        if "tokens_delta" in name and parameter.requires_grad
    }
    assert len(rows) == 1
    (row,) = rows.values()
    with torch.no_grad():
        row.add_(1.0)
    merged = merge_lora(model)
    assert torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    slots = [config.seg_token_id, config.rej_token_id]
    assert torch.equal(merged.get_input_embeddings().weight[sorted(slots)], row)


def test_a_run_over_a_tied_base_saves_a_tied_model(words, tmp_path):
    """That of assets/tiny_gsva_today: embedding and head are one parameter, before and after."""
    base, out = ROOT / "assets" / "tiny_gsva_today", tmp_path / "out"
    given = [*words, "--model", str(base), "--max_steps", "1", "--save_strategy", "no", "--output_dir", str(out)]
    assert run_gres.main(given) == 0
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    model = load_model(ModelArguments(model=str(out)), "cpu")[1]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    slots = sorted((model.config.seg_token_id, model.config.rej_token_id))
    (name,) = (name for name in before if name.endswith("embed_tokens.weight"))
    assert rows_that_differ(before[name], after[name]) == slots


def test_the_table_and_the_plan_show_what_it_saves(make_model):
    table = parts_table(prepare_for_training(make_model(), NEW))
    (line,) = (line for line in table.splitlines() if line.startswith("lm_head"))
    assert line.split()[1] == str(2 * make_model().config.text_config.hidden_size)
    config, one_gpu = architecture("7b"), Strategy("one_gpu", "NO", 1)
    memory = [
        memory_of(sizes_of(trained_model(config, ModelArguments(train_tokens=tokens), False), None), 0, one_gpu)
        for tokens in ("all", "new")
    ]
    rows = 2 * (32004 - 2) * 4096  # that are not trained, of embedding and head
    assert memory[0].gradients - memory[1].gradients == 4 * rows
    assert memory[0].optimizer - memory[1].optimizer == 8 * rows
    assert memory[0].weights - memory[1].weights == pytest.approx(4 * rows, rel=1e-3)  # peft's frozen copies


@pytest.mark.parametrize("way", ["full", "frozen"])
def test_it_is_for_lora(way):
    with pytest.raises(ValueError, match=f"train_tokens='new' is for training with LoRA, not for .*'{way}'"):
        ModelArguments(train_tokens="new", train_language_model=way)
    with pytest.raises(ValueError, match="train_tokens"):
        ModelArguments(train_tokens="some")


@pytest.mark.parametrize("name", ["embed_tokens", "mask_tokens", "upscale_conv1"])
def test_lora_on_weights_that_are_read_without_a_call_is_refused_first(words, tmp_path, capsys, name):
    out = tmp_path / "out"
    assert run_gres.main([*words, "--do_eval", "--lora_target_modules", name, "--output_dir", str(out)]) == 1
    assert f"has no linear layer named {name}; its linear layers are" in capsys.readouterr().err
    assert not [*out.glob("rows_*"), *out.glob("checkpoint-*")]
