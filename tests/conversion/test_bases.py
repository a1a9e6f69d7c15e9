"""Bases: deltas, the start of training, and the parts that a base supplies."""

import json
import re
import shutil

import pytest
import tiny_directories
import torch
from conversions import FROZEN, assert_equal, expected, load, peft_names, run, sample_inputs, start
from safetensors.torch import load_file, save_file

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


SAM_MATRIX = "model.visual_model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
PEFT = "base_model.model."


def trained_parts(original) -> dict[str, torch.Tensor]:
    return {key: value for key, value in peft_names(original).items()
            if "lora_" in key or not key.removeprefix(PEFT).startswith(FROZEN)}  # fmt: skip


def without(state: dict, *words: str) -> dict:
    return {key: value for key, value in state.items() if not all(word in key for word in words)}


# What a checkpoint lacks that bases could fill in, by its form, and words of the message.
HOLES = {
    "a bias of a whole model": (peft_names, ["mask_decoder.output_upscaling.3.bias"], r"whole model\) has holes.*upscaling\.3\.bias"),
    "CLIP of a whole model": (peft_names, ["vision_tower"], r"39 that --clip supplies"),
    "SAM's encoder of a whole model": (peft_names, ["image_encoder"], r"51 that --sam supplies"),
    "the projector of a whole model": (peft_names, ["mm_projector"], r"2 that --llava \(or --llava_delta\) supplies"),
    "a layer of a whole model": (peft_names, ["model.layers.1.mlp"], r"3 that --llava .*model\.layers\.1\.mlp\.down_proj"),
    "the trained mask decoder": (trained_parts, ["mask_decoder"], r"trained parts only\) has holes.*120 that --sam supplies"),
    "half of the mask decoder": (trained_parts, ["mask_decoder.transformer"], r"82 that --sam supplies"),
    "the trained embedding": (trained_parts, ["embed_tokens"], r"embed_tokens\.weight of --llava has 320 rows"),
    "LoRA of a layer": (trained_parts, ["layers.1", "lora_"], r"lacks model\.layers\.1\.self_attn\.q_proj\.weight"),
    "LoRA of one weight": (trained_parts, ["layers.0.self_attn.v_proj.lora_"], r"lacks model\.layers\.0\.self_attn\.v_proj"),
    "one matrix of all weights": (trained_parts, ["lora_B"], r"lora_A without lora_B"),
    "LoRA of a layer of a whole model": (peft_names, ["layers.0", "lora_"], r"lacks model\.layers\.0\.self_attn\.q_proj"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOLES)
def test_bases_do_not_fill_holes(case, original, tmp_path):
    form, words, message = HOLES[case]
    state = form(original)
    holes = without(state, *words)
    assert len(holes) < len(state)
    torch.save(holes, tmp_path / "gsva.bin")
    with pytest.raises(SystemExit) as error:
        run(original, tmp_path / "gsva.bin", tmp_path / "out", "--sam", str(original / "sam.pth"))
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_whole_model_that_lost_a_part_is_not_told_to_take_it_from_a_base(original, tmp_path):
    torch.save(without(peft_names(original), "image_encoder"), tmp_path / "gsva.bin")
    with pytest.raises(
        SystemExit, match="not all parameters of a whole model, model.visual_model.image_encoder"
    ) as error:
        run(original, tmp_path / "gsva.bin", tmp_path / "out")
    assert "--sam" not in str(error.value)


def test_the_summary_lists_what_the_bases_fill_in(original, tmp_path, capsys):
    torch.save(trained_parts(original), tmp_path / "trained.bin")
    run(original, tmp_path / "trained.bin", tmp_path / "out", "--sam", str(original / "sam.pth"))
    run(original, original / "full.pt", tmp_path / "whole", "--sam", str(original / "sam.pth"))
    trained, whole = capsys.readouterr().out.split("Wrote ")[1:]
    assert "checkpoint: trained parts only" in trained and "checkpoint: whole model" in whole
    filled = {"--clip: CLIP's vision tower": 39, "--llava: projector": 2, "--llava: language model": 19,
              "--sam: SAM's positional matrix": 1, "--sam: SAM's image encoder": 51, "--sam: SAM's prompt encoder": 16}  # fmt: skip
    assert f"filled in from the bases: {filled}" in trained and "filled in" not in whole
    assert "| checkpoint | trained parts only |" in (tmp_path / "out/README.md").read_text()


def test_lora_alone_takes_the_rest_from_a_whole_gsva(original, tmp_path):
    torch.save({key: value for key, value in peft_names(original).items() if "lora_" in key}, tmp_path / "lora.bin")
    with pytest.raises(SystemExit, match="has only LoRA; missing are .*--llava, as the directory of a whole GSVA"):
        run(original, tmp_path / "lora.bin", tmp_path / "out", "--sam", str(original / "sam.pth"))
    base = tmp_path / "base"
    shutil.copytree(original / "llava", base)
    shutil.copyfile(original / "full.pt", base / "pytorch_model.bin")
    main(["--checkpoint", str(tmp_path / "lora.bin"), "--llava", str(base), "--clip", str(original / "clip"), "--output",
          str(tmp_path / "out")])  # fmt: skip
    assert_equal(load_file(tmp_path / "out/model.safetensors"), expected(original))


def test_sam_may_be_a_directory_of_transformers(original, tmp_path):
    """As facebook/sam-vit-huge is one, for the start of a training and beside a checkpoint of trained parts."""
    expected = start(original, tmp_path / "start")
    load(tmp_path / "start")[0].sam.save_pretrained(tmp_path / "sam")
    found = start(original, tmp_path / "again", "--sam", str(tmp_path / "sam"))
    assert_equal(found, expected, tolerance=0)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("start", "again")]
    assert configs[0] == configs[1]


def test_another_mask_model_than_sam_is_told_where_it_goes(original, tmp_path):
    sam2 = tiny_directories.write_mask_model(tmp_path / "sam2", "sam2")
    with pytest.raises(
        SystemExit, match=r"is of type sam2, and LLaVA v1 takes SAM itself.*--base .* in place of --llava"
    ):
        start(original, tmp_path / "start", "--sam", str(sam2))
    with pytest.raises(SystemExit, match=r"--sam .*nowhere/sam.pth does not exist"):
        start(original, tmp_path / "start", "--sam", "nowhere/sam.pth")
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize("with_buffers", [False, True])
def test_another_sam_than_that_of_the_training_is_refused(with_buffers, original, tmp_path):
    state = trained_parts(original)
    if with_buffers:
        state[PEFT + SAM_MATRIX] = peft_names(original)[PEFT + SAM_MATRIX]
    sam = torch.load(original / "sam.pth", weights_only=True)
    generator = torch.Generator().manual_seed(5)
    torch.save(
        {key: value.std() * torch.randn(value.shape, generator=generator) for key, value in sam.items()},
        tmp_path / "b.pth",
    )
    torch.save(state, tmp_path / "trained.bin")
    with pytest.raises(SystemExit, match=r"--sam .*b\.pth is another model than the one that the trained parts"):
        run(original, tmp_path / "trained.bin", tmp_path / "out", "--sam", str(tmp_path / "b.pth"))
    # Rounding, weight decay and training of what is trained leave the base recognisable.
    state = {key: (value * 0.9).bfloat16() for key, value in state.items()}
    for key in state:
        if "mask_decoder.transformer" in key:
            state[key] = torch.randn(state[key].shape, generator=generator).bfloat16()
    torch.save(state, tmp_path / "rounded.bin")
    run(original, tmp_path / "rounded.bin", tmp_path / "rounded", "--sam", str(original / "sam.pth"))


def test_another_language_model_than_that_of_the_training_is_refused(original, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(original / "llava", base)
    llava = torch.load(base / "pytorch_model.bin", weights_only=True)
    llava["model.embed_tokens.weight"] = torch.randn(320, 32, generator=torch.Generator().manual_seed(1))
    torch.save(llava, base / "pytorch_model.bin")
    torch.save(trained_parts(original), tmp_path / "trained.bin")
    with pytest.raises(SystemExit, match="another model.*model.embed_tokens.weight of the two have nothing in common"):
        main(["--checkpoint", str(tmp_path / "trained.bin"), "--llava", str(base), "--clip", str(original / "clip"), "--sam",
              str(original / "sam.pth"), "--output", str(tmp_path / "out")])  # fmt: skip


def zero_to_fp32(state: dict, target, shards: int, safetensors: bool) -> None:
    """Write a state dict in the layouts of DeepSpeed's zero_to_fp32.py: float32, one file or shards with an index."""
    names, suffix = list(state), "safetensors" if safetensors else "bin"
    stem = "model" if safetensors else "pytorch_model"
    write = save_file if safetensors else torch.save
    target.mkdir()
    parts = {f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}": names[i::shards] for i in range(shards)}
    if shards == 1:
        parts = {f"{stem}.{suffix}": names}
    for file, keys in parts.items():
        write({key: state[key].contiguous() for key in keys}, target / file)
    if shards > 1:
        weight_map = {key: file for file, keys in parts.items() for key in keys}
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
        (target / f"{stem}.{suffix}.index.json").write_text(text)


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", ["whole", "exclude_frozen_parameters"])
def test_what_zero_to_fp32_writes_of_the_original_s_training(form, shards, safetensors, original, tmp_path):
    """Buffers are in both forms: SAM's positional matrix, rotary frequencies, CLIP's position ids."""
    whole = peft_names(original)
    state = whole if form == "whole" else trained_parts(original) | {PEFT + SAM_MATRIX: whole[PEFT + SAM_MATRIX]}
    state |= {f"{PEFT}model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    state[f"{PEFT}model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    zero_to_fp32(state, tmp_path / "consolidated", shards, safetensors)
    ours = run(original, tmp_path / "consolidated", tmp_path / "out", "--sam", str(original / "sam.pth"))
    assert_equal(ours, expected(original))
