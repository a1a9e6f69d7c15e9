"""
The parts of `benchmarks/gpu.py`: each yields its figures one by one, so that those before a failure are kept.

What trains or evaluates is imported by the part that does, so that a missing library leaves the other parts as they are.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from benchmarks._gpu_report import Figure
from benchmarks._gpu_workload import (
    LARGE,
    SMALL,
    TINY,
    Workload,
    draw_model,
    draw_positions,
    matmul_rate,
    seconds,
    synchronize,
)
from benchmarks._mask_models import HIERAS, SMALL_HIERA, VITS, encoder_cost, hiera_config, vit_config
from benchmarks._workload import SEED, make_rows, parts_of, stages
from modeling_gsva import GsvaForConditionalGeneration
from modeling_gsva.sam_attention_gsva import WAYS, use_gsva_attention

GIB = 2**30
ROOT = Path(__file__).resolve().parent.parent
SIDE = 1024


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
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        gc.collect()  # now that the traceback's frames hold nothing
        if self.is_cuda:
            torch.cuda.empty_cache()
        return Figure(what, None, unit, reason)


def _encoder(config, device: torch.device, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    torch.manual_seed(SEED)
    with torch.device(device):
        encoder = AutoModel.from_config(config.vision_config, attn_implementation=attention, dtype=dtype).eval()
    draw_positions(encoder)
    return encoder


def compile_layers(encoder: nn.Module) -> nn.Module:
    """Compile each layer by itself: one graph serves all windowed layers and one all global ones, instead of one for 32 layers."""
    for layer in encoder.vision_encoder.layers:
        layer.compile(dynamic=False)
    return encoder


def _time_encoders(bench: Bench, names: tuple[str, ...], batch: int, rate: float) -> Iterator[Figure]:
    """Yield the time of SAM's encoder by name: "transformers WAY" or one of ours, each perhaps with ", compiled"."""
    work, device = bench.work, bench.device
    config = vit_config(*work.sam)
    operations = encoder_cost(copy.deepcopy(config))["operations"]
    pixels = torch.randn(batch, 3, SIDE, SIDE, device=device, dtype=work.dtype)
    for name in names:
        way, _, compiled = name.partition(", ")
        first: list[float] = []

        def run(way=way, compiled=compiled, first=first) -> float:
            encoder = _encoder(config, device, work.dtype, "eager" if way.endswith("eager") else "sdpa")
            if not way.startswith("transformers"):
                use_gsva_attention(encoder, way)
            if compiled:
                compile_layers(encoder)
                begun = time.perf_counter()
                encoder(pixels)
                synchronize(device)
                first.append(time.perf_counter() - begun)
            return 1000 * seconds(lambda: encoder(pixels), device, work.repeats) / batch

        figure = bench.try_figure(f"{name}, batch {batch}", "ms per image", run, cuda_only=bool(compiled))
        yield figure
        if first:
            yield Figure(f"{figure.what}: first call, with compiling", first[0], "s")
            torch.compiler.reset()
        if figure.value and way == "auto":
            share = operations / (figure.value / 1000) / rate
            yield Figure(f"{figure.what}: share of the operations' limit", 100 * share, "%")


def _limit(bench: Bench) -> Figure:
    return Figure("limit: a large matrix product", matmul_rate(bench.device, bench.work.dtype) / 1e12, "TFLOP/s")


@torch.no_grad()
def sam_encoder(bench: Bench) -> Iterator[Figure]:
    """SAM's encoder alone: ours, as a user gets it, against transformers' sdpa and eager attention."""
    yield (limit := _limit(bench))
    rate = 1e12 * (limit.value or 0)
    largest, *others = bench.work.encoder_batches
    plain = ("auto", "transformers sdpa", "transformers eager")
    yield from _time_encoders(bench, ("auto, compiled", *plain, "transformers sdpa, compiled"), largest, rate)
    for batch in others:
        yield from _time_encoders(bench, (*plain, "auto, compiled", "transformers sdpa, compiled"), batch, rate)


@torch.no_grad()
def sam_ways(bench: Bench) -> Iterator[Figure]:
    """Each way of ours at the largest batch: whether `choose_way` takes the fastest."""
    for way in WAYS:
        yield from _time_encoders(bench, (way, f"{way}, compiled"), bench.work.encoder_batches[0], 1.0)
    yield from _time_encoders(bench, ("transformers eager, compiled",), bench.work.encoder_batches[0], 1.0)


@torch.no_grad()
def sam2_encoders(bench: Bench) -> Iterator[Figure]:
    """SAM 2.1's encoders beside ViT-H."""
    work, large = bench.work, bench.work is LARGE
    batch = work.encoder_batches[0] if large else 1
    configs = {name: hiera_config(*HIERAS[name] if large else SMALL_HIERA) for name in ("SAM 2.1 B+", "SAM 2.1 L")}
    configs["SAM ViT-H"] = vit_config(*(VITS["SAM ViT-H"] if large else work.sam))
    pixels = torch.randn(batch, 3, SIDE, SIDE, device=bench.device, dtype=work.dtype)
    for name, config in configs.items():

        def run(config=config) -> float:
            encoder = _encoder(config, bench.device, work.dtype)
            use_gsva_attention(encoder)
            return 1000 * seconds(lambda: encoder(pixels), bench.device, work.repeats) / batch

        yield bench.try_figure(f"{name}, batch {batch}", "ms per image", run)


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
    from evaluation import EvaluationConfig, evaluate_rows

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
    from trainers.arguments import ModelArguments
    from trainers.freezing import prepare_for_training

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


def _host_batch(bench: Bench, processor) -> dict:
    """Return one batch of a training step as a data loader makes it."""
    from benchmarks.train import make_batches

    rows = make_rows(bench.work.train_batch)
    (batch,) = make_batches(processor, rows, len(rows))
    return batch


def _moved(bench: Bench, batch: dict) -> dict:
    """Return a batch on the device, as a data loader moves it."""
    from accelerate.utils import send_to_device

    return send_to_device(batch, bench.device)


def training_step(bench: Bench) -> Iterator[Figure]:
    """A step of finetune_gres_7b: LoRA and checkpointing, against what `--plan` counts."""
    yield from _training(bench, quantize=False)
    yield bench.try_figure("memory of finetune_gres_7b by --plan", "GiB", planned_gib)


def planned_gib() -> float:
    """Return what `run_gres.py configs/finetune_gres_7b.yaml --plan` counts for one card."""
    from trainers.arguments import parse_arguments
    from trainers.memory_plan import Strategy, count, memory_of

    arguments = parse_arguments([str(ROOT / "configs" / "finetune_gres_7b.yaml"), "--plan"])
    sizes, activations = count(*arguments)
    return (
        memory_of(sizes, activations, Strategy.read(ROOT / "configs" / "accelerate" / "one_gpu.yaml"), True).total
        / GIB
    )


def qlora_step(bench: Bench) -> Iterator[Figure]:
    """The same step with the language model in nf4."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Figure("step", None, "s", "bitsandbytes is not installed")
        return
    yield from _training(bench, quantize=True)


def _training(bench: Bench, quantize: bool) -> Iterator[Figure]:
    model, processor, optimizer = _prepared(bench, quantize)
    batch = _moved(bench, _host_batch(bench, processor))
    if bench.is_cuda:  # the peak is the step's, not that of weights before they were quantized
        torch.cuda.reset_peak_memory_stats(bench.device)
    step = seconds(lambda: _step(model, batch, optimizer, bench.device), bench.device, bench.work.repeats)
    yield Figure("step", step, "s")
    yield Figure("images", bench.work.train_batch / step, "per second")
    if bench.is_cuda:
        yield Figure("memory", torch.cuda.max_memory_allocated(bench.device) / GIB, "GiB")


def feature_cache(bench: Bench) -> Iterator[Figure]:
    """A step with a warm feature cache, and whether CLIP's features are worth their files."""
    from trainers.feature_cache import FeatureCache

    model, processor, optimizer = _prepared(bench)
    host = _host_batch(bench, processor)
    batch = _moved(bench, host)
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(folder, model.base_model.model)
        cache.fill(_moved(bench, cache.files.look_up(host)))
        read = seconds(lambda: cache.files.look_up(host), bench.device, bench.work.repeats)
        yield Figure("images looked up and features read, which workers do", read, "s per batch")
        looked_up = cache.files.look_up(host)

        def run() -> None:
            inputs = cache.fill(_moved(bench, looked_up))
            _step(model, inputs, optimizer, bench.device)

        yield Figure("step with a warm cache", seconds(run, bench.device, bench.work.repeats), "s")
        yield Figure("features of an image", cache.bytes_per_image / 1e6, "MB")
    tower = model.base_model.model.model
    with torch.no_grad():
        clip = seconds(lambda: tower.get_vision_features(batch["pixel_values"]), bench.device, bench.work.repeats)
    yield Figure("CLIP instead of its features", clip, "s per batch")


def loading(bench: Bench) -> Iterator[Figure]:
    """A directory as `save_pretrained` writes it to the device, beside its bytes alone; the files are in the page cache."""
    model, _ = draw_model(bench.work, bench.device)
    size = sum(parameter.nbytes for parameter in model.parameters())
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in (bench.work.dtype, torch.float16)}
    with tempfile.TemporaryDirectory() as root:
        needed, free_bytes = 1.1 * size * len(dtypes), shutil.disk_usage(root).free
        if free_bytes < needed:
            reason = f"needs {needed / 1e9:.0f} GB, but {free_bytes / 1e9:.0f} GB are free in {root}"
            yield Figure("load", None, "s", reason)
            return
        yield Figure("size", size / 1e9, "GB")
        for kind, dtype in dtypes.items():
            begun = time.perf_counter()
            model.to(dtype).save_pretrained(Path(root) / kind, max_shard_size="2GB")
            yield Figure(f"{kind} written by save_pretrained", time.perf_counter() - begun, "s")
        del model  # a card of 24 GB does not hold two
        for kind in dtypes:
            folder = Path(root) / kind

            def load(folder=folder) -> None:
                GsvaForConditionalGeneration.from_pretrained(
                    folder, dtype=bench.work.dtype, device_map={"": bench.device}
                )

            def read(folder=folder) -> None:
                for path in folder.glob("*.safetensors"):
                    load_file(path, device=str(bench.device))

            for what, run in ((f"{kind} to a model in {bench.work.dtype}", load), (f"{kind}, the bytes alone", read)):
                yield bench.try_figure(what, "s", lambda run=run: seconds(run, bench.device, 1))


def conversion(bench: Bench) -> Iterator[Figure]:
    """`convert_checkpoint.py` over a checkpoint of the original's layout with the workload's shapes (benchmarks/convert.py)."""
    from benchmarks.convert import checkpoint_bytes, measure

    size = "7b" if bench.work is LARGE else "tiny"
    with tempfile.TemporaryDirectory() as folder:
        needed, free_bytes = 3 * checkpoint_bytes(size, torch.bfloat16), shutil.disk_usage(folder).free
        if free_bytes < needed:
            yield Figure(
                "convert",
                None,
                "s",
                f"needs {needed / 1e9:.0f} GB, but {free_bytes / 1e9:.0f} GB are free in {folder}",
            )
            return
        figures = measure(Path(folder), size, "bfloat16", rounds=1)
    yield Figure("size", figures["gigabytes"], "GB")
    yield Figure("copied", figures["copy_seconds"], "s, to the disk")
    yield Figure("converted", figures["convert_seconds"], "s, to the disk")
    yield Figure(
        "largest memory of the converting process", figures["peak_rss_gigabytes"], "GB, mapped pages of files included"
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
    usual = torch.backends.cudnn.allow_tf32
    for sums, tf32 in (("", False), (", TF32 in convolutions, as PyTorch has it", True)):
        torch.backends.cudnn.allow_tf32 = tf32
        try:
            found = here.segment(**moved)
        finally:
            torch.backends.cudnn.allow_tf32 = usual
        for name in ("scores", "mask_logits", "iou_scores"):
            wanted, got = (torch.cat([part.cpu().float() for part in out[name]]) for out in (expected, found))
            what = f"fp32 on the device from fp32 on the CPU{sums}: {name}"
            yield Figure(what, _rms(got - wanted) / _rms(wanted), "rms, relative")
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
