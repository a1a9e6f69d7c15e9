"""Measure the time and memory of convert_checkpoint.py, compared with copying the same bytes.

    python -m benchmarks convert --size 7b --work DIR      # needs three times the checkpoint on disk (about 45 GB)

The benchmark writes a synthetic checkpoint with the shapes of the size (PEFT names, LoRA beside the base weights). It then
converts the checkpoint in a separate process and copies its files, in turns, because a disk is not equally fast at all times.
Each time starts with a cold page cache and ends when all bytes are on disk. The peak is the largest resident set of the
process, mapped pages of files included.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from conversion import to_original
from conversion.configs import ARCHITECTURES, clip_large

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ("7b", "13b")
# Smaller sizes. LLaMA: hidden, intermediate, layers, heads. SAM (ViT-H and ViT-B): width, depth, heads, global layers.
SMALLER = {
    "1b": ((2048, 5504, 12, 16), (1280, 32, 16, [7, 15, 23, 31])),
    "small": ((1024, 2752, 4, 8), (768, 12, 12, [2, 5, 8, 11])),
    "tiny": ((64, 128, 2, 2), (32, 2, 2, [1])),
}
RANK, VOCABULARY, SHARD_BYTES, ROUNDS = 8, 32000, 2 * 2**30, 3


def model_config(size: str):
    from transformers import CLIPVisionConfig, LlamaConfig, SamConfig

    from modeling_gsva import GsvaConfig

    if size in PUBLISHED:
        return GsvaConfig(**json.loads((ARCHITECTURES / f"{size}.json").read_text(encoding="utf-8")))
    (hidden, intermediate, layers, heads), (dim, depth, sam_heads, whole) = SMALLER[size]
    return GsvaConfig(
        text_config=LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                                num_attention_heads=heads, vocab_size=VOCABULARY + 4),
        vision_config=CLIPVisionConfig(**clip_large()),
        sam_config=SamConfig(vision_config={"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": sam_heads,
                                            "global_attn_indexes": whole, "mlp_dim": 4 * dim}),
    )  # fmt: skip


def checkpoint_shapes(size: str) -> tuple[dict[str, tuple[int, ...]], dict]:
    """Return the names and shapes of a full state dict of the original, and LLaVA's config.json."""
    from transformers.initialization import no_init_weights

    from modeling_gsva import GsvaForConditionalGeneration

    config = model_config(size)
    with torch.device("meta"), no_init_weights():
        model = GsvaForConditionalGeneration(config)
    shapes = {to_original(model.saved_name(name)): tuple(value.shape) for name, value in model.state_dict().items()
              if name not in model.all_tied_weights_keys}  # fmt: skip
    text = config.text_config
    for i in range(text.num_hidden_layers):
        for module in ("q_proj", "v_proj"):
            place = f"model.layers.{i}.self_attn.{module}.lora_"
            shapes |= {
                place + "A.default.weight": (RANK, text.hidden_size),
                place + "B.default.weight": (text.hidden_size, RANK),
            }
    keep = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {f"base_model.model.{name}": shape for name, shape in shapes.items()}, {
        name: getattr(text, name) for name in keep
    }


def checkpoint_bytes(size: str, dtype: torch.dtype) -> int:
    """Return the bytes of a checkpoint's weights."""
    return sum(torch.Size(shape).numel() for shape in checkpoint_shapes(size)[0].values()) * dtype.itemsize


def write_checkpoint(directory: Path, size: str, dtype: torch.dtype, tokenizer: Path | None) -> int:
    """Write shards with an index, as zero_to_fp32.py does, and a LLaVA directory. Return the bytes of the tensors."""
    shapes, config = checkpoint_shapes(size)
    noise = torch.randn(2**24).mul_(0.02).to(dtype)
    (directory / "checkpoint").mkdir(parents=True)
    shard, weight_map, total, number = {}, {}, 0, 1

    def flush():
        nonlocal shard, number
        torch.save(shard, directory / "checkpoint" / f"pytorch_model-{number:05d}.bin")
        shard, number = {}, number + 1

    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        shard[name] = noise.repeat(-(-count // len(noise)))[:count].clone().reshape(shape)
        weight_map[name] = f"pytorch_model-{number:05d}.bin"
        total += shard[name].nbytes
        if sum(value.nbytes for value in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "checkpoint/pytorch_model.bin.index.json").write_text(json.dumps(index))

    (directory / "llava").mkdir()
    (directory / "llava/config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        shutil.copyfile(tokenizer, directory / "llava/tokenizer.model")
        return total
    # LLaMA's sentencepiece model may not be shipped. A small one gets added tokens up to the same number of rows.
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words are enough to train on"] * 9), model_prefix=str(directory / "llava/tokenizer"),
        model_type="bpe", vocab_size=280, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False)  # fmt: skip
    filler = {f"<filler {i}>": i for i in range(280, VOCABULARY)}
    (directory / "llava/added_tokens.json").write_text(json.dumps(filler))
    return total


def forget(directory: Path) -> None:
    """Write dirty pages to disk and drop the files from the page cache."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(directory: Path, work: Callable) -> tuple[float, float]:
    """Return the wall-clock and CPU seconds of `work`, from a cold page cache until all bytes are on disk.

    CPU seconds include child processes.
    """
    forget(directory)
    start, before = time.perf_counter(), os.times()
    work()
    os.sync()
    spent = sum(os.times()[:4]) - sum(before[:4])
    return time.perf_counter() - start, spent


def run_and_watch(command: list[str]) -> int:
    """Run a command and return the largest resident set of its process in bytes.

    It is read from /proc, because getrusage's ru_maxrss begins with the memory that the parent had when it forked.
    """
    peak, process = 0, subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak


def measure(work: Path, size: str, dtype: str, tokenizer: Path | None = None, rounds: int = ROUNDS) -> dict:
    """Measure seconds and peak memory of one size.

    Returns:
        `{size, dtype, gigabytes, copy_seconds, convert_seconds, ratio, peak_rss_gigabytes, ...}` (gigabytes of 10^9).
        On a busy machine the CPU seconds are more reliable than those of the clock.
    """
    total = write_checkpoint(work, size, getattr(torch, dtype), tokenizer)
    source = work / "checkpoint"
    command = [sys.executable, str(ROOT / "convert_checkpoint.py"), "--checkpoint", str(source), "--llava", str(work / "llava"),
               "--output", str(work / "converted")]  # fmt: skip
    peak = 0

    def converted():
        nonlocal peak
        peak = max(peak, run_and_watch(command))

    times = []
    for _ in range(rounds):
        copy_seconds, copy_cpu = timed(work, lambda: shutil.copytree(source, work / "copy"))
        shutil.rmtree(work / "copy")
        convert_seconds, convert_cpu = timed(work, converted)
        shutil.rmtree(work / "converted")
        times.append((copy_seconds, convert_seconds, copy_cpu, convert_cpu))
    copy_seconds, convert_seconds, copy_cpu, convert_cpu = (sum(column) / rounds for column in zip(*times))
    numbers = {
        "gigabytes": total / 1e9,
        "copy_seconds": copy_seconds,
        "convert_seconds": convert_seconds,
        "ratio": convert_seconds / copy_seconds,
        "largest_ratio_of_a_round": max(converting / copying for copying, converting, *_ in times),
        "copy_cpu_seconds": copy_cpu,
        "convert_cpu_seconds": convert_cpu,
        "peak_rss_gigabytes": peak / 1e9,
    }
    return {"benchmark": "convert", "size": size, "dtype": dtype} | {key: round(n, 2) for key, n in numbers.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--size", choices=[*PUBLISHED, *SMALLER], default="7b", help="size of the checkpoint (default: 7b)"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16", help="type of its weights"
    )
    parser.add_argument("--tokenizer", type=Path, help="LLaMA's tokenizer.model; by default a small one is trained")
    parser.add_argument(
        "--work", type=Path, help="folder for the checkpoints; by default the system's temporary directory"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        load = os.getloadavg()[0]
        figures = measure(Path(work), args.size, args.dtype, args.tokenizer)
        figures |= {"cpus": os.cpu_count(), "load_before": round(load, 1)}
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
