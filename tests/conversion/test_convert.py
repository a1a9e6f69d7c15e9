"""Conversion on tiny random checkpoints in every form the original's users have, through the real command line."""

import doctest
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from original_checkpoint import ALPHA, RANK
from paths import FIXTURES
from safetensors.torch import load_file, save_file
from tiny_sentencepiece import TEXT

import convert_checkpoint
from convert_checkpoint import _check_filled, _sam_config, build_llama_tokenizer, main, to_original, to_ours

KEYS = FIXTURES / "original_keys.json"
FROZEN = ("model.layers.", "model.norm.", "model.mm_projector.", "model.vision_tower.", "model.visual_model.image_encoder.",
          "model.visual_model.prompt_encoder.")  # fmt: skip


def run(original: Path, checkpoint: Path, output: Path, *options: str) -> dict[str, torch.Tensor]:
    """The command line with the bases' configurations; returns the tensors written."""
    main(["--checkpoint", str(checkpoint), "--output", str(output), "--llava", str(original / "llava"), "--clip",
          str(original / "clip"), *options])  # fmt: skip
    return {key: value for file in sorted(output.glob("*.safetensors")) for key, value in load_file(file).items()}


def expected(original: Path, merged: bool = True) -> dict[str, torch.Tensor]:
    full, lora = (torch.load(original / f"{name}.pt", weights_only=True) for name in ("full", "lora"))
    if merged:
        for key in [key for key in lora if ".lora_A." in key]:
            module = key.split(".lora_A")[0]
            change = lora[key.replace("lora_A", "lora_B")] @ lora[key] * (ALPHA / RANK)
            full[f"{module}.weight"] = full[f"{module}.weight"] + change
    return {to_ours(key): value for key, value in full.items()}


def assert_equal(ours: dict, wanted: dict, tolerance: float = 1e-6) -> None:
    assert sorted(ours) == sorted(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(ours[key].float(), value.float(), atol=tolerance, rtol=tolerance, msg=key)


def peft_names(original: Path, base_layer: bool = False) -> dict[str, torch.Tensor]:
    full, lora = (torch.load(original / f"{name}.pt", weights_only=True) for name in ("full", "lora"))
    adapted = {key.split(".lora_")[0] + ".weight" for key in lora}
    middle = ".base_layer.weight" if base_layer else ".weight"
    full = {key.removesuffix(".weight") + middle if key in adapted else key: value for key, value in full.items()}
    return {f"base_model.model.{key}": value for key, value in (full | lora).items()}


def write_form(form: str, original: Path, target: Path) -> Path:
    """The same weights in one of the forms in which they go round."""
    state = peft_names(original, base_layer=form == "base_layer names")
    if form == "module prefix":
        state = {f"module.{key}": value for key, value in state.items()}
    if form == "inside a dictionary":
        state = {"state_dict": state, "epoch": 3}
    if form == "float16":
        state = {key: value.half() for key, value in state.items()}
    if form == "old torch format":
        torch.save(state, target / "gsva.bin", _use_new_zipfile_serialization=False)
        return target / "gsva.bin"
    if form == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, target / "gsva.safetensors")
        return target / "gsva.safetensors"
    if form in ("sharded with an index", "several files"):
        names = sorted(state)
        parts = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
        for file, keys in parts.items():
            torch.save({key: state[key] for key in keys}, target / file)
        if form == "several files":
            return target
        index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
        (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        return target / "pytorch_model.bin.index.json"
    torch.save(state, target / "gsva.bin")
    return target / "gsva.bin"


FORMS = ["peft 0.4 names", "base_layer names", "module prefix", "inside a dictionary", "float16", "old torch format",
         "safetensors", "sharded with an index", "several files"]  # fmt: skip


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


def test_trained_parameters_alone_take_the_rest_from_the_bases(original, tmp_path):
    state = {key: value for key, value in peft_names(original).items()
             if "lora_" in key or not key.removeprefix("base_model.model.").startswith(FROZEN)}  # fmt: skip
    torch.save(state, tmp_path / "trained.bin")
    # embed_tokens, lm_head and the mask decoder of the bases are half of the checkpoint's: it must win.
    ours = run(original, tmp_path / "trained.bin", tmp_path / "out", "--sam", str(original / "sam.pth"))
    assert_equal(ours, expected(original))


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


def sample_inputs(processor) -> dict:
    from PIL import Image

    return processor(
        images=[Image.new("RGB", (40, 30), "red")], expressions=[["the man", "a unicorn"]], return_tensors="pt"
    )


def load(directory: Path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    return AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval(), processor


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
    with pytest.raises(ValueError, match="keeps its LoRA apart"):
        load_model(ModelArguments(model=str(tmp_path / "moved"), quantization="8bit"))


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


def start(original: Path, output: Path, *options: str) -> dict[str, torch.Tensor]:
    """The command line without a checkpoint: where training starts."""
    main(["--output", str(output), "--llava", str(original / "llava"), "--clip", str(original / "clip"), "--sam",
          str(original / "sam.pth"), *options])  # fmt: skip
    return load_file(output / "model.safetensors")


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
    import shutil

    base = tmp_path / "base"
    shutil.copytree(original / "llava", base)
    given = {"--llava": base, "--clip": original / "clip", "--sam": original / "sam.pth"}
    options = list(given)
    change(options, base)
    with pytest.raises(SystemExit) as error:
        main(["--output", str(tmp_path / "out"), *(str(word) for name in options for word in (name, given[name]))])
    assert re.search(message, str(error.value), re.DOTALL), error.value
    assert not (tmp_path / "out").exists()


def broken(original: Path, change) -> dict[str, torch.Tensor]:
    state = peft_names(original)
    change(state)
    return state


def _drop_decoder_bias(state):
    del state["base_model.model.model.visual_model.mask_decoder.output_upscaling.3.bias"]


def _wrong_shape(state):
    state["base_model.model.model.text_hidden_fcs.0.0.weight"] = torch.zeros(32, 31)


CASES = {
    "unknown key": (lambda s: s.update({"base_model.model.model.mystery.weight": torch.ones(1)}), r"1 keys are unknown.*mystery"),
    "llava 1.5 projector": (lambda s: s.update({"base_model.model.model.mm_projector.2.weight": torch.ones(1)}),
                            r"mm_projector\.2\.weight.*no parameter"),
    "missing parameter": (_drop_decoder_bias, r"1 that --sam supplies: model\.visual_model\.mask_decoder\.output_upscaling\.3\.bias"),
    "wrong shape": (_wrong_shape, r"text_hidden_fcs\.0\.0\.weight is \(32, 31\).*\(32, 32\)"),
    "half an adapter": (lambda s: s.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"),
                        r"lora_A without lora_B.*layers\.0\.self_attn\.q_proj"),
    "two adapters": (lambda s: s.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight": torch.ones(2, 32)}),
                     "several LoRA adapters"),
    "vocabulary of the base": (lambda s: s.update({"base_model.model.lm_head.weight": torch.ones(320, 32)}),
                               r"lm_head\.weight of --checkpoint has 320 rows.*gives 324"),
    "quantized": (lambda s: s.update({"base_model.model.model.norm.weight": torch.ones(32, dtype=torch.int8)}),
                  r"model\.norm\.weight is torch\.int8, no floating type"),
    "adapter of another weight": (lambda s: s.update({
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 31)}), r"A \(2, 31\) and B \(32, 2\)"),
    "not only tensors": (lambda s: s.update({"optimizer_state": [1, 2]}), "holds more than tensors: optimizer_state"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_reason_and_nothing_left_behind(case, original, tmp_path):
    change, message = CASES[case]
    torch.save(broken(original, change), tmp_path / "gsva.bin")
    with pytest.raises(SystemExit) as error:
        run(original, tmp_path / "gsva.bin", tmp_path / "out")
    assert re.search(message, str(error.value), re.DOTALL), error.value
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gsva.bin"]


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


def test_a_base_that_has_tokens_of_its_own_shifts_the_slots(original, tmp_path):
    """LLaVA's later bases bring [PAD] and <im_patch>: ids come from the tokenizer, one row each."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(original / "llava", base)
    (base / "added_tokens.json").write_text(json.dumps({"<im_patch>": 321, "[PAD]": 320}))
    state = peft_names(original)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = state[f"base_model.model.{key}"]
        state[f"base_model.model.{key}"] = torch.cat([rows[:320], torch.zeros(2, 32), rows[320:]])
    torch.save(state, tmp_path / "gsva.bin")
    main(["--checkpoint", str(tmp_path / "gsva.bin"), "--output", str(tmp_path / "out"), "--llava", str(base), "--clip",
          str(original / "clip")])  # fmt: skip
    run(original, write_form("peft 0.4 names", original, original), tmp_path / "plain")
    model, processor = load(tmp_path / "out")
    assert (model.config.seg_token_id, model.config.rej_token_id, model.config.image_token_id) == (322, 323, 326)
    assert model.lm_head.weight.shape == (326, 32)
    inputs = sample_inputs(processor)
    plain, plain_processor = load(tmp_path / "plain")
    wanted = plain.segment(**sample_inputs(plain_processor))
    torch.testing.assert_close(model.segment(**inputs).scores[0], wanted.scores[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(SystemExit, match="326 rows.*gives 324"):
        run(original, tmp_path / "gsva.bin", tmp_path / "refused")


def test_float16_overflow_and_existing_output_are_refused(original, tmp_path):
    state = peft_names(original)
    state["base_model.model.model.norm.weight"] = torch.full((32,), 1e5)
    torch.save(state, tmp_path / "gsva.bin")
    with pytest.raises(SystemExit, match="65504"):
        run(original, tmp_path / "gsva.bin", tmp_path / "out", "--dtype", "float16")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    with pytest.raises(SystemExit, match="not empty"):
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
    assert_equal({key: value for key, value in model.state_dict().items() if key in ours}, ours, 0.0)
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "every file has the same, usual permissions"


def test_files_are_reopened_so_that_mapped_pages_are_given_back(original, tmp_path, monkeypatch):
    opened = []
    real = convert_checkpoint.safe_open
    monkeypatch.setattr(convert_checkpoint, "_REOPEN_BYTES", 10_000)
    monkeypatch.setattr(convert_checkpoint, "safe_open", lambda path, kind: opened.append(path) or real(path, kind))
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


def test_the_directory_loads_and_answers(original, tmp_path):
    run(original, original / "full.pt", tmp_path / "out")
    model, processor = load(tmp_path / "out")
    inputs = sample_inputs(processor)
    outputs = model.segment(**inputs)
    assert outputs.mask_logits[0].shape == (2, 16, 16) and outputs.scores[0].shape == (2,)
    assert model.config.sam_config.vision_config.global_attn_indexes == [1]
    assert model.config.sam_config.vision_config.window_size == 2
    assert model.config.sam_config.mask_decoder_config.layer_norm_eps == 1e-5
    assert (model.config.seg_token_id, model.config.rej_token_id, model.config.image_token_id) == (320, 321, 324)
    assert model.generation_config.eos_token_id == 2 and model.generation_config.pad_token_id == 0
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\n") and "trust_remote_code=True" in card and str(tmp_path) not in card


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


def test_push_to_hub_uploads_the_finished_directory(original, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, **kw: calls.append(("create", repo)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, *, repo_id, folder_path: calls.append(
        ("upload", repo_id, (Path(folder_path) / "model.safetensors").is_file())))  # fmt: skip
    run(original, original / "full.pt", tmp_path / "out", "--push_to_hub", "someone/gsva-tiny")
    assert calls == [("create", "someone/gsva-tiny"), ("upload", "someone/gsva-tiny", True)]


# --------------------------------------------------------------------------------------------------------- the key table
def test_every_key_of_the_original_has_one_place():
    keys = json.loads(KEYS.read_text())
    names = [to_ours(key) for key in keys]
    assert None not in names and len(set(names)) == len(keys)
    assert [to_original(name) for name in names] == list(keys)


def test_examples_in_docstrings():
    assert doctest.testmod(convert_checkpoint).attempted >= 2
    assert doctest.testmod(convert_checkpoint).failed == 0


def test_table_against_known_names_of_transformers():
    known = {
        "model.visual_model.mask_decoder.transformer.norm_final_attn.bias": "sam.mask_decoder.transformer.layer_norm_final_attn.bias",
        "model.visual_model.image_encoder.blocks.7.norm2.weight": "sam.vision_encoder.layers.7.layer_norm2.weight",
        "model.visual_model.image_encoder.neck.3.bias": "sam.vision_encoder.neck.layer_norm2.bias",
        "model.visual_model.prompt_encoder.mask_downscaling.6.bias": "sam.prompt_encoder.mask_embed.conv3.bias",
        "model.visual_model.mask_decoder.iou_prediction_head.layers.1.bias": "sam.mask_decoder.iou_prediction_head.layers.0.bias",
        "model.text_hidden_fcs.0.2.weight": "mask_projector.2.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
    }
    assert {key: to_ours(key) for key in known} == known
    assert to_ours("model.visual_model.unheard_of") is None and to_original("sam.unheard_of") is None
    with pytest.raises(
        ValueError, match=r"1 that --sam supplies: sam\.unheard_of"
    ):  # by our name: the original has none
        _check_filled({"sam.unheard_of": (1,)}, {}, ["--checkpoint"])


# ViT-B, L and H of segment-anything's build_sam.py: width, depth, heads, layers with global attention.
SAM_SIZES = {
    "B": (768, 12, 12, [2, 5, 8, 11]),
    "L": (1024, 24, 16, [5, 11, 17, 23]),
    "H": (1280, 32, 16, [7, 15, 23, 31]),
}


@pytest.mark.parametrize("size", SAM_SIZES)
def test_sam_is_recognised_by_its_tensors(size):
    from transformers import SamModel

    dim, depth, heads, whole = SAM_SIZES[size]
    keys = json.loads(KEYS.read_text())
    encoder = "sam.vision_encoder.layers."
    shapes = {to_ours(k): tuple(s) for k, s in keys.items() if "visual_model" in k and "image_encoder.blocks" not in k}
    shapes["sam.vision_encoder.patch_embed.projection.weight"] = (dim, 3, 16, 16)
    shapes["sam.vision_encoder.patch_embed.projection.bias"] = (dim,)
    shapes["sam.vision_encoder.pos_embed"] = (1, 64, 64, dim)
    shapes["sam.vision_encoder.neck.conv1.weight"] = (256, dim, 1, 1)
    for i in range(depth):
        shapes[f"{encoder}{i}.attn.rel_pos_h"] = (127 if i in whole else 27, dim // heads)
        shapes[f"{encoder}{i}.mlp.lin1.weight"] = (4 * dim, dim)
    config = _sam_config(shapes)
    vision = config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (dim, depth, heads)
    assert (vision.global_attn_indexes, vision.window_size, vision.image_size, vision.mlp_dim) == (
        whole,
        14,
        1024,
        4 * dim,
    )
    with torch.device("meta"):
        model = SamModel(config)
    built = {f"sam.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: built.get(name) for name in shapes} == shapes


# ------------------------------------------------------------------------------------------------------------- tokenizer
def legacy_ids(pieces, text: str, added: dict[str, int]) -> list[int]:
    """What the slow, legacy tokenizer does: cut at added tokens, encode every piece of text on its own."""
    known = {"<unk>": 0, "<s>": 1, "</s>": 2} | added
    parts = re.split("(" + "|".join(map(re.escape, sorted(known, key=len, reverse=True))) + ")", text)
    return [1] + [i for part in parts if part for i in ([known[part]] if part in known else pieces.encode(part))]


PROMPTS = ["Sure,the man:[SEG], a unicorn:[REJ].", "USER: <im_start><image><im_end>\n What are  two dogs in this image?</s>USER:",
           "", " leading and trailing ", "[SEG][REJ] [SEG]", "caf\u00e9 \u7532\u9aa8 \U0001f600", "<s>again"]  # fmt: skip


@pytest.mark.parametrize("base", [{}, {"[PAD]": 320, "<im_patch>": 321, "<im_start>": 322, "<im_end>": 323}])
def test_ids_are_the_legacy_tokenizer_s(base, sentencepiece_model, tmp_path):
    import sentencepiece
    from transformers import AutoTokenizer

    (tmp_path / "base").mkdir()
    (tmp_path / "base/tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    (tmp_path / "base/added_tokens.json").write_text(json.dumps(base))
    tokenizer = build_llama_tokenizer(tmp_path / "base")
    first = 320 + len(base)
    added = base | {"[SEG]": first, "[REJ]": first + 1}
    if not base:
        added |= {"<im_start>": 322, "<im_end>": 323}
    added["<image>"] = 320 + len(added)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in added} == added
    tokenizer.save_pretrained(tmp_path / "saved")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for text in PROMPTS + TEXT[:3]:
        wanted = legacy_ids(pieces, text, added)
        assert tokenizer(text).input_ids == wanted
        assert reloaded(text).input_ids == wanted
    assert (reloaded.pad_token, reloaded.padding_side, reloaded.bos_token_id, reloaded.eos_token_id) == (
        "<unk>",
        "right",
        1,
        2,
    )


@pytest.mark.parametrize("change, message", [
    ({"legacy": False}, "bare"),
    ({"tokenizer_class": "PreTrainedTokenizerFast"}, "PreTrainedTokenizerFast"),
    ({"add_eos_token": True}, "add_eos_token"),
])  # fmt: skip
def test_tokenizers_of_another_kind_are_refused(change, message, sentencepiece_model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **change}))
    with pytest.raises(ValueError, match="legacy LLaMA") as error:
        build_llama_tokenizer(tmp_path)
    assert message in str(error.value)


def test_models_of_another_kind_are_refused(tmp_path):
    import sentencepiece

    for name, options in {"unigram": {"model_type": "unigram", "vocab_size": 285}, "nfkc": {"model_type": "bpe",
                          "vocab_size": 320, "normalization_rule_name": "nmt_nfkc"}}.items():  # fmt: skip
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_prefix=str(tmp_path / name),
                                                 byte_fallback=True, minloglevel=2, **options)  # fmt: skip
        with pytest.raises(ValueError, match="not a LLaMA sentencepiece model"):
            build_llama_tokenizer(tmp_path / f"{name}.model")
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        build_llama_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="sentencepiece model of LLaMA"):
        build_llama_tokenizer(tmp_path / "nowhere.model")


def test_added_tokens_with_gaps_are_refused(sentencepiece_model):
    with pytest.raises(ValueError, match="gaps"):
        build_llama_tokenizer(sentencepiece_model, added_tokens={"<extra>": 330})
