"""The page of the metric's Space: rows in, metrics out. `python app.py` starts it here; it needs gradio and evaluate."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import evaluate

CONVENTIONS = ("rela", "gsva", "gsva_validate")
EXAMPLE = """\
{"is_no_target": false, "is_rejected": false, "intersection": 3, "union": 4, "score": 2.5}
{"is_no_target": true, "is_rejected": true, "intersection": 0, "union": 0, "score": -1.5}
"""
# evaluate's own widget does not start with gradio 4 and later, and cannot leave out optional columns.
EXPLANATION = (
    "Paste the rows of an evaluation, one JSON object for each expression, or give its `rows_*.jsonl`. A row needs "
    "`is_no_target`, `is_rejected`, `intersection` and `union` (pixels); `score`, `probability`, `num_targets`, "
    "`box_intersection`, `box_union` and `is_malformed` are optional, and other fields are ignored."
)


@cache
def metric() -> Any:
    """Return the metric beside this file."""
    return evaluate.load(str(Path(__file__).with_name("gres.py")))


def columns_of(text: str) -> dict[str, list]:
    """Return the columns that the metric takes from rows, one JSON object per line.

    Raises:
        ValueError: There are no rows, or a line is no object. The message has its number.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no object with named fields, but {line.strip()[:60]}")
        rows.append(row)
    if not rows:
        raise ValueError("there are no rows; paste one JSON object per line")
    names = [name for name in metric().features if any(name in row for row in rows)]
    return {name: [row.get(name) for row in rows] for name in names}


def table(text: str, convention: str = "rela") -> list[list[str]]:
    """Return a line for each metric: its name, its value with four digits, and why it is not defined.

    Raises:
        ValueError: A row is wrong.
    """
    metrics = metric().compute(**columns_of(text), convention=convention)
    notes = metrics.pop("notes")
    return [
        [name, "-" if math.isnan(value) else f"{value:.4f}", notes.get(name, "")] for name, value in metrics.items()
    ]


def page() -> Any:
    """Return the page as gradio's Blocks."""
    import gradio  # imported here, since `table` works without it

    def shown(text: str, convention: str) -> list[list[str]]:
        try:
            return table(text, convention)
        except ValueError as error:
            raise gradio.Error(str(error)) from None

    with gradio.Blocks(title="GRES") as blocks:
        gradio.Markdown(f"# GRES\n{EXPLANATION}")
        rows = gradio.Textbox(EXAMPLE, label="rows", lines=8)
        file = gradio.File(label="rows_*.jsonl", file_types=[".jsonl"])
        convention = gradio.Dropdown(CONVENTIONS, value=CONVENTIONS[0], label="convention")
        button = gradio.Button("Compute")
        result = gradio.Dataframe(headers=["metric", "value", "not defined because"], label="metrics")
        file.upload(lambda path: Path(path).read_text(encoding="utf-8"), file, rows)
        button.click(shown, [rows, convention], result)
    return blocks


if __name__ == "__main__":
    page().launch()
