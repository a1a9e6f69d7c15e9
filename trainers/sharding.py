"""FSDP and ZeRO-3: refuse what shards cannot do, gather the weights, make models of consolidated checkpoints."""

from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from safetensors.torch import load_file

from modeling_gsva import GsvaProcessor

from .arguments import GsvaTrainingArguments, ModelArguments
from .freezing import merged, prepare_for_training
from .loading import load_model
from .publishing import save, save_adapter
from .trainer import GsvaTrainer


def shares_weights(args: GsvaTrainingArguments) -> bool:
    """Whether training cuts the weights themselves in shares, one for each process: FSDP, or DeepSpeed's ZeRO-3."""
    if args.deepspeed_plugin is not None:
        return args.deepspeed_plugin.zero_stage == 3
    return args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


def refuse_what_shards_cannot(model_args: ModelArguments, args: GsvaTrainingArguments) -> None:
    """
    Raises:
        ValueError: something is asked for that needs each process to hold the whole weights, and they are to be shared out.
    """
    if not (args.do_train and shares_weights(args)):
        return
    evaluated = args.eval_strategy.value if args.eval_strategy != "no" else None
    for name, value, instead in (
        ("feature_cache", args.feature_cache, "train without it"),
        ("quantization", model_args.quantization, "train without it, or data parallel (configs/accelerate/ddp.yaml)"),
        (
            "eval_strategy",
            evaluated,
            "give --eval_strategy no; --do_eval evaluates whole weights before and after training",
        ),
    ):
        if value:
            raise ValueError(
                f"{name}={value} is not possible where weights are shared out (FSDP, DeepSpeed ZeRO-3): {instead}."
            )


def gathered(trainer: GsvaTrainer, args: ModelArguments) -> torch.nn.Module | None:
    """
    On the main process, in the processor's memory: the model as it was prepared for training, with the weights that all
    processes have trained and hold a share of. None on the others, which must call this, too.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return with_trained(load_model(args, "cpu")[1], args, weights) if PartialState().is_main_process else None


def with_trained(model: torch.nn.Module, args: ModelArguments, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """
    The plain model, prepared for training, with trained weights in it. They are named as parameters are or as in an adapter's
    file; frozen ones may be missing.

    Raises:
        ValueError: trained weights are missing, or some belong to another model.
    """
    model = prepare_for_training(model, args)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_adapter = {name.replace(".modules_to_save", "").replace(".default", ""): name for name in model.state_dict()}
    weights = {in_adapter.get(name, name): tensor for name, tensor in weights.items()}
    for name in trained.keys() & weights.keys():
        trained[name].data = trained[name].data.to(weights[name].dtype)  # float32 where the frozen rest is not
    keys = model.load_state_dict(weights, strict=False)
    if wrong := sorted(trained.keys() & set(keys.missing_keys)) + sorted(keys.unexpected_keys):
        raise ValueError(
            f"{len(wrong)} trained weights are missing or not this model's, among them {', '.join(wrong[:4])}; "
            "give --model, --train_language_model and --lora_r as they were in training."
        )
    return model


def consolidate(source: Path, model_args: ModelArguments, output_dir: Path) -> tuple[GsvaProcessor, torch.nn.Module]:
    """
    Processor and model with the trained weights of a file, or a folder of them, that accelerate's or DeepSpeed's tool has
    made of a checkpoint. They are saved in `output_dir` as at the end of training.

    Raises:
        ValueError: they are not there, or do not fit.
    """
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors")) or sorted(source.glob("*.bin"))
    if not files:
        raise ValueError(
            f"consolidated={str(source)!r} is no file, and no folder with .safetensors or .bin files in it."
        )
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    processor, model = load_model(model_args, "cpu")
    dtype = model.dtype
    model = with_trained(model, model_args, weights)
    if PartialState().is_main_process and isinstance(model, PeftModel):
        save_adapter(model, output_dir)
    model = merged(model).to(dtype)
    if PartialState().is_main_process:
        save(processor, model, output_dir)
        print(f"saved {output_dir}", flush=True)
    return processor, model.to(PartialState().device)
