"""The roads through the project on a device that is not the CPU, without a card (tests/tools/pretend_card.py)."""

import re
import subprocess
import sys

import pytest
from paths import ROOT
from torch.utils import backend_registration

ROADS = "tests/tools/roads_on_a_card.py"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch takes no device that is written in Python",
)
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_every_road_ends_on_the_card_as_on_the_cpu(which):
    """In a process of its own, since a device is registered for all of one."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        ROADS,
        "-m",
        which,
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > (40 if which == "not slow" else 5)
