"""Written models: types, shards, and LoRA merged or kept."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conversions import assert_equal, expected, load, peft_names, run, sample_inputs
from original_checkpoint import RANK
from safetensors.torch import load_file

from conversion import to_ours


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_of_the_result(dtype, original, tmp_path):
    torch.save({key: value.bfloat16() for key, value in peft_names(original).items()}, tmp_path / "gsva.bin")
    ours = run(original, tmp_path / "gsva.bin", tmp_path / "out", "--dtype", dtype)
    assert {value.dtype for value in ours.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert_equal(ours, expected(original), 5e-2)


def test_alpha_is_settable_and_merging_is_exact(original, tmp_path):
    torch.save(peft_names(original), tmp_path / "gsva.bin")
    ours = run(original, tmp_path / "gsva.bin", tmp_path / "out", "--lora_alpha", "4")
    full, lora = (torch.load(original / f"{name}.pt", weights_only=True) for name in ("full", "lora"))
    module = "model.layers.1.self_attn.v_proj"
    a, b = (lora[f"{module}.lora_{side}.default.weight"].double() for side in "AB")
    wanted = full[f"{module}.weight"].double() + 4 / RANK * b @ a
    torch.testing.assert_close(ours[to_ours(f"{module}.weight")].double(), wanted, atol=1e-7, rtol=1e-6)


def test_kept_lora_gives_the_outputs_of_merged_lora(original, tmp_path):
    from peft import PeftModel

    from trainers.arguments import ModelArguments
    from trainers.loading import load_model

    torch.save(peft_names(original), tmp_path / "gsva.bin")
    run(original, tmp_path / "gsva.bin", tmp_path / "merged")
    run(original, tmp_path / "gsva.bin", tmp_path / "kept", "--keep_lora")
    merged, processor = load(tmp_path / "merged")
    base, _ = load(tmp_path / "kept")
    inputs = sample_inputs(processor)
    plain = base.segment(**inputs).scores[0]
    kept = PeftModel.from_pretrained(base, tmp_path / "kept/adapter").get_base_model()
    ours, wanted = kept.segment(**inputs), merged.segment(**inputs)
    torch.testing.assert_close(ours.scores[0], wanted.scores[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.mask_logits[0], wanted.mask_logits[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, wanted.scores[0], atol=1e-3), (
        "the adapter must matter for this test to mean anything"
    )
    # As its card says, and by the command line's own road: from the directory, from the adapter, and under another name.
    assert 'PeftModel.from_pretrained(model, "kept", subfolder="adapter")' in (tmp_path / "kept/README.md").read_text()
    again, _ = load(tmp_path / "kept")
    models = [PeftModel.from_pretrained(again, str(tmp_path / "kept"), subfolder="adapter").merge_and_unload()]
    (tmp_path / "kept").rename(tmp_path / "moved")
    models += [load_model(ModelArguments(model=str(tmp_path / name)))[1] for name in ("moved", "moved/adapter")]
    for model in models:
        torch.testing.assert_close(model.eval().segment(**inputs).scores[0], wanted.scores[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="keeps its LoRA in"):
        load_model(ModelArguments(model=str(tmp_path / "moved"), quantization="8bit"))


def test_float16_overflow_and_existing_output_are_refused(original, tmp_path):
    state = peft_names(original)
    state["base_model.model.model.norm.weight"] = torch.full((32,), 1e5)
    torch.save(state, tmp_path / "gsva.bin")
    with pytest.raises(SystemExit, match="65504"):
        run(original, tmp_path / "gsva.bin", tmp_path / "out", "--dtype", "float16")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    with pytest.raises(SystemExit, match="exists already and is not overwritten"):
        run(original, tmp_path / "gsva.bin", tmp_path / "out")
    assert (tmp_path / "out/mine").read_text() == "kept"


def test_shards_have_an_index_and_the_asked_size(original, tmp_path):
    ours = run(original, original / "full.pt", tmp_path / "out", "--max_shard_size", "60KB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(ours) and len(set(index["weight_map"].values())) > 3
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "out" / file)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 60_000
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in ours.values())
    model = load(tmp_path / "out")[0]
    weights = {model.saved_name(key): value for key, value in model.state_dict().items()}
    assert_equal({key: value for key, value in weights.items() if key in ours}, ours, 0.0)
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "every file has the same, usual permissions"


def test_outputs_that_cannot_be_written_are_refused_before_anything_is_read(original, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    monkeypatch.setattr("conversion.reading.WeightFile.tensors", lambda self: pytest.fail("read"))
    for output, message in {
        tmp_path / "file": "exists already and is not overwritten",
        tmp_path / "link": "exists already and is not overwritten",
        tmp_path / "file/in/it": r"cannot be written \(Not a directory\)",
        tmp_path / ("n" * 256): r"cannot be written \(File name too long\)",
        Path("/dev/full"): "exists already and is not overwritten",
    }.items():
        with pytest.raises(SystemExit, match=message):
            run(original, original / "full.pt", output)
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode)
    )  # as a read-only disk
    with pytest.raises(SystemExit, match=f"{tmp_path} is read-only"):
        run(original, original / "full.pt", tmp_path / "new/out")
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_a_name_of_255_bytes_is_written(original, tmp_path):
    name = "gsva-" + "x" * 250
    assert_equal(run(original, original / "full.pt", tmp_path / name), expected(original, merged=False))


def test_a_full_disk_is_noticed_before_the_work(original, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    torch.save(peft_names(original), tmp_path / "gsva.bin")
    with pytest.raises(SystemExit, match=r"out needs 0.00 GB and .* has 0.00 GB free: nothing was written"):
        run(original, tmp_path / "gsva.bin", tmp_path / "out")
    run(original, tmp_path / "gsva.bin", tmp_path / "half", "--dtype", "bfloat16")  # 252,056 bytes


def test_the_same_checkpoint_gives_the_same_bytes(original, tmp_path):
    torch.save(peft_names(original), tmp_path / "gsva.bin")
    folders = [tmp_path / name / "gsva" for name in "ab"]
    for folder in folders:
        run(original, tmp_path / "gsva.bin", folder, "--keep_lora")
    files = [{path.relative_to(f): path.read_bytes() for path in f.rglob("*") if path.is_file()} for f in folders]
    assert files[0] == files[1] and Path("adapter/adapter_config.json") in files[0]
