"""Draw the curves of a training run."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_scripts.files import replacing


def curve_notes(history: Sequence[dict[str, Any]]) -> list[str]:
    """Return the protocols and conventions of the evaluations in a trainer's `log_history`, and the notes on them.

    >>> curve_notes([{"eval_protocol": "slots", "eval_protocol_note": "own choice", "eval_convention": "rela"}])
    ['eval: slots, rela', 'slots: own choice']
    """
    evaluated = [entry for entry in history if "eval_protocol" in entry]
    lines = [f"eval: {entry['eval_protocol']}, {entry['eval_convention']}" for entry in evaluated]
    lines += [f"{e['eval_protocol']}: {e['eval_protocol_note']}" for e in evaluated if "eval_protocol_note" in e]
    return list(dict.fromkeys(lines))


def training_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss parts and the evaluation metrics in a trainer's `log_history` to the image file `path`."""
    from matplotlib.figure import Figure  # unlike pyplot it needs no window system and has no global state

    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, metrics = figure.subplots(1, 2)
    for axes, names in (
        (losses, ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss", "object_score_loss")),
        (metrics, ("eval_gIoU", "eval_cIoU", "eval_N_acc", "eval_T_acc", "eval_curve_area", "slot_accuracy")),
    ):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                axes.plot(*zip(*points), label=name, marker=".")
        axes.set_xlabel("optimizer step")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize="small")
    losses.set_title("loss and its parts")
    title = [part for line in ("metrics", *curve_notes(history)) for part in textwrap.wrap(line, 64)]
    metrics.set_title("\n".join(title), fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
