"""A pushed directory gives the recorded masks in a process that knows nothing of the project, with whatever transformers is installed.

`make matrix` runs this with the oldest and the newest one of the declared range, so both give the same masks.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT
from pushed_masks import MODELS, RECORD, save

TOOL = ROOT / "tests/tools/pushed_masks.py"
# Another processor orders sums anew: of a pixel whose logit is almost 0 the sign may change.
SCORE, PIXELS = 5e-3, 3


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    save(folder)
    command = [sys.executable, "-I", str(TOOL), "ask", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout)
    assert not answers["of_project"], "the code of the directory should have answered, not the project's"
    return answers["models"]


def pixels(runs: list[int]) -> np.ndarray:
    """Which pixels a mask has, of 128 × 128; runs begin with those outside."""
    kinds = np.arange(len(runs)) % 2 == 1
    mask = np.repeat(kinds, runs)
    return np.pad(mask, (0, 128 * 128 - len(mask)))


@pytest.mark.parametrize("name", MODELS)
def test_masks_are_the_recorded_ones(answers, name):
    recorded = json.loads(RECORD.read_text())[name]
    assert len(answers[name]) == len(recorded) == 12
    for found, expected in zip(answers[name], recorded):
        what = expected["expression"]
        assert (found["expression"], found["rejected"]) == (what, expected["rejected"])
        assert found["score"] == pytest.approx(expected["score"], abs=SCORE), what
        assert (pixels(found["runs"]) != pixels(expected["runs"])).sum() <= PIXELS, what
        assert expected["rejected"] or 20 < pixels(expected["runs"]).sum() < 5000, what
    assert name != "tiny_gsva_gres" or 2 < sum(one["rejected"] for one in recorded) < 10
