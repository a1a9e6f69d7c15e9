"""The script for a rented machine: its head, its rows, and (slow) a whole run against a stand-in of the Hub."""

import io
import json
import os
import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from example_files import load_example
from hub_stand_in import HubStandIn
from paths import ROOT
from transformers import pipeline

from evaluation.prediction_rows import PREDICTION_SCHEMA
from evaluation.predictor import Predictor

SCRIPT = ROOT / "examples/label_hub_dataset.py"
TEXTS = ["the red circle", "all stars", "a unicorn"]


@pytest.fixture(scope="module")
def example():
    return load_example("label_hub_dataset.py")


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_the_head_names_what_the_script_imports_in_this_projects_ranges():
    head = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.DOTALL | re.MULTILINE)[1]
    asked = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in head.splitlines(True)))
    declared = {line.strip().lower() for line in (ROOT / "setup.cfg").read_text().splitlines()}
    assert set(asked["dependencies"]) <= declared and asked["requires-python"] == ">=3.11"
    names = {re.split("[<>=]", dependency)[0] for dependency in asked["dependencies"]}
    imported = set(re.findall(r"^(?:import|from) (\w+)", SCRIPT.read_text(), re.MULTILINE))
    installed_as = {"PIL": "pillow"}
    assert {installed_as.get(name, name) for name in imported} - set(sys.stdlib_module_names) <= names


def test_its_columns_are_those_of_all_predictions(example):
    for column in example.SCHEMA:
        assert PREDICTION_SCHEMA.field(column.name).type == column.type


def test_rows_equal_the_predictors_and_every_error_is_a_row(example, model_dir, make_picture):
    segment = pipeline("generalized-referring-segmentation", model=str(model_dir), trust_remote_code=True)
    images = [png(make_picture(n, 40, 30)) for n in range(3)]
    rows = [
        {"image_id": str(n), "image": {"bytes": image, "path": None}, "expressions": TEXTS}
        for n, image in enumerate(images)
    ]
    broken = {"image_id": "broken", "image": {"bytes": b"no image", "path": None}, "expressions": TEXTS}
    wrong = {**rows[0], "image_id": "wrong", "expressions": ["[SEG]"]}
    found = list(example.label(segment, [rows[0], broken, rows[1], wrong, rows[2]], batch_size=2, threshold=None))
    errors = {row["image_id"]: row["error"] for row in found if row.get("error")}
    assert errors.keys() == {"broken", "wrong"}
    assert "cannot be read" in errors["broken"] and "[SEG]" in errors["wrong"]
    expected = Predictor(str(model_dir), expressions=TEXTS)({"image": images, "image_id": ["0", "1", "2"]})
    expected = pyarrow.table(expected, schema=PREDICTION_SCHEMA).to_pylist()
    answered = [row for row in found if not row.get("error")]
    assert [(row["image_id"], row["expression"]) for row in answered] == [
        (str(n), text) for n in range(3) for text in TEXTS
    ]
    assert 0 < sum(row["is_rejected"] for row in answered) < len(answered)
    for row, other in zip(answered, expected):
        for name in set(example.SCHEMA.names) - {"model", "score", "probability", "iou_estimate"}:
            assert row.get(name) == other[name], name
        for name in ("score", "probability", "iou_estimate"):
            assert row[name] == pytest.approx(other[name], abs=1e-5)


def test_other_settings_are_refused(example, tmp_path, monkeypatch):
    (tmp_path / "settings.json").write_text(json.dumps({"model": "a", "threshold": None}))
    monkeypatch.setattr(example, "hf_hub_download", lambda *_, **__: tmp_path / "settings.json")
    api = SimpleNamespace(
        create_repo=lambda *_, **__: None,
        list_repo_files=lambda *_, **__: ["settings.json", "data/predictions-000000.parquet"],
    )
    assert example.begin(api, "u/out", {"model": "a", "threshold": None}, False) == {"data/predictions-000000.parquet"}
    with pytest.raises(SystemExit, match="model 'a' instead of 'b'"):
        example.begin(api, "u/out", {"model": "b", "threshold": None}, False)


@pytest.mark.slow
def test_a_run_from_hub_to_hub_and_on_after_a_stop(model_dir, make_picture, tmp_path):
    file = io.BytesIO()
    images = [{"bytes": png(make_picture(n)), "path": f"{n}.png"} for n in range(5)]
    table = pyarrow.table({"photo": images, "name": [f"image {n}" for n in range(5)]})
    pyarrow.parquet.write_table(table, file)
    with HubStandIn() as hub:
        model = {path.name: path.read_bytes() for path in model_dir.iterdir() if path.is_file()}
        hub.repositories["model", "someone/gsva"] = [("a" * 40, model)]
        hub.repositories["dataset", "someone/photos"] = [
            ("b" * 40, {"data/train-00000-of-00001.parquet": file.getvalue()})
        ]

        def run(*options):
            command = [sys.executable, SCRIPT, "someone/photos", "someone/labels", "--model", "someone/gsva", "--image_column",
                       "photo", "--id_column", "name", "--shard_size", "2", "--expressions", *TEXTS, *options]  # fmt: skip
            environment = {**os.environ, **hub.environment(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
            environment.pop("PYTHONPATH", None)  # the script needs nothing of this project but the model's own code
            return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

        done = run()
        assert done.returncode == 0, done.stderr[-2000:]
        first = dict(hub.files("dataset", "someone/labels"))
        shards = [f"data/predictions-{n:06d}.parquet" for n in range(3)]
        assert [name for name in sorted(first) if name.startswith("data/")] == shards
        rows = [row for name in shards for row in pyarrow.parquet.read_table(io.BytesIO(first[name])).to_pylist()]
        assert [(row["image_id"], row["expression"]) for row in rows] == [
            (f"image {n}", text) for n in range(5) for text in TEXTS
        ]
        assert all(row["error"] is None for row in rows) and any(row["mask"] for row in rows)

        # what the Hub has after a machine was lost with the second shard on it
        hub.files("dataset", "someone/labels").pop(shards[1])
        again = run()
        assert again.returncode == 0, again.stderr[-2000:]
        assert "2 shards are on the Hub already" in again.stdout
        assert shards[1] in again.stdout and shards[0] not in again.stdout and shards[2] not in again.stdout
        second = hub.files("dataset", "someone/labels")
        table = pyarrow.parquet.read_table(io.BytesIO(second[shards[1]]))
        assert table.equals(pyarrow.parquet.read_table(io.BytesIO(first[shards[1]])))

        refused = run("--threshold", "3")
        assert refused.returncode == 1 and "threshold None instead of 3.0" in refused.stderr


def test_images_are_read_from_rows_and_from_the_hub_alone(example, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"of this machine")
    monkeypatch.setattr(example, "HfFileSystem", lambda: SimpleNamespace(read_bytes=lambda path: path.encode()))
    assert example.content_of({"bytes": b"held", "path": "a.png"}) == b"held"
    assert example.content_of({"bytes": None, "path": "hf://datasets/a/b/c.png"}) == b"hf://datasets/a/b/c.png"
    with pytest.raises(ValueError, match="a.png instead of holding it"):
        example.content_of({"bytes": None, "path": str(tmp_path / "a.png")})
