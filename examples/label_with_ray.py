"""Label the images of a folder or bucket on the machines of a Ray cluster, or on this one.

    python examples/label_with_ray.py photos runs/labels --model runs/demo --expressions "the red circle" "all stars"

Each worker holds the model and answers batches of images. If a worker dies, Ray gives its batch to another. This process
collects the rows in files as `run_gres.py --do_predict --dataset` writes them. Started again, it skips images that are done.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data_scripts.files import replacing
from data_scripts.images import IMAGE_SUFFIXES
from evaluation.prediction_rows import prediction_table
from evaluation.predictor import Predictor

# The part of a CPU that reading takes, and that workers leave: as many workers as CPUs would otherwise wait for images forever.
READING = 0.1


class Worker(Predictor):
    """Predicts on batches of files. Ray makes one in each process of the pool.

    Args:
        folder: What the ids of images are relative to.
        options: Of `Predictor`.
    """

    def __init__(self, folder: str, **options: Any):
        super().__init__(**options)
        self.folder = folder

    def __call__(self, batch: dict[str, Any]) -> pyarrow.Table:
        """Return the rows for a batch of `bytes` and `path`; one that is no image becomes a row with its error."""
        ids = [os.path.relpath(path, self.folder) for path in batch["path"]]
        return prediction_table(super().__call__({"image": list(batch["bytes"]), "image_id": ids}))


def predictions(
    images: str, *, workers: int = 2, gpus: float = 0, batch_size: int = 8, skipped: Sequence[str] = (), **options: Any
) -> Iterator[pyarrow.Table]:
    """Yield the rows for all images below a folder or bucket, in tables that hold whole images, in any order.

    Args:
        images: A folder that all machines see, or an address such as s3://bucket/photos.
        workers: Processes with the model, on all machines together.
        gpus: Cards that each of them takes.
        skipped: The ids of images that are left out: their paths below `images`.
        options: Of `Predictor`: model, expressions, threshold and others.
    """
    import ray.data  # the extra `ray`

    folder = images.partition("://")[2] or os.path.abspath(images)
    done = frozenset(skipped)
    # Not read_images: it stops at a damaged image, and does not turn images upright.
    files = ray.data.read_binary_files(
        images,
        include_paths=True,
        file_extensions=[suffix[1:] for suffix in IMAGE_SUFFIXES],
        ray_remote_args={"num_cpus": READING},
    )
    if done:
        files = files.filter(lambda row: os.path.relpath(row["path"], folder) not in done, num_cpus=READING)
    rows = files.map_batches(
        Worker,
        fn_constructor_kwargs={"folder": folder, "batch_size": batch_size, **options},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1 - READING,
        num_gpus=gpus,
    )
    yield from rows.iter_batches(batch_size=None, batch_format="pyarrow")


def label(images: str, output_dir: str | os.PathLike, **options: Any) -> int:
    """Write the predictions for all images that `output_dir` lacks, and return how many rows there are new.

    Args:
        options: See `predictions`.
    """
    files = sorted(Path(output_dir).glob("predictions-*.parquet"))
    done = [
        name
        for file in files
        for name in pyarrow.parquet.read_table(file, columns=["image_id"])[0].unique().to_pylist()
    ]
    count, number = 0, len(files)
    for table in predictions(images, skipped=done, **options):
        with replacing(Path(output_dir) / f"predictions-{number:06d}.parquet") as temporary:
            pyarrow.parquet.write_table(table, temporary)
        count, number = count + table.num_rows, number + 1
    return count


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; `argv` defaults to `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", help="a folder that all machines see, or s3://... or gs://...")
    parser.add_argument("output_dir", help="the folder for the predictions, on this machine")
    parser.add_argument("--model", required=True, help="directory, which all machines see, or Hub id")
    parser.add_argument("--expressions", nargs="+", required=True, help="what to look for in every image")
    parser.add_argument("--threshold", type=float, help="reject below this score (default: the model's own)")
    parser.add_argument("--workers", type=int, default=2, help="processes with the model (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0, help="cards for each worker (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time (default: %(default)s)")
    arguments = vars(parser.parse_args(argv))
    import ray

    ray.init()  # RAY_ADDRESS names the cluster; without it, Ray starts on this machine
    print(f"{label(**arguments)} new rows in {arguments['output_dir']}")


if __name__ == "__main__":
    main()
