"""Make the start of a GSVA from a vision-language model and a mask model, or convert checkpoints of the original, and back.

    python convert_checkpoint.py --base llava-hf/llava-1.5-7b-hf --sam facebook/sam2.1-hiera-base-plus --output start
    python convert_checkpoint.py --checkpoint gsva-7b-ft-gres.bin --llava LLAVA_DIR --clip CLIP_DIR --output gsva-7b
    python convert_checkpoint.py --llava LLAVA_DIR --clip CLIP_DIR --sam sam_vit_h_4b8939.pth --output gsva-7b-start
    python convert_checkpoint.py --checkpoint gsva-7b --reverse --output gsva-7b.bin

All write a directory that the Auto classes load, but the last. The first takes any image-text-to-text model of transformers
and any SAM, SAM-HQ, SAM 2 or tracker of SAM 3, and adds the tokens [SEG] and [REJ] and the mask projector, drawn at random
(--seed). The third does so for LLaVA v1 and makes the model that the original's training starts from. A checkpoint is a file,
the index of a sharded one, or a directory. Parts that it lacks come from --llava (or --llama with --llava_delta), --clip and
--sam. Tensors are read and written one at a time, so that memory stays at a few tensors, however big the checkpoint.
"""

import argparse
import ctypes
import io
import platform
import signal
import sys
from importlib.metadata import version

INTERRUPTED = (
    "error: interrupted. Nothing of --output is left behind; run the command again to start from the beginning."
)
if __name__ == "__main__":  # before the imports that take seconds
    signal.signal(signal.SIGINT, lambda *_: sys.exit(INTERRUPTED))

from conversion import build_llama_tokenizer, convert, convert_base, reverse, to_original, to_ours

__all__ = ["build_llama_tokenizer", "convert", "convert_base", "main", "reverse", "to_original", "to_ours"]

# Options that have no meaning with --base.
ONLY_FOR_THE_ORIGINAL = (
    "checkpoint", "llava", "llama", "llava_delta", "clip", "tokenizer", "conv_type", "lora_alpha", "keep_lora", "reverse",
    "peft_names",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", help="directory or Hub id of a vision-language model of transformers, with --sam")
    add("--checkpoint", help="checkpoint of the original: .bin, .safetensors, an index or a directory; with --reverse a "
        "directory that this program wrote; left out, the result is the model that training starts from")  # fmt: skip
    add("--output", required=True, help="directory to write; with --reverse a .bin file")
    add("--llava", help="LLaVA: config.json, tokenizer.model, and the weights that the checkpoint lacks")
    add("--llama", help="LLaMA, if LLaVA is given as a delta")
    add("--llava_delta", help="LLaVA's delta, which is added to --llama")
    add("--clip", help="CLIP, a directory or Hub name: config.json and the weights that the checkpoint lacks")
    add("--sam", help="SAM's .pth file (ViT-H, L or B, recognised by its tensors), or its directory or Hub id in the format of "
        "transformers; with --base also SAM-HQ, SAM 2 or SAM 3 in that format")  # fmt: skip
    add("--tokenizer", help="tokenizer.model, if the LLaVA directory has none")
    add("--conv_type", default="llava_v1", choices=["llava_v1", "llava_llama_2"],
        help="conversation template that the checkpoint was trained with")  # fmt: skip
    add("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"],
        help="type of the written weights; auto keeps the checkpoint's or the base's")  # fmt: skip
    add("--seed", type=int, default=0, help="without --checkpoint: seed of the weights that GSVA adds")
    add("--lora_alpha", type=float, default=16.0, help="--lora_alpha of the training; checkpoints do not store it")
    add("--keep_lora", action="store_true", help="write LoRA to adapter/ for PEFT instead of merging it")
    add("--max_shard_size", default="5GB", help="largest size of one weights file (default: 5GB)")
    add("--push_to_hub", metavar="REPO", help="upload the result to this repository")
    add("--reverse", action="store_true", help="convert our directory to a .bin in the original's layout")
    add("--peft_names", action="store_true", help="with --reverse: names with PEFT's prefix, to train with LoRA")
    args = parser.parse_args(argv)
    if not abs(args.lora_alpha) < 3e38:  # NaN, infinite, or beyond float32
        parser.error(f"--lora_alpha must be a finite number, not {args.lora_alpha}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to {2**32 - 1}, not {args.seed}")
    if args.base is not None:
        if others := [name for name in ONLY_FOR_THE_ORIGINAL if getattr(args, name) != parser.get_default(name)]:
            parser.error(
                f"--base is a model of today, and --{others[0]} belongs to checkpoints of the original: leave one of them out"
            )
        if args.sam is None:
            parser.error(
                "--base needs --sam, a mask model such as facebook/sam2.1-hiera-base-plus or sam_vit_h_4b8939.pth"
            )
    if args.reverse and args.checkpoint is None:
        parser.error("--reverse needs --checkpoint, a directory that this program wrote")
    return args


def keep_freed_memory() -> None:
    """Keep freed memory in the process: returning it to the system and faulting it in again is as slow as the copy."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc; the numbers are those of its malloc.h
        mallopt(-4, 0)  # M_MMAP_MAX: large tensors are not mapped separately
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: up to 1 GB of freed memory stays


def _was_interrupted(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may be unable to print the name of --output
    try:
        work = reverse if args.reverse else convert if args.base is None else convert_base
        summary = work(args)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except ImportError as error:
        # transformers turns whatever happens while it imports a module into an ImportError
        sys.exit(INTERRUPTED if _was_interrupted(error) else f"error: {' '.join(str(error).split())}")
    except (ValueError, OSError) as error:  # each says in a sentence what is wrong and what to do
        sys.exit(f"error: {' '.join(str(error).split())}")
    except Exception as error:
        libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
        error.add_note(
            "This should not happen, and nothing of --output is left behind. Please report these lines with the command and the "
            f"versions: Python {platform.python_version()}, {libraries}."
        )
        raise
    print(f"Wrote {args.output}")
    for key, value in summary.items():
        print(f"  {key}: {value}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # main catches it
    main()
