"""Rows, settings and interruptions for the tests of evaluation."""

import numpy as np

from data_scripts.schema import encode_mask
from evaluation.config import EvaluationConfig
from evaluation.loop import evaluate_rows
from evaluation.resume import EvaluationProgress, evaluation_identity


def mask_of(height, width, box):
    """A box (top, left, bottom, right) as run-length encoding; None is empty."""
    mask = np.zeros((height, width), np.uint8)
    if box is not None:
        mask[box[0] : box[2], box[1] : box[3]] = 1
    return encode_mask(mask)


def config_of(rows, **options):
    options = {"dataset": "grefcoco", "split": "val", "batch_size": 2, "max_new_tokens": 8, **options}
    return EvaluationConfig(rows=rows, **options)


def evaluate_to(file, model, processor, config, resume=True, save_masks=False):
    """Evaluate with a rows file, as `run_evaluation` does."""
    identity = evaluation_identity(model, processor, config)
    with EvaluationProgress(file, identity, resume, save_masks) as progress:
        return evaluate_rows(model, processor, config, progress)


class Killed(Exception):
    pass


def kill_after(monkeypatch, model, batches):
    """The model dies when it is asked for one batch more."""
    segment, count = model.segment, iter(range(batches))

    def dying(*args, **kwargs):
        if next(count, None) is None:
            raise Killed
        return segment(*args, **kwargs)

    monkeypatch.setattr(model, "segment", dying)
