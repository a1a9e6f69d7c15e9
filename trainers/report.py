"""
One page about one or several evaluations, which opens offline.

    python -m trainers.report runs/demo
    python -m trainers.report runs/a runs/b --output report.html

`run_gres.py --do_eval` writes `report.html` into its output directory by itself.
"""

import argparse
import base64
import html
import io
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_scripts.files import write_text
from data_scripts.schema import decode_mask
from data_scripts.transforms import read_image
from metrics.gres import METRIC_KEYS, check_together, gres_metrics, plot_rejection_curves, read_rows

from .evaluation import EvaluationPlan, EvaluationResult, askable, truth_of
from .pictures import contours

RESULTS = "results.json"

# What the original's authors print for their own weights: README.md of github.com/LeapLabTHU/GSVA at 618dc79, section
# Evaluation, "fp32 inference"; by their words lines 8 and 10 of Table 1 of the paper (arXiv 2312.10103, CVPR 2024), from
# which the numbers "may vary w.r.t. the precision". (model, split) -> gIoU, cIoU, N_acc, T_acc.
PUBLISHED_SOURCE = (
    "README of github.com/LeapLabTHU/GSVA at 618dc79, fp32 inference (lines 8 and 10 of the paper's Table 1)"
)
PUBLISHED = {
    ("gsva-7b-pt", "val"): (0.6347, 0.6165, 0.5698, 0.9954),
    ("gsva-7b-pt", "testA"): (0.6999, 0.6917, 0.6339, 0.9846),
    ("gsva-7b-pt", "testB"): (0.6134, 0.6026, 0.5868, 0.9895),
    ("gsva-7b-ft-gres", "val"): (0.6643, 0.6319, 0.6256, 0.9962),
    ("gsva-7b-ft-gres", "testA"): (0.7106, 0.6987, 0.6572, 0.9869),
    ("gsva-7b-ft-gres", "testB"): (0.6220, 0.6035, 0.6072, 0.9910),
}

# Kinds of pictures that are shown, and which rows belong to each.
GROUPS = ("worst false rejections", "worst missed rejections", "worst masks", "best masks")
EXHIBITS_PER_KIND = 6


def published(dataset: str, split: str) -> list[dict[str, Any]]:
    """The published records of a split; none for other sets than gRefCOCO."""
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
        for (model, of), values in PUBLISHED.items()
        if of == split
    ]


def kind_of(row: dict[str, Any]) -> str:
    """No-target, single-target or multi-target, as the break-down calls them."""
    return "no-target" if row["is_no_target"] else "single-target" if row["num_targets"] == 1 else "multi-target"


def choose_exhibits(
    pictures: Sequence[Sequence[dict[str, Any]]], each: int = EXHIBITS_PER_KIND
) -> list[tuple[str, int, int]]:
    """
    The rows worth looking at, as (group, picture, expression): per kind of expression the `each` surest wrong decisions
    and the worst and best masks. An answer without a slot has no score, and counts as the least sure.

    Args:
        pictures: The rows of each picture.
    """
    places: dict[tuple[str, str], list[tuple[float, int, int]]] = {}
    for number, rows in enumerate(pictures):
        for position, row in enumerate(rows):
            iou = row["intersection"] / row["union"] if row["union"] else 0.0
            ranks = {}
            if row["is_no_target"] and not row["is_rejected"]:
                ranks["worst missed rejections"] = np.inf if row["score"] is None else -row["score"]
            elif row["is_rejected"] and not row["is_no_target"]:
                ranks["worst false rejections"] = np.inf if row["score"] is None else row["score"]
            elif not row["is_no_target"]:
                ranks = {"worst masks": iou, "best masks": -iou}
            for group, rank in ranks.items():
                places.setdefault((group, kind_of(row)), []).append((rank, number, position))
    chosen = []
    for group in GROUPS:
        for (name, _), found in sorted(places.items()):
            if name == group:
                chosen += [(group, number, position) for _, number, position in sorted(found)[:each]]
    return chosen


def exhibits(plan: EvaluationPlan, result: EvaluationResult) -> list[dict[str, Any]]:
    """What the page shows of an evaluation whose rows hold their `prediction`: pictures with contours, and facts."""
    shown = []
    for group, number, position in choose_exhibits(result.pictures):
        asked, row = askable(plan.rows[number], plan), result.pictures[number][position]
        truth, _ = truth_of(asked["expressions"][position], plan.ignore_region)
        picture = contours(read_image(asked["image"]), truth, decode_mask(row["prediction"]).astype(bool))
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=88)
        names = ("image_id", "expression", "is_rejected", "score", "intersection", "union", "num_expressions")
        shown.append(
            {
                "group": group,
                "kind": kind_of(row),
                **{name: row[name] for name in names},
                "picture": base64.b64encode(buffer.getvalue()).decode(),
            }
        )
    return shown


@dataclass
class Run:
    """An output directory: its name, its records, and the exhibits of each evaluation by the name of its rows file."""

    name: str
    records: list[dict[str, Any]]
    exhibits: dict[str, list[dict[str, Any]]]


def read_run(directory: str | Path, name: str | None = None) -> Run:
    """
    Reads what `run_gres.py` wrote, and checks that the numbers are those of the rows beside them.

    Raises:
        FileNotFoundError: there is no results.json, or a rows file that it names is missing.
        ValueError: results.json is none, or the rows are of another evaluation than the record says.
    """
    directory = Path(directory)
    path = directory / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give an output directory of run_gres.py --do_eval.")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        for record in records:
            record["protocol"], record["convention"], record["dataset"], record["split"], record["metrics"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no list of records ({error!r}); evaluate again.") from None
    shown, rows_of = {}, {}
    for record in records:
        if (file := record.get("rows")) is None:
            continue
        if Path(file).name != file:
            raise ValueError(f"{path} names the rows file {file!r}; it must lie beside results.json.")
        if file not in rows_of:
            rows_of[file] = read_rows(directory / file)
            shown_path = directory / Path(file).with_suffix(".pictures.json")
            try:
                shown[file] = json.loads(shown_path.read_text(encoding="utf-8")) if shown_path.is_file() else []
            except ValueError as error:
                raise ValueError(
                    f"{shown_path} is no JSON ({error}); remove it, or evaluate again with --save_masks."
                ) from None
        _check_rows(record, rows_of[file], directory / file)
    return Run(name or directory.resolve().name, records, shown)


def _check_rows(record: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    try:
        told = check_together(rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    wrong = [f"{key} {value!r}, not {record[key]!r}" for key, value in told.items() if record.get(key, value) != value]
    found = gres_metrics(rows, record["convention"])
    for key, value in record["metrics"].items():
        if not np.isclose(np.nan if value is None else value, found[key], rtol=0, atol=1e-9, equal_nan=True):
            wrong.append(f"{key} {found[key]:.6f}, not {value}")
    if wrong:
        raise ValueError(
            f"{path} does not belong to the record of {record['protocol']}, {record['convention']} in {RESULTS}: its rows "
            f"say {'; '.join(wrong)}. Evaluate again, or put the rows of that evaluation there."
        )


_STYLE = """:root{color-scheme:light}body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1400px;padding:0 1em;color:#222}
h2{margin-top:2em;border-bottom:2px solid #ddd}table{border-collapse:collapse;margin:.8em 0;font-size:13px}
.wide{overflow-x:auto}td,th{padding:4px 7px;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}td small{color:#666;display:block;white-space:nowrap}
tr.published td{background:#f4f1e6}.none{color:#777;font-style:italic}.forced{color:#9a4a00;font-weight:600}
figure{margin:0;width:230px}figcaption{font-size:13px;line-height:1.35;overflow-wrap:anywhere}figure img{width:100%}
.gallery{display:flex;flex-wrap:wrap;gap:16px}.filters{margin:1em 0;display:flex;flex-wrap:wrap;gap:14px}
.legend span{padding:0 .5em;border-left:12px solid}details{margin:.6em 0}summary{cursor:pointer}
.curve{max-width:560px;width:100%}[hidden]{display:none!important}"""

_SCRIPT = """const picks=[...document.querySelectorAll('.filters select')],cards=[...document.querySelectorAll('.gallery figure')];
function show(){let n=0;for(const c of cards){c.hidden=!picks.every(p=>!p.value||c.dataset[p.name]===p.value);n+=!c.hidden}
document.getElementById('count').textContent=n+' of '+cards.length+' pictures'}
picks.forEach(p=>p.addEventListener('change',show));show()"""

_CONVENTIONS = {
    "rela": "as the benchmark's own evaluator: a rejected target has no intersection and keeps its union",
    "gsva": "as the original's eval_gres: a rejected target still scores with its mask where one was made (teacher_forced)",
    "gsva_validate": "as the original's validate, which knows no rejection",
}


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(record: dict[str, Any], key: str) -> str:
    """A cell: the metric, its interval below; or why there is none."""
    value = record["metrics"].get(key)
    if value is None:
        reason = record.get("notes", {}).get(key)
        shown = f"<span class=none title='{_text(reason)}'>not defined here</span>" if reason else "&ndash;"
        return f"<td class=n>{shown}</td>"
    low, high = record.get("intervals", {}).get(key) or (None, None)
    interval = f"<small>{low:.4f}&ndash;{high:.4f}</small>" if low is not None else ""
    return f"<td class=n>{value:.4f}{interval}</td>"


def _table(head: Sequence[str], lines: Iterable[str], numbers: int) -> str:
    """A table whose last `numbers` columns are numbers; `lines` are finished rows."""
    cells = [f"<th{' class=n' if n >= len(head) - numbers else ''}>{_text(name)}</th>" for n, name in enumerate(head)]
    return f"<div class=wide><table><tr>{''.join(cells)}</tr>{''.join(lines)}</table></div>"


def _words(values: Iterable[Any]) -> str:
    return "".join(f"<td>{_text(value)}</td>" for value in values)


def _asked(record: dict[str, Any]) -> str:
    ignored = ", ignore region left out" if record.get("ignore_region") == "ignored" else ""
    return record.get("prompts", "") + ignored


def _threshold(record: dict[str, Any]) -> str:
    return f"{record['threshold']:g}" if record.get("threshold") is not None else ""


def _metric_table(pairs: list[tuple[str, dict[str, Any]]], rows: list[dict[str, Any]]) -> str:
    # What every evaluation has alike needs no column: most have threshold 0, and one run has one dtype.
    more = {"threshold": _threshold, "dtype": lambda record: record.get("dtype", "")}
    usual = {"threshold": {"", "0"}, "dtype": {"", "float32"}}
    more = {name: of for name, of in more.items() if not {of(record) for _, record in pairs} <= usual[name]}
    head = ["run", "model", "stage", "protocol", "prompts", *more, "convention", "pictures", *METRIC_KEYS]
    lines = []
    for run, record in pairs:
        facts = [run, Path(record.get("model", "")).name, record.get("stage", ""), record["protocol"], _asked(record)]
        facts += [*(of(record) for of in more.values()), record["convention"]]
        cells = _words(facts) + f"<td class=n>{_text(record.get('samples', ''))}</td>"
        lines.append(f"<tr>{cells}{''.join(_number(record, key) for key in METRIC_KEYS)}</tr>")
    for record in rows:
        facts = [
            "published",
            record["model"],
            "",
            record["protocol"],
            record["prompts"],
            *[""] * len(more),
            record["convention"],
        ]
        cells = _words(facts) + "<td></td>"
        lines.append(f"<tr class=published>{cells}{''.join(_number(record, key) for key in METRIC_KEYS)}</tr>")
    return _table(head, lines, 1 + len(METRIC_KEYS))


def _name(run: str, record: dict[str, Any]) -> str:
    threshold = f"threshold {_threshold(record)}" if record.get("threshold") else ""
    return ", ".join(
        part for part in (run, record.get("stage"), record["protocol"], _asked(record), threshold) if part
    )


def _curves(pairs: list[tuple[str, dict[str, Any]]]) -> str:
    """The curves of one split in one picture, their numbers below."""
    # The curve knows no convention: one of the records of an evaluation is enough.
    curves = {_name(run, record): record["curve"] for run, record in pairs if record.get("curve")}
    drawn = {label: curve for label, curve in curves.items() if curve["balance"] is not None}
    if not curves:
        return ""
    parts = ["<h3>N_acc and T_acc over the rejection threshold</h3>"]
    if drawn:
        with tempfile.TemporaryDirectory() as folder:
            plot_rejection_curves(drawn, Path(folder) / "curve.png")
            picture = base64.b64encode((Path(folder) / "curve.png").read_bytes()).decode()
        parts.append(f"<img class=curve alt='N_acc against T_acc' src='data:image/png;base64,{picture}'>")
    lines = []
    for label, curve in curves.items():
        if (best := curve["balance"]) is None:
            lines.append(f"<tr><td>{_text(label)}</td><td colspan=4 class=none>{_text(curve['note'])}</td></tr>")
            continue
        numbers = (curve["area"], best["threshold"], best["N_acc"], best["T_acc"])
        lines.append(f"<tr><td>{_text(label)}</td>" + "".join(f"<td class=n>{n:.4f}</td>" for n in numbers) + "</tr>")
    parts.append(_table(["evaluation", "area", "balancing threshold", "N_acc there", "T_acc there"], lines, 4))
    for label, curve in drawn.items():
        points = list(zip(*(curve["points"][name] for name in ("threshold", "N_acc", "T_acc"))))
        points = [points[n] for n in sorted({round(n) for n in np.linspace(0, len(points) - 1, 21)})]
        rows = ("<tr>" + "".join(f"<td class=n>{value:.4f}</td>" for value in point) + "</tr>" for point in points)
        table = _table(["reject a score below", "N_acc", "T_acc"], rows, 3)
        parts.append(f"<details><summary>{_text(label)}: numbers</summary>{table}</details>")
    return "".join(parts)


def _breakdowns(pairs: list[tuple[str, dict[str, Any]]]) -> str:
    parts = ["<h3>By kind of expression and by expressions per prompt</h3>"]
    for run, record in pairs:
        lines = []
        for field, groups in record.get("breakdown", {}).items():
            for value, part in groups.items():
                name = value if field == "kind" else f"{value} per prompt"
                # Within a part that has no no-targets N_acc is not defined, which needs no reason in every cell.
                cells = "".join(_number({"metrics": part["metrics"]}, key) for key in METRIC_KEYS)
                lines.append(f"<tr><td>{_text(name)}</td><td class=n>{part['samples']}</td>{cells}</tr>")
        table = _table(["expressions", "count", *METRIC_KEYS], lines, 1 + len(METRIC_KEYS))
        title = _text(f"{_name(run, record)}, {record['convention']}")
        parts.append(f"<details><summary>{title}</summary>{table}</details>")
    return "".join(parts) if any(record.get("breakdown") for _, record in pairs) else ""


def _gallery(runs: Sequence[Run]) -> str:
    """Pictures of all evaluations, with filters."""
    cards, choices = [], {"run": {}, "group": dict.fromkeys(GROUPS), "kind": {}}
    for run in runs:
        records = {record["rows"]: record for record in run.records if record.get("rows")}
        for file, shown in run.exhibits.items():
            record = records[file]
            name = f"{_name(run.name, record)}, {record['dataset']} {record['split']}"
            choices["run"][name] = None
            for entry in shown:
                choices["kind"][entry["kind"]] = None
                decision = "rejected" if entry["is_rejected"] else "kept"
                facts = [
                    f"<b>{_text(entry['expression'])}</b>",
                    _text(f"{entry['group']}: {entry['kind']}, {decision}"),
                ]
                if entry["kind"] != "no-target":
                    facts.append(f"IoU {entry['intersection'] / entry['union']:.3f}")
                facts.append("no slot in the answer" if entry["score"] is None else f"score {entry['score']:+.2f}")
                facts.append(_text(f"image {entry['image_id']}; {name}"))
                data = " ".join(
                    f'data-{key}="{_text(value)}"'
                    for key, value in (("run", name), ("group", entry["group"]), ("kind", entry["kind"]))
                )
                cards.append(
                    f'<figure {data}><img alt="" src="data:image/jpeg;base64,{entry["picture"]}">'
                    f"<figcaption>{'<br>'.join(facts)}</figcaption></figure>"
                )
    if not cards:
        return ""
    titles = {"run": "evaluation", "group": "what", "kind": "kind"}
    selects = []
    for key, values in choices.items():
        options = "".join(f'<option value="{_text(value)}">{_text(value)}</option>' for value in values)
        selects.append(
            f"<label>{titles[key]} <select name={key}><option value=''>all</option>{options}</select></label>"
        )
    return (
        "<h2>Pictures</h2><p class=legend><span style='border-color:rgb(0,114,178)'>truth (blue outline)</span> "
        "<span style='border-color:rgb(230,159,0)'>prediction (orange, tinted)</span></p>"
        f"<div class=filters>{''.join(selects)}<span id=count></span></div>"
        f"<div class=gallery>{''.join(cards)}</div><script>{_SCRIPT}</script>"
    )


def report_page(runs: Sequence[Run]) -> str:
    """The page about some runs, side by side where they were evaluated on one split. It refers to nothing outside."""
    splits: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for run in runs:
        for record in run.records:
            splits.setdefault((record["dataset"], record["split"]), []).append((run.name, record))
    title = "Evaluation: " + ", ".join(run.name for run in runs)
    head = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    parts = [f"{head}<title>{_text(title)}</title><style>{_STYLE}</style><h1>{_text(title)}</h1>"]
    for (dataset, split), pairs in splits.items():
        known = published(dataset, split)
        parts.append(f"<h2>{_text(dataset)} {_text(split)}</h2>{_metric_table(pairs, known)}")
        parts.append("<p>Small print in the cells: 95 % bootstrap intervals over pictures.</p>")
        if known:
            parts.append(f"<p>Published: {_text(PUBLISHED_SOURCE)}.</p>")
        else:
            parts.append("<p>There are no published numbers of the original for this split here.</p>")
        notes = {record["protocol"]: record.get("protocol_note", "") for _, record in pairs}
        if known:
            notes.setdefault(
                "teacher_forced", "gold answers were in the model's input (the original's published protocol)"
            )
        for protocol, note in notes.items():
            kind = " class=forced" if protocol == "teacher_forced" else ""
            parts.append(f"<p{kind}>{_text(protocol)}: {_text(note)}.</p>")
        for convention in dict.fromkeys([record["convention"] for _, record in pairs] + ["gsva"] * bool(known)):
            parts.append(f"<p>{_text(convention)}: {_text(_CONVENTIONS.get(convention, ''))}.</p>")
        told = (
            f"{_name(run, record)}: {f'{key} is ' if key in METRIC_KEYS else 'the curve: ' if key == 'curve' else ''}{note}"
            for run, record in pairs
            for key, note in record.get("notes", {}).items()
            if key != "protocol"  # said above
        )
        parts += [f"<p class=none>{_text(note)}.</p>" for note in dict.fromkeys(told)]
        parts += [_curves(pairs), _breakdowns(pairs)]
    return "\n".join([*parts, _gallery(runs), "</html>"])


def read_runs(directories: Sequence[str | Path]) -> list[Run]:
    """The runs, each under a name of its own."""
    names = [Path(directory).resolve().name for directory in directories]
    if len({Path(directory).resolve() for directory in directories}) < len(directories):
        raise ValueError("A run directory is given twice; give each once.")
    return [
        read_run(directory, name if names.count(name) == 1 else str(directory))
        for directory, name in zip(directories, names)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; what is wrong with a run ends it with status 1 and one line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainers.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="output directories of run_gres.py --do_eval")
    parser.add_argument("--output", type=Path, help="page to write; by default report.html in the first RUN_DIR")
    options = parser.parse_args(arguments)
    output = options.output or Path(options.runs[0]) / "report.html"
    try:
        write_text(output, report_page(read_runs(options.runs)))
    except (ValueError, OSError) as error:
        print(f"trainers.report: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
