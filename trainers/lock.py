"""One run at a time in an output folder."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .output_folder import LOCK
from .processes import on_main_process

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


@contextmanager
def run_lock(output_dir: str | Path) -> Iterator[None]:
    """Hold the lock of an output folder while the block runs. Every process of the run must call this.

    The operating system frees the lock when its process ends, however it ends, so the next run takes over the lock file of
    a killed one.

    Raises:
        ValueError: Another run holds the lock. The message names its host, process and time of start.
        OSError: The folder cannot be written.
    """
    held: list[int] = []  # the main process's file descriptor
    is_new = not Path(output_dir).exists()
    on_main_process(lambda: _acquire(Path(output_dir), held))
    try:
        yield
    finally:
        for descriptor in held:
            (Path(output_dir) / LOCK).unlink(missing_ok=True)
            os.close(descriptor)
            if is_new:
                with suppress(OSError):  # the run has written something
                    Path(output_dir).rmdir()


def _acquire(output_dir: Path, held: list[int]) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                # Unlike flock, lockf is not inherited by data loader workers, which outlive a killed run for seconds.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            os.close(descriptor)
            raise ValueError(
                f"Another run writes to {output_dir}: {_describe(holder)}. Wait until it ends, or give another --output_dir."
            ) from None
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, PermissionError):
                raise
            return  # a file system without locks
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            break
        os.close(descriptor)  # its holder has just removed the file
    facts = {"host": socket.gethostname(), "process": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(facts).encode(), 0)
    held.append(descriptor)


def _describe(holder: str) -> str:
    try:
        facts = json.loads(holder)
        return f"process {facts['process']} on {facts['host']}, started at {facts['started']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just started"
