"""A resumed run is the run that it resumes: what made the weights is compared, and changes that may be are told."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import run_gres
from trainers.run_record import read_record


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def words(model_dir, cache):
    """The command of a run of four steps; later words override earlier ones."""
    return (
        f"""--model {model_dir} --do_train --use_cpu true --dataset shapes --per_device_train_batch_size 2 --max_steps 4
        --save_steps 2 --threads 1 --logging_steps 1 --disable_tqdm true --report_to none --learning_rate 1e-3 --seed 3
        --max_eval_samples 2""".split()
        + ["--dataset_options", json.dumps({"size": 8, "cache_dir": cache})]
    )


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run_gres.main([*words, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def started(words, folder, *more):
    return run_gres.main([*words, "--output_dir", str(folder), *more])


def test_checkpoints_and_the_finished_run_say_what_made_them(finished):
    record = read_record(finished)
    assert read_record(finished / "checkpoint-4") == record
    kept = record["kept"]
    assert (kept["learning_rate"], kept["seed"], kept["lora_r"], kept["batch of all devices"]) == (1e-3, 3, 8, 2)
    assert len(kept["base model"]) == len(kept["training data"]) == 32 and kept["strategy"] == "data parallel"
    assert record["reported"]["max_steps"] == 4 and record["threads"] == 1 and record["changes"] == []


DIFFERENT = [
    ("--learning_rate", "1e-5", "learning_rate: 0.001 then, 1e-05 now"),
    ("--seed", "99", "seed: 3 then, 99 now"),
    ("--data_seed", "7", "data_seed: None then, 7 now"),
    ("--lora_alpha", "64", "lora_alpha: 16 then, 64 now"),
    ("--lora_dropout", "0.5", "lora_dropout: 0.05 then, 0.5 now"),
    ("--train_language_model", "full", "train_language_model: 'lora' then, 'full' now"),
    ("--wording", "processor", "wording: 'gsva' then, 'processor' now"),
    ("--num_expressions", "5", "num_expressions: 3 then, 5 now"),
    ("--max_length", "200", "max_length: 1024 then, 200 now"),
    ("--per_device_train_batch_size", "4", "batch of all devices: 2 then, 4 now"),
    ("--lr_scheduler_type", "constant", "lr_scheduler_type: 'linear' then, 'constant' now"),
    ("--warmup_steps", "3", "warmup_steps: 0 then, 3.0 now"),
    ("--weight_decay", "0.1", "weight_decay: 0.0 then, 0.1 now"),
    ("--adam_beta2", "0.9", "adam_beta2: 0.999 then, 0.9 now"),
    ("--max_grad_norm", "0.5", "max_grad_norm: 1.0 then, 0.5 now"),
    ("--max_train_samples", "5", "training data: other content than in the run"),
    ("--dtype", "bfloat16", "dtype: 'float32' then, 'bfloat16' now"),
]


@pytest.mark.parametrize(("option", "value", "difference"), DIFFERENT, ids=[row[0] for row in DIFFERENT])
@pytest.mark.parametrize("checkpoints", [True, False], ids=["checkpoint", "finished"])
def test_another_run_is_refused(words, run, capsys, option, value, difference, checkpoints):
    """With its checkpoints, and where only the finished model is left."""
    if not checkpoints:
        for folder in run.glob("checkpoint-*"):
            shutil.rmtree(folder)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert started(words, run, "--max_steps", "6", option, value) == 1
    message = capsys.readouterr().err
    assert difference in message and "belongs to another run" in message and "--resume false" in message
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_another_base_other_data_and_other_words_are_told_apart_by_content(
    words, run, model_dir, cache, tmp_path, capsys
):
    other = shutil.copytree(model_dir, tmp_path / "other")
    options = json.dumps({"size": 8, "seed": 1, "cache_dir": cache})
    assert started(words, run, "--max_steps", "6", "--dataset_options", options) == 1
    assert "training data: other content" in capsys.readouterr().err

    # The same base in another place is the same base.
    assert started(words, run, "--max_steps", "5", "--model", str(other)) == 0
    weights = load_file(other / "model.safetensors")
    weights["model.language_model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert started(words, run, "--max_steps", "6", "--model", str(other)) == 1
    assert f"base model: other content than in the run ('{other}' then, '{other}' now)" in capsys.readouterr().err

    # Prompts are part of what is learned.
    shutil.copytree(model_dir, other, dirs_exist_ok=True)
    settings = json.loads((other / "processor_config.json").read_text())
    settings["prompts"]["refer"]["question"] = "<image>\nfind {expressions}."
    (other / "processor_config.json").write_text(json.dumps(settings))
    assert started(words, run, "--max_steps", "6", "--model", str(other)) == 1
    assert "base model: other content" in capsys.readouterr().err


def test_more_steps_and_another_split_of_a_step_go_on_and_are_told(words, run, capsys):
    again = [*words, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--max_steps", "6"]
    assert started(again, run, "--logging_steps", "3", "--save_total_limit", "5") == 0
    printed = capsys.readouterr().out
    assert "Going on from" in printed and "max_steps 4 -> 6" in printed
    assert "gradient_accumulation_steps 1 -> 2" in printed and "logging_steps" not in printed
    (change,) = read_record(run)["changes"]
    assert change["step"] == 4 and change["max_steps"] == [4, 6]
    card = (run / "README.md").read_text()
    assert "max_steps 4 -&gt; 6 at step 4" in card and "| steps | 6 |" in card
    assert started(again, run, "--max_steps", "8") == 0
    assert [entry["step"] for entry in read_record(run / "checkpoint-8")["changes"]] == [4, 6]


def test_fewer_steps_are_not_handed_out_as_if_asked_for(words, run, capsys):
    weights = (run / "model.safetensors").read_bytes()
    assert started(words, run, "--max_steps", "3") == 1
    message = capsys.readouterr().err
    assert f"{run} holds a run of 4 steps, and 3 are asked for" in message
    assert f"--resume_from_checkpoint {run / 'checkpoint-2'}" in message
    # In epochs, where only the trainer knows the number of steps: eight images are four steps of an epoch.
    assert started(words, run, "--max_steps", "-1", "--num_train_epochs", "0.5") == 1
    assert "holds a run of 4 steps, and 2 are asked for" in capsys.readouterr().err
    assert (run / "model.safetensors").read_bytes() == weights
    # The way that the message names.
    assert started(words, run, "--max_steps", "3", "--resume_from_checkpoint", str(run / "checkpoint-2")) == 0
    assert read_record(run)["reported"]["max_steps"] == 3


def test_begun_anew_the_earlier_run_is_kept(words, run, capsys):
    (run / "mine.txt").write_text("not of the run")
    assert started(words, run, "--resume", "false", "--learning_rate", "1e-5", "--max_steps", "2") == 0
    assert f"The earlier run in {run} is now in {run / 'earlier-1'}." in capsys.readouterr().out
    assert read_record(run / "earlier-1")["kept"]["learning_rate"] == 1e-3
    assert (run / "earlier-1" / "checkpoint-4").is_dir() and (run / "earlier-1" / "model.safetensors").is_file()
    assert read_record(run)["kept"]["learning_rate"] == 1e-5 and (run / "mine.txt").is_file()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_checkpoint_of_an_older_version_is_not_compared_which_is_told(words, run, caplog):
    for path in run.rglob("run.json"):
        path.unlink()
    assert started(words, run, "--max_steps", "5") == 0
    assert "does not say what it was trained from" in caplog.text
    assert read_record(run)["kept"]["seed"] == 3


def test_a_damaged_record_is_named(words, run, capsys):
    (run / "checkpoint-4" / "run.json").write_text('{"kept": ')
    assert started(words, run, "--max_steps", "6") == 1
    assert f"{run / 'checkpoint-4' / 'run.json'} is damaged" in capsys.readouterr().err


def test_a_model_without_its_optimizer_does_not_continue_in_silence(words, tmp_path, capsys, caplog):
    run = tmp_path / "run"
    assert started(words, run, "--save_only_model", "true", "--max_steps", "2") == 0
    capsys.readouterr()
    assert started(words, run, "--max_steps", "4") == 1
    message = capsys.readouterr().err
    assert f"{run / 'checkpoint-2'} holds the model only" in message and "--save_only_model true" in message
    assert started(words, run, "--max_steps", "4", "--save_only_model", "true") == 0
    assert "the optimizer and the learning rate schedule begin anew" in caplog.text


def test_the_card_only_tells_what_made_the_weights(words, run, model_dir, tmp_path):
    """After a refused start with other settings the card is as before."""
    card = (run / "README.md").read_text()
    assert started(words, run, "--seed", "99", "--learning_rate", "1e-5") == 1
    assert (run / "README.md").read_text() == card
    assert "| seed | 3 |" in card and "learning rate 0.001" in card and "| changed on the way | nothing |" in card


# Arguments of the project that a resumed run need not have: the digests tell these apart by content, ...
IN_DIGESTS = "model base_model dataset data_dir train_split dataset_options max_train_samples"
# ... and these do not change the weights.
WITHOUT_EFFECT = """attn_implementation architecture eval_dataset eval_split max_eval_samples max_eval_samples_in_training
    protocols conventions threshold one_prompt_per_expression max_new_tokens ignore_region eval_task resume_eval save_masks
    eval_before_training on_bad_image num_pictures image expressions
    expressions_column question_column image_column id_column masks shard_size"""


def test_every_argument_of_model_and_data_is_compared_or_known_not_to_matter():
    from dataclasses import fields

    from trainers.arguments import DataArguments, ModelArguments
    from trainers.run_record import KEPT_OF_DATA, KEPT_OF_MODEL

    names = {argument.name for kind in (ModelArguments, DataArguments) for argument in fields(kind)}
    assert names == {*KEPT_OF_MODEL, *KEPT_OF_DATA, *IN_DIGESTS.split(), *WITHOUT_EFFECT.split()}
