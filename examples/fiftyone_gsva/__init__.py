"""A model source for FiftyOne's zoo (https://docs.voxel51.com/model_zoo/remote.html): masks for expressions.

Copy this folder to the top of a repository on GitHub, then:

    import fiftyone.zoo as foz

    foz.register_zoo_model_source("https://github.com/USER/REPOSITORY")
    model = foz.load_zoo_model("gsva", model="USER/gsva-model", expressions=["the red circle", "all stars"])
    dataset.apply_model(model, label_field="gsva")
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fiftyone as fo
import fiftyone.core.models as fom
import numpy as np
from PIL import Image
from transformers import pipeline


class GsvaModel(fom.Model):
    """Finds expressions in images.

    Args:
        model: A directory or Hub id.
        expressions: What to look for in every image.
        threshold: Reject below this score; by default the model's own.
        options: Of transformers' `pipeline`, such as `device`.
    """

    config = None  # no settings that FiftyOne would change: it filters by confidence and class itself
    media_type = "image"
    ragged_batches = True  # images keep their sizes
    transforms = None
    preprocess = False

    def __init__(self, model: str, expressions: Sequence[str], threshold: float | None = None, **options: Any):
        if isinstance(expressions, str) or not expressions:
            raise ValueError(f"expressions={expressions!r} must be a list of texts to look for, one or more.")
        self.expressions, self.threshold = list(expressions), threshold
        self.segment = pipeline("generalized-referring-segmentation", model=model, trust_remote_code=True, **options)

    def predict(self, arg: np.ndarray) -> fo.Detections:
        """Return the expressions that are in an image (height, width, 3), uint8."""
        return self.predict_all([arg])[0]

    def predict_all(self, args: Sequence[np.ndarray]) -> list[fo.Detections]:
        """Return for each image what is in it. Each detection has its mask inside its box."""
        images = [Image.fromarray(image) for image in args]
        answers = self.segment(images, expressions=self.expressions, threshold=self.threshold, batch_size=len(images))
        return [fo.Detections(detections=[_detection(one) for one in found if _is_there(one)]) for found in answers]


def _is_there(result: dict[str, Any]) -> bool:
    return not result["is_rejected"] and bool(result["mask"].any())


def _detection(result: dict[str, Any]) -> fo.Detection:
    """Return a result as a detection, whose box is relative to the image."""
    mask = result["mask"]
    columns, lines = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    left, right, top, bottom = columns[0], columns[-1] + 1, lines[0], lines[-1] + 1
    height, width = mask.shape
    box = [left / width, top / height, (right - left) / width, (bottom - top) / height]
    return fo.Detection(
        label=result["text"],
        bounding_box=[float(side) for side in box],
        mask=mask[top:bottom, left:right],
        confidence=result["probability"],
    )


def download_model(model_name: str, model_path: str) -> None:
    """Note the name of the model: its weights come from where `load_model` says. FiftyOne calls this once."""
    Path(model_path).write_text(json.dumps({"model": model_name}), encoding="utf-8")


def load_model(model_name: str, model_path: str, **options: Any) -> GsvaModel:
    """Return the model; FiftyOne calls this with the arguments of `load_zoo_model`."""
    return GsvaModel(**options)
