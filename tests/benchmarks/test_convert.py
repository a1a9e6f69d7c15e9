"""The conversion benchmark: the shapes of its checkpoint, the peak memory of a process, the names of benchmarks."""

import subprocess
import sys

import pytest
import torch
from paths import ROOT

from benchmarks.convert import RANK, VOCABULARY, checkpoint_shapes, run_and_watch
from convert_checkpoint import to_ours


def test_the_7b_shape_is_the_published_one():
    shapes, config = checkpoint_shapes("7b")
    assert config["hidden_size"] == 4096 and config["num_hidden_layers"] == 32
    assert shapes["base_model.model.model.embed_tokens.weight"] == (VOCABULARY + 4, 4096)
    assert shapes["base_model.model.model.layers.31.self_attn.v_proj.lora_B.default.weight"] == (4096, RANK)
    plain = [name.removeprefix("base_model.model.") for name in shapes if "lora_" not in name]
    assert len({to_ours(name) for name in plain} - {None}) == len(plain)
    # LLaMA 7B has 6.74, SAM ViT-H 0.64, CLIP ViT-L/14's tower 0.30 thousand million parameters.
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == pytest.approx(7.71e9, rel=0.01)


def test_peak_of_a_process_is_its_own():
    held = bytearray(300 * 2**20)  # the parent's memory must not count
    code = "import time; x = bytearray(b'1' * 100 * 2**20); time.sleep(0.5)"
    assert 100 * 2**20 < run_and_watch([sys.executable, "-c", code]) < len(held)
    with pytest.raises(subprocess.CalledProcessError):
        run_and_watch([sys.executable, "-c", "import time; time.sleep(0.2); raise SystemExit(3)"])


def test_names_are_dispatched():
    run = subprocess.run([sys.executable, "-m", "benchmarks"], check=False, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode and "convert" in run.stderr
