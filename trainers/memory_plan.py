"""`run_gres.py --plan`: count the memory that training takes on each card before anything is loaded.

The parts of the sum, in bytes per process:

- **weights**: every parameter and buffer of the model that would be trained, times the size of its type. The model is
  made without memory and has LoRA and peft's copies of the fully trained parts. A 4-bit weight takes 1/2 byte, 1/64 for
  the scale of its block and 1/4096 for the scale of the scales (nf4, doubly quantized); an 8-bit one 1 byte and 4 per row.
- **gradients**: the size of the trained parameters.
- **optimizer**: AdamW's two float32 moments, 8 bytes per trained parameter.
- **activations**: the highest sum of other live tensors while the model's code runs one forward and backward pass of a
  micro-batch on tensors without content (`FakeTensorMode`). It includes tensors that autograd keeps, checkpoints,
  temporaries, the passes of the frozen towers, logits and mask losses.
- **buffers**: additional memory of the strategy, see `Strategy`.

The count assumes the worst case: every conversation is as long as max_length allows, all its text is supervised, all its
num_expressions slots are `[SEG]`, and images are 640 x 640, COCO's largest. Where the base's configuration says how many
tokens an image takes, these are not supervised; of other bases all tokens are taken for text. The base's own vision tower is
run for LLaVA v1. For others, whose inputs differ by family, its temporaries are bounded by `tower_bytes`. The count leaves out
the memory of the driver, fragmentation of the allocator, and temporaries inside fused kernels; `MARGIN` allows for them.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig

from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration
from modeling_gsva.llava_v1_gsva import LlavaV1Config
from modeling_gsva.modeling_gsva import upscaled_mask_losses
from modeling_gsva.sam_attention_gsva import BIAS_ELEMENTS, CANDIDATES
from modeling_gsva.sam_decoder_gsva import MAP_BYTES

from .arguments import ARCHITECTURES, DataArguments, GsvaTrainingArguments, ModelArguments
from .freezing import cast_trained, parts_of, plain_model, plain_name, prepare_for_training

GIB = 1024**3
MARGIN = 1.5 * GIB  # an assumption: about 0.5 GiB for the CUDA context, the rest for the allocator
IMAGE_SIDE = 640
# Patches of a vision tower that become one token, at most: SmolVLM 500M and Gemma 3 join 4 x 4, Qwen and InternVL 2 x 2.
PATCHES_PER_TOKEN = 16
# The cards people train on, in GiB.
CARDS = {"24 GiB": 24, "40 GiB": 40, "48 GiB": 48, "80 GiB": 80}
PLANNED = ("one_gpu", "ddp", "zero2", "zero3", "fsdp2")


def architecture(name: str) -> GsvaConfig:
    """
    Return a model of `configs/architectures`, the paper's "7b" or "13b" (LLaMA with 32,004 rows, CLIP ViT-L/14 at 224 px, SAM
    ViT-H at 1024 px) or one over a base of today.

    >>> architecture("7b").image_seq_length
    256
    """
    path = Path(__file__).resolve().parent.parent / "configs" / "architectures" / f"{name}.json"
    return GsvaConfig(**json.loads(path.read_text(encoding="utf-8")))


def planned_config(args: ModelArguments) -> GsvaConfig:
    """
    Return the configuration of the model if it can be read, else that of `architecture`.

    Raises:
        ValueError: There is neither.
    """
    if (Path(args.model) / "config.json").is_file():
        return GsvaConfig.from_pretrained(args.model)
    if args.architecture is not None:
        return architecture(args.architecture)
    try:
        return AutoConfig.from_pretrained(args.model, trust_remote_code=True)
    except OSError:
        raise ValueError(
            f"model={args.model!r} is not on this machine, so its size is not known; name it: --architecture "
            f"{', '.join(ARCHITECTURES[:-1])} or {ARCHITECTURES[-1]}."
        ) from None


@dataclass
class Strategy:
    """
    How memory is divided among `processes`, read from an accelerate config.

    - "NO", "MULTI_GPU": every card holds everything; the latter's buckets hold the gradients once more.
    - "zero2": with bf16, DeepSpeed keeps all weights in 2 bytes on every card, and shards of the gradients (2 bytes) and of
      the optimizer (float32 weights and two moments); without bf16, 4 bytes each. Gradients are reduced in one buffer of
      `reduce_bucket_size`, with `overlap_comm` in two (deepspeed/runtime/zero/stage_1_and_2.py, setup_buckets).
    - "zero3": also shards of the weights. Gathered weights stay until the backward pass as long as they are not more than
      `stage3_max_live_parameters`, 1e9 by default (deepspeed/runtime/zero/partitioned_param_coordinator.py).
    - "fsdp2": shards of weights, gradients and optimizer. Two layers are gathered at a time, and all modules that are not
      wrapped for the whole step.
    """

    name: str
    kind: str
    processes: int
    bucket: int = 0  # zero2: numbers in the buffers of gradients that are reduced; zero3: weights that stay gathered

    @classmethod
    def read(cls, path: str | Path, processes: int | None = None) -> Strategy:
        """
        Return the strategy of an accelerate config, with `processes` instead of its number of processes.

        Raises:
            ValueError: There is no such file, or it is not an accelerate config.
        """
        path = Path(path)
        content = yaml.safe_load(path.read_text()) if path.is_file() else None
        if not isinstance(content, dict) or "distributed_type" not in content:
            raise ValueError(f"{path} is no accelerate config; those of this project are in configs/accelerate/.")
        kind, bucket = str(content["distributed_type"]), 0
        if kind == "DEEPSPEED":
            settings = content.get("deepspeed_config", {})
            file = settings.get("deepspeed_config_file")
            if file is not None:
                settings = yaml.safe_load(Path(file).read_text())["zero_optimization"]
            kind = f"zero{settings.get('stage', settings.get('zero_stage'))}"
            if kind == "zero2":
                bucket = int(settings.get("reduce_bucket_size", 5e8)) * (2 if settings.get("overlap_comm") else 1)
            elif kind == "zero3":
                bucket = int(float(settings.get("stage3_max_live_parameters", 1e9)))
        elif kind == "FSDP":
            kind = "fsdp2"
        if kind not in ("NO", "MULTI_GPU", "zero2", "zero3", "fsdp2"):
            raise ValueError(
                f"{path}: --plan does not know distributed_type {kind}; choose NO, MULTI_GPU, DEEPSPEED or FSDP."
            )
        return cls(path.stem, kind, processes or int(content.get("num_processes", 1)), bucket)


@dataclass
class Sizes:
    """Sizes of the model that is trained, as one process without sharding holds it."""

    frozen_bytes: int
    trained: int  # parameters
    trained_bytes: int
    parameters: int
    layer_bytes: int  # the largest layer of the language model
    root_bytes: int  # all modules outside the language model's layers
    dequantized: int  # the largest quantized weight while it is used

    @property
    def weights(self) -> int:
        """Return the bytes of all weights."""
        return self.frozen_bytes + self.trained_bytes


@dataclass
class Memory:
    """Bytes per process."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """Return the bytes of all parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def _quantized_bytes(weight: torch.Tensor, kind: str) -> float:
    n = weight.numel()
    return n / 2 + n / 64 + n / 64 / 256 * 4 if kind == "4bit" else n + 4 * weight.shape[0]


def trained_model(config: GsvaConfig, args: ModelArguments, half: bool) -> nn.Module:
    """Return the model as it is prepared for training, on the meta device: shapes and types without content."""
    with torch.device("meta"):
        model = GsvaForConditionalGeneration(config)
        if args.dtype in ("bfloat16", "float16"):
            model = model.to(getattr(torch, args.dtype))
        model = prepare_for_training(model, args)
    return cast_trained(model, torch.float32) if half else model


def without_content(model: nn.Module) -> nn.Module:
    """Inside `FakeTensorMode`, move a model from the meta device to the CPU; it still takes no memory."""
    copies: dict[int, torch.Tensor] = {}  # tied parameters stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in copies:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    copies[id(tensor)] = new
                tensors[name] = copies[id(tensor)]
    return model


def sizes_of(model: nn.Module, quantization: str | None) -> Sizes:
    """Return the sizes of a model. Every parameter and buffer is counted once."""
    sizes = Sizes(0, 0, 0, 0, 0, 0, 0)
    layers: dict[str, float] = {}
    frozen = root = 0.0
    seen = set()
    in_layer = re.compile(rf"{re.escape(parts_of(plain_model(model)).decoder)}\.\w+\.(\d+)\.")
    quantized = {
        f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear) and "lora_" not in name
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        size = tensor.numel() * tensor.element_size()
        layer = in_layer.match(plain_name(name))
        if quantization and layer and name in quantized:
            sizes.dequantized = max(sizes.dequantized, size)
            size = _quantized_bytes(tensor, quantization)
        sizes.parameters += tensor.numel()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            sizes.trained += tensor.numel()
            sizes.trained_bytes += size
        else:
            frozen += size
        if layer:
            layers[layer[1]] = layers.get(layer[1], 0) + size
        else:
            root += size
    sizes.frozen_bytes, sizes.root_bytes, sizes.layer_bytes = int(frozen), int(root), int(max(layers.values()))
    return sizes


@contextmanager
def pieces_as_on_a_card() -> Iterator[None]:
    """Let SAM's attention and mask decoder work in the way, and in pieces of the size, that they have on a GPU, not on a CPU."""
    tables: tuple[dict[str, Any], ...] = BIAS_ELEMENTS, MAP_BYTES, CANDIDATES
    usual = [table["cpu"] for table in tables]
    for table in tables:
        table["cpu"] = table.get("cuda", table["default"])
    try:
        yield
    finally:
        for table, value in zip(tables, usual):
            table["cpu"] = value


class LiveBytes(TorchDispatchMode):
    """
    Follows the storages that operations create. `live` is the sum of their bytes now, `peak` the highest so far.

    torch.distributed._tools.mem_tracker.MemTracker (torch 2.13) would do the same, but it registers hooks on all parameters
    and fails for frozen ones.

    Args:
        counted_elsewhere: Tensors that are not counted.
    """

    def __init__(self, counted_elsewhere=()):
        super().__init__()
        self.live = self.peak = 0
        self.alive = {tensor.untyped_storage()._cdata for tensor in counted_elsewhere}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, out)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.alive:
            return
        self.alive.add(storage._cdata)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, storage._cdata, size)

    def _remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.live -= size


def image_tokens(config: GsvaConfig) -> int:
    """Return how many tokens an image takes at least, as far as the base's configuration says so; else 0."""
    names = ("image_seq_length", "mm_tokens_per_image")
    counts = (getattr(config.vlm_config, name, None) for name in names)
    return next((count for count in counts if isinstance(count, int)), 0)


def tower_bytes(config: GsvaConfig, images: int, length: int, half: bool) -> int:
    """
    Return a bound of what a frozen vision tower holds at a time: it keeps nothing for a backward pass, so that this is the
    input of a layer and what its attention and its perceptron make of it, for the patches of conversations full of images.
    """
    vision = getattr(config.vlm_config, "vision_config", None)  # which a base may lack, or have by another name
    hidden = int(getattr(vision, "hidden_size", 0) or getattr(vision, "embed_dim", 0))
    wide = int(getattr(vision, "intermediate_size", 0) or 4 * hidden)
    return images * length * PATCHES_PER_TOKEN * (6 * hidden + 2 * wide) * (2 if half else 4)


def embedded_images(gsva: nn.Module, images: int, length: int) -> torch.Tensor:
    """Return (images, positions, hidden) features of images; those of LLaVA v1 are computed."""
    if gsva.config.vlm_config.model_type == LlavaV1Config.model_type:
        side = gsva.config.vision_config.image_size
        return gsva.model.multi_modal_projector(gsva.model.get_vision_features(torch.empty(images, 3, side, side)))
    count = min(image_tokens(gsva.config), length - 1)
    return torch.empty(images, count, gsva.config.text_config.hidden_size, dtype=gsva.dtype)


def activation_bytes(
    model: nn.Module, images: int, length: int, slots: int, half: bool, side: int = IMAGE_SIDE
) -> int:
    """
    Return the highest sum of live tensors, other than weights and gradients, in one forward and backward pass in bytes.

    Args:
        model: Result of `trained_model`.
        images: Images of a micro-batch, one conversation each.
        length: Tokens per conversation.
        slots: Slots per image.
        half: Whether autocast computes in bfloat16.
        side: Height and width of the images in pixels, for the mask losses.
    """
    gsva, model = plain_model(model), model.train()
    config, sam = gsva.config, gsva.config.mask_input_size
    for parameter in model.parameters():  # gradients are counted by themselves and updated in place
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    counted_elsewhere = [
        *model.parameters(),
        *model.buffers(),
        *(p.grad for p in model.parameters() if p.grad is not None),
    ]
    with LiveBytes(counted_elsewhere) as counter, pieces_as_on_a_card(), ExitStack() as stack:
        if half:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        features = embedded_images(gsva, images, length)
        ids = torch.zeros(images, length, dtype=torch.long)
        embeds = gsva.get_input_embeddings()(ids)
        embeds = torch.cat([embeds[:, : length - features.shape[1]], features.to(embeds)], 1)
        hidden = gsva.vlm.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
        text = max(length - features.shape[1], 1)
        logits = gsva.language.logits(hidden[:, -text:]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, -text:].flatten(), reduction="sum")
        del logits, features, embeds
        embeddings = gsva.get_sam_embeddings(torch.empty(images, 3, sam, sam))
        states = hidden[:, :slots].flatten(0, 1)
        masks, _ = gsva.decode_masks(states, embeddings, torch.arange(images).repeat_interleave(slots))
        reshaped, original = (sam, sam), (side, side)
        for image in range(images):
            part = masks[image * slots : (image + 1) * slots].float()
            truth = torch.empty(slots, *original, dtype=torch.uint8)
            bce, dice, _ = upscaled_mask_losses(part, truth, reshaped, original, sam)
            loss = loss + bce + dice
            del part, bce, dice, truth
        del masks, hidden, states
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    is_v1 = config.vlm_config.model_type == LlavaV1Config.model_type
    return counter.peak if is_v1 else max(counter.peak, tower_bytes(config, images, length, half))


def memory_of(sizes: Sizes, activations: int, strategy: Strategy, half: bool = True) -> Memory:
    """
    Return the memory per process of a model with these sizes and activations; see `Strategy`.

    Args:
        half: Whether training computes in half precision, so that DeepSpeed keeps weights and gradients in 2 bytes.
    """
    n, trained, width = strategy.processes, sizes.trained, 2 if half else 4
    if strategy.kind in ("NO", "MULTI_GPU"):
        buckets = sizes.trained_bytes if strategy.kind == "MULTI_GPU" else 0
        buffers = buckets + sizes.dequantized
        return Memory(sizes.weights, sizes.trained_bytes, 8 * trained, activations, buffers)
    if strategy.kind == "zero2":
        return Memory(
            sizes.frozen_bytes + width * trained,
            width * trained / n,
            12 * trained / n,
            activations,
            sizes.dequantized + width * strategy.bucket,
        )
    if strategy.kind == "zero3":
        weights = (sizes.frozen_bytes + width * trained) / n
        gathered = width * min(strategy.bucket, sizes.parameters)
        return Memory(weights, width * trained / n, 12 * trained / n, activations, gathered)
    weights = sizes.weights / n
    return Memory(
        weights, sizes.trained_bytes / n, 8 * trained / n, activations, sizes.root_bytes + 2 * sizes.layer_bytes
    )


def count(model_args: ModelArguments, data_args: DataArguments, training: GsvaTrainingArguments) -> tuple[Sizes, int]:
    """Return the sizes of the model and the bytes of the activations."""
    config, half = planned_config(model_args), training.bf16 or training.fp16
    length = data_args.max_length or config.text_config.max_position_embeddings
    model = trained_model(config, replace(model_args, quantization=None), half)
    sizes = sizes_of(model, model_args.quantization)
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_content(model)
        if training.activation_checkpointing:
            model.activation_checkpointing_enable()
        images = training.per_device_train_batch_size
        return sizes, activation_bytes(model, images, length, data_args.num_expressions, half)


def plan(model_args: ModelArguments, data_args: DataArguments, training: GsvaTrainingArguments) -> str:
    """Return the table that `--plan` prints."""
    configs = Path(__file__).resolve().parent.parent / "configs" / "accelerate"
    paths = [training.plan_strategy] if training.plan_strategy else [configs / f"{name}.yaml" for name in PLANNED]
    strategies = [Strategy.read(path, training.plan_processes) for path in paths]
    sizes, activations = count(model_args, data_args, training)
    cards = {f"{training.plan_memory:g} GiB": training.plan_memory} if training.plan_memory else CARDS
    title = (
        f"{model_args.model}: {sizes.parameters:,} parameters, {sizes.trained:,} trained ({model_args.train_language_model}"
        f"{', ' + model_args.quantization if model_args.quantization else ''}), {training.per_device_train_batch_size} "
        f"images with {data_args.num_expressions} expressions per card, activations "
        f"{'checkpointed' if training.activation_checkpointing else 'kept'}; GiB per card:"
    )
    config = planned_config(model_args)
    if config.vlm_config.model_type != LlavaV1Config.model_type:
        tokens = image_tokens(config)
        title += (
            f"\nassumed: {data_args.max_length or 'as many as the base takes'} tokens in each conversation, "
            f"{f'{tokens} of them' if tokens else 'an unknown number of them'} of the image; every other token is supervised; up "
            f"to {PATCHES_PER_TOKEN} patches of the vision tower for each token of a conversation."
        )
    names = ("weights", "gradients", "optimizer", "activations", "buffers", "total")
    head = f"{'strategy':<10}{'cards':>6}" + "".join(f"{name:>13}" for name in names)
    lines = [title, f"{head}  fits (with {MARGIN / GIB:g} GiB to spare)"]
    for strategy in strategies:
        memory = memory_of(sizes, activations, strategy, training.bf16 or training.fp16)
        numbers = "".join(f"{getattr(memory, name) / GIB:>13.1f}" for name in names)
        fits = [name for name, size in cards.items() if memory.total + MARGIN <= size * GIB]
        lines.append(f"{strategy.name:<10}{strategy.processes:>6}{numbers}  {', '.join(fits) or 'none'}")
    return "\n".join(lines)
