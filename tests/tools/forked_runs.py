"""
Start many runs on several processes, with the libraries imported once: a parent forks the processes of each run.

`python tests/tools/forked_runs.py` reads one JSON object per line, and answers each with a line `{"codes": [...]}`, the exit
codes of the processes, negative for a signal:

    {"strategy": "zero3", "processes": 2, "script": "run_gres.py", "words": ["--do_train"], "log": "a.log", "kill_at": 3}

`strategy` is an accelerate config of configs/accelerate/ or a path without its ending, or null for a single process without
`accelerate launch`. The
environment of the processes is the one that `accelerate launch` and torchrun give them. At optimizer step `kill_at` each process
kills itself. `memory` names a folder in which each process leaves the resident memory that the steps held at most, in bytes
beyond what it held before the model was loaded, without the code of libraries.
"""

import ctypes
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(strategy: str | None, processes: int) -> dict[str, str]:
    """Return the variables that `accelerate launch --config_file` sets for all processes of a run."""
    if strategy is None:
        return {}
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(ROOT / "configs" / "accelerate" / f"{strategy}.yaml"), "--num_processes", str(processes),
             "--main_process_port", "0", "run_gres.py"]  # fmt: skip
    args, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    variables = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {
        **variables,
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(args.master_port),
    }


def kill_at(step: int) -> None:
    """Let this process kill itself when it begins an optimizer step, as `kill -9` would."""
    from transformers.trainer_callback import CallbackHandler

    begin = CallbackHandler.on_step_begin

    def on_step_begin(self, args, state, control):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return begin(self, args, state, control)

    CallbackHandler.on_step_begin = on_step_begin


def resident(field: str = "VmRSS") -> int:
    """Return a field of /proc/self/status in bytes: VmRSS, the resident memory of this process, or VmHWM, its peak."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) * 1024


def resident_code() -> int:
    """Return the resident memory of this process that holds libraries, in bytes. It grows when code runs for the first time."""
    total, file = 0, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the first line of a mapping
            file = words[-1]
        elif words[0] == "Rss:" and ".so" in file:
            total += int(words[1]) * 1024
    return total


def report_memory(folder: Path, rank: int) -> None:
    """Write the peak of the optimizer steps, when training ends. Loading and sharing out before them may have held more."""
    from transformers import Trainer
    from transformers.trainer_callback import CallbackHandler

    libc = ctypes.CDLL(None)  # glibc; the numbers are those of its malloc.h
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: freed tensors go back to the system at once,
    libc.mallopt(-1, 2**16)  # M_TRIM_THRESHOLD: so that what is resident is what is held
    train, begin, start = Trainer.train, CallbackHandler.on_step_begin, resident() - resident_code()

    def on_step_begin(self, args, state, control):
        if state.global_step == 0:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak begins anew
        return begin(self, args, state, control)

    def measured(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        held = resident("VmHWM") - resident_code() - start
        (folder / f"{rank}.json").write_text(json.dumps({"held": held}))
        return result

    CallbackHandler.on_step_begin, Trainer.train = on_step_begin, measured


def work(run: dict, rank: int) -> int:
    """Run the script in this process, and return its exit code."""
    log = os.open(f"{run['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if run.get("strategy"):  # without one nothing is distributed
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    if run.get("kill_at") is not None:
        kill_at(run["kill_at"])
    if run.get("memory"):
        report_memory(Path(run["memory"]), rank)
    sys.argv = [run["script"], *run["words"]]
    try:
        runpy.run_path(run["script"], run_name="__main__")
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001  # of a forked process: nobody else would print it
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def start(run: dict) -> list[int]:
    """Run a script in forked processes, and return their exit codes. When one fails, the others are ended."""
    processes = run.get("processes", 1)
    variables = environment(run.get("strategy"), processes)
    children = {}
    for rank in range(processes):
        if (child := os.fork()) == 0:
            os.environ.update(variables)
            os._exit(work(run, rank))
        children[child] = rank
    codes = [0] * processes
    while children:
        child, status = os.wait()
        codes[children.pop(child)] = code = os.waitstatus_to_exitcode(status)
        if code:
            for other in children:
                os.kill(other, signal.SIGTERM)
    return codes


def main() -> None:
    """Import the libraries, and serve runs until the input ends."""
    sys.path[:0] = [str(ROOT)]
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.trainer

    import run_gres  # noqa: F401

    try:
        import deepspeed  # noqa: F401
    except ImportError:
        pass
    torch.set_num_threads(1)
    print(json.dumps({"ready": transformers.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"codes": start(json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
