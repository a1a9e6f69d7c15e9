"""Files, indices and directories of checkpoints, through the real command line."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from conversions import FORMS, FROZEN, assert_equal, expected, peft_names, run, write_form
from safetensors.torch import save_file

from conversion import reading
from convert_checkpoint import main


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


def contents(checkpoint: bytes, safetensors: bytes) -> dict[str, tuple[bytes, str]]:
    """Files that came instead of weights, and words of the message about each."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    return {
        "lfs.bin": (pointer, "is a Git LFS pointer.*git lfs pull"),
        "lfs.safetensors": (pointer, "is a Git LFS pointer"),
        "page.bin": (b"\n<!DOCTYPE html><html><title>Log in</title>", "is a web page"),
        "page.safetensors": (b"<html><body>404", "is a web page"),
        "s3.bin": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
        "error.bin": (b"Entry not found", "is text, not weights .*Entry not found"),
        "error.safetensors": (b'{"error": "Repository not found"}', "is text, not weights"),
        "empty.bin": (b"", "is empty"),
        "empty.safetensors": (b"", "is empty"),
        "zeros.bin": (bytes(9000), "zeros alone"),
        "cut.bin": (checkpoint[:-1000], f"is cut off after {len(checkpoint) - 1000:,} bytes"),
        "begun.bin": (checkpoint[:100], "is cut off after 100 bytes"),
        "cut.safetensors": (safetensors[:-1], f"has {len(safetensors) - 1:,} of {len(safetensors):,} bytes"),
        "begun.safetensors": (safetensors[:300], "is cut off: it has 300 of"),
        "llama.bin": (b"GGUF\3\0\0\0", "GGUF file of llama.cpp"),
        "gsva.bin": (b"\x1f\x8b\x08\0", "compressed by gzip"),
    }


@pytest.mark.parametrize("name", contents(b"", b""))
def test_files_that_are_no_weights_say_what_they_are(name, original, tmp_path):
    save_file({"lm_head.weight": torch.ones(320, 32)}, tmp_path / "whole.safetensors")
    content, message = contents((original / "full.pt").read_bytes(), (tmp_path / "whole.safetensors").read_bytes())[
        name
    ]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message) as error:
        run(original, tmp_path / name, tmp_path / "out")
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_content_decides_the_format_not_the_name(original, tmp_path):
    full = torch.load(original / "full.pt", weights_only=True)
    torch.save(full, tmp_path / "gsva.safetensors")
    save_file({key: value.contiguous() for key, value in full.items()}, tmp_path / "gsva.bin")
    for name in ("gsva.safetensors", "gsva.bin"):
        assert_equal(run(original, tmp_path / name, tmp_path / f"from {name}"), expected(original, merged=False), 0.0)


@pytest.mark.parametrize("index", ["none", "whole", "without the lost shard"])
def test_a_lost_shard_is_named_though_bases_could_fill_it(index, original, tmp_path):
    """Whatever the shards hold: the names count them."""
    state = peft_names(original)
    frozen = [key for key in state if key.removeprefix("base_model.model.").startswith(FROZEN) and "lora_" not in key]
    parts = [frozen[0::3], [key for key in state if key not in frozen], frozen[1::3], frozen[2::3]]
    files = {f"pytorch_model-0000{i + 1}-of-00004.bin": keys for i, keys in enumerate(parts)}
    for file, keys in files.items():
        torch.save({key: state[key] for key in keys}, tmp_path / file)
    if index != "none":
        kept = files if index == "whole" else {f: keys for f, keys in files.items() if "00003" not in f}
        weight_map = {key: file for file, keys in kept.items() for key in keys}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    bases = ("--sam", str(original / "sam.pth"))
    if index != "without the lost shard":
        assert_equal(run(original, tmp_path, tmp_path / "whole", *bases), expected(original))
    (tmp_path / "pytorch_model-00003-of-00004.bin").unlink()
    with pytest.raises(SystemExit, match="pytorch_model-00003-of-00004.bin"):
        run(original, tmp_path, tmp_path / "out", *bases)
    with pytest.raises(SystemExit, match="is one of 4 shards"):
        run(original, tmp_path / "pytorch_model-00002-of-00004.bin", tmp_path / "out", *bases)


def test_keys_of_the_index_that_its_files_lack_are_named(original, tmp_path):
    state = peft_names(original)
    torch.save(state, tmp_path / "a.bin")
    weight_map = dict.fromkeys([*state, "base_model.model.model.gone.weight"], "a.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SystemExit, match="a.bin lacks base_model.model.model.gone.weight, which its index lists"):
        run(original, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("total, names, missing", [
    (3, ["model-00001-of-00003.bin", "model-00003-of-00003.bin"], "model-00002-of-00003.bin is missing"),
    (3, ["part_0-of-3.pt", "part_2-of-3.pt"], "part_1-of-3.pt is missing"),
    (4, ["w-00002-of-00004.safetensors"], "w-00001-of-00004.safetensors, w-00003-of-00004.safetensors, w-00004"),
])  # fmt: skip
def test_shards_are_counted_from_one_or_from_zero(total, names, missing, tmp_path):
    with pytest.raises(FileNotFoundError, match=missing):
        reading.require_all_shards([tmp_path / name for name in names])
    for first in (0, 1):
        whole = [tmp_path / f"m-{number:05d}-of-{total:05d}.bin" for number in range(first, first + total)]
        assert reading.require_all_shards(whole) == whole


def test_a_folder_of_deepspeed_names_its_tool(original, tmp_path):
    (tmp_path / "global_step10").mkdir()
    (tmp_path / "zero_to_fp32.py").write_text("")
    with pytest.raises(SystemExit, match="run its zero_to_fp32.py first"):
        run(original, tmp_path, tmp_path / "out")


WRAPPED = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "DeepSpeed": lambda key: f"_forward_module.module.{key}",
    "compiled layers": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
    "FSDP": lambda key: "_fsdp_wrapped_module." + key.replace(".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp."),
}  # fmt: skip


@pytest.mark.parametrize("library", WRAPPED)
def test_names_of_wrappers_are_read(library, original, tmp_path):
    torch.save({WRAPPED[library](key): value for key, value in peft_names(original).items()}, tmp_path / "gsva.bin")
    assert_equal(run(original, tmp_path / "gsva.bin", tmp_path / "out"), expected(original))


@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.0.self_attn.q_proj.lora_A.default.weight"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused(key, number, dtype, original, tmp_path):
    state = {name: value.to(dtype, copy=True) for name, value in peft_names(original).items()}
    state[f"base_model.model.{key}"].view(-1)[5] = number
    torch.save(state, tmp_path / "gsva.bin")
    with pytest.raises(SystemExit, match=rf"1 of \d+ numbers of base_model.model.{re.escape(key)} are not finite"):
        run(original, tmp_path / "gsva.bin", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["gsva.bin"]


def test_a_state_dict_is_read_whole(original, tmp_path):
    state = peft_names(original)
    names = sorted(state)
    for i in range(2):
        torch.save({key: state[key] for key in names[i::2]}, tmp_path / f"m-0000{i + 1}-of-00002.bin")
    back = reading.read_state_dict(tmp_path)
    assert sorted(back) == names and all(torch.equal(back[key], state[key]) for key in names)


def test_a_base_without_weights_may_have_their_index(original, tmp_path):
    """As a download of the small files alone leaves it: the checkpoint has all weights."""
    base = tmp_path / "base"
    shutil.copytree(original / "llava", base)
    (base / "pytorch_model.bin").unlink()
    weight_map = {"model.norm.weight": "pytorch_model-00001-of-00002.bin", "x": "pytorch_model-00002-of-00002.bin"}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    words = ["--checkpoint", original / "full.pt", "--llava", base, "--clip", original / "clip", "--output"]
    main([str(word) for word in (*words, tmp_path / "out")])
    torch.save({"model.norm.weight": torch.ones(32)}, base / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(SystemExit, match="pytorch_model-00002-of-00002.bin, which is not beside it"):
        main([str(word) for word in (*words, tmp_path / "again")])
