"""Fill a checkpoint up from its bases: LLaMA plus delta, fresh weights, and the check that every parameter has a tensor."""

from __future__ import annotations

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


def check_parts(tensors: Collection[str], checkpoint: CheckpointSource) -> None:
    """Raise ValueError with every part of the model that no option supplies, before any configuration is read."""
    is_start = checkpoint.path is None
    missing = [
        f"  {name_in_messages(part + sign).removesuffix(sign)}*: pass it with "
        + (SUPPLIED_BY["model.language_model."][1] if is_start and option == "--checkpoint" else option)
        for part, (sign, option) in SUPPLIED_BY.items()
        if part + sign not in tensors and not (is_start and part == "mask_projector.")
    ]
    if missing:
        trained = "model.language_model.norm.weight" not in checkpoint.tensors
        has = f"{checkpoint.path} has {'only the trained parameters' if trained else 'not all parameters'}"
        raise ValueError(
            ("Without --checkpoint every part comes from an option" if is_start else has)
            + "; missing are\n"
            + "\n".join(missing)
        )


def check_filled(expected: dict[str, tuple[int, ...]], tensors: Mapping[str, LazyTensor], given: list[str]) -> None:
    """Raise ValueError unless there is one floating-point tensor of the right shape for every parameter, and no other.

    Args:
        expected: The model's parameters, `{our name: shape}`.
        given: The options and their paths, for the message.
    """
    missing: dict[str, list[str]] = {}
    for name in expected:
        if name not in tensors:
            option = next(option for part, (_, option) in SUPPLIED_BY.items() if name.startswith(part))
            missing.setdefault(option, []).append(name_in_messages(name))
    if missing:
        lines = [f"  {len(names)} that {option} supplies: {listed(names, 4)}" for option, names in missing.items()]
        raise ValueError(f"{' '.join(given)} leave parameters of the model unfilled:\n" + "\n".join(lines))
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
        raise ValueError(
            "Tensors do not fit the config.json files:\n  "
            + "\n  ".join(wrong[:12])
            + (f"\n  and {len(wrong) - 12} more" if wrong[12:] else "")
        )


def new_weights(
    tensors: Mapping[str, LazyTensor], rows: int, new_tokens: list[str], std: float, seed: int
) -> dict[str, LazyTensor]:
    """Draw the weights that GSVA adds to LLaVA and SAM, as the original draws them before its training.

    Rows of the new tokens in the embedding and in the language head: normal with the configuration's
    `initializer_range` (prepare_model_tokenizer.py: `resize_token_embeddings` of transformers 4.44.2). The mask
    projector: `torch.nn.Linear`'s uniform numbers (modeling_lisa_gsva.py: init_seg_and_proj).

    Args:
        tensors: Those of the bases.
        rows: Number of rows of the embedding with the new tokens.
        std: Standard deviation of the new rows.

    Raises:
        ValueError: The number of rows of the base's embedding is not the number of tokens of its tokenizer.
    """

    def generator(number: int) -> torch.Generator:  # one per tensor, so that the order of writing does not matter
        return torch.Generator().manual_seed(seed * 10 + number)

    def grow(base: LazyTensor, number: int) -> torch.Tensor:
        added = torch.randn(len(new_tokens), base.shape[1], generator=generator(number)) * std
        return torch.cat([base.read(), added.to(base.dtype)])

    def uniform(shape: tuple[int, ...], number: int) -> torch.Tensor:  # bound of weight and bias: 1 / sqrt(inputs)
        return (torch.rand(shape, generator=generator(number)) * 2 - 1) / hidden**0.5

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
    shapes = {"0.weight": (hidden, hidden), "0.bias": (hidden,), "2.weight": (prompt, hidden), "2.bias": (prompt,)}
    for number, (name, shape) in enumerate(shapes.items(), start=2):
        new[f"mask_projector.{name}"] = LazyTensor(shape, torch.float32, partial(uniform, shape, number))
    return new
