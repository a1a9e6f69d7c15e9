"""Keep the outputs of the frozen towers on disk, so that CLIP and SAM encode each image once instead of in every epoch."""

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

from .digests import tensor_bytes

logger = logging.getLogger(__name__)
# Largest allowed difference between a stored and a fresh feature, relative to the largest value. It covers the rounding of
# the stored type or of the towers' type, whichever is coarser, and other batch sizes.
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}


def towers_digest(model: nn.Module) -> str:
    """Return a SHA-256 of everything that the towers' outputs depend on: their weights and their settings."""
    config, digest = model.config, hashlib.sha256()
    facts = [config.vision_config.to_dict(), config.sam_config.vision_config.to_dict()]
    # Settings that do not change the outputs.
    hidden = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "_attn_implementation"}
    facts = [{name: value for name, value in fact.items() if name not in hidden} for fact in facts]
    facts += [config.vision_feature_layer, config.vision_feature_select_strategy]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for tower in _towers(model):
        for name, tensor in tower.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _towers(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model.model.vision_tower, model.sam.vision_encoder


def _contiguous_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that shares no memory with the rest of the batch."""
    return tensor.clone(memory_format=torch.contiguous_format)


class FeatureCache:
    """
    Features by image: one safetensors file each, `FOLDER/TOWERS/IMAGE.safetensors`, named by the digests of the towers
    and of the image's pixels as the towers get them. Several processes may share a folder, a killed run leaves no partial
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
        if any(parameter.requires_grad for tower in _towers(model) for parameter in tower.parameters()):
            raise ValueError(
                "feature_cache stores the outputs of frozen towers, but the vision tower or SAM's encoder is trained."
            )
        kind = str(dtype).removeprefix("torch.")
        self.folder = Path(folder) / f"{towers_digest(model)[:16]}-{kind}"
        self.hits = self.misses = 0

    @property
    def bytes_per_image(self) -> int:
        """Return the size of one image's features in bytes."""
        vision, sam = self.model.config.vision_config, self.model.config.sam_config.vision_config
        numbers = self.model.config.image_seq_length * vision.hidden_size
        numbers += sam.output_channels * (sam.image_size // sam.patch_size) ** 2
        return numbers * self.dtype.itemsize

    def disk_report(self, images: int) -> str:
        """
        Return a sentence about the disk space that the features of `images` images take.

        Raises:
            ValueError: There is not enough free disk space.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = sum(1 for _ in self.folder.glob("[0-9a-f]*.safetensors"))
        free, needed = shutil.disk_usage(self.folder).free, max(images - stored, 0) * self.bytes_per_image
        report = (
            f"{self.folder}: features of {images} images take {images * self.bytes_per_image / 1e9:.2f} GB, "
            f"{stored} are stored, {free / 1e9:.1f} GB are free"
        )
        if needed > free:
            raise ValueError(f"{report}; give another --feature_cache, or train without it.")
        return report

    def fill(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the model's inputs with features in place of pixels, read from the cache or computed and stored."""
        if inputs.get("pixel_values") is None or inputs.get("sam_pixel_values") is None:
            return inputs
        inputs = dict(inputs)
        pixels, sam_pixels = inputs.pop("pixel_values"), inputs.pop("sam_pixel_values")
        paths = [self.folder / f"{self._name(*pair)}.safetensors" for pair in zip(pixels, sam_pixels)]
        stored = [self._read(path) for path in paths]
        missing = [n for n, features in enumerate(stored) if features is None]
        computed = dict(zip(missing, self._encode(pixels[missing], sam_pixels[missing])))
        for n, new_features in computed.items():
            self._write(paths[n], new_features)
        for n, features in enumerate(stored):
            if features is not None:
                if self.hits % self.verify_every == 0:
                    self._verify(paths[n], features, pixels[n : n + 1], sam_pixels[n : n + 1])
                self.hits += 1
        self.misses += len(missing)
        batch = [computed[n] if features is None else features for n, features in enumerate(stored)]
        for name in ("vision_features", "sam_embeddings"):
            # Convert first: autocast in bfloat16 refuses to stack float16.
            values = [features[name].to(pixels.device, self.model.dtype) for features in batch]
            inputs[name] = torch.stack(values)
        return inputs

    def _name(self, pixels: torch.Tensor, sam_pixels: torch.Tensor) -> str:
        digest = hashlib.sha256(tensor_bytes(pixels))
        digest.update(tensor_bytes(sam_pixels))
        return digest.hexdigest()

    def _encode(self, pixels: torch.Tensor, sam_pixels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        if not len(pixels):
            return []
        # In the towers' type, so that the features serve runs with and without autocast.
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            vision = self.model.model.get_vision_features(pixels).to(self.dtype).cpu()
            sam = self.model.get_sam_embeddings(sam_pixels).to(self.dtype).cpu()
        return [
            {"vision_features": _contiguous_copy(v), "sam_embeddings": _contiguous_copy(s)}
            for v, s in zip(vision, sam)
        ]

    def _read(self, path: Path) -> dict[str, torch.Tensor] | None:
        try:
            features = load_file(path)
            return features if {"vision_features", "sam_embeddings"} <= features.keys() else None
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read (%s); its features are computed again.", path, error)
            return None

    def _write(self, path: Path, features: dict[str, torch.Tensor]) -> None:
        with replacing(path) as temporary:
            save_file(features, temporary)

    def _verify(self, path: Path, features: dict[str, torch.Tensor], pixels, sam_pixels) -> None:
        (fresh,) = self._encode(pixels, sam_pixels)
        tower_dtypes = {parameter.dtype for tower in _towers(self.model) for parameter in tower.parameters()}
        tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in {self.dtype, *tower_dtypes})
        for name, value in fresh.items():
            difference = float((features[name].float() - value.float()).abs().max())
            allowed = tolerance * max(float(value.float().abs().max()), 1e-6)
            if features[name].shape != value.shape or not difference <= allowed:
                raise ValueError(
                    f"{path}: {name} differ by {difference:.3g} from the tower's output (allowed: {allowed:.3g}); "
                    f"delete {self.folder} and start again."
                )
