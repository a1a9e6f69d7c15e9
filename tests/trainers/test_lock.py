"""Two runs never write to one output folder at once."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from paths import ROOT

from trainers.lock import run_lock
from trainers.output_folder import LOCK

HOLDER = """
import sys, time
from trainers.lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_run_is_refused_by_name_of_the_first(holder, tmp_path, capsys):
    import run_gres

    started = json.loads((tmp_path / LOCK).read_text())["started"]
    expected = (
        f"Another run writes to {tmp_path}: process {holder.pid} on {socket.gethostname()}, started at {started}."
    )
    with pytest.raises(ValueError) as error, run_lock(tmp_path):
        pass
    assert expected in str(error.value)
    words = ["--do_eval", "--use_cpu", "--model", "nothing", "--output_dir", str(tmp_path)]
    assert run_gres.main(words) == 1  # before anything is loaded
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_the_lock_of_a_killed_run_is_taken_over(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / LOCK).read_text())["process"] == holder.pid  # stale
    with run_lock(tmp_path):
        facts = json.loads((tmp_path / LOCK).read_text())
        assert (facts["process"], facts["host"]) == (os.getpid(), socket.gethostname())
    assert not list(tmp_path.iterdir())


def test_the_lock_ends_with_the_run_however_it_ends(tmp_path):
    with pytest.raises(KeyError), run_lock(tmp_path / "new"):
        raise KeyError
    assert not (tmp_path / "new").exists()  # nothing was written
    with run_lock(tmp_path / "new"):
        (tmp_path / "new" / "result").write_text("")
    with run_lock(tmp_path / "new"):
        pass
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result"]
