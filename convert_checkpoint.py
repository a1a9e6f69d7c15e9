"""Turn checkpoints of the original GSVA code into a directory that the Auto classes load, and back.

    python convert_checkpoint.py --checkpoint gsva-7b-ft-gres.bin --llava LLAVA_DIR --clip CLIP_DIR --output gsva-7b
    python convert_checkpoint.py --llava LLAVA_DIR --clip CLIP_DIR --sam sam_vit_h_4b8939.pth --output gsva-7b-start
    python convert_checkpoint.py --checkpoint gsva-7b --reverse --output gsva-7b.bin

The second is where the original's training starts: no checkpoint yet, and what GSVA adds is drawn at random (`--seed`).
The checkpoint is a file, a sharded one's index or a directory; what it lacks comes from `--llava` (or `--llama` with
`--llava_delta`), `--clip` and `--sam`. Tensors are read and written one at a time, so that memory stays at a few tensors,
however big the checkpoint.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from reprlib import repr as shown  # short, and safe for what is nested deeply
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import TokenizersBackend

# The tokens the original adds to its base tokenizer, in the order it adds them: the two ordinary ones first, then the
# special ones (prepare_model_tokenizer.py:14-25 of LeapLabTHU/GSVA 618dc79). `<image>` is ours: the original cuts the
# text there and never gives it an id.
ORDINARY_TOKENS = ("[SEG]", "[REJ]")
SPECIAL_TOKENS = ("<im_start>", "<im_end>")
IMAGE_TOKEN = "<image>"

# Texts on which the rebuilt tokenizer must agree with sentencepiece itself; they hold what a tokenizer of another kind
# would get wrong: runs of blanks, line ends, bytes outside the vocabulary, compatibility characters, long words.
_PROBES = (
    " Sure, the second man from the left,  in a red shirt",
    ", antidisestablishmentarianism",
    "\n What are",
    "\u00e9\u00e8 \u7532 \ufb01ne \U0001f600 \u0660\u0661 \t x\u00a0y",
    "3.14159 == 2 ** 10;",
)


def _read_json(path: Path) -> dict:
    """The object in a JSON file, `{}` where there is none. Raises ValueError, naming the file, when it holds none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON in UTF-8 ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {shown(content)}; download it again.")
    return content


def _base_added_tokens(directory: Path) -> dict[str, int]:
    """Tokens a base directory has beside the sentencepiece vocabulary, `{text: id}`."""
    try:
        tokens = {
            entry["content"]: int(i) if i.isdecimal() else i
            for i, entry in _read_json(directory / "tokenizer_config.json").get("added_tokens_decoder", {}).items()
        } | _read_json(directory / "added_tokens.json")
        if wrong := [
            (t, i) for t, i in tokens.items() if not isinstance(t, str) or type(i) is not int or not 0 <= i < 2**31
        ]:
            raise TypeError(f"a token and its id are {shown(wrong[0])}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory}: added_tokens.json or added_tokens_decoder in tokenizer_config.json does not map tokens to ids "
            f"({error}); download them again."
        ) from None
    return tokens


def _refuse_non_legacy(directory: Path) -> None:
    config = _read_json(directory / "tokenizer_config.json")
    name = str(config.get("tokenizer_class") or "LlamaTokenizer")
    why = None
    if name.removesuffix("Fast") != "LlamaTokenizer":
        why = f"tokenizer_class is {name!r}, not 'LlamaTokenizer'"
    elif config.get("legacy") is False:
        why = (
            'it has "legacy": false, with which every piece of text after an added token is cut differently and '
            "[SEG] and [REJ] both get the id of the bare '\u2581'"
        )
    elif config.get("add_bos_token") is False or config.get("add_eos_token"):
        why = "add_bos_token must be true and add_eos_token false"
    if why:
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}: GSVA was trained with the legacy LLaMA tokenizer, and "
            f"this one is another: {why}. Pass the directory of the LLaVA base the checkpoint was made from."
        )


def build_llama_tokenizer(
    source: str | Path,
    added_tokens: dict[str, int] | None = None,
    model_max_length: int = 1024,
) -> TokenizersBackend:
    """Rebuild the slow, legacy LLaMA tokenizer of the original with GSVA's tokens, with exactly its ids.

    No setting of a `LlamaTokenizer` of transformers 5 gives these ids, so the fast tokenizer is put together by hand
    from the pieces and scores of the sentencepiece model. Text between two added tokens is encoded on its own, with
    its own leading `\u2581`, as the legacy tokenizer does. Reload the result with `AutoTokenizer`.

    Args:
        source: `tokenizer.model`, or the base directory that holds it (whose added tokens are then read too).
        added_tokens: tokens the base vocabulary already has beside the sentencepiece pieces, `{text: id}`. Ids of
            `[SEG]`, `[REJ]`, `<im_start>`, `<im_end>` follow them, but a token already there keeps its id.
        model_max_length: longest text in tokens, `<image>` counted as its patches; 1024 is the original's.

    Returns:
        The tokenizer; `<image>` is its last token, one id after the original's vocabulary unless the base has it.

    Raises:
        ValueError: not a legacy LLaMA (BPE, byte fallback, dummy prefix) tokenizer, or ids that do not line up.
        FileNotFoundError: no `tokenizer.model`.
        ImportError: sentencepiece is not installed.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import TokenizersBackend
    from transformers.tokenization_utils_base import generate_merges

    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError("Reading tokenizer.model needs sentencepiece: pip install sentencepiece") from error

    path = Path(source)
    if path.is_dir():
        _refuse_non_legacy(path)
        added_tokens = _base_added_tokens(path) if added_tokens is None else added_tokens
        path = path / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the sentencepiece model of LLaMA (500 kB) is needed for exact ids."
        )
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # sentencepiece raises bare RuntimeError or OSError with a C++ message
        raise ValueError(f"{path} is not a sentencepiece model ({error}).") from error

    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    scores = {piece: pieces.get_score(i) for piece, i in vocab.items()}
    if [pieces.id_to_piece(i) for i in range(min(3, len(pieces)))] != ["<unk>", "<s>", "</s>"]:
        raise ValueError(f"{path}: the first pieces of a LLaMA model are <unk>, <s>, </s>; these are not.")
    backend = Tokenizer(
        models.BPE(vocab, generate_merges(vocab, scores), fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for probe in _PROBES:
        if backend.encode(probe).ids != pieces.encode(probe):
            raise ValueError(
                f"{path} is not a LLaMA sentencepiece model (BPE with byte fallback, identity "
                f"normalisation and dummy prefix): {probe!r} is cut differently."
            )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])

    # normalized=False everywhere: with True, "\u2581" would be put before the token is looked for.
    new = {t: i for t, i in sorted((added_tokens or {}).items(), key=lambda item: item[1]) if t not in vocab}
    for token in ORDINARY_TOKENS + SPECIAL_TOKENS + (IMAGE_TOKEN,):
        new.setdefault(token, len(vocab) + len(new))
    special = (*SPECIAL_TOKENS, IMAGE_TOKEN)
    backend.add_tokens([AddedToken(token, normalized=False, special=token in special) for token in new])
    tokenizer = TokenizersBackend(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        additional_special_tokens=list(special),
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )
    wrong = {
        t: (i, tokenizer.convert_tokens_to_ids(t)) for t, i in new.items() if tokenizer.convert_tokens_to_ids(t) != i
    }
    if wrong:
        raise ValueError(f"The added tokens of {source} leave gaps in the ids; (wanted, got): {wrong}.")
    return tokenizer


# ---------------------------------------------------------------------------------------------------------- key table
# One row per kind of tensor: the original's name (LLaVA, LLaMA, CLIP, segment-anything; without the prefixes of
# DistributedDataParallel and PEFT) and ours. `#` stands for a number and `*` for the rest of the name, in the same order on
# both sides; the first row that fits decides, in either direction.
_KEYS = """
lm_head.*                                                    lm_head.*
model.embed_tokens.*                                         model.language_model.embed_tokens.*
model.layers.*                                               model.language_model.layers.*
model.norm.*                                                 model.language_model.norm.*
model.mm_projector.*                                         model.multi_modal_projector.*
model.vision_tower.vision_tower.vision_model.*               model.vision_tower.*
model.text_hidden_fcs.0.*                                    mask_projector.*
SAM.image_encoder.patch_embed.proj.*                         sam.vision_encoder.patch_embed.projection.*
SAM.image_encoder.blocks.#.norm#.*                           sam.vision_encoder.layers.#.layer_norm#.*
SAM.image_encoder.blocks.*                                   sam.vision_encoder.layers.*
SAM.image_encoder.neck.0.*                                   sam.vision_encoder.neck.conv1.*
SAM.image_encoder.neck.1.*                                   sam.vision_encoder.neck.layer_norm1.*
SAM.image_encoder.neck.2.*                                   sam.vision_encoder.neck.conv2.*
SAM.image_encoder.neck.3.*                                   sam.vision_encoder.neck.layer_norm2.*
SAM.image_encoder.*                                          sam.vision_encoder.*
SAM.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix  sam.shared_image_embedding.positional_embedding
SAM.prompt_encoder.point_embeddings.*                        sam.prompt_encoder.point_embed.*
SAM.prompt_encoder.mask_downscaling.0.*                      sam.prompt_encoder.mask_embed.conv1.*
SAM.prompt_encoder.mask_downscaling.1.*                      sam.prompt_encoder.mask_embed.layer_norm1.*
SAM.prompt_encoder.mask_downscaling.3.*                      sam.prompt_encoder.mask_embed.conv2.*
SAM.prompt_encoder.mask_downscaling.4.*                      sam.prompt_encoder.mask_embed.layer_norm2.*
SAM.prompt_encoder.mask_downscaling.6.*                      sam.prompt_encoder.mask_embed.conv3.*
SAM.prompt_encoder.*                                         sam.prompt_encoder.*
SAM.mask_decoder.transformer.layers.#.norm#.*                sam.mask_decoder.transformer.layers.#.layer_norm#.*
SAM.mask_decoder.transformer.norm_final_attn.*               sam.mask_decoder.transformer.layer_norm_final_attn.*
SAM.mask_decoder.output_upscaling.0.*                        sam.mask_decoder.upscale_conv1.*
SAM.mask_decoder.output_upscaling.1.*                        sam.mask_decoder.upscale_layer_norm.*
SAM.mask_decoder.output_upscaling.3.*                        sam.mask_decoder.upscale_conv2.*
SAM.mask_decoder.output_hypernetworks_mlps.#.layers.0.*      sam.mask_decoder.output_hypernetworks_mlps.#.proj_in.*
SAM.mask_decoder.output_hypernetworks_mlps.#.layers.1.*      sam.mask_decoder.output_hypernetworks_mlps.#.layers.0.*
SAM.mask_decoder.output_hypernetworks_mlps.#.layers.2.*      sam.mask_decoder.output_hypernetworks_mlps.#.proj_out.*
SAM.mask_decoder.iou_prediction_head.layers.0.*              sam.mask_decoder.iou_prediction_head.proj_in.*
SAM.mask_decoder.iou_prediction_head.layers.1.*              sam.mask_decoder.iou_prediction_head.layers.0.*
SAM.mask_decoder.iou_prediction_head.layers.2.*              sam.mask_decoder.iou_prediction_head.proj_out.*
SAM.mask_decoder.*                                           sam.mask_decoder.*
""".replace("SAM.", "model.visual_model.")

# Tensors that are left behind, and why.
_DROPPED = {
    r".*rotary_emb\.inv_freq": "recomputed from rope_theta",
    r".*vision_model\.embeddings\.position_ids": "an index 0..N, made anew by the vision tower",
    r"clip\.(text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale)": "CLIP's text half, which GSVA does not use",
}


def _rules(source: int) -> list[tuple[re.Pattern, str]]:
    rules = []
    for line in _KEYS.split("\n")[1:-1]:
        pair = line.split()
        pattern = re.escape(pair[source]).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)")
        parts = re.split(r"([#*])", pair[1 - source])
        groups = iter(range(1, 10))
        rules.append((re.compile(pattern), "".join(f"\\g<{next(groups)}>" if p in ("#", "*") else p for p in parts)))
    return rules


_TO_OURS, _TO_ORIGINAL = _rules(0), _rules(1)


def _rename(key: str, rules: list[tuple[re.Pattern, str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(key):
            return match.expand(template)
    return None


def to_ours(key: str) -> str | None:
    """Name in `GsvaForConditionalGeneration` of a tensor of the original, None where the table has no row for it.

    >>> to_ours("model.visual_model.mask_decoder.output_hypernetworks_mlps.3.layers.2.bias")
    'sam.mask_decoder.output_hypernetworks_mlps.3.proj_out.bias'
    """
    return _rename(key, _TO_OURS)


def to_original(key: str) -> str | None:
    """The inverse of [`to_ours`].

    >>> to_original("model.language_model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    # CLIP's vision tower has lost the level `vision_model` inside transformers 5, but keeps it on disk.
    return _rename(key.replace("model.vision_tower.vision_model.", "model.vision_tower."), _TO_ORIGINAL)


def _said(key: str) -> str:
    """What messages call a tensor of ours: its original name, its own where the original has none."""
    return to_original(key) or key


# ------------------------------------------------------------------------------------------------------------- reading
# A safetensors file is closed and opened again after so many bytes, which gives its mapped pages back to the system.
_REOPEN_BYTES = 256 * 2**20
_READ_AHEAD = 256 * 2**20  # of other files: the next tensor mostly lies behind the last
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _advise(file, advice: str, begin: int = 0, size: int = 0) -> None:
    """Tells the system which bytes of a file come next, and which are done: new pages for all would cost more than reading."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), begin, size, getattr(os, advice))


class _File:
    """Tensors of one .bin, .pth or .safetensors file, each read when it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.handle: Any = None  # an open safetensors file
        self.given = 0  # the bytes it gave
        self.pickled: dict[str, torch.Tensor] = {}  # of another file: tensors that know their place in it

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        if self.path.suffix == ".safetensors":
            self._open()
            found = {}
            for key in self.handle.keys():  # noqa: SIM118 (not a dict)
                part = self.handle.get_slice(key)
                found[key] = (tuple(part.get_shape()), _SAFETENSORS_DTYPES.get(part.get_dtype()))
            self.handle = None
            return found
        self._load("meta")
        odd = [key for key, value in self.pickled.items() if not isinstance(value, torch.Tensor)]
        if odd:
            raise ValueError(
                f"{self.path} holds more than tensors: {_listed(odd)}. Pass a model's state dict (for a "
                "DeepSpeed checkpoint, what zero_to_fp32.py writes)."
            )
        return {key: (tuple(value.shape), value.dtype) for key, value in self.pickled.items()}

    def read(self, key: str) -> torch.Tensor:
        if key not in self.pickled:
            if self.handle is None or self.given > _REOPEN_BYTES:
                self.handle, self.given = None, 0
                self._open()
            tensor = self.handle.get_tensor(key)
            self.given += tensor.nbytes
            return tensor
        tensor = self.pickled[key]
        if tensor.is_meta and tensor.untyped_storage()._checkpoint_offset is None:
            self._load("cpu")  # written by torch < 1.6: only the whole can be read
            tensor = self.pickled[key]
        return self._read_piece(tensor) if tensor.is_meta else tensor

    def _open(self) -> None:
        try:
            self.handle = safe_open(self.path, "pt")
        except Exception as error:
            raise ValueError(f"{self.path} is not a safetensors file: {error}") from error

    def _load(self, device: str) -> None:
        try:
            content = torch.load(self.path, map_location=device, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{self.path} cannot be read as tensors alone (weights_only=True). A pickle that runs code is never "
                f"opened; write the state dict again with torch.save. ({(str(error) or type(error).__name__).splitlines()[0]})"
            ) from error
        for wrapper in ("state_dict", "module", "model"):
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
        self.pickled = content if isinstance(content, dict) else {f"<{type(content).__name__}>": content}

    def _read_piece(self, tensor: torch.Tensor) -> torch.Tensor:
        """Read, not mapped: faults of mapped pages cost more than the copy."""
        extent = (
            1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        )
        flat = torch.empty(extent, dtype=tensor.dtype)
        room = _bytes(flat)
        # torch notes it in tensors loaded to "meta" (its notes on serialization).
        begin = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
        with self.path.open("rb") as file:
            file.seek(begin)
            if file.readinto(room) != len(room):
                raise ValueError(f"{self.path} ends within a tensor; it is not whole. Copy or download it again.")
            _advise(file, "POSIX_FADV_DONTNEED", begin, len(room))
            _advise(file, "POSIX_FADV_WILLNEED", begin + len(room), _READ_AHEAD)
        return flat.as_strided(tensor.shape, tensor.stride())


def _weight_files(path: Path, required: bool = True) -> list[Path]:
    """The files with weights behind a file, an index or a directory, `[]` for a directory without any."""
    if path.name.endswith(".index.json"):
        names = _read_json(path).get("weight_map")
        names = list(names.values()) if isinstance(names, dict) else [names]
        # a bare name: what leads elsewhere is none of this checkpoint's files
        if odd := [
            name
            for name in names
            if not isinstance(name, str) or Path(name).name != name or "\0" in name or len(name) > 255
        ]:
            raise ValueError(f"{path}: weight_map must name files beside it, got {shown(odd[0])}; download it again.")
        names = sorted(set(names))
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{path} lists {_listed(missing)}, which {'are' if missing[1:] else 'is'} not beside it."
            )
        return [path.parent / name for name in names]
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist.")
    for pattern in ("model.safetensors.index.json", "*.bin.index.json", "*.index.json"):
        if found := sorted(path.glob(pattern)):
            if found[1:]:
                raise ValueError(f"{path} has several indices ({_listed(p.name for p in found)}); pass one of them.")
            return _weight_files(found[0])
    for pattern in ("*.safetensors", "*.bin", "*.pth", "*.pt"):
        found = [
            p
            for p in sorted(path.glob(pattern))
            if p.name not in ("training_args.bin", "optimizer.bin", "scheduler.bin")
        ]
        if found:
            return found
    if required:
        raise FileNotFoundError(f"{path} has no .bin, .pth, .pt or .safetensors file.")
    return []


def _listed(items: Iterable, limit: int = 12) -> str:
    items = [str(item) for item in items]
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if items[limit:] else "")


@dataclass
class Entry:
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one torch does not have
    read: Callable[[], torch.Tensor]


class Source:
    """The tensors of one option of the command line, under their names in our model.

    Args:
        option: the option, for messages.
        path: file, index or directory; None for tensors that come from no file.
        place: what stands before each key to make it a full name of the original ("model.visual_model." for SAM).

    Attributes:
        tensors: `{our name: Entry}`.
        lora: `{our name of the adapted weight: {"A": Entry, "B": Entry}}`.
        dropped: `{key: reason}`.

    Raises:
        ValueError: a key that is neither mapped nor dropped, listed with the others of its kind; one name in two files.
    """

    def __init__(self, option: str, path: Path | None, place: str = "", required: bool = True):
        self.option, self.path = option, path
        self.tensors: dict[str, Entry] = {}
        self.lora: dict[str, dict[str, Entry]] = {}
        self.dropped: dict[str, str] = {}
        unknown, adapters = [], set()
        twice: dict[tuple[str, str], list[str]] = {}
        origin: dict[tuple, Path] = {}
        for file in _weight_files(path, required) if path else ():
            handle = _File(file)
            for key, (shape, dtype) in handle.tensors().items():
                entry = Entry(shape, dtype, partial(handle.read, key))
                name = re.sub(r"^(module\.)*(base_model\.model\.)?", "", key).replace(".base_layer.", ".")
                if place and not name.startswith(place):
                    name = place + name
                if reason := next((why for pattern, why in _DROPPED.items() if re.fullmatch(pattern, name)), None):
                    self.dropped[key] = reason
                    continue
                adapter = re.fullmatch(r"(.+)\.lora_([AB])(?:\.(\w+))?\.weight", name)
                name = re.sub(r"^clip\.", "model.vision_tower.vision_tower.", name)
                ours = to_ours(f"{adapter[1]}.weight" if adapter else name)
                if ours is None:
                    unknown.append(key)
                    continue
                place_taken = (ours, adapter and adapter.groups()[1:])
                if place_taken in origin:
                    twice.setdefault((origin[place_taken].name, file.name), []).append(key)
                    continue
                origin[place_taken] = file
                if adapter:
                    adapters.add(adapter[3])
                    self.lora.setdefault(ours, {})[adapter[2]] = entry
                else:
                    self.tensors[ours] = entry
        if twice:
            (one, other), keys = next(iter(twice.items()))
            if one == other:
                raise ValueError(f"{path}: {one} has two tensors for the same parameter: {_listed(keys)}.")
            raise ValueError(
                f"{path} holds several checkpoints: {one} and {other} both have {_listed(keys, 3)}. Pass one file."
            )
        if unknown:
            raise ValueError(
                f"{option} {path}: {len(unknown)} keys are unknown and would be lost: {_listed(unknown)}."
            )
        if len(adapters) > 1:
            raise ValueError(f"{path} holds several LoRA adapters ({_listed(adapters)}); only one can be merged.")
        half = [name for name, pair in self.lora.items() if len(pair) != 2]
        if half:
            raise ValueError(f"{path}: lora_A without lora_B (or the reverse) for {_listed(half)}.")


def _check_not_delta(llava: Source) -> None:
    """LLaMA's final norm weighs about 1 to 2; a delta's is what fine-tuning moved it by, about 0."""
    entry = llava.tensors.get("model.language_model.norm.weight")
    if entry is not None and entry.read().float().abs().median() < 0.25:
        raise ValueError(
            f"{llava.path} is a delta against LLaMA, not a model (the weights of its final norm are about 0). Pass LLaMA "
            f"itself and the delta: --llama LLAMA_DIR --llava_delta {llava.path}"
        )


def _add_delta(llama: Source, delta: Source) -> Source:
    """LLaMA plus delta; rows and tensors that LLaMA lacks are the delta's own (LLaVA's apply_delta)."""

    def added(base: Entry, change: Entry) -> torch.Tensor:
        total = change.read().float().clone()
        total[tuple(slice(0, side) for side in base.shape)] += base.read().float()
        return total.to(change.dtype)

    for name, change in list(delta.tensors.items()):
        base = llama.tensors.get(name)
        if base is None:
            if name.startswith("model.language_model.") or name == "lm_head.weight":
                raise ValueError(f"--llama {llama.path} lacks {to_original(name)}, which the delta changes.")
            continue
        grows = name in ("lm_head.weight", "model.language_model.embed_tokens.weight")
        if base.shape[1:] != change.shape[1:] or (
            base.shape[0] > change.shape[0] if grows else base.shape != change.shape
        ):
            raise ValueError(
                f"{to_original(name)} is {base.shape} in --llama and {change.shape} in --llava_delta: the delta "
                "belongs to another model."
            )
        delta.tensors[name] = Entry(change.shape, change.dtype, partial(added, base, change))
    lost = sorted(set(llama.tensors) - set(delta.tensors))
    if lost:
        raise ValueError(f"--llava_delta {delta.path} has no change for {_listed(lost)}; it is not whole.")
    return delta


# ---------------------------------------------------------------------------------------------------------- what to fill
_SELECTED = {"patch": "default", "cls_patch": "full"}  # mm_vision_select_feature of LLaVA: without or with class token


# A size that config.json states and a tensor that has it, in which dimension; None: the number of layers.
_LLAMA_SIZES = {
    "hidden_size": ("norm.weight", 0),
    "intermediate_size": ("layers.0.mlp.gate_proj.weight", 0),
    "num_hidden_layers": None,
}
_CLIP_SIZES = {
    "hidden_size": ("embeddings.patch_embedding.weight", 0),
    "patch_size": ("embeddings.patch_embedding.weight", 2),
    "intermediate_size": ("encoder.layers.0.mlp.fc1.weight", 0),
    "num_hidden_layers": None,
}


def _check_sizes(path: Path, config: dict, shapes: dict[str, tuple[int, ...]], prefix: str, sizes: dict) -> None:
    """Compares before a model of these sizes is made: one of a million layers would take for ever."""
    layers = {m[1] for name in shapes if (m := re.match(re.escape(prefix) + r"(?:encoder\.)?layers\.(\d+)\.", name))}
    for name, place in sizes.items():
        shape = () if place is None else shapes.get(prefix + place[0], ())
        has = len(layers) if place is None else shape[place[1]] if len(shape) > place[1] else None
        if name in config and has is not None and config[name] != has:
            raise ValueError(
                f"{path} says {name} is {shown(config[name])}, the tensors say {has}; pass the directory of the base the "
                "checkpoint was made from."
            )


@contextmanager
def _naming(path: Path | str) -> Iterator[None]:
    """Names the file behind an error that transformers raises for what is in it."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ValueError(f"{path} does not describe a model ({error}); download it again.") from error


def _llama_config(directory: Path, vocab_size: int, shapes: dict[str, tuple[int, ...]]):
    from transformers import LlamaConfig

    original = _read_json(directory / "config.json")
    if not original:
        raise FileNotFoundError(
            f"{directory / 'config.json'} is missing: head counts and norms cannot be read from tensors."
        )
    kept = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "bos_token_id",
        "eos_token_id",
    )
    values = {name: original[name] for name in kept if original.get(name) is not None}
    _check_sizes(directory / "config.json", values, shapes, "model.language_model.", _LLAMA_SIZES)
    # The original pads with <unk> (main.py: tokenizer.pad_token = tokenizer.unk_token), whatever the base says.
    with _naming(directory / "config.json"):
        return LlamaConfig(**values, vocab_size=vocab_size, pad_token_id=0), original


# openai/clip-vit-large-patch14, config.json: the tower of every published GSVA checkpoint.
_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}


def _clip_config(directory: Path | None, shapes: dict[str, tuple[int, ...]]):
    from transformers import CLIPVisionConfig

    if directory is not None:
        config = _read_json(directory / "config.json")
        if not config:
            raise FileNotFoundError(
                f"{directory / 'config.json'} is missing: CLIP's head count cannot be read from tensors."
            )
        config = config.get("vision_config", config)
        if not isinstance(config, dict):
            raise ValueError(f"{directory / 'config.json'}: vision_config must be an object, got {shown(config)}.")
        _check_sizes(directory / "config.json", config, shapes, "model.vision_tower.", _CLIP_SIZES)
    elif shapes.get("model.vision_tower.embeddings.patch_embedding.weight", (1024, 3, 14, 14)) == (1024, 3, 14, 14):
        config = _CLIP_LARGE
    else:
        raise ValueError(
            "The vision tower is not CLIP ViT-L/14, so its head count is not known: pass --clip DIR (its "
            "config.json is enough where the checkpoint has the weights)."
        )
    known = {*_CLIP_LARGE, "num_channels", "attention_dropout", "initializer_range", "initializer_factor"}
    with _naming((directory or Path()) / "config.json"):
        return CLIPVisionConfig(**{name: value for name, value in config.items() if name in known})


def _sam_config(shapes: dict[str, tuple[int, ...]]):
    """SAM's sizes, read from its tensors: ViT-H, L, B or any other of segment-anything's encoders."""
    from transformers import SamConfig

    encoder = "sam.vision_encoder."
    try:
        dim, channels, patch, _ = shapes[encoder + "patch_embed.projection.weight"]
        grid = shapes[encoder + "pos_embed"][1]
        depth = 1 + max(int(m[1]) for m in map(re.compile(re.escape(encoder) + r"layers\.(\d+)\.").match, shapes) if m)
        spans, head_dims = zip(*(shapes[f"{encoder}layers.{i}.attn.rel_pos_h"] for i in range(depth)))
        decoder = "sam.mask_decoder."
        mlp_dim, hidden = shapes[decoder + "transformer.layers.0.mlp.lin1.weight"]
        mask_tokens = shapes[decoder + "mask_tokens.weight"][0]
        layers = sum(
            bool(re.fullmatch(re.escape(decoder) + r"transformer\.layers\.\d+\.layer_norm4\.weight", k))
            for k in shapes
        )
        positions = shapes["sam.shared_image_embedding.positional_embedding"][1]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"SAM's sizes cannot be read from its tensors ({error}): pass a whole segment-anything .pth with --sam."
        ) from error
    # A relative position table has 2 * side - 1 rows; layers with the whole grid attend globally, the others in windows.
    whole = 2 * grid - 1
    windows = {(span + 1) // 2 for span in spans if span != whole}
    if len(windows) > 1:
        raise ValueError(f"SAM's encoder has windows of several sizes {sorted(windows)}; segment-anything has one.")
    return SamConfig(
        vision_config={
            "hidden_size": dim,
            "num_channels": channels,
            "patch_size": patch,
            "image_size": grid * patch,
            "num_hidden_layers": depth,
            "num_attention_heads": dim // head_dims[0],
            "mlp_dim": shapes[encoder + "layers.0.mlp.lin1.weight"][0],
            "output_channels": shapes[encoder + "neck.conv1.weight"][0],
            "num_pos_feats": positions,
            "window_size": windows.pop() if windows else grid,
            "global_attn_indexes": [i for i, s in enumerate(spans) if s == whole],
            # transformers' default of 1e-10 is meant for loading only
            "initializer_range": 0.02,
        },
        prompt_encoder_config={
            "hidden_size": hidden,
            "image_size": grid * patch,
            "patch_size": patch,
            "mask_input_channels": shapes["sam.prompt_encoder.mask_embed.conv3.weight"][1],
        },
        # 1e-5 is torch's default, which segment-anything leaves in the decoder's transformer; transformers has 1e-6.
        mask_decoder_config={
            "hidden_size": hidden,
            "mlp_dim": mlp_dim,
            "num_hidden_layers": layers,
            "layer_norm_eps": 1e-5,
            "num_multimask_outputs": mask_tokens - 1,
            "iou_head_hidden_dim": shapes[decoder + "iou_prediction_head.proj_in.weight"][0],
        },
    )


# Which option supplies the parts of the model a checkpoint may lack, and a tensor by which each is recognised.
_PARTS = {
    "model.language_model.embed_tokens.": ("weight", "--checkpoint"),
    "model.language_model.": ("norm.weight", "--llava (or --llama with --llava_delta)"),
    "lm_head.": ("weight", "--checkpoint"),
    "model.multi_modal_projector.": ("weight", "--llava (or --llava_delta)"),
    "model.vision_tower.": ("embeddings.patch_embedding.weight", "--clip"),
    "sam.": ("vision_encoder.pos_embed", "--sam"),
    "mask_projector.": ("0.weight", "--checkpoint"),
}


def _check_whole(tensors: dict[str, Entry], checkpoint: Source) -> None:
    """Names every part that no option supplies, before any configuration is read."""
    is_start = checkpoint.path is None
    missing = [
        f"  {_said(part + sign).removesuffix(sign)}*: pass it with "
        + (_PARTS["model.language_model."][1] if is_start and option == "--checkpoint" else option)
        for part, (sign, option) in _PARTS.items()
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


def _beginnings(tensors: dict[str, Entry], rows: int, new: list[str], std: float, seed: int) -> dict[str, Entry]:
    """What GSVA adds to LLaVA and SAM, drawn as the original draws it before its training.

    Rows of the new tokens in the embedding and in the language head: normal with the configuration's
    `initializer_range` (prepare_model_tokenizer.py: `resize_token_embeddings` of transformers 4.44.2). The mask
    projector: `torch.nn.Linear`'s own uniform numbers (modeling_lisa_gsva.py: init_seg_and_proj).

    Raises:
        ValueError: the base's embedding has other rows than its tokenizer has tokens.
    """

    def generator(number: int) -> torch.Generator:  # each tensor its own, in whatever order they are written
        return torch.Generator().manual_seed(seed * 10 + number)

    def grown(base: Entry, number: int) -> torch.Tensor:
        added = torch.randn(len(new), base.shape[1], generator=generator(number)) * std
        return torch.cat([base.read(), added.to(base.dtype)])

    def uniform(
        shape: tuple[int, ...], number: int
    ) -> torch.Tensor:  # the weight's and the bias' bound is 1 / sqrt(inputs)
        return (torch.rand(shape, generator=generator(number)) * 2 - 1) / hidden**0.5

    made = {}
    for number, name in enumerate(("model.language_model.embed_tokens.weight", "lm_head.weight")):
        base = tensors[name]
        if base.shape[0] + len(new) != rows:
            raise ValueError(
                f"{to_original(name)} has {base.shape[0]} rows, and its tokenizer {rows - len(new)} tokens before GSVA adds "
                f"{', '.join(new)}: --llava is not whole (added_tokens.json, perhaps), or not a LLaVA of the paper's kind."
            )
        made[name] = Entry((rows, base.shape[1]), base.dtype, partial(grown, base, number))
    hidden, prompt = base.shape[1], tensors["sam.mask_decoder.mask_tokens.weight"].shape[1]
    shapes = {"0.weight": (hidden, hidden), "0.bias": (hidden,), "2.weight": (prompt, hidden), "2.bias": (prompt,)}
    for number, (name, shape) in enumerate(shapes.items(), start=2):
        made[f"mask_projector.{name}"] = Entry(shape, torch.float32, partial(uniform, shape, number))
    return made


def _check_filled(expected: dict[str, tuple[int, ...]], tensors: dict[str, Entry], given: list[str]) -> None:
    missing: dict[str, list[str]] = {}
    for name in expected:
        if name not in tensors:
            option = next(option for part, (_, option) in _PARTS.items() if name.startswith(part))
            missing.setdefault(option, []).append(_said(name))
    if missing:
        lines = [f"  {len(names)} that {option} supplies: {_listed(names, 4)}" for option, names in missing.items()]
        raise ValueError(f"{' '.join(given)} leave parameters of the model unfilled:\n" + "\n".join(lines))
    wrong = [
        f"{_said(name)} is {tensors[name].shape}, the configuration says {shape}"
        for name, shape in expected.items()
        if tensors[name].shape != shape
    ]
    wrong += [
        f"{_said(name)} is {entry.dtype}, no floating type (a quantized checkpoint cannot be converted)"
        for name, entry in tensors.items()
        if entry.dtype is None or not entry.dtype.is_floating_point
    ]
    wrong += [
        f"{_said(name)} {tensors[name].shape} is no parameter of this configuration"
        for name in tensors
        if name not in expected
    ]
    if wrong:
        raise ValueError(
            "Tensors do not fit the config.json files:\n  "
            + "\n  ".join(wrong[:12])
            + (f"\n  and {len(wrong) - 12} more" if wrong[12:] else "")
        )


# ------------------------------------------------------------------------------------------------------------- converting
def _merged(base: Entry, pair: dict[str, Entry], alpha: float) -> Entry:
    """W + alpha / r · B A in float32, rounded once."""

    def read() -> torch.Tensor:
        a, b = pair["A"].read().float(), pair["B"].read().float()
        return base.read().float().addmm(b, a, alpha=alpha / a.shape[0])

    return Entry(base.shape, base.dtype, read)


def _local(path: str | None, patterns: list[str]) -> Path | None:
    """A path as it is, or a repository of the Hub brought here."""
    if path is None or Path(path).exists():
        return Path(path) if path else None
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).parent.exists():
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, allow_patterns=patterns))
    raise FileNotFoundError(f"{path} does not exist.")


def _in_dtype(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor.contiguous()
    converted = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(converted).all() and torch.isfinite(tensor).all():
        raise ValueError(f"{name} has values beyond float16's 65504; choose --dtype bfloat16 or float32.")
    return converted


def _safetensors_header(tensors: dict[str, torch.Tensor]) -> bytes:
    """What a safetensors file begins with: the length of a JSON text, and the text (format of safetensors 0.x)."""
    codes = {dtype: code for code, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict[str, dict[str, Any]]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _write_shards(directory: Path, entries: dict[str, Entry], dtype: torch.dtype, max_shard_size: str) -> int:
    """Writes safetensors shards and their index; holds one tensor at a time. Returns the bytes written."""
    planned = {name: torch.empty(entry.shape, dtype=dtype, device="meta") for name, entry in entries.items()}
    plan = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    total = plan.metadata["total_size"]
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing", disable=not sys.stderr.isatty()) as bar:
        for file, names in plan.filename_to_tensors.items():
            # `save_file` wants all tensors of a file at once; its header says how to write one after the other.
            header = _safetensors_header({name: planned[name] for name in names})
            with (directory / file).open("wb") as shard:
                shard.write(header)
                for name in names:
                    tensor = _in_dtype(entries[name].read(), dtype, name)
                    shard.write(_bytes(tensor))
                    bar.update(tensor.nbytes)
                shard.flush()
                os.fsync(shard.fileno())  # whole on disk before the directory gets its name
                _advise(shard, "POSIX_FADV_DONTNEED")
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _write_adapter(directory: Path, lora: dict[str, dict[str, Entry]], alpha: float, dtype: torch.dtype) -> None:
    from peft import LoraConfig

    ranks = {pair["A"].shape[0] for pair in lora.values()}
    if len(ranks) > 1:
        raise ValueError(
            f"--keep_lora needs one rank, the checkpoint has {sorted(ranks)}; leave it out to merge them."
        )
    LoraConfig(
        r=ranks.pop(),
        lora_alpha=alpha,
        lora_dropout=0.05,  # main.py of the original: --lora_dropout 0.05
        target_modules=sorted(name.removesuffix(".weight") for name in lora),
        task_type="CAUSAL_LM",
        base_model_name_or_path=None,  # the folder above, whatever it is called
        inference_mode=True,
    ).save_pretrained(directory)
    tensors = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight": _in_dtype(entry.read(), dtype, name)
        for name, pair in lora.items()
        for side, entry in pair.items()
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _image_processor(clip: Path | None, image_size: int, sam_size: int):
    """CLIP's own preprocessing where its directory says so, the original's constants otherwise."""
    from modeling_gsva import GsvaImageProcessor

    said = _read_json(clip / "preprocessor_config.json") if clip else {}
    options = {name: said[name] for name in ("image_mean", "image_std", "resample") if name in said}
    for name, value in options.items():
        numbers = [value] if name == "resample" else value
        known = range(6) if name == "resample" else None  # PIL.Image.Resampling
        if (
            not isinstance(numbers, list)
            or len(numbers) != (1 if known else 3)
            or any(type(number) not in (int, float) or not -1e3 < number < 1e3 for number in numbers)
            or (known and value not in known)
            or (name == "image_std" and min(numbers) < 1e-3)
        ):
            raise ValueError(f"{clip}/preprocessor_config.json: {name} is {shown(value)}; download it again.")
    return GsvaImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        sam_size={"longest_edge": sam_size},
        **options,
    )


_CARD = """---
library_name: transformers
pipeline_tag: mask-generation
tags: [gsva, referring-expression-segmentation, image-segmentation]
---

# {name}

GSVA (CVPR 2024): segments every expression of a question, or rejects it when nothing in the image fits.
{origin}

| | |
| --- | --- |
{rows}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
{adapter}inputs = processor(images=[image], expressions=[["man in red", "the unicorn"]], return_tensors="pt")
results = processor.post_process_segmentation(model.segment(**inputs), inputs)
```

The weights derive from LLaMA, CLIP and SAM: their licences apply, LLaMA's among them.
"""


# What stands in the card of a model whose LoRA is not merged: these weights alone are not what was trained.
_ADAPTER_LINES = """
from peft import PeftModel  # the weights above lack the LoRA, which is kept in adapter/

model = PeftModel.from_pretrained(model, "{name}", subfolder="adapter").merge_and_unload()
"""
_CONVERTED = "Converted from a checkpoint of the original code (LeapLabTHU/GSVA) with `convert_checkpoint.py`."
_START = """Where training starts: LLaVA, CLIP and SAM put together with `convert_checkpoint.py`. What GSVA adds to them is drawn at
random, so that this model has not learned to segment anything yet."""


def convert(args: argparse.Namespace) -> dict:
    """Checkpoint of the original, or only the bases it starts from → directory of ours. Returns the summary that is printed."""
    from transformers.initialization import no_init_weights

    from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaProcessor
    from modeling_gsva.processing_gsva import CHAT_TEMPLATES

    output = Path(args.output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} exists and is not empty; choose another --output or remove it.")
    hub_files = ["*.json", "*.bin", "*.safetensors", "*.model"]
    llava_dir, clip_dir = _local(args.llava, hub_files), _local(args.clip, hub_files)
    llama_dir, delta_dir = _local(args.llama, hub_files), _local(args.llava_delta, hub_files)
    if (llama_dir is None) != (delta_dir is None) or (llava_dir and delta_dir):
        raise ValueError("Pass either --llava, or --llama together with --llava_delta.")

    is_start = args.checkpoint is None
    if is_start:
        checkpoint = Source("drawn at random", None)
    else:
        checkpoint = Source("--checkpoint", Path(args.checkpoint))
    sources = [checkpoint]
    if clip_dir:
        sources.append(Source("--clip", clip_dir, "clip.", required=is_start))
    if args.sam:
        sources.append(Source("--sam", Path(args.sam), "model.visual_model."))
    if llava_dir:
        sources.append(Source("--llava", llava_dir, required=is_start))
        _check_not_delta(sources[-1])
    elif delta_dir:
        sources.append(_add_delta(Source("--llama", llama_dir), Source("--llava_delta", delta_dir)))
    tensors: dict[str, Entry] = {}
    for source in reversed(sources):  # the checkpoint last: it decides
        tensors.update(source.tensors)
    _check_whole(tensors, checkpoint)
    language_dir = llava_dir or delta_dir
    if language_dir is None:
        raise ValueError(
            "--llava is missing: its config.json and tokenizer.model are needed (not its weights, which the checkpoint has)."
        )
    known = _base_added_tokens(language_dir)
    tokenizer = build_llama_tokenizer(args.tokenizer or language_dir, added_tokens=known)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    rows = image_id if image_id == len(tokenizer) - 1 else len(tokenizer)
    shapes = {name: entry.shape for name, entry in tensors.items()}
    text_config, llava_config = _llama_config(language_dir, rows, shapes)
    if is_start:
        new = [token for token in ORDINARY_TOKENS + SPECIAL_TOKENS if token not in known]
        checkpoint.tensors = _beginnings(tensors, rows, new, text_config.initializer_range, args.seed)
        tensors |= checkpoint.tensors
        shapes |= {name: entry.shape for name, entry in checkpoint.tensors.items()}
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in shapes and shapes[name][0] != rows:
            where = next(source for source in sources if name in source.tensors)
            raise ValueError(
                f"{to_original(name)} of {where.option} has {shapes[name][0]} rows, the tokenizer of {language_dir} gives "
                f"{rows} ([SEG] is {tokenizer.convert_tokens_to_ids('[SEG]')}). Pass the base the checkpoint was trained from"
                + (", and a checkpoint that holds its trained embedding." if where is not checkpoint else ".")
            )
    vision_config, sam_config = _clip_config(clip_dir, shapes), _sam_config(shapes)
    dtype = (
        checkpoint_dtype(sources[-1] if is_start else checkpoint)
        if args.dtype == "auto"
        else getattr(torch, args.dtype)
    )
    feature = llava_config.get("mm_vision_select_feature", "patch")
    if not isinstance(feature, str) or feature not in _SELECTED:
        raise ValueError(
            f"{language_dir / 'config.json'}: mm_vision_select_feature is {shown(feature)}; known are {', '.join(_SELECTED)}."
        )
    described = " and ".join(str(folder / "config.json") for folder in (language_dir, clip_dir) if folder)
    with _naming(described):
        config = GsvaConfig(
            text_config=text_config,
            vision_config=vision_config,
            sam_config=sam_config,
            image_token_id=image_id,
            seg_token_id=tokenizer.convert_tokens_to_ids("[SEG]"),
            rej_token_id=tokenizer.convert_tokens_to_ids("[REJ]"),
            vision_feature_layer=llava_config.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy=_SELECTED[feature],
            architectures=["GsvaForConditionalGeneration"],
            dtype=dtype,
        )
    with _naming(described), torch.device("meta"), no_init_weights():
        model = GsvaForConditionalGeneration(config)
    tied = set(model.all_tied_weights_keys)
    weights = {model.saved_name(name): value for name, value in model.state_dict().items() if name not in tied}
    expected = {name: tuple(value.shape) for name, value in weights.items()}
    _check_filled(expected, tensors, [f"{source.option} {source.path}" for source in sources if source.path])
    for source in sources[1:]:
        if source.lora:
            raise ValueError(f"{source.option} {source.path} holds LoRA weights; only those of --checkpoint are used.")
    lora = checkpoint.lora
    for name, pair in lora.items():
        (rank, columns), (rows, b_rank) = pair["A"].shape, pair["B"].shape
        if rank != b_rank or (rows, columns) != expected.get(name):
            raise ValueError(
                f"LoRA of {to_original(name)}: A {pair['A'].shape} and B {pair['B'].shape} do not fit a weight of "
                f"{expected.get(name)}."
            )
    entries = {name: tensors[name] for name in expected}
    if not args.keep_lora:
        entries |= {name: _merged(entries[name], pair, args.lora_alpha) for name, pair in lora.items()}

    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        processor = GsvaProcessor(
            image_processor=_image_processor(clip_dir, vision_config.image_size, sam_config.vision_config.image_size),
            tokenizer=tokenizer,
            patch_size=vision_config.patch_size,
            chat_template=CHAT_TEMPLATES[args.conv_type],
        )
        model.to(dtype).save_pretrained(aside, state_dict={})  # everything but the weights
        processor.save_pretrained(aside)
        written = _write_shards(aside, entries, dtype, args.max_shard_size)
        if args.keep_lora and lora:
            _write_adapter(aside / "adapter", lora, args.lora_alpha, dtype)
        ranks = sorted({pair["A"].shape[0] for pair in lora.values()})
        summary = {
            "parameters": sum(torch.Size(entry.shape).numel() for entry in entries.values()),
            "bytes": written,
            "dtype": str(dtype).removeprefix("torch."),
            "tensors": len(entries),
            "from": {
                source.option: sum(tensors[name] is source.tensors.get(name) for name in entries) for source in sources
            },
            "LoRA": (
                f"rank {ranks}, alpha {args.lora_alpha:g}, " + ("kept in adapter/" if args.keep_lora else "merged")
                if lora
                else "none"
            ),
            "left behind": {
                reason: sum(why == reason for s in sources for why in s.dropped.values())
                for reason in dict.fromkeys(why for s in sources for why in s.dropped.values())
            },
        }
        card = "\n".join(
            f"| {key} | {json.dumps(value) if isinstance(value, dict) else value} |" for key, value in summary.items()
        )
        name = args.push_to_hub or output.name
        apart = _ADAPTER_LINES.format(name=name) if args.keep_lora and lora else ""
        origin = _START if is_start else _CONVERTED
        text = _CARD.format(name=name, rows=card, origin=origin, adapter=apart)
        (aside / "README.md").write_text(text, encoding="utf-8")
        _open_up(aside)
        if output.exists():
            output.rmdir()
        os.replace(aside, output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if not any(name.startswith("model.multi_modal_projector.") for name in checkpoint.tensors):
        # The original throws LLaVA's projector away here and draws a random one (a bug: only --weight brings it back).
        summary["note"] = "the projector comes from --llava; the original would draw a random one"
    if args.push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(args.push_to_hub, exist_ok=True)
        api.upload_folder(repo_id=args.push_to_hub, folder_path=output)
        summary["pushed to"] = args.push_to_hub
    return summary


def _open_up(directory: Path) -> None:
    """The usual permissions instead of the private ones of mkdtemp and safetensors."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def checkpoint_dtype(checkpoint: Source) -> torch.dtype:
    """The floating type that most of the checkpoint's numbers have."""
    count: dict[torch.dtype, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype is not None and entry.dtype.is_floating_point:
            count[entry.dtype] = count.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
    return max(count, key=count.__getitem__) if count else torch.float32


def reverse(args: argparse.Namespace) -> dict:
    """Our directory → one .bin in the original's layout; of one with LoRA kept apart, LoRA stands beside the base weights."""
    directory, output = Path(args.checkpoint), Path(args.output)
    state, unknown = {}, []
    prefix = ""
    adapter = directory / "adapter"
    lora = _read_json(adapter / "adapter_config.json")
    # One that training left there names the base it began from, and is merged into the weights above it already.
    apart = bool(lora) and lora.get("base_model_name_or_path") is None
    if args.peft_names or apart:
        prefix = "base_model.model."
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    for file in _weight_files(directory):
        with safe_open(file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                name = to_original(key)
                if name is None:
                    unknown.append(key)
                    continue
                tensor = handle.get_tensor(key)  # mapped, not read: torch.save takes one after the other
                state[prefix + name] = tensor if dtype is None else _in_dtype(tensor, dtype, name)
    if unknown:
        raise ValueError(f"{directory} holds tensors the original has no place for: {_listed(unknown)}.")
    if apart:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                part = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", key)
                name = to_original(f"{part[1]}.weight") if part else None
                if part is None or name is None:
                    raise ValueError(f"{adapter}: {key!r} is no LoRA tensor the original knows.")
                state[f"{prefix}{name.removesuffix('.weight')}.{part[2]}.default.weight"] = handle.get_tensor(key)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a directory; --reverse writes one file, for example gsva.bin.")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        torch.save(state, aside)
        os.replace(aside, output)
    finally:
        aside.unlink(missing_ok=True)
    if apart:  # alpha is not in the file, and another one would scale the adapter
        load_with = f"--lora_r {lora['r']} --lora_alpha {lora['lora_alpha']:g}"
    else:
        load_with = "any --lora_r (new adapters start at zero)" if prefix else "--lora_r 0"
    return {"tensors": len(state), "bytes": output.stat().st_size, "load with": load_with}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        help=".bin, .safetensors, an index or a directory of the original; with --reverse a directory of ours; without it "
        "the result is where training starts",
    )
    parser.add_argument("--output", required=True, help="directory to write; with --reverse a .bin")
    parser.add_argument("--llava", help="LLaVA base: config.json, tokenizer.model, and weights the checkpoint lacks")
    parser.add_argument("--llama", help="LLaMA, when LLaVA is only there as a delta")
    parser.add_argument("--llava_delta", help="LLaVA as a delta against --llama, added on the fly")
    parser.add_argument("--clip", help="CLIP directory or Hub name: config.json and weights the checkpoint lacks")
    parser.add_argument("--sam", help="SAM .pth (ViT-H, L or B, told apart by its tensors)")
    parser.add_argument("--tokenizer", help="tokenizer.model, where the LLaVA directory has none")
    parser.add_argument(
        "--conv_type",
        default="llava_v1",
        choices=["llava_v1", "llava_llama_2"],
        help="conversation template the checkpoint was trained with",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "float16", "bfloat16"],
        help="of the result; auto: the checkpoint's own",
    )
    parser.add_argument("--seed", type=int, default=0, help="without --checkpoint: of what GSVA adds to the bases")
    parser.add_argument("--lora_alpha", type=float, default=16.0, help="the original's --lora_alpha; not in the file")
    parser.add_argument("--keep_lora", action="store_true", help="write adapter/ for PEFT instead of merging")
    parser.add_argument("--max_shard_size", default="5GB", help="of each file of weights")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the result")
    parser.add_argument("--reverse", action="store_true", help="our directory to a .bin of the original's layout")
    parser.add_argument(
        "--peft_names", action="store_true", help="with --reverse: PEFT's prefix, for training with LoRA"
    )
    args = parser.parse_args(argv)
    if args.reverse and args.checkpoint is None:
        parser.error("--reverse needs --checkpoint, a directory that this program wrote")
    return args


def _keep_freed_memory() -> None:
    """Tensors pass through the same memory: asked of the system anew, page by page, each would cost as much as its copy."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc; the numbers are those of its malloc.h
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor,
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: and up to 1 GB of what is free stays


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    _keep_freed_memory()
    try:
        summary = reverse(args) if args.reverse else convert(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {args.output}")
    for key, value in summary.items():
        print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
