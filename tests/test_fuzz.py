"""Malformed input to every reader: data sets, metric, processor, converter. Each ends in an error that names what is wrong,
or, where the change did no harm, in a valid result; never in a bare KeyError, a crash or a hang.

Examples are drawn by hypothesis from a fixed seed, so that every run sees the same ones; `EXAMPLES` are drawn per reader,
and a change that leaves the input as it was is drawn again.
"""

import copy
import json
import pickle
import shutil

import data_trees as trees
import pyarrow
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import data_scripts
from data_scripts.schema import check_rle

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


def reason_seg(root):
    shapes = [{"label": "target", "points": [[5, 5], [15, 5], [15, 15]]}, {"label": "ignore", "points": [[1, 1], [3, 1], [3, 3]]}]
    record = {"text": ["what purrs"], "is_sentence": False, "shapes": shapes}
    trees.reason_seg(root, record, explanations=[{"image": "a.jpg", "outputs": "It purrs."}])


def own(root):
    trees.picture(root / "cats/1.jpg")
    trees.label_map(root / "mask.png", trees.full(1))
    masks = [trees.SQUARE, [trees.SQUARE], {"size": [30, 40], "counts": [5 * 30, 30, 30 * 34]}, "mask.png", None]
    entries = [{"text": f"cat {n}", "mask": mask, "num_targets": 1, "is_sentence": False} for n, mask in enumerate(masks)]
    trees.write(root / "train.jsonl", to_json_lines([{"image": "cats/1.jpg", "image_id": "7", "expressions": entries}] * 2))


def own_coco(root):
    trees.picture(root / "cats/1.jpg")
    entry = {"id": 1, "image_id": 1, "caption": ["a cat", "it"], "segmentation": [trees.SQUARE]}
    trees.write(root / "train.json", {"images": [{"id": 1, "file_name": "cats/1.jpg"}], "annotations": [entry, entry]})


REFS = {"grefcoco": "grefs(unc).json", "refcocog": "refs(umd).p", "refzom": "Ref_ZOM.p"}
CASES = [
    *(
        (name, referring(name), [(f"refer_seg/{name}/{refs}", JSON if refs.endswith("json") else PICKLE),
                                 (f"refer_seg/{name}/instances.json", JSON)])
        for name in ("refclef", "refcoco", "refcoco+", "refcocog", "grefcoco", "refzom")
        for refs in [REFS.get(name, "refs(unc).p")]
    ),
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
]  # fmt: skip


def test_every_data_set_is_here():
    assert {name for name, _, _ in CASES} == set(data_scripts.BUILDERS)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged pictures
@pytest.mark.parametrize(("name", "make", "files"), CASES, ids=[f"{name}-{make.__name__.strip('<>')}" for name, make, _ in CASES])
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
