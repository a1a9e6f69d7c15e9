"""The numbers that the original's authors published, with their source."""

from pathlib import Path
from typing import Any

# The figures that the authors publish for their weights: README.md of github.com/LeapLabTHU/GSVA at 618dc79, section
# Evaluation, "fp32 inference". They say that these are lines 8 and 10 of Table 1 of the paper (arXiv 2312.10103, CVPR 2024),
# from which the numbers "may vary w.r.t. the precision". (model, split) -> gIoU, cIoU, N_acc, T_acc.
SOURCE = "README of github.com/LeapLabTHU/GSVA at 618dc79, fp32 inference (lines 8 and 10 of the paper's Table 1)"
PUBLISHED = {
    ("gsva-7b-pt", "val"): (0.6347, 0.6165, 0.5698, 0.9954),
    ("gsva-7b-pt", "testA"): (0.6999, 0.6917, 0.6339, 0.9846),
    ("gsva-7b-pt", "testB"): (0.6134, 0.6026, 0.5868, 0.9895),
    ("gsva-7b-ft-gres", "val"): (0.6643, 0.6319, 0.6256, 0.9962),
    ("gsva-7b-ft-gres", "testA"): (0.7106, 0.6987, 0.6572, 0.9869),
    ("gsva-7b-ft-gres", "testB"): (0.6220, 0.6035, 0.6072, 0.9910),
}


def published(dataset: str, split: str) -> list[dict[str, Any]]:
    """Return the published records of a split. Only gRefCOCO has some."""
    if Path(dataset).name != "grefcoco":
        return []
    return [
        {
            "model": model,
            "protocol": "teacher_forced",
            "prompts": "all expressions in one",
            "convention": "gsva",
            "metrics": dict(zip(("gIoU", "cIoU", "N_acc", "T_acc"), values)),
        }
        for (model, of_split), values in PUBLISHED.items()
        if of_split == split
    ]
