"""Train with sharded weights (FSDP, ZeRO-3): refuse options that cannot work, gather the weights, load consolidated ones."""

from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from transformers import IntervalStrategy

from conversion.reading import read_state_dict
from modeling_gsva import GsvaProcessor

from .arguments import GsvaTrainingArguments, ModelArguments
from .freezing import merge_lora, plain_model, prepare_for_training
from .loading import load_model
from .publishing import save, save_adapter
from .trainer import GsvaTrainer


def shards_weights(args: GsvaTrainingArguments) -> bool:
    """Return whether each process holds only a shard of the weights in training: FSDP, or DeepSpeed's ZeRO-3."""
    if args.deepspeed_plugin is not None:
        return args.deepspeed_plugin.zero_stage == 3
    return args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


def strategy_of(args: GsvaTrainingArguments) -> str:
    """Return how training divides the memory among processes. Checkpoints of one strategy do not fit another one."""
    if args.deepspeed_plugin is not None:
        return f"DeepSpeed ZeRO-{args.deepspeed_plugin.zero_stage}"
    return "FSDP" if shards_weights(args) else "data parallel"


def refuse_what_shards_cannot(model_args: ModelArguments, args: GsvaTrainingArguments) -> None:
    """
    Refuse options that need the whole weights in each process if training shards them.

    Raises:
        ValueError: Such an option is given.
    """
    if not (args.do_train and shards_weights(args)):
        return
    eval_strategy = IntervalStrategy(args.eval_strategy).value if args.eval_strategy != "no" else None
    for name, value, instead in (
        ("feature_cache", args.feature_cache, "train without it"),
        # peft's rows read the embedding without calling it, so that its shards would not be gathered.
        (
            "train_tokens",
            model_args.train_tokens if model_args.train_tokens == "new" else None,
            "give --train_tokens all, or train with DeepSpeed ZeRO-2 (configs/accelerate/zero2.yaml)",
        ),
        ("quantization", model_args.quantization, "train without it, or data parallel (configs/accelerate/ddp.yaml)"),
        (
            "eval_strategy",
            eval_strategy,
            "give --eval_strategy no; --do_eval evaluates whole weights before and after training",
        ),
    ):
        if value:
            raise ValueError(
                f"{name}={value} is not possible where weights are sharded (FSDP, DeepSpeed ZeRO-3): {instead}."
            )


def untie_weights(model: torch.nn.Module) -> dict[str, str]:
    """
    Give each tied frozen parameter a separate tensor, in place, and return {its name: the name it was tied to} for `tie_again`.

    DeepSpeed's `zero_to_fp32.py --safe_serialization` fails for tied parameters (SAM's positional embeddings). Trained ones
    stay tied: apart they would learn apart.
    """
    names: dict[int, str] = {}
    untied = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if (first := names.setdefault(id(parameter), name)) == name or parameter.requires_grad:
            continue
        module, _, attribute = name.rpartition(".")
        copy = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
        setattr(model.get_submodule(module), attribute, copy)
        untied[name] = first
    return untied


def tie_again(model: torch.nn.Module, untied: dict[str, str]) -> None:
    """
    Undo `untie_weights`, in place.

    `tie_weights()` of transformers goes by names that peft has changed until its parts are merged, and peft gives up a tie that it
    does not find when it merges.
    """
    for name, first in untied.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, model.get_parameter(first))


def prepare_for_deepspeed(model: torch.nn.Module, args: GsvaTrainingArguments) -> dict[str, str]:
    """Change a model in place so that DeepSpeed can train it, if DeepSpeed is used; return the ties that `tie_again` takes."""
    if args.deepspeed_plugin is None:
        return {}
    untied = untie_weights(model)
    if args.deepspeed_plugin.zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_module

        # The mask decoder runs once for each piece of the slots, and processes have different numbers of slots. As a leaf
        # its weights are gathered once per call, as all processes do, and not once per piece.
        decoder = plain_model(model).sam.mask_decoder
        kind = type(getattr(decoder, "original_module", decoder))  # of peft's two copies
        for module in model.modules():
            if isinstance(module, kind):
                set_z3_leaf_module(module, True)
    return untied


def gather_trained_model(trainer: GsvaTrainer, args: ModelArguments) -> torch.nn.Module | None:
    """
    Gather the sharded weights into one model in CPU memory on the main process. It is prepared for training as before.

    Every process must call this; the others get None.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return load_trained_weights(load_model(args, "cpu")[1], args, weights) if PartialState().is_main_process else None


def load_trained_weights(
    model: torch.nn.Module, args: ModelArguments, weights: dict[str, torch.Tensor]
) -> torch.nn.Module:
    """
    Prepare the plain model for training and load trained weights into it.

    The weights are named like parameters or as in an adapter's file. Frozen ones may be missing.

    Raises:
        ValueError: Trained weights are missing, or some belong to another model.
    """
    model = prepare_for_training(model, args)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_adapter = {name.replace(".modules_to_save", "").replace(".default", ""): name for name in model.state_dict()}
    weights = {in_adapter.get(name, name): tensor for name, tensor in weights.items()}
    for name in trained.keys() & weights.keys():
        trained[name].data = trained[name].data.to(weights[name].dtype)  # float32 where the frozen rest is not
    keys = model.load_state_dict(weights, strict=False)
    if misfits := sorted(trained.keys() & set(keys.missing_keys)) + sorted(keys.unexpected_keys):
        raise ValueError(
            f"{len(misfits)} trained weights are missing or not this model's, among them {', '.join(misfits[:4])}; "
            "give --model, --train_language_model, --train_tokens and --lora_r as they were in training."
        )
    return model


def consolidate(source: Path, model_args: ModelArguments, output_dir: Path) -> tuple[GsvaProcessor, torch.nn.Module]:
    """
    Return processor and model with the trained weights that accelerate's or DeepSpeed's tool has made of a checkpoint.

    Both are saved in `output_dir` as at the end of training.

    Args:
        source: The tool's output, a file or a folder of files.

    Raises:
        ValueError: There are no weights at `source`, they have a hole or numbers that are not finite, or they do not fit the
            model.
    """
    if not (source.is_file() or [*source.glob("*.safetensors"), *source.glob("*.bin")]):
        raise ValueError(
            f"consolidated={str(source)!r} is no file, and no folder with .safetensors or .bin files in it."
        )
    weights = read_state_dict(source)
    processor, model = load_model(model_args, "cpu")
    dtype = model.dtype
    model = load_trained_weights(model, model_args, weights)
    if PartialState().is_main_process and isinstance(model, PeftModel):
        save_adapter(model, output_dir)
    model = merge_lora(model).to(dtype)
    if PartialState().is_main_process:
        save(processor, model, output_dir)
        print(f"saved {output_dir}", flush=True)
    return processor, model.to(PartialState().device)
