"""How long convert_checkpoint.py takes and how much memory it holds, against copying the same bytes.

    python -m benchmarks convert --size 7b --work DIR      # needs three times the checkpoint on disk (about 45 GB)

Writes a synthetic checkpoint of the size's shape (PEFT names, LoRA beside the base weights), converts it in a process of
its own and copies its files, each from a cold cache and until the bytes are on disk, in turns: a disk is not as fast at all
times, and memory that is used for the first time is slower. The peak is the process's resident set, mapped pages of files
included.
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

from convert_checkpoint import to_original

ROOT = Path(__file__).resolve().parent.parent
# LLaMA: hidden, intermediate, layers, heads; SAM: width, depth, heads, global layers. 7b and 13b as published.
SAM_H, SAM_B = (1280, 32, 16, [7, 15, 23, 31]), (768, 12, 12, [2, 5, 8, 11])
SIZES = {
    "7b": ((4096, 11008, 32, 32), SAM_H),
    "13b": ((5120, 13824, 40, 40), SAM_H),
    "1b": ((2048, 5504, 12, 16), SAM_H),
    "small": ((1024, 2752, 4, 8), SAM_B),
}
RANK, VOCABULARY, SHARD_BYTES, ROUNDS = 8, 32000, 2 * 2**30, 3


def model_config(size: str):
    from transformers import CLIPVisionConfig, LlamaConfig, SamConfig

    from convert_checkpoint import _CLIP_LARGE
    from modeling_gsva import GsvaConfig

    (hidden, intermediate, layers, heads), (dim, depth, sam_heads, whole) = SIZES[size]
    return GsvaConfig(
        text_config=LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                                num_attention_heads=heads, vocab_size=VOCABULARY + 4),
        vision_config=CLIPVisionConfig(**_CLIP_LARGE),
        sam_config=SamConfig(vision_config={"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": sam_heads,
                                            "global_attn_indexes": whole, "mlp_dim": 4 * dim}),
    )  # fmt: skip


def checkpoint_shapes(size: str) -> tuple[dict[str, tuple[int, ...]], dict]:
    """Names and shapes of a full state dict of the original, and LLaVA's config.json."""
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


def write_checkpoint(directory: Path, size: str, dtype: torch.dtype, tokenizer: Path | None) -> int:
    """Shards with an index, as zero_to_fp32.py writes them, and a LLaVA directory. Returns the bytes of the tensors."""
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
    # LLaMA's sentencepiece model is not ours to ship: a small one, filled up with added tokens to the same number of rows.
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words are enough to train on"] * 9), model_prefix=str(directory / "llava/tokenizer"),
        model_type="bpe", vocab_size=280, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False)  # fmt: skip
    filler = {f"<filler {i}>": i for i in range(280, VOCABULARY)}
    (directory / "llava/added_tokens.json").write_text(json.dumps(filler))
    return total


def forget(directory: Path) -> None:
    """Writes back what is dirty and drops the files from the page cache."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(directory: Path, work: Callable) -> tuple[float, float]:
    """Seconds by the clock and of the processor, children's included, from a cold cache until all is on disk."""
    forget(directory)
    start, before = time.perf_counter(), os.times()
    work()
    os.sync()
    spent = sum(os.times()[:4]) - sum(before[:4])
    return time.perf_counter() - start, spent


def run_and_watch(command: list[str]) -> int:
    """Runs a command and returns the largest resident set of its process in bytes.

    Read from /proc: getrusage's ru_maxrss starts at what the parent held when it forked.
    """
    peak, process = 0, subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.05)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak


def measure(work: Path, size: str, dtype: str, tokenizer: Path | None = None) -> dict:
    """Seconds and peak memory of one size.

    Returns:
        `{size, dtype, gigabytes, copy_seconds, convert_seconds, ratio, peak_rss_gigabytes, ...}` (gigabytes of 10^9).
        On a busy machine the processor's seconds say more than the clock's.
    """
    total = write_checkpoint(work, size, getattr(torch, dtype), tokenizer)
    source = work / "checkpoint"
    command = [sys.executable, str(ROOT / "convert_checkpoint.py"), "--checkpoint", str(source), "--llava", str(work / "llava"),
               "--output", str(work / "converted")]  # fmt: skip
    peak = 0

    def converted():
        nonlocal peak
        peak = max(peak, run_and_watch(command))

    rounds = []
    for _ in range(ROUNDS):
        copy_seconds, copy_cpu = timed(work, lambda: shutil.copytree(source, work / "copy"))
        shutil.rmtree(work / "copy")
        convert_seconds, convert_cpu = timed(work, converted)
        shutil.rmtree(work / "converted")
        rounds.append((copy_seconds, convert_seconds, copy_cpu, convert_cpu))
    copy_seconds, convert_seconds, copy_cpu, convert_cpu = (sum(column) / ROUNDS for column in zip(*rounds))
    numbers = {
        "gigabytes": total / 1e9,
        "copy_seconds": copy_seconds,
        "convert_seconds": convert_seconds,
        "ratio": convert_seconds / copy_seconds,
        "largest_ratio_of_a_round": max(converting / copying for copying, converting, *_ in rounds),
        "copy_cpu_seconds": copy_cpu,
        "convert_cpu_seconds": convert_cpu,
        "peak_rss_gigabytes": peak / 1e9,
    }
    return {"benchmark": "convert", "size": size, "dtype": dtype} | {key: round(n, 2) for key, n in numbers.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--tokenizer", type=Path, help="LLaMA's tokenizer.model; a small one is trained without it")
    parser.add_argument("--work", type=Path, help="where there is room; by default the system's temporary directory")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
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
