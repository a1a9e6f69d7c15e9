"""Make the files and run the commands of "Your own data" in data_scripts/README.md as they are written there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

PAGE = (ROOT / "data_scripts/README.md").read_text(encoding="utf-8").partition("## Your own data\n")[2]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)


def blocks(kind: str) -> list[str]:
    return [text for found, text in BLOCKS if found == kind]


@pytest.fixture
def shell(tmp_path):
    """The program's folder as the page's reader stands in it, with the page's files in `pets`."""
    for name in ("run_gres.py", "assets", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    pets = tmp_path / "pets"
    for folder in ("photos", "masks"):
        (pets / folder).mkdir(parents=True)
    (lines,) = blocks("json")
    for name in re.findall(r"^  (\w+\.jsonl)$", blocks("text")[0], re.MULTILINE):  # the tree
        (pets / name).write_text(lines, encoding="utf-8")
    for line in lines.splitlines():
        pixels = np.random.default_rng(len(line)).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pets / json.loads(line)["image"])
    Image.new("L", (400, 300)).save(pets / "masks/2_dogs.png")  # still empty: the page shows the error
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "HF_DATASETS_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip

    def run(command: str, status: int = 0) -> str:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    return run


@pytest.mark.slow
def test_the_page_as_written(shell, tmp_path):
    (check, *shown) = next(text for text in blocks("text") if text.startswith("$ ")).splitlines()
    said = shell(check.removeprefix("$ "), status=1)
    for line in shown:
        assert line.strip(" .") in said, said  # the page shortens with dots
    picture = np.zeros((300, 400), np.uint8)
    picture[50:200, 100:300] = 255
    Image.fromarray(picture).save(tmp_path / "pets/masks/2_dogs.png")
    assert "INCOMPLETE" not in shell(check.removeprefix("$ "))

    train, rehearsal, predict = (text for text in blocks("bash") if "run_gres.py" in text)
    assert "trained 3 steps" in shell(train)
    records = json.loads((tmp_path / "runs/pets/results.json").read_text())
    assert [(entry["stage"], entry["dataset"], entry["split"], entry["samples"]) for entry in records] == [
        ("before", "own", "val", 2), ("after", "own", "val", 2)]  # fmt: skip
    shell(predict)
    (answers,) = json.loads((tmp_path / "runs/answers/predictions.json").read_text())
    assert [entry["text"] for entry in answers["expressions"]] == ["the left cat", "a unicorn"]
    assert "trained 2 steps" in shell(rehearsal)
    assert (tmp_path / "runs/rehearsal/adapter/adapter_model.safetensors").is_file()
    (python,) = blocks("python")
    assert shell(f'{sys.executable} -c \'{python}print(len(rows), rows[1]["expressions"][0]["text"])\'').split() == [
        "2",
        "both",
        "dogs",
    ]
