"""Training with DeepSpeed as it is, on two CPU processes: losses, checkpoints, continuation, consolidated weights.

`make deepspeed` installs the extra of that name and runs these tests. DeepSpeed compiles an operation once, which takes
minutes; TORCH_EXTENSIONS_DIR names the folder for it. A killed compilation leaves a lock there that stops all later ones.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file

pytestmark = pytest.mark.deepspeed
MODEL = str(ROOT / "assets" / "tiny_gsva")
WAYS = {"lora": (), "full": ("--train_language_model", "full")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("cache")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def launched(environment, tmp_path_factory):
    """Train four steps by a strategy and return the output folder; each combination is run once."""
    folder = tmp_path_factory.mktemp("runs")

    def launch(strategy, way, fresh=True):
        out = folder / f"{strategy}-{way}"
        if fresh and out.exists():
            return out
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{strategy}.yaml",
                   "--num_processes", "2", "--main_process_port", "0", "run_gres.py", "--model", MODEL, "--dataset_options",
                   '{"size": 16}', "--do_train", "--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "2",
                   "--learning_rate", "1e-3", "--threads", "1", "--logging_steps", "1", "--lora_dropout", "0",
                   "--disable_tqdm", "true", "--output_dir", str(out), *WAYS[way]]  # fmt: skip
        # With use_cpu accelerate trains data parallel whatever the config says.
        command += ["--use_cpu"] if strategy == "ddp" else ["--ddp_backend", "gloo"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    return launch


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "log_history.json").read_text()) if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("strategy", "way"), [("zero3", "lora"), ("zero3", "full"), ("zero2", "lora")])
def test_losses_and_weights_are_those_of_data_parallel(launched, strategy, way):
    sharded, plain = launched(strategy, way), launched("ddp", way)
    assert len(losses(sharded)) == 4 and losses(sharded) == pytest.approx(losses(plain), rel=1e-5)
    found, expected, start = weights(sharded), weights(plain), weights(Path(MODEL))
    assert found.keys() == expected.keys()
    moved = max(float((expected[name].float() - start[name].float()).abs().max()) for name in expected)
    worst = max(float((found[name].float() - expected[name].float()).abs().max()) for name in expected)
    assert moved > 1e-3 and worst < 0.05 * moved
    assert (sharded / "adapter").exists() == (way == "lora")
    assert list((sharded / "checkpoint-4").glob("global_step4/*model_states.pt"))  # DeepSpeed wrote it


def test_killed_and_resumed_with_zero3_it_ends_with_the_same_weights(launched):
    out = launched("zero3", "lora")
    expected = weights(out)
    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    launched("zero3", "lora", fresh=False)
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", [[], ["--safe_serialization"], ["--safe_serialization", "--max_shard_size", "2MB"]])
def test_consolidated_checkpoints_are_the_end_of_training(launched, environment, tmp_path, way, form):
    out, whole = launched("zero3", way), tmp_path / "whole"
    script = out / "checkpoint-4" / "zero_to_fp32.py"
    command = [sys.executable, str(script), str(script.parent), str(whole), *form]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=200)
    command = [sys.executable, "run_gres.py", "--model", MODEL, "--use_cpu", *WAYS[way], "--consolidated", str(whole)]
    command += ["--output_dir", str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=200)
    expected = weights(out)
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)
