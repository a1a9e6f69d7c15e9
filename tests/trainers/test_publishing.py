"""A run with LoRA publishes the merged model, the adapter alone, and a card for each, and both load elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import filter_repo_objects
from isolation import WITHOUT_PROJECT
from safetensors import safe_open
from safetensors.torch import load_file

import run_gres

STRANGER = (
    WITHOUT_PROJECT
    + """
import sys
import torch
from PIL import Image
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

base, merged, adapter = sys.argv[1:]
processor = AutoProcessor.from_pretrained(merged, trust_remote_code=True)
inputs = processor(images=[Image.new("RGB", (40, 30), "red")], expressions=[["the man", "a unicorn"]], return_tensors="pt")

def answers(model):
    outputs = model.eval().segment(**inputs)
    return outputs.scores[0], outputs.mask_logits[0]

whole = AutoModelForImageTextToText.from_pretrained(merged, trust_remote_code=True)
plain = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True)
before = answers(plain)
over = PeftModel.from_pretrained(plain, adapter).merge_and_unload()
for name, value in over.named_parameters():
    torch.testing.assert_close(value, whole.get_parameter(name), msg=name)
torch.testing.assert_close(answers(over), answers(whole), atol=1e-4, rtol=1e-4)
assert not torch.allclose(before[0], answers(whole)[0], atol=1e-3)
print("the adapter over its base is the merged model")
"""
)


@pytest.fixture(scope="module")
def published(model_dir, tmp_path_factory):
    """One run of the program with two repositories to push to; each repository is a folder beside it."""
    folder = tmp_path_factory.mktemp("published")
    calls = []

    def create_repo(self, name, private=None, exist_ok=False, repo_type=None):
        assert repo_type == "model"
        calls.append(("create", name))
        return type("Url", (), {"repo_id": f"me/{name.rpartition('/')[2]}"})

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, ignore_patterns, repo_type=None):
        assert repo_type == "model"
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (folder / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, folder / repo_id / name)
        calls.append(("upload", repo_id))

    def whoami(self):
        return {"name": "me", "auth": {"accessToken": {"role": "write"}}}

    with pytest.MonkeyPatch.context() as patch:
        for called in (create_repo, upload_folder, whoami):
            patch.setattr(HfApi, called.__name__, called)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        options = json.dumps({"size": 8, "cache_dir": str(folder / "cache")})
        (folder / "run").mkdir()
        (folder / "run/mine.txt").write_text("not to be published")
        words = f"""--model {model_dir} --dataset shapes --do_train --do_eval --max_steps 3 --save_steps 1 --learning_rate 0.05
            --per_device_train_batch_size 2 --max_eval_samples 3 --output_dir {folder}/run --push_to_hub
            --hub_model_id me/gsva-shapes --hub_adapter_id me/gsva-shapes-lora --use_cpu --report_to none --logging_steps 1
            --num_pictures 2 --wording processor""".split()
        assert run_gres.main([*words, "--dataset_options", options]) == 0
    assert calls == [(kind, f"me/gsva-shapes{end}") for end in ("", "-lora") for kind in ("create", "upload")]
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_two_repositories_hold_what_they_should(published):
    model, adapter = files(published / "me/gsva-shapes"), files(published / "me/gsva-shapes-lora")
    assert adapter == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert not any("/" in name for name in model)
    code = {"modeling_gsva.py", "configuration_gsva.py", "processing_gsva.py", "image_processing_gsva.py"}
    assert (
        code
        | {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "README.md", "curves.png"}
        <= model
    )
    assert any(name.startswith("pictures_after") and name.endswith(".png") for name in model)
    assert not any(
        fnmatch(name, pattern)
        for name in model
        for pattern in ("checkpoint*", "rows_*", "*.txt", "divergence*", "*.bin")
    )
    assert (
        not {"adapter_config.json", "results.json", "training.json"} & model
    )  # beside the merged model it would be loaded twice
    text = b"".join(
        (published / "me/gsva-shapes" / name).read_bytes() for name in model if name.endswith((".md", ".html"))
    )
    assert str(published).encode() not in text


def test_the_adapter_is_small_and_holds_what_was_trained(published, model_dir):
    with safe_open(published / "me/gsva-shapes-lora/adapter_model.safetensors", "pt") as file:
        names = {name.removeprefix("base_model.model.") for name in file.keys()}  # noqa: SIM118 (not a dict)
    lora = {name for name in names if "lora_" in name}
    assert lora == {f"vlm.model.language_model.layers.{n}.self_attn.{p}_proj.lora_{side}.weight"
                    for n in range(2) for p in "qv" for side in "AB"}  # fmt: skip
    in_full = ("vlm.model.language_model.embed_tokens", "vlm.lm_head", "sam.mask_decoder", "mask_projector")
    assert {next(part for part in in_full if name.startswith(part)) for name in names - lora} == set(in_full)
    base = load_file(model_dir / "model.safetensors")
    in_files = tuple(part.removeprefix("vlm.") for part in in_full)
    assert {n.removeprefix("vlm.") for n in names - lora} == {name for name in base if name.startswith(in_files)}


def test_a_stranger_loads_both_and_they_are_one_model(published, model_dir, tmp_path):
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, str(model_dir), str(published / "me/gsva-shapes"), str(published / "me/gsva-shapes-lora")],
        cwd=tmp_path, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "is the merged model" in done.stdout, done.stderr[-3000:]


def test_the_program_starts_from_base_and_adapter(published, model_dir, make_picture, tmp_path, capsys):
    """With the base where it was, and with one that has moved."""
    make_picture().save(tmp_path / "a.png")
    adapter = shutil.copytree(published / "me/gsva-shapes-lora", tmp_path / "adapter")
    predict = ["--do_predict", "--image", str(tmp_path / "a.png"), "--expressions", "the man", "--use_cpu"]
    said = []
    for number, words in enumerate((["--model", str(adapter)], ["--model", str(published / "run")])):
        assert run_gres.main([*predict, *words, "--output_dir", str(tmp_path / str(number))]) == 0
        said.append(json.loads((tmp_path / str(number) / "predictions.json").read_text())[0]["expressions"])
    assert said[0][0].pop("score") == pytest.approx(said[1][0].pop("score"), abs=1e-4) and said[0] == said[1]
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_dir)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone/away"}))
    capsys.readouterr()
    assert run_gres.main([*predict, "--model", str(adapter), "--output_dir", str(tmp_path / "out")]) == 1
    assert "is an adapter; name its base with --base_model" in capsys.readouterr().err
    words = ["--model", str(adapter), "--base_model", str(model_dir), "--output_dir", str(tmp_path / "out")]
    assert run_gres.main([*predict, *words]) == 0


def test_the_cards_tell_the_run(published):
    model = ModelCard.load(published / "me/gsva-shapes/README.md")
    adapter = ModelCard.load(published / "me/gsva-shapes-lora/README.md")
    assert (model.data.library_name, adapter.data.library_name) == ("transformers", "peft")
    results = json.loads((published / "run/results.json").read_text())
    after = next(entry for entry in results if entry["stage"] == "after")
    for card, name in ((model, "me/gsva-shapes"), (adapter, "me/gsva-shapes-lora")):
        for said in (
            f'from_pretrained("{name}"' if card is model else f'PeftModel.from_pretrained(model, "{name}")',
            "after training on shapes", "| pictures | 8 |", "| split | train |",  # data
            "LoRA, rank 8, alpha 16, dropout 0.05", "learning rate 0.05", "| steps | 3 |", "| seed | 42 |",  # hyper-parameters
            f"{after['metrics']['gIoU']:.4f}", "| after | slots | rela | 3 |", "- slots: ",  # metrics with protocol
            "LLaMA / Vicuna", "Segment Anything | Apache-2.0", "Xia_2024_CVPR",  # licences and citation
        ):  # fmt: skip
            assert said in card.text, said
    pictures = [line for line in model.text.splitlines() if line.startswith("![")]
    assert len(pictures) == 2 and "curves.png" in pictures[0]
    for line in pictures:
        assert (published / "me/gsva-shapes" / line.partition("](")[2].rstrip(")")).is_file()


def test_what_a_run_saves_can_be_read_as_the_umask_says(published):
    """Model, adapter and checkpoints; libraries write weights for their owner alone."""
    run = published / "run"
    (run / "plain.txt").write_text("")  # with the umask of this process
    permissions = (run / "plain.txt").stat().st_mode & 0o777
    (run / "plain.txt").unlink()
    kept = [path for path in run.rglob("*") if path.is_file()]
    assert {"model.safetensors", "adapter_model.safetensors", "optimizer.pt"} <= {path.name for path in kept}
    assert {path: oct(path.stat().st_mode & 0o777) for path in kept} == {path: oct(permissions) for path in kept}
