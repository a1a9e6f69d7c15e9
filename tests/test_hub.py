"""`push_to_hub` and `from_pretrained` of everything the project publishes, against a stand-in for the Hub on loopback."""

import json
import os
import subprocess
import sys

import data_trees as trees
import numpy as np
import pytest
import tiny_directories as tiny
from hub_stand_in import USER, HubStandIn
from isolation import WITHOUT_PROJECT
from paths import ROOT

import convert_checkpoint
import data_scripts
from metrics.publish import space_files
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor

EXPRESSIONS = ["red dog", "a cat"]

PUSH = """
import json, sys
import torch
from peft import LoraConfig, get_peft_model
import convert_checkpoint, data_scripts, run_gres
from data_scripts import publish
from metrics import publish as metric
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor
torch.set_num_threads(1)
directory, original, tree, work = sys.argv[1:]
model, processor = (each.from_pretrained(directory) for each in (GsvaForConditionalGeneration, GsvaProcessor))
model.push_to_hub("gsva")  # without a namespace: the user's own
processor.push_to_hub("gsva")
base = GsvaForConditionalGeneration.from_pretrained("someone/gsva")  # the adapter names where its base is
names = r".*language_model\\.layers\\.\\d+\\.self_attn\\.(q_proj|v_proj)"
lora = get_peft_model(base, LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))
torch.manual_seed(0)
for name, parameter in lora.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter.data)
lora.push_to_hub("someone/adapter")
data_scripts.load("shapes", size=3, cache_dir=work + "/shapes").push_to_hub("someone/shapes")
published = publish.main(["grefcoco", tree, work + "/grefcoco", "--push_to_hub", "someone/grefcoco", "--cache_dir", work + "/cache"])
assert metric.main(["someone/gres"]) == 0
convert_checkpoint.main(["--checkpoint", original + "/full.pt", "--output", work + "/converted", "--llava", original + "/llava",
                         "--clip", original + "/clip", "--push_to_hub", "someone/converted"])
convert_checkpoint.main(["--base", "someone/base", "--sam", "someone/sam2", "--output", work + "/start"])
trained = run_gres.main(["--model", "someone/gsva", "--dataset", "shapes", "--dataset_options",
                         json.dumps({"size": 2, "cache_dir": work + "/run_shapes"}),
                         "--do_train", "--max_steps", "1", "--per_device_train_batch_size", "1", "--output_dir", work + "/run",
                         "--push_to_hub", "--hub_model_id", "someone/trained", "--use_cpu", "--report_to", "none"])
assert (published, trained) == (0, 0)
"""

LOAD = (
    WITHOUT_PROJECT
    + """
import json
import evaluate
import numpy as np, torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
torch.set_num_threads(1)
picture, output = sys.argv[1:]
asked, image, trust = json.loads(sys.stdin.read()), Image.open(picture), {"trust_remote_code": True}
masks = {}
def keep(name, model, processor):
    inputs = processor(images=[image], expressions=[asked], return_tensors="pt")
    masks[name] = model.segment(**inputs, threshold=-1e9).mask_logits[0].numpy()
for name in ("gsva", "converted", "trained"):
    model = AutoModelForImageTextToText.from_pretrained("someone/" + name, **trust)
    keep(name, model, AutoProcessor.from_pretrained("someone/" + name, **trust))
processor = AutoProcessor.from_pretrained("someone/gsva", **trust)
keep("adapter", AutoPeftModelForCausalLM.from_pretrained("someone/adapter", **trust).base_model.model, processor)
keep("adapter by transformers", AutoModelForImageTextToText.from_pretrained("someone/adapter", **trust), processor)
pipe = pipeline("generalized-referring-segmentation", model="someone/gsva", device="cpu", **trust)
masks["pipeline"] = np.stack([entry["mask"] for entry in pipe(image, expressions=asked, threshold=-1e9)])
metric = evaluate.load("someone/gres")
metric.add_batch(intersection=[3, 0], union=[4, 0], is_no_target=[False, True], is_rejected=[False, True])
report = {"gIoU": metric.compute(convention="rela")["gIoU"]}
for name in ("shapes", "grefcoco"):
    rows = load_dataset("someone/" + name)
    split = next(iter(rows))
    report[name] = {key: len(value) for key, value in rows.items()}
    row = rows[split][0]
    report[name + " row"] = [row["image_id"], row["image"].size, row["expressions"]]
streamed = next(iter(load_dataset("someone/shapes", split="train", streaming=True)))
report["streamed"] = streamed["expressions"]
np.savez(output, **masks)
print(json.dumps(report))
"""
)


def run(script, *words, environment, cwd, isolated=False, **options) -> str:
    command = [sys.executable, *(["-I"] if isolated else []), "-c", script, *map(str, words)]
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith(("HF_", "HUGGINGFACE"))}
    finished = subprocess.run(
        command,
        env={**inherited, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    return finished.stdout


@pytest.fixture(scope="module")
def pushed(model_dir, original, tmp_path_factory):
    """The stand-in, holding all that the project pushes."""
    with HubStandIn() as hub:
        work = tmp_path_factory.mktemp("pushing")
        tree = trees.referring(work / "tree", "grefcoco", [{**trees.ref(), "ann_id": [1], "no_target": False}])
        hub.put("someone/base", tiny.write_base(work / "parts/base", "llava"))
        hub.put("someone/sam2", tiny.write_mask_model(work / "parts/sam2", "sam2"))
        run(PUSH, model_dir, original, tree, work, environment=hub.environment(work / "cache"), cwd=ROOT)
        hub.work = work
        yield hub


@pytest.fixture(scope="module")
def loaded(pushed, make_picture, tmp_path_factory):
    """What a fresh process without the project made of it."""
    folder = tmp_path_factory.mktemp("loading")
    make_picture().save(folder / "picture.png")
    environment = pushed.environment(folder / "cache")
    words = folder / "picture.png", folder / "masks.npz"
    out = run(LOAD, *words, environment=environment, cwd=folder, isolated=True, input=json.dumps(EXPRESSIONS))
    return json.loads(out.splitlines()[-1]), np.load(folder / "masks.npz")


def masks_of(model, processor, picture):
    inputs = processor(images=[picture], expressions=[EXPRESSIONS], return_tensors="pt")
    outputs = model.segment(**inputs, threshold=-1e9)
    (results,) = processor.post_process_segmentation(outputs, inputs, threshold=-1e9)
    return outputs.mask_logits[0].numpy(), np.stack([entry["mask"] for entry in results])


def test_a_pushed_repository_is_a_saved_directory(pushed, model_dir):
    files = pushed.files("model", f"{USER}/gsva")
    saved = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    assert saved.keys() <= files.keys() and files.keys() - saved.keys() <= {"README.md", ".gitattributes"}
    assert files["model.safetensors"] == saved["model.safetensors"]
    for name, content in saved.items():
        if name.endswith(".py") or name == "chat_template.jinja":
            assert files[name] == content, name


def test_masks_from_the_hub_are_the_same_bit_for_bit(loaded, model, processor, make_picture):
    logits, masks = masks_of(model, processor, make_picture())
    np.testing.assert_array_equal(loaded[1]["gsva"], logits)
    np.testing.assert_array_equal(loaded[1]["pipeline"], masks)


def test_adapters_find_their_base(loaded):
    masks = loaded[1]
    assert not np.array_equal(masks["adapter"], masks["gsva"])
    np.testing.assert_array_equal(masks["adapter"], masks["adapter by transformers"])


def test_what_the_commands_push_is_what_they_wrote(pushed, loaded, make_picture):
    for name, folder in (("converted", "converted"), ("trained", "run")):
        written = {path.name: path.read_bytes() for path in (pushed.work / folder).iterdir() if path.is_file()}
        files = pushed.files("model", f"{USER}/{name}")
        assert {"README.md", "config.json", "model.safetensors", "processor_config.json"} <= files.keys()
        assert not any(file.startswith(("adapter", "training_args")) for file in files), (
            "put on top of the merged weights"
        )
        assert {file for file in files if files[file] != written[file]} == set()
        here = [each.from_pretrained(pushed.work / folder) for each in (GsvaForConditionalGeneration, GsvaProcessor)]
        np.testing.assert_array_equal(loaded[1][name], masks_of(*here, make_picture())[0])
    written = {
        str(p.relative_to(pushed.work / "grefcoco")) for p in (pushed.work / "grefcoco").rglob("*") if p.is_file()
    }
    assert written <= pushed.files("dataset", f"{USER}/grefcoco").keys()


def test_a_base_and_a_mask_model_of_the_hub_make_the_start_that_their_directories_make(pushed, tmp_path):
    parts = pushed.work / "parts"
    convert_checkpoint.main(
        ["--base", str(parts / "base"), "--sam", str(parts / "sam2"), "--output", str(tmp_path / "start")]
    )
    here, hub = (
        {path.name: path.read_bytes() for path in (folder / "start").iterdir()} for folder in (tmp_path, pushed.work)
    )
    assert here.keys() == hub.keys()
    assert [name for name in here if here[name] != hub[name]] == [
        "README.md"
    ]  # which names the parts as they were given
    card = hub["README.md"].decode()
    assert "someone/base" in card and "someone/sam2" in card


def test_data_sets_come_back(pushed, loaded):
    report = loaded[0]
    rows = data_scripts.load("shapes", size=3, cache_dir=str(pushed.work / "shapes"))
    assert report["shapes"] == {"train": 3} and report["streamed"] == rows[0]["expressions"]
    assert report["shapes row"] == [rows[0]["image_id"], list(rows[0]["image"].size), rows[0]["expressions"]]
    rows = data_scripts.load("grefcoco", pushed.work / "tree", cache_dir=str(pushed.work))
    assert report["grefcoco row"][2] == rows[0]["expressions"] and report["grefcoco"]["train"] == len(rows)


def test_the_metric_computes(pushed, loaded):
    files = pushed.files("space", f"{USER}/gres")
    assert set(files) - {".gitattributes"} == set(space_files())
    assert loaded[0]["gIoU"] == 0.875  # (3/4 + 1) / 2


def test_writing_needs_the_token(tmp_path):
    with HubStandIn() as hub:
        environment = {**hub.environment(tmp_path), "HF_TOKEN": "another"}
        script = (
            "from huggingface_hub import HfApi\ntry:\n HfApi().create_repo('a/b')\nexcept Exception as e: print(e)"
        )
        assert "401" in run(script, environment=environment, cwd=tmp_path) and not hub.repositories
