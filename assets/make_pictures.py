"""
Draw the pictures of README.md: what a model answers on images of *shapes*, and how GSVA is built.

    python assets/make_pictures.py --model assets/tiny_gsva_gres
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_gsva  # noqa: F401  registers the Auto classes
from data_scripts import shapes
from data_scripts.files import replacing
from data_scripts.transforms import read_image
from evaluation.config import EvaluationConfig
from evaluation.questions import questions_of
from evaluation.tiles import all_masks, make_tiles, sheet

HERE = Path(__file__).parent
ROWS = (12, 29)  # of the test split
# Boxes of the architecture: left, bottom, width, text, colour. Frozen parts are blue, trained ones orange.
FROZEN, TRAINED, DATA = "#d6e4f2", "#fbe3c4", "#f2f2f2"
BOXES = {
    "image": (0.0, 2.4, 1.6, "image", DATA),
    "question": (0.0, 0.0, 1.6, 'expressions\n"man in red",\n"the unicorn"', DATA),
    "tower": (2.4, 1.2, 1.9, "vision tower\nand projector", FROZEN),
    "language": (5.1, 0.6, 2.2, "language model\n(LoRA, embeddings,\nhead)", TRAINED),
    "answer": (9.0, 0.0, 2.3, "answer\nman in red:[SEG]\nthe unicorn:[REJ]", DATA),
    "projector": (9.0, 1.2, 2.3, "mask projector\n(two-layer MLP)", TRAINED),
    "encoder": (5.1, 2.4, 2.2, "SAM's image encoder", FROZEN),
    "decoder": (12.9, 1.8, 1.9, "SAM's mask\ndecoder", TRAINED),
    "result": (15.5, 0.9, 2.0, "a mask for\neach [SEG],\nnone for [REJ]", DATA),
}
ARROWS = (
    ("image", "tower", ""), ("image", "encoder", ""), ("tower", "language", ""), ("question", "language", ""),
    ("language", "answer", ""), ("language", "projector", "state before [SEG]"), ("projector", "decoder", "prompt"),
    ("encoder", "decoder", "embedding"), ("decoder", "result", ""), ("answer", "result", ""),
)  # fmt: skip
HEIGHT = 0.85


def draw_answers(model_dir: str, path: Path) -> None:
    """Draw the answers of a model on two images of the test split as a sheet of tiles."""
    processor = AutoProcessor.from_pretrained(model_dir)
    model = AutoModelForImageTextToText.from_pretrained(model_dir)
    groups = []
    for number in ROWS:
        row = shapes.make_row(0, "test", number)
        image = read_image(row["image"])
        questions = questions_of(row, EvaluationConfig(rows=[row], dataset="shapes", split="test"))
        inputs = processor(images=[image], expressions=[[one.text for one in questions]], return_tensors="pt")
        (results,) = processor.post_process_segmentation(model.segment(**inputs), inputs)
        groups.append(("", [all_masks(image, results), *make_tiles(image, results, questions)]))
    with replacing(path) as temporary:
        sheet(groups, columns=7, side=256).save(temporary, optimize=True)


def draw_architecture(path: Path) -> None:
    """Draw how GSVA is built."""
    figure = Figure(figsize=(13.5, 3.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.3, 17.8), ylim=(-0.45, 3.5))
    axes.axis("off")
    for left, bottom, width, text, colour in BOXES.values():
        style = FancyBboxPatch((left, bottom), width, HEIGHT, "round,pad=0.08", facecolor=colour, edgecolor="#444444")
        axes.add_patch(style)
        axes.text(left + width / 2, bottom + HEIGHT / 2, text, ha="center", va="center", fontsize=9.5)
    for begin, end, label in ARROWS:
        _arrow(axes, BOXES[begin], BOXES[end], label)
    axes.text(12.9, 3.25, "blue: frozen    orange: trained", fontsize=9, color="#444444")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _arrow(axes: Axes, begin: Sequence, end: Sequence, label: str) -> None:
    """Draw an arrow from the right side of one box to the left side of another."""
    start = (begin[0] + begin[2] + 0.1, begin[1] + HEIGHT / 2)
    stop = (end[0] - 0.1, end[1] + HEIGHT / 2)
    axes.annotate("", stop, start, arrowprops={"arrowstyle": "-|>", "color": "#444444", "shrinkA": 0, "shrinkB": 0})
    middle, slope = ((start[0] + stop[0]) / 2, (start[1] + stop[1]) / 2), np.subtract(stop, start)
    angle = np.degrees(np.arctan2(slope[1], slope[0]))
    options = {"rotation": angle, "rotation_mode": "anchor", "transform_rotates_text": True}
    axes.text(*middle, label + "\n", ha="center", va="center", fontsize=8, color="#444444", **options)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="assets/tiny_gsva_gres", help="directory of a model that was trained on shapes"
    )
    options = parser.parse_args(argv)
    draw_answers(options.model, HERE / "demo.png")
    draw_architecture(HERE / "architecture.png")
    print(f"drew {HERE / 'demo.png'} and {HERE / 'architecture.png'}")


if __name__ == "__main__":
    main()
