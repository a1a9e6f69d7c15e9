"""Files, indices and directories of checkpoints, through the real command line."""

import os
import pickle

import pytest
import torch
from conversions import FORMS, assert_equal, expected, peft_names, run, write_form
from safetensors.torch import save_file

from conversion import reading


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_full_checkpoint(form, original, tmp_path):
    checkpoint = write_form(form, original, tmp_path)
    ours = run(original, checkpoint, tmp_path / "out")
    assert_equal(ours, expected(original), 2e-2 if form == "float16" else 1e-6)
    assert {value.dtype for value in ours.values()} == {torch.float16 if form == "float16" else torch.float32}


def test_directory_with_an_index_and_checkpoint_without_lora(original, tmp_path):
    write_form("sharded with an index", original, tmp_path)
    assert_equal(run(original, tmp_path, tmp_path / "out"), expected(original))
    assert_equal(run(original, original / "full.pt", tmp_path / "plain"), expected(original, merged=False))


def test_several_checkpoints_in_a_directory_are_refused(original, tmp_path):
    for name in ("gsva-7b-pt.bin", "gsva-7b-ft.bin"):
        torch.save(peft_names(original), tmp_path / name)
    with pytest.raises(SystemExit, match=r"several checkpoints: gsva-7b-ft.bin and gsva-7b-pt.bin"):
        run(original, tmp_path, tmp_path / "out")


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused(original, tmp_path):
    torch.save({"a": torch.ones(1), "b": _Touch(tmp_path / "ran")}, tmp_path / "gsva.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"b": _Touch(tmp_path / "ran")}))
    for name in ("gsva.bin", "plain.bin"):
        with pytest.raises(SystemExit, match="weights_only=True"):
            run(original, tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_files_are_reopened_so_that_mapped_pages_are_given_back(original, tmp_path, monkeypatch):
    opened = []
    real = reading.safe_open
    monkeypatch.setattr(reading, "REOPEN_BYTES", 10_000)
    monkeypatch.setattr(reading, "safe_open", lambda path, kind: opened.append(path) or real(path, kind))
    state = torch.load(original / "full.pt", weights_only=True)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "full.safetensors")
    ours = run(original, tmp_path / "full.safetensors", tmp_path / "out")
    assert_equal(ours, expected(original, merged=False))
    assert opened.count(tmp_path / "full.safetensors") > 10


def test_pieces_of_larger_storages_are_read_as_they_lie(original, tmp_path):
    """A state dict may hold transposed tensors and parts of others; each is read from its own place in the file."""
    state = torch.load(original / "full.pt", weights_only=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    state[name] = state[name].t().contiguous().t()
    joined = torch.cat(
        [state["model.layers.0.self_attn.k_proj.weight"], state["model.layers.0.self_attn.v_proj.weight"]]
    )
    half = len(joined) // 2
    state |= {
        f"model.layers.0.self_attn.{k}_proj.weight": part for k, part in zip("kv", (joined[:half], joined[half:]))
    }
    torch.save(state, tmp_path / "gsva.bin")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for file in ("gsva.bin", "old.bin"):
        assert_equal(run(original, tmp_path / file, tmp_path / f"from {file}"), expected(original, merged=False))
