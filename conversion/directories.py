"""Find directories in the format of transformers, here or on the Hub, and refuse those that cannot be a part of a GSVA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from modeling_gsva.loading_gsva import problem_of

from .configs import naming
from .hub import is_hub_id, local_directory
from .reading import listed, read_json, short_repr, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The files of a model that describe it, and those of its weights by which transformers goes, in its order.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "README.md")
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TRY_INSTEAD = (
    "Pass a vision-language model that encodes its images apart from the text, such as llava-hf/llava-1.5-7b-hf, "
    "Qwen/Qwen3-VL-4B-Instruct or HuggingFaceTB/SmolVLM-Instruct."
)


@dataclass(frozen=True)
class ModelDirectory:
    """A directory of transformers.

    Attributes:
        option: The command-line option that names it, for messages.
        name: What the user wrote: a path or a Hub id.
        folder: Where its files are.
        settings: The content of its config.json.
    """

    option: str
    name: str
    folder: Path
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.option} {self.name}"

    @property
    def kind(self) -> str:
        """Return the `model_type` of config.json."""
        return self.settings["model_type"]

    @property
    def public_name(self) -> str:
        """Return a Hub id or a relative path unchanged, and only the last part of an absolute path, for cards."""
        return Path(self.name).name if Path(self.name).is_absolute() else self.name

    @property
    def licence(self) -> str | None:
        """Return the licence that the model's card names, or None."""
        return licence_in(self.folder / "README.md")


def licence_in(card: Path) -> str | None:
    """Return the licence that a model card names in its metadata, or None."""
    from huggingface_hub import metadata_load

    try:
        metadata = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, OSError, YAMLError):
        return None  # a card with broken metadata names none
    licence = metadata.get("license")
    if licence == "other":
        licence = metadata.get("license_name") or licence
    return ", ".join(map(str, licence)) if isinstance(licence, list) else licence and str(licence)


def find_directory(name: str, option: str) -> ModelDirectory:
    """Return the directory behind a path or a Hub id, whose weights are not downloaded yet.

    Raises:
        FileNotFoundError: There is no such directory, or it has no config.json.
        ValueError: An adapter, a quantized model, a GSVA, or a config.json that names no type.
    """
    folder = local_directory(name, option, SMALL_FILES)
    given = f"{option} {name}"
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"{given} is an adapter of PEFT, not a whole model. Merge it into its base"
            + (f" ({short_repr(base)})" if base else "")
            + " first (merge_and_unload, then save_pretrained), or pass the base itself."
        )
    settings = read_json(folder / "config.json")
    if not settings:
        raise FileNotFoundError(
            f"{given} is no model in the format of transformers: it has no config.json. Pass a directory that save_pretrained "
            "wrote, or the Hub id of one."
        )
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(
            f"{folder / 'config.json'} names no model_type ({short_repr(kind)}), so nobody knows what to build: download it "
            "again, or pass a model in the format of transformers."
        )
    if kind == "gsva":
        raise ValueError(
            f"{given} is a GSVA already, with its own mask model: run_gres.py --model takes it as it is, and the Auto classes "
            "load it."
        )
    if quantized := _quantization(settings):
        raise ValueError(
            f"{given} is quantized ({short_repr(quantized)}): its numbers cannot be trained or cast. Pass the model before it "
            "was quantized; training quantizes it again by --quantize."
        )
    return ModelDirectory(option, name, folder, settings)


def _quantization(settings: dict[str, Any]) -> str | None:
    """Return the method by which a model, or a part of it, is quantized."""
    parts = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    for part in parts:
        found = part.get("quantization_config")
        if found:
            return str(found.get("quant_method", "unknown method")) if isinstance(found, dict) else str(found)
    return None


def find_base(name: str) -> tuple[ModelDirectory, PreTrainedConfig]:
    """Return the directory and the configuration of a vision-language model.

    Raises:
        FileNotFoundError, NotADirectoryError: There is no model.
        ValueError: Another kind of model. The message says what to give.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    directory = find_directory(name, "--base")
    kind = directory.kind
    if kind.startswith(("sam", "edgetam")):
        raise ValueError(
            f"{directory} is a mask model ({kind}): pass it with --sam, and a vision-language model with --base."
        )
    if kind not in CONFIG_MAPPING:
        has_code = bool(directory.settings.get("auto_map"))
        raise ValueError(
            f"{directory} has model_type {short_repr(kind)}, which this version of transformers does not have"
            + (
                ": its code lies in its own repository, and a GSVA's directory cannot carry code of others. Look for the same "
                "model in the format of transformers (often a repository whose name ends with -hf)."
                if has_code
                else ". Install a newer transformers if it has this type; if not, take another model."
            )
        )
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        what = "reads text only" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "is no vision-language model"
        raise ValueError(f"{directory} {what} (model_type {kind!r}): GSVA must see images. {TRY_INSTEAD}")
    if "mm_vision_tower" in directory.settings:
        raise ValueError(
            f"{directory} is LLaVA in the layout of its authors, which transformers does not read. Pass the same model in the "
            "format of transformers, such as llava-hf/llava-1.5-7b-hf; for LLaVA v1 and the original's GSVA see --llava."
        )
    with naming(directory.folder / "config.json"):
        config = AutoConfig.from_pretrained(directory.folder, trust_remote_code=False)
    if hasattr(config, "auto_map"):  # of code in the base's repository, which is not used
        del config.auto_map
    return directory, config


def find_mask_model(name: str) -> tuple[ModelDirectory, PreTrainedConfig]:
    """Return the directory and the configuration of a mask model; a configuration for videos is read as that for images.

    Raises:
        FileNotFoundError, NotADirectoryError: There is no model.
        ValueError: Another kind of model. The message says what to give.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from modeling_gsva.masks_gsva import mask_config_of

    directory = find_directory(name, "--sam")
    if directory.kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"{directory} is a vision-language model ({directory.kind}): pass it with --base, and a mask model such as "
            "facebook/sam2.1-hiera-base-plus with --sam."
        )
    try:
        return directory, mask_config_of(directory.settings)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def require_weights(directory: ModelDirectory) -> None:
    """Download the weights of a Hub repository, and look at the begin and the size of every file of weights.

    Raises:
        FileNotFoundError: There are none, or a shard is missing.
        ValueError: A file is no weights or not whole. The message says what it is.
    """
    folder = directory.folder
    if is_hub_id(directory.name):
        for pattern in ("model*.safetensors", "pytorch_model*.bin"):
            if local_directory(directory.name, directory.option, [pattern], without=["*/*"]) and any(
                folder.glob(pattern)
            ):
                break  # the second are the same weights once more
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        others = [
            path.name for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".bin", ".gguf", ".pth")
        ]
        raise FileNotFoundError(
            f"{directory} has no weights that transformers reads ({' or '.join(WEIGHTS[::2])}, or the index of their shards)"
            + (f"; it has {listed(others, 4)}" if others else "")
            + ". Copy or download the whole directory again."
        )
    for file in weight_files(found):
        if problem := problem_of(file):
            raise ValueError(f"{file} {problem}.")
