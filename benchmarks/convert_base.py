"""Measure the peak memory and the time of `convert_checkpoint.py --base`, compared with the size of the base.

    python -m benchmarks convert_base --megabytes 400

The benchmark writes a LLaVA with random weights of that size, and one of a few kilobytes, whose conversion shows what Python and
the libraries take by themselves. Each is converted in a process of its own, with a small SAM 2. The peak is the largest resident
set of the process, mapped pages of files included.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.convert import ROOT, run_and_watch

HIDDEN, VOCABULARY, LAYER_MEGABYTES = 1024, 32000, 25  # of a layer in bfloat16, with an MLP of 2752
TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_base(folder: Path, layers: int, hidden: int, padding: int) -> int:
    """Write a LLaVA whose embedding has `padding` rows beyond its tokenizer. Return the bytes of its weights."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForImageTextToText,
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.add_tokens([f"<filler {n}>" for n in range(VOCABULARY - len(tokenizer) - 1)])
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    text = {
        "model_type": "llama", "vocab_size": VOCABULARY + padding, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": hidden * 43 // 16, "num_attention_heads": 8,
    }  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=TOWER, image_token_index=VOCABULARY - 1)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100MB")
    size = {"height": TOWER["image_size"], "width": TOWER["image_size"]}
    images = CLIPImageProcessorPil(size={"shortest_edge": TOWER["image_size"]}, crop_size=size)
    LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=TEMPLATE,
                   num_additional_image_tokens=1).save_pretrained(folder)  # fmt: skip
    return sum(parameter.nbytes for parameter in model.parameters())


def write_mask_model(folder: Path) -> None:
    """Write a small SAM 2."""
    from transformers import Sam2Config, Sam2Model

    Sam2Model(Sam2Config(prompt_encoder_config={"image_size": 1024})).save_pretrained(folder)


def measure(work: Path, megabytes: int) -> dict:
    """Return the peaks in megabytes of 10^6 bytes, with padding rows that the tokens take and with rows that are added."""
    layers = max(1, round((megabytes - 4 * VOCABULARY * HIDDEN / 1e6) / LAYER_MEGABYTES))
    write_mask_model(work / "sam")
    mask_bytes = sum(file.stat().st_size for file in (work / "sam").glob("*.safetensors"))
    figures = {"benchmark": "convert_base", "mask_model_megabytes": mask_bytes / 1e6, "shard_megabytes": 100}
    for name, shape in {
        "nothing": (1, 8, 64),
        "padding": (layers, HIDDEN, 64),
        "growing": (layers, HIDDEN, 0),
    }.items():
        size = write_base(work / name, *shape)
        command = [sys.executable, str(ROOT / "convert_checkpoint.py"), "--base", str(work / name), "--sam", str(work / "sam"),
                   "--output", str(work / f"{name}-start"), "--max_shard_size", "100MB"]  # fmt: skip
        begin = time.perf_counter()
        peak = run_and_watch(command)
        figures[f"{name}_base_megabytes"], figures[f"{name}_peak_megabytes"] = size / 1e6, peak / 1e6
        figures[f"{name}_seconds"] = time.perf_counter() - begin
    for name in ("padding", "growing"):
        more = figures[f"{name}_peak_megabytes"] - figures["nothing_peak_megabytes"]
        figures[f"{name}_peak_over_base"] = more / figures[f"{name}_base_megabytes"]
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in figures.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks convert_base", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--megabytes", type=int, default=400, help="size of the base (default: 400)")
    parser.add_argument("--work", type=Path, help="folder for the models; by default the system's temporary directory")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        figures = measure(Path(work), args.megabytes) | {"cpus": os.cpu_count()}
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
