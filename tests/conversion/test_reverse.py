"""There and back: the original's file again."""

import json

import torch
from conversions import load, peft_names, run
from original_checkpoint import RANK

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
