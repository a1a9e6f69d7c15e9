"""What the frozen towers see in a picture, kept on disk: CLIP and SAM need not look at it again in every epoch."""

import hashlib
import json
import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

logger = logging.getLogger(__name__)
# How far a kept feature may be from a fresh one, relative to the largest: rounding of the type it is kept in or the towers
# compute in, whichever is coarser, and batches of other sizes.
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}


def fingerprint(model: nn.Module) -> str:
    """Of the towers' weights (names, shapes, types and bytes), and of what their outputs depend on beside them."""
    config, digest = model.config, hashlib.sha256()
    facts = [config.vision_config.to_dict(), config.sam_config.vision_config.to_dict()]
    # How they were loaded and by which release says nothing about what they compute.
    hidden = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "_attn_implementation"}
    facts = [{name: value for name, value in fact.items() if name not in hidden} for fact in facts]
    facts += [config.vision_feature_layer, config.vision_feature_select_strategy]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for tower in _towers(model):
        for name, tensor in tower.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _towers(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model.model.vision_tower, model.sam.vision_encoder


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)  # of one picture, in the order of its file


class FeatureCache:
    """
    Features by picture: one safetensors file each, `FOLDER/WEIGHTS/PICTURE.safetensors`, named by the digests of the
    towers' weights and of the picture as the towers get it. Files are written aside and moved, so several processes may
    share a folder and a killed run leaves no half file; what is there is found again.

    Args:
        folder: Where to keep them.
        model: Of [`GsvaForConditionalGeneration`]; its towers must be frozen.
        dtype: To keep them in.
        verify_every: Every so many features read, one is compared with a fresh one, the first among them.

    Raises:
        ValueError: a tower is trained, or a kept feature is not what the tower gives.
    """

    def __init__(
        self, folder: str | Path, model: nn.Module, dtype: torch.dtype = torch.float16, verify_every: int = 1000
    ):
        self.model, self.dtype, self.verify_every = model, dtype, verify_every
        if any(parameter.requires_grad for tower in _towers(model) for parameter in tower.parameters()):
            raise ValueError(
                "feature_cache keeps what frozen towers give, but the vision tower or SAM's encoder is trained."
            )
        kind = str(dtype).removeprefix("torch.")
        self.folder = Path(folder) / f"{fingerprint(model)[:16]}-{kind}"
        self.hits = self.misses = 0

    @property
    def bytes_per_picture(self) -> int:
        vision, sam = self.model.config.vision_config, self.model.config.sam_config.vision_config
        numbers = self.model.config.image_seq_length * vision.hidden_size
        numbers += sam.output_channels * (sam.image_size // sam.patch_size) ** 2
        return numbers * self.dtype.itemsize

    def announce(self, pictures: int) -> str:
        """
        What the features of so many pictures take, and what there is.

        Raises:
            ValueError: the disk is too small.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        there = sum(1 for _ in self.folder.glob("*.safetensors"))
        free, needed = shutil.disk_usage(self.folder).free, max(pictures - there, 0) * self.bytes_per_picture
        said = (
            f"{self.folder}: features of {pictures} pictures take {pictures * self.bytes_per_picture / 1e9:.2f} GB, "
            f"{there} are there, {free / 1e9:.1f} GB are free"
        )
        if needed > free:
            raise ValueError(f"{said}; give another --feature_cache, or train without.")
        return said

    def fill(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the model with features in the place of pixels, read or made and kept."""
        if inputs.get("pixel_values") is None or inputs.get("sam_pixel_values") is None:
            return inputs
        inputs = dict(inputs)
        pixels, sam_pixels = inputs.pop("pixel_values"), inputs.pop("sam_pixel_values")
        paths = [self.folder / f"{self._name(*pair)}.safetensors" for pair in zip(pixels, sam_pixels)]
        kept = [self._read(path) for path in paths]
        missing = [n for n, features in enumerate(kept) if features is None]
        made = dict(zip(missing, self._encode(pixels[missing], sam_pixels[missing])))
        for n, features in made.items():
            self._write(paths[n], features)
        for n, known in enumerate(kept):
            if known is not None:
                if self.hits % self.verify_every == 0:
                    self._verify(paths[n], known, pixels[n : n + 1], sam_pixels[n : n + 1])
                self.hits += 1
        self.misses += len(missing)
        whole = [made[n] if known is None else known for n, known in enumerate(kept)]
        for name in ("vision_features", "sam_embeddings"):
            # Converted first: autocast in bfloat16 refuses to stack float16.
            values = [features[name].to(pixels.device, self.model.dtype) for features in whole]
            inputs[name] = torch.stack(values)
        return inputs

    def _name(self, pixels: torch.Tensor, sam_pixels: torch.Tensor) -> str:
        digest = hashlib.sha256(_bytes(pixels))
        digest.update(_bytes(sam_pixels))
        return digest.hexdigest()

    def _encode(self, pixels: torch.Tensor, sam_pixels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        if not len(pixels):
            return []
        # In the towers' own type, so that kept features serve runs with autocast and without.
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            vision = self.model.model.get_vision_features(pixels).to(self.dtype).cpu()
            sam = self.model.get_sam_embeddings(sam_pixels).to(self.dtype).cpu()
        return [{"vision_features": _own(v), "sam_embeddings": _own(s)} for v, s in zip(vision, sam)]

    def _read(self, path: Path) -> dict[str, torch.Tensor] | None:
        try:
            features = load_file(path)
            return features if {"vision_features", "sam_embeddings"} <= features.keys() else None
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read (%s); it is made again.", path, error)
            return None

    def _write(self, path: Path, features: dict[str, torch.Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # a process's number is not unique on shared disks
        save_file(features, temporary)
        temporary.replace(path)

    def _verify(self, path: Path, features: dict[str, torch.Tensor], pixels, sam_pixels) -> None:
        (fresh,) = self._encode(pixels, sam_pixels)
        tower_dtypes = {parameter.dtype for tower in _towers(self.model) for parameter in tower.parameters()}
        tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in {self.dtype, *tower_dtypes})
        for name, value in fresh.items():
            worst = float((features[name].float() - value.float()).abs().max())
            allowed = tolerance * max(float(value.float().abs().max()), 1e-6)
            if features[name].shape != value.shape or not worst <= allowed:
                raise ValueError(
                    f"{path} holds {name} that differ by {worst:.3g} from what the tower gives (allowed {allowed:.3g}); "
                    f"delete {self.folder} and start again."
                )
