"""Complete a checkpoint from its bases: LLaMA plus delta, new weights, and the check that every parameter has a tensor."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial

import torch

from .keys import name_in_messages, to_original
from .reading import CheckpointSource, LazyTensor, listed

# Tensors with one row per token: GSVA adds rows to those of LLaVA, and LLaVA to those of LLaMA.
TOKEN_ROWS = ("model.language_model.embed_tokens.weight", "lm_head.weight")

# The option that supplies each part of the model if the checkpoint lacks it, and a tensor by which the part is recognised.
SUPPLIED_BY = {
    "model.language_model.embed_tokens.": ("weight", "--checkpoint"),
    "model.language_model.": ("norm.weight", "--llava (or --llama with --llava_delta)"),
    "lm_head.": ("weight", "--checkpoint"),
    "model.multi_modal_projector.": ("weight", "--llava (or --llava_delta)"),
    "model.vision_tower.": ("embeddings.patch_embedding.weight", "--clip"),
    "sam.": ("vision_encoder.pos_embed", "--sam"),
    "mask_projector.": ("0.weight", "--checkpoint"),
}

# The forms of a checkpoint.
WHOLE, TRAINED_ONLY, LORA_ONLY, NO_CHECKPOINT = "whole model", "trained parts only", "LoRA only", "none"

# The parts of the model, as the original's training treats them. A parameter belongs to the first part that fits.
PARTS = {
    "model.language_model.embed_tokens.": "embedding",
    "model.language_model.": "language model",
    "lm_head.": "language head",
    "model.multi_modal_projector.": "projector",
    "model.vision_tower.": "CLIP's vision tower",
    "sam.vision_encoder.": "SAM's image encoder",
    "sam.prompt_encoder.": "SAM's prompt encoder",
    "sam.shared_image_embedding.": "SAM's positional matrix",
    "sam.mask_decoder.": "SAM's mask decoder",
    "mask_projector.": "mask projector",
}
# Trained in full next to LoRA (main.py of the original: the parameters that get requires_grad), so a checkpoint of trained
# parts has all of them.
TRAINED_PARTS = ("model.language_model.embed_tokens.", "lm_head.", "sam.mask_decoder.", "mask_projector.")
BUFFERS = ("sam.shared_image_embedding.",)  # in the original; DeepSpeed keeps buffers beside the trained parts
TOWERS = ("model.vision_tower.", "sam.vision_encoder.", "sam.prompt_encoder.")

# Patterns of tensors that training does not move far, and the least cosine between those of a base and of the parts trained
# on it. Rows of frequent tokens move, hence the lower limit.
UNMOVED = {
    r"sam\.shared_image_embedding\.positional_embedding": 0.9,
    r"sam\.mask_decoder\.(iou_prediction_head|output_hypernetworks_mlps\.[123])\..*weight": 0.9,
    r"model\.language_model\.embed_tokens\.weight": 0.5,
    r"lm_head\.weight": 0.5,
}
SAMPLED_ROWS = 1000

COPY_AGAIN = "It is not whole: a file or a shard is lost or damaged. Copy or download it again."


def refuse_delta(llava: CheckpointSource) -> None:
    """Raise ValueError if a LLaVA base is a delta against LLaMA.

    The weights of LLaMA's final norm are about 1 to 2. A delta holds their change by fine-tuning, which is about 0.
    """
    norm = llava.tensors.get("model.language_model.norm.weight")
    if norm is not None and norm.read().float().abs().median() < 0.25:
        raise ValueError(
            f"{llava.path} is a delta against LLaMA, not a model (the weights of its final norm are about 0). Pass LLaMA "
            f"itself and the delta: --llama LLAMA_DIR --llava_delta {llava.path}"
        )


def add_delta(llama: CheckpointSource, delta: CheckpointSource) -> CheckpointSource:
    """Return LLaMA plus delta. Rows and tensors that LLaMA lacks are taken from the delta (LLaVA's apply_delta).

    Raises:
        ValueError: The two do not belong together.
    """

    def add(base: LazyTensor, change: LazyTensor) -> torch.Tensor:
        total = change.read().float().clone()
        total[tuple(slice(0, side) for side in base.shape)] += base.read().float()
        return total.to(change.dtype)

    for name, change in list(delta.tensors.items()):
        base = llama.tensors.get(name)
        if base is None:
            if name.startswith("model.language_model.") or name == "lm_head.weight":
                raise ValueError(f"--llama {llama.path} lacks {to_original(name)}, which the delta changes.")
            continue
        fits = base.shape[0] <= change.shape[0] if name in TOKEN_ROWS else base.shape == change.shape
        if base.shape[1:] != change.shape[1:] or not fits:
            raise ValueError(
                f"{to_original(name)} is {base.shape} in --llama and {change.shape} in --llava_delta: the delta "
                "belongs to another model."
            )
        delta.tensors[name] = LazyTensor(change.shape, change.dtype, partial(add, base, change))
    if lost := sorted(set(llama.tensors) - set(delta.tensors)):
        raise ValueError(f"--llava_delta {delta.path} has no change for {listed(lost)}; it is not whole.")
    return delta


def form_of(checkpoint: CheckpointSource) -> str:
    """Return the form of a checkpoint, one of `FORMS`."""
    if checkpoint.path is None:
        return NO_CHECKPOINT
    if not {part_of(name) for name in checkpoint.tensors} - set(BUFFERS):
        return LORA_ONLY
    # The original's training freezes the towers, and the weights under LoRA: a checkpoint that has them has everything.
    frozen = any(name.startswith(TOWERS) for name in checkpoint.tensors)
    return WHOLE if frozen or checkpoint.lora.keys() & checkpoint.tensors.keys() else TRAINED_ONLY


def check_parts(tensors: Collection[str], checkpoint: CheckpointSource) -> None:
    """Raise ValueError with every part of the model that no option supplies, before any configuration is read."""
    form = form_of(checkpoint)
    instead = {
        NO_CHECKPOINT: SUPPLIED_BY["model.language_model."][1],
        LORA_ONLY: "--llava, as the directory of a whole GSVA in the original's layout",
    }
    missing = [
        f"{name_in_messages(part + sign).removesuffix(sign)}*: pass it with "
        + (instead.get(form, option) if option == "--checkpoint" else option)
        for part, (sign, option) in SUPPLIED_BY.items()
        if part + sign not in tensors and not (form == NO_CHECKPOINT and part == "mask_projector.")
    ]
    if not missing:
        return
    if form == WHOLE:
        lost = ", ".join(part.partition(":")[0] for part in missing)
        raise ValueError(
            f"{checkpoint.path} has not all parameters of a whole model, {lost} are missing. {COPY_AGAIN}"
        )
    problem = {
        NO_CHECKPOINT: "Without --checkpoint every part comes from an option",
        LORA_ONLY: f"{checkpoint.path} has only LoRA",
        TRAINED_ONLY: f"{checkpoint.path} has only the trained parameters",
    }[form]
    raise ValueError(f"{problem}; missing are {'; '.join(missing)}")


def refuse_holes(checkpoint: CheckpointSource, expected: Collection[str]) -> None:
    """Raise ValueError with the parameters that a checkpoint of its form must have and lacks. Bases do not fill these.

    A whole model has all parameters. Trained parts alone have `TRAINED_PARTS`, and all or nothing of any other part. LoRA is
    on all layers of the model or on none.

    Args:
        expected: The model's parameters.
    """
    form = form_of(checkpoint)
    missing = {name for name in expected if name not in checkpoint.tensors}
    if form in (NO_CHECKPOINT, LORA_ONLY):
        missing = set()
    elif form == TRAINED_ONLY:
        begun = {part_of(name) for name in checkpoint.tensors} - set(BUFFERS)
        missing = {name for name in missing if part_of(name) in begun | set(TRAINED_PARTS)}
    if missing:
        raise ValueError(
            f"--checkpoint {checkpoint.path} ({form}) has holes, which bases do not fill: it has "
            f"{len(checkpoint.tensors)} parameters and lacks {_by_option(sorted(missing))}. {COPY_AGAIN}"
        )
    check_lora(checkpoint.lora, expected, f"--checkpoint {checkpoint.path}")


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to, one of `PARTS`."""
    return next(part for part in PARTS if name.startswith(part))


def check_lora(lora: Mapping[str, Collection[str]], expected: Collection[str], source: str) -> None:
    """Raise ValueError unless LoRA has both matrices of each weight, and is on a weight in all layers of the model or in none.

    Args:
        lora: `{name of the adapted weight: the matrices there, "A" and "B"}`.
        expected: The model's parameters.
        source: Where LoRA comes from, for the message.
    """
    if half := [name_in_messages(name) for name, pair in lora.items() if len(pair) != 2]:
        raise ValueError(f"{source}: lora_A without lora_B (or the reverse) for {listed(half)}. {COPY_AGAIN}")

    def weight(name: str) -> str:
        return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)

    adapted = {weight(name) for name in lora}
    if missing := [name_in_messages(name) for name in expected if weight(name) in adapted and name not in lora]:
        raise ValueError(
            f"{source}: LoRA is on {len(lora)} weights, but lacks {listed(missing, 4)} of other layers. {COPY_AGAIN}"
        )


def refuse_other_base(
    trained: Mapping[str, LazyTensor], base: Mapping[str, LazyTensor], trained_name: str, base_name: str
) -> None:
    """Raise ValueError if trained parts were not trained on this base.

    Compared are tensors that the base and the trained parts both have and that training does not move, or not far: SAM's
    positional matrix, the parts of its mask decoder that get no gradient (`iou_prediction_head`, hypernetworks 1 to 3), and
    rows of the embedding and the language head, most of them of tokens that are rare. The cosine of the angle between them is
    near 1 if they belong together, also after rounding, weight decay and scaling, and near 0 for other weights.

    Args:
        trained, base: Tensors under our names.
    """
    for name, limit in UNMOVED.items():
        ours = [key for key in trained if re.fullmatch(name, key) and key in base]
        dot, ours_squared, base_squared = 0.0, 0.0, 0.0
        for key in ours:
            if trained[key].shape[1:] != base[key].shape[1:]:
                dot, ours_squared, base_squared = 0.0, 1.0, 1.0
                break
            rows = min(trained[key].shape[0], base[key].shape[0])
            every = max(1, rows // SAMPLED_ROWS)
            ours_part, base_part = (tensor[key].read()[:rows:every].double().flatten() for tensor in (trained, base))
            dot += float(ours_part @ base_part)
            ours_squared += float(ours_part @ ours_part)
            base_squared += float(base_part @ base_part)
        if ours_squared and base_squared and dot < limit * (ours_squared * base_squared) ** 0.5:
            raise ValueError(
                f"{base_name} is another model than the one that the trained parts of {trained_name} were trained on: "
                f"{name_in_messages(ours[0])} of the two have nothing in common, though training hardly moves it. Pass the "
                "base of that training."
            )


def _by_option(names: list[str]) -> str:
    missing: dict[str, list[str]] = {}
    for name in names:
        option = next(option for part, (_, option) in SUPPLIED_BY.items() if name.startswith(part))
        missing.setdefault(option, []).append(name_in_messages(name))
    return "; ".join(f"{len(some)} that {option} supplies: {listed(some, 4)}" for option, some in missing.items())


def check_filled(expected: dict[str, tuple[int, ...]], tensors: Mapping[str, LazyTensor], given: list[str]) -> None:
    """Raise ValueError unless there is one floating-point tensor of the right shape for every parameter, and no other.

    Args:
        expected: The model's parameters, `{our name: shape}`.
        given: The options and their paths, for the message.
    """
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(f"{' '.join(given)} leave parameters of the model unfilled: {_by_option(missing)}")
    wrong = [
        f"{name_in_messages(name)} is {tensors[name].shape}, the configuration says {shape}"
        for name, shape in expected.items()
        if tensors[name].shape != shape
    ]
    wrong += [
        f"{name_in_messages(name)} is {tensor.dtype}, no floating type (a quantized checkpoint cannot be converted)"
        for name, tensor in tensors.items()
        if tensor.dtype is None or not tensor.dtype.is_floating_point
    ]
    wrong += [
        f"{name_in_messages(name)} {tensors[name].shape} is no parameter of this configuration"
        for name in tensors
        if name not in expected
    ]
    if wrong:
        more = f"; and {len(wrong) - 12} more" if wrong[12:] else ""
        raise ValueError(f"Tensors do not fit the config.json files: {'; '.join(wrong[:12])}{more}")


def new_weights(
    tensors: Mapping[str, LazyTensor], rows: int, new_tokens: list[str], std: float, seed: int
) -> dict[str, LazyTensor]:
    """Draw the weights that GSVA adds to LLaVA and SAM, as the original draws them before its training.

    Rows of the new tokens in the embedding and in the language head: normal with the configuration's
    `initializer_range` (prepare_model_tokenizer.py: `resize_token_embeddings` of transformers 4.44.2). The mask
    projector: see `projector_weights`.

    Args:
        tensors: Those of the bases.
        rows: Number of rows of the embedding with the new tokens.
        std: Standard deviation of the new rows.

    Raises:
        ValueError: The number of rows of the base's embedding is not the number of tokens of its tokenizer.
    """

    def grow(base: LazyTensor, number: int) -> torch.Tensor:
        added = torch.randn(len(new_tokens), base.shape[1], generator=_generator(seed, number)) * std
        return torch.cat([base.read(), added.to(base.dtype)])

    new = {}
    for number, name in enumerate(TOKEN_ROWS):
        base = tensors[name]
        if base.shape[0] + len(new_tokens) != rows:
            raise ValueError(
                f"{to_original(name)} has {base.shape[0]} rows, and its tokenizer {rows - len(new_tokens)} tokens before "
                f"GSVA adds {', '.join(new_tokens)}: --llava is not whole (added_tokens.json, perhaps), or not a LLaVA of "
                "the paper's kind."
            )
        new[name] = LazyTensor((rows, base.shape[1]), base.dtype, partial(grow, base, number))
    hidden, prompt = tensors[TOKEN_ROWS[0]].shape[1], tensors["sam.mask_decoder.mask_tokens.weight"].shape[1]
    return new | projector_weights(hidden, prompt, seed)


def _generator(seed: int, number: int) -> torch.Generator:
    """Return the generator of one tensor. Each has its own, so that the order of writing does not matter."""
    return torch.Generator().manual_seed(seed * 10 + number)


def projector_weights(hidden: int, prompt: int, seed: int) -> dict[str, LazyTensor]:
    """Draw the mask projector: `torch.nn.Linear`'s uniform numbers (modeling_lisa_gsva.py: init_seg_and_proj).

    Args:
        hidden: Width of the language model.
        prompt: Width of the mask decoder's prompts.
    """

    def uniform(shape: tuple[int, ...], number: int) -> torch.Tensor:  # bound of weight and bias: 1 / sqrt(inputs)
        return (torch.rand(shape, generator=_generator(seed, number)) * 2 - 1) / hidden**0.5

    shapes = {"0.weight": (hidden, hidden), "0.bias": (hidden,), "2.weight": (prompt, hidden), "2.bias": (prompt,)}
    return {
        f"mask_projector.{name}": LazyTensor(shape, torch.float32, partial(uniform, shape, number))
        for number, (name, shape) in enumerate(shapes.items(), start=2)
    }
