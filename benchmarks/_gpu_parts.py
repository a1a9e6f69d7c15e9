"""The parts of `benchmarks/gpu.py`: each yields its figures one by one, so that those before a failure are kept."""

from __future__ import annotations

import copy
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from benchmarks._gpu_workload import (
    LARGE,
    SMALL,
    TINY,
    Workload,
    draw_model,
    draw_positions,
    free,
    matmul_rate,
    seconds,
    synchronize,
)
from benchmarks._mask_models import HIERAS, SMALL_HIERA, VITS, encoder_cost, hiera_config, vit_config
from benchmarks._workload import SEED, make_rows, parts_of, stages
from benchmarks.train import make_batches
from evaluation import EvaluationConfig, evaluate_rows
from modeling_gsva import GsvaForConditionalGeneration
from modeling_gsva.sam_attention_gsva import WAYS, use_gsva_attention
from trainers.arguments import ModelArguments
from trainers.feature_cache import FeatureCache
from trainers.freezing import prepare_for_training

GIB = 2**30
PLANNED_GIB = 37.1  # of finetune_gres_7b on one card, by --plan (trainers/README.md)
SIDE = 1024


@dataclass(frozen=True)
class Figure:
    """A measured number, or the reason why there is none."""

    what: str
    value: float | None
    unit: str = ""
    reason: str = ""


@dataclass
class Bench:
    """What the parts share."""

    work: Workload
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def try_figure(self, what: str, unit: str, run: Callable[[], float], cuda_only: bool = False) -> Figure:
        """Return the figure that `run` gives; what fails (memory, a missing kernel) is a reason, not the end of the part."""
        if cuda_only and not self.is_cuda:
            return Figure(what, None, unit, "needs a CUDA device")
        try:
            return Figure(what, run(), unit)
        except Exception as error:  # noqa: BLE001
            free(self.device)
            return Figure(what, None, unit, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _encoder(config, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    torch.manual_seed(SEED)
    with torch.device(device):
        encoder = AutoModel.from_config(config.vision_config, attn_implementation=attention, dtype=dtype).eval()
    draw_positions(encoder)
    return encoder


@torch.no_grad()
def sam_encoder(bench: Bench) -> Iterator[Figure]:
    """SAM's encoder alone: transformers' eager and sdpa attention against ours, each way, plain and compiled."""
    work, device = bench.work, bench.device
    rate = matmul_rate(device, work.dtype)
    yield Figure("limit: a large matrix product", rate / 1e12, "TFLOP/s")
    config = vit_config(*work.sam)
    operations = encoder_cost(copy.deepcopy(config))["operations"]
    for batch in work.encoder_batches:
        pixels = torch.randn(batch, 3, SIDE, SIDE, device=device, dtype=work.dtype)
        for name in ("transformers eager", "transformers sdpa", *WAYS, "auto", "auto, compiled"):
            what = f"{name}, batch {batch}"

            def run(name=name, pixels=pixels) -> float:
                encoder = _encoder(config, device, work.dtype, "eager" if name.endswith("eager") else "sdpa")
                if not name.startswith("transformers"):
                    use_gsva_attention(encoder, name.partition(",")[0])
                function = torch.compile(encoder) if name.endswith("compiled") else encoder
                return 1000 * seconds(lambda: function(pixels), device, work.repeats) / len(pixels)

            figure = bench.try_figure(what, "ms per image", run, cuda_only=name.endswith("compiled"))
            yield figure
            if figure.value and name.startswith("auto"):
                share = operations / (figure.value / 1000) / rate
                yield Figure(f"{what}: share of the operations' limit", 100 * share, "%")
            free(device)


@torch.no_grad()
def sam2_encoders(bench: Bench) -> Iterator[Figure]:
    """SAM 2.1's encoders beside ViT-H."""
    work, large = bench.work, bench.work is LARGE
    batch = work.encoder_batches[-1] if large else 1
    configs = {name: hiera_config(*HIERAS[name] if large else SMALL_HIERA) for name in ("SAM 2.1 B+", "SAM 2.1 L")}
    configs["SAM ViT-H"] = vit_config(*(VITS["SAM ViT-H"] if large else work.sam))
    pixels = torch.randn(batch, 3, SIDE, SIDE, device=bench.device, dtype=work.dtype)
    for name, config in configs.items():

        def run(config=config) -> float:
            encoder = _encoder(config, bench.device, work.dtype)
            use_gsva_attention(encoder)
            return 1000 * seconds(lambda: encoder(pixels), bench.device, work.repeats) / batch

        yield bench.try_figure(f"{name}, batch {batch}", "ms per image", run)
        free(bench.device)


@torch.no_grad()
def mask_decoder(bench: Bench) -> Iterator[Figure]:
    """The mask decoder, for slots of one image and of several."""
    model, _ = draw_model(bench.work, bench.device)
    maps = torch.randn(4, 256, 64, 64, device=bench.device, dtype=bench.work.dtype)
    for slots in (1, 8, 64) if bench.work is LARGE else (1, 2):
        states = torch.randn(slots, bench.work.text[0], device=bench.device, dtype=bench.work.dtype)
        images = torch.arange(slots, device=bench.device) % len(maps)

        def run(states=states, images=images) -> float:
            time_taken = seconds(lambda: model.decode_masks(states, maps, images), bench.device, bench.work.repeats)
            return 1000 * time_taken / len(states)

        yield bench.try_figure(f"{slots} slots at once", "ms per slot", run)


def evaluation(bench: Bench) -> Iterator[Figure]:
    """Evaluation as `run_gres.py --do_eval` does it, with its stages."""
    work, rows = bench.work, make_rows(bench.work.images)
    model, processor = draw_model(work, bench.device)
    rate = matmul_rate(bench.device, work.dtype)
    for protocol in ("teacher_forced", "slots"):
        size = 8 if work is LARGE else 2
        config = EvaluationConfig(rows, "workload L", "all", protocol, batch_size=size)
        evaluate_rows(model, processor, EvaluationConfig(rows[:size], "warm", "up", protocol, batch_size=size))
        synchronize(bench.device)
        with stages(parts_of(model)) as spent:
            evaluate_rows(model, processor, config)
        spent = {**spent, "data, metrics and the rest": 2 * spent["all"] - sum(spent.values())}
        yield Figure(f"{protocol}: images", len(rows) / spent["all"], "per second")
        for name, value in spent.items():
            yield Figure(f"{protocol}: {name}", 1000 * value / len(rows), "ms per image")
        share = _operations(model, processor, rows) / (spent["all"] / len(rows)) / rate
        yield Figure(f"{protocol}: share of the operations' limit", 100 * share, "%")


def _operations(model: GsvaForConditionalGeneration, processor, rows: list[dict]) -> float:
    """Count what one image costs at least: SAM's and CLIP's encoder, and two operations a weight for each token."""
    tokens = processor(
        images=[rows[0]["image"]],
        expressions=[[entry["text"] for entry in rows[0]["expressions"]]],
        return_tensors="pt",
    )
    length = tokens["input_ids"].shape[1] + tokens["answer_ids"].shape[1]
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return encoder_cost(copy.deepcopy(model.config.sam_config))["operations"] + 2 * (layers * length + tower * patches)


@torch.no_grad()
def generation(bench: Bench) -> Iterator[Figure]:
    """`generate`, with and without a static cache and torch.compile."""
    work = bench.work
    model, processor = draw_model(work, bench.device)
    row = make_rows(1)[0]
    inputs = processor(images=[row["image"]], expressions=[["the dog"]], return_tensors="pt").to(bench.device)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    count = work.new_tokens
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    kinds: dict[str, dict[str, Any]] = {
        "dynamic cache": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "static cache, compiled": {"cache_implementation": "static"},
    }
    for name, more in kinds.items():

        def run(more=more) -> float:
            return count / seconds(lambda: model.generate(**inputs, **options, **more), bench.device, work.repeats)

        yield bench.try_figure(name, "tokens per second", run, cuda_only=name.endswith("compiled"))


def _step(model: nn.Module, batch: dict, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = model(**batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _prepared(bench: Bench, quantize: bool = False) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    """Return a model prepared as finetune_gres_7b prepares it: LoRA, checkpointing, float32 trained weights."""
    model, processor = draw_model(bench.work, bench.device)
    if quantize:
        quantize_language_model(model)
    peft = prepare_for_training(model, ModelArguments(lora_r=8))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-4, (0.9, 0.95), weight_decay=0.0, fused=bench.is_cuda)
    return peft.train(), processor, optimizer


def quantize_language_model(model: GsvaForConditionalGeneration) -> None:
    """Replace the linear layers of the language model by nf4 ones with the same weights, in place."""
    import bitsandbytes as bnb

    for name, layer in list(model.model.language_model.layers.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        with torch.device("meta"):
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, torch.bfloat16, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        parent, _, last = name.rpartition(".")
        setattr(model.model.language_model.layers.get_submodule(parent), last, new.to(layer.weight.device))


def _batch(bench: Bench, processor) -> dict:
    """Return one batch of a training step on the device."""
    rows = make_rows(bench.work.train_batch)
    (batch,) = make_batches(processor, rows, len(rows))
    return {
        name: [mask.to(bench.device) for mask in value] if isinstance(value, list) else value.to(bench.device)
        for name, value in batch.items()
    }


def training_step(bench: Bench) -> Iterator[Figure]:
    """A step of finetune_gres_7b: LoRA and checkpointing, against what `--plan` counts."""
    yield from _training(bench, quantize=False)
    if bench.work is LARGE:
        yield Figure("memory by --plan", PLANNED_GIB, "GiB")


def qlora_step(bench: Bench) -> Iterator[Figure]:
    """The same step with the language model in nf4."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Figure("step", None, "s", "bitsandbytes is not installed")
        return
    yield from _training(bench, quantize=True)


def _training(bench: Bench, quantize: bool) -> Iterator[Figure]:
    free(bench.device)
    model, processor, optimizer = _prepared(bench, quantize)
    batch = _batch(bench, processor)
    step = seconds(lambda: _step(model, batch, optimizer, bench.device), bench.device, bench.work.repeats)
    yield Figure("step", step, "s")
    yield Figure("images", bench.work.train_batch / step, "per second")
    if bench.is_cuda:
        yield Figure("memory", torch.cuda.max_memory_allocated(bench.device) / GIB, "GiB")


def feature_cache(bench: Bench) -> Iterator[Figure]:
    """A step with a warm feature cache, and whether CLIP's features are worth their files."""
    model, processor, optimizer = _prepared(bench)
    batch = _batch(bench, processor)
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(folder, model.base_model.model)
        cache.fill(batch)
        read = seconds(lambda: cache.fill(batch), bench.device, bench.work.repeats)
        yield Figure("features read", read, "s per batch")
        step = seconds(
            lambda: _step(model, cache.fill(batch), optimizer, bench.device), bench.device, bench.work.repeats
        )
        yield Figure("step with a warm cache", step, "s")
        yield Figure("features of an image", cache.bytes_per_image / 1e6, "MB")
    tower = model.base_model.model.model
    with torch.no_grad():
        clip = seconds(lambda: tower.get_vision_features(batch["pixel_values"]), bench.device, bench.work.repeats)
    yield Figure("CLIP instead of its features", clip, "s per batch")


def loading(bench: Bench) -> Iterator[Figure]:
    """Files of safetensors to the device, and float16 turned into bfloat16 on the way."""
    count = max(bench.work.file_bytes // 10**9, 1)
    size = bench.work.file_bytes // count
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 1.1 * bench.work.file_bytes:
            yield Figure(
                "load", None, "GB/s", f"{bench.work.file_bytes / 1e9:.0f} GB do not fit on the disk of {folder}"
            )
            return
        paths = [Path(folder) / f"{n}.safetensors" for n in range(count)]
        for path in paths:
            save_file({"weight": torch.randn(size // 2, device=bench.device, dtype=torch.float16)}, path)
        for name, convert in (("load", False), ("load and convert to bfloat16", True)):

            def run(convert=convert) -> None:
                for path in paths:
                    (tensor,) = load_file(path, device=str(bench.device)).values()
                    if convert:
                        tensor.bfloat16()

            yield Figure(
                name, bench.work.file_bytes / 1e9 / seconds(run, bench.device, 1), "GB/s (files in the page cache)"
            )


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


@torch.no_grad()
def differences(bench: Bench) -> Iterator[Figure]:
    """A small model on the device in fp32 against the CPU, and in bf16 against its fp32, beside transformers' own distance."""
    work = SMALL if bench.is_cuda else TINY
    cpu, processor = draw_model(work, torch.device("cpu"))
    inputs = processor(
        images=[row["image"] for row in make_rows(2)], expressions=[["the dog", "a cat"]] * 2, return_tensors="pt"
    )
    arguments = {**inputs, "threshold": -1e9}
    expected = cpu.segment(**arguments)
    here = copy.deepcopy(cpu).to(bench.device)
    moved = {**copy.copy(inputs).to(bench.device), "threshold": -1e9}
    found = here.segment(**moved)
    for name in ("scores", "mask_logits", "iou_scores"):
        wanted, got = (torch.cat([part.cpu().float() for part in out[name]]) for out in (expected, found))
        yield Figure(
            f"fp32 on the device from fp32 on the CPU: {name}", _rms(got - wanted) / _rms(wanted), "rms, relative"
        )
    pixels = inputs["sam_pixel_values"][:1].to(bench.device)
    encoders = {
        name: _encoder(here.config.sam_config, bench.device, torch.float32, name) for name in ("sdpa", "eager")
    }
    use_gsva_attention(encoders["sdpa"])
    for kind, encoder in encoders.items():
        whole = encoder(pixels).last_hidden_state
        half = encoder.bfloat16()(pixels.bfloat16()).last_hidden_state
        what = "ours" if kind == "sdpa" else "transformers eager, which computes as the original does"
        yield Figure(
            f"bf16 from fp32, SAM's encoder: {what}", _rms(half.float() - whole) / _rms(whole), "rms, relative"
        )


# What each part is called on the command line; the order is that of worth for a first hour.
PARTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "differences": differences,
    "sam_encoder": sam_encoder,
    "evaluation": evaluation,
    "training_step": training_step,
    "generation": generation,
    "mask_decoder": mask_decoder,
    "sam2_encoders": sam2_encoders,
    "qlora_step": qlora_step,
    "feature_cache": feature_cache,
    "loading": loading,
}


def title_of(name: str) -> str:
    """Return the first sentence of a part's docstring."""
    return re.split(r"\.\s|\.$", (PARTS[name].__doc__ or name).strip())[0]


__all__ = ["PARTS", "Bench", "Figure", "title_of"]
