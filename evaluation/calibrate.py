"""Calibrate rejection on the rows of a validation evaluation (protocol `slots`), and write it into a model.

    python -m evaluation.calibrate runs/finetune_shapes --min_T_acc 0.98 --model runs/finetune_shapes
    python -m evaluation.calibrate rows_val.jsonl --max_risk 0.05 --confidence 0.95 --output calibration
    python -m evaluation.calibrate runs/finetune_shapes --min_T_acc 0.98 --hold_out 0.5    # calibrate on half of the images, measure on the others

Writes `calibration.json` and `calibration.html` beside the rows. With --model, `segment`, the pipeline and the command line
use the threshold by default, and results hold the probability that an expression is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from data_scripts.files import write_json, write_text
from metrics.gres import check_together, read_rows
from metrics.gres.presence import calibration_error, presence_auroc

from . import calibration
from .calibration import Scores, sigmoid
from .records import RESULTS, read_results

CALIBRATION, PAGE = "calibration.json", "calibration.html"


def rows_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the rows files that the paths name; of an output folder, those of its latest evaluation by `slots`.

    Raises:
        FileNotFoundError: A path does not exist, or an output folder has no such evaluation.
    """
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        names = [record["rows"] for record in read_results(path) if record["protocol"] == "slots" and "rows" in record]
        after = [name for name in names if name.startswith("rows_after")]
        if not names:
            raise FileNotFoundError(
                f"{path / RESULTS} records no evaluation by slots; run run_gres.py --do_eval --protocols slots."
            )
        files.append(path / (after or names)[-1])
    return files


def choose_threshold(data: Scores, options: argparse.Namespace) -> tuple[float, str]:
    """Return the threshold for the operating point that the options ask for, and that point in words."""
    if options.min_T_acc is not None:
        return calibration.threshold_for_min_t_acc(data, options.min_T_acc), f"T_acc of at least {options.min_T_acc:g}"
    if options.min_N_acc is not None:
        return calibration.threshold_for_min_n_acc(data, options.min_N_acc), f"N_acc of at least {options.min_N_acc:g}"
    if options.max_risk is not None:
        words = f"risk of at most {options.max_risk:g} with confidence {options.confidence:g}"
        return calibration.threshold_for_max_risk(data, options.max_risk, options.confidence), words
    return calibration.threshold_for_balance(data), "N_acc and T_acc alike"


@dataclass(frozen=True)
class Measured:
    """The expressions on which a calibration is measured.

    Args:
        data: Their scores.
        probabilities: Their calibrated probabilities (expressions,), by a fit on other images.
        where: These images in words.
    """

    data: Scores
    probabilities: np.ndarray
    where: str


def calibrate(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> tuple[dict[str, Any], Measured]:
    """Return the calibration of rows (threshold, temperature, offset, accuracies and errors with 95 % intervals) and its measure.

    With `options.hold_out`, that share of the images is left out of the calibration, and everything is measured on it.

    Raises:
        ValueError: Rows of several runs, without scores, or without no-targets; or a goal that no threshold reaches.
    """
    facts = check_together(rows)
    Scores.of_rows(rows)  # says what is wrong with all rows, before a part of them is looked at
    held_out = np.zeros(len(rows), dtype=bool)
    if options.hold_out:
        held_out = calibration.hold_out([str(row["image_id"]) for row in rows], options.hold_out, options.seed)
    data = Scores.of_rows([row for row, is_held in zip(rows, held_out) if not is_held])
    temperature, offset, note = calibration.fit_or_keep(data)
    threshold, goal = choose_threshold(data, options)
    if options.hold_out:
        other = Scores.of_rows([row for row, is_held in zip(rows, held_out) if is_held])
        probabilities = sigmoid(other.scores / temperature + offset)
        measured = Measured(other, probabilities, f"{other.num_images} images that were held out")
    else:
        where = f"images that were not fitted on ({calibration.FOLDS} folds)"
        measured = Measured(data, calibration.cross_validated(data), where)
    n_acc, t_acc = calibration.accuracies(measured.data, threshold)
    no_targets = int((~data.is_present).sum())
    needed = calibration.expressions_needed(n_acc)
    notes = [note] * bool(note)
    if no_targets < needed:
        notes.append(
            f"{no_targets} no-targets: {needed - no_targets} more are needed for an interval of N_acc of ±0.05 "
            "(more where several belong to one image)."
        )
    result = {
        "threshold": threshold,
        "temperature": temperature,
        "offset": offset,
        "goal": goal,
        "N_acc": {"value": n_acc, "interval": list(_accuracy_interval(measured.data, threshold, 0))},
        "T_acc": {"value": t_acc, "interval": list(_accuracy_interval(measured.data, threshold, 1))},
        "before": dict(zip(("N_acc", "T_acc"), calibration.accuracies(measured.data, 0.0))),
        "AUROC": presence_auroc(measured.data.scores, measured.data.is_present),
        "calibration_error": {
            "before": _error(measured.data, sigmoid(measured.data.scores)),
            "after": _error(measured.data, measured.probabilities),
            "if_right": calibration.least_calibration_error(measured.probabilities),
            "folds": None if options.hold_out else calibration.FOLDS,
        },
        "dataset": facts.get("dataset"),
        "split": facts.get("split"),
        "evaluated_model": facts.get("model"),
        "expressions": len(data.scores),
        "no_targets": no_targets,
        "images": data.num_images,
        "measured_on": {
            "where": measured.where,
            "expressions": len(measured.data.scores),
            "no_targets": int((~measured.data.is_present).sum()),
            "images": measured.data.num_images,
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "notes": notes,
    }
    return result, measured


def _error(data: Scores, probabilities: np.ndarray) -> dict[str, Any]:
    """Return the calibration error of probabilities with its interval."""
    places = Scores(np.arange(len(data.scores), dtype=float), data.is_present, data.images)

    def error(drawn: Scores) -> float:
        return calibration_error(probabilities[drawn.scores.astype(int)], drawn.is_present)

    return {"value": error(places), "interval": list(calibration.bootstrap(places, error, is_error=True))}


def _accuracy_interval(data: Scores, threshold: float, which: int) -> tuple[float, float]:
    def accuracy(drawn: Scores) -> float:
        if drawn.is_present.all() or not drawn.is_present.any():
            return math.nan
        return calibration.accuracies(drawn, threshold)[which]

    return calibration.bootstrap(data, accuracy)


def write_into_model(directory: Path, result: dict[str, Any]) -> None:
    """Write the calibration into the model's `config.json` as `rejection`; everything else in it stays.

    Raises:
        ValueError: The directory holds no GSVA configuration.
        OSError: It cannot be written.
    """
    path = _config_of(directory)
    config = json.loads(path.read_text(encoding="utf-8"))
    names = ("threshold", "temperature", "offset", "goal", "dataset", "split", "expressions", "no_targets", "date")
    config["rejection"] = {name: result[name] for name in names}
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _config_of(directory: Path) -> Path:
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"--model {directory} has no config.json; give the directory of a GSVA model.")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object ({error}).") from None
    if model_type != "gsva":
        raise ValueError(f"--model {directory} holds a model of type {model_type!r}, not of GSVA.")
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"--model {directory} cannot be written; copy it to a folder of yours.")
    return path


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="+", metavar="RUN_OR_ROWS", help="output folder of an evaluation, or rows files")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--min_T_acc", type=_share, metavar="SHARE", help="keep at least this share of the targets")
    goal.add_argument("--min_N_acc", type=_share, metavar="SHARE", help="reject at least this share of the no-targets")
    goal.add_argument("--balance", action="store_true", help="make N_acc and T_acc alike (the default)")
    goal.add_argument(
        "--max_risk",
        type=_share,
        metavar="SHARE",
        help="keep the share of no-targets among kept expressions below this",
    )
    parser.add_argument("--confidence", type=_share, metavar="SHARE", help="of --max_risk; 0.95 by default")
    parser.add_argument(
        "--hold_out",
        type=_share,
        metavar="SHARE",
        help="calibrate without this share of the images, and measure on them",
    )
    parser.add_argument("--seed", type=int, default=0, help="which images are held out; 0 by default")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="write the calibration into this model's config.json"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write to; by default that of the rows")
    options = parser.parse_args(arguments)
    if options.confidence is not None and options.max_risk is None:
        parser.error("--confidence belongs to --max_risk; give both, or neither")
    if options.seed < 0:
        parser.error("--seed must be 0 or more")
    options.confidence = options.confidence or 0.95
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. An expected failure ends it with status 1 and one line."""
    from .calibration_page import calibration_page

    options = parse(arguments)
    try:
        if options.model is not None:
            _config_of(options.model)
        files = rows_files(options.rows)
        rows = read_rows(files)
        result, measured = calibrate(rows, options)
        output = options.output or files[0].parent
        write_json(output / CALIBRATION, {**result, "rows": [file.name for file in files]})
        write_text(output / PAGE, calibration_page(measured.data, measured.probabilities, result))
        if options.model is not None:
            write_into_model(options.model, result)
    except (ValueError, OSError) as error:
        print(f"evaluation.calibrate: {error}", file=sys.stderr)
        return 1
    print_result(result, output)
    if options.model is not None:
        print(f"{options.model / 'config.json'} now holds this calibration")
    return 0


def print_result(result: dict[str, Any], output: Path) -> None:
    """Print a calibration, and where its page is."""
    print(f"{result['goal']}: reject below {result['threshold']:.4f}")
    print(f"probability = sigmoid(score / {result['temperature']:.4f} {result['offset']:+.4f})")
    for name in ("N_acc", "T_acc"):
        low, high = result[name]["interval"]
        print(
            f"{name} {result[name]['value']:.4f} ({low:.4f} to {high:.4f}), {result['before'][name]:.4f} at threshold 0"
        )
    error = result["calibration_error"]
    print(
        f"calibration error {error['before']['value']:.4f} before, {error['after']['value']:.4f} after, on "
        f"{result['measured_on']['where']}; probabilities that are right would show {error['if_right']:.4f}"
    )
    for note in result["notes"]:
        print(note)
    print(output / PAGE)


if __name__ == "__main__":
    sys.exit(main())
