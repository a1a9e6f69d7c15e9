"""The treatment of each argument of [`GsvaTrainingArguments`], inherited from transformers or defined here.

Four kinds, for a run that is resumed and for one that begins:

- `KEPT`: honoured, and decides what is learned. A resumed run must have the same value.
- `REPORTED`: honoured, and may change when a run is resumed. The change is printed and kept with the checkpoints.
- `FREE`: honoured, and does not change the weights.
- `REFUSED`: another value than the default is refused at the start, for the reason given.
- `UNUSED`: has no effect, for the reason given.

`python -m trainers.inherited_arguments` prints the table in trainers/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

KEPT = frozenset(
    [
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "optim_args",
        "optim_target_modules",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "bf16",
        "fp16",
        "tf32",
        "neftune_noise_alpha",
        "seed",
        "data_seed",
        "dataloader_drop_last",
    ]
)
REPORTED = frozenset(
    [
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ]
)
FREE = frozenset(
    [
        "output_dir",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_empty_cache_steps",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_on_each_node",
        "logging_nan_inf_filter",
        "include_num_input_tokens_seen",
        "log_level",
        "log_level_replica",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "per_device_eval_batch_size",
        "eval_on_start",
        "save_only_model",
        "save_strategy",
        "save_steps",
        "save_on_each_node",
        "save_total_limit",
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "restore_callback_states_from_checkpoint",
        "full_determinism",
        "use_cpu",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_backend",
        "ddp_timeout",
        "fsdp",
        "fsdp_config",
        "deepspeed",
        "debug",
        "skip_memory_metrics",
        "do_train",
        "do_eval",
        "do_predict",
        "resume_from_checkpoint",
        "local_rank",
    ]
)
_OWN_EVALUATION = "evaluation is the project's, see evaluation/"
_OWN_SAMPLER = "the order of examples is a function of seed and epoch"
REFUSED = {
    "label_smoothing_factor": "the loss would no longer be the model's, and would leave out the mask losses",
    "average_tokens_across_devices": "each process would weight the losses differently",
    "torch_compile": "the shapes of GSVA's batches change with every batch, so it would be compiled again and again",
    "torch_compile_backend": "see torch_compile",
    "torch_compile_mode": "see torch_compile",
    "use_liger_kernel": "Liger has no kernels for GSVA",
    "liger_kernel_config": "Liger has no kernels for GSVA",
    "auto_find_batch_size": "the batch size decides what is learned; give a smaller per_device_train_batch_size with more "
    "gradient_accumulation_steps, which gives the same gradient",
    "enable_jit_checkpoint": "its checkpoints are not written whole or not at all; use save_steps",
    "hub_revision": "uploads go to the main branch",
    "ignore_data_skip": "a resumed run would train on the same examples again",
    "accelerator_config": _OWN_SAMPLER + ", which other ways to divide batches would break",
    "parallelism_config": "the project trains data parallel, with DeepSpeed ZeRO or with FSDP2",
    "dataloader_in_order": "the order of batches would depend on the speed of the workers",
    "remove_unused_columns": "examples become inputs of the model in the collator, which needs all of their columns",
    "train_sampling_strategy": _OWN_SAMPLER,
}
UNUSED = {
    "bf16_full_eval": "evaluation uses the dtype of the model",
    "fp16_full_eval": "evaluation uses the dtype of the model",
    "use_cache": "training never uses a cache",
    "prediction_loss_only": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "label_names": _OWN_EVALUATION,
    "hub_strategy": "the finished model is pushed once, at the end",
    "hub_always_push": "the finished model is pushed once, at the end",
    "length_column_name": _OWN_SAMPLER,
}


def default_of(name: str) -> Any:
    """Return the default of an inherited argument."""
    (argument,) = (field for field in fields(TrainingArguments) if field.name == name)
    return argument.default if argument.default_factory is MISSING else argument.default_factory()


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: the value of an enum, a list instead of a tuple, else its text."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def refuse_unsupported(values: Mapping[str, Any]) -> None:
    """Raise ValueError if an argument has a value that the project's training cannot honour.

    Args:
        values: The arguments as they were given, before transformers changes them.
    """
    for name, reason in REFUSED.items():
        default = False if name == "remove_unused_columns" else default_of(name)
        value = None if values[name] == AcceleratorConfig() else values[name]  # transformers sets it in a copy
        if plain(value) not in (plain(default), None):
            raise ValueError(f"{name}={plain(value)!r} is not supported: {reason}. Leave it out.")


def table() -> str:
    """Return the Markdown table of trainers/README.md."""
    lines = ["| argument | treatment |", "| --- | --- |"]
    for names, treatment in (
        (KEPT, "honoured; a resumed run must have the same"),
        (REPORTED, "honoured; may change when a run is resumed, which is printed"),
        (FREE, "honoured; does not change the weights"),
    ):
        lines.append(f"| {', '.join(f'`{name}`' for name in sorted(names))} | {treatment} |")
    lines += [f"| `{name}` | refused: {reason} |" for name, reason in REFUSED.items()]
    lines += [f"| `{name}` | no effect: {reason} |" for name, reason in UNUSED.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
