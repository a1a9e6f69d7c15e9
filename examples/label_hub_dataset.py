# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate>=1.15,<2",
#     "datasets>=5.1,<6",
#     "huggingface_hub>=2.4",
#     "jinja2>=3.1",
#     "numpy>=2.4",
#     "pillow>=12.2",
#     "pyarrow>=24.0",
#     "pycocotools>=2.0.11",
#     "torch>=2.13",
#     "transformers>=5.23,<6",
# ]
# ///
"""Label a Hub data set with a GSVA model on a rented machine, and push the predictions as a data set.

    hf jobs uv run --flavor l4x1 --secrets HF_TOKEN label_hub_dataset.py USER/photos USER/photos-labels \
        --model USER/gsva --expressions "the red circle" "all stars"

This file is all that the machine needs: the model brings its own code. Each expression of each image becomes a row with its
mask (COCO run lengths) or its rejection; an image that cannot be read becomes a row with its error. Every shard is pushed when
it is done. Start the same command again after a stop: it goes on behind the shards that the Hub has.
"""

import argparse
import io
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import pipeline

SETTINGS = "settings.json"
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("expression", pa.string()),
        ("is_rejected", pa.bool_()),
        ("score", pa.float32()),  # log-odds that the expression is there
        ("probability", pa.float32()),
        ("box", pa.list_(pa.int32(), 4)),  # x, y, width, height in pixels
        ("area", pa.int64()),
        ("mask", pa.struct([("size", pa.list_(pa.int32(), 2)), ("counts", pa.string())])),
        ("iou_estimate", pa.float32()),
        ("model", pa.string()),
        ("error", pa.string()),
    ]
)


def row_of(result: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the row for a result of the pipeline."""
    numbers = {"score": result["score"], "probability": result["probability"], "iou_estimate": result.get("iou_score")}
    row = {
        **facts,
        "expression": result["text"],
        "is_rejected": bool(result["is_rejected"]),
        "area": int(result["mask"].sum()),
        **{name: None if value is None or math.isnan(value) else float(value) for name, value in numbers.items()},
    }
    if not result["is_rejected"]:
        mask = coco_mask.encode(np.asfortranarray(result["mask"]).view(np.uint8))
        row["box"] = [int(side) for side in coco_mask.toBbox(mask)]
        row["mask"] = {"size": [int(side) for side in mask["size"]], "counts": mask["counts"].decode("ascii")}
    return row


def content_of(image: dict[str, Any]) -> bytes:
    """Return the bytes of an image that a row holds, or names on the Hub. Raises ValueError for a file of this machine."""
    if image["bytes"] is not None:
        return image["bytes"]
    if not image["path"].startswith("hf://"):
        raise ValueError(
            f"the data set names {image['path']} instead of holding it, and only files of the Hub are opened"
        )
    return HfFileSystem().read_bytes(image["path"])


def label(
    segment: Any, rows: list[dict[str, Any]], batch_size: int, threshold: float | None
) -> Iterator[dict[str, Any]]:
    """Yield the predictions for rows with `image_id`, `image` (a mapping of bytes and path) and `expressions`."""
    readable = []
    for row in rows:
        facts = {"image_id": row["image_id"], "model": segment.model.name_or_path}
        try:
            with Image.open(io.BytesIO(content_of(row["image"]))) as image:
                image.load()
                readable.append((facts, {"image": image.copy(), "expressions": list(row["expressions"])}))
        except (OSError, ValueError, SyntaxError, TypeError, KeyError) as error:
            yield {**facts, "error": f"The image cannot be read: {error}"}
    for start in range(0, len(readable), batch_size):
        batch = readable[start : start + batch_size]
        try:
            answers: list[Any] = segment([asked for _, asked in batch], threshold=threshold, batch_size=len(batch))
        except ValueError:  # of one of them: ask for each alone, to know which
            answers = [_alone(segment, asked, threshold) for _, asked in batch]
        for (facts, _), answer in zip(batch, answers):
            if isinstance(answer, Exception):
                yield {**facts, "error": str(answer)}
                continue
            for result in answer:
                height, width = result["mask"].shape
                yield row_of(result, {**facts, "height": height, "width": width})


def _alone(segment: Any, asked: dict[str, Any], threshold: float | None) -> Any:
    try:
        return segment(asked, threshold=threshold)
    except ValueError as error:
        return error


def begin(api: HfApi, output: str, settings: dict[str, Any], private: bool) -> set[str]:
    """Make the output data set, or return the shards that it has. Raises SystemExit if they have other settings."""
    api.create_repo(output, repo_type="dataset", exist_ok=True, private=private)
    files = set(api.list_repo_files(output, repo_type="dataset"))
    if SETTINGS not in files:
        content = json.dumps(settings, indent=1).encode()
        api.upload_file(path_or_fileobj=content, path_in_repo=SETTINGS, repo_id=output, repo_type="dataset")
        return set()
    with open(hf_hub_download(output, SETTINGS, repo_type="dataset"), encoding="utf-8") as file:
        earlier = json.load(file)
    if changed := [name for name in settings if earlier.get(name) != settings[name]]:
        told = ", ".join(f"{name} {earlier.get(name)!r} instead of {settings[name]!r}" for name in changed)
        raise SystemExit(
            f"{output} holds predictions with {told}; give the same settings, or push to another data set."
        )
    return {name for name in files if name.endswith(".parquet")}


def blocks(arguments: argparse.Namespace, finished: set[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the name of each shard that is not finished, with its rows."""
    rows = datasets.load_dataset(arguments.input, split=arguments.split, streaming=True)
    names = rows.column_names or list(next(iter(rows)))
    for column in filter(None, (arguments.image_column, arguments.id_column, arguments.expressions_column)):
        if column not in names:
            raise SystemExit(f"{arguments.input} has no column {column!r}; it has {', '.join(names)}.")
    rows = rows.cast_column(arguments.image_column, datasets.Image(decode=False))
    name = "data/predictions-{:06d}.parquet".format
    first = next(number for number in itertools.count() if name(number) not in finished)
    remaining = iter(rows.skip(first * arguments.shard_size))
    for number in itertools.count(first):
        found = list(itertools.islice(remaining, arguments.shard_size))
        if not found:
            return
        if name(number) not in finished:
            start = number * arguments.shard_size
            yield (
                name(number),
                [
                    {
                        "image": row[arguments.image_column],
                        "image_id": str(row[arguments.id_column]) if arguments.id_column else str(start + n),
                        "expressions": row[arguments.expressions_column]
                        if arguments.expressions_column
                        else arguments.expressions,
                    }
                    for n, row in enumerate(found)
                ],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("input", help="Hub id of the data set with the images")
    parser.add_argument("output", help="Hub id of the data set to make, or to go on with")
    parser.add_argument("--model", required=True, help="Hub id of a GSVA model")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--expressions", nargs="+", help="what to look for in every image")
    asked.add_argument("--expressions_column", help="the column with a list of expressions for each image")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument("--image_column", default="image", help="(default: %(default)s)")
    parser.add_argument("--id_column", help="the column that names the images (default: their numbers)")
    parser.add_argument("--threshold", type=float, help="reject below this score (default: the model's own)")
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time (default: %(default)s)")
    parser.add_argument("--shard_size", type=int, default=256, help="images in a shard (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="make a private data set")
    arguments = parser.parse_args()
    api = HfApi()
    settings = {
        name: value for name, value in vars(arguments).items() if name not in ("output", "batch_size", "private")
    }
    finished = begin(api, arguments.output, settings, arguments.private)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    segment = pipeline(
        "generalized-referring-segmentation",
        model=arguments.model,
        trust_remote_code=True,
        dtype=arguments.dtype,
        device=device,
    )
    print(f"{len(finished)} shards are on the Hub already")
    for name, rows in blocks(arguments, finished):
        found = list(label(segment, rows, arguments.batch_size, arguments.threshold))
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(found, schema=SCHEMA), file)
        api.upload_file(
            path_or_fileobj=file.getvalue(), path_in_repo=name, repo_id=arguments.output, repo_type="dataset"
        )
        rejected, errors = (sum(bool(row.get(key)) for row in found) for key in ("is_rejected", "error"))
        print(
            f"{name}: {len(rows)} images, {len(found)} rows, {rejected} rejected, {errors} with an error", flush=True
        )


if __name__ == "__main__":
    main()
