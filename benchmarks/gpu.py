"""Run what has never run without a card: the tests marked `gpu`, then workload L, on one CUDA device.

    python -m benchmarks gpu [--minutes 9] [--only PART …] [--output runs/gpu] [--dry_run]

Needs no network: weights of the 7B model's true shapes are drawn at random on the card, and so are the images. It runs with the
libraries that are installed, says which are older than setup.cfg allows, and names each part and each file of tests that this leaves
out. A part that fails does not end it, and what it has when it is stopped or out of time is kept: gpu.json and gpu.html are written
anew after each figure.

`--dry_run` lists what would be run, and runs all of it on tiny shapes on the CPU; what needs a card is named.
"""

from __future__ import annotations

import argparse
import gc
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import torch

from benchmarks._gpu_report import STATES, Figure, Result, device_facts, versions, write
from benchmarks._gpu_tests import TestsFailed, run_tests

TESTS = "tests"
TESTS_SHARE = 0.4  # of the time, so that a test that hangs leaves the workload its part
# What each part measures: a function of _gpu_parts, but for the tests. The order is that of worth for a first hour.
PARTS = {
    TESTS: "The tests marked `gpu`, in a process of their own",
    "differences": "A small model on the card from the CPU in fp32, and bf16 from fp32",
    "sam_encoder": "SAM's encoder: ours against transformers' sdpa and eager attention, plain and compiled",
    "evaluation": "Evaluation as `run_gres.py --do_eval` does it, by stages",
    "training_step": "A step of finetune_gres_7b, and its memory beside what `--plan` counts",
    "generation": "`generate` with a dynamic cache, a static one, and a static one compiled",
    "mask_decoder": "The mask decoder, for slots of one image and of several",
    "sam2_encoders": "SAM 2.1's encoders beside ViT-H",
    "sam_ways": "Each way of SAM's attention, plain and compiled",
    "feature_cache": "A step with a warm feature cache, and whether CLIP's features are worth their files",
    "qlora_step": "The training step with the language model in nf4",
    "loading": "A directory of 15 GB loaded to the card, also with float16 turned into bfloat16 on the way",
    "conversion": "A checkpoint of the original's layout converted, beside copying its bytes",
}


def figures_of(name: str, device: torch.device, minutes: float) -> Iterator[Figure]:
    """Yield the figures of a part. Its libraries are imported here, so that one that is too old costs the parts that need it."""
    if name == TESTS:
        yield from run_tests(minutes * TESTS_SHARE)
        return
    parts, workload = import_module("benchmarks._gpu_parts"), import_module("benchmarks._gpu_workload")
    work = workload.LARGE if device.type == "cuda" else workload.TINY
    yield from getattr(parts, name)(parts.Bench(work, device))


def run_part(result: Result, figures: Callable[[], Iterator[Figure]], keep: Callable[[], None]) -> None:
    """Run a part into its result and keep it after each figure; a failure is written into it."""
    begun, result.state, result.reason = time.perf_counter(), "failed", "it was stopped"
    try:
        for figure in figures():
            result.figures.append(figure)
            result.seconds = time.perf_counter() - begun
            keep()
        result.state, result.reason = "done", ""
    except ImportError as error:
        result.state, result.reason = "skipped", f"left out: {' '.join(str(error).split())[:300]}"
    except TestsFailed as error:
        result.reason = str(error)
    except Exception as error:  # noqa: BLE001
        result.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        result.seconds = time.perf_counter() - begun
        keep()


def free(device: torch.device) -> None:
    """Give back what earlier parts held: tensors in cycles and in compiled graphs, and the memory that PyTorch keeps."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def listing() -> str:
    """Return what is run, one line a part."""
    return "\n".join(f"{name:<16}{title}" for name, title in PARTS.items())


def run(
    names: list[str],
    device: torch.device,
    minutes: float,
    output: Path,
    part: Callable[[str, torch.device, float], Iterator[Figure]] = figures_of,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Run parts one after the other until the time is over."""
    end = time.monotonic() + 60 * minutes
    found, notes = versions()
    facts = {**device_facts(device), "date": time.strftime("%Y-%m-%d %H:%M"), "dry_run": device.type != "cuda",
             "versions": found, "notes": notes}  # fmt: skip
    results = [Result(name, re.sub("`", "", PARTS[name])) for name in names]

    def keep() -> None:
        write(output, facts, results)

    keep()
    for result in results:
        left = (end - time.monotonic()) / 60
        if left <= 0:
            result.reason = f"the {minutes:g} minutes were over; run it with --only {result.name}"
            keep()
            continue
        say(f"{result.name} ...")
        run_part(result, lambda name=result.name, left=left: part(name, device, left), keep)
        say(f"{result.name}: {result.state} in {result.seconds:.1f} s {result.reason}".rstrip())
        free(device)
    return results


def _stop(*_):
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no part later than this (default: 9)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="run these parts alone")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder (default: runs/gpu)")
    parser.add_argument("--dry_run", "--dry-run", action="store_true",
                        help="list the parts and run them on tiny shapes on the CPU")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="only list the parts")
    arguments = parser.parse_args(argv)
    if arguments.dry_run or arguments.list:
        print(listing(), flush=True)
    if arguments.list:
        return 0
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry_run runs the same on tiny shapes on the CPU.")
    signal.signal(signal.SIGTERM, _stop)  # so that what there is is told
    device = torch.device("cpu") if arguments.dry_run else torch.device("cuda", 0)
    names = [name for name in PARTS if name in (arguments.only or PARTS)]
    page = arguments.output / "gpu.html"
    try:
        results = run(names, device, arguments.minutes, arguments.output)
    except KeyboardInterrupt:
        print(f"stopped; {page} and gpu.json have what was measured so far")
        return 130
    counts = ", ".join(f"{sum(result.state == state for result in results)} {state}" for state in STATES)
    print(f"{page} and gpu.json: {counts}")
    return int(any(result.state == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
