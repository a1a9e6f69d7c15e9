"""Compare one or several runs on one page, which opens offline.

    python -m evaluation.report runs/finetune_shapes
    python -m evaluation.report runs/a runs/b --output report.html

`run_gres.py --do_eval` already writes `report.html` about its run to its output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_scripts.files import write_text
from metrics.gres import check_together, gres_metrics, read_rows

from .measured import differences
from .pages import Run, report_page
from .records import RESULTS, Record, read_results


def read_run(directory: str | Path, name: str | None = None, check: bool = True) -> Run:
    """Read the output folder of `run_gres.py --do_eval`.

    Args:
        name: The name of the run on the page; by default that of the folder.
        check: Check that the numbers are those of the rows beside them.

    Raises:
        FileNotFoundError: There is no results.json, or a rows file that it names is missing.
        ValueError: results.json holds no records, or the rows belong to another evaluation than the record.
    """
    directory = Path(directory)
    path = directory / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give an output directory of run_gres.py --do_eval.")
    records = read_results(directory)
    exhibits: dict[str, list[dict[str, Any]]] = {}
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if (file := record.get("rows")) is None:
            continue
        if Path(file).name != file:
            raise ValueError(f"{path} names the rows file {file!r}; it must lie beside results.json.")
        if file not in exhibits:
            exhibits[file] = _read_exhibits(directory / Path(file).with_suffix(".pictures.json"))
        if check:
            if file not in rows_of:
                rows_of[file] = read_rows(directory / file)
            _check_rows(record, rows_of[file], directory / file)
    return Run(name or directory.resolve().name, records, exhibits)


def _read_exhibits(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); remove it, or evaluate again with --save_masks.") from None


def _check_rows(record: Record, rows: list[dict[str, Any]], path: Path) -> None:
    """Raise ValueError if the numbers of a record are not those of the rows."""
    try:
        facts = check_together(rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    wrong = [
        f"{key} {value!r}, not {record[key]!r}" for key, value in facts.items() if record.get(key, value) != value
    ]
    metrics = gres_metrics(rows, record["convention"])
    for key, value in record["metrics"].items():
        if not np.isclose(np.nan if value is None else value, metrics[key], rtol=0, atol=1e-9, equal_nan=True):
            wrong.append(f"{key} {metrics[key]:.6f}, not {value}")
    if wrong:
        raise ValueError(
            f"{path} does not belong to the record of {record['protocol']}, {record['convention']} in {RESULTS}: its rows "
            f"say {'; '.join(wrong)}. Evaluate again, or put the rows of that evaluation there."
        )


def read_runs(directories: Sequence[str | Path]) -> list[Run]:
    """Read several output folders, and give each run a name that no other has."""
    names = [Path(directory).resolve().name for directory in directories]
    if len({Path(directory).resolve() for directory in directories}) < len(directories):
        raise ValueError("A run directory is given twice; give each once.")
    return [
        read_run(directory, name if names.count(name) == 1 else str(directory))
        for directory, name in zip(directories, names)
    ]


def write_report(output_dir: str | Path) -> None:
    """Write `report.html` about the evaluations of an output folder, whose records have just been made from their rows."""
    write_text(Path(output_dir) / "report.html", report_page([read_run(output_dir, check=False)]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. An error in a run ends it with status 1 and one line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="output folders of run_gres.py --do_eval")
    parser.add_argument("--output", type=Path, help="page to write; by default report.html in the first RUN_DIR")
    options = parser.parse_args(arguments)
    output = options.output or Path(options.runs[0]) / "report.html"
    try:
        runs = read_runs(options.runs)
        write_text(output, report_page(runs))
    except (ValueError, OSError) as error:
        print(f"evaluation.report: {error}", file=sys.stderr)
        return 1
    for sentence in differences([(run.name, record) for run in runs for record in run.records]):
        print(f"{sentence}.", file=sys.stderr)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
