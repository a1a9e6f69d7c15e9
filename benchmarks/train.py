"""Measure a training step stage by stage, compared with a plain implementation of the original's cost.

    python -m benchmarks train [--quick]

A step is workload M (see `benchmarks/eval.py`) at batch size 2: forward, backward, clipping and AdamW. As in the original, LoRA
on the language model's q and v, embeddings, language head, mask decoder and mask projector are trained, and the towers are
frozen. The plain implementation works as the original does: SAM with transformers' eager attention, SAM and its decoder image
by image, logits at every position, mask losses at the images' size, and an optimizer that updates tensor by tensor. This
project is measured without the feature cache and with a warm one. All variants train in turns in one process, batch by batch,
each on a copy of the same weights. The table shows medians over the steps. Only ratios within one run are meaningful.

The benchmark prints a table and writes benchmarks/results/train.json.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from benchmarks._workload import (
    TARGETS,
    THREADS,
    Elsewhere,
    busy_line,
    machine,
    make_models,
    make_rows,
    parts_of,
    stages,
    write_result,
)
from data_scripts.schema import decode_mask
from trainers.arguments import ModelArguments
from trainers.data import GsvaCollator
from trainers.feature_cache import FeatureCache
from trainers.freezing import prepare_for_training

BATCH_SIZE, STEPS = 2, 4  # the first step is not measured
LEARNING_RATE, BETAS, CLIP_NORM = 3e-4, (0.9, 0.95), 1.0  # the original's (configs/pretrain_7b.yaml)
LOSSES = ("ce_loss", "mask_bce_loss", "mask_dice_loss")
# Seconds of a step of the original at batch size 2 on two cores (specification of this project).
ORIGINAL = {"SAM encoder": 5.9, "forward": 7.0, "backward": 2.7, "AdamW": 0.3, "all": 10.0}
# The largest relative differences allowed between loss parts and the plain variant's, over all steps of independent training.
# They come from the order of sums and, with the cache, from rounding the stored features to half precision.
TOLERANCES = {"ours": 1e-4, "cache, float32": 1e-4, "cache, float16": 2e-3}


def plain_losses(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    """Return the loss parts, at the original's cost (model/llava/model/modeling_lisa_gsva.py: model_forward)."""
    config, sam = model.config, model.sam
    ids, labels, index = batch["input_ids"], batch["labels"], batch["image_index"]
    hidden = model.model(ids, batch["attention_mask"], batch["pixel_values"], index).last_hidden_state
    logits = model.lm_head(hidden).float()
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    embeddings = [model.get_sam_embeddings(pixels[None]) for pixels in batch["sam_pixel_values"]]
    positions = sam.get_image_wide_positional_embeddings()
    no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    side, bce, dice, count = config.sam_config.vision_config.image_size, 0.0, 0.0, 0
    for row, truths in enumerate(batch["mask_labels"]):
        slots = [place for place in model.find_slots(ids).tolist() if place[0] == row]
        is_seg = [int(ids[row, column]) == config.seg_token_id for _, column in slots]
        states = hidden[row, [column - 1 for (_, column), seg in zip(slots, is_seg, strict=True) if seg]]
        image = int(index[row])
        prompts = model.mask_projector(states)[None, :, None]
        decoded, _ = sam.mask_decoder(
            embeddings[image], positions, prompts, no_mask.expand_as(embeddings[image]), False
        )
        (height, width), size = batch["reshaped_input_sizes"][image].tolist(), batch["original_sizes"][image].tolist()
        upscaled = F.interpolate(decoded[0], (side, side), mode="bilinear", align_corners=False)[..., :height, :width]
        upscaled = F.interpolate(upscaled, size, mode="bilinear", align_corners=False)[:, 0]
        masks = torch.zeros(len(slots), *size)  # a rejected slot counts as zero logits
        masks[torch.tensor(is_seg)] = upscaled
        truths = truths.float()
        bce = bce + F.binary_cross_entropy_with_logits(masks, truths, reduction="none").flatten(1).mean(1).sum()
        chance, truths = masks.sigmoid().flatten(1), truths.flatten(1)
        overlap = 2 * (chance / 1000 * truths).sum(1)
        area = (chance / 1000).sum(1) + (truths / 1000).sum(1)
        dice, count = dice + (1 - (overlap + 1e-6) / (area + 1e-6)).sum(), count + len(slots)
    return {"ce_loss": config.ce_loss_weight * ce, "mask_bce_loss": config.bce_loss_weight * bce / (count + 1e-8),
            "mask_dice_loss": config.dice_loss_weight * dice / (count + 1e-8)}  # fmt: skip


@dataclass
class Variant:
    """An implementation that is measured, with its weights and optimizer, and the stages' seconds and losses of each step."""

    peft: nn.Module
    losses: Callable[[nn.Module, dict], dict[str, torch.Tensor]]
    fused: bool
    cache: FeatureCache | None = None
    seconds: list[dict[str, float]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self):
        self.model = self.peft.base_model.model
        self.trained = [parameter for parameter in self.peft.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, LEARNING_RATE, BETAS, weight_decay=0.0, fused=self.fused, foreach=False
        )

    def step(self, batch: dict, seed: int) -> None:
        torch.manual_seed(seed)  # the same dropout in LoRA for every variant
        with stages(parts_of(self.model)) as spent:
            begun = time.perf_counter()
            inputs = self.cache.fill(batch) if self.cache is not None else batch
            read = time.perf_counter() - begun
            parts = self.losses(self.model, inputs)
            forward = time.perf_counter()
            sum(parts.values()).backward()
            backward = time.perf_counter()
            nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            optimizer = time.perf_counter()
        inside = sum(value for name, value in spent.items() if name != "all")
        spent["features read"] = read if self.cache is not None else 0.0
        spent["losses and the rest"] = forward - begun - inside - spent["features read"]
        spent |= {"forward": forward - begun, "backward": backward - forward, "AdamW": optimizer - backward}
        self.seconds.append(spent)
        self.history.append({name: float(parts[name].detach()) for name in LOSSES})


def our_losses(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    outputs = model(**batch)
    return {name: outputs[name] for name in LOSSES}


def make_batches(processor, rows: list[dict], size: int = BATCH_SIZE) -> list[dict]:
    """Return batches in which each image has all its expressions in one conversation with the processor's wording."""
    examples = []
    for row in rows:
        texts = [entry["text"] for entry in row["expressions"]]
        masks = torch.stack([torch.from_numpy(decode_mask(entry["mask"])) for entry in row["expressions"]]).numpy()
        talk = processor.build_conversation(texts, [not mask.any() for mask in masks])
        examples.append({"image": row["image"], "conversations": [talk], "masks": [masks]})
    collator = GsvaCollator(processor)
    return [dict(collator(examples[n : n + size])) for n in range(0, len(examples), size)]


def make_variants(folder: str) -> tuple[dict[str, Variant], list]:
    """Return every variant by name, and the processor."""
    ours, plain, processor = make_models()
    variants = {}
    for name in ("plain", "ours", "cache, float16", "cache, float32"):
        model = plain if name == "plain" else copy.deepcopy(ours)
        torch.manual_seed(0)  # the initial weights of LoRA
        peft = prepare_for_training(model, ModelArguments()).train()
        cache = None
        if name.startswith("cache"):
            cache = FeatureCache(folder, model, getattr(torch, name.removeprefix("cache, ")))
        variants[name] = Variant(peft, plain_losses if name == "plain" else our_losses, name != "plain", cache)
    return variants, processor


def fill(variant: Variant, batches: list[dict]) -> float:
    """Fill a cold cache, and return the seconds per batch."""
    begun = time.perf_counter()
    for batch in tqdm(batches, "filling the cache"):
        variant.cache.fill(batch)
    return (time.perf_counter() - begun) / len(batches)


def floor(variant: Variant, batch: dict) -> dict[str, float]:
    """
    Measure the lower limit of a step: the seconds of the work that cannot be avoided.

    These are the language model's forward and backward pass (over as many positions, without losses), and reading and
    writing each trained weight, its gradient and its two moments once.
    """
    model = variant.model
    mask = batch["attention_mask"]
    embeds = torch.randn(*mask.shape, model.config.text_config.hidden_size)
    best = {"language model": float("inf"), "AdamW": float("inf")}
    for _ in range(3):
        begun = time.perf_counter()
        model.model.language_model(
            inputs_embeds=embeds.requires_grad_(), attention_mask=mask
        ).last_hidden_state.sum().backward()
        best["language model"] = min(best["language model"], time.perf_counter() - begun)
        for parameter in variant.trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        begun = time.perf_counter()
        for parameter in variant.trained:  # about four reads and two writes
            parameter.grad.add_(parameter.detach())
            parameter.grad.mul_(0.0)
        best["AdamW"] = min(best["AdamW"], time.perf_counter() - begun)
    variant.optimizer.zero_grad()
    return best


def apart(variant: Variant, plain: Variant) -> dict[str, float]:
    """Return the largest relative difference of each loss part."""
    return {
        name: max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(variant.history, plain.history, strict=True))
        for name in LOSSES
    }


STAGES = ("SAM encoder", "CLIP", "features read", "language model", "mask decoder", "losses and the rest", "forward", "backward",
          "AdamW", "all")  # fmt: skip


def table(result: dict) -> str:
    variants = result["median_seconds"]
    lines = [f"{'median seconds':<20}" + "".join(f"{name:>16}" for name in variants) + f"{'the original':>16}"]
    for stage in STAGES:
        values = "".join(f"{seconds[stage]:>16.3f}" for seconds in variants.values())
        reference = format(ORIGINAL[stage], ".1f") if stage in ORIGINAL else ""
        lines.append(f"{stage:<20}{values}{reference:>16}")
    for name, ratio in result["speedup"].items():
        worst = max(result["relative_difference"][name].values())
        verdict = "equal" if worst <= TOLERANCES[name] else "NOT EQUAL"
        lines.append(
            f"{name}: {ratio:.2f} times as fast, losses of {result['workload']['steps']} steps {verdict} (largest relative "
            f"difference {worst:.1e}, allowed {TOLERANCES[name]:.0e})"
        )
    least = result["floor_seconds"]
    lines.append(
        f"lower limit with a warm cache: {sum(least.values()):.2f} s (forward and backward pass of the language model "
        f"{least['language model']:.2f} s, memory traffic of AdamW {least['AdamW']:.2f} s); filling the cache takes "
        f"{result['fill_seconds_per_batch']:.2f} s per batch, once"
    )
    return "\n".join([*lines, busy_line(result)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="train 2 steps, and do not write the result file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    elsewhere = Elsewhere()
    with tempfile.TemporaryDirectory() as folder:
        variants, processor = make_variants(folder)
        batches = make_batches(processor, make_rows(BATCH_SIZE * (2 if arguments.quick else STEPS)))
        cold = {name: fill(variant, batches) for name, variant in variants.items() if variant.cache is not None}
        # The first step takes longer, and compares the first stored features with fresh ones.
        for number, batch in enumerate(tqdm(batches, "steps")):
            for variant in variants.values():
                variant.step(batch, number)
        seconds = {
            name: {stage: statistics.median(spent[stage] for spent in variant.seconds[1:]) for stage in STAGES}
            for name, variant in variants.items()
        }
        others = [name for name in variants if name != "plain"]
        result = {
            "workload": {"pictures": BATCH_SIZE * len(batches), "expressions": len(TARGETS), "batch_size": BATCH_SIZE,
                         "steps": len(batches), "threads": THREADS, "dtype": "float32"},
            "median_seconds": seconds,
            "speedup": {name: seconds["plain"]["all"] / seconds[name]["all"] for name in others},
            "relative_difference": {name: apart(variants[name], variants["plain"]) for name in others},
            "losses": {name: variant.history for name, variant in variants.items()},
            "fill_seconds_per_batch": cold["cache, float16"],
            "floor_seconds": floor(variants["ours"], batches[0]),
            "machine": machine(elsewhere),
        }  # fmt: skip
    print(table(result))
    if not arguments.quick:
        write_result("train", result)


if __name__ == "__main__":
    main()
