"""`--do_predict` on data sets: real starts that are killed, doubled and resumed, and what is refused."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image, load_dataset
from hub_stand_in import HubStandIn
from paths import ROOT
from PIL import Image as Pillow

import run_gres
from evaluation.prediction_rows import PREDICTION_SCHEMA

ASKED = ["--expressions", "the red circle", "all stars", "a very long green thing on the left side"]
COUNT, BAD = 21, 5  # images in the data, and the one that cannot be read


def pictures(make_picture) -> list[bytes]:
    contents = []
    for n in range(COUNT):
        file = io.BytesIO()
        make_picture(n, 30 + n % 4 * 10, 40 - n % 3 * 10).save(file, format="PNG")
        contents.append(file.getvalue() if n != BAD else b"no image")
    return contents


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_picture):
    folder = tmp_path_factory.mktemp("pictures")
    for n, content in enumerate(pictures(make_picture)):
        (folder / f"{n:02d}.png").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def words(model_dir, folder):
    return ["--do_predict", "--model", str(model_dir), "--dataset", str(folder), *ASKED, "--shard_size", "4",
            "--per_device_eval_batch_size", "2", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]  # fmt: skip


def start(*words) -> int:
    return run_gres.main([str(word) for word in words])


def rows_in(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("predictions-*.parquet")) for row in pq.read_table(path).to_pylist()]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("predictions-*.parquet")}


@pytest.fixture(scope="module")
def runs(words, tmp_path_factory):
    """Starts of the real program in processes of their own, see tests/tools/killed_runs.py."""
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, "tests/tools/killed_runs.py", "predictions", str(folder / "report.json"), *words,
         "--output_dir", str(folder / "out")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "report.json").read_text()), done.stdout, done.stderr


def test_rows_of_a_folder(runs):
    folder, report, printed, _ = runs
    rows = rows_in(folder / "out")
    assert report["unbroken"] == 0 and len(rows) == COUNT * 3
    assert [row["image_id"] for row in rows] == [f"{n:02d}.png" for n in range(COUNT) for _ in range(3)]
    assert [row["expression"] for row in rows] == ASKED[1:] * COUNT
    errors = [row for row in rows if row["error"] is not None]
    assert {row["image_id"] for row in errors} == {f"{BAD:02d}.png"} and len(errors) == 3
    assert all("cannot be read as an image" in row["error"] for row in errors)
    assert all((row["mask"] is None) == (row["is_rejected"] is not False) for row in rows)
    assert (
        "21 images, 63 rows, 3 of them with an error" in printed and "images per second; the model waited" in printed
    )
    padding = float(printed.partition("images, and ")[2].partition(" %")[0])
    assert 0 <= padding < 10
    loaded = load_dataset(
        "parquet", data_files=str(folder / "out/predictions-*.parquet"), split="train", streaming=True
    )
    assert loaded.column_names == PREDICTION_SCHEMA.names and len(list(loaded)) == COUNT * 3


def test_any_number_of_processes_and_a_killed_run_write_the_same_files(runs):
    folder, report, printed, _ = runs
    files = files_in(folder / "out")
    assert sorted(files) == [f"predictions-00000-{n:05d}.parquet" for n in range(6)]
    assert report["two processes"] == report["to the end"] == 0
    assert report["killed in a batch"] == report["killed while writing"] == -9
    assert 0 < report["left"] < 6 and "shards with 8 images are finished, going on" in printed
    for name in ("two", "killed"):
        assert files_in(folder / f"out-{name}") == files, name
        assert not list((folder / f"out-{name}").glob("*.parquet.*"))
    assert "on 2 processes" in printed


def test_a_full_disk_and_ctrl_c_leave_whole_shards_and_say_how_to_go_on(runs):
    folder, report, _, said = runs
    assert report["full disk"] == report["interrupted"] == 1
    assert "Traceback" not in said, said[said.index("Traceback") - 500 :]
    assert (
        "No space left on device: make room, or give an --output_dir on another disk. 2 shards of predictions in"
        in said
    )
    assert "Interrupted. 3 shards of predictions in" in said
    assert said.count("are complete; the same command goes on after them.") == 2
    for name, count in (("full", 2), ("interrupted", 3)):
        assert report[f"rows of {name}"] == count * 4 * 3
        assert files_in(folder / f"out-{name}") == files_in(folder / "out")


def test_two_runs_at_once_are_refused(runs):
    folder, report, _, said = runs
    assert report["second"] == 1 and f"Another run writes to {folder / 'out'}" in said


def test_a_finished_run_does_nothing_and_other_settings_are_refused(runs, words, capsys):
    out = runs[0] / "out"
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert start(*words, "--output_dir", out) == 0
    assert "6 shards with 21 images are finished, going on" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert start(*words, "--output_dir", out, "--threshold", "1.5", "--masks", "png") == 1
    said = capsys.readouterr().err
    assert f"{out} holds the predictions of another run" in said
    assert "threshold: None then, 1.5 now; masks: 'rle' then, 'png' now. Give the arguments of that run" in said
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_parquet_of_several_files_with_questions_of_its_own(words, tmp_path, make_picture, capsys):
    contents = pictures(make_picture)
    rows = [
        {
            "image": {"bytes": content, "path": None},
            "name": f"n{n}",
            "queries": ["a cat"] * (n % 3 + 1),
            "question": "segment it",
        }
        for n, content in enumerate(contents)
    ]
    table = Dataset.from_list(rows).cast_column("image", Image())
    for n, part in enumerate((table.select(range(10)), table.select(range(10, COUNT)))):
        part.to_parquet(tmp_path / f"data/{n}.parquet")
    words = [*words[:4], str(tmp_path / "data"), *words[words.index("--shard_size") :], "--id_column", "name"]
    assert start(*words, "--expressions_column", "queries", "--masks", "png", "--output_dir", tmp_path / "a") == 0
    assert sorted(files_in(tmp_path / "a")) == [
        *(f"predictions-00000-{n:05d}.parquet" for n in range(3)),
        *(f"predictions-00001-{n:05d}.parquet" for n in range(3)),
    ]
    found = rows_in(tmp_path / "a")
    assert [row["image_id"] for row in found] == [f"n{n}" for n in range(COUNT) for _ in range(n % 3 + 1)]
    kept = [row for row in found if row["is_rejected"] is False]
    assert kept and all(Pillow.open(io.BytesIO(row["mask_png"])).size == (row["width"], row["height"]) for row in kept)
    asks = ["--question_column", "question", "--max_new_tokens", "3", "--masks", "none"]
    assert start(*words, *asks, "--output_dir", tmp_path / "b") == 0
    answered = [row for row in rows_in(tmp_path / "b") if row["error"] is None]
    assert {row["image_id"] for row in answered} == {f"n{n}" for n in range(COUNT) if n != BAD}
    assert all(
        row["answer"] is not None and row["question"] == "segment it" and row["mask"] is None for row in answered
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--dataset": "nowhere/none"}, ["'nowhere/none' is no file or folder"]),
        ({"--dataset": "EMPTY"}, ["holds no images"]),
        ({"--image_column": "picture"}, ["no column 'picture', but image;", "--image_column"]),
        ({"--expressions_column": "queries"}, ["not expressions and expressions_column"]),
        ({"--expressions": None}, ["--do_predict needs one of --expressions, --expressions_column"]),
        ({"--expressions": ["a [SEG] b"]}, ["holds [SEG]", "take it out"]),
        ({"--expressions": ["a"] * 10_000}, ["10000 expressions are more than"]),
        ({"--expressions": ["a" * 100_000]}, ["has 100000 characters"]),
        ({"--protocols": "teacher_forced"}, ["needs gold answers"]),
        ({"--masks": "jpg"}, ["masks='jpg'"]),
        ({"--shard_size": "0"}, ["shard_size=0"]),
        ({"--do_eval": "true"}, ["no annotations to train or evaluate on"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_before_anything_runs(changes, said, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_gres, "load_model", lambda *_: pytest.fail("the model was loaded"))
    if "[SEG]" in str(changes):
        monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    arguments = {"--dataset": words[4], "--expressions": ASKED[1:], **changes}
    rest = [word for word in words if word not in ("--dataset", words[4], *ASKED)]
    for name, value in arguments.items():
        if value is not None:
            value = [str(tmp_path / "empty")] if value == "EMPTY" else value
            rest += [name, *([value] if isinstance(value, str) else value)]
    assert start(*rest, "--output_dir", tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert all(word in printed for word in said), printed[-600:]
    assert "Traceback" not in printed and not list(tmp_path.glob("out/*.parquet"))


HUB = """
import sys, torch, run_gres
from huggingface_hub import HfApi
torch.set_num_threads(1)
data, *words = sys.argv[1:]
HfApi().create_repo("someone/pictures", repo_type="dataset")
HfApi().upload_folder(repo_id="someone/pictures", repo_type="dataset", folder_path=data)
sys.exit(run_gres.main(words))
"""


def test_a_hub_data_set_in_and_a_hub_data_set_out(words, tmp_path, make_picture):
    rows = [{"image": {"bytes": content, "path": None}} for content in pictures(make_picture)[:6]]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(tmp_path / "data/train-00000.parquet")
    words = [*words[:4], "someone/pictures", *words[5:], "--push_to_hub", "--hub_model_id", "someone/predicted"]
    with HubStandIn() as hub:
        done = subprocess.run(
            [sys.executable, "-c", HUB, str(tmp_path / "data"), *words, "--output_dir", str(tmp_path / "out")],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **hub.environment(tmp_path / "cache")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = hub.files("dataset", "someone/predicted")
    local = files_in(tmp_path / "out")
    assert {name: content for name, content in pushed.items() if name.endswith(".parquet")} == local and len(
        local
    ) == 2
    assert b"data set: someone/pictures" in pushed["README.md"] and "predictions_run.json" not in pushed
    assert [row["image_id"] for row in rows_in(tmp_path / "out")] == [str(n) for n in range(6) for _ in range(3)]
