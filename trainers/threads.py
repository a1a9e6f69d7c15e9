"""Choose how many CPU threads each process of a run computes with.

With one thread per core on cores that other programs use, every parallel operation waits for its slowest thread: a
training step of the demo took 219 s instead of 12 s with a single thread. Letting threads wait passively instead costs
half of the speed on quiet cores. So training looks at the load of the machine before it starts and takes the free cores.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

PROC_STAT = Path("/proc/stat")


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ticks() -> dict[int, tuple[int, int]]:
    """Return (busy, all) clock ticks since start-up for each core. The columns are described in proc(5)."""
    ticks = {}
    for line in PROC_STAT.read_text().splitlines():
        name, *columns = line.split()
        if name.startswith("cpu") and name[3:].isdigit():
            user, nice, system, idle, iowait, irq, softirq, steal = (int(column) for column in columns[:8])
            busy = user + nice + system + irq + softirq + steal
            ticks[int(name[3:])] = busy, busy + idle + iowait
    return ticks


def busy_cores(seconds: float = 0.5) -> float:
    """Return the number of usable cores that are busy now, as the sum of each core's share of time.

    Linux counts it per core; this waits `seconds` between two looks. Elsewhere it is the load average of the last
    minute, and 0 on systems that have none.
    """
    try:
        before = _ticks()
        time.sleep(seconds)
        after = _ticks()
    except (OSError, ValueError):
        try:
            return os.getloadavg()[0]
        except (AttributeError, OSError):
            return 0.0
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else after.keys()
    shares = []
    for core in before.keys() & after.keys() & set(usable):
        busy, total = (now - then for now, then in zip(after[core], before[core]))
        shares.append(busy / total if total > 0 else 0.0)
    return sum(shares)


def training_threads(requested: int | None, recorded: int | None = None) -> tuple[int, str]:
    """Return the number of threads for each process and a sentence that says why. Every process must call this.

    Args:
        requested: `--threads`.
        recorded: The number that the checkpoint was trained with. A resumed run takes the same one, because the order
            in which sums are added up depends on it.
    """
    cores, state = usable_cores(), PartialState()
    if requested is not None:
        return requested, f"CPU threads per process: {requested}, as --threads says."
    if recorded is not None and 1 <= recorded <= cores:
        return recorded, f"CPU threads per process: {recorded}, as before in this run; --threads changes it."
    state.wait_for_everyone()  # so that no process counts the start-up of another one
    busy = busy_cores()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    threads = max(round(cores - busy) // processes, 1)
    if state.num_processes > 1:
        threads = min(gather_object([threads]))
    sentence = f"CPU threads per process: {threads}; {busy:.1f} of {cores} cores are busy, {processes} processes share the rest."
    if recorded is not None:
        sentence += f" The checkpoint was trained with {recorded}, which this machine does not have: sums may round differently."
    return threads, sentence
