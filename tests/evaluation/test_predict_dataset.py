"""The loop over a data set: shards whose rows are those of single images, whatever the threads, and failures that end it."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image

from data_scripts.schema import decode_mask
from evaluation.predict_dataset import Finished, finished_shards, own_parts, predict_dataset
from evaluation.predictor import Predictor
from evaluation.streams import Columns, open_stream

COUNT = 40


@pytest.fixture(scope="module")
def asked():
    """Lists of expressions of very different lengths."""
    draw = np.random.default_rng(0)
    return [
        [" ".join(["thing"] * int(draw.integers(1, 12))) for _ in range(draw.integers(1, 5))] for _ in range(COUNT)
    ]


@pytest.fixture(scope="module")
def pictures(make_picture):
    return [make_picture(n % 30, 30 + n % 5 * 9, 40 - n % 3 * 8) for n in range(COUNT)]  # ten are there twice


@pytest.fixture(scope="module")
def stream(tmp_path_factory, pictures, asked):
    path = tmp_path_factory.mktemp("data") / "a.parquet"
    rows = []
    for picture, texts in zip(pictures, asked, strict=True):
        file = io.BytesIO()
        picture.save(file, format="PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "texts": texts})
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(path)
    return open_stream(str(path), Columns(expressions="texts"))


def read(folder) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_shards_hold_what_single_images_give(stream, pictures, asked, model, processor, tmp_path):
    predictor = Predictor("tiny", batch_size=4, threshold=-1e9, loaded=(processor, model))
    totals = predict_dataset(predictor, stream, tmp_path, shard_size=32, workers=4, show_progress=False)
    assert (totals.images, totals.errors) == (COUNT, 0) and totals.rows == sum(map(len, asked))
    assert 0 < totals.padded_tokens - totals.tokens < 0.1 * totals.padded_tokens
    assert 0 <= totals.waited < totals.seconds
    rows = iter(read(tmp_path))
    for n, (picture, texts) in enumerate(zip(pictures, asked, strict=True)):
        inputs = processor(images=[picture], expressions=[texts], return_tensors="pt")
        (results,) = processor.post_process_segmentation(model.segment(**inputs, threshold=-1e9), inputs)
        for result in results:
            row = next(rows)
            assert (row["image_id"], row["expression"]) == (str(n), result["text"])
            assert row["score"] == pytest.approx(result["score"], abs=1e-3)
            assert (decode_mask(row["mask"]).astype(bool) != result["mask"]).mean() < 2e-3
    assert next(rows, None) is None


def test_the_number_of_threads_changes_nothing(stream, model, processor, tmp_path):
    for workers in (1, 8):  # more than one at a time: a tokenizer that two threads share fails
        predictor = Predictor("tiny", batch_size=2, loaded=(processor, model))
        predict_dataset(predictor, stream, tmp_path / str(workers), 16, workers, show_progress=False)
    one, eight = ([path.read_bytes() for path in sorted((tmp_path / name).glob("*.parquet"))] for name in ("1", "8"))
    assert len(one) == 3 and one == eight


def test_a_failure_in_a_thread_ends_the_run_and_keeps_what_is_written(stream, model, processor, tmp_path, monkeypatch):
    predictor = Predictor("tiny", batch_size=2, loaded=(processor, model))
    prepare = Predictor.prepare

    def fails(self, row, asking):
        if row["image_id"] == 20:
            raise RuntimeError("a bug")
        return prepare(self, row, asking)

    monkeypatch.setattr(Predictor, "prepare", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        predict_dataset(predictor, stream, tmp_path, 16, show_progress=False)
    assert list(finished_shards(tmp_path).shards) == [(0, 0)]
    monkeypatch.undo()
    assert predict_dataset(predictor, stream, tmp_path, 16, show_progress=False).images == COUNT - 16
    assert finished_shards(tmp_path).is_complete(0)


def test_a_file_in_the_way_and_an_empty_data_set_are_named(stream, model, processor, tmp_path):
    predictor = Predictor("tiny", loaded=(processor, model))
    (tmp_path / "predictions-a-b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="predictions-a-b.parquet is not a shard of predictions"):
        predict_dataset(predictor, stream, tmp_path, show_progress=False)
    (tmp_path / "none").mkdir()
    empty = Dataset.from_dict({"image": []}).cast_column("image", Image())
    pq.write_table(empty.data.table, tmp_path / "none/a.parquet")  # to_parquet of datasets 5.1 divides by zero here
    with pytest.raises(ValueError, match="holds no images"):
        predict_dataset(
            Predictor("tiny", expressions=["a"], loaded=(processor, model)),
            open_stream(str(tmp_path / "none"), Columns()),
            tmp_path / "out",
            show_progress=False,
        )


@pytest.mark.parametrize("num_sources", [1, 2, 5])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_block_has_one_process_and_finished_ones_have_none(num_sources, processes):
    done = {(0, 0): {"is_last": False}, (0, 1): {"is_last": False}, (num_sources - 1, 3): {"is_last": True}}
    finished = Finished(done)
    taken = [
        (source, block)
        for rank in range(processes)
        for source, is_wanted in own_parts(num_sources, finished, rank, processes)
        for block in range(4)
        if is_wanted(block)
    ]
    assert sorted([*taken, *done]) == [(source, block) for source in range(num_sources) for block in range(4)]
    every = Finished({(0, block): {"is_last": block == 2} for block in range(3)})
    assert every.is_complete(0) and not finished.is_complete(0)
    assert all(source > 0 for rank in range(processes) for source, _ in own_parts(num_sources, every, rank, processes))
