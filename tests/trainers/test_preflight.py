"""What a run needs at its end is looked at before it begins, and what ends it all the same is one line."""

import errno
import json
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
from accelerate.utils import DistributedType
from paths import ROOT
from PIL import Image
from safetensors import SafetensorError

import run_gres
from trainers import preflight, training
from trainers.arguments import GsvaTrainingArguments
from trainers.failures import explain
from trainers.preflight import check_before_run, check_hub, check_reporters


def arguments(tmp_path, **options):
    return GsvaTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, **options)


@pytest.fixture
def words(model_dir, tmp_path):
    options = json.dumps({"size": 8, "cache_dir": str(tmp_path / "cache")})
    return ["--model", str(model_dir), "--dataset_options", options, "--use_cpu", "--threads", "1", "--disable_tqdm", "true",
            "--per_device_train_batch_size", "2", "--max_eval_samples", "2", "--save_steps", "1"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "report_to=wandb is not installed: pip install wandb"),
        ("wand", "report_to=wand is not known; choose of"),
    ],
)
def test_reporters_are_looked_at_first(words, tmp_path, capsys, monkeypatch, name, message):
    monkeypatch.setattr(preflight, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert run_gres.main([*words, "--do_train", "--report_to", name, "--output_dir", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    check_reporters(["tensorboard"])


def stand_in_for_the_hub(monkeypatch, answer):
    def whoami(self):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(preflight.HfApi, "whoami", whoami)
    monkeypatch.setattr(preflight.constants, "HF_HUB_OFFLINE", False)


ME = {"name": "me", "orgs": [{"name": "we"}], "auth": {"accessToken": {"role": "write"}}}


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        (OSError("no such host"), {}, "the Hub cannot be reached or does not know the token .no such host."),
        ({**ME, "auth": {"accessToken": {"role": "read"}}}, {}, "the token may only read"),
        (ME, {"hub_model_id": "they/model"}, "me cannot write to they/model; give a name below me, we"),
        (ME, {"hub_adapter_id": "they/lora"}, "me cannot write to they/lora"),
        (ME, {"hub_model_id": "we/model", "hub_adapter_id": "me/lora"}, None),
        (ME, {}, None),
    ],
)
def test_the_hub_is_asked_first(tmp_path, monkeypatch, answer, options, message):
    stand_in_for_the_hub(monkeypatch, answer)
    args = arguments(tmp_path, push_to_hub=True, **options)
    if message is None:
        return check_hub(args)
    with pytest.raises(ValueError, match=message):
        check_hub(args)


def test_offline_nothing_can_be_pushed(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        check_hub(arguments(tmp_path, push_to_hub=True))


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    """A layer of 1,000 weights: the model takes 4,000 bytes, a checkpoint 12,000 with AdamW's moments."""
    layer = torch.nn.Linear(1000, 1, bias=False)
    args = arguments(tmp_path, save_strategy="steps", save_total_limit=2)
    for free, is_enough in ((40_000, True), (39_999, False)):
        monkeypatch.setattr(training.shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        if is_enough:
            training.check_disk(layer, args)
        else:
            with pytest.raises(ValueError, match="3 checkpoints and the model take 0.00 GB"):
                training.check_disk(layer, args)
    training.check_disk(layer, arguments(tmp_path, save_strategy="no"))


def test_the_disk_is_looked_at_before_the_first_evaluation(words, tmp_path, monkeypatch, capsys):
    usage = types.SimpleNamespace(free=100_000)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda path: usage)
    assert run_gres.main([*words, "--do_train", "--do_eval", "--output_dir", str(tmp_path / "run")]) == 1
    assert "GB are free; make room" in capsys.readouterr().err
    assert not [*(tmp_path / "run").glob("rows_*"), *(tmp_path / "run").glob("results*")]


def test_deepspeed_writes_more(tmp_path):
    layer, args = torch.nn.Linear(1000, 1, bias=False), arguments(tmp_path, save_strategy="no")
    assert training.checkpoint_bytes(layer, args) == 12_000
    args.deepspeed_plugin = types.SimpleNamespace(zero_stage=3)
    assert (
        training.checkpoint_bytes(layer, args) == 20_000
    )  # float32 weights for AdamW, and the model in its own format


def test_conversations_longer_than_the_context_end_the_run_before_the_step(words, model_dir, tmp_path, capsys, caplog):
    """And max_length cuts them. The image of the small model takes 16 positions."""
    short = shutil.copytree(model_dir, tmp_path / "short")
    config = (short / "config.json").read_text(encoding="utf-8")
    (short / "config.json").write_text(
        config.replace('"max_position_embeddings": 1024', '"max_position_embeddings": 90')
    )
    more = ["--model", str(short), "--do_train", "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert run_gres.main([*words, *more]) == 1
    error = capsys.readouterr().err
    assert "tokens with its image, but the model has 90 positions" in error and "max_length=90 cuts" in error
    assert "one of them would end the run" in caplog.text
    assert run_gres.main([*words, *more[:-1], str(tmp_path / "cut"), "--max_length", "90"]) == 0


def test_an_output_folder_that_is_a_file_is_one_line(words, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    assert run_gres.main([*words, "--do_eval", "--output_dir", str(tmp_path / "run")]) == 1
    assert f"run_gres.py: {tmp_path / 'run'}: File exists: a file is in the way" in capsys.readouterr().err
    assert run_gres.main([*words, "--do_eval", "--output_dir", str(tmp_path / "run" / "in it")]) == 1
    assert "a file is in the way" in capsys.readouterr().err


def test_what_ends_a_run_is_one_line_that_says_what_is_whole(tmp_path):
    assert "Interrupted. Nothing was finished; the same command begins again." == explain(
        KeyboardInterrupt(), tmp_path
    )
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')
    full = explain(OSError(errno.ENOSPC, "No space left on device", "a/model.safetensors"), tmp_path)
    assert full == (
        "a/model.safetensors: No space left on device: make room, or give an --output_dir on another disk. "
        f"{tmp_path / 'checkpoint-4'} is complete; the same command goes on from there."
    )
    assert "Read-only file system: give an --output_dir that can be written" in explain(
        OSError(errno.EROFS, "Read-only file system", "x"), tmp_path
    )
    assert "--per_device_train_batch_size" in explain(torch.OutOfMemoryError("CUDA out of memory\n..."), tmp_path)
    (tmp_path / "README.md").write_text("")
    assert "The trained model" in explain(KeyboardInterrupt(), tmp_path)
    assert explain(ValueError("a\nb"), tmp_path) == "a b"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_one_line(words, tmp_path, capsys, name):
    run = tmp_path / "run"
    command = [*words, "--do_train", "--train_language_model", "frozen", "--output_dir", str(run)]
    assert run_gres.main([*command, "--max_steps", "2"]) == 0
    path = run / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    assert run_gres.main([*command, "--max_steps", "3"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"run_gres.py: {run / 'checkpoint-2'} is damaged") and "checkpoint-1" in message
    shutil.rmtree(run / "checkpoint-2")  # as the message says
    assert run_gres.main([*command, "--max_steps", "3"]) == 0


def test_interrupted_in_training_it_is_one_line(words, tmp_path, capsys, monkeypatch):
    from trainers.trainer import GsvaTrainer

    step = GsvaTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(GsvaTrainer, "training_step", interrupted)
    run = tmp_path / "run"
    assert run_gres.main([*words, "--do_train", "--max_steps", "3", "--output_dir", str(run)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        message
        == f"run_gres.py: Interrupted. {run / 'checkpoint-1'} is complete; the same command goes on from there."
    )


def test_predictions_before_a_broken_image_are_kept(words, tmp_path, make_picture, capsys):
    """Also with names that are as long as can be, or that no terminal can print."""
    long, odd = tmp_path / f"{'n' * 251}.png", os.fsdecode(bytes(tmp_path) + b"/\xff.png")
    for path in (long, odd):
        make_picture().save(path, format="PNG")
    (tmp_path / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    images = ["--image", str(long), odd, str(tmp_path / "broken.png")]
    assert run_gres.main([*words, "--do_predict", *images, "--expressions", "a", "--output_dir", str(out)]) == 1
    assert "broken.png" in capsys.readouterr().err.splitlines()[-1]
    names = [entry["image"] for entry in json.loads((out / "predictions.json").read_text())]
    assert names == [str(long), odd.encode(errors="backslashreplace").decode()]
    assert len(list(out.glob("*.png"))) == 2
    with Image.open(next(out.glob("000_*.png"))) as overlay:
        assert overlay.width > 0


def test_a_push_that_fails_says_how_to_go_on(tmp_path, monkeypatch):
    from trainers import publishing

    def create_repo(self, *args, **kwargs):
        raise OSError("the network is gone")

    monkeypatch.setattr(publishing.HfApi, "create_repo", create_repo)
    args = arguments(tmp_path, hub_model_id="me/model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"could not be pushed to me/model .the network is gone.. It is complete: run the same"
    ):
        publishing.push(args)


def test_an_unexpected_failure_shows_its_traceback_once(tmp_path):
    program = "import run_gres, sys; run_gres.run = lambda *a: 1 / 0; sys.exit(run_gres.main(['--use_cpu']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    assert "ZeroDivisionError" in done.stderr and "please report" in done.stderr.splitlines()[-1]


def test_errors_of_safetensors_are_expected():
    assert explain(SafetensorError("header too large"), None) == "header too large"


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    """As with --ddp_backend gloo, without --use_cpu, on a machine without a card: accelerate would send nothing between them."""
    state = types.SimpleNamespace(num_processes=2, distributed_type=DistributedType.NO, is_main_process=True)
    monkeypatch.setattr("trainers.processes.PartialState", lambda: state)
    with pytest.raises(
        ValueError, match="2 processes were started, but accelerate .*--use_cpu and without --ddp_backend"
    ):
        check_before_run(arguments(tmp_path))
    assert not (tmp_path / "run").exists()
