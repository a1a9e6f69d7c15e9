"""Pages about evaluations: records and exhibits → the context of a template → one HTML file that opens offline."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_scripts.files import render
from metrics.gres import METRIC_KEYS, plot_rejection_curves

from .config import PROTOCOL_NOTES
from .drawing import data_url
from .exhibits import GROUPS
from .measured import describe, differences
from .published import SOURCE, published
from .questions import Question
from .records import MetricCell, Record, metric_cells, protocol_notes, shown_keys
from .tiles import Tile, make_tiles

TEMPLATES = Path(__file__).parent / "templates"
CURVE_NUMBERS = 21  # points of a rejection curve in the table below it
CONVENTION_NOTES = {
    "rela": "as the benchmark's own evaluator: a rejected target has no intersection and keeps its union",
    "gsva": "as the original's eval_gres: a rejected target still scores with its mask where one was made (teacher_forced)",
    "gsva_validate": "as the original's validate, which knows no rejection",
}


@dataclass(frozen=True)
class AnsweredImage:
    """An image with its questions and the processor's result for each."""

    image_id: str
    image: Image.Image
    questions: list[Question]
    results: list[dict[str, Any]]

    @property
    def tiles(self) -> list[Tile]:
        """Return a tile for each expression."""
        return make_tiles(self.image, self.results, self.questions)


@dataclass(frozen=True)
class Run:
    """An output folder: its name, its records, and the exhibits of each evaluation by the name of its rows file."""

    name: str
    records: list[Record]
    exhibits: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class TableLine:
    """One line of a metric table: words, a count, and metric cells."""

    facts: list[str]
    samples: int | str
    cells: list[MetricCell]
    is_published: bool = False


def prediction_page(title: str, text: str, answered: Sequence[AnsweredImage]) -> str:
    """Return a page with a tile for every expression, which shows prediction and truth.

    Args:
        title: The heading.
        text: Plain text above the images.
        answered: The images with their results.
    """
    groups = [(one.image_id, _for_page(one.tiles)) for one in answered]
    return render(TEMPLATES / "predictions.html.jinja", title=title, text=text, groups=groups, has_truth=True)


def file_page(text: str, files: Sequence[tuple[str, Sequence[Tile]]]) -> str:
    """Return a page with the tiles of image files, whose truth is not known.

    Args:
        text: Plain text above the images.
        files: The name of each image file and its tiles.
    """
    groups = [(name, _for_page(tiles)) for name, tiles in files]
    return render(TEMPLATES / "predictions.html.jinja", title="Predictions", text=text, groups=groups, has_truth=False)


def tiles_html(tiles: Sequence[Tile]) -> str:
    """Return tiles as a piece of HTML with its style, for a page of somebody else."""
    return render(TEMPLATES / "tiles.html.jinja", pictures=_for_page(tiles))


def _for_page(tiles: Sequence[Tile]) -> list[dict[str, Any]]:
    """Return the context of the tiles' template."""
    facts = ("text", "is_rejected", "decision", "verdict", "is_right", "colour")
    return [
        {**{name: getattr(tile, name) for name in facts}, "url": data_url(tile.picture, "JPEG", quality=88)}
        for tile in tiles
    ]


def report_page(runs: Sequence[Run]) -> str:
    """Return the page about several runs, which compares those that were evaluated on the same split."""
    splits: dict[tuple[str, str], list[tuple[str, Record]]] = {}
    for run in runs:
        for record in run.records:
            splits.setdefault((record["dataset"], record["split"]), []).append((run.name, record))
    title = "Evaluation: " + ", ".join(run.name for run in runs)
    cards = [card for run in runs for card in _cards(run)]
    filters = {name: list(dict.fromkeys(card[name] for card in cards)) for name in ("run", "group", "kind")}
    filters["group"] = list(GROUPS)
    return render(
        TEMPLATES / "report.html.jinja",
        title=title,
        splits=[_split(dataset, split, pairs) for (dataset, split), pairs in splits.items()],
        source=SOURCE,
        cards=cards,
        filters=filters,
    )


def _split(dataset: str, split: str, pairs: list[tuple[str, Record]]) -> dict[str, Any]:
    """Return the context of one split: its table, notes, curves and breakdowns."""
    records, known = [record for _, record in pairs], published(dataset, split)
    keys = shown_keys(records)
    notes = protocol_notes(records)
    if known:
        notes.setdefault("teacher_forced", PROTOCOL_NOTES["teacher_forced"])
    conventions = dict.fromkeys([record["convention"] for record in records] + ["gsva"] * bool(known))
    # Columns that say the same of every evaluation are left out: most have threshold 0, and one run has one dtype.
    optional = {"threshold": _threshold, "dtype": lambda record: record.get("dtype", "")}
    usual = {"threshold": {"", "0"}, "dtype": {"", "float32"}}
    optional = {name: of for name, of in optional.items() if not {of(record) for record in records} <= usual[name]}
    lines = []
    for run, record in pairs:
        facts = [run, Path(record.get("model", "")).name, record.get("stage", ""), record["protocol"], _asked(record)]
        facts += [*(of(record) for of in optional.values()), record["convention"]]
        lines.append(TableLine(facts, record.get("samples", ""), _cells(record, keys)))
    for record in known:
        facts = ["published", record["model"], "", record["protocol"], record["prompts"], *[""] * len(optional)]
        lines.append(TableLine([*facts, record["convention"]], "", _cells(record, keys), is_published=True))
    return {
        "title": f"{dataset} {split}",
        "head": ["run", "model", "stage", "protocol", "prompts", *optional, "convention"],
        "lines": lines,
        "has_published": bool(known),
        "protocols": notes,
        "conventions": {name: CONVENTION_NOTES.get(name, "") for name in conventions},
        "notes": _notes(pairs),
        "measured": list(dict.fromkeys(describe(record) for record in records)),
        "differences": differences(pairs),
        **_curves(pairs),
        "metric_keys": keys,
        "breakdowns": [_breakdown(run, record, keys) for run, record in pairs if record.get("breakdown")],
    }


def _cells(record: Record, keys: Sequence[str]) -> list[MetricCell]:
    return list(metric_cells(record, keys).values())


def _asked(record: Record) -> str:
    ignored = ", ignore region left out" if record.get("ignore_region") == "ignored" else ""
    return record.get("prompts", "") + ignored


def _threshold(record: Record) -> str:
    return f"{record['threshold']:g}" if record.get("threshold") is not None else ""


def _name(run: str, record: Record) -> str:
    threshold = f"threshold {_threshold(record)}" if record.get("threshold") else ""
    return ", ".join(
        part for part in (run, record.get("stage"), record["protocol"], _asked(record), threshold) if part
    )


def _notes(pairs: list[tuple[str, Record]]) -> list[str]:
    """Return the notes of the records as sentences. The note on the protocol is above them already."""
    notes, shown = [], shown_keys([record for _, record in pairs])
    for run, record in pairs:
        for key, note in record.get("notes", {}).items():
            if key != "protocol" and (key in shown or key not in METRIC_KEYS):
                subject = f"{key} is " if key in METRIC_KEYS else "the curve: " if key == "curve" else ""
                notes.append(f"{_name(run, record)}: {subject}{note}")
    return list(dict.fromkeys(notes))


def _curves(pairs: list[tuple[str, Record]]) -> dict[str, Any]:
    """Return the rejection curves of one split: a picture of them, and their numbers."""
    # A curve does not depend on the convention: one of the records of an evaluation is enough.
    curves = {_name(run, record): record["curve"] for run, record in pairs if record.get("curve")}
    drawn = {label: curve for label, curve in curves.items() if curve["balance"] is not None}
    picture = None
    if drawn:
        buffer = io.BytesIO()
        plot_rejection_curves(drawn, buffer)
        buffer.seek(0)
        picture = data_url(Image.open(buffer))
    numbers = {}
    for label, curve in drawn.items():
        points = list(zip(*(curve["points"][name] for name in ("threshold", "N_acc", "T_acc"))))
        chosen = sorted({round(n) for n in np.linspace(0, len(points) - 1, CURVE_NUMBERS)})
        numbers[label] = [points[n] for n in chosen]
    return {"curves": curves, "curve_picture": picture, "curve_numbers": numbers}


def _breakdown(run: str, record: Record, keys: Sequence[str]) -> dict[str, Any]:
    lines = []
    for field, groups in record["breakdown"].items():
        for value, part in groups.items():
            name = value if field == "kind" else f"{value} per prompt"
            # N_acc is not defined in a part without no-targets: not worth a reason in every cell.
            lines.append(TableLine([name], part["samples"], _cells({"metrics": part["metrics"]}, keys)))
    return {"title": f"{_name(run, record)}, {record['convention']}", "lines": lines}


def _cards(run: Run) -> list[dict[str, Any]]:
    """Return the context of a run's exhibits."""
    records = {record["rows"]: record for record in run.records if record.get("rows")}
    cards = []
    for file, exhibits in run.exhibits.items():
        record = records[file]
        name = f"{_name(run.name, record)}, {record['dataset']} {record['split']}"
        for exhibit in exhibits:
            facts = [f"{exhibit['group']}: {exhibit['kind']}, {'rejected' if exhibit['is_rejected'] else 'kept'}"]
            if exhibit["kind"] != "no-target":
                facts.append(f"IoU {exhibit['intersection'] / exhibit['union']:.3f}")
            facts.append("no slot in the answer" if exhibit["score"] is None else f"score {exhibit['score']:+.2f}")
            facts.append(f"image {exhibit['image_id']}; {name}")
            cards.append({**exhibit, "run": name, "facts": facts})
    return cards
