"""The number of CPU threads of a run: the free cores at first, the same number after a resume, `--threads` before both."""

import pytest
import torch

from trainers import threads
from trainers.arguments import parse_arguments
from trainers.threads import busy_cores, training_threads, usable_cores


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many cores, of which so many are busy."""

    def make(cores, busy, processes=1):
        monkeypatch.setattr(threads, "usable_cores", lambda: cores)
        monkeypatch.setattr(threads, "busy_cores", lambda: busy)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return make


@pytest.mark.parametrize(
    ("cores", "busy", "processes", "expected"),
    [
        (8, 0.0, 1, 8),
        (8, 0.2, 1, 8),  # the usual background of a quiet machine
        (8, 3.0, 1, 5),
        (2, 1.0, 1, 1),
        (2, 2.0, 1, 1),  # never none
        (2, 7.5, 1, 1),  # a load average may be above the number of cores
        (8, 2.0, 2, 3),  # shared by the processes of the machine
        (8, 2.0, 8, 1),
    ],
)
def test_training_takes_the_free_cores(machine, cores, busy, processes, expected):
    machine(cores, busy, processes)
    count, sentence = training_threads(None)
    assert count == expected
    assert f"CPU threads per process: {expected};" in sentence and f"{busy:.1f} of {cores} cores are busy" in sentence


def test_a_resumed_run_takes_as_many_as_before(machine):
    machine(8, 6.0)
    assert training_threads(None, recorded=5) == (5, training_threads(None, recorded=5)[1])
    assert "5, as before in this run" in training_threads(None, recorded=5)[1]
    assert training_threads(3, recorded=5)[0] == 3  # --threads
    count, sentence = training_threads(None, recorded=9)  # on a smaller machine
    assert count == 2 and "trained with 9" in sentence


PROC_STAT = """cpu  100 0 100 800 0 0 0 0 0 0
cpu0 {busy} 0 0 {idle} 0 0 0 0 0 0
cpu1 50 0 50 {idle} 40 0 0 0 0 0
cpu7 {busy} 0 0 0 0 0 0 0 0 0
intr 5
"""


def test_busy_cores_are_counted_per_core(tmp_path, monkeypatch):
    """Core 0 is busy for 75 of 100 ticks, core 1 waits, and core 7 is not ours."""
    stat = tmp_path / "stat"
    stat.write_text(PROC_STAT.format(busy=1000, idle=2000))
    monkeypatch.setattr(threads, "PROC_STAT", stat)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: stat.write_text(PROC_STAT.format(busy=1075, idle=2025)))
    assert busy_cores() == pytest.approx(0.75)
    assert usable_cores() == 2


def test_without_proc_the_load_average_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "PROC_STAT", tmp_path / "none")
    monkeypatch.setattr(threads.os, "getloadavg", lambda: (1.5, 0, 0), raising=False)
    assert busy_cores() == 1.5
    monkeypatch.delattr(threads.os, "getloadavg")  # Windows
    assert busy_cores() == 0


@pytest.mark.parametrize("number", ["0", "-1", str(usable_cores() + 1), "5000"])
def test_more_threads_than_cores_are_refused(number):
    with pytest.raises(
        ValueError, match=f"threads={number} is not possible: this process may use {usable_cores()} CPU"
    ):
        parse_arguments(["--threads", number, "--use_cpu"])
    assert parse_arguments(["--threads", str(usable_cores()), "--use_cpu"])[2].threads == usable_cores()


def test_the_number_is_kept_with_the_checkpoint(model_dir, tmp_path, monkeypatch, capsys):
    """Through the program: chosen at the start, used in training, kept in the checkpoint and taken again."""
    import json

    import run_gres
    from trainers import training
    from trainers.trainer import GsvaTrainer

    used = []
    step = GsvaTrainer.training_step
    monkeypatch.setattr(
        GsvaTrainer, "training_step", lambda self, *a, **k: used.append(torch.get_num_threads()) or step(self, *a, **k)
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "training_threads", training_threads)
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(threads, "busy_cores", lambda: 2.0)
    words = [
        "--model",
        str(model_dir),
        "--dataset_options",
        '{"size": 8}',
        "--do_train",
        "--use_cpu",
        "--save_steps",
        "1",
    ]
    words += ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"]
    assert run_gres.main([*words, "--max_steps", "1"]) == 0
    assert "CPU threads per process: 2; 2.0 of 4 cores are busy" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/checkpoint-1/run.json").read_text())["threads"] == 2
    monkeypatch.setattr(threads, "busy_cores", lambda: 0.0)
    assert run_gres.main([*words, "--max_steps", "2"]) == 0
    assert "CPU threads per process: 2, as before in this run" in capsys.readouterr().out
    assert run_gres.main([*words, "--max_steps", "3", "--threads", "1"]) == 0
    assert used == [2, 2, 1]
