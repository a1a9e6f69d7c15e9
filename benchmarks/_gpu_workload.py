"""Workload L of `benchmarks/gpu.py`: models of the published sizes, drawn at random on the device, and how they are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from benchmarks._mask_models import SMALL_VIT, VITS, vit_config
from benchmarks._workload import SEED, VOCABULARY, make_tokenizer
from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaImageProcessor, GsvaProcessor
from modeling_gsva.image_processing_gsva import sam_preparation


@dataclass(frozen=True)
class Workload:
    """
    Sizes of the models and of what they are asked.

    Args:
        text: width, inner width, layers and heads of the language model.
        vision: width, inner width, layers and heads of the vision tower.
        sam: width, layers, heads and global layers of SAM's encoder.
        dtype: type of the weights.
        encoder_batches: numbers of images that SAM's encoder gets at once; the first is the goal's.
        images: images of an evaluation.
        train_batch: images of a training step.
        new_tokens: tokens that `generate` writes.
        repeats: turns of each measurement, of which the best counts.
    """

    text: tuple[int, int, int, int]
    vision: tuple[int, int, int, int]
    sam: tuple[int, int, int, tuple[int, ...]]
    dtype: torch.dtype
    encoder_batches: tuple[int, ...]
    images: int
    train_batch: int
    new_tokens: int
    repeats: int


# The 7B model of the paper: LLaMA 7B, CLIP ViT-L/14 at 224 px, SAM ViT-H at 1024 px; finetune_gres_7b's batch.
LARGE = Workload(
    (4096, 11008, 32, 32),
    (1024, 4096, 24, 16),
    VITS["SAM ViT-H"],
    torch.bfloat16,
    (8, 4, 1),
    24,
    20,
    64,
    3,
)
TINY = Workload((32, 64, 2, 2), (32, 64, 2, 2), (24, 2, 2, (1,)), torch.float32, (2, 1), 2, 2, 3, 1)

# At which a card is compared with a CPU: small, with windows and a global layer.
SMALL = replace(TINY, sam=SMALL_VIT)


def model_config(work: Workload, processor: GsvaProcessor, sam_config: PreTrainedConfig) -> GsvaConfig:
    width, inner, layers, heads = work.text
    tower = dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), work.vision))
    return GsvaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=224, patch_size=14),
        text_config=LlamaConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            vocab_size=VOCABULARY, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        sam_config=sam_config,
        image_token_id=processor.image_token_id, seg_token_id=processor.seg_token_id, rej_token_id=processor.rej_token_id,
    )  # fmt: skip


def make_processor(sam_config: PreTrainedConfig) -> GsvaProcessor:
    return GsvaProcessor(GsvaImageProcessor(**sam_preparation(sam_config)), make_tokenizer(), patch_size=14)


def draw_model(
    work: Workload, device: torch.device, sam_config: PreTrainedConfig | None = None, **options: Any
) -> tuple[GsvaForConditionalGeneration, GsvaProcessor]:
    """Return a model whose weights are drawn on the device, and its processor."""
    sam_config = vit_config(*work.sam) if sam_config is None else sam_config
    processor = make_processor(sam_config)
    torch.manual_seed(SEED)
    with torch.device(device):
        config = model_config(work, processor, sam_config)
        model = GsvaForConditionalGeneration._from_config(config, dtype=work.dtype, **options)
    draw_positions(model)
    return model.eval(), processor


@torch.no_grad()
def draw_positions(model: torch.nn.Module) -> None:
    """Draw SAM's position tables, which begin as zeros: a bias of zero would hide errors."""
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or name.endswith("pos_embed"):
            parameter.normal_(std=0.2)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the best time of some turns, after one that is not counted; the device has finished before the clock is read."""
    run()
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        begun = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating point operations per second that a large matrix product reaches: the limit for everything else."""
    side = 8192 if device.type == "cuda" else 256
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: left @ right, device, 5)
