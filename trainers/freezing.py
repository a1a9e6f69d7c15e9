"""Decide which parts of GSVA are trained: frozen, with LoRA, or in full."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from .arguments import ModelArguments

# The language model's own projections: a plain ["q_proj", "v_proj"] would also wrap CLIP's and SAM's (the original
# excludes them by name as well, main.py: find_linear_layers).
LORA_TARGETS = r".*language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
# Trained in full beside LoRA, as in the original; text_hidden_fcs is called mask_projector here.
EMBEDDING_AND_HEAD = ("model.language_model.embed_tokens", "lm_head")
FULLY_TRAINED = (*EMBEDDING_AND_HEAD, "sam.mask_decoder", "mask_projector")
# Parts of SAM's decoder that a single mask (multimask_output=False) does not depend on, so they would get no gradient.
WITHOUT_GRADIENT = ("sam.mask_decoder.iou_prediction_head",) + tuple(
    f"sam.mask_decoder.output_hypernetworks_mlps.{number}" for number in (1, 2, 3)
)


def _is_in(name: str, parts: tuple[str, ...]) -> bool:
    name = name.removeprefix("vlm.")  # the name in saved directories
    return any(name == part or name.startswith(part + ".") for part in parts)


def prepare_for_training(model: nn.Module, args: ModelArguments) -> nn.Module:
    """
    Return the model with the parts frozen that the paper freezes: vision tower, projector and SAM's encoders.

    With `train_language_model="lora"` the result is a [`PeftModel`] around the same model, whose adapter holds LoRA and
    the fully trained parts. "full" trains the whole language model, "frozen" only its embedding and head. With
    `train_tokens="new"` only the rows of `[SEG]` and `[REJ]` of embedding and head are trained.
    """
    if args.train_language_model == "lora":
        fully_trained, rows = list(FULLY_TRAINED), None
        if args.train_tokens == "new":
            slots = sorted((model.config.seg_token_id, model.config.rej_token_id))
            is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            # peft shares the rows with a tied head if only the embedding is named.
            rows = {part.rpartition(".")[2]: slots for part in EMBEDDING_AND_HEAD[: 1 if is_tied else 2]}
            fully_trained = [part for part in FULLY_TRAINED if part not in EMBEDDING_AND_HEAD]
        config = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=LORA_TARGETS,
            modules_to_save=[part.rpartition(".")[2] for part in fully_trained],
            trainable_token_indices=rows,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and any(
                part.partition("mask_decoder.")[2] in name for part in WITHOUT_GRADIENT
            ):
                parameter.requires_grad_(False)
        return model
    trained = FULLY_TRAINED + (("model.language_model",) if args.train_language_model == "full" else ())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_in(name, trained) and not _is_in(name, WITHOUT_GRADIENT))
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Return the plain model, with LoRA merged into its weights if there is any."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _part_of(name: str) -> str:
    name = name.removeprefix("base_model.model.").removeprefix("vlm.").replace(".modules_to_save.default", "")
    for part in ("lora_", *FULLY_TRAINED, "model.language_model", "model.vision_tower", "model.multi_modal_projector"):
        if part == "lora_" and part in name:
            return "LoRA of the language model"
        if name.startswith(part):
            return part
    return "sam (encoders)" if name.startswith("sam.") else name.partition(".")[0]


def parts_table(model: nn.Module) -> str:
    """Return a table with the numbers of trained and frozen parameters of each part of the model."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:  # peft's frozen copy of a part that is trained in full
            counts.setdefault(_part_of(name), [0, 0])[0 if parameter.requires_grad else 1] += parameter.numel()
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
    for name in before:
        of_part = counts.setdefault(_part_of(name), [0, 0])
        of_part[0] += name not in unchanged
        of_part[1] += 1
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
