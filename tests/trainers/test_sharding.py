"""Training with sharded weights: options that need whole weights are refused at the start, and the shards become a model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_bases
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file

from trainers.arguments import ModelArguments
from trainers.freezing import merge_lora, plain_name, prepare_for_training
from trainers.sharding import tie_again, untie_weights

MODEL = str(ROOT / "assets" / "tiny_gsva")


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)  # zero3.yaml names its file from here
    return ["--model", MODEL, "--use_cpu", "--output_dir", str(tmp_path / "out")]


@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--feature_cache", "kept"], "feature_cache=kept is not possible"),
        (["--quantization", "4bit"], "quantization=4bit is not possible"),
        (["--train_tokens", "new"], "train_tokens=new is not possible"),
        (["--do_eval", "--eval_strategy", "steps", "--eval_steps", "5"], "give --eval_strategy no"),
        ([], None),
    ],
)
def test_what_needs_whole_weights_is_refused_before_anything_is_loaded(words, monkeypatch, way, more, message):
    from accelerate.utils import DeepSpeedPlugin

    from trainers.arguments import parse_arguments
    from trainers.sharding import refuse_what_shards_cannot

    model_args, _, args = parse_arguments([*words, "--do_train", *more])
    refuse_what_shards_cannot(model_args, args)  # every process holds everything
    if way == "zero3":
        args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config="configs/accelerate/deepspeed_zero3.json")
    else:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` does
    if message is None:
        return refuse_what_shards_cannot(model_args, args)
    with pytest.raises(ValueError, match=message):
        refuse_what_shards_cannot(model_args, args)
    if way == "zero3":  # ZeRO-2 leaves the weights whole
        args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config="configs/accelerate/deepspeed_zero2.json")
        refuse_what_shards_cannot(model_args, args)


WAYS = {"lora": {}, "new": {"train_tokens": "new"}, "full": {"train_language_model": "full"}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["parameters", "adapter", "bin"])
def test_consolidated_weights_become_a_model(words, tmp_path, monkeypatch, way, layout):
    """As zero_to_fp32.py names them (as parameters, in several files), and as FSDP's checkpoints do with LoRA."""
    import run_gres
    from trainers.loading import load_model

    args = ModelArguments(model=MODEL, **WAYS[way])
    model = prepare_for_training(load_model(args, "cpu")[1], args)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    weights = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if layout == "adapter" and way != "full":
        from peft import get_peft_model_state_dict

        weights = {
            name: tensor.clone()
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }
    folder, names = tmp_path / "whole", sorted(weights)
    folder.mkdir()
    for number, part in enumerate((names[::2], names[1::2])):
        if layout == "bin":
            torch.save({name: weights[name] for name in part}, folder / f"pytorch_model-{number}.bin")
        else:
            save_file({name: weights[name] for name in part}, folder / f"model-{number}.safetensors")
    words += [
        *(word for name, value in WAYS[way].items() for word in (f"--{name}", value)),
        "--consolidated",
        str(folder),
    ]
    assert run_gres.main(words) == 0
    expected = merge_lora(model).state_dict()
    found = load_model(ModelArguments(model=str(tmp_path / "out")), "cpu")[1].state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


def test_consolidated_weights_of_another_training_are_refused(words, tmp_path, capsys):
    import run_gres

    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert run_gres.main([*words, "--consolidated", str(tmp_path / "model.safetensors")]) == 1
    assert (
        "give --model, --train_language_model, --train_tokens and --lora_r as they were in training"
        in capsys.readouterr().err
    )
    assert run_gres.main([*words, "--consolidated", str(tmp_path / "nothing")]) == 1
    assert "no folder with .safetensors or .bin" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def shared(model) -> list[set[str]]:
    """The names of parameters that are one, with two names or more."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(plain_name(name))
    return [group for group in names.values() if len(group) > 1]


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20).reshape(2, 10)).logits


TIED = [("gemma3", "lora", "all"), ("gemma3", "lora", "new"), ("gemma3", "full", "all"), ("smolvlm", "lora", "new")]


@pytest.mark.parametrize(("family", "way", "tokens"), TIED)
def test_frozen_ties_are_cut_and_trained_ones_stay(family, way, tokens, tmp_path):
    """Of a base whose language head is its embedding: rows that learn are one, and the model that is saved is the same one."""
    args = ModelArguments(train_language_model=way, train_tokens=tokens, lora_dropout=0.0)
    merged = {}
    for cut in (False, True):
        base = tiny_bases.make_gsva(family)
        base.config.tie_word_embeddings = base.vlm.config.tie_word_embeddings = True
        base.vlm.config.get_text_config().tie_word_embeddings = True
        base.tie_weights()
        model = prepare_for_training(base, args).eval()
        trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        before, values = outputs(model), {n: p.clone() for n, p in model.named_parameters(remove_duplicate=False)}
        untied = untie_weights(model) if cut else {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        assert parameters.keys() == values.keys() and all(torch.equal(parameters[n], values[n]) for n in values)
        assert torch.equal(outputs(model), before)
        assert {id(p) for p in parameters.values() if p.requires_grad} == trained.keys()
        frozen = [p for p in parameters.values() if not p.requires_grad]
        assert (len({p.data_ptr() for p in frozen}) == len(frozen)) == cut  # as zero_to_fp32.py needs it
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        tie_again(model, untied)
        merged[cut] = merge_lora(model)
        assert merged[cut].config.tie_word_embeddings
        assert any(len(group) == 2 and "lm_head.weight" in str(group) for group in shared(merged[cut]))
        assert any("positional_embedding" in str(group) for group in shared(merged[cut]))
        merged[cut].save_pretrained(tmp_path / str(cut))
    assert not torch.equal(outputs(merged[True]), before) and torch.equal(
        outputs(merged[True]), outputs(merged[False])
    )
    first, second = (load_file(tmp_path / str(cut) / "model.safetensors") for cut in (False, True))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def launch(config: str, script: str, out: Path, *more: str) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"configs/accelerate/{config}.yaml",
    ]
    command += ["--num_processes", "2", "--main_process_port", "0", script, "--model", MODEL, "--dataset", "shapes"]
    command += [
        "--dataset_options",
        '{"size": 16}',
        "--max_eval_samples",
        "4",
        "--do_train",
        "--max_steps",
        "3",
        "--learning_rate",
    ]
    command += [
        "1e-3",
        "--per_device_train_batch_size",
        "2",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--threads",
        "1",
    ]
    command += ["--output_dir", str(out), "--use_cpu", "--lora_dropout", "0", *more]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--train_language_model", "full"]], ids=["lora", "full"])
def test_fsdp2_trains_and_saves_what_data_parallel_does(words, tmp_path, monkeypatch, more):
    import run_gres

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    whole, shards = tmp_path / "ddp", tmp_path / "fsdp"
    launch("ddp", "run_gres.py", whole, *more)
    launch("fsdp2", "tests/tools/fsdp_on_cpu.py", shards, "--do_eval", *more)
    assert (shards / "checkpoint-3" / "pytorch_model_fsdp_0" / "__1_0.distcp").exists()  # it was shared out
    assert (shards / "results.json").exists() and (shards / "adapter").exists() == (not more)

    expected, found = load_file(whole / "model.safetensors"), load_file(shards / "model.safetensors")
    base = load_file(Path(MODEL) / "model.safetensors")
    assert expected.keys() == found.keys() == base.keys()
    moved = max(float((found[name] - base[name]).abs().max()) for name in base)
    worst = max(float((found[name] - expected[name]).abs().max()) for name in base)
    assert worst < 0.03 * moved, (worst, moved)

    made = tmp_path / "merged"
    checkpoint = shards / "checkpoint-3" / "pytorch_model_fsdp_0"
    merge = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "merge-weights", str(checkpoint), str(made)]
    subprocess.run(merge, check=True, capture_output=True, timeout=300)
    assert run_gres.main([*words, *more, "--consolidated", str(made)]) == 0
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == found.keys() and all(torch.equal(again[name], found[name]) for name in found)

    shutil.rmtree(shards / "checkpoint-3")  # as after a kill
    launch("fsdp2", "tests/tools/fsdp_on_cpu.py", shards, *more)
    resumed = load_file(shards / "model.safetensors")
    assert all(torch.equal(resumed[name], found[name]) for name in found)
