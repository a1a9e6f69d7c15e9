"""Predict on a data set of any size: on any number of processes, in shards that a killed run does not repeat."""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from tqdm import tqdm

from data_scripts.files import replacing

from .loop import gather_from_all
from .prediction_rows import columns_of, prediction_table
from .predictor import Predictor
from .requests import Asking, Request
from .streams import ImageStream

SHARDS = "predictions-*-*.parquet"
FACTS = b"gsva_hf"  # in a shard's metadata: its facts as JSON
WINDOW = 8  # batches whose images are sorted by size and length together
AHEAD = 2  # windows of images that are prepared before the model wants them

Shard = tuple[int, int]  # the number of the part of the data set, and of the block of rows in it


@dataclass
class Totals:
    """What was done.

    Args:
        images, rows, errors: Rows read, rows written, and those among them that hold an error.
        seconds: The time of the slowest process, and `waited`, the part of it in which its model had nothing to work on.
        tokens, padded_tokens: Of the prompts and answers, without and with their padding.
    """

    images: int = 0
    rows: int = 0
    errors: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    tokens: int = 0
    padded_tokens: int = 0

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        padding = 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0
        return (
            f"{self.images:,} images, {self.rows:,} rows, {self.errors:,} of them with an error, in {self.seconds:.1f} s: "
            f"{self.images / seconds:.1f} images per second; the model waited {100 * self.waited / seconds:.1f} % of the time "
            f"for images, and {100 * padding:.1f} % of its tokens were padding"
        )


@dataclass
class Finished:
    """The shards that an output folder holds.

    Args:
        shards: The facts of each: `images`, `rows`, `errors`, and whether it `is_last` of its part.
    """

    shards: dict[Shard, dict[str, Any]] = field(default_factory=dict)

    def is_complete(self, source: int) -> bool:
        """Return whether every block of a part is there."""
        blocks = {block: facts for (part, block), facts in self.shards.items() if part == source}
        last = next((block for block, facts in blocks.items() if facts["is_last"]), None)
        return last is not None and len(blocks) == last + 1


def shard_path(output_dir: Path, shard: Shard) -> Path:
    """Return the file of a shard.

    >>> shard_path(Path("out"), (0, 12)).name
    'predictions-00000-00012.parquet'
    """
    return output_dir / f"predictions-{shard[0]:05d}-{shard[1]:05d}.parquet"


def finished_shards(output_dir: Path) -> Finished:
    """Return the shards that earlier starts have written.

    Raises:
        ValueError: A file of that name is not such a shard.
    """
    found = Finished()
    for path in sorted(output_dir.glob(SHARDS)):
        try:
            facts = json.loads((pq.read_schema(path).metadata or {})[FACTS])
            source, block = map(int, path.stem.split("-")[1:])
        except (KeyError, ValueError, pa.ArrowException):
            raise ValueError(f"{path} is not a shard of predictions that this program wrote; move it away.") from None
        found.shards[source, block] = facts
    return found


def write_shard(path: Path, rows: list[dict[str, Any]], images: int, is_last: bool) -> dict[str, Any]:
    """Write the rows of a block, whole or not at all, and return the shard's facts."""
    errors = sum(row["error"] is not None for row in rows)
    facts = {"images": images, "rows": len(rows), "errors": errors, "is_last": is_last}
    table = prediction_table(columns_of(rows)).replace_schema_metadata({FACTS: json.dumps(facts)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    with replacing(path) as temporary:
        temporary.write_bytes(sink.getvalue())
    return facts


def predict_dataset(
    predictor: Predictor,
    stream: ImageStream,
    output_dir: str | Path,
    shard_size: int = 256,
    workers: int = 2,
    show_progress: bool = True,
) -> Totals:
    """Predict on all rows of a stream that have no shard yet; every process calls this.

    A shard holds the predictions for `shard_size` rows of one part of the data set, in their order. Shards and the batches
    in them do not depend on the number of processes, so neither do the rows.

    Args:
        workers: Threads of each process that read, decode and resize images while the model works.
        show_progress: Show a bar with images per second and the time left, in the main process.

    Returns:
        What all processes did, the same in each.

    Raises:
        ValueError: There are no images, the data set is damaged, or the folder holds other files of a shard's name.
        OSError: The disk is full, or the folder cannot be written.
    """
    state, output_dir, begun = PartialState(), Path(output_dir), time.perf_counter()
    finished = finished_shards(output_dir)
    state.wait_for_everyone()  # until every process has seen the same shards
    before = sum(facts["images"] for facts in finished.shards.values())
    if finished.shards and state.is_main_process:
        print(f"{output_dir}: {len(finished.shards)} shards with {before:,} images are finished, going on", flush=True)
    predictor.load()
    done = Totals()
    share = state.num_processes
    bar = tqdm(
        desc="predict" if share == 1 else f"predict, 1 of {share} processes",
        total=None if stream.total is None else math.ceil(stream.total / share),
        initial=before // share,
        unit=" images",
        disable=not (show_progress and state.is_main_process),
        mininterval=1,
    )
    with bar, _prepared(predictor, stream, shard_size, finished, workers) as events:
        for shard, requests, is_last in _shards(events, predictor, done, bar.update):
            facts = write_shard(shard_path(output_dir, shard), requests, *is_last)
            done.images, done.rows = done.images + facts["images"], done.rows + facts["rows"]
            done.errors += facts["errors"]
    done.seconds = time.perf_counter() - begun
    done.tokens, done.padded_tokens = predictor.tokens, predictor.padded_tokens
    every = [Totals(**entry) for entry in gather_from_all([asdict(done)])]
    slowest = max(every, key=lambda one: one.seconds)
    sums = {name: sum(getattr(one, name) for one in every) for name in asdict(done)}
    totals = Totals(**{**sums, "seconds": slowest.seconds, "waited": slowest.waited})
    if not totals.images and not finished.shards:
        raise ValueError("The data set holds no images, so nothing was predicted.")
    return totals


Event = tuple[
    Shard, "Future[Request] | None", bool
]  # of a shard: a request, or at its end None and whether it is the last


def _shards(
    events: Iterator[Event], predictor: Predictor, done: Totals, progress: Callable[[int], Any]
) -> Iterator[tuple[Shard, list[dict[str, Any]], tuple[int, bool]]]:
    """Yield each shard with its rows, and the number of its images and whether it is the last of its part."""
    most = WINDOW * predictor.batch_size
    window: list[Request] = []
    rows: list[dict[str, Any]] = []
    images = 0
    waiting = time.perf_counter()
    for shard, future, is_last in events:
        if future is not None:
            window.append(future.result())
            images += 1
        if window and (future is None or len(window) == most):
            done.waited += time.perf_counter() - waiting
            rows += [row for of_request in predictor.answer(window) for row in of_request]
            progress(len(window))
            window = []
            waiting = time.perf_counter()
        if future is None:
            done.waited += time.perf_counter() - waiting
            yield shard, rows, (images, is_last)
            rows, images = [], 0
            waiting = time.perf_counter()
    done.waited += time.perf_counter() - waiting


class _prepared:
    """Requests of the rows that are this process's, prepared by threads a few windows ahead of the model."""

    def __init__(self, predictor: Predictor, stream: ImageStream, size: int, finished: Finished, workers: int):
        self.predictor, self.stream, self.size, self.finished = predictor, stream, size, finished
        self.events: queue.Queue[Event | BaseException | None] = queue.Queue(AHEAD * WINDOW * predictor.batch_size)
        self.pool, self.is_over = ThreadPoolExecutor(workers, "prepare"), threading.Event()
        # A fast tokenizer raises "Already borrowed" when two threads use it, so each thread takes a copy of its own.
        self.askings: queue.Queue[Asking] = queue.Queue()
        for _ in range(workers):
            self.askings.put(predictor.asking(stream.columns.question is not None, is_copy=True))
        self.reader = threading.Thread(target=self._read, daemon=True, name="read")

    def __enter__(self) -> Iterator[Event]:
        self.reader.start()
        return self._events()

    def __exit__(self, *error: object) -> None:
        self.is_over.set()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _events(self) -> Iterator[Event]:
        while (event := self.events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event

    def _put(self, event: Event | BaseException | None) -> None:
        while not self.is_over.is_set():
            try:
                return self.events.put(event, timeout=0.2)
            except queue.Full:
                continue

    def _read(self) -> None:
        """Read the rows, and let the pool prepare them."""
        try:
            state = PartialState()
            parts = own_parts(self.stream.num_sources, self.finished, state.process_index, state.num_processes)
            for source, is_wanted in parts:
                for block, rows, is_last in self.stream.blocks(source, self.size, is_wanted):
                    for row in rows:
                        if self.is_over.is_set():
                            return
                        self._put(((source, block), self.pool.submit(self._prepare, row), False))
                    self._put(((source, block), None, is_last()))
            self._put(None)
        except BaseException as error:  # noqa: BLE001  (raised where the events are read)
            self._put(error)

    def _prepare(self, row: dict[str, Any]) -> Request:
        asking = self.askings.get()
        try:
            return self.predictor.prepare(row, asking)
        finally:
            self.askings.put(asking)


def own_parts(
    num_sources: int, finished: Finished, rank: int, processes: int
) -> Iterator[tuple[int, Callable[[int], bool]]]:
    """Yield the parts of the data set that a process reads, and which of their blocks are its own and not finished.

    Where there are enough parts, a process reads only its own ones; else all read every part, and answer some blocks.
    """
    by_parts = num_sources >= processes
    for source in range(num_sources):
        if finished.is_complete(source) or (by_parts and source % processes != rank):
            continue

        def is_wanted(block: int, source: int = source) -> bool:
            return (by_parts or block % processes == rank) and (source, block) not in finished.shards

        yield source, is_wanted
