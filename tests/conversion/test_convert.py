"""Whole conversions through the real command line: refused input, loading of results, uploads."""

import re
from pathlib import Path

import pytest
import torch
from conversions import load, peft_names, run, sample_inputs


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


def test_push_to_hub_uploads_the_finished_directory(original, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, **kw: calls.append(("create", repo)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, *, repo_id, folder_path: calls.append(
        ("upload", repo_id, (Path(folder_path) / "model.safetensors").is_file())))  # fmt: skip
    run(original, original / "full.pt", tmp_path / "out", "--push_to_hub", "someone/gsva-tiny")
    assert calls == [("create", "someone/gsva-tiny"), ("upload", "someone/gsva-tiny", True)]


def test_a_push_that_fails_says_how_to_go_on(original, tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(self, repo, **options):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(
        SystemExit, match="--push_to_hub someone/gsva cannot be written, so nothing was converted .*401"
    ):
        run(original, original / "full.pt", tmp_path / "out", "--push_to_hub", "someone/gsva")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo, **options: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **options: refuse(self, ""))
    with pytest.raises(SystemExit, match="is written and whole, but .*hf upload someone/gsva") as error:
        run(original, original / "full.pt", tmp_path / "out", "--push_to_hub", "someone/gsva")
    assert str(tmp_path / "out") in str(error.value)
    load(tmp_path / "out")

    def interrupt(self, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", interrupt)
    with pytest.raises(SystemExit, match="is written and whole, but .*KeyboardInterrupt.*hf upload someone/gsva"):
        run(original, original / "full.pt", tmp_path / "again", "--push_to_hub", "someone/gsva")


@pytest.mark.parametrize(
    "option, file", [("--llava", "llava/pytorch_model.bin"), ("--clip", "clip/pytorch_model.bin")]
)
def test_bases_are_directories(option, file, original, tmp_path):
    with pytest.raises(SystemExit, match=rf"{option} .*pytorch_model.bin is a file: pass the directory"):
        run(original, original / "full.pt", tmp_path / "out", option, str(original / file))
    with pytest.raises(SystemExit, match=rf"{option} .*nowhere does not exist"):
        run(original, original / "full.pt", tmp_path / "out", option, str(tmp_path / "nowhere"))
