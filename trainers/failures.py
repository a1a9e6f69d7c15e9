"""Failures that a user can expect, in one line that says what is whole and how to go on."""

from __future__ import annotations

import errno
import io
import sys
import traceback
from pathlib import Path

import torch
from safetensors import SafetensorError

from evaluation.predict_dataset import SHARDS

from .output_folder import CARD
from .trainer import last_complete_checkpoint

CANNOT_GO_ON = (
    ValueError,
    OSError,
    FloatingPointError,
    KeyboardInterrupt,
    SafetensorError,
    torch.OutOfMemoryError,
    ImportError,
)

REPORT = (
    "This failure is unexpected: please report it with the lines above, the command, and the versions that "
    "`transformers env` prints."
)


def allow_any_file_name_in_output() -> None:
    """Escape characters that the terminal cannot show, so that no file name ends the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def report_failure(error: BaseException, output_dir: Path | None) -> None:
    """Print an expected failure as one line, and any other one as a traceback with a hint what to report."""
    if isinstance(error, CANNOT_GO_ON):
        print(f"run_gres.py: {explain(error, output_dir)}", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"run_gres.py: {REPORT}", file=sys.stderr)


def explain(error: BaseException, output_dir: Path | None) -> str:
    """Return one line about a failure: its cause, what is whole in the output folder, and how to go on."""
    return (
        " ".join(f"{cause(error)} {what_is_whole(output_dir)}".split()) if is_interruption(error) else one_line(error)
    )


def one_line(error: BaseException) -> str:
    """Return the message of an error whose text says how to go on."""
    return " ".join(str(error).split()) or type(error).__name__


def is_interruption(error: BaseException) -> bool:
    """Return whether an error ended work that may be partly done, so that its text does not say how to go on."""
    if isinstance(error, OSError):
        return error.errno is not None and not isinstance(error, FileNotFoundError)
    return isinstance(error, (KeyboardInterrupt, torch.OutOfMemoryError))


def cause(error: BaseException) -> str:
    """Return what ended the run, as a sentence."""
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted."
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "The card's memory is full: give a smaller --per_device_train_batch_size with more "
            "--gradient_accumulation_steps; --plan counts what fits."
        )
    assert isinstance(error, OSError)
    name = f"{error.filename}: " if error.filename else ""
    advice = {
        errno.ENOSPC: "make room, or give an --output_dir on another disk",
        errno.EDQUOT: "make room, or give an --output_dir on another disk",
        errno.EROFS: "give an --output_dir that can be written",
        errno.EACCES: "give a place that this user may read and write",
        errno.EPERM: "give a place that this user may read and write",
        errno.ENAMETOOLONG: "give a shorter name",
        errno.ENOTDIR: "a file is in the way; give another name, or move it away",
        errno.EEXIST: "a file is in the way; give another name, or move it away",
        errno.EISDIR: "it is a folder; give the name of a file",
    }.get(error.errno or 0)
    return f"{name}{error.strerror or error}{': ' + advice if advice else ''}."


def what_is_whole(output_dir: Path | None) -> str:
    """Return a sentence about what a run has finished, and the way to go on."""
    try:
        checkpoint = last_complete_checkpoint(output_dir) if output_dir is not None else None
        shards = len(list(output_dir.glob(SHARDS))) if output_dir is not None else 0
        is_described = output_dir is not None and (output_dir / CARD).is_file()
    except OSError:
        return ""
    if is_described:
        return f"The trained model in {output_dir} is complete; the same command does what is left."
    if shards:
        return f"{shards} shards of predictions in {output_dir} are complete; the same command goes on after them."
    if checkpoint is not None:
        return f"{checkpoint} is complete; the same command goes on from there."
    return "Nothing was finished; the same command begins again."
