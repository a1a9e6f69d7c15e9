"""Compute digests of models and data, to check that a run is resumed with the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_scripts.mixture import Mixture, TrainingDataset

# Settings of a configuration that do not change what a model computes.
NEUTRAL_SETTINGS = frozenset(
    [
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "architectures",
        "_attn_implementation",
        "auto_map",
        "use_cache",
        "quantization_config",
        "_commit_hash",
    ]
)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the content of a tensor as bytes."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def neutral(settings: Any) -> Any:
    """Return nested settings without those that do not change what a model computes."""
    if isinstance(settings, dict):
        return {name: neutral(value) for name, value in settings.items() if name not in NEUTRAL_SETTINGS}
    return [neutral(value) for value in settings] if isinstance(settings, (list, tuple)) else settings


def as_json(value: Any) -> bytes:
    """Return JSON of a value in one order."""
    return json.dumps(value, sort_keys=True, default=str).encode()


def model_digest(model: nn.Module, processor: Any = None) -> str:
    """Return a digest of a model's weights and settings, and of the processor's wording and vocabulary."""
    digest = hashlib.sha256(as_json(neutral(model.config.to_dict())))
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor))
    if processor is not None:
        digest.update(as_json([processor.chat_template, processor.prompts, processor.image_settings()]))
        digest.update(as_json(processor.tokenizer.get_vocab()))
    return digest.hexdigest()[:32]


def data_digest(dataset: TrainingDataset | Mixture) -> str:
    """Return a digest of the rows that training draws from. Of an image outside the rows only the file name counts."""
    parts = [part for family in dataset.sources for part in family] if isinstance(dataset, Mixture) else [dataset]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{type(part.transform).__name__} {len(part.rows)}".encode())
        for piece in _contents(part.rows):
            digest.update(piece)
    return digest.hexdigest()[:32]


def _contents(rows: Sequence[dict[str, Any]]) -> Iterable[bytes]:
    """Yield the content of rows as bytes."""
    if not hasattr(rows, "with_format"):
        for row in rows:
            image = row["image"]
            yield as_json({**row, "image": None})
            yield image.tobytes() if hasattr(image, "tobytes") else _image_content(image)
        return
    for table in rows.with_format("arrow").iter(1000):
        for image in table.column("image").to_pylist():
            yield _image_content(image)
        for batch in table.drop_columns(["image"]).combine_chunks().to_batches():
            yield batch.serialize().to_pybytes()


def _image_content(image: Any) -> bytes:
    if not isinstance(image, dict):
        return str(image).encode()
    return image["bytes"] if image.get("bytes") else Path(image["path"] or "").name.encode()
