"""Pictures of the metrics; matplotlib is imported only when one is drawn."""

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHARACTERS = 72  # that a line of the legend has room for at the figure's width
_LINE = 0.17  # inches that it takes


def plot_rejection_curves(curves: Mapping[str, Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws N_acc against T_acc for one or several runs; the legend below has the area and the balancing point of each.

    Args:
        curves: legend -> what `rejection_curve` returned; curves that are not defined are named in the legend only.
        path: the picture to write; its suffix gives the format (png, svg, pdf).

    Raises:
        ValueError: a suffix that matplotlib writes no picture for.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure()
    path, known = Path(path), figure.canvas.get_supported_filetypes()
    if (suffix := path.suffix[1:].lower()) not in known:
        raise ValueError(
            f"{path}: no picture can be written as {suffix!r}; end the name with one of .{', .'.join(known)}"
        )
    labels = {}
    for label, curve in curves.items():
        balance = curve["balance"]
        found = curve["note"]
        if balance is not None:
            found = f"area {curve['area']:.3f}, balanced by rejecting score < {balance['threshold']:.2f} (dot)"
        # "$" would begin a formula
        labels[label] = textwrap.fill(f"{label}: {found}", _CHARACTERS).replace("$", r"\$")
    below = 0.3 + _LINE * sum(text.count("\n") + 1.4 for text in labels.values())
    figure.set_size_inches(6, 5.5 + below)
    axes = figure.add_axes((0.12, (below + 0.55) / (5.5 + below), 0.84, 4.8 / (5.5 + below)))
    for label, curve in curves.items():
        points, balance = curve["points"], curve["balance"]
        # straight lines between thresholds are what the area integrates; steps would hide ties
        (line,) = axes.plot(points["N_acc"], points["T_acc"], label=labels[label])
        if balance is not None:
            axes.plot(balance["N_acc"], balance["T_acc"], "o", color=line.get_color())
    axes.set(
        xlabel="N_acc (no-targets rejected)", ylabel="T_acc (targets kept)", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02)
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="lower left", bbox_to_anchor=(0.02, 0), fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
