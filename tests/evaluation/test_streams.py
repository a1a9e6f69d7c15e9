"""Streams of images: every kind of files as rows in a fixed order, blocks of them, and what is refused."""

import io
import json
import tarfile

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image

from evaluation.streams import Columns, ImageStream, open_stream


@pytest.fixture(scope="module")
def content(make_picture):
    file = io.BytesIO()
    make_picture().save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def rows(content):
    rows = [{"image": {"bytes": content, "path": None}, "image_id": f"i{n}", "queries": ["a", "b"]} for n in range(12)]
    return Dataset.from_list(rows).cast_column("image", Image())


def read(stream) -> list[dict]:
    return [row for source in range(stream.num_sources) for row in stream.source(source)]


def test_a_folder_of_images_in_the_order_of_their_names(tmp_path, content):
    for name in ("b.png", "sub [1]/c.jpg", "a.PNG", "test/d.webp", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_text("no image")
    stream = open_stream(str(tmp_path), Columns())
    assert [row["image_id"] for row in read(stream)] == ["a.PNG", "b.png", "sub [1]/c.jpg", "test/d.webp"]
    assert stream.total == 4 and read(stream)[0]["image"] == {"path": str(tmp_path / "a.PNG"), "bytes": None}
    one = open_stream(str(tmp_path / "sub [1]/c.jpg"), Columns())
    assert [row["image_id"] for row in read(one)] == ["c.jpg"]
    (tmp_path / "b.png").write_bytes(content + b"more")
    assert open_stream(str(tmp_path), Columns()).identity != stream.identity


def test_a_folder_with_metadata_has_more_columns(tmp_path, content):
    lines = []
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{n}.png", "queries": [f"thing {n}"]}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    stream = open_stream(str(tmp_path), Columns(expressions="queries"))
    assert [row["expressions"] for row in read(stream)] == [["thing 0"], ["thing 1"], ["thing 2"]]


def test_empty_parts_and_groups_are_passed_over(tmp_path, rows):
    """Spark writes a part without rows for each partition without any."""
    table = rows.data.table
    pq.write_table(table.slice(0, 0), tmp_path / "part-0.parquet")
    with pq.ParquetWriter(tmp_path / "part-1.parquet", table.schema) as writer:
        for start, count in ((0, 0), (0, 2), (2, 0), (2, 3)):
            writer.write_table(table.slice(start, count))
    with pq.ParquetWriter(tmp_path / "part-2.parquet", table.schema):
        pass  # no group at all
    pq.write_table(table.slice(5), tmp_path / "part-3.parquet")
    stream = open_stream(str(tmp_path), Columns())
    assert stream.total == 12 and [row["image_id"] for row in read(stream)] == [f"i{n}" for n in range(12)]


def test_parquet_arrow_and_webdataset(tmp_path, rows, content):
    rows.to_parquet(tmp_path / "parquet/a.parquet")
    rows.select(range(5)).to_parquet(tmp_path / "parquet/b.parquet")
    rows.save_to_disk(tmp_path / "arrow")
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        for n in range(7):
            for suffix, data in (("png", content), ("json", json.dumps({"queries": [f"q{n}"]}).encode())):
                member = tarfile.TarInfo(f"{n:04d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    streams = {
        "parquet": open_stream(str(tmp_path / "parquet"), Columns(expressions="queries")),
        "a.parquet": open_stream(str(tmp_path / "parquet/a.parquet"), Columns(expressions="queries")),
        "arrow": open_stream(str(tmp_path / "arrow"), Columns(expressions="queries")),
        "tar": open_stream(str(tmp_path / "w.tar"), Columns("png", expressions="json.queries")),
    }
    ids = [f"i{n}" for n in range(12)]
    assert {name: (stream.num_sources, stream.total) for name, stream in streams.items()} == {
        "parquet": (2, 17),
        "a.parquet": (1, 12),
        "arrow": (1, 12),
        "tar": (1, 7),
    }
    read_rows = {name: read(stream) for name, stream in streams.items()}
    assert [row["image_id"] for row in read_rows["parquet"]] == ids + ids[:5]
    assert (
        [row["image_id"] for row in read_rows["arrow"]] == [row["image_id"] for row in read_rows["a.parquet"]] == ids
    )
    assert [row["image_id"] for row in read_rows["tar"]] == [f"{n:04d}" for n in range(7)]
    assert [row["expressions"] for row in read_rows["tar"]] == [[f"q{n}"] for n in range(7)]
    assert all(row["image"]["bytes"] == content for found in read_rows.values() for row in found)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (lambda number: True, [(0, [0, 1, 2, 3, 4], False), (1, [5, 6, 7, 8, 9], False), (2, [10, 11], True)]),
        (lambda number: number % 2 == 1, [(1, [5, 6, 7, 8, 9], False)]),
        (lambda number: number > 1, [(2, [10, 11], True)]),
        (lambda number: number > 5, []),
    ],
)
def test_blocks_are_the_same_whichever_are_read(tmp_path, rows, wanted, expected):
    rows.to_parquet(tmp_path / "a.parquet")
    stream = open_stream(str(tmp_path), Columns())
    found = []
    for number, block, is_last in stream.blocks(0, 5, wanted):
        found.append((number, [int(row["image_id"][1:]) for row in block], is_last()))
    assert found == expected


def test_a_block_that_ends_with_the_data_is_the_last(tmp_path, rows):
    rows.select(range(10)).to_parquet(tmp_path / "a.parquet")
    blocks = open_stream(str(tmp_path), Columns()).blocks(0, 5, lambda number: True)
    assert [(number, len(list(block)), is_last()) for number, block, is_last in blocks] == [
        (0, 5, False),
        (1, 5, True),
    ]


def test_what_is_refused_is_named(tmp_path, rows, content):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("a")
    for name in ("empty", "texts"):
        with pytest.raises(ValueError, match=f"{name} holds no images"):
            open_stream(str(tmp_path / name), Columns())
    rows.to_parquet(tmp_path / "p/a.parquet")
    with pytest.raises(
        ValueError, match="no column 'picture', but image, image_id, queries; choose with --image_column"
    ):
        open_stream(str(tmp_path / "p"), Columns("picture"))
    with pytest.raises(ValueError, match="no column 'texts', but .* --expressions_column"):
        open_stream(str(tmp_path / "p"), Columns(expressions="texts"))
    with pytest.raises(ValueError, match="no column 'name', but .* --id_column"):
        open_stream(str(tmp_path / "p"), Columns(image_id="name"))
    whole = (tmp_path / "p/a.parquet").read_bytes()
    (tmp_path / "p/a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="p.*cannot be opened|a.parquet of .* is damaged"):
        open_stream(str(tmp_path / "p"), Columns())
    with pytest.raises(
        ValueError, match="'nowhere/none' is no file or folder on this machine, and the Hub does not give it"
    ):
        open_stream("nowhere/none", Columns())


def test_a_data_set_of_the_hub_opens_no_file_of_this_machine(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    for path in (str(tmp_path / "a.png"), f"file://{tmp_path}/a.png"):
        rows = Dataset.from_list([{"image": path}]).to_iterable_dataset()
        with pytest.raises(ValueError, match="names an image by the path .*a.png instead of holding it"):
            read(ImageStream(rows, Columns(), "commit", is_from_hub=True))
        assert read(ImageStream(rows, Columns(), "digest"))[0]["image"] == path
