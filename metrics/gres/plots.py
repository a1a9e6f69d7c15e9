"""Pictures of the metrics; matplotlib is imported only when one is drawn."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot_rejection_curves(curves: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws N-acc against T-acc for one or several runs, with the balancing point and the area of each.

    Args:
        curves: legend -> what `rejection_curve` returned; curves that are not defined are named in the legend only.
        path: the picture to write; its suffix gives the format (png, svg, pdf).
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        points, balance = curve["points"], curve["balance"]
        if balance is None:
            axes.plot([], [], label=f"{label}: {curve['note']}")
            continue
        # steps="post" would hide ties; straight lines between thresholds are what the area integrates
        (line,) = axes.plot(points["N_acc"], points["T_acc"], label=f"{label}: area {curve['area']:.3f}")
        axes.plot(balance["N_acc"], balance["T_acc"], "o", color=line.get_color())
        axes.annotate(
            f"score < {balance['threshold']:.2f}",
            (balance["N_acc"], balance["T_acc"]),
            xytext=(-6, -12),
            textcoords="offset points",
            ha="right",
        )
    axes.set(
        xlabel="N-acc (no-targets rejected)", ylabel="T-acc (targets kept)", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02)
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
