"""Keep the outputs of the frozen towers on disk, so that they encode each image once instead of in every epoch."""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data_scripts.files import replacing
from modeling_gsva.image_processing_gsva import sam_preparation
from modeling_gsva.llava_v1_gsva import LlavaV1Config

from .digests import tensor_bytes

logger = logging.getLogger(__name__)
# Largest allowed difference between a stored and a fresh feature, relative to the largest value. It covers the rounding of
# the stored type or of the towers' type, whichever is coarser, and other batch sizes.
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}


def keeps_vision_features(model: nn.Module) -> bool:
    """
    Return whether the vision tower's output is kept beside the mask model's maps: of LLaVA v1 alone, which has one fixed size
    for every image, between tower and projector. What other bases encode has a size for each image, and is often trained.
    """
    return model.config.vlm_config.model_type == LlavaV1Config.model_type


def towers_digest(model: nn.Module) -> str:
    """Return a SHA-256 of everything that the kept outputs depend on: weights, settings, and how images are prepared."""
    config, digest = model.config, hashlib.sha256()
    facts: list[Any] = [config.vision_config.to_dict()] if keeps_vision_features(model) else []
    facts.append(config.sam_config.vision_config.to_dict())
    # Settings that do not change the outputs.
    hidden = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "_attn_implementation"}
    facts = [{name: value for name, value in fact.items() if name not in hidden} for fact in facts]
    if keeps_vision_features(model):
        facts += [config.vision_feature_layer, config.vision_feature_select_strategy]
    if not keeps_vision_features(model) or config.sam_config.model_type != "sam":  # caches of before keep their names
        facts += [config.sam_config.model_type, sam_preparation(config.sam_config)]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for part in _towers(model):
        tensors = {"": part} if isinstance(part, nn.Parameter) else part.state_dict()
        for name, tensor in tensors.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _towers(model: nn.Module) -> list[nn.Module | nn.Parameter]:
    """Return the parts on which the kept outputs depend."""
    vision = [model.model.vision_tower] if keeps_vision_features(model) else []
    return [*vision, *model.masks.encoding_parts().values()]


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    parts = _towers(model)
    return [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]


def _contiguous_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that shares no memory with the rest of the batch."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _named_maps(maps: torch.Tensor | list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a mask model's maps by the names that they have in a file."""
    if isinstance(maps, torch.Tensor):
        return {"sam_embeddings": maps}
    return {f"sam_embeddings.{number}": part for number, part in enumerate(maps)}


class FeatureCache:
    """
    Features by image: one safetensors file each, `FOLDER/TOWERS/IMAGE.safetensors`, with all its maps, named by the digests of
    the towers and of the image's pixels as the towers get them. Kept are the maps of the mask model, and of LLaVA v1 the
    vision tower's output as well. Several processes may share a folder, a killed run leaves no partial
    file, and later runs find the features of earlier ones.

    Args:
        folder: Folder for the files.
        model: A [`GsvaForConditionalGeneration`]; its towers must be frozen.
        dtype: Type in which features are stored.
        verify_every: One in so many features that are read is compared with a fresh one, beginning with the first.

    Raises:
        ValueError: A tower is trained, or a stored feature differs from the tower's output.
    """

    def __init__(
        self, folder: str | Path, model: nn.Module, dtype: torch.dtype = torch.float16, verify_every: int = 1000
    ):
        self.model, self.dtype, self.verify_every = model, dtype, verify_every
        self.keeps_vision = keeps_vision_features(model)
        if any(parameter.requires_grad for parameter in _parameters(model)):
            towers = "the vision tower or " * self.keeps_vision + "the mask model's encoder"
            raise ValueError(f"feature_cache stores the outputs of frozen towers, but {towers} is trained.")
        kind = str(dtype).removeprefix("torch.")
        self.folder = Path(folder) / f"{towers_digest(model)[:16]}-{kind}"
        self.hits = self.misses = 0

    @property
    def bytes_per_image(self) -> int:
        """Return the size of one image's features in bytes."""
        maps = _named_maps(self.model.masks.empty(torch.empty(0, device="meta")))
        numbers = sum(part.numel() for part in maps.values())
        if self.keeps_vision:
            numbers += self.model.config.image_seq_length * self.model.config.vision_config.hidden_size
        return numbers * self.dtype.itemsize

    def disk_report(self, images: int) -> str:
        """
        Return a sentence about the disk space that the features of `images` images take. Nothing is written.

        Raises:
            ValueError: There is not enough free disk space.
        """
        stored = sum(1 for _ in self.folder.glob("[0-9a-f]*.safetensors"))
        present = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free, needed = shutil.disk_usage(present).free, max(images - stored, 0) * self.bytes_per_image
        report = (
            f"{self.folder}: features of {images} images take {images * self.bytes_per_image / 1e9:.2f} GB "
            f"({self.bytes_per_image / 1e6:.1f} MB each, {self.model.config.sam_config.model_type}), "
            f"{stored} are stored, {free / 1e9:.1f} GB are free"
        )
        if needed > free:
            raise ValueError(f"{report}; give another --feature_cache, or train without it.")
        return report

    def fill(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the model's inputs with features in place of pixels, read from the cache or computed and stored."""
        names = ("pixel_values", "sam_pixel_values") if self.keeps_vision else ("sam_pixel_values",)
        if any(inputs.get(name) is None for name in names):
            return inputs
        inputs = dict(inputs)
        pixels = [inputs.pop(name) for name in names]
        paths = [self.folder / f"{self._name(image)}.safetensors" for image in zip(*pixels)]
        stored = [self._read(path) for path in paths]
        missing = [n for n, features in enumerate(stored) if features is None]
        computed = dict(zip(missing, self._encode([part[missing] for part in pixels])))
        for n, new_features in computed.items():
            self._write(paths[n], new_features)
        for n, features in enumerate(stored):
            if features is not None:
                if self.hits % self.verify_every == 0:
                    self._verify(paths[n], features, [part[n : n + 1] for part in pixels])
                self.hits += 1
        self.misses += len(missing)
        batch = [computed[n] if features is None else features for n, features in enumerate(stored)]
        # Convert first: autocast in bfloat16 refuses to stack float16.
        kept = {
            name: torch.stack([features[name].to(pixels[0].device, self.model.dtype) for features in batch])
            for name in self._names()
        }
        maps = [kept.pop(name) for name in self._names() if name.startswith("sam_embeddings")]
        return {**inputs, **kept, "sam_embeddings": maps[0] if len(maps) == 1 else maps}

    def _names(self) -> list[str]:
        """Return the names of an image's tensors in its file."""
        maps = _named_maps(self.model.masks.empty(torch.empty(0, device="meta")))
        return [*(["vision_features"] if self.keeps_vision else []), *maps]

    def _name(self, image: tuple[torch.Tensor, ...]) -> str:
        digest = hashlib.sha256()
        for pixels in image:
            digest.update(tensor_bytes(pixels))
        return digest.hexdigest()

    def _encode(self, pixels: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Encode images given as the tensors of each tower, the mask model's last."""
        if not len(pixels[-1]):
            return []
        # In the towers' type, so that the features serve runs with and without autocast.
        with torch.no_grad(), torch.autocast(pixels[-1].device.type, enabled=False):
            features = (
                {"vision_features": self.model.model.get_vision_features(pixels[0])} if self.keeps_vision else {}
            )
            features |= _named_maps(self.model.get_sam_embeddings(pixels[-1]))
        features = {name: value.to(self.dtype).cpu() for name, value in features.items()}
        return [{name: _contiguous_copy(value[n]) for name, value in features.items()} for n in range(len(pixels[-1]))]

    def _read(self, path: Path) -> dict[str, torch.Tensor] | None:
        try:
            features = load_file(path)
            return features if features.keys() >= set(self._names()) else None
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read (%s); its features are computed again.", path, error)
            return None

    def _write(self, path: Path, features: dict[str, torch.Tensor]) -> None:
        with replacing(path) as temporary:
            save_file(features, temporary)

    def _verify(self, path: Path, features: dict[str, torch.Tensor], pixels: list[torch.Tensor]) -> None:
        (fresh,) = self._encode(pixels)
        tower_dtypes = {parameter.dtype for parameter in _parameters(self.model)}
        tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in {self.dtype, *tower_dtypes})
        for name, value in fresh.items():
            difference = float((features[name].float() - value.float()).abs().max())
            allowed = tolerance * max(float(value.float().abs().max()), 1e-6)
            if features[name].shape != value.shape or not difference <= allowed:
                raise ValueError(
                    f"{path}: {name} differ by {difference:.3g} from the tower's output (allowed: {allowed:.3g}); "
                    f"delete {self.folder} and start again."
                )
