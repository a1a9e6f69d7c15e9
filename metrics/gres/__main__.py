"""Compute metrics from saved rows, without the model: `python -m metrics.gres rows.jsonl --convention rela --json`."""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

from data_scripts.files import replacing

from .functions import BENCHMARK_KEYS, CONVENTIONS, METRIC_KEYS, RUN_FIELDS, report, to_json
from .plots import plot_rejection_curves
from .rows import group_rows, read_rows


def _title(record: dict[str, Any]) -> str:
    """Return the fields of a run in one line."""
    words = (f"{'threshold ' * (field == 'threshold')}{record[field]}" for field in RUN_FIELDS if field in record)
    return " ".join(words)


def _as_text(record: dict[str, Any]) -> str:
    """Return a record as a table: all rows, their intervals, then each part."""

    def line(name: str, samples: Any, cells: Sequence[str]) -> str:
        return f"{name:<22}{samples:>8}" + "".join(f"{cell:>16}" for cell in cells)

    def number(value: float) -> str:
        return "-" if math.isnan(value) else f"{value:.4f}"

    lines = [_title(record)]
    further = [key for key in METRIC_KEYS if key not in BENCHMARK_KEYS and not math.isnan(record["metrics"][key])]
    for keys in filter(None, (BENCHMARK_KEYS, further)):
        lines.append(line("", "rows", keys))
        lines.append(line("all", record["samples"], [number(record["metrics"][key]) for key in keys]))
        if "intervals" in record:
            pairs = [record["intervals"][key] for key in keys]
            cells = ["-" if math.isnan(low) else f"{low:.4f}-{high:.4f}" for low, high in pairs]
            lines.append(line("95 % interval", "", cells))
        for field, parts in record["breakdown"].items():
            for value, part in parts.items():
                name = value if field == "kind" else f"{value} per prompt"
                lines.append(line(name, part["samples"], [number(part["metrics"][key]) for key in keys]))
    if record["curve"]["balance"]:
        balance = record["curve"]["balance"]
        lines.append(
            f"N_acc/T_acc curve: area {record['curve']['area']:.4f}; balanced by rejecting score < "
            f"{balance['threshold']:.4f}: N_acc {balance['N_acc']:.4f}, T_acc {balance['T_acc']:.4f}"
        )
    hidden = {key for key in METRIC_KEYS if key not in (*BENCHMARK_KEYS, *further)}
    lines += [f"note, {key}: {note}" for key, note in record["notes"].items() if key not in hidden]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` defaults to `sys.argv[1:]`. Wrong rows end it with status 1 and one line."""
    parser = argparse.ArgumentParser(prog="python -m metrics.gres", description=__doc__)
    parser.add_argument("rows", nargs="+", metavar="ROWS", help="JSON lines or .parquet, one row per expression")
    parser.add_argument(
        "--convention", choices=CONVENTIONS, default="rela", help="the definition of the metrics (default: rela)"
    )
    parser.add_argument(
        "--group-by",
        nargs="+",
        default=[],
        choices=RUN_FIELDS,
        help="report runs that differ in these fields separately",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="number of resamples for the intervals; 0: no intervals",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--json", action="store_true", help="print JSON: one record, or a list with --group-by")
    parser.add_argument("--plot", metavar="FILE", help="write a plot of the N-acc/T-acc curve to this file")
    options = parser.parse_args(arguments)
    if options.bootstrap < 0 or options.seed < 0:
        parser.error("--bootstrap and --seed must be 0 or more")
    try:
        groups = group_rows(read_rows(options.rows), options.group_by)
        records = [report(rows, options.convention, options.bootstrap, options.seed) for rows in groups.values()]
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    if options.plot:
        try:
            with replacing(options.plot) as temporary:
                plot_rejection_curves({_title(record): record["curve"] for record in records}, temporary)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {options.plot}: {error}")
    if options.json:
        print(to_json(records if options.group_by else records[0], indent=2))
    else:
        print("\n\n".join(_as_text(record) for record in records))


if __name__ == "__main__":
    main()
