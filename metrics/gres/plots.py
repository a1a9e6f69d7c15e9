"""Plots of the metrics. matplotlib is imported only when one is drawn."""

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

_CHARACTERS = 72  # of a line of the legend at the figure's width
_LINE = 0.17  # height of such a line in inches


def plot_rejection_curves(
    curves: Mapping[str, Mapping[str, Any]], target: str | os.PathLike | BinaryIO, format: str | None = None
) -> None:
    """Draw N_acc against T_acc for one or several runs. The legend has the area and the balance of each.

    Args:
        curves: Legend -> result of `rejection_curve`. Curves that are not defined appear in the legend only.
        target: The path to write, or a binary file. Use `data_scripts.files.replacing` to write a path whole or not at all.
        format: "png", "svg", "pdf" and so on; by default the suffix of a path, and "png" for a binary file.

    Raises:
        ValueError: matplotlib cannot write this format.
    """
    from matplotlib.figure import Figure  # pyplot would need a window system and global state

    figure = Figure()
    formats = figure.canvas.get_supported_filetypes()
    if format is None:
        format = Path(target).suffix[1:].lower() if isinstance(target, (str, os.PathLike)) else "png"
    if format not in formats:
        raise ValueError(f"no picture can be written as {format!r}; end the name with one of .{', .'.join(formats)}")
    labels = {}
    for label, curve in curves.items():
        balance = curve["balance"]
        result = curve["note"]
        if balance is not None:
            result = f"area {curve['area']:.3f}, balanced by rejecting score < {balance['threshold']:.2f} (dot)"
        # "$" would start a formula
        labels[label] = textwrap.fill(f"{label}: {result}", _CHARACTERS).replace("$", r"\$")
    below = 0.3 + _LINE * sum(text.count("\n") + 1.4 for text in labels.values())
    figure.set_size_inches(6, 5.5 + below)
    axes = figure.add_axes((0.12, (below + 0.55) / (5.5 + below), 0.84, 4.8 / (5.5 + below)))
    for label, curve in curves.items():
        points, balance = curve["points"], curve["balance"]
        # The area is under straight lines between thresholds; steps would hide ties.
        (line,) = axes.plot(points["N_acc"], points["T_acc"], marker=".", markersize=4, label=labels[label])
        if balance is not None:
            axes.plot(balance["N_acc"], balance["T_acc"], "o", color=line.get_color())
    axes.set(
        xlabel="N_acc (no-targets rejected)", ylabel="T_acc (targets kept)", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02)
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="lower left", bbox_to_anchor=(0.02, 0), fontsize="small", frameon=False)
    figure.savefig(target, dpi=120, format=format)
