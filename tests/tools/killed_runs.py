"""
Start the program repeatedly in one folder, kill it by SIGKILL at another moment each time, and then let it finish.

`test_exact.py` runs `python killed_runs.py every_moment|several REPORT.json WORDS...`, and trainers/test_predicting.py the kind
`predictions`. Each start is a fork, which saves the imports.
"""

import errno
import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

import run_gres
from trainers import trainer
from trainers.trainer import GsvaTrainer, last_complete_checkpoint


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def halve(folder: str, pattern: str) -> None:
    """As if killed in the middle of writing the file."""
    (file,) = Path(folder).glob(pattern)
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size // 2)


def in_a_step(step):
    ran = GsvaTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            die()
        return ran(self, *args, **kwargs)

    GsvaTrainer.training_step = training_step


def in_writing(method: str, pattern: str):
    """Killed when `method` of the trainer has written half of `pattern`."""

    def patch(step):
        wrote = getattr(GsvaTrainer, method)

        def write(self, folder, *args, **kwargs):
            wrote(self, folder, *args, **kwargs)
            if self.state.global_step == step:
                halve(folder, pattern)
                die()

        setattr(GsvaTrainer, method, write)

    return patch


def in_writing_the_state(step):
    def write(self, path):
        if self.global_step == step:
            Path(path).write_text('{"global_step": ' + str(step))
            die()
        wrote(self, path)

    from transformers import TrainerState

    wrote, TrainerState.save_to_json = TrainerState.save_to_json, write


def before_it_gets_its_name(step):
    renamed = Path.rename

    def rename(self, target):
        if Path(target).name == f"checkpoint-{step}":
            die()
        return renamed(self, target)

    Path.rename = rename


def while_an_old_one_is_deleted(step):
    deleted = trainer.shutil.rmtree

    def rmtree(path, **options):
        if list(Path(path).glob("optimizer.pt")):
            (Path(path) / "optimizer.pt").unlink()
            die()
        deleted(path, **options)

    trainer.shutil.rmtree = rmtree


def while_the_model_is_saved(step):
    from modeling_gsva import GsvaProcessor

    saved = GsvaProcessor.save_pretrained

    def save(self, folder, **options):
        saved(self, folder, **options)
        if Path(folder).name == ".saving":
            halve(folder, "tokenizer.json")
            die()

    GsvaProcessor.save_pretrained = save


MOMENTS = {
    "in a step": (1, in_a_step),
    "in a step, again without a new checkpoint": (1, in_a_step),
    "weights half-written": (2, in_writing("save_model", "*model.safetensors")),
    "optimizer half-written": (3, in_writing("_save_optimizer_and_scheduler", "optimizer.pt")),
    "state half-written": (4, in_writing_the_state),
    "whole, but not renamed": (5, before_it_gets_its_name),
    "while an old one is deleted": (6, while_an_old_one_is_deleted),
    "while the trained model is saved": (7, while_the_model_is_saved),
}


def start(words, patch=None, step=0, processes: int = 1) -> int:
    """
    The exit status of a start in processes of its own, negative for the signal that ended it. Of several processes the
    last one is patched; when it is gone the launcher ends the others, as torchrun does.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            status = 1
            try:
                if processes > 1:
                    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
                if patch is not None and rank == processes - 1:
                    patch(step)
                status = run_gres.main(words)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    status = os.waitstatus_to_exitcode(os.waitpid(children.pop(), 0)[1])
    for child in children:
        if status:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return status


def several(words) -> dict:
    """Two processes unbroken, two processes killed twice, and one process with the same batches of a step."""
    folder = words[words.index("--output_dir") + 1]
    two = [*words, "--per_device_train_batch_size", "1"]
    killed = [*two, "--output_dir", f"{folder}-killed"]
    return {
        "unbroken": start([*two, "--output_dir", f"{folder}-two"], processes=2),
        "in a step": start(killed, in_a_step, 2, processes=2),
        "numbers half-written": start(killed, in_writing("_save_rng_state", "rng_state_1.pth"), 4, processes=2),
        "picked": last_complete_checkpoint(f"{folder}-killed"),
        "to the end": start(killed, processes=2),
        "one": start([*words, "--per_device_train_batch_size", "2", "--output_dir", f"{folder}-one"]),
    }


def end(error: BaseException | None) -> None:
    """Raise an error, or be killed where there is none."""
    if error is not None:
        raise error
    die()


def in_a_batch(error: BaseException | None):
    """Killed, or ended by `error`, when the model is asked for the `step`-th time."""

    def patch(step):
        from evaluation.predictor import Predictor

        answer, calls = Predictor.answer, []

        def counted(self, requests):
            calls.append(len(requests))
            if len(calls) == step:
                end(error)
            return answer(self, requests)

        Predictor.answer = counted

    return patch


def in_writing_a_shard(error: BaseException | None):
    """Killed, or ended by `error`, when half of the `step`-th shard is written."""

    def patch(step):
        write, calls = Path.write_bytes, []

        def half(self, content):
            if self.suffix == ".parquet":
                calls.append(self)
                if len(calls) == step:
                    write(self, content[: len(content) // 2])
                    end(error)
            return write(self, content)

        Path.write_bytes = half

    return patch


def predictions(words) -> dict:
    """Predictions unbroken, by two processes, killed twice, on a full disk, interrupted, and twice at once."""
    import pyarrow.parquet as pq

    from trainers.lock import run_lock

    folder = words[words.index("--output_dir") + 1]

    def to(name):
        return [*words, "--output_dir", f"{folder}-{name}"]

    def rows(name):
        return sum(pq.read_metadata(path).num_rows for path in Path(f"{folder}-{name}").glob("predictions-*.parquet"))

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "predictions.parquet")
    found = {
        "unbroken": start(words),
        "two processes": start(to("two"), processes=2),
        "killed in a batch": start(to("killed"), in_a_batch(None), 2, processes=2),
        "killed while writing": start(to("killed"), in_writing_a_shard(None), 2),
        "left": len(list(Path(f"{folder}-killed").glob("predictions-*.parquet"))),
        "to the end": start(to("killed"), processes=2),
        "full disk": start(to("full"), in_writing_a_shard(full), 3),
        "rows of full": rows("full"),
        "interrupted": start(to("interrupted"), in_a_batch(KeyboardInterrupt()), 4),
        "rows of interrupted": rows("interrupted"),
    }
    start(to("full"))
    start(to("interrupted"))
    with run_lock(folder):
        found["second"] = start(words)
    return found


def every_moment(words) -> dict:
    folder = words[words.index("--output_dir") + 1]
    found = {}
    for moment, (step, patch) in MOMENTS.items():
        status = start(words, patch, step)
        left = sorted(path.name for path in Path(folder).glob("*checkpoint*"))
        picked = last_complete_checkpoint(folder)
        found[moment] = {"status": status, "left": left, "picked": picked and Path(picked).name}
    found["to the end"] = {"status": start(words)}
    found["unbroken"] = {"status": start([*words, "--output_dir", f"{folder}-unbroken"])}
    return found


if __name__ == "__main__":
    kind, report, *words = sys.argv[1:]
    found = {"several": several, "every_moment": every_moment, "predictions": predictions}[kind](words)
    Path(report).write_text(json.dumps(found))
