"""A saved directory loads by the Auto classes in a fresh process that cannot import the project, and gives the same masks."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from isolation import WITHOUT_PROJECT
from paths import ROOT
from PIL import Image

from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor

EXPRESSIONS = [["red dog", "a cat"], ["b"]]

# Runs isolated (-I: no working directory, no PYTHONPATH) in an empty folder.
SCRIPT = (
    WITHOUT_PROJECT
    + """
import json, os, sys
import numpy as np, torch
from PIL import Image
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoModelForMaskGeneration, AutoProcessor, AutoTokenizer, pipeline)
torch.set_num_threads(1)
directory, output = sys.argv[1:]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(directory, **trust)
tokenizer = AutoTokenizer.from_pretrained(directory, **trust)
image_processor = AutoImageProcessor.from_pretrained(directory, **trust)
processor = AutoProcessor.from_pretrained(directory, **trust)
asked = json.loads(sys.stdin.read())
pictures = [Image.open(f"{directory}/../{n}.png") for n in range(2)]
inputs = processor(images=pictures, expressions=asked, return_tensors="pt")
assert torch.equal(image_processor(pictures, return_tensors="pt")["sam_pixel_values"], inputs["sam_pixel_values"])
assert tokenizer("a [SEG]")["input_ids"] == processor.tokenizer("a [SEG]")["input_ids"]
results = {"input_ids": inputs["input_ids"].numpy(), "answer_ids": inputs["answer_ids"].numpy()}
classes = {}
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskGeneration):
    model = auto.from_pretrained(directory, **trust)
    assert not model.training and model.generation_config.eos_token_id == 2
    outputs = model.segment(**inputs)
    shown = processor.post_process_segmentation(outputs, inputs)
    for n, masks in enumerate(outputs.mask_logits):
        results[f"{auto.__name__}/logits/{n}"] = masks.numpy()
        results[f"{auto.__name__}/masks/{n}"] = np.stack([entry["mask"] for entry in shown[n]])
    results[f"{auto.__name__}/generated"] = model.generate(**inputs, max_new_tokens=4).numpy()
    classes[auto.__name__] = [type(model).__name__, type(model).__module__.split(".")[0]]
model.save_pretrained(output + "/again")
processor.save_pretrained(output + "/again")
pipe = pipeline("generalized-referring-segmentation", model=directory, device="cpu", **trust)
classes["pipeline"] = [type(pipe).__name__, type(pipe).__module__.split(".")[0]]
for n, entries in enumerate(pipe(pictures, expressions=asked)):
    results[f"pipeline/masks/{n}"] = np.stack([entry["mask"] for entry in entries])
pipe.save_pretrained(output + "/pipeline")
np.savez(output + "/results.npz", **results)
print(json.dumps({"config": type(config).__name__, "processor": type(processor).__name__, "models": classes,
                  "image_processor": type(image_processor).__name__}))
"""
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model, processor, make_picture):
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder / "gsva")
    processor.save_pretrained(folder / "gsva")
    for n, (width, height) in enumerate([(40, 30), (20, 50)]):
        make_picture(n, width, height).save(folder / f"{n}.png")
    return folder / "gsva"


@pytest.fixture(scope="module")
def loaded_elsewhere(saved, tmp_path_factory):
    """What a fresh process made of the directory: its report, its arrays, and where it saved model and processor again."""
    output = tmp_path_factory.mktemp("elsewhere")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {
        "HF_HOME": str(output / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(output / "modules"),
    }
    finished = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(saved), str(output)],
        input=json.dumps(EXPRESSIONS),
        check=False,
        timeout=600,
        capture_output=True,
        text=True,
        cwd=output,
        env=environment,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1]), np.load(output / "results.npz"), output / "again"


def test_every_auto_class_finds_its_code(loaded_elsewhere):
    report, _, _ = loaded_elsewhere
    assert report["config"] == "GsvaConfig" and report["processor"] == "GsvaProcessor"
    assert report["image_processor"] == "GsvaImageProcessor"
    names = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMaskGeneration")
    assert report["models"].pop("pipeline") == ["GsvaPipeline", "transformers_modules"]
    assert report["models"] == {name: ["GsvaForConditionalGeneration", "transformers_modules"] for name in names}


def test_masks_are_the_same_bit_for_bit(loaded_elsewhere, saved, model, processor):
    _, results, _ = loaded_elsewhere
    pictures = [Image.open(saved.parent / f"{n}.png") for n in range(2)]
    inputs = processor(images=pictures, expressions=EXPRESSIONS, return_tensors="pt")
    outputs = model.segment(**inputs)
    shown = processor.post_process_segmentation(outputs, inputs)
    generated = model.generate(**inputs, max_new_tokens=4).numpy()
    np.testing.assert_array_equal(results["input_ids"], inputs["input_ids"])
    np.testing.assert_array_equal(results["answer_ids"], inputs["answer_ids"])
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMaskGeneration"):
        for n in range(2):
            np.testing.assert_array_equal(results[f"{name}/logits/{n}"], outputs.mask_logits[n].numpy())
            np.testing.assert_array_equal(
                results[f"{name}/masks/{n}"], np.stack([entry["mask"] for entry in shown[n]])
            )
        np.testing.assert_array_equal(results[f"{name}/generated"], generated)
    for n, picture in enumerate(pictures):  # the pipeline answers one picture at a time
        alone = processor(images=[picture], expressions=EXPRESSIONS[n : n + 1], return_tensors="pt")
        (entries,) = processor.post_process_segmentation(model.segment(**alone), alone)
        np.testing.assert_array_equal(results[f"pipeline/masks/{n}"], np.stack([entry["mask"] for entry in entries]))


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def save_again(directory, folder):
    GsvaForConditionalGeneration.from_pretrained(directory).save_pretrained(folder)
    GsvaProcessor.from_pretrained(directory).save_pretrained(folder)
    return files(folder)


def assert_same_bytes(folder, again):
    assert folder.keys() == again.keys()
    assert [name for name in folder if folder[name] != again[name]] == []


def test_saving_again_gives_the_same_bytes(saved, tmp_path):
    """Model, processor, configs, tokenizer, chat template and code; for good."""
    assert_same_bytes(files(saved), save_again(saved, tmp_path / "once"))
    assert_same_bytes(files(saved), save_again(tmp_path / "once", tmp_path / "twice"))


def test_saving_again_elsewhere_gives_the_same_bytes(saved, loaded_elsewhere):
    """Also from the copied code, offline, and as a pipeline: the directory stays complete when it is handed on."""
    assert_same_bytes(files(saved), files(loaded_elsewhere[2]))
    assert_same_bytes(files(saved), files(loaded_elsewhere[2].parent / "pipeline"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saving_in_half_precision_again_gives_the_same_bytes(saved, tmp_path, dtype):
    GsvaForConditionalGeneration.from_pretrained(saved, dtype=dtype).save_pretrained(tmp_path / "once")
    again = GsvaForConditionalGeneration.from_pretrained(tmp_path / "once")
    again.save_pretrained(tmp_path / "twice")
    assert again.dtype == dtype  # as it was saved
    assert_same_bytes(files(tmp_path / "once"), files(tmp_path / "twice"))


def test_the_directory_holds_what_it_needs_and_no_pickle(saved):
    names = set(files(saved))
    code = {path.name for path in (ROOT / "modeling_gsva").glob("*_gsva.py")} - {"export_gsva.py"}  # a command
    assert {name for name in names if name.endswith(".py")} == code and len(code) > 20
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    assert auto_map["AutoConfig"] == "configuration_gsva.GsvaConfig"
    assert auto_map["AutoModelForImageTextToText"] == "modeling_gsva.GsvaForConditionalGeneration"


OWN_MODEL = """
from modeling_gsva import GsvaForConditionalGeneration

class OwnGsva(GsvaForConditionalGeneration):
    pass

OwnGsva.register_for_auto_class("AutoModelForImageTextToText")
"""


def test_a_subclass_is_named_by_its_own_file(saved, tmp_path, monkeypatch):
    """Also where the weights come from a directory that names the parent."""
    (tmp_path / "own_model_of_a_test.py").write_text(OWN_MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_model_of_a_test")
    own.OwnGsva.from_pretrained(saved).save_pretrained(tmp_path / "own")
    auto_map = json.loads((tmp_path / "own" / "config.json").read_text())["auto_map"]
    assert (tmp_path / "own" / "own_model_of_a_test.py").is_file()
    assert auto_map.pop("AutoConfig") == "configuration_gsva.GsvaConfig"
    names = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMaskGeneration")
    assert auto_map == dict.fromkeys(names, "own_model_of_a_test.OwnGsva")


def test_weights_come_back_in_every_precision(saved, model):
    for dtype in (torch.float32, torch.bfloat16):
        again = GsvaForConditionalGeneration.from_pretrained(saved, dtype=dtype)
        weights = again.state_dict()
        for name, weight in model.state_dict().items():
            assert torch.equal(weights[name].to(dtype), weight.to(dtype)), name
