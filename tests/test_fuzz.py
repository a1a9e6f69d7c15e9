"""Malformed input to every reader: data sets, metric, processor, converter. Each ends in an error that names the fault,
or, if the change did no harm, in a valid result; never in a bare KeyError, a crash or a hang.

Examples are drawn by hypothesis from a fixed seed, so that every run sees the same ones; `EXAMPLES` are drawn per reader,
and a change that leaves the input as it was is drawn again.
"""

import copy
import io
import json
import math
import pickle
import shutil
import sys

import data_trees as trees
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import data_scripts
from data_scripts.label_studio import encode_brush
from data_scripts.masks import check_rle

EXAMPLES = 200

fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # shrinking a failure would take minutes
    suppress_health_check=list(HealthCheck),
)

# What somebody's file holds where something else belongs: other types, absurd numbers, names that lead elsewhere.
JUNK = st.one_of(
    st.sampled_from(
        [None, True, 0, -1, -7.5, 10**6, 10**12, 10**40, 1e308, float("nan"), float("inf"), "", "../../../etc/passwd", "/etc/passwd",
         "a\0b", "\ud800", "x" * 300, [], {}, [[]], [None], {"size": [10**6, 10**6], "counts": "0"}, {"size": [30, 40], "counts": ""},
         {"size": [30, 40], "counts": "0130"}, {"size": [30, 40], "counts": [5, -1]}, [[0, 0, 1e12, 0, 1e12, 1e12]], [[[1]]]]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
).map(copy.deepcopy)  # fmt: skip  # the next change may be inside


def places(value, path=()):
    """The path to every value inside a JSON-like value, itself included."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


@st.composite
def mutated(draw, value):
    """`value` with one to three of its places replaced by junk, taken out, or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                value = draw(JUNK)
            continue
        *way, last = path
        parent = value
        for key in way:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "replace", "take out", "wrap", "double"]))
        if change == "replace":
            parent[last] = draw(JUNK)
        elif change == "take out":
            del parent[last]
        elif change == "wrap":
            parent[last] = [parent[last]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        else:
            parent[draw(st.text(max_size=4))] = parent[last]
    return value


@st.composite
def damaged(draw, content: bytes):
    """A file's bytes cut, with some overwritten, or with others between them."""
    place = draw(st.integers(0, len(content) - 1))
    junk = draw(st.binary(min_size=1, max_size=8))
    change = draw(st.sampled_from(["cut", "overwrite", "overwrite", "insert", "take out"]))
    if change == "cut":
        return content[:place]
    if change == "take out":
        return content[:place] + content[place + len(junk) :]
    return content[:place] + junk + content[place + (len(junk) if change == "overwrite" else 0) :]


def files_of(content: bytes, readable):
    """Malformed files: the content damaged in its values (`readable` reads and writes it) or in its bytes."""
    read, write = readable
    return st.one_of(mutated(read(content)).map(write), mutated(read(content)).map(write), damaged(content))


def to_json(value) -> bytes:
    return json.dumps(value).encode()


def to_json_lines(value) -> bytes:
    return b"\n".join(map(to_json, value if isinstance(value, list) else [value]))


JSON = (json.loads, to_json)
LINES = (lambda content: [json.loads(line) for line in content.splitlines()], to_json_lines)
PICKLE = (pickle.loads, lambda value: pickle.dumps(value, protocol=2))


def accept(rows: list[dict], features) -> None:
    """What a reader accepted fits its schema, and every mask can be decoded."""
    pyarrow.Table.from_pylist([features.encode_example(row) for row in rows], schema=features.arrow_schema)
    for row in rows:
        for entry in row.get("expressions", ()):
            assert check_rle(entry["mask"])["size"] == entry["mask"]["size"] and isinstance(entry["text"], str)


# ---- data sets -------------------------------------------------------------------------------------------------------
def referring(name):
    def make(root):
        texts = {1: [trees.SQUARE], 2: {"size": [30, 40], "counts": [5 * 30, 30, 30 * 34]}}
        trees.referring(root, name, [trees.ref(ann_id=[1, 2]), trees.ref(1, ann_id=[2], split="testA")], texts)

    return make


def absence(name, refs, flag):
    def make(root):
        trees.absence(root, name, refs, [{"sent": "a cat", flag: True}, {"sent": "a dog", flag: False}])

    return make


def reason_seg(root):
    shapes = [
        {"label": "target", "points": [[5, 5], [15, 5], [15, 15]]},
        {"label": "ignore", "points": [[1, 1], [3, 1], [3, 3]]},
    ]
    record = {"text": ["what purrs"], "is_sentence": False, "shapes": shapes}
    trees.reason_seg(root, record, explanations=[{"image": "a.jpg", "outputs": "It purrs."}])


def own(root):
    trees.picture(root / "cats/1.jpg")
    trees.label_map(root / "mask.png", trees.full(1))
    masks = [trees.SQUARE, [trees.SQUARE], {"size": [30, 40], "counts": [5 * 30, 30, 30 * 34]}, "mask.png", None]
    entries = [
        {"text": f"cat {n}", "mask": mask, "num_targets": int(mask is not None), "is_sentence": False}
        for n, mask in enumerate(masks)
    ]
    trees.write(
        root / "train.jsonl", to_json_lines([{"image": "cats/1.jpg", "image_id": "7", "expressions": entries}] * 2)
    )


def own_coco(root):
    trees.picture(root / "cats/1.jpg")
    entry = {"id": 1, "image_id": 1, "caption": ["a cat", "it"], "segmentation": [trees.SQUARE]}
    trees.write(root / "train.json", {"images": [{"id": 1, "file_name": "cats/1.jpg"}], "annotations": [entry, entry]})


def own_label_studio(root):
    trees.picture(root / "images/a.jpg")
    mask = np.zeros((trees.HEIGHT, trees.WIDTH), bool)
    mask[5:15, 5:15] = True
    brush = {
        "type": "brushlabels",
        "value": {"format": "rle", "rle": encode_brush(mask), "brushlabels": ["cat", "it"]},
    }
    outline = {
        "type": "polygonlabels",
        "value": {"points": [[10, 10], [60, 10], [60.5, 80]], "polygonlabels": ["dog"]},
    }
    data = {"image": "/data/local-files/?d=out/images/a.jpg", "absent": ["a unicorn"]}
    tasks = [{"data": data, "annotations": [{"result": [brush, outline]}], "predictions": [{"result": [brush]}]}]
    trees.write(root / "train.json", tasks)


REFS = {"grefcoco": "grefs(unc).json", "refcocog": "refs(umd).p", "refzom": "Ref_ZOM.p"}
CASES = [
    *(
        (name, referring(name), [(f"refer_seg/{name}/{refs}", JSON if refs.endswith("json") else PICKLE),
                                 (f"refer_seg/{name}/instances.json", JSON)])
        for name in ("refclef", "refcoco", "refcoco+", "refcocog", "grefcoco", "refzom")
        for refs in [REFS.get(name, "refs(unc).p")]
    ),
    *(
        (name, absence(name, refs, flag), [(f"refer_seg/{name}/{refs}", PICKLE)])
        for family, refs, flag in [("rrefcoco", "refs(unc).p", "exist"),
                                   ("fprefcoco", "refs(berkeley_exclude_unified).p", "is_false_premise")]
        for name in (family, f"{family}+", f"{family}g")
    ),
    ("hallusegbench", lambda root: trees.halluseg(root / "hallusegbench/test/refer_seg", {}),
     [("hallusegbench/test/refer_seg/data.json", JSON), ("hallusegbench/test/refer_seg/factual_masks/0_7_mask.png", None)]),
    ("ade20k", lambda root: trees.ade20k(root, trees.full(1)), [("ade20k/annotations/training/0.png", None)]),
    ("cocostuff", lambda root: trees.cocostuff(root, trees.full(1)), [("cocostuff/train2017/0.png", None)]),
    ("mapillary", lambda root: trees.mapillary(root, ["Bird", "Curb"], trees.full(1)),
     [("mapillary/config_v2.0.json", JSON), ("mapillary/training/v2.0/labels/0.png", None)]),
    ("paco_lvis", lambda root: trees.parts(root, "paco_lvis", "dog:head"), [("vlpart/paco/annotations/paco_lvis_v1_train.json", JSON)]),
    ("pascal_part", lambda root: trees.parts(root, "pascal_part", "dog:head"), [("vlpart/pascal_part/train.json", JSON)]),
    ("ReasonSeg", reason_seg,
     [("reason_seg/ReasonSeg/train/a.json", JSON), ("reason_seg/ReasonSeg/explanatory/train.json", JSON),
      ("reason_seg/ReasonSeg/train/a.jpg", None)]),
    ("llava_instruct_150k", lambda root: trees.llava(root, ("human", "<image>\nHi?"), ("gpt", "A cat.")),
     [("llava_dataset/llava_instruct_150k.json", JSON)]),
    ("own", own, [("train.jsonl", LINES), ("mask.png", None), ("cats/1.jpg", None)]),
    ("own", own_coco, [("train.json", JSON)]),
    ("own", own_label_studio, [("train.json", JSON)]),
]  # fmt: skip


def test_every_data_set_is_here():
    assert {name for name, _, _ in CASES} == set(data_scripts.BUILDERS)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged pictures
@pytest.mark.parametrize(
    ("name", "make", "files"), CASES, ids=[f"{name}-{make.__name__.strip('<>')}" for name, make, _ in CASES]
)
def test_data_sets(name, make, files, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make(tmp_path / "data")
    root = tmp_path / "data"
    whole = {file: (root / file).read_bytes() for file, _ in files}
    builder = data_scripts.load_builder(name, root)
    for split in builder.split_names():
        accept(list(builder.rows(split)), builder.FEATURES)  # before anything is wrong with it
    choice = st.one_of(
        *(
            st.tuples(st.just(file), files_of(whole[file], readable) if readable else damaged(whole[file]))
            for file, readable in files
        )
    )
    tried = refused = 0

    @fuzz
    @given(choice)
    def check(chosen):
        nonlocal tried, refused
        file, content = chosen
        assume(content != whole[file])
        tried += 1
        (root / file).write_bytes(content)
        try:
            builder = data_scripts.load_builder(name, root)
            for split in builder.split_names():
                accept(list(builder.rows(split)), builder.FEATURES)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert type(error) in (ValueError, FileNotFoundError) or type(error).__name__ == "PictureError"
            assert str(root) in str(error), f"does not name its file: {error}"
        finally:
            (root / file).write_bytes(whole[file])

    check()
    assert tried >= EXAMPLES and refused > EXAMPLES // 10
    shutil.rmtree(root)


# ---- metric ----------------------------------------------------------------------------------------------------------
ROW = {"dataset": "d", "split": "val", "protocol": "slots", "image_id": "1", "expression": "a cat", "is_no_target": False,
       "is_rejected": False, "score": 1.5, "intersection": 3, "union": 4, "num_targets": 1, "is_malformed": False,
       "probability": 0.75, "box_intersection": 3, "box_union": 5}  # fmt: skip
ROWS = [ROW, {**ROW, "is_no_target": True, "intersection": 0, "num_targets": 0, "score": -0.5, "is_rejected": True}]
RLES = {"prediction": {"size": [3, 3], "counts": "013000"}, "reference": {"size": [3, 3], "counts": "013000"}}


def in_unit(metrics):
    signed = ("IL_MCC", "cgF1")
    assert all(math.isnan(value) or -(name in signed) <= value <= 1 for name, value in metrics.items())


@fuzz
@given(mutated(ROWS))
def test_metric_rows(rows):
    from metrics.gres.functions import gres_metrics, report

    try:
        in_unit(gres_metrics(rows))
        report(rows, resamples=2)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(("row ", "expected rows", "these rows")), error


@fuzz
@given(mutated(RLES))
def test_metric_masks(pair):
    from metrics.gres import check_row, row_from_masks

    try:
        prediction, reference = pair["prediction"], pair["reference"]
    except (KeyError, TypeError):
        return  # not this function's business
    try:
        check_row(row_from_masks(prediction, reference, False))
    except ValueError as error:
        assert str(error).startswith("row: "), error


@fuzz
@given(
    st.one_of(
        files_of(to_json_lines(ROWS), LINES).map(lambda content: (".jsonl", content)), st.deferred(lambda: parquet)
    )
)
def test_metric_files(tmp_path_factory, file):
    """Through the command line, which must end with one line and status 1."""
    from metrics.gres.__main__ import main

    suffix, content = file
    path = tmp_path_factory.getbasetemp() / f"rows{suffix}"
    path.write_bytes(content)
    try:
        main([str(path), "--json", "--bootstrap", "2"])
    except SystemExit as end:
        assert str(end.code).startswith("error: ") and (path.name in str(end.code) or "these rows" in str(end.code)), (
            end.code
        )


def _parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


parquet = damaged(_parquet()).map(lambda content: (".parquet", content))


# ---- processor -------------------------------------------------------------------------------------------------------
TALK = [[{"role": "user", "content": "<image>\nWhere?"}, {"role": "assistant", "content": "It is [SEG]."}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Hi."}]]  # fmt: skip


def processes(processor, **inputs):
    try:
        outputs = processor(return_tensors="pt", **inputs)
    except ValueError as error:
        assert type(error) is ValueError and str(error), error
        return
    shape = outputs["input_ids"].shape
    assert shape == outputs["attention_mask"].shape and len(outputs["image_index"]) == len(
        shape and outputs["input_ids"]
    )
    if "pixel_values" in outputs:
        assert int(outputs["image_index"].max()) < len(outputs["pixel_values"])


ARRAYS = st.one_of(
    JUNK,
    st.builds(
        lambda shape, kind: np.zeros(shape, kind),
        st.lists(st.integers(0, 5), max_size=5),
        st.sampled_from(["uint8", "float32", "bool", "complex64", "int64", "U3"]),
    ),
)


@pytest.mark.filterwarnings("ignore")
@fuzz
@given(images=st.one_of(ARRAYS, st.lists(ARRAYS, max_size=3)))
def test_processor_images(processor, images):
    processes(processor, images=images, expressions=[["a cat"]])


def _picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((20, 16)).save(file, format=kind)
    return file.getvalue()


@fuzz
@given(damaged(_picture("PNG")) | damaged(_picture("JPEG")))
@pytest.mark.filterwarnings("ignore")
def test_processor_picture_files(processor, tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "picture"
    path.write_bytes(content)
    processes(processor, images=[str(path)], expressions=[["a cat"]])


@fuzz
@given(
    data=mutated(
        {"expressions": [["a cat", "two dogs"], ["it"]], "no_targets": [[True, False], [False]], "prompt": "refer"}
    )
)
def test_processor_expressions(processor, make_picture, data):
    if isinstance(data, dict) and data.keys() <= CALL and data.get("expressions") is not None:
        processes(processor, images=[make_picture(0), make_picture(1)], **data)


CALL = {"expressions", "no_targets", "prompt", "conversations", "image_index", "masks", "max_length"}


@fuzz
@given(
    data=mutated({"conversations": TALK, "image_index": [0, -1], "masks": [[[[1, 0], [0, 1]]], []], "max_length": 300})
)
def test_processor_conversations(processor, make_picture, data):
    if isinstance(data, dict) and data.keys() <= CALL and data.get("conversations") is not None:
        processes(processor, images=[make_picture(0, 2, 2)], **data)


@fuzz
@given(prompts=mutated({"mine": {"question": "<image>\n{expressions}?", "answer": "{slots}", "slot": "{token}", "separator": ", ",
                                 "lower": True}}))  # fmt: skip
def test_processor_wordings(make_processor, make_picture, prompts):
    try:
        processor = make_processor(prompts=prompts)
    except ValueError as error:
        assert "prompts" in str(error)
        return
    for name in prompts or ():
        processes(processor, images=[make_picture()], expressions=[["a cat"]], prompt=name)


# ---- converter -------------------------------------------------------------------------------------------------------
def torch_file(tensors) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


TENSORS = {f"model.layers.{n}.self_attn.q_proj.weight": torch.arange(16.0).reshape(4, 4) for n in range(3)}
CHECKPOINTS = {
    ".bin": torch_file(TENSORS),
    ".safetensors": safetensors.torch.save(TENSORS),
    ".pth": pickle.dumps({"a": [1, 2], "b": {"c": "d"}}),
}


@pytest.mark.parametrize("suffix", CHECKPOINTS)
def test_converter_checkpoints(tmp_path, suffix):
    from conversion.reading import CheckpointSource

    path = tmp_path / f"weights{suffix}"

    @fuzz
    @given(damaged(CHECKPOINTS[suffix]))
    def check(content):
        path.write_bytes(content)
        try:
            for entry in CheckpointSource("--checkpoint", path).tensors.values():
                assert entry.read().shape == entry.shape
        except ValueError as error:
            assert str(path) in str(error), error

    check()


@fuzz
@given(
    st.one_of(
        files_of(to_json({"metadata": {}, "weight_map": {"a": "weights.bin", "b": "weights.bin"}}), JSON),
        JUNK.map(lambda name: to_json({"weight_map": {"a": name}})),
    )
)
def test_converter_index(tmp_path_factory, content):
    from conversion.reading import weight_files

    path = tmp_path_factory.getbasetemp() / "pytorch_model.bin.index.json"
    path.with_name("weights.bin").write_bytes(b"")
    path.write_bytes(content)
    try:
        assert all(file.parent == path.parent for file in weight_files(path))
    except (ValueError, FileNotFoundError) as error:
        assert str(path) in str(error), error


class Accepted(Exception):
    """Nothing was found wrong, and writing would begin."""


@pytest.mark.parametrize("file", ["llava/config.json", "clip/config.json"])
def test_converter_configurations(original, tmp_path, monkeypatch, file):
    """Through the command line, which must end with one line and status 1."""
    import convert_checkpoint

    def accept(path):
        raise Accepted

    monkeypatch.setattr(sys.modules["conversion.convert"], "new_folder", accept)
    root = tmp_path / "original"
    shutil.copytree(original, root)

    @fuzz
    @given(files_of((root / file).read_bytes(), JSON))
    def check(content):
        (root / file).write_bytes(content)
        options = {
            "checkpoint": root / "full.pt",
            "output": tmp_path / "out",
            "llava": root / "llava",
            "clip": root / "clip",
        }
        try:
            convert_checkpoint.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
        except Accepted:
            return
        except SystemExit as end:
            assert str(end.code).startswith("error: ") and (
                str(root) in end.code or "config.json files" in end.code
            ), end.code

    check()


SMALL_FILES = {
    "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"320": {"content": "x"}}},
    "added_tokens.json": {"[PAD]": 320, "x": 321},
    "preprocessor_config.json": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3},
}


@pytest.mark.parametrize("file", SMALL_FILES)
def test_converter_small_files(tmp_path, file):
    from conversion.configs import image_processor
    from conversion.tokenizer import base_added_tokens, refuse_non_legacy

    @fuzz
    @given(files_of(to_json(SMALL_FILES[file]), JSON))
    def check(content):
        (tmp_path / file).write_bytes(content)
        try:
            refuse_non_legacy(tmp_path)
            assert all(isinstance(i, int) for i in base_added_tokens(tmp_path).values())
            picture = Image.new("RGB", (8, 8))
            pixels = image_processor(tmp_path, 8, 8)(picture, return_tensors="pt")["pixel_values"]
            assert torch.isfinite(pixels).all()
        except ValueError as error:
            assert str(tmp_path) in str(error), error

    check()


def test_converter_tokenizers(sentencepiece_model, tmp_path):
    from conversion import build_llama_tokenizer

    path = tmp_path / "tokenizer.model"

    @fuzz
    @given(damaged(sentencepiece_model.read_bytes()))
    def check(content):
        path.write_bytes(content)
        try:
            build_llama_tokenizer(path)
        except ValueError as error:
            assert str(path) in str(error), error

    check()
