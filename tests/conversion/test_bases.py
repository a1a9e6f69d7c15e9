"""Bases: deltas, the start of training, and what they fill in."""

import re
import shutil

import pytest
import torch
from conversions import FROZEN, assert_equal, expected, load, peft_names, run, sample_inputs, start
from safetensors.torch import load_file

from conversion import to_ours
from convert_checkpoint import main


def test_trained_parameters_alone_take_the_rest_from_the_bases(original, tmp_path):
    state = {key: value for key, value in peft_names(original).items()
             if "lora_" in key or not key.removeprefix("base_model.model.").startswith(FROZEN)}  # fmt: skip
    torch.save(state, tmp_path / "trained.bin")
    # embed_tokens, lm_head and the mask decoder of the bases are half of the checkpoint's: it must win.
    ours = run(original, tmp_path / "trained.bin", tmp_path / "out", "--sam", str(original / "sam.pth"))
    assert_equal(ours, expected(original))


def test_delta_is_added_and_refused_as_a_base(original, tmp_path, capsys):
    llava = torch.load(original / "llava/pytorch_model.bin", weights_only=True)
    llama = {key: torch.randn_like(value) if "norm" not in key else value - 0.01 for key, value in llava.items()
             if "mm_projector" not in key}  # fmt: skip
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        llama[key] = llama[key][:318].clone()  # LLaVA added two tokens
    delta = {key: value.clone() for key, value in llava.items()}
    for key, value in llama.items():
        delta[key][tuple(slice(0, n) for n in value.shape)] -= value
    for name, state in (("llama", llama), ("delta", delta)):
        (tmp_path / name).mkdir()
        for file in ("config.json", "tokenizer.model", "tokenizer_config.json"):
            (tmp_path / name / file).write_bytes((original / "llava" / file).read_bytes())
        torch.save(state, tmp_path / name / "pytorch_model.bin")
    torch.save({key: value for key, value in peft_names(original).items()
                if "lora_" in key or not key.removeprefix("base_model.model.").startswith(FROZEN)}, tmp_path / "gsva.bin")  # fmt: skip
    rest = [
        "--checkpoint",
        str(tmp_path / "gsva.bin"),
        "--clip",
        str(original / "clip"),
        "--sam",
        str(original / "sam.pth"),
    ]
    main(
        [
            *rest,
            "--output",
            str(tmp_path / "out"),
            "--llama",
            str(tmp_path / "llama"),
            "--llava_delta",
            str(tmp_path / "delta"),
        ]
    )
    assert_equal(load_file(tmp_path / "out/model.safetensors"), expected(original), 1e-5)

    with pytest.raises(SystemExit, match="--llama LLAMA_DIR --llava_delta"):
        main([*rest, "--output", str(tmp_path / "refused"), "--llava", str(tmp_path / "delta")])
    with pytest.raises(SystemExit, match="--llama together with --llava_delta"):
        main([*rest, "--output", str(tmp_path / "refused"), "--llava_delta", str(tmp_path / "delta")])


def test_training_starts_from_the_bases_alone(original, tmp_path, capsys):
    """The bases' tensors as they are; what GSVA adds is drawn as the original draws it, the same for the same seed."""
    ours = start(original, tmp_path / "out")
    assert "'drawn at random': 6" in capsys.readouterr().out
    llava, clip, sam = (torch.load(original / file, weights_only=True)
                        for file in ("llava/pytorch_model.bin", "clip/pytorch_model.bin", "sam.pth"))  # fmt: skip
    bases = {to_ours(key): value for key, value in llava.items() if "inv_freq" not in key}
    bases |= {to_ours(f"model.visual_model.{key}"): value for key, value in sam.items()}
    bases |= {to_ours(f"model.vision_tower.vision_tower.{key}"): value for key, value in clip.items()
              if key.startswith("vision_model") and "position_ids" not in key}  # fmt: skip
    made = {name for name in ours if name.startswith("mask_projector.")}
    assert set(ours) == set(bases) | made and len(made) == 4
    for name, value in bases.items():
        assert torch.equal(ours[name][: len(value)], value), name  # the embedding and the head have four rows more
    grown = [ours[name] for name in ("model.language_model.embed_tokens.weight", "lm_head.weight")]
    assert [rows.shape for rows in grown] == [(324, 32)] * 2
    added = torch.cat([rows[320:] for rows in grown])
    assert added.std() == pytest.approx(0.02, rel=0.2) and abs(added.mean()) < 0.005  # LlamaConfig.initializer_range
    assert len(added.unique()) == added.numel()
    for name in made:  # torch.nn.Linear(32, ...)
        assert 0.8 * 32**-0.5 < ours[name].abs().max() <= 32**-0.5, name
    again, other = start(original, tmp_path / "again"), start(original, tmp_path / "other", "--seed", "1")
    assert all(torch.equal(again[name], value) for name, value in ours.items())
    assert {name for name, value in ours.items() if not torch.equal(other[name], value)} == {
        "model.language_model.embed_tokens.weight", "lm_head.weight", *made}  # fmt: skip
    model, processor = load(tmp_path / "out")
    assert model.segment(**sample_inputs(processor)).scores[0].isfinite().all()
    assert "not learned to segment" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("change, message", [
    (lambda words, base: words.remove("--sam"), r"every part comes from an option.*pos_embed\*: pass it with --sam"),
    (lambda words, base: words.remove("--clip"), r"vision_model\.\*: pass it with --clip"),
    (lambda words, base: words.remove("--llava"), r"embed_tokens\.\*: pass it with --llava \(or"),
    (lambda words, base: (base / "added_tokens.json").write_text('{"[PAD]": 320}'), r"320 rows, and its tokenizer 321 tokens"),
    (lambda words, base: (base / "pytorch_model.bin").unlink(), r"no \.bin"),
])  # fmt: skip
def test_a_start_that_is_not_whole_is_refused(change, message, original, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(original / "llava", base)
    given = {"--llava": base, "--clip": original / "clip", "--sam": original / "sam.pth"}
    options = list(given)
    change(options, base)
    with pytest.raises(SystemExit) as error:
        main(["--output", str(tmp_path / "out"), *(str(word) for name in options for word in (name, given[name]))])
    assert re.search(message, str(error.value), re.DOTALL), error.value
    assert not (tmp_path / "out").exists()


def test_what_a_trained_checkpoint_lacks_is_named_with_its_option(original, tmp_path):
    state = {key: value for key, value in peft_names(original).items()
             if not key.removeprefix("base_model.model.").startswith(FROZEN)}  # fmt: skip
    torch.save(state, tmp_path / "trained.bin")
    with pytest.raises(SystemExit) as error:
        main(["--checkpoint", str(tmp_path / "trained.bin"), "--output", str(tmp_path / "out")])
    for words in ("only the trained parameters", "--llava", "--clip", "--sam"):
        assert words in str(error.value)
    with pytest.raises(SystemExit, match="not its weights, which the checkpoint has"):
        main(
            [
                "--checkpoint",
                str(original / "full.pt"),
                "--output",
                str(tmp_path / "out"),
                "--clip",
                str(original / "clip"),
            ]
        )
    with pytest.raises(SystemExit, match="pass --clip DIR"):
        main(
            [
                "--checkpoint",
                str(original / "full.pt"),
                "--output",
                str(tmp_path / "out"),
                "--llava",
                str(original / "llava"),
            ]
        )
