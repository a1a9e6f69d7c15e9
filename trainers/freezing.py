"""Decide which parts of GSVA are trained: frozen, with LoRA, or in full. Parts are found by what they are, not by their names."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from .arguments import ModelArguments

# The projections to queries and values, which the original adapts (main.py: --lora_target_modules q_proj,v_proj), by the names
# that the language models of transformers 5.23 give them. Others have one layer for queries, keys and values together.
QUERY_AND_VALUE = ("q_proj", "v_proj")
FUSED = ("qkv_proj", "qkv", "query_key_value", "Wqkv", "c_attn", "in_proj_qkv", "in_proj_qkvz")
# Trained in full beside LoRA and the token rows, as in the original; text_hidden_fcs is called mask_projector here.
MASK_PARTS = ("sam.mask_decoder", "mask_projector")
# Parts of a mask decoder that a single mask (multimask_output=False) does not depend on, so they would get no gradient.
WITHOUT_GRADIENT = ("sam.mask_decoder.iou_prediction_head",) + tuple(
    f"sam.mask_decoder.output_hypernetworks_mlps.{number}" for number in (1, 2, 3)
)
# The head of the object's score, on which the loss depends if the configuration gives it a weight.
OBJECT_HEAD = "sam.mask_decoder.pred_obj_score_head"


def _is_in(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


@dataclass(frozen=True)
class Parts:
    """
    The names of a model's parts, as `named_modules` has them.

    Args:
        decoder: The language model without embedding and head of the whole; it holds the embedding.
        embedding: The rows of the tokens, input.
        head: The rows of the tokens, output.
        encoders: What reads images: vision towers, projectors, mergers and connectors.
        is_tied: Whether embedding and head are one parameter.
        without_gradient: Parts inside trained ones that stay frozen: the loss does not depend on them, or they encode images.
    """

    decoder: str
    embedding: str
    head: str
    encoders: tuple[str, ...]
    is_tied: bool
    without_gradient: tuple[str, ...]

    @property
    def in_full(self) -> tuple[str, ...]:
        """Return the parts that are trained in full beside LoRA."""
        return (self.embedding, self.head, *MASK_PARTS)


def parts_of(model: nn.Module) -> Parts:
    """
    Return the names of a GSVA's parts, whatever its base and its mask model.

    Raises:
        ValueError: The base's language model is not a part by itself.
    """
    vlm = model.vlm
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    decoder = vlm.get_decoder()
    if decoder is vlm or decoder is vlm.base_model:
        raise ValueError(
            f"{type(vlm).__name__} (model type {vlm.config.model_type!r}) has no language model that is a part by itself, so it "
            "cannot be told what to train; take a base such as llava, qwen3_vl, internvl or smolvlm."
        )
    names = {id(module): name for name, module in model.named_modules()}
    inner = names[id(decoder)]
    # What is beside the language model, on the way down to it.
    beside: list[str] = []
    for level in ("vlm", names[id(vlm.base_model)]):
        beside += [f"{level}.{name}" for name, _ in model.get_submodule(level).named_children()]
    others = [name for name in beside if not _is_in(inner, (name,)) and name != names[id(head)]]
    score_weight = getattr(model.config, "object_score_loss_weight", 0)
    kept = tuple(f"sam.{name}" for name in model.masks.encoding if name.startswith("mask_decoder."))
    return Parts(
        decoder=inner,
        embedding=names[id(embedding)],
        head=names[id(head)],
        encoders=tuple(dict.fromkeys(others)),
        is_tied=embedding.weight is head.weight,
        without_gradient=(*WITHOUT_GRADIENT, *kept, *(() if score_weight else (OBJECT_HEAD,))),
    )


def lora_targets(model: nn.Module, names: list[str] | None = None) -> str:
    r"""
    Return a regular expression for the layers of the language model that get LoRA, never for those of a vision tower.

    >>> lora_targets(model)  # doctest: +SKIP
    '.*language_model\\.layers\\.\\d+\\.self_attn\\.(q_proj|v_proj)'

    Args:
        model: A [`GsvaForConditionalGeneration`].
        names: The last parts of the layers' names; by default those of the projections to queries and values.

    Raises:
        ValueError: The language model has no such layers. The message lists those that it has.
    """
    decoder = parts_of(model).decoder
    linear = [name for name, part in model.get_submodule(decoder).named_modules() if isinstance(part, nn.Linear)]
    wanted = set(names or (*QUERY_AND_VALUE, *FUSED))
    chosen = [name for name in linear if name.rpartition(".")[2] in wanted]
    missing = wanted - {name.rpartition(".")[2] for name in chosen} if names else set()
    if not chosen or missing:
        found = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        asked = f"has no linear layer named {', '.join(sorted(missing))}" if names else (
            f"has no projections to queries and values of a known name ({', '.join((*QUERY_AND_VALUE, *FUSED))})"
        )  # fmt: skip
        raise ValueError(
            f"The language model {type(model.get_submodule(decoder)).__name__} {asked}; its linear layers are {found or 'none'}. "
            "Name those that LoRA is to adapt with --lora_target_modules, or train without LoRA (--train_language_model frozen)."
        )
    folders: dict[str, list[str]] = {}  # layers of one kind, whatever their number
    for name in chosen:
        folder, _, last = re.sub(r"\.\d+\.", ".#.", name).rpartition(".")
        last_names = folders.setdefault(folder, [])
        last_names += [last] if last not in last_names else []
    start, number = re.escape(decoder.rpartition(".")[2]), r"\d+"
    ways = [
        f".*{start}\\.{re.escape(folder).replace(re.escape('#'), number)}\\.({'|'.join(sorted(last))})"
        for folder, last in folders.items()
    ]
    return "|".join(ways)


def prepare_for_training(model: nn.Module, args: ModelArguments) -> nn.Module:
    """
    Return the model with the parts frozen that the paper freezes: vision tower, projector and the mask model's encoders.

    With `train_language_model="lora"` the result is a [`PeftModel`] around the same model, whose adapter holds LoRA and
    the fully trained parts. "full" trains the whole language model, "frozen" only its embedding and head. With
    `train_tokens="new"` only the rows of `[SEG]` and `[REJ]` of embedding and head are trained.

    Raises:
        ValueError: LoRA finds no layers in the language model.
    """
    parts = parts_of(model)
    if args.train_language_model == "lora":
        in_full, rows = parts.in_full, None
        if args.train_tokens == "new":
            slots = sorted((model.config.seg_token_id, model.config.rej_token_id))
            # peft shares the rows with a tied head if only the embedding is named.
            with_rows = (parts.embedding,) if parts.is_tied else (parts.embedding, parts.head)
            rows = {_short_name(model, part): slots for part in with_rows}
            in_full = MASK_PARTS
        config = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=lora_targets(model, args.lora_target_modules),
            modules_to_save=[_short_name(model, part) for part in in_full],
            trainable_token_indices=rows,
            ensure_weight_tying=parts.is_tied and rows is None,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and _is_in(plain_name(name), parts.without_gradient):
                parameter.requires_grad_(False)
        return model
    trained = parts.in_full + ((parts.decoder,) if args.train_language_model == "full" else ())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_in(name, trained) and not _is_in(name, parts.without_gradient))
    return model


def _short_name(model: nn.Module, part: str) -> str:
    """Return the last part of a name if it means this part alone (peft compares the ends of names), else the whole name."""
    last = part.rpartition(".")[2]
    return last if [name for name, _ in model.named_modules() if name.endswith(last)] == [part] else part


def plain_name(name: str) -> str:
    """Return the name that a parameter has without peft."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"\.(modules_to_save\.\w+|original_module)\.", ".", name)


def merge_lora(model: nn.Module) -> nn.Module:
    """Return the plain model, with LoRA merged into its weights if there is any."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _part_namer(model: nn.Module) -> Callable[[str], str]:
    """Return a function that gives the part that a parameter of this name belongs to, in words for tables."""
    parts = parts_of(plain_model(model))
    known = (*parts.in_full, parts.decoder, *parts.encoders)

    def part_of(name: str) -> str:
        name = plain_name(name)
        if "lora_" in name:
            return "LoRA of the language model"
        part = next((part for part in known if _is_in(name, (part,))), None)
        if part is None:
            part = "sam (encoders)" if name.startswith("sam.") else name
        return part.removeprefix("vlm.")

    return part_of


def parts_table(model: nn.Module) -> str:
    """Return a table with the numbers of trained and frozen parameters of each part of the model."""
    counts: dict[str, list[int]] = {}
    part_of = _part_namer(model)
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:  # peft's frozen copy of a part that is trained in full
            counts.setdefault(part_of(name), [0, 0])[0 if parameter.requires_grad else 1] += parameter.numel()
    lines = [f"{'part':<40}{'trained':>15}{'frozen':>15}"]
    lines += [f"{part:<40}{trained:>15,}{frozen:>15,}" for part, (trained, frozen) in counts.items()]
    totals = [sum(pair[column] for pair in counts.values()) for column in (0, 1)]
    return "\n".join([*lines, f"{'total':<40}{totals[0]:>15,}{totals[1]:>15,}"])


def snapshot(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the sum and the sum of squares of each trained parameter, to find out later which ones have changed."""
    with torch.no_grad():
        return {
            name: (float(parameter.double().sum()), float(parameter.double().square().sum()))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }


def moved_table(model: nn.Module, before: dict) -> str:
    """Return a table with the number of tensors of each trained part that have changed since the snapshot `before`."""
    unchanged, counts = set(unmoved(model, before)), dict[str, list[int]]()
    part_of = _part_namer(model)
    for name in before:
        in_part = counts.setdefault(part_of(name), [0, 0])
        in_part[0] += name not in unchanged
        in_part[1] += 1
    return "\n".join(
        ["trained tensors that moved:", *(f"{part:<40}{moved:>7} of {n}" for part, (moved, n) in counts.items())]
    )


def unmoved(model: nn.Module, before: dict) -> list[str]:
    """Return the names of trained parameters that have not changed since the snapshot `before`."""
    after = snapshot(model)
    return [name for name, sums in before.items() if after.get(name, sums) == sums]


def cast_trained(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert the trained parameters to `dtype`, and leave the frozen ones. Two types in one model need autocast."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model
