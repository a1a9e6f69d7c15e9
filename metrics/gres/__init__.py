"""GRES metrics: pure functions (`functions.py`, `presence.py`, `masks.py`), rows files (`rows.py`), plots (`plots.py`).

The `evaluate` module is `gres.py`. It is not imported here, because `import evaluate` imports torch.
"""

from .functions import (
    BENCHMARK_KEYS,
    CONVENTIONS,
    LOWER_IS_BETTER,
    METRIC_KEYS,
    RUN_FIELDS,
    bootstrap_intervals,
    breakdown,
    check_row,
    check_together,
    gres_metrics,
    kind_of,
    rejection_curve,
    report,
    to_json,
    undefined_notes,
)
from .masks import box_overlap, mask_box, row_from_masks
from .plots import plot_rejection_curves
from .rows import group_rows, read_rows

__all__ = [
    "BENCHMARK_KEYS",
    "CONVENTIONS",
    "LOWER_IS_BETTER",
    "METRIC_KEYS",
    "RUN_FIELDS",
    "bootstrap_intervals",
    "box_overlap",
    "breakdown",
    "check_row",
    "check_together",
    "gres_metrics",
    "group_rows",
    "kind_of",
    "mask_box",
    "plot_rejection_curves",
    "read_rows",
    "rejection_curve",
    "report",
    "row_from_masks",
    "to_json",
    "undefined_notes",
]
