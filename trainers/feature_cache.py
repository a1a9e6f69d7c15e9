"""Keep the outputs of the frozen towers on disk, so that they encode each image once instead of in every epoch."""

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data_scripts.files import replacing
from modeling_gsva.image_processing_gsva import sam_preparation
from modeling_gsva.llava_v1_gsva import LlavaV1Config
from modeling_gsva.transfer_gsva import upload

from .digests import tensor_bytes

logger = logging.getLogger(__name__)
# Largest allowed difference between a stored and a fresh feature, relative to the largest value. It covers the rounding of
# the stored type or of the towers' type, whichever is coarser, and other batch sizes.
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}

# What `FeatureFiles.look_up` adds to a batch. Lists, which data loaders pin and move where they hold tensors.
NAMES = "image_names"  # of every image: its file's name
STORED = "stored_images"  # numbers of the images whose features were found,
FEATURES = "stored_features"  # and these: for each tensor of a file one of (images found, ...)
FRESH = "fresh_images"  # numbers of the images whose pixels are still in the batch


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


def _named_maps(maps: torch.Tensor | list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a mask model's maps by the names that they have in a file."""
    if isinstance(maps, torch.Tensor):
        return {"sam_embeddings": maps}
    return {f"sam_embeddings.{number}": part for number, part in enumerate(maps)}


class FeatureFiles:
    """
    The files of a [`FeatureCache`], without the model: what the workers of a data loader need of it.

    Args:
        folder: Folder of the files.
        pixels: Names of the inputs whose bytes name an image's file; features take their place.
        tensors: Names of the tensors in a file.
        verify_every: One in so many features that are read keeps its pixels, to be compared, beginning with the first.
    """

    def __init__(self, folder: Path, pixels: tuple[str, ...], tensors: tuple[str, ...], verify_every: int):
        self.folder, self.pixels, self.tensors, self.verify_every = folder, pixels, tensors, verify_every
        # Shared with the workers of every epoch. Two that count at once may miss one, which only moves a comparison.
        self.reads = torch.zeros((), dtype=torch.long).share_memory_()

    def name(self, image: tuple[torch.Tensor, ...]) -> str:
        """Return the name of an image's file: the SHA-256 of its pixels as each tower gets them."""
        digest = hashlib.sha256()
        for pixels in image:
            digest.update(tensor_bytes(pixels))
        return digest.hexdigest()

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def read(self, name: str) -> dict[str, torch.Tensor] | None:
        """Return an image's features on the CPU; None if there are none that can be read."""
        try:
            features = load_file(self.path(name))
            return features if features.keys() >= set(self.tensors) else None
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read (%s); its features are computed again.", self.path(name), error)
            return None

    def write(self, name: str, features: dict[str, torch.Tensor]) -> None:
        """Store an image's features, whole or not at all."""
        with replacing(self.path(name)) as temporary:
            save_file(features, temporary)

    def is_compared(self) -> bool:
        """Count a read, and return whether it is one to be compared with fresh features."""
        number = int(self.reads)
        self.reads += 1
        return number % self.verify_every == 0

    def look_up(self, batch: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """
        Return a batch with the stored features of its images. Pixels stay of those images alone whose features are not there, or
        are to be compared; a batch without images stays as it is.
        """
        if any(batch.get(name) is None for name in self.pixels):
            return batch
        batch = copy.copy(batch)
        pixels = [batch.pop(name) for name in self.pixels]
        names = [self.name(image) for image in zip(*pixels)]
        found = {n: features for n, name in enumerate(names) if (features := self.read(name)) is not None}
        fresh = [n for n in range(len(names)) if n not in found or self.is_compared()]
        if fresh:
            batch.update({name: part[fresh] for name, part in zip(self.pixels, pixels)})
        stacked = [torch.stack([of[name] for of in found.values()]) for name in self.tensors] if found else []
        batch.update({NAMES: names, STORED: list(found), FEATURES: stacked, FRESH: fresh})
        return batch


@dataclass
class LookingUp:
    """Collates with `collator`, and looks the images up in the process that collates."""

    collator: Callable[[list], MutableMapping[str, Any]]
    files: FeatureFiles

    def __call__(self, examples: list) -> MutableMapping[str, Any]:
        return self.files.look_up(self.collator(examples))


class FeatureCache:
    """
    Features by image: one safetensors file each, `FOLDER/TOWERS/IMAGE.safetensors`, with all its maps, named by the digests of
    the towers and of the image's pixels as the towers get them. Kept are the maps of the mask model, and of LLaVA v1 the
    vision tower's output as well. Several processes may share a folder, a killed run leaves no partial
    file, and later runs find the features of earlier ones.

    How a batch goes through it: where it is made, on the CPU and in a worker of the data loader if there are any, `collator`
    digests each image's pixels and puts the stored features in their place. The data loader moves what is left to the device,
    so that pixels travel of those images alone whose features are not stored yet, or are compared this time. `fill` encodes these,
    stores or compares them, and makes one tensor of all. On a warm cache it reads nothing back from the device.

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
        self.model, self.dtype = model, dtype
        self.keeps_vision = keeps_vision_features(model)
        if any(parameter.requires_grad for parameter in _parameters(model)):
            towers = "the vision tower or " * self.keeps_vision + "the mask model's encoder"
            raise ValueError(f"feature_cache stores the outputs of frozen towers, but {towers} is trained.")
        kind = str(dtype).removeprefix("torch.")
        self.folder = Path(folder) / f"{towers_digest(model)[:16]}-{kind}"
        vision = self.keeps_vision
        maps = _named_maps(model.masks.empty(torch.empty(0, device="meta")))
        self.files = FeatureFiles(
            self.folder,
            pixels=(*["pixel_values"] * vision, "sam_pixel_values"),
            tensors=(*["vision_features"] * vision, *maps),
            verify_every=verify_every,
        )
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

    def collator(self, collator: Callable[[list], MutableMapping[str, Any]]) -> LookingUp:
        """Return a collator for the data loader that looks up the images of `collator`'s batches."""
        return LookingUp(collator, self.files)

    def fill(self, inputs: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """
        Return the model's inputs with features in place of pixels, read from the cache or computed and stored.

        A batch that no `collator` has looked up is looked up first; on a device, that copies its pixels back to the host.

        Raises:
            ValueError: A stored feature differs from the tower's output.
        """
        # Features are computed in the towers' type, so that they serve runs with and without autocast.
        with torch.autocast(self.model.device.type, enabled=False):
            looked_up = inputs if NAMES in inputs else self.files.look_up(inputs)
            return self._filled(dict(looked_up)) if NAMES in looked_up else inputs

    def _filled(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device = self.model.device
        names, stored, features, fresh = (inputs.pop(key) for key in (NAMES, STORED, FEATURES, FRESH))
        pixels = dict(zip(fresh, zip(*(inputs.pop(name) for name in self.files.pixels if name in inputs))))
        rows = dict(zip(stored, zip(*(upload(part, device) for part in features))))
        compared = {n for n in fresh if n in rows}
        for n in fresh:  # another batch or process may have stored it since this one was made
            if n not in rows and (late := self.files.read(names[n])) is not None:
                rows[n] = tuple(upload(late[name], device) for name in self.files.tensors)
                if self.files.is_compared():
                    compared.add(n)
        encoded = [n for n in fresh if n in compared or n not in rows]
        for n, row in zip(encoded, self._encode([pixels[n] for n in encoded])):
            if n in compared:
                self._compare(self.files.path(names[n]), rows[n], row)
            else:
                rows[n] = row
        new = [n for n in encoded if n not in compared]
        self._store({names[n]: rows[n] for n in new})
        self.misses += len(new)
        self.hits += len(names) - len(new)
        columns = zip(*(rows[n] for n in range(len(names))))
        kept = [torch.stack([row.to(self.model.dtype) for row in column]) for column in columns]
        vision = {"vision_features": kept.pop(0)} if self.keeps_vision else {}
        return {**inputs, **vision, "sam_embeddings": kept[0] if len(kept) == 1 else kept}

    def _encode(self, images: list[tuple[torch.Tensor, ...]]) -> list[tuple[torch.Tensor, ...]]:
        """Return the features of images, each given as the pixels of each tower, in the type in which they are stored."""
        if not images:
            return []
        pixels = [torch.stack(part) for part in zip(*images)]
        with torch.no_grad():
            features = [self.model.model.get_vision_features(pixels[0])] if self.keeps_vision else []
            features += _named_maps(self.model.get_sam_embeddings(pixels[-1])).values()
        return list(zip(*(part.to(self.dtype) for part in features)))

    def _store(self, rows: dict[str, tuple[torch.Tensor, ...]]) -> None:
        """Write the features of images by name, copied to the host in one copy for each tensor of a file."""
        columns = [torch.stack(column).cpu() for column in zip(*rows.values())]
        for name, row in zip(rows, zip(*columns)):
            self.files.write(name, {tensor: part.contiguous() for tensor, part in zip(self.files.tensors, row)})

    def _compare(self, path: Path, stored: tuple[torch.Tensor, ...], fresh: tuple[torch.Tensor, ...]) -> None:
        tower_dtypes = {parameter.dtype for parameter in _parameters(self.model)}
        tolerance = max(TOLERANCES.get(dtype, 0.0) for dtype in {self.dtype, *tower_dtypes})
        for name, kept, value in zip(self.files.tensors, stored, fresh):
            difference = float((kept.float() - value.float()).abs().max())
            allowed = tolerance * max(float(value.float().abs().max()), 1e-6)
            if kept.shape != value.shape or not difference <= allowed:
                raise ValueError(
                    f"{path}: {name} differ by {difference:.3g} from the tower's output (allowed: {allowed:.3g}); "
                    f"delete {self.folder} and start again."
                )
