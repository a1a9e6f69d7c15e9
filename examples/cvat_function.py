"""An auto-annotation function for CVAT: masks or polygons for expressions.

    cvat-cli task auto-annotate TASK_ID --function-file examples/cvat_function.py \
        -p model=str:runs/demo -p "expressions=str:the red circle;all stars" --allow-unmatched-labels

The labels of the task are the expressions. `cvat-cli function create-native` makes a function of it for the web page, as
https://docs.cvat.ai/docs/api_sdk/sdk/auto-annotation/ describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cvat_sdk.auto_annotation as cvat
import PIL.Image
from cvat_sdk.masks import encode_mask
from transformers import pipeline

from data_scripts.outlines import mask_outlines

KEEP_ALL = -1e9  # below every score: each expression gets a mask, and CVAT's own threshold decides


class GsvaFunction:
    """A detection function of CVAT.

    Args:
        model: A directory or Hub id.
        expressions: The labels to look for.
        options: Of transformers' `pipeline`, such as `device`.
    """

    def __init__(self, model: str, expressions: Sequence[str], **options: Any):
        self.expressions = list(expressions)
        self.segment = pipeline("generalized-referring-segmentation", model=model, trust_remote_code=True, **options)
        self.spec = cvat.DetectionFunctionSpec(
            labels=[cvat.label_spec(text, number) for number, text in enumerate(self.expressions)]
        )

    def detect(self, context: cvat.DetectionFunctionContext, image: PIL.Image.Image) -> list[cvat.DetectionAnnotation]:
        """Return a mask for each expression that is in the image, or polygons where CVAT wants them."""
        cut = context.conf_threshold
        results = self.segment(image, expressions=self.expressions, threshold=None if cut is None else KEEP_ALL)
        shapes = []
        for label, result in enumerate(results):
            mask = result["mask"]
            if result["is_rejected"] or not mask.any() or (cut is not None and not result["probability"] >= cut):
                continue
            if context.conv_mask_to_poly:
                shapes += [cvat.polygon(label, outline.ravel().tolist()) for outline in mask_outlines(mask)]
            else:
                shapes.append(cvat.mask(label, encode_mask(mask)))
        return shapes


def create(model: str, expressions: str, device: str = "cpu") -> GsvaFunction:
    """Return the function; `cvat-cli` calls this with what follows -p.

    Args:
        expressions: Separated by semicolons.

    Raises:
        ValueError: There are none.
    """
    texts = list(dict.fromkeys(filter(None, map(str.strip, expressions.split(";")))))
    if not texts:
        raise ValueError(f"expressions={expressions!r} names nothing to look for; separate expressions by semicolons.")
    return GsvaFunction(model, texts, device=device)
