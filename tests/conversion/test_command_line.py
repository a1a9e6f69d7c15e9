"""convert_checkpoint.py ends each expected failure in one line with status 1, and leaves nothing behind."""

import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

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


def test_an_interrupt_that_a_library_turns_into_another_error(original, tmp_path, monkeypatch):
    """transformers does so while it imports a module."""

    def fail(*_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module") from error

    monkeypatch.setattr("conversion.writing.as_bytes", fail)
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


@pytest.mark.parametrize("words, message", [
    (["--lora_alpha", "nan"], "--lora_alpha must be a finite number, not nan"),
    (["--lora_alpha", "inf"], "--lora_alpha must be a finite number, not inf"),
    (["--seed", "-1"], "--seed must be from 0 to 4294967295, not -1"),
    (["--reverse"], "--reverse needs --checkpoint"),
])  # fmt: skip
def test_options_are_checked_first(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--output", str(tmp_path / "out"), *words])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_name_that_the_terminal_cannot_print(original, tmp_path):
    """Neither a name beyond the terminal's characters nor bytes that are no text end a conversion."""
    output = os.fsdecode(bytes(tmp_path) + "/gsva-\u7532-".encode() + b"\xff")
    command = [sys.executable, str(ROOT / "convert_checkpoint.py"), "--checkpoint", str(original / "full.pt"), "--llava",
               str(original / "llava"), "--clip", str(original / "clip"), "--output", output]  # fmt: skip
    ended = subprocess.run(
        command, capture_output=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert ended.returncode == 0, ended.stderr
    assert b"Wrote" in ended.stdout and b"\\u7532" in ended.stdout
    assert (Path(output) / "model.safetensors").is_file() and (Path(output) / "README.md").is_file()


def test_lora_that_is_scaled_beyond_float32_is_refused(original, tmp_path):
    torch.save(
        {key: value * 1000 if "lora_" in key else value for key, value in peft_names(original).items()},
        tmp_path / "gsva.bin",
    )
    with pytest.raises(SystemExit, match="--lora_alpha 1e\\+38 gives weights beyond float32"):
        run(original, tmp_path / "gsva.bin", tmp_path / "out", "--lora_alpha", "1e38")
