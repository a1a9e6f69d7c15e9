"""Make the start of a GSVA from any vision-language model of transformers and any mask model of the SAM family."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_scripts.files import new_folder

from .bases import check_filled, projector_weights
from .configs import empty_model, naming, sam_config
from .directories import TRY_INSTEAD, ModelDirectory, find_base, find_mask_model, require_weights
from .hub import create_repository, push
from .keys import PREFIXES
from .new_rows import SlotTokens, with_new_rows
from .reading import SAFETENSORS_DTYPES, CheckpointSource, LazyTensor, is_finite, listed
from .writing import (
    START_CARD,
    check_output,
    check_room,
    in_dtype,
    naming_output,
    without_progress_bar,
    write_card,
    write_directory,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor


@dataclass
class MaskModel:
    """A mask model before its weights are read.

    Attributes:
        name, licence: For the card.
        config: Its configuration, of a type that GSVA can prompt.
        read: Return `{name in its model: tensor}`; of a .pth file with tensors that are not read yet.
        left_behind: Names of tensors that are not used, known after `read`.
    """

    name: str
    licence: str | None
    config: PreTrainedConfig
    read: Callable[[], dict[str, torch.Tensor | LazyTensor]]
    left_behind: list[str] = field(default_factory=list)


@dataclass
class Start:
    """A GSVA before training.

    Attributes:
        model: Without memory for its weights.
        tensors: Its weights under the names that they have in a directory.
        left_behind: Names of tensors of base and mask model that their classes do not use.
        old_rows: Number of rows of the base's embedding.
    """

    model: GsvaForConditionalGeneration
    tensors: dict[str, LazyTensor]
    left_behind: list[str]
    old_rows: int


def convert_base(args: argparse.Namespace) -> dict:
    """Make the start of a GSVA from `--base` and `--sam`, and return the summary that is printed.

    Args:
        args: The parsed command line of `convert_checkpoint.py`.

    Raises:
        ValueError: A model that cannot be a part of a GSVA; the message says what to give.
        OSError: A file cannot be read, or the output cannot be written or exists already.
        ImportError: The base's processor needs a library that is not installed.
    """
    output = Path(args.output)
    check_output(output)
    directory, config = find_base(args.base)
    check_contract(directory, config)
    mask_model = open_mask_model(args.sam)
    processor, tokens = make_processor(directory, config, mask_model.config)
    require_weights(directory)
    if args.push_to_hub:
        create_repository(args.push_to_hub)  # now: without the rights to it, all the work would be for nothing
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    start = build_start(directory, config, mask_model, tokens, args.seed, dtype)
    sizes = [
        torch.Size(tensor.shape).numel() * (tensor.dtype or torch.float32).itemsize
        for tensor in start.tensors.values()
    ]
    check_room(output, sum(sizes))
    with naming_output(output), new_folder(output) as folder:
        written = write_directory(folder, start.model, processor, start.tensors, None, args.max_shard_size)
        summary = summarize(directory, mask_model, start, tokens, written)
        write_card(folder, START_CARD, args.push_to_hub or output.name, summary, **_sources(directory, mask_model))
    if args.push_to_hub:
        push(args.push_to_hub, output)
        summary["pushed to"] = args.push_to_hub
    return summary


def open_mask_model(name: str) -> MaskModel:
    """Return the mask model behind `--sam`: a .pth file of segment-anything, or a directory of transformers.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Another model. The message says what to give.
    """
    path = Path(name)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.pth"))):
        return open_segment_anything(path)
    if path.suffix in (".pth", ".pt", ".safetensors", ".bin") and not path.exists():
        raise FileNotFoundError(f"--sam {name} does not exist.")
    directory, config = find_mask_model(name)
    require_weights(directory)
    result = MaskModel(directory.public_name, directory.licence, config, dict)

    def read() -> dict[str, torch.Tensor | LazyTensor]:
        from transformers import AutoModel

        model, result.left_behind = load_whole(AutoModel, directory, config)
        return dict(model.state_dict(keep_vars=True))

    result.read = read
    return result


def open_segment_anything(path: Path) -> MaskModel:
    """Return SAM of a .pth file, whose tensors are read one at a time.

    Raises:
        ValueError: Another model, or a file that is not whole.
    """
    from transformers import SamModel

    source = CheckpointSource("--sam", path, PREFIXES["--sam"])
    if source.lora:
        raise ValueError(f"--sam {path} holds LoRA weights, which are not merged: pass SAM itself.")
    config = sam_config({name: tensor.shape for name, tensor in source.tensors.items()})
    with torch.device("meta"):
        model = SamModel(config)
    expected = {f"sam.{name}": tuple(value.shape) for name, value in model.state_dict().items()
                if name not in model.all_tied_weights_keys}  # fmt: skip
    check_filled(expected, source.tensors, [f"--sam {path}"])
    tensors: dict[str, torch.Tensor | LazyTensor] = {
        name.removeprefix("sam."): tensor for name, tensor in source.tensors.items()
    }
    return MaskModel(path.name, None, config, lambda: tensors, list(source.dropped))


def check_contract(directory: ModelDirectory, config: PreTrainedConfig) -> None:
    """Raise ValueError unless the base has what GSVA asks of it, see `LanguageAdapter`. No weight is read."""
    from transformers.initialization import no_init_weights

    from modeling_gsva.language_gsva import adapter_for, build_vlm

    with naming(directory.folder / "config.json"), torch.device("meta"), no_init_weights():
        model = build_vlm(config)
    try:
        adapter_for(model)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    if model.get_output_embeddings() is None:
        raise ValueError(f"{directory}: {type(model).__name__} has no language head (lm_head). {TRY_INSTEAD}")


def make_processor(
    directory: ModelDirectory, config: PreTrainedConfig, mask_config: PreTrainedConfig
) -> tuple[GsvaProcessor, SlotTokens]:
    """Return the base's own processor with GSVA's tokens and the mask model's images, and those tokens.

    Raises:
        ImportError: The base's processor needs a library that is not installed. The message names the extra.
        ValueError: There is no processor for images, no chat template, or `[SEG]` means something else.
    """
    from modeling_gsva import GsvaProcessor
    from modeling_gsva.base_processing_gsva import load_base_processor
    from modeling_gsva.language_gsva import PREFIX_LANGUAGE_MODELS
    from modeling_gsva.prompts_gsva import BARE_TEMPLATE

    try:
        own = load_base_processor(str(directory.folder), trust_remote_code=False)
        vocabulary = own.tokenizer.get_vocab()
        template = own.chat_template or getattr(own.tokenizer, "chat_template", None)
        if template is None and config.model_type in PREFIX_LANGUAGE_MODELS:
            template = BARE_TEMPLATE  # their base models are asked without one
        processor = GsvaProcessor.from_base(own, mask_config, chat_template=template)
    except ImportError:
        raise
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{directory} has no processor that GSVA can use: {error}") from error
    tokens = SlotTokens.of(processor.tokenizer, vocabulary)
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"{directory}: its processor writes {processor.image_token_id} for an image, its model reads "
            f"{config.image_token_id} (image_token_id of config.json). The files are of two models: download the directory again."
        )
    taken = {name: value for name, value in config.to_dict().items() if name.endswith(("token_id", "token_index"))}
    if wrong := [name for name, value in taken.items() if value in tokens.new]:
        raise ValueError(
            f"{directory}: [SEG] and [REJ] get the ids {tokens.seg} and {tokens.rej}, and {wrong[0]} of config.json is one of "
            "them: the tokenizer lacks a token of the model. Its files are of two models: download the directory again."
        )
    return processor, tokens


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers' reports of loading to errors, since the caller checks them, and its bar to terminals."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with nullcontext() if sys.stderr.isatty() else without_progress_bar():
            yield
    finally:
        logging.set_verbosity(level)


def load_whole(
    auto_class: Any, directory: ModelDirectory, config: PreTrainedConfig
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model of transformers in its own precision, and return it with the names of tensors that its class ignores.

    The weights are mapped from their files, so that reading them takes no memory of its own.

    Raises:
        ValueError: Weights are missing, have another shape, or cannot be read. The message names them.
    """
    try:
        with _quietly():
            model, report = auto_class.from_pretrained(
                directory.folder, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )  # fmt: skip
    except (ValueError, OSError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"The weights of {directory} cannot be read ({str(error).strip()}); download them again."
        ) from error
    wrong = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    wrong += [
        f"{name} is {tuple(saved)}, config.json says {tuple(shape)}"
        for name, saved, shape in report["mismatched_keys"]
    ]
    wrong += [f"{name} cannot be converted" for name in sorted(report.get("conversion_errors") or ())]
    if wrong:
        raise ValueError(
            f"The weights of {directory} are not those of {type(model).__name__} that its config.json describes: "
            f"{listed(wrong, 4)}. The directory is not whole, or its files are of two models: download it again."
        )
    types = {parameter.dtype for parameter in model.parameters()} - set(SAFETENSORS_DTYPES.values())
    if types:
        raise ValueError(
            f"{directory} has weights of type {listed(types)}: it is quantized. Pass the model before it was quantized."
        )
    return model.eval(), sorted(report["unexpected_keys"])


def build_start(
    directory: ModelDirectory,
    config: PreTrainedConfig,
    mask_model: MaskModel,
    tokens: SlotTokens,
    seed: int,
    dtype: torch.dtype | None,
) -> Start:
    """Put base, mask model and new weights together.

    Args:
        dtype: Of the result; None keeps that of the base.

    Raises:
        ValueError: Weights are missing, unreadable, not finite, or beyond the range of `dtype`.
    """
    from transformers import AutoModelForImageTextToText

    from modeling_gsva import GsvaConfig

    base, left_behind = load_whole(AutoModelForImageTextToText, directory, config)
    table, head = base.get_input_embeddings().weight, base.get_output_embeddings()
    rows = max(len(table), tokens.count)
    vlm_config = grown_config(base, rows)
    with naming(directory.folder / "config.json"):
        gsva_config = GsvaConfig(
            vlm_config=vlm_config, sam_config=mask_model.config, seg_token_id=tokens.seg, rej_token_id=tokens.rej,
            dtype=dtype or base.dtype,
        )  # fmt: skip
    model, _ = empty_model(gsva_config, directory.folder / "config.json")
    model.to(dtype or base.dtype)
    model.generation_config = base.generation_config
    prompt_size = mask_model.config.prompt_encoder_config.hidden_size
    tables = {
        id(part): partial(with_new_rows, part, rows, tokens, seed * 10 + number)
        for number, part in ((1, head.weight), (1, getattr(head, "bias", None)), (0, table))
        if part is not None
    }
    state: dict[str, torch.Tensor | LazyTensor] = {
        **{f"vlm.{name}": tensor for name, tensor in base.state_dict(keep_vars=True).items()},
        **{f"sam.{name}": tensor for name, tensor in mask_model.read().items()},
        **projector_weights(gsva_config.text_config.hidden_size, prompt_size, seed),
    }
    tensors = {
        name: _written(name, tables[id(part)]() if id(part) in tables else part, dtype, base.dtype)
        for name, part in saved_names(model, state).items()
    }
    return Start(model, tensors, [*left_behind, *mask_model.left_behind], len(table))


def grown_config(base: PreTrainedModel, rows: int) -> PreTrainedConfig:
    """Return the configuration of a base with `rows` rows for tokens, without memory for such a model.

    Tying is that of the weights: where a directory holds another language head than its configuration says, transformers
    keeps both, and the configuration is corrected.
    """
    from transformers.initialization import no_init_weights

    from modeling_gsva.language_gsva import build_vlm

    config = base.config
    is_tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    if not is_tied:
        config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
    with torch.device("meta"), no_init_weights():
        empty = build_vlm(config)
        empty.resize_token_embeddings(rows, mean_resizing=False)
    return empty.config


def saved_names(
    model: GsvaForConditionalGeneration, state: dict[str, torch.Tensor | LazyTensor]
) -> dict[str, torch.Tensor | LazyTensor]:
    """Return weights under the names that `save_pretrained` gives them, without those that are tied to others.

    Raises:
        ValueError: A weight of the model is not among them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(model.all_tied_weights_keys)
    expected = [name for name in model.state_dict() if name not in tied]
    if missing := [name for name in expected if name not in state]:
        raise ValueError(f"Nothing gives the weights {listed(missing, 4)} of the model.")
    unread: dict[int, LazyTensor] = {}
    for name in expected:
        if isinstance(part := state[name], LazyTensor):  # transformers takes tensors: give it one without memory
            state[name] = torch.empty(part.shape, dtype=part.dtype, device="meta")
            unread[id(state[name])] = part
    reverted = revert_weight_conversion(model, {name: state[name] for name in expected})
    return {name: unread.get(id(tensor), tensor) for name, tensor in reverted.items()}


def _written(
    name: str, part: torch.Tensor | LazyTensor, dtype: torch.dtype | None, base_dtype: torch.dtype
) -> LazyTensor:
    """Return a weight as it is written: in `dtype`; without one, of the base as it is and others in the base's precision."""
    is_buffer = isinstance(part, torch.Tensor) and not isinstance(
        part, torch.nn.Parameter
    )  # which may hold infinities
    lazy = part if isinstance(part, LazyTensor) else LazyTensor.of(part)
    if lazy.dtype is None or not lazy.dtype.is_floating_point:
        return lazy
    is_new = name.startswith(("sam.", "mask_projector."))
    target = dtype or (base_dtype if is_new else lazy.dtype)

    def read() -> torch.Tensor:
        tensor = lazy.read()
        if not is_buffer and not is_finite(tensor):
            raise ValueError(
                f"Numbers of {name} are not finite (NaN or infinite): its file is damaged, download it again."
            )
        return in_dtype(tensor, target, name)

    return LazyTensor(lazy.shape, target, read)


def _sources(directory: ModelDirectory, mask_model: MaskModel) -> dict[str, Any]:
    """Return what the card's metadata says about base and mask model."""
    names = [directory.public_name, mask_model.name]
    licences = {directory.licence, mask_model.licence}
    return {
        "base_models": [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()],
        "licence": licences.pop() if len(licences) == 1 else None,
    }


def summarize(
    directory: ModelDirectory, mask_model: MaskModel, start: Start, tokens: SlotTokens, written: int
) -> dict[str, Any]:
    """Return the facts of a start, for the console and the card.

    Args:
        written: Bytes of the weights.
    """

    def count(*prefixes: str) -> int:
        chosen = (tensor for name, tensor in start.tensors.items() if name.startswith(prefixes))
        return sum(torch.Size(tensor.shape).numel() for tensor in chosen)

    total, masks, projector = count(""), count("sam."), count("mask_projector.")
    config, rows = start.model.config, start.model.config.text_config.vocab_size
    added = [
        f"{name} {token}" for name, token in (("[SEG]", tokens.seg), ("[REJ]", tokens.rej)) if token in tokens.new
    ]
    return {
        "base": f"{directory.public_name} ({config.vlm_config.model_type}), licence {directory.licence or 'not stated'}",
        "mask model": f"{mask_model.name} ({config.sam_config.model_type}), licence {mask_model.licence or 'not stated'}",
        "parameters": total,
        "of these": f"base {total - masks - projector}, mask model {masks}, mask projector {projector} (drawn at random)",
        "bytes": written,
        "dtype": str(config.dtype).removeprefix("torch."),
        "tokens added": ", ".join(added) or "none, the base has them",
        "rows of the embedding": f"{start.old_rows} → {rows}" if rows > start.old_rows else f"{rows}, as in the base",
        **({"left behind": listed(start.left_behind, 4)} if start.left_behind else {}),
    }
