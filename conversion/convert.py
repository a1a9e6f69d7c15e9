"""Turn a checkpoint of the original, or only the bases it starts from, into a directory that the Auto classes load."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_scripts.files import new_folder

from .any_base import open_mask_model
from .bases import (
    NO_CHECKPOINT,
    PARTS,
    TOKEN_ROWS,
    WHOLE,
    add_delta,
    check_filled,
    check_parts,
    form_of,
    new_weights,
    part_of,
    refuse_delta,
    refuse_holes,
    refuse_other_base,
)
from .configs import clip_config, empty_model, image_processor, llama_config, naming, sam_config, vision_features
from .hub import create_repository, is_hub_id, local_directory, push
from .keys import PREFIXES, to_original
from .reading import CheckpointSource, LazyTensor
from .tokenizer import IMAGE_TOKEN, ORDINARY_TOKENS, SPECIAL_TOKENS, base_added_tokens, build_llama_tokenizer
from .writing import (
    ADAPTER,
    CARD,
    check_output,
    check_room,
    merge_lora,
    naming_output,
    write_adapter,
    write_card,
    write_directory,
)

if TYPE_CHECKING:
    from transformers import TokenizersBackend

    from modeling_gsva import GsvaConfig, GsvaProcessor


@dataclass
class Sources:
    """The sources of tensors: the checkpoint first, then the bases. The first source that has a tensor supplies it."""

    checkpoint: CheckpointSource
    bases: list[CheckpointSource]
    language_dir: Path  # has LLaVA's config.json and tokenizer.model
    clip_dir: Path | None

    @property
    def is_start(self) -> bool:
        """Return True if there is no checkpoint, so that the result is the model that training starts from."""
        return self.checkpoint.path is None

    def all(self) -> list[CheckpointSource]:
        return [self.checkpoint, *self.bases]

    def tensors(self) -> dict[str, LazyTensor]:
        """Return `{our name: tensor}` with each tensor from the first source that has it."""
        tensors: dict[str, LazyTensor] = {}
        for source in reversed(self.all()):
            tensors.update(source.tensors)
        return tensors


def convert(args: argparse.Namespace) -> dict:
    """Convert a checkpoint of the original, or only its bases, and return the summary that is printed.

    Args:
        args: The parsed command line of `convert_checkpoint.py`.

    Raises:
        ValueError: The tensors and configurations given do not make up a model; the message names them.
        OSError: A file cannot be read, or the output cannot be written or exists already.
        ImportError: sentencepiece, or peft for `--keep_lora`, is not installed.
    """
    output = Path(args.output)
    check_output(output)
    sources = gather_sources(args)
    tensors = sources.tensors()
    check_parts(tensors, sources.checkpoint)
    tokenizer, config, tensors = describe_model(args, sources, tensors)
    model, expected = empty_model(config, _described_by(sources))
    check_tensors(expected, tensors, sources)

    lora = sources.checkpoint.lora
    keeps_lora = bool(args.keep_lora and lora)
    tensors = {name: tensors[name] for name in expected}
    origins = {name: next(s.option for s in sources.all() if tensors[name] is s.tensors.get(name)) for name in tensors}
    if not args.keep_lora:
        tensors |= {name: merge_lora(tensors[name], pair, args.lora_alpha) for name, pair in lora.items()}
    processor = make_processor(args, config, tokenizer, sources.clip_dir)
    dtype = config.dtype  # save_pretrained turns it into a string
    check_room(output, sum(torch.Size(tensor.shape).numel() for tensor in tensors.values()) * dtype.itemsize)
    if args.push_to_hub:
        create_repository(args.push_to_hub)  # now: without the rights to it, all the work would be for nothing
    with naming_output(output), new_folder(output) as folder:
        written = write_directory(folder, model.to(dtype), processor, tensors, dtype, args.max_shard_size)
        if keeps_lora:
            write_adapter(folder / ADAPTER, lora, args.lora_alpha, dtype)
        summary = summarize(args, sources, tensors, origins, dtype, written)
        name = args.push_to_hub or output.name
        write_card(folder, CARD, name, summary, is_start=sources.is_start, has_adapter=keeps_lora)
    if not any(name.startswith("model.multi_modal_projector.") for name in sources.checkpoint.tensors):
        # The original throws LLaVA's projector away here and draws a random one (a bug: only --weight brings it back).
        summary["note"] = "the projector comes from --llava; the original would draw a random one"
    if args.push_to_hub:
        push(args.push_to_hub, output)
        summary["pushed to"] = args.push_to_hub
    return summary


def gather_sources(args: argparse.Namespace) -> Sources:
    """Open the checkpoint and the bases that the command line names; no tensor is read except to recognise a delta.

    Raises:
        ValueError: Options that do not go together, or files that do not hold a checkpoint.
        FileNotFoundError: A path does not exist, or LLaVA's directory is not given.
    """
    llava_dir, clip_dir = given_directory(args.llava, "--llava"), given_directory(args.clip, "--clip")
    llama_dir, delta_dir = given_directory(args.llama, "--llama"), given_directory(args.llava_delta, "--llava_delta")
    if (llama_dir is None) != (delta_dir is None) or (llava_dir and delta_dir):
        raise ValueError("Pass either --llava, or --llama together with --llava_delta.")

    is_start = args.checkpoint is None
    if is_start:
        checkpoint = CheckpointSource("drawn at random", None)
    else:
        checkpoint = CheckpointSource("--checkpoint", Path(args.checkpoint))
    bases = []
    if clip_dir:
        bases.append(CheckpointSource("--clip", clip_dir, PREFIXES["--clip"], required=is_start))
    if args.sam:
        bases.append(open_sam(args.sam))
    if llava_dir:
        bases.append(CheckpointSource("--llava", llava_dir, required=is_start))
        refuse_delta(bases[-1])
    elif llama_dir and delta_dir:
        bases.append(add_delta(CheckpointSource("--llama", llama_dir), CheckpointSource("--llava_delta", delta_dir)))
    language_dir = llava_dir or delta_dir
    if language_dir is None:
        check_parts(Sources(checkpoint, bases, Path(), clip_dir).tensors(), checkpoint)  # names what else is missing
        raise ValueError(
            "--llava is missing: its config.json and tokenizer.model are needed (not its weights, which the checkpoint has)."
        )
    return Sources(checkpoint, bases, language_dir, clip_dir)


def open_sam(name: str) -> CheckpointSource:
    """Return SAM of a .pth file, or of a directory or Hub repository in the format of transformers.

    Raises:
        ValueError: Another model. The message says what to give.
        FileNotFoundError: There is none.
    """
    path = Path(name)
    if not is_hub_id(name) and not (path / "config.json").is_file():
        return CheckpointSource("--sam", path, PREFIXES["--sam"])
    from transformers import SamModel

    mask_model = open_mask_model(name)
    if mask_model.config.model_type != "sam":
        raise ValueError(
            f"--sam {name} is of type {mask_model.config.model_type}, and LLaVA v1 takes SAM itself: give its .pth file, or "
            "facebook/sam-vit-huge. Other mask models go with a base of today: --base llava-hf/llava-1.5-7b-hf in place of --llava."
        )
    source = CheckpointSource("--sam", None)
    source.path, tied = path, SamModel._tied_weights_keys
    source.tensors = {
        f"sam.{part}": LazyTensor.of(tensor) for part, tensor in mask_model.read().items() if part not in tied
    }
    return source


def given_directory(path: str | None, option: str) -> Path | None:
    """Return the directory of a base, see `local_directory`; None for an option that is not given."""
    return None if path is None else local_directory(path, option)


def describe_model(
    args: argparse.Namespace, sources: Sources, tensors: Mapping[str, LazyTensor]
) -> tuple[TokenizersBackend, GsvaConfig, dict[str, LazyTensor]]:
    """Return the tokenizer, the configuration, and the tensors with those that are drawn at random added.

    Raises:
        ValueError: The bases' files describe no model, or another one than the tensors'.
        FileNotFoundError: A configuration or tokenizer.model is missing.
    """
    from modeling_gsva import GsvaConfig

    language_dir, clip_dir = sources.language_dir, sources.clip_dir
    base_tokens = base_added_tokens(language_dir)
    tokenizer = build_llama_tokenizer(args.tokenizer or language_dir, added_tokens=base_tokens)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    rows = image_id if image_id == len(tokenizer) - 1 else len(tokenizer)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    text_config, llava_config = llama_config(language_dir, rows, shapes)
    if sources.is_start:
        new = [token for token in ORDINARY_TOKENS + SPECIAL_TOKENS if token not in base_tokens]
        sources.checkpoint.tensors = new_weights(tensors, rows, new, text_config.initializer_range, args.seed)
        shapes |= {name: tensor.shape for name, tensor in sources.checkpoint.tensors.items()}
    check_rows(shapes, rows, tokenizer.convert_tokens_to_ids("[SEG]"), sources)
    vision_config, sam = clip_config(clip_dir, shapes), sam_config(shapes)
    if args.dtype == "auto":
        dtype = (sources.bases[-1] if sources.is_start else sources.checkpoint).floating_dtype()
    else:
        dtype = getattr(torch, args.dtype)
    selected = vision_features(language_dir, llava_config)
    with naming(_described_by(sources)):
        config = GsvaConfig(
            text_config=text_config,
            vision_config=vision_config,
            sam_config=sam,
            image_token_id=image_id,
            seg_token_id=tokenizer.convert_tokens_to_ids("[SEG]"),
            rej_token_id=tokenizer.convert_tokens_to_ids("[REJ]"),
            architectures=["GsvaForConditionalGeneration"],
            dtype=dtype,
            **selected,
        )
    return tokenizer, config, {**tensors, **(sources.checkpoint.tensors if sources.is_start else {})}


def _described_by(sources: Sources) -> str:
    folders = (sources.language_dir, sources.clip_dir)
    return " and ".join(str(folder / "config.json") for folder in folders if folder)


def check_rows(shapes: Mapping[str, tuple[int, ...]], rows: int, seg_id: int, sources: Sources) -> None:
    """Raise ValueError unless the embedding and the language head have one row for each token."""
    for name in TOKEN_ROWS:
        if name in shapes and shapes[name][0] != rows:
            source = next(source for source in sources.all() if name in source.tensors)
            raise ValueError(
                f"{to_original(name)} of {source.option} has {shapes[name][0]} rows, the tokenizer of "
                f"{sources.language_dir} gives {rows} ([SEG] is {seg_id}). Pass the base the checkpoint was trained from"
                + (", and a checkpoint that holds its trained embedding." if source is not sources.checkpoint else ".")
            )


def check_tensors(expected: dict[str, tuple[int, ...]], tensors: Mapping[str, LazyTensor], sources: Sources) -> None:
    """Raise ValueError unless the checkpoint is whole, every parameter has a tensor that fits, and LoRA fits its weights."""
    checkpoint = sources.checkpoint
    refuse_holes(checkpoint, expected)
    check_filled(expected, tensors, [f"{source.option} {source.path}" for source in sources.all() if source.path])
    for source in sources.bases:
        if source.lora:
            raise ValueError(f"{source.option} {source.path} holds LoRA weights; only those of --checkpoint are used.")
    for name, pair in checkpoint.lora.items():
        (rank, columns), (rows, b_rank) = pair["A"].shape, pair["B"].shape
        if rank != b_rank or (rows, columns) != expected.get(name):
            raise ValueError(
                f"LoRA of {to_original(name)}: A {pair['A'].shape} and B {pair['B'].shape} do not fit a weight of "
                f"{expected.get(name)}."
            )
    if form_of(checkpoint) not in (WHOLE, NO_CHECKPOINT):
        for base in sources.bases:
            names = (f"--checkpoint {checkpoint.path}", f"{base.option} {base.path}")
            refuse_other_base(checkpoint.tensors, base.tensors, *names)


def make_processor(
    args: argparse.Namespace, config: GsvaConfig, tokenizer: TokenizersBackend, clip_dir: Path | None
) -> GsvaProcessor:
    """Return the processor with CLIP's preprocessing and the conversation template that the command line names."""
    from modeling_gsva import GsvaProcessor
    from modeling_gsva.processing_gsva import CHAT_TEMPLATES

    vision, sam = config.vision_config, config.sam_config.vision_config
    return GsvaProcessor(
        image_processor=image_processor(clip_dir, vision.image_size, sam.image_size),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        chat_template=CHAT_TEMPLATES[args.conv_type],
    )


def summarize(
    args: argparse.Namespace,
    sources: Sources,
    tensors: Mapping[str, LazyTensor],
    origins: Mapping[str, str],
    dtype: torch.dtype,
    written: int,
) -> dict:
    """Return the facts of a conversion, for the console and the card.

    Args:
        origins: The option that each tensor comes from.
        written: Bytes of the weights.
    """
    lora = sources.checkpoint.lora
    ranks = sorted({pair["A"].shape[0] for pair in lora.values()})
    reasons = [reason for source in sources.all() for reason in source.dropped.values()]
    bases = [
        (f"{origins[name]}: {PARTS[part_of(name)]}") for name in origins if origins[name] != sources.checkpoint.option
    ]
    return {
        "parameters": sum(torch.Size(tensor.shape).numel() for tensor in tensors.values()),
        "bytes": written,
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(tensors),
        "from": {source.option: list(origins.values()).count(source.option) for source in sources.all()},
        **({"checkpoint": form_of(sources.checkpoint)} if not sources.is_start else {}),
        **({"filled in from the bases": {part: bases.count(part) for part in dict.fromkeys(bases)}} if bases else {}),
        "LoRA": (
            f"rank {ranks}, alpha {args.lora_alpha:g}, " + ("kept in adapter/" if args.keep_lora else "merged")
            if lora
            else "none"
        ),
        "left behind": {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
    }
