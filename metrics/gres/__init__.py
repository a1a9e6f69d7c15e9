"""GRES metrics: pure functions (`functions.py`), rows files (`rows.py`), pictures (`plots.py`).

The `evaluate` module is `gres.py`; it is left out here because `import evaluate` brings torch along.
"""

from .functions import (
    CONVENTIONS,
    METRIC_KEYS,
    RUN_FIELDS,
    bootstrap_intervals,
    breakdown,
    check_row,
    check_together,
    gres_metrics,
    rejection_curve,
    report,
    row_from_masks,
    to_json,
    undefined_notes,
)
from .plots import plot_rejection_curves
from .rows import group_rows, read_rows

__all__ = [
    "CONVENTIONS",
    "METRIC_KEYS",
    "RUN_FIELDS",
    "bootstrap_intervals",
    "breakdown",
    "check_row",
    "check_together",
    "gres_metrics",
    "group_rows",
    "plot_rejection_curves",
    "read_rows",
    "rejection_curve",
    "report",
    "row_from_masks",
    "to_json",
    "undefined_notes",
]
