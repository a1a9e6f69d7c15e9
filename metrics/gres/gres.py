"""The GRES metrics as an `evaluate` module: `evaluate.load("./metrics/gres")`, offline.

Every number comes from `functions.py`, which needs neither evaluate nor torch. `evaluate.load` copies this file and the
siblings that it names in `from .x import y`; it does not look into those, so all that they import stand here too.
"""

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate

from .functions import check_row, gres_metrics, undefined_notes
from .masks import encode_pair, row_from_masks
from .presence import CALIBRATION_BINS

_DESCRIPTION = """\
gIoU, cIoU, N-acc, T-acc and Pr@0.7/0.8/0.9 of generalized referring expression segmentation, as the benchmark counts
them (convention "rela") or as the original GSVA does ("gsva", "gsva_validate"); REC (accuracy of boxes), and how well
decisions and scores tell what is there: AUROC, AP, IL_MCC, pmF1, cgF1, ECE and N3R.
"""

_CITATION = """\
@inproceedings{liu2023gres,
  title={{GRES}: Generalized Referring Expression Segmentation},
  author={Liu, Chang and Ding, Henghui and Jiang, Xudong},
  booktitle={CVPR},
  year={2023}
}
@inproceedings{xia2024gsva,
  title={{GSVA}: Generalized Segmentation via Multimodal Large Language Models},
  author={Xia, Zhuofan and Han, Dongchen and Han, Yizeng and Pan, Xuran and Song, Shiji and Huang, Gao},
  booktitle={CVPR},
  year={2024}
}
"""

_INPUTS = """
Args:
    is_rejected: list of bool, the model's decision for each expression.
    is_malformed: optional list of bool.
    score: optional, the log-odds that the expression is there; None where an answer has none. For AUROC, AP, ECE and N3R.
    probability: optional, the calibrated probability for ECE and N3R; by default sigmoid(score).
    num_targets: optional, the number of annotations of the expression. REC leaves out those with several.
    config "rows" (default): is_no_target (bool), intersection, union (pixels), one entry per expression; optional for REC:
        box_intersection, box_union (pixels of the masks' boxes).
    config "masks": predictions and references, COCO run-length encodings {"size": [height, width], "counts"} (counts a
        string, bytes or a list), arrays (height, width) of booleans, or None for no mask.
    convention: "rela" (default), "gsva" or "gsva_validate"; an argument of compute.

Returns:
    {gIoU, cIoU, N_acc, T_acc, Pr@0.7, Pr@0.8, Pr@0.9, malformed, REC, AUROC, AP, IL_MCC, pmF1, cgF1, ECE, N3R, notes}:
    numbers between 0 and 1 (IL_MCC and cgF1 between -1 and 1), NaN where not defined; notes maps each NaN to its reason.
    ECE has BINS bins.

Example:
    >>> metric = evaluate.load("./metrics/gres")
    >>> metric.add_batch(intersection=[3, 0], union=[4, 0], is_no_target=[False, True], is_rejected=[False, True])
    >>> metric.compute(convention="rela")["gIoU"]
    0.875
""".replace("BINS", str(CALIBRATION_BINS))


# columns that may be missing, and entries that may be None
OPTIONAL = ("is_malformed", "score", "probability", "num_targets", "box_intersection", "box_union")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Gres(evaluate.Metric):
    """The GRES metrics as an `evaluate` module; `config_name` is "rows" (default) or "masks"."""

    config_name: str

    def _info(self) -> evaluate.MetricInfo:
        flag, area = datasets.Value("bool"), datasets.Value("int64")
        rle = {"size": datasets.Sequence(datasets.Value("int32")), "counts": datasets.Value("string")}
        number = datasets.Value("float64")
        inputs = {
            "rows": {
                "intersection": area,
                "union": area,
                "is_no_target": flag,
                "box_intersection": area,
                "box_union": area,
            },
            "masks": {"predictions": rle, "references": rle},
        }
        optional = {"is_malformed": flag, "score": number, "probability": number, "num_targets": area}
        if self.config_name == "default":
            self.config_name = "rows"
        if self.config_name not in inputs:
            raise ValueError(f"unknown config_name {self.config_name!r}; choose one of {', '.join(inputs)}")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({**inputs[self.config_name], "is_rejected": flag, **optional}),
            reference_urls=["https://github.com/henghuiding/ReLA", "https://github.com/LeapLabTHU/GSVA"],
        )

    def _row(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        row = dict(values)
        if self.config_name == "masks":
            pair = encode_pair(row.pop("predictions"), row.pop("references"), where)
            row.update(row_from_masks(*pair, row["is_rejected"], where))
        check_row(row, where)
        return row

    def add_batch(self, *, predictions: Any = None, references: Any = None, **columns: Any) -> None:
        """Add one entry per expression; the columns of `OPTIONAL` may be missing.

        Entries are checked here: evaluate would silently convert "no" to true and 0.5 pixels to 0.

        Raises:
            ValueError: A column is missing or unknown, lengths differ, or an entry is wrong.
        """
        masks = {"predictions": predictions, "references": references}
        masks = {name: list(values) for name, values in masks.items() if values is not None}
        columns = masks | {
            name: values.tolist() if hasattr(values, "tolist") else list(values)
            for name, values in columns.items()
            if values is not None
        }
        names = self._feature_names()
        optional = [name for name in names if name in OPTIONAL]
        required = [name for name in names if name not in OPTIONAL]
        missing = [name for name in required if name not in columns]
        unknown = [name for name in columns if name not in names]
        if missing or unknown:
            raise ValueError(
                f"gres ({self.config_name}) takes {', '.join(required)} and optionally {', '.join(optional)}; "
                f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"gres: every column needs one entry per expression, but the lengths are {lengths}")
        count = lengths["is_rejected"]
        columns |= {name: [None] * count for name in optional if name not in columns}
        for index, values in enumerate(zip(*columns.values())):
            self._row(dict(zip(columns, values)), f"entry {index} of the batch")
        if self.config_name == "masks":  # the columns hold one form only
            pairs = [encode_pair(*pair) for pair in zip(columns["predictions"], columns["references"])]
            columns["predictions"], columns["references"] = (
                (list(column) for column in zip(*pairs)) if pairs else ([], [])
            )
        super().add_batch(**columns)

    def add(self, *, prediction: Any = None, reference: Any = None, **values: Any) -> None:
        """Add one expression, like `add_batch` with single values."""
        pair = {"predictions": prediction, "references": reference}
        if self.config_name != "masks":  # where None is a value: no mask
            pair = {name: value for name, value in pair.items() if value is not None}
        values = {name: value for name, value in values.items() if value is not None}
        self.add_batch(**{name: [value] for name, value in {**pair, **values}.items()})

    def compute(self, **kwargs: Any) -> dict[str, Any] | None:
        """Compute the metrics of everything added and of the columns given here; None except on the first process."""
        optional = dict.fromkeys(name for name in self._feature_names() if name in OPTIONAL)
        return super().compute(**{**optional, **kwargs})

    def _compute(self, *, convention: str = "rela", **columns: list) -> dict[str, Any]:
        rows = [self._row(dict(zip(columns, values)), f"entry {n}") for n, values in enumerate(zip(*columns.values()))]
        metrics = gres_metrics(rows, convention)
        return {**metrics, "notes": undefined_notes(metrics)}
