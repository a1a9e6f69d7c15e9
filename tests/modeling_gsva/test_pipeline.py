"""The pipeline gives the results of processor and model, for every kind of input; and the stock pipeline for chat."""

import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pytest
from datasets import Dataset
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

import data_scripts
from modeling_gsva import GsvaForConditionalGeneration, GsvaPipeline, GsvaProcessor

TASK = "generalized-referring-segmentation"
ASKED = ["a red dog", "b"]


@pytest.fixture(scope="module")
def pipe(model, processor):
    return GsvaPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def pictures(make_picture):
    return [make_picture(n, width, height) for n, (width, height) in enumerate([(40, 30), (20, 50), (33, 33)])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("pictures")
    for n, picture in enumerate(pictures):
        picture.save(folder / f"{n}.png")
    return folder


def by_hand(model, processor, picture, expressions, **options):
    inputs = processor(images=[picture], expressions=[expressions], return_tensors="pt")
    return processor.post_process_segmentation(model.segment(**inputs, **options), inputs)[0]


@pytest.fixture(scope="module")
def expected(model, processor, pictures):
    return [by_hand(model, processor, picture, ASKED) for picture in pictures]


def same(one, other, tolerance=0.0):
    """Batches pad, which changes sums in the last digits: scores within `tolerance`, masks but for pixels at zero."""
    assert [entry["text"] for entry in one] == [entry["text"] for entry in other]
    for a, b in zip(one, other):
        assert (
            a.keys()
            == b.keys()
            == {"text", "mask", "is_rejected", "score", "probability", "is_malformed", "iou_score"}
        )
        assert a["is_rejected"] == b["is_rejected"] and a["score"] == pytest.approx(
            b["score"], abs=tolerance, nan_ok=True
        )
        assert a["mask"].shape == b["mask"].shape and (a["mask"] != b["mask"]).mean() <= 10 * tolerance
    return True


def test_one_picture_of_every_kind(pipe, pictures, folder, expected):
    assert any(entry["mask"].any() for entry in expected[0]), "nothing would be shown"
    array = np.array(pictures[0])
    row = {"image": pictures[0], "expressions": ASKED}
    kinds = [pictures[0], array, str(folder / "0.png"), folder / "0.png", array.transpose(2, 0, 1)]
    content = (folder / "0.png").read_bytes()
    kinds += [content, bytearray(content), io.BytesIO(content)]
    assert all(same(pipe(kind, expressions=ASKED), expected[0]) for kind in kinds)
    rows = [
        {"image": content, "expressions": ASKED},
        {"image": {"bytes": content, "path": None}, "expressions": ASKED},
    ]
    assert all(same(one, expected[0]) for one in [*pipe(rows), *pipe([content], expressions=ASKED)])
    assert same(pipe(pictures[0], expressions=[ASKED]), expected[0]) and same(pipe(row), expected[0])
    assert same(pipe(pictures[0], expressions=ASKED[0]), pipe(pictures[0], expressions=ASKED[:1]))


def test_urls(pipe, folder, expected):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        (folder / "note.txt").write_text("no picture")
        assert same(pipe(f"{url}/0.png", expressions=ASKED, timeout=10), expected[0])
        assert same(pipe([f"{url}/1.png"], expressions=ASKED)[0], expected[1])
        for bad in ("missing.png", "note.txt"):
            with pytest.raises(ValueError, match=f"{url}/{bad}' cannot be read as an image"):
                pipe(f"{url}/{bad}", expressions=ASKED)
        server.shutdown()
    with pytest.raises(ValueError, match="0.png' cannot be read as an image"):
        pipe(f"{url}/0.png", expressions=ASKED, timeout=5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_lists(pipe, model, processor, pictures, folder, expected, batch_size):
    tolerance = 0.0 if batch_size == 1 else 1e-4
    paths = [str(folder / f"{n}.png") for n in range(3)]
    for listed in (pictures, tuple(pictures), paths):
        results = pipe(listed, expressions=ASKED, batch_size=batch_size)
        assert isinstance(results, list) and len(results) == 3
        assert all(same(one, other, tolerance) for one, other in zip(results, expected))
    own = [["x"], ["y", "z"], ["a"]]
    each = [by_hand(model, processor, picture, asked) for picture, asked in zip(pictures, own)]
    for results in (
        pipe(pictures, expressions=own, batch_size=batch_size),
        pipe([{"image": path, "expressions": asked} for path, asked in zip(paths, own)], batch_size=batch_size),
    ):
        assert all(same(one, other, tolerance) for one, other in zip(results, each, strict=True))
    stacked = np.stack([np.array(pictures[2])] * 2)
    assert all(same(one, expected[2], tolerance) for one in pipe(stacked, expressions=ASKED, batch_size=batch_size))
    assert pipe([], expressions=ASKED, batch_size=batch_size) == []


@pytest.mark.parametrize("batch_size", [1, 2])
def test_data_sets_are_streamed(pipe, pictures, expected, batch_size, capfd):
    tolerance = 0.0 if batch_size == 1 else 1e-4
    features = datasets.Features({"image": datasets.Image(), "expressions": datasets.List(datasets.Value("string"))})
    rows = Dataset.from_dict({"image": pictures, "expressions": [ASKED] * 3}, features=features)
    read = []

    def generator():
        for n, row in enumerate(rows):
            read.append(n)
            yield row

    for stream in (rows, rows.to_iterable_dataset()):
        results = pipe(stream, batch_size=batch_size)
        for _ in range(2):  # each pass begins anew
            assert all(same(one, other, tolerance) for one, other in zip(results, expected, strict=True))
    assert len(pipe(rows, batch_size=batch_size)) == 3
    results = iter(pipe(generator(), batch_size=batch_size))
    assert len(read) <= 1
    next(results)
    assert len(read) <= batch_size + 1
    assert len(list(results)) == 2 and read == [0, 1, 2]
    images = KeyDataset(rows, "image")
    results = pipe(images, expressions=ASKED, batch_size=batch_size, progress=True)
    assert all(same(one, other, tolerance) for one, other in zip(results, expected, strict=True))
    assert "3/3" in capfd.readouterr().err
    results = pipe(rows, expressions=["other"], batch_size=batch_size)  # replaces the rows' own
    assert [entry["text"] for entries in results for entry in entries] == ["other"] * 3


def test_rows_of_this_projects_data_sets(pipe, model, processor):
    rows = data_scripts.load("shapes", split="train", size=2)
    for row, results in zip(rows, pipe(rows), strict=True):
        texts = [entry["text"] for entry in row["expressions"]]
        assert same(results, by_hand(model, processor, row["image"], texts))


def test_thresholds_and_ways_to_answer(pipe, model, processor, pictures, expected):
    scores = [entry["score"] for entry in expected[0]]
    assert all(entry["is_rejected"] for entry in pipe(pictures[0], expressions=ASKED, threshold=max(scores) + 50))
    shown = pipe(pictures[0], expressions=ASKED, threshold=-1e9)
    assert not any(entry["is_rejected"] for entry in shown) and all(entry["mask"].any() for entry in shown)
    assert same(shown, by_hand(model, processor, pictures[0], ASKED, threshold=-1e9))
    generated = pipe(pictures[0], expressions=ASKED, method="generate", generate_kwargs={"max_new_tokens": 5})
    assert same(generated, by_hand(model, processor, pictures[0], ASKED, method="generate", max_new_tokens=5))
    alone = pipe(pictures[:2], expressions=ASKED, one_prompt_per_expression=True, batch_size=2)
    for picture, results in zip(pictures, alone):
        for entry in results:
            assert same([entry], by_hand(model, processor, picture, [entry["text"]]), 1e-4)
    preset = GsvaPipeline(model=model, processor=processor, device="cpu", threshold=1e9, expressions=ASKED)
    assert all(entry["is_rejected"] for entry in preset(pictures[0]))


def test_bad_input_is_named(pipe, pictures, tmp_path):
    cases = [
        ({"images": None, "expressions": ASKED}, "No image was given"),
        ({"images": str(tmp_path / "none.png"), "expressions": ASKED}, "none.png' cannot be read as an image"),
        ({"images": pictures[0]}, "No expressions were given"),
        ({"images": pictures[0], "expressions": []}, "No expressions were given"),
        ({"images": pictures[0], "expressions": [[]]}, "No expressions were given"),
        ({"images": pictures[0], "expressions": [" "]}, "is empty"),
        ({"images": pictures, "expressions": [["a"], ["b"]]}, "3 images but 2 lists of expressions"),
        ({"images": pictures[0], "expressions": [["a"], ["b"]]}, "1 images but 2 lists"),
        ({"images": pictures, "expressions": ["a", ["b"], ["c"]]}, "holds lists, but also .a."),
        ({"images": {"picture": pictures[0]}, "expressions": ASKED}, "no 'image'"),
        ({"images": 3, "expressions": ASKED}, "type int"),
        ({"images": iter(pictures), "expressions": [["a"]]}, "rows of a stream bring their own"),
        ({"images": pictures[0], "expressions": ASKED, "method": "teacher_forced"}, "cannot answer without gold"),
        ({"images": pictures[0], "expressions": ASKED, "method": "sloths"}, "sloths"),
        ({"images": pictures[0], "expressions": ASKED, "prompt": "nope"}, "nope"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    for images in (pictures[0], pictures, iter(pictures)):
        with pytest.raises(TypeError, match="treshold"):
            pipe(images, expressions=ASKED, treshold=1)


def test_saved_pipelines_hold_all_that_they_need(pipe, pictures, expected, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert type(again).__name__ == "GsvaPipeline" and again is not pipe
    assert same(again(pictures[0], expressions=ASKED), expected[0])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline(TASK, model=str(tmp_path), device="cpu")
    model, processor = GsvaForConditionalGeneration.from_pretrained(tmp_path), GsvaProcessor.from_pretrained(tmp_path)
    again = pipeline(TASK, model=model, processor=processor, device="cpu")  # the task is known
    assert same(again(pictures[0], expressions=ASKED), expected[0])
