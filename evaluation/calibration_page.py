"""The page of a calibration: reliability, risk against coverage, and N_acc against T_acc, before and after."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from data_scripts.files import render
from metrics.gres.presence import bin_of, reliability

from . import calibration
from .calibration import Scores, sigmoid
from .drawing import data_url
from .pages import TEMPLATES

GRID = 101  # points of a curve
BAND_RESAMPLES = 200
BINS = 10


def calibration_page(data: Scores, probabilities: np.ndarray, result: dict[str, Any]) -> str:
    """Return the page of a calibration, measured on these scores and their calibrated probabilities (expressions,)."""
    return render(
        TEMPLATES / "calibration.html.jinja",
        result=result,
        figures={
            "Reliability: how often an expression is there when the model says so with this probability": _reliability(
                data, probabilities
            ),
            "Risk and coverage: the share of no-targets among the expressions that are kept": _risk(data, result),
            "N_acc against T_acc over the threshold, with the chosen point": _accuracies(data, result),
        },
    )


def _figure(draw: Callable) -> str:
    """Return a figure as a data URL. `draw` gets its axes."""
    from matplotlib.figure import Figure  # pyplot would need a window system and global state

    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    buffer.seek(0)
    return data_url(Image.open(buffer))


def _reliability(data: Scores, calibrated: np.ndarray) -> str:
    curves = {"before": sigmoid(data.scores), "after, on images not fitted on": calibrated}

    def draw(axes) -> None:
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1, label="perfect")
        for label, probabilities in curves.items():
            table = reliability(probabilities, data.is_present, BINS)
            centres = np.array([line["probability"] for line in table])
            shares = np.array([line["share"] for line in table])
            bins = bin_of(probabilities, BINS)
            bounds = np.array([_share_interval(data, np.flatnonzero(bins == place)) for place in np.unique(bins)])
            errors = np.abs(bounds.T - shares)
            axes.errorbar(centres, shares, yerr=errors, marker="o", capsize=3, label=label)
        axes.set(xlabel="probability", ylabel="share with a target", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))

    return _figure(draw)


def _share_interval(data: Scores, chosen: np.ndarray) -> tuple[float, float]:
    """Return the bootstrap interval of the share of targets among some expressions, with images as the unit."""
    part = data.select(chosen)
    images = np.unique(part.images, return_inverse=True)[1]
    return calibration.bootstrap(
        Scores(part.scores, part.is_present, images), lambda drawn: float(drawn.is_present.mean())
    )


def _band(data: Scores, curve: Callable[[Scores], np.ndarray]) -> np.ndarray:
    """Return the 95 % bootstrap band (2, points) of a curve, with images as the unit."""
    samples = calibration.resampled(data, BAND_RESAMPLES)
    values = [curve(drawn) for drawn in samples if drawn.is_present.any() and not drawn.is_present.all()]
    return np.nanquantile(np.stack(values), [0.025, 0.975], axis=0)


def risk_at_coverages(data: Scores) -> np.ndarray:
    """Return the share of no-targets among the kept expressions (GRID,), where the most probable ones are kept."""
    wrong = np.cumsum(~data.is_present[np.argsort(-data.scores, kind="stable")])
    counts = np.maximum(np.round(np.linspace(0, 1, GRID) * len(wrong)).astype(int), 1)
    return wrong[counts - 1] / counts


def _risk(data: Scores, result: dict[str, Any]) -> str:
    coverage, band = np.linspace(0, 1, GRID), _band(data, risk_at_coverages)

    def draw(axes) -> None:
        axes.plot(coverage, risk_at_coverages(data), label="risk")
        axes.fill_between(coverage, *band, alpha=0.2, label="95 % interval over images")
        for label, threshold in (("threshold 0", 0.0), ("chosen", result["threshold"])):
            kept = data.scores >= threshold
            if kept.any():
                axes.plot(kept.mean(), (~data.is_present[kept]).mean(), "o", label=label)
        axes.set(xlabel="coverage: share of expressions kept", ylabel="risk", xlim=(-0.02, 1.02), ylim=(-0.02, None))

    return _figure(draw)


def _accuracies(data: Scores, result: dict[str, Any]) -> str:
    levels = np.linspace(0, 1, GRID)

    def t_acc_at_n_acc(drawn: Scores) -> np.ndarray:
        """Return the highest T_acc at each N_acc of the grid."""
        others, targets = np.sort(drawn.scores[~drawn.is_present]), np.sort(drawn.scores[drawn.is_present])
        places = np.ceil(levels * len(others)).astype(int)
        above = np.append(others, np.inf)
        thresholds = np.where(places == 0, -np.inf, np.nextafter(above[np.maximum(places - 1, 0)], np.inf))
        return 1 - np.searchsorted(targets, thresholds) / len(targets)

    band = _band(data, t_acc_at_n_acc)

    def draw(axes) -> None:
        axes.plot(levels, t_acc_at_n_acc(data), label="all thresholds")
        axes.fill_between(levels, *band, alpha=0.2, label="95 % interval over images")
        before, after = result["before"], {name: result[name]["value"] for name in ("N_acc", "T_acc")}
        for label, point in (("threshold 0", before), ("chosen", after)):
            axes.plot(point["N_acc"], point["T_acc"], "o", label=label)
        axes.set(xlabel="N_acc (no-targets rejected)", ylabel="T_acc (targets kept)", xlim=(-0.02, 1.02))

    return _figure(draw)
