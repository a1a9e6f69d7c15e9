"""Strict loading: weights that are missing, unexpected, mis-shaped or unreadable are an error with their names."""

import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

# Modules that are not quantized by default; only the language model's layers are. CLIP and SAM lose masks in 4 bit, and the
# rest is small or trained in full. Parts of a vision-language model are listed by the names that transformers' families use,
# with and without the prefixes that they have in `GsvaForConditionalGeneration` and `GsvaModel`.
_VISION = (
    "vision_tower",
    "vision_model",
    "visual",
    "multi_modal_projector",
    "connector",
    "language_model.embed_tokens",
    "text_model.embed_tokens",
)
NOT_QUANTIZED = (
    *(f"{prefix}{name}" for prefix in ("", "model.", "vlm.model.") for name in _VISION),
    "lm_head",
    "vlm.lm_head",
    "sam",
    "mask_projector",
)
# The options of transformers' quantization configurations that name such modules.
SKIP_OPTIONS = ("llm_int8_skip_modules", "modules_to_not_convert")
MAX_NAMES = 12  # how many weights of a kind an error names

# Beginnings of files that are no checkpoints of torch.
MAGIC = {
    b"version https://git-lfs": "is a Git LFS pointer, which stands for the weights: fetch them with `git lfs pull`, or "
    "download the file again with `hf download`",
    b"GGUF": "is a GGUF file of llama.cpp, which cannot be converted: pass the weights it was made from",
    b"\x89HDF": "is an HDF5 file of TensorFlow or Keras: pass the weights of PyTorch",
    b"\x1f\x8b": "is compressed by gzip: unpack it",
    b"BZh": "is compressed by bzip2: unpack it",
    b"\xfd7zXZ": "is compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it",
    b"7z\xbc\xaf": "is a 7z archive: unpack it",
    b"Rar!": "is a RAR archive: unpack it",
}
# The names of the files that transformers and peft load weights from.
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin", "adapter_model*.safetensors", "adapter_model*.bin")
ADVICE = (
    "Save the model again with save_pretrained, convert an original checkpoint with convert_checkpoint.py, or check that "
    "config.json belongs to these weights. To load all the same and initialize at random what does not fit: strict=False, for "
    "shapes ignore_mismatched_sizes=True."
)


class GsvaWeightsError(ValueError, RuntimeError):
    """A checkpoint does not hold the weights of the model; `wrong` has all their names by kind."""

    def __init__(self, model_class: type, source, wrong: dict[str, list[str]], advice: str = ADVICE):
        self.wrong = wrong
        faults = [
            f"{len(names)} {kind}: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}"
            for kind, names in wrong.items()
            if names
        ]
        super().__init__(
            f"The weights of {str(source)!r} are not those of {model_class.__name__}. {'; '.join(faults)}. {advice}".strip()
        )


def foreign_content(path: Path) -> str | None:
    """Return what is in a file that holds neither weights nor JSON nor a tokenizer, or None if it is not recognised.

    Recognised are files that are empty, not fully downloaded, compressed, Git LFS pointers and web pages. The text continues
    a sentence that begins with the file's name.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "is empty: copy or download it again"
    for magic, problem in MAGIC.items():
        if head.startswith(magic):
            return problem
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<error")):
        return (
            "is a web page (mostly an error or a login page that was saved under this name): download it again, and log in "
            "first if the repository asks for it"
        )
    if not head.strip(b"\0"):
        return "begins with zeros alone: its download was not finished, start it again"
    return "is a tar archive: unpack it" if head[257:262] == b"ustar" else None


def problem_of(path: Path) -> str | None:
    """Return what is wrong with a file that does not load as weights, or None if it is not recognised.

    Beside the contents that `foreign_content` recognises, these are files that are cut off, and text. The text continues a
    sentence that begins with the file's name.
    """
    if problem := foreign_content(path):
        return problem
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(max(0, size - 2**16 - 22))  # a zip archive ends with its directory's end: 22 bytes and a comment
        tail = file.read()
    if head.startswith(b"PK\x03\x04") and b"PK\x05\x06" not in tail:
        return f"is cut off after {size:,} bytes: it is not whole. Copy or download it again"
    if expected := safetensors_size(head, path):  # a file whose names fill the head would be taken for text below
        cut_off = f"is cut off: it has {size:,} of {expected:,} bytes. Copy or download it again"
        return cut_off if expected > size else None
    try:
        head[: len(head) // 4 * 4].decode("ascii")
    except UnicodeDecodeError:
        return None
    return f"is text, not weights (it begins with {head[:40].decode('ascii', 'replace')!r}): download it again"


def safetensors_size(head: bytes, path: Path) -> int | None:
    """Return the bytes that a safetensors file must have by its header, or None for another file."""
    length = int.from_bytes(head[:8], "little")
    if head[8:9] != b"{" or not 0 < length <= 100_000_000:  # the format's own limit
        return None
    if 8 + length > path.stat().st_size:
        return 8 + length
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def broken_files(source, subfolder: str = "") -> list[str]:
    """Return for each file of weights of a directory, or of a repository in the cache, that is none: its name and why."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            config = try_to_load_from_cache(str(source), "config.json")
        except ValueError:  # not the name of a repository
            config = None
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    files = sorted({path for pattern in WEIGHT_FILES for path in (folder / subfolder).glob(pattern)})
    found = [(path.name, problem_of(path)) for path in files if path.is_file()]
    return [f"{name} {problem}" for name, problem in found if problem is not None]


def with_default_skips(quantization_config):
    """Return a copy that does not quantize NOT_QUANTIZED, unless it names modules itself or has no such option."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = deepcopy(quantization_config)
    for option in SKIP_OPTIONS:
        if getattr(quantization_config, option, ()) is None:
            setattr(quantization_config, option, list(NOT_QUANTIZED))
    return quantization_config


_Base: Any = PreTrainedModel if TYPE_CHECKING else object  # a mixin, whose parent's methods type checkers would miss


class StrictLoadingMixin(_Base):
    """Strict `from_pretrained`; stands before [`PreTrainedModel`] among the bases of a model's class."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        Return False so that transformers initializes missing weights as it does for built-in models; for custom code it
        skips CLIP's initialization.
        """
        return False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        strict: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        quantization_config=None,
        **kwargs,
    ):
        """
        Load like [`PreTrainedModel.from_pretrained`], but raise where weights are missing, unexpected or mis-shaped.

        Args:
            strict: False loads what fits, initializes the rest at random and leaves it at transformers' warning. By
                default True, unless `output_loading_info` hands the report to the caller or `state_dict` is empty.
            ignore_mismatched_sizes: allows mis-shaped weights, which are then initialized at random.
            quantization_config: only the language model's layers are quantized, unless it names itself the modules to
                leave out.

        Raises:
            GsvaWeightsError: a `ValueError` with the names (and a `RuntimeError`, as transformers' for shapes).
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = with_default_skips(quantization_config)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                ignore_mismatched_sizes=True,  # checked below, with names
                output_loading_info=True,
                **kwargs,
            )
        except Exception as error:
            source = pretrained_model_name_or_path
            broken = [] if source is None else broken_files(source, kwargs.get("subfolder") or "")
            if not broken or isinstance(error, GsvaWeightsError):
                raise
            raise GsvaWeightsError(cls, source, {"unreadable": broken}, advice="") from error
        # Where an adapter was loaded on top, `info` is its report; those of the base are in `_load_reports`.
        reports = [info, *(report.to_dict() for report in vars(model).pop("_load_reports", ()))]
        if strict is None:
            strict = not output_loading_info and kwargs.get("state_dict") != {}
        shapes = {
            name: f"{name} (saved {tuple(saved)}, model {tuple(expected)})"
            for report in reports
            for name, saved, expected in report["mismatched_keys"]
        }
        missing = {name for report in reports for name in report["missing_keys"]} - shapes.keys()
        unexpected = {name for report in reports for name in report["unexpected_keys"]}
        shapes = {
            model.saved_name(name): text.replace(name, model.saved_name(name), 1) for name, text in shapes.items()
        }
        missing, unexpected = ({model.saved_name(name) for name in names} for names in (missing, unexpected))
        wrong = {
            "missing": sorted(missing) if strict else [],
            "unexpected": sorted(unexpected) if strict else [],
            "mis-shaped": [] if ignore_mismatched_sizes else [shapes[name] for name in sorted(shapes)],
        }
        if any(wrong.values()):
            raise GsvaWeightsError(cls, pretrained_model_name_or_path, wrong)
        return (model, info) if output_loading_info else model

    def saved_name(self, name: str) -> str:
        """Return the name that a weight of the model has in saved directories, for errors."""
        return name

    def mark_tied_weights_as_initialized(self, loading_info) -> None:
        """
        Keep the loading report, then do as the parent. transformers calls this first with each loading report. Keep them
        all: `from_pretrained` is only handed the last one.
        """
        self.__dict__.setdefault("_load_reports", []).append(loading_info)
        if loading_info.conversion_errors:  # a quantized weight that lacks a piece: later steps would fail on it
            unreadable = [
                f"{self.saved_name(name)} ({why.splitlines()[-1]})"
                for name, why in loading_info.conversion_errors.items()
            ]
            loading_info.conversion_errors.clear()
            raise GsvaWeightsError(type(self), self.name_or_path, {"unreadable": sorted(unreadable)})
        super().mark_tied_weights_as_initialized(loading_info)


__all__ = ["GsvaWeightsError", "StrictLoadingMixin"]
