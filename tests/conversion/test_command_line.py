"""convert_checkpoint.py ends each expected failure in one line with status 1, and leaves nothing behind."""

import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from conversions import peft_names, run
from paths import ROOT

import convert_checkpoint
from convert_checkpoint import main


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@contextmanager
def largest_file(size: int):
    """Let writing more than `size` bytes to a file fail, as on a disk that gets full."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("size", [4_000, 9_000, 200_000])  # within the configuration, the tokenizer, the weights
def test_a_disk_that_gets_full_ends_in_one_line(size, original, tmp_path, capfd):
    torch.save(peft_names(original), tmp_path / "gsva.bin")
    with largest_file(size), pytest.raises(SystemExit) as error:
        run(original, tmp_path / "gsva.bin", tmp_path / "out")
    assert error.value.code.startswith(
        f"error: {tmp_path / 'out'} was not written (File too large): nothing of it is left behind."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["gsva.bin"]
    assert lines(capfd.readouterr().err) == []


def test_reverse_on_a_disk_that_gets_full(original, tmp_path, capfd):
    run(original, original / "full.pt", tmp_path / "ours")
    capfd.readouterr()
    with largest_file(200_000), pytest.raises(SystemExit, match="back.bin was not written .*nothing of it is left"):
        main(["--checkpoint", str(tmp_path / "ours"), "--reverse", "--output", str(tmp_path / "back.bin")])
    assert [path.name for path in tmp_path.iterdir()] == ["ours"] and lines(capfd.readouterr().err) == []


def test_an_interrupt_during_the_imports_ends_in_one_line(tmp_path):
    shutil.copy(ROOT / "convert_checkpoint.py", tmp_path)
    # Stands for the seconds in which torch and transformers are imported.
    (tmp_path / "conversion.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, str(tmp_path / "convert_checkpoint.py")], capture_output=True, text=True,
                           timeout=50, check=False)  # fmt: skip
    assert ended.returncode == 1 and lines(ended.stderr) == [convert_checkpoint.INTERRUPTED]


def test_an_interrupt_while_writing_leaves_nothing(original, tmp_path, monkeypatch):
    def interrupt(*_):
        assert any(path.name.startswith(".") for path in tmp_path.iterdir())  # the folder is begun
        raise KeyboardInterrupt

    monkeypatch.setattr("conversion.writing.as_bytes", interrupt)
    with pytest.raises(SystemExit) as error:
        run(original, original / "full.pt", tmp_path / "out")
    assert error.value.code == convert_checkpoint.INTERRUPTED and not list(tmp_path.iterdir())


def test_the_unexpected_shows_its_traceback_with_what_to_report(original, tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("conversion.writing.as_bytes", fail)
    with pytest.raises(ZeroDivisionError) as error:
        run(original, original / "full.pt", tmp_path / "out")
    (note,) = error.value.__notes__
    assert "Please report these lines with the command" in note and f"torch {torch.__version__.split('+')[0]}" in note
    assert not list(tmp_path.iterdir())


def test_messages_of_libraries_become_one_line(original, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("first\n  second\n")

    monkeypatch.setattr("conversion.writing.as_bytes", fail)
    with pytest.raises(SystemExit) as error:
        run(original, original / "full.pt", tmp_path / "out")
    assert error.value.code == "error: first second"
