"""run_gres.py from end to end on a tiny random model: its files, resumed runs, refused input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import data_trees as trees
import markupsafe
import numpy as np
import pytest
import yaml
from isolation import WITHOUT_PROJECT
from paths import ROOT
from PIL import Image

import run_gres
from data_scripts import shapes
from data_scripts.schema import decode_mask
from evaluation.config import PROTOCOL_NOTES
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor
from trainers.arguments import parse_arguments
from trainers.curves import training_curves
from trainers.data import evaluation_config

MINI = ROOT / "tests/fixtures/golden_data/mini"
RECORD = {"protocol", "convention", "stage", "dataset", "split", "samples", "metrics", "model", "seconds"}
METRICS = {"gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"}


def in_process(*words) -> int:
    """The same program without another import of everything."""
    return run_gres.main([*map(str, words), "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"])


@pytest.fixture(scope="module")
def shape_options(tmp_path_factory):
    return {"size": 8, "cache_dir": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def run(model_dir, shape_options, tmp_path_factory):
    """One run of the real command: before, three steps of training with an evaluation on the way, after."""
    folder = tmp_path_factory.mktemp("run")
    preset = {
        "model": str(model_dir), "dataset": "shapes", "dataset_options": shape_options, "do_train": True, "do_eval": True,
        "output_dir": str(folder / "out"), "train_language_model": "full", "wording": "processor", "num_expressions": 2,
        "max_steps": 3, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "learning_rate": 1.0e-3,
        "protocols": ["slots", "generate"], "conventions": ["rela", "gsva"], "max_new_tokens": 4, "num_pictures": 3,
        "max_eval_samples": 5, "logging_steps": 1, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3,
        "report_to": "none", "use_cpu": True, "seed": 0,
    }  # fmt: skip
    (folder / "preset.yaml").write_text(yaml.safe_dump(preset))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu"]  # fmt: skip
    done = subprocess.run(
        [*launch, "run_gres.py", str(folder / "preset.yaml"), "--seed", "5"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def records(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())


def test_results_before_and_after(run, model_dir):
    folder, printed = run
    found = records(folder / "out")
    assert [(r["stage"], r["protocol"], r["convention"]) for r in found] == [
        (stage, protocol, convention)
        for stage in ("before", "after")
        for protocol in ("slots", "generate")
        for convention in ("rela", "gsva")
    ]
    for entry in found:
        assert set(entry) >= RECORD and set(entry["metrics"]) >= METRICS
        assert (entry["dataset"], entry["split"], entry["samples"]) == ("shapes", "validation", 5)
        assert entry["model"] == str(model_dir) and entry["seconds"] >= 0
        numbers = [value for value in entry["metrics"].values() if value is not None]
        assert all(0 <= value <= 1 for value in numbers)
    asked = sum(len(shapes.make_row(0, "validation", n)["expressions"]) for n in range(5))
    for file in (folder / "out").glob("rows_*.jsonl"):
        assert len(file.read_text().splitlines()) == asked, file.name
    assert "model.vision_tower" in printed and "trained 3 steps" in printed  # the parts, and what was done
    assert (
        printed.count("T_acc") == 6  # a line for each evaluation, one on the way, and one table
        and printed.splitlines()[-1].startswith("look at ")
        and str(folder / "out" / "curves.png") in printed
    )
    assert "{'loss'" not in printed and "model shards" not in printed and "pin_memory" not in printed


def test_pages_of_pictures_and_curves(run):
    out = run[0] / "out"
    pages = sorted(out.glob("pictures_*.html"))
    assert len(pages) == 4
    for page in pages:
        text = page.read_text()
        entries = [entry for n in range(3) for entry in shapes.make_row(0, "validation", n)["expressions"]]
        assert text.count("data:image/jpeg;base64,") == len(entries)
        assert all(entry["text"] in text for entry in entries) and "validation-0-3" not in text
        assert "://" not in text  # opens offline; pictures as base64 hold no colon
        said = text.count("wrong: it is not there") + text.count("right: rejected")
        assert said == sum(entry["num_targets"] == 0 for entry in entries)
    with Image.open(out / "curves.png") as curves:
        assert curves.size > (400, 200) and len(set(curves.convert("L").tobytes())) > 2
    history = json.loads((out / "log_history.json").read_text())
    assert [entry["step"] for entry in history if "ce_loss" in entry] == [1, 2, 3]
    assert [entry["step"] for entry in history if "eval_gIoU" in entry] == [3]
    assert [path.name for path in sorted((out / "validation/step-3").iterdir())] == [f"{n:03d}.png" for n in range(4)]
    assert str(out / "validation") in run[1]


FRESH = (
    WITHOUT_PROJECT
    + """
import json, sys
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder, picture, *expressions = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
inputs = processor(images=[Image.open(picture)], expressions=[expressions], return_tensors="pt")
(results,) = processor.post_process_segmentation(model.segment(**inputs), inputs)
print(json.dumps([[r["text"], r["is_rejected"], r["score"], r["mask"].nonzero()[0].tolist(), r["mask"].nonzero()[1].tolist()]
                  for r in results]))
"""
)


def test_the_saved_directory_predicts_files_and_loads_in_a_fresh_process(run, tmp_path, make_picture, capsys):
    out = run[0] / "out"
    make_picture(0, 60, 44).save(tmp_path / "a b.png")
    make_picture(1, 30, 50).convert("L").save(tmp_path / "grey.jpg")
    pictures, expressions = [tmp_path / "a b.png", tmp_path / "grey.jpg"], ["the red circle", "All stars."]
    assert in_process("--do_predict", "--model", out, "--image", *pictures, "--expressions", *expressions,
                      "--output_dir", tmp_path / "told") == 0  # fmt: skip
    assert capsys.readouterr().out.count("(score ") == 4
    told = json.loads((tmp_path / "told/predictions.json").read_text())
    processor, model = GsvaProcessor.from_pretrained(out), GsvaForConditionalGeneration.from_pretrained(out)
    for entry, path in zip(told, pictures, strict=True):
        image = Image.open(path)
        assert entry["image"] == str(path) and (entry["width"], entry["height"]) == image.size
        inputs = processor(images=[image], expressions=[expressions], return_tensors="pt")
        (results,) = processor.post_process_segmentation(model.segment(**inputs), inputs)
        for said, result in zip(entry["expressions"], results, strict=True):
            assert said["text"] == result["text"] and said["is_rejected"] == result["is_rejected"]
            assert said["score"] == pytest.approx(result["score"], abs=1e-5)
            mask = decode_mask(said["mask"]).astype(bool)
            assert (mask == result["mask"]).all() and said["area"] == mask.sum()
        with Image.open(tmp_path / "told" / entry["overlay"]) as overlay:
            assert overlay.width > 3 * 256 and overlay.height > 100  # all masks, and a tile for each expression
    assert sorted(path.name for path in (tmp_path / "told").iterdir()) == [
        "000_a b.png",
        "001_grey.png",
        "predictions.html",
        "predictions.json",
    ]

    (tmp_path / "empty").mkdir()
    fresh = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, str(out), str(pictures[0]), *expressions], cwd=tmp_path / "empty",
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    for (text, rejected, score, ys, xs), said in zip(
        json.loads(fresh.stdout.splitlines()[-1]), told[0]["expressions"], strict=True
    ):
        assert (text, rejected) == (said["text"], said["is_rejected"]) and score == pytest.approx(
            said["score"], abs=1e-5
        )
        assert (np.argwhere(decode_mask(said["mask"])) == np.stack([ys, xs], 1)).all()


def test_started_again_it_resumes_and_does_not_begin_anew(run, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(run[0] / "out", folder)
    weights, before = (folder / "model.safetensors").read_bytes(), records(folder)
    # As if killed in the third step: the last checkpoint half-written, nothing saved.
    (folder / "checkpoint-3/trainer_state.json").write_text('{"global_step"')
    (folder / "model.safetensors").unlink()
    words = [run[0] / "preset.yaml", "--seed", "5", "--output_dir", folder]
    assert in_process(*words) == 0
    assert (folder / "model.safetensors").read_bytes() == weights
    again = records(folder)
    assert [r for r in again if r["stage"] == "before"] == [
        r for r in before if r["stage"] == "before"
    ]  # not even timed anew
    assert [r["metrics"] for r in again] == [r["metrics"] for r in before]
    # And of a finished run nothing is trained again.
    saved = (folder / "checkpoint-3/trainer_state.json").stat().st_mtime_ns
    capsys.readouterr()
    assert in_process(*words) == 0
    assert (folder / "checkpoint-3/trainer_state.json").stat().st_mtime_ns == saved
    assert (folder / "model.safetensors").read_bytes() == weights
    assert not list(folder.glob(".*"))


def test_grefcoco_trains_with_lora_evaluates_and_predicts(model_dir, tmp_path):
    out = tmp_path / "out"
    cache = json.dumps({"cache_dir": str(tmp_path / "cache")})
    assert in_process(
        "--model", model_dir, "--dataset", "grefcoco", "--data_dir", MINI, "--dataset_options", cache, "--eval_split", "val",
        "--max_eval_samples", 3, "--do_train", "--do_eval", "--do_predict", "--max_steps", 2, "--per_device_train_batch_size",
        2, "--learning_rate", 1e-2, "--save_strategy", "no", "--logging_steps", 1, "--output_dir", out, "--per_device_eval_batch_size", 2,
    ) == 0  # fmt: skip
    assert {(r["stage"], r["dataset"], r["split"], r["samples"]) for r in records(out)} == {
        ("before", "grefcoco", "val", 3),
        ("after", "grefcoco", "val", 3),
    }
    start, end = (GsvaForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (model_dir, out))
    assert start.keys() == end.keys()  # LoRA is merged into plain weights
    changed = {name for name in start if not (start[name] == end[name]).all()}
    assert {
        f"vlm.model.language_model.layers.{n}.self_attn.{p}_proj.weight" for n in range(2) for p in "qv"
    } <= changed
    assert not any(
        name.startswith(("model.vision_tower", "sam.vision_encoder", "sam.prompt_encoder")) for name in changed
    )
    assert not any(
        "mlp" in name or "k_proj" in name or "o_proj" in name for name in changed if "language_model" in name
    )
    predictions = json.loads((out / "predictions.json").read_text())
    assert len(predictions) == 3 and all(entry["expressions"] for entry in predictions)
    for entry in (entry for prediction in predictions for entry in prediction["expressions"]):
        assert decode_mask(entry["mask"]).sum() == entry["area"] and (entry["area"] == 0 or not entry["is_rejected"])
    assert (out / "predictions.html").read_text().count("<figure") >= 6


def test_teacher_forced_predictions_say_so(model_dir, shape_options, tmp_path):
    assert in_process("--do_predict", "--protocols", "teacher_forced", "--model", model_dir, "--dataset_options",
                      json.dumps(shape_options), "--max_eval_samples", 2, "--output_dir", tmp_path) == 0  # fmt: skip
    note = PROTOCOL_NOTES["teacher_forced"]
    assert "gold answers were in the model's input" in note
    told = json.loads((tmp_path / "predictions.json").read_text())
    assert [entry["protocol_note"] for entry in told] == [note, note]
    assert f"teacher_forced: {markupsafe.escape(note)}" in (tmp_path / "predictions.html").read_text()


def test_masks_asked_for_after_the_end_are_made(model_dir, shape_options, tmp_path, capsys):
    words = ["--do_eval", "--protocols", "slots", "--model", model_dir, "--dataset_options", json.dumps(shape_options),
             "--max_eval_samples", 2, "--resume_eval", "--output_dir", tmp_path]  # fmt: skip

    def kept():
        (file,) = tmp_path.glob("rows_*.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]

    assert in_process(*words) == 0
    first = kept()
    assert not any("prediction" in row for row in first)
    metrics = records(tmp_path)[0]["metrics"]
    capsys.readouterr()
    assert in_process(*words, "--save_masks") == 0
    assert "evaluating again for --save_masks" in capsys.readouterr().out
    assert [{name: value for name, value in row.items() if name != "prediction"} for row in kept()] == first
    assert all("prediction" in row for row in kept()) and records(tmp_path)[0]["metrics"] == metrics
    capsys.readouterr()
    assert in_process(*words, "--save_masks") == 0  # and not again
    assert "evaluating again" not in capsys.readouterr().out


def test_the_evaluation_on_the_way_counts_as_the_one_at_the_end(tmp_path):
    words = ["--do_eval", "--output_dir", str(tmp_path), "--use_cpu", "--conventions", "gsva", "--dataset"]
    plans = {
        name: evaluation_config(*parse_arguments([*words, name])[1:], "slots", rows=[])
        for name in ("refcoco", "grefcoco")
    }
    assert {name: plan.conventions[0] for name, plan in plans.items()} == {
        "refcoco": "gsva_validate",
        "grefcoco": "gsva",
    }


def test_curves_name_protocol_and_convention(tmp_path, monkeypatch):
    titles = []
    from matplotlib.axes import Axes

    set_title = Axes.set_title
    monkeypatch.setattr(
        Axes, "set_title", lambda axes, title, **k: titles.append(title) or set_title(axes, title, **k)
    )
    said = {
        "eval_protocol": "teacher_forced",
        "eval_protocol_note": PROTOCOL_NOTES["teacher_forced"],
        "eval_convention": "gsva",
    }
    training_curves([{"step": 1, "loss": 1.0}, {"step": 1, "eval_gIoU": 0.5, **said}], tmp_path / "curves.png")
    assert "eval: teacher_forced, gsva" in titles[-1] and PROTOCOL_NOTES["teacher_forced"] in titles[-1].replace(
        "\n", " "
    )


def test_a_model_without_rej_is_refused_in_words(model_dir, shape_options, tmp_path, capsys):
    shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "rej_token_id": None}))
    assert in_process("--do_eval", "--model", tmp_path / "model", "--dataset_options", json.dumps(shape_options),
                      "--output_dir", tmp_path / "out") == 1  # fmt: skip
    printed = capsys.readouterr().err
    assert "run_gres.py: The model has no [REJ] in its vocabulary (rej_token_id=None)" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["nothing to do", "--do_eval"]),
        (["--do_eval", "--dataset", "grefcoco"], ["grefcoco", "needs data_dir"]),
        (["--do_eval", "--dataset", "grefcoco", "--data_dir", "nowhere"], ["data_dir='nowhere'", "not a folder"]),
        (["--do_eval", "--dataset", "grefcoco", "--data_dir", "tests"], ["grefs(unc).json"]),
        (["--do_train", "--dataset", "grefcoco", "--data_dir", MINI, "--train_split", "test"], ["'test'", "testA"]),
        (["--do_eval", "--eval_split", "val"], ["'val'", "train, validation, test"]),
        (["--do_eval", "--dataset", "shape"], ["'shape'", "grefcoco", "shapes"]),
        (["--do_eval", "--dataset_options", '{"sizes": 3}'], ["sizes", "size, seed, task"]),
        (["--do_eval", "--dataset_options", '{"size": 2, "task": "vqa"}'], ["no expressions"]),
        (["--do_eval", "--epochs", "3"], ["--epochs"]),
        (["--do_eval", "--max_eval_samples", "-3"], ["max_eval_samples=-3"]),
        (["--do_eval", "--threshold", "nan"], ["threshold=nan"]),
        (["--do_predict", "--image", "none.png", "--expressions", "a dog"], ["--image none.png does not exist"]),
        (["--do_predict", "--image", "setup.cfg", "--expressions", "a dog"], ["setup.cfg", "cannot be read"]),
        (["--do_predict", "--image", "PICTURE", "--expressions", "a [SEG] dog"], ["'a [SEG] dog'", "take it out"]),
        (["--do_predict", "--image", "PICTURE", "--expressions", " . "], ["' . '", "is empty"]),
        (["--do_predict", "--image", "PICTURE"], ["--expressions"]),
        (["--do_predict", "--image", "PICTURE", "--expressions", "a", "--protocols", "teacher_forced"], ["gold", "slots"]),
        (["--do_eval", "--model", "trainers"], ["model='trainers'", "save_pretrained"]),
        (["--do_eval", "--model", "runs/no/such/model"], ["runs/no/such/model", "directory"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_a_fix(words, said, model_dir, tmp_path, make_picture, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    make_picture().save(tmp_path / "a.png")
    words = [str(tmp_path / "a.png") if word == "PICTURE" else word for word in words]
    model = [] if "--model" in words else ["--model", model_dir]
    assert in_process(*words, *model, "--output_dir", tmp_path / "out") == 1
    printed = capsys.readouterr().err
    message = printed[printed.index("run_gres.py: ") :]
    assert all(word in message for word in said), message
    assert "Traceback" not in printed and not list((tmp_path / "out").glob("*.json"))


def test_an_error_ends_the_command_with_1_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "run_gres.py", "--do_eval", "--protocols", "slot", "--output_dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "protocols='slot' is not known; choose one of teacher_forced, slots, generate" in done.stderr


def test_bad_images_are_errors_or_are_left_out_and_listed(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pets = tmp_path / "pets"
    for name in ("a", "b", "c"):
        trees.picture(pets / f"{name}.jpg", size=(64, 48))
    line = '{{"image": "{}.jpg", "expressions": [{{"text": "a cat", "mask": [5, 5, 25, 5, 25, 25]}}]}}\n'
    trees.write(pets / "val.jsonl", "".join(map(line.format, "abc")))
    content = (pets / "b.jpg").read_bytes()
    (pets / "b.jpg").write_bytes(content[: len(content) * 3 // 4])  # its header is whole
    words = ["--do_eval", "--model", model_dir, "--dataset", "own", "--data_dir", pets, "--eval_split", "val"]
    assert in_process(*words, "--output_dir", tmp_path / "out") == 1
    assert "b.jpg cannot be read" in capsys.readouterr().err
    assert in_process(*words, "--on_bad_image", "skip", "--output_dir", tmp_path / "skip") == 0
    printed = capsys.readouterr().out
    assert "skipped 1 images:\n  The image " in printed and printed.count("b.jpg cannot be read") == 1
    (file,) = (tmp_path / "skip").glob("rows_*.jsonl")
    assert [json.loads(line)["image_id"] for line in file.read_text().splitlines()] == ["a.jpg", "c.jpg"]
    files = ["--image", pets / "a.jpg", pets / "b.jpg", pets / "c.jpg", "--expressions", "a cat"]
    words = [
        "--do_predict",
        "--model",
        model_dir,
        *files,
        "--on_bad_image",
        "skip",
        "--output_dir",
        tmp_path / "files",
    ]
    assert in_process(*words) == 0
    assert "skipped 1 images" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "files/predictions.json").read_text())) == 2
    assert in_process("--do_eval", "--on_bad_image", "ignore") == 1
