"""--reverse gives the original's file again."""

import json

import pytest
import torch
from conversions import load, peft_names, run
from original_checkpoint import RANK
from safetensors.torch import load_file, save_file

from convert_checkpoint import main


def test_reverse_gives_the_original_back(original, tmp_path, capsys):
    torch.save(peft_names(original), tmp_path / "gsva.bin")
    run(original, original / "full.pt", tmp_path / "plain", "--max_shard_size", "100KB")
    run(original, tmp_path / "gsva.bin", tmp_path / "kept", "--keep_lora")
    load(tmp_path / "plain")[0].save_pretrained(tmp_path / "saved")  # writes CLIP's names of old
    full = torch.load(original / "full.pt", weights_only=True)
    wanted = {"plain": full, "saved": full, "kept": peft_names(original)}
    for name, state in wanted.items():
        main(["--checkpoint", str(tmp_path / name), "--reverse", "--output", str(tmp_path / f"{name}.bin")])
        back = torch.load(tmp_path / f"{name}.bin", weights_only=True)
        assert sorted(back) == sorted(state)
        assert all(torch.equal(back[key], value) for key, value in state.items())
    main(
        ["--checkpoint", str(tmp_path / "plain"), "--reverse", "--peft_names", "--output", str(tmp_path / "peft.bin")]
    )
    assert set(torch.load(tmp_path / "peft.bin", weights_only=True)) == {f"base_model.model.{key}" for key in full}
    # What training leaves in adapter/ names its base, and is merged into the weights already.
    config = tmp_path / "kept/adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "the base"}))
    main(["--checkpoint", str(tmp_path / "kept"), "--reverse", "--output", str(tmp_path / "merged.bin")])
    assert set(torch.load(tmp_path / "merged.bin", weights_only=True)) == set(full)
    assert not list(tmp_path.glob(".*.part"))
    said = capsys.readouterr().out
    assert f"--lora_r {RANK} --lora_alpha 16" in said and "load with: --lora_r 0" in said


def contents_of(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_reverse_overwrites_nothing(original, tmp_path):
    run(original, original / "full.pt", tmp_path / "ours")
    (tmp_path / "mine.bin").write_bytes(b"mine")
    (tmp_path / "link.bin").symlink_to(tmp_path / "mine.bin")
    before = contents_of(tmp_path)
    weights = tmp_path / "ours/model.safetensors"
    for output in (weights, tmp_path / "mine.bin", tmp_path / "link.bin", "/dev/full", "/dev/null"):
        with pytest.raises(SystemExit, match=f"{output} exists already and is not overwritten"):
            main(["--checkpoint", str(tmp_path / "ours"), "--reverse", "--output", str(output)])
    with pytest.raises(SystemExit, match="ours is a directory"):
        main(["--checkpoint", str(tmp_path / "ours"), "--reverse", "--output", str(tmp_path / "ours")])
    assert contents_of(tmp_path) == before


def test_the_same_model_gives_the_same_bytes(original, tmp_path):
    run(original, original / "full.pt", tmp_path / "ours")
    for name in ("a.bin", "b.bin"):
        main(["--checkpoint", str(tmp_path / "ours"), "--reverse", "--output", str(tmp_path / name)])
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("lm_head.weight"), "lacks 1 parameters of the model: lm_head.weight"),
    (lambda state: state["lm_head.weight"].fill_(float("nan")), "numbers of lm_head.weight are not finite"),
    (lambda state: state.update({"mystery.weight": torch.ones(1)}), "no place for: mystery.weight"),
])  # fmt: skip
def test_directories_with_holes_are_not_turned_back(change, message, original, tmp_path):
    state = run(original, original / "full.pt", tmp_path / "ours")
    change(state)
    save_file(state, tmp_path / "ours/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=message):
        main(["--checkpoint", str(tmp_path / "ours"), "--reverse", "--output", str(tmp_path / "back.bin")])
    assert not (tmp_path / "back.bin").exists()


def test_adapters_with_holes_are_not_turned_back(original, tmp_path):
    torch.save(peft_names(original), tmp_path / "gsva.bin")
    run(original, tmp_path / "gsva.bin", tmp_path / "ours", "--keep_lora")
    file = tmp_path / "ours/adapter/adapter_model.safetensors"
    whole = load_file(file)
    for word, message in (
        ("layers.1.", "lacks model.layers.1.self_attn"),
        ("layers.1.self_attn.q_proj.lora_B", "lora_A without"),
    ):
        save_file({key: value for key, value in whole.items() if word not in key}, file)
        with pytest.raises(SystemExit, match=message):
            main(["--checkpoint", str(tmp_path / "ours"), "--reverse", "--output", str(tmp_path / "back.bin")])


def test_only_directories_of_ours_are_turned_back(original, tmp_path):
    for path, words in (
        (original / "full.pt", "is GSVA in the original's layout"),
        (original / "llava", "is LLaVA or LLaMA"),
    ):
        with pytest.raises(SystemExit, match=words):
            main(["--checkpoint", str(path), "--reverse", "--output", str(tmp_path / "back.bin")])
