"""Work that only the main process does, with the same outcome in all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list

Result = TypeVar("Result")


def on_main_process(function: Callable[[], Result]) -> Result:
    """Call `function` on the main process and return its result on every process.

    A ValueError or OSError that it raises is raised on every process, so that none of them waits for the others.

    Raises:
        ValueError: Several processes were started, but each believes to be alone.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    if state.distributed_type == DistributedType.NO:  # accelerate, with ddp_backend=gloo and without a card
        raise ValueError(
            f"{state.num_processes} processes were started, but accelerate does not let them train together on this machine. "
            "Without a card, train data parallel with --use_cpu and without --ddp_backend, or with DeepSpeed "
            "(configs/accelerate/zero2.yaml)."
        )
    outcome: list = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
