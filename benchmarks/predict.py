"""Measure predictions on data sets: images per second by batch and expressions, and the whole road beside the bare model.

    python -m benchmarks predict [--quick]

Workload M has random weights from a fixed seed, in fp32 on two threads, and images of COCO's sizes. First `Predictor` answers
images in memory, in batches of 1, 2, 4 and 8 with 1 and 8 expressions each. Then `predict_dataset` reads the same images from a
folder of JPEG files and writes parquet files, in turns with two loops over images that are decoded already: `segment` alone, with
inputs that are prepared before the clock starts, and the loop that users write, with the processor before it and the results
after it. Only ratios within one run are meaningful. The goal is a whole road at least 0.9 times as fast as `segment` alone.

The benchmark prints a table and writes benchmarks/results/predict.json.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image

from benchmarks._mask_models import SMALL_VIT, vit_config
from benchmarks._workload import PHRASES, THREADS, Elsewhere, busy_line, machine, make_model, make_rows, write_result
from evaluation.predict_dataset import predict_dataset
from evaluation.predictor import Predictor
from evaluation.streams import Columns, open_stream

BATCHES, COUNTS = (1, 2, 4, 8), (1, 8)
ROAD_BATCH = 4
GOAL = 0.9


def expressions(count: int) -> list[str]:
    """Return `count` different expressions."""
    return [text for texts in PHRASES for text in texts][:count]


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=95)
    return file.getvalue()


def measure_batches(loaded, images: list[Image.Image], batches, repeats: int) -> list[dict]:
    """Measure images per second of `Predictor` on images in memory; the best of `repeats` turns counts."""
    found = []
    for count in COUNTS:
        for batch in batches:
            predictor = Predictor(
                "M", expressions=expressions(count), batch_size=batch, threads=THREADS, loaded=loaded
            )
            seconds = []
            for _ in range(repeats):
                begun = time.perf_counter()
                for first in range(0, len(images), batch):
                    predictor({"image": images[first : first + batch]})
                seconds.append(time.perf_counter() - begun)
            found.append({"batch": batch, "expressions": count, "images_per_second": len(images) / min(seconds)})
    return found


def measure_road(loaded, contents: list[bytes], repeats: int) -> dict:
    """Measure images per second of the three ways, in turns; the best turn of each counts."""
    processor, model = loaded
    asked = expressions(len(PHRASES[0]))
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
    pieces = [images[first : first + ROAD_BATCH] for first in range(0, len(images), ROAD_BATCH)]

    def inputs_of(piece):
        return processor(images=piece, expressions=[asked] * len(piece), return_tensors="pt")

    prepared = [inputs_of(piece) for piece in pieces]
    ways: dict[str, list[float]] = {"segment alone": [], "loop with processor and results": [], "whole road": []}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "images"
        folder.mkdir()
        for n, content in enumerate(contents):
            (folder / f"{n:05d}.jpg").write_bytes(content)
        for turn in range(repeats):
            begun = time.perf_counter()
            for inputs in prepared:
                model.segment(**inputs)
            ways["segment alone"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            for piece in pieces:
                inputs = inputs_of(piece)
                processor.post_process_segmentation(model.segment(**inputs), inputs)
            ways["loop with processor and results"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            predictor = Predictor("M", expressions=asked, batch_size=ROAD_BATCH, threads=THREADS, loaded=loaded)
            totals = predict_dataset(predictor, open_stream(str(folder), Columns()), Path(work) / f"out-{turn}")
            ways["whole road"].append(time.perf_counter() - begun)
    speeds = {name: len(images) / min(seconds) for name, seconds in ways.items()}
    return {
        "images_per_second": speeds,
        "ratio_to_segment_alone": speeds["whole road"] / speeds["segment alone"],
        "ratio_to_loop": speeds["whole road"] / speeds["loop with processor and results"],
        "waited_share": totals.waited / totals.seconds,
        "padding_share": 1 - totals.tokens / totals.padded_tokens,
    }


def table(result: dict) -> str:
    lines = [f"{'batch':>8}{'expressions':>14}{'images/s':>12}"]
    lines += [
        f"{one['batch']:>8}{one['expressions']:>14}{one['images_per_second']:>12.3f}" for one in result["batches"]
    ]
    road = result["road"]
    lines += [f"{name:<34}{speed:>8.3f} images/s" for name, speed in road["images_per_second"].items()]
    verdict = "reached" if road["ratio_to_segment_alone"] >= GOAL else "NOT REACHED"
    lines.append(
        f"the whole road is {road['ratio_to_segment_alone']:.3f} times as fast as segment alone (goal {GOAL}: {verdict}), and "
        f"{road['ratio_to_loop']:.3f} times as fast as the loop; the model waited {100 * road['waited_share']:.1f} % of the "
        f"time, {100 * road['padding_share']:.1f} % of the tokens were padding"
    )
    return "\n".join([*lines, busy_line(result)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="use 2 images, and do not write the result file")
    arguments = parser.parse_args(argv)
    PartialState(cpu=True)
    torch.set_num_threads(THREADS)
    elsewhere = Elsewhere()
    processor_and_model = make_model(vit_config(*SMALL_VIT))[::-1]
    contents = [jpeg(row["image"]) for row in make_rows(2 if arguments.quick else 24)]
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in contents]
    batches = BATCHES[:2] if arguments.quick else BATCHES
    repeats = 1 if arguments.quick else 3
    Predictor("M", expressions=["a dog"], threads=THREADS, loaded=processor_and_model)(
        {"image": images[:1]}
    )  # warms up
    result = {
        "workload": {"images": len(images), "road_batch": ROAD_BATCH, "road_expressions": len(PHRASES[0]),
                     "threads": THREADS, "dtype": "float32"},
        "batches": measure_batches(processor_and_model, images[:8], batches, repeats),
        "road": measure_road(processor_and_model, contents, repeats),
        "machine": machine(elsewhere),
    }  # fmt: skip
    print(table(result))
    if not arguments.quick:
        write_result("predict", result)


if __name__ == "__main__":
    main()
