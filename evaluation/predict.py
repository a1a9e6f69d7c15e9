"""Predict on image files, and on the images of a data set."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image

from data_scripts.files import replacing, write_json, write_text
from data_scripts.schema import encode_mask
from data_scripts.skipped import SkipList
from data_scripts.transforms import PictureError, read_image

from .config import PROTOCOL_NOTES, EvaluationConfig
from .loop import cpu_threads, evaluate_rows, evaluation_mode, gather_from_all, segment_images
from .pages import AnsweredImage, file_page, prediction_page
from .tiles import Tile, all_masks, make_tiles, sheet

PREDICTIONS = "predictions.json"
STEM_BYTES = 200  # of an overlay's name: most file systems allow 255 bytes with number and suffix


def predict_files(
    model,
    processor,
    paths: Sequence[str],
    expressions: Sequence[str],
    config: EvaluationConfig,
    output_dir: str | Path,
    skip_list: SkipList | None = None,
) -> None:
    """Segment every expression in every image file; write a picture of each, a page of all, and `predictions.json`.

    Args:
        paths: Image files.
        expressions: What to segment in each.
        config: The settings; its rows are not read.
        skip_list: Skip images that cannot be read and add them here; None raises an error.

    Raises:
        FileNotFoundError: An image file does not exist. Nothing is predicted then.
        ValueError: There are no expressions, or the protocol needs gold answers, or an image is broken. The predictions of
            the images before it are kept.
    """
    if not expressions:
        raise ValueError("--do_predict got images but no --expressions; say what to look for.")
    if config.protocol == "teacher_forced":
        raise ValueError(
            "protocols=teacher_forced needs gold answers, which image files do not have; choose slots or generate."
        )
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--image {path} does not exist; give the path of an image file.")
    if not PartialState().is_main_process:
        return
    output_dir = Path(output_dir)
    predictions: list[dict[str, Any]] = []
    tiles: list[list[Tile]] = []
    try:
        with evaluation_mode(model), cpu_threads(config.threads):
            for number, path in enumerate(paths):
                try:
                    image = read_image({"path": path, "bytes": None})
                except PictureError as error:
                    if skip_list is None:
                        raise
                    skip_list.add(error)
                    continue
                (results,) = segment_images(model, processor, [image], [list(expressions)], config)
                tiles.append([all_masks(image, results), *make_tiles(image, results)])
                predictions.append(_predict_file(number, path, image, results, tiles[-1], config, output_dir))
    except BaseException:
        if predictions:  # those before an image that cannot be read are kept
            _write_predictions(predictions, tiles, config, output_dir)
        raise
    _write_predictions(predictions, tiles, config, output_dir)


def _write_predictions(
    predictions: list[dict[str, Any]], tiles: list[list[Tile]], config: EvaluationConfig, output_dir: Path
) -> None:
    """Write `predictions.json` and the page."""
    write_json(output_dir / PREDICTIONS, predictions)
    note = f"{config.protocol}: {PROTOCOL_NOTES[config.protocol]}"
    names = [one["image"] for one in predictions]
    write_text(output_dir / "predictions.html", file_page(note, list(zip(names, tiles, strict=True))))


def _predict_file(
    number: int,
    path: str,
    image: Image.Image,
    results: list[dict[str, Any]],
    tiles: list[Tile],
    config: EvaluationConfig,
    output_dir: Path,
) -> dict[str, Any]:
    """Write and print the results of one image file, and return its entry of `predictions.json`."""
    name = printable(path)
    stem = Path(name).stem.replace("\\", "_").encode()[:STEM_BYTES].decode(errors="ignore")
    overlay_file = f"{number:03d}_{stem}.png"
    with replacing(output_dir / overlay_file) as temporary:
        sheet([("", tiles)]).save(temporary)
    for result in results:
        decision = "rejected" if result["is_rejected"] else f"{int(result['mask'].sum())} pixels"
        print(printable(f"{name}: {result['text']}: {decision} (score {result['score']:+.2f})", sys.stdout.encoding))
    size = {"height": image.height, "width": image.width}
    return {"image": name, **size, "overlay": overlay_file, **_answers(results, config)}


def printable(text: str, encoding: str | None = None) -> str:
    """Return a text in which what an encoding (UTF-8) cannot hold is written as its code, such as bytes of file names."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def predict_rows(model, processor, config: EvaluationConfig, output_dir: str | Path, num_pictures: int) -> None:
    """Predict on the rows of a data set; write `predictions.json` and a page with the first images.

    Args:
        num_pictures: Images on the page.
    """
    predictions: list[tuple[int, dict[str, Any], AnsweredImage | None]] = []

    def keep(index, row, questions, results):
        answered = None
        if index < num_pictures:
            answered = AnsweredImage(row["image_id"], read_image(row["image"]), questions, results)
        predictions.append((index, {"image_id": row["image_id"], **_answers(results, config)}, answered))

    evaluate_rows(model, processor, config, on_prediction=keep)
    ordered = sorted(gather_from_all(predictions), key=lambda entry: entry[0])
    if not PartialState().is_main_process:
        return
    write_json(Path(output_dir) / PREDICTIONS, [prediction for _, prediction, _ in ordered])
    note = f"{config.protocol}: {PROTOCOL_NOTES[config.protocol]}"
    title = f"{config.dataset} {config.split}, {config.protocol}"
    page = prediction_page(title, note, [answered for *_, answered in ordered if answered is not None])
    write_text(Path(output_dir) / "predictions.html", page)


def _answers(results: list[dict[str, Any]], config: EvaluationConfig) -> dict[str, Any]:
    """Return the results of an image as `predictions.json` holds them: masks as COCO RLE, no score without a slot."""
    return {
        "protocol": config.protocol,
        "protocol_note": PROTOCOL_NOTES[config.protocol],
        "expressions": [
            {
                "text": result["text"],
                "is_rejected": result["is_rejected"],
                **{name: None if math.isnan(result[name]) else result[name] for name in ("score", "probability")},
                "area": int(result["mask"].sum()),
                "mask": encode_mask(result["mask"]),
            }
            for result in results
        ],
    }
