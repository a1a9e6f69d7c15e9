"""A backend for Label Studio's machine learning SDK (https://github.com/HumanSignal/label-studio-ml-backend): brush masks.

    label-studio-ml create gsva_backend                       # makes the folder and its server, _wsgi.py
    cp examples/label_studio_backend.py gsva_backend/model.py
    GSVA_MODEL=runs/demo label-studio-ml start gsva_backend

The labels of the project's <BrushLabels> are the expressions. Where a task's data has a list "expressions", only those of
them are asked for that are labels, too.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from label_studio_ml.model import LabelStudioMLBase
from label_studio_ml.response import ModelResponse
from transformers import pipeline

from data_scripts.export_formats import Answer, brush_result
from data_scripts.masks import encode_mask

MODEL = "GSVA_MODEL"


@cache
def segmenter() -> Any:
    """Return the pipeline of the model that the environment variable GSVA_MODEL names; each process loads it once.

    Raises:
        ValueError: The variable is not set.
    """
    if not os.environ.get(MODEL):
        raise ValueError(f"{MODEL} is not set; give it the directory or Hub id of a GSVA model.")
    return pipeline("generalized-referring-segmentation", model=os.environ[MODEL], trust_remote_code=True)


class GsvaBackend(LabelStudioMLBase):
    """Predicts brush masks for the labels of a project."""

    def setup(self) -> None:
        """Name the version that predictions carry. Label Studio calls this for each project."""
        self.set("model_version", os.path.basename(os.environ.get(MODEL, "gsva").rstrip("/")))

    def predict(
        self, tasks: list[dict[str, Any]], context: dict[str, Any] | None = None, **kwargs: Any
    ) -> ModelResponse:
        """Return one prediction for each task: a mask for each label that is in the image."""
        brush, image, key = self.label_interface.get_first_tag_occurence("BrushLabels", "Image")
        labels = list(self.label_interface.get_tag(brush).labels)
        predictions = [self._predict(task, labels, brush, image, key) for task in tasks]
        return ModelResponse(predictions=predictions, model_version=self.get("model_version"))

    def _predict(self, task: dict[str, Any], labels: list[str], brush: str, image: str, key: str) -> dict[str, Any]:
        """Return the prediction for a task whose data has the image's address in `key`."""
        wanted = task["data"].get("expressions")
        texts = [label for label in labels if wanted is None or label in wanted]
        if not texts:
            return {"result": [], "score": 0.0}
        path = self.get_local_path(task["data"][key], task_id=task.get("id"))
        found = [one for one in segmenter()(path, expressions=texts) if not one["is_rejected"] and one["mask"].any()]
        results = []
        for number, one in enumerate(found):
            answer = Answer(one["text"], encode_mask(one["mask"]), one["probability"])
            result = brush_result(number, answer, *one["mask"].shape)
            results.append({**result, "from_name": brush, "to_name": image})
        score = sum(one["probability"] for one in found) / len(found) if found else 0.0
        return {"result": results, "score": score}
