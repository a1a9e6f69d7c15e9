"""The data set `shapes`: rows depend on seed and index alone, masks and answers are correct, bad options are refused."""

import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

import data_scripts
from data_scripts import shapes
from data_scripts.schema import decode_mask

COUNT = 90  # pictures
# sha256 of pixels, words and masks, first 16 digits. They change with the rows, and then VERSION must change too.
GOLDEN = {
    ("train", 0, "segmentation"): "d9ca92c0ef1a0239",
    ("train", 1, "segmentation"): "0069a9ceddee8ac2",
    ("validation", 0, "segmentation"): "5016129914821706",
    ("test", 0, "segmentation"): "323dc70aa286cbf8",
    ("train", 0, "vqa"): "cf664ff5d4fbbd48",
}


def digest(row) -> str:
    """Pixels instead of file bytes: another zlib may pack a PNG otherwise."""
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    facts = {name: value for name, value in row.items() if name != "image"}
    return hashlib.sha256(image.tobytes() + json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def draw(index, split="train", seed=0):
    """Picture and things, straight from the generator's own numbers."""
    return shapes.draw_picture(np.random.default_rng([seed, shapes.SPLIT_CODES[split], index, 0]))


def things_of(index, split="train", seed=0):
    return draw(index, split, seed)[1]


def read(text, things):
    """
    What an expression names, by grammar, written independently of the generator: "X and Y", "all W… Ns", "the W… N", where
    a W is a colour, a size or a place. Also whether the words fit: one thing for "the", several for "all".
    """
    if " and " in text:
        parts = [read(part, things) for part in text.split(" and ")]
        return parts[0][0] + parts[1][0], all(fits for _, fits in parts) and parts[0][0] != parts[1][0]
    article, *words, noun = text.split()
    found = list(things)
    if (noun := noun.removesuffix("s") if article == "all" else noun) != "shape":
        found = [thing for thing in found if thing.shape == noun]
    place = None
    for word in words:
        if word in shapes.COLOURS:
            found = [thing for thing in found if thing.colour == word]
        elif word in shapes.RADII:
            found = [thing for thing in found if thing.size == word]
        else:
            place = {"leftmost": "x", "rightmost": "x", "top": "y", "bottom": "y"}[word]
            several = sorted(found, key=lambda thing: getattr(thing, place), reverse=word in ("rightmost", "bottom"))
            found = several[:1]
    if place:
        return found, len(several) > 1 and abs(getattr(several[0], place) - getattr(several[1], place)) >= 8
    return found, len(found) == 1 if article == "the" else len(found) > 1


@pytest.fixture(scope="module")
def rows():
    return [shapes.make_row(0, "train", index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def pictures():
    return [things_of(index) for index in range(COUNT)]


def test_rows_are_a_pure_function_of_seed_split_index_and_task():
    found = {key: digest(shapes.make_row(key[1], key[0], 5, key[2])) for key in GOLDEN}
    assert found == GOLDEN


def test_rows_do_not_depend_on_the_hash_seed_of_strings(rows):
    """Sets of strings have another order in another process; nothing may hang on it."""
    code = (
        "import json; from data_scripts import shapes; r = [shapes.make_row(0, 'train', n) for n in range(12)];"
        "print(json.dumps([[e['text'], e['mask']['counts']] for row in r for e in row['expressions']]))"
    )
    for seed in ("1", "2"):
        said = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert json.loads(said) == [[e["text"], e["mask"]["counts"]] for row in rows[:12] for e in row["expressions"]]


def test_no_two_splits_or_seeds_share_a_picture():
    seen = [
        hashlib.sha256(draw(index, split, seed)[0].tobytes()).hexdigest()
        for split in shapes.SPLIT_SIZES
        for seed in (0, 1)
        for index in range(6)
    ]
    assert len(set(seen)) == len(seen) == 36


def test_pictures_are_readable_and_things_lie_where_their_masks_are(rows, pictures):
    for row, things in zip(rows[:20], pictures):
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert image.mode == "RGB" and (image.height, image.width) == (row["height"], row["width"]) == (128, 128)
        assert 2 <= len(things) <= 4
        assert np.sum([thing.mask for thing in things], 0).max() == 1  # they do not overlap
        pixels = np.asarray(image, float)
        names = list(shapes.COLOURS)
        for thing in things:
            mean = pixels[thing.mask].mean(0)
            distances = [np.linalg.norm(mean - shapes.COLOURS[name]) for name in names]
            assert names[int(np.argmin(distances))] == thing.colour
            yy, xx = np.nonzero(thing.mask)
            # The square and the circle are symmetric; a triangle's and a star's centre of mass is its centre, too.
            assert abs(xx.mean() - thing.x) < 1.5 and abs(yy.mean() - thing.y) < 1.5
            reach = np.hypot(xx - thing.x, yy - thing.y).max()
            assert (reach > 23) == (thing.size == "big"), (thing, reach)


def test_every_mask_is_the_union_of_what_the_expression_names(rows, pictures):
    kinds = set()
    for row, things in zip(rows, pictures):
        for entry in row["expressions"]:
            targets, fits = read(entry["text"], things)
            truth = np.any([thing.mask for thing in targets], 0) if targets else np.zeros((128, 128), bool)
            assert (decode_mask(entry["mask"]).astype(bool) == truth).all(), (row["image_id"], entry["text"])
            assert entry["num_targets"] == len(targets) and (fits or not targets), (row["image_id"], entry["text"])
            kinds.add(shapes._kind(entry["text"]))
    # every kind occurs: "all …", "… and …", places, sizes, and "the red circle", "the red shape", "the circle"
    assert kinds >= {"all", "and", "leftmost", "rightmost", "top", "bottom", "small", "big"}
    assert kinds >= {"3 False", "3 True", "2 False"}


def test_a_third_each_is_single_multi_and_no_target(rows):
    numbers = np.array([min(entry["num_targets"], 2) for row in rows for entry in row["expressions"]])
    assert len(numbers) > 0.97 * COUNT * shapes.EXPRESSIONS_PER_PICTURE
    for kind in range(3):
        assert abs((numbers == kind).mean() - 1 / 3) < 0.03
    for row in rows:
        texts = [entry["text"] for entry in row["expressions"]]
        assert len(set(texts)) == len(texts)
    firsts = np.array([min(row["expressions"][0]["num_targets"], 2) for row in rows])
    assert all(0.15 < (firsts == kind).mean() < 0.55 for kind in range(3))  # the order tells nothing


def test_hard_absent_expressions_name_a_colour_and_a_shape_that_are_there_but_not_together(rows, pictures):
    hard = absent = 0
    for row, things in zip(rows, pictures):
        for text in (entry["text"] for entry in row["expressions"] if entry["num_targets"] == 0):
            absent += 1
            _, *words, noun = text.split()
            colours = {thing.colour for thing in things if thing.shape == noun}
            if words and words[0] in {thing.colour for thing in things} and colours:
                assert words[0] not in colours
                hard += 1
    assert 0.3 < hard / absent < 0.7


def test_answers_in_words_are_true():
    asked = []
    for index in range(40):
        row, things = shapes.make_row(0, "train", index, "vqa"), things_of(index)
        turns = row["conversation"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert ["<image>" in turn["text"] for turn in turns] == [True] + [False] * (len(turns) - 1)
        for question, answer in zip(turns[::2], turns[1::2]):
            question = question["text"].removeprefix("<image>\n")
            if question == "what is there from left to right?":
                in_order = sorted(things, key=lambda thing: thing.x)
                truth = ", ".join(f"{thing.size} {thing.colour} {thing.shape}" for thing in in_order)
            else:
                named = question.removeprefix("is there ").removesuffix("?")
                truth = "yes" if read(named, things)[0] else "no"
                asked.append(truth)
            assert answer["text"] == truth
    assert 0.15 < asked.count("no") / len(asked) < 0.25  # one question of five is about an absent thing


def test_both_tasks_show_the_same_picture():
    segmentation, vqa = (shapes.make_row(0, "test", 3, task) for task in shapes.TASKS)
    assert segmentation["image"] == vqa["image"] and segmentation["image_id"] == vqa["image_id"]


def test_a_smaller_set_is_the_beginning_of_a_larger_one(tmp_path):
    small = data_scripts.load("shapes", split="validation", size=3, cache_dir=str(tmp_path))
    large = data_scripts.load("shapes", split="validation", size=5, cache_dir=str(tmp_path))
    assert small.features == large.features and (len(small), len(large)) == (3, 5)
    for n in range(3):
        a, b = small[n], large[n]
        assert a.pop("image").tobytes() == b.pop("image").tobytes() and a == b
    assert large[4]["image_id"] == "validation-0-4"
    words = data_scripts.load("shapes", split="validation", size=2, task="vqa", cache_dir=str(tmp_path))
    assert words.column_names == ["image", "image_id", "conversation"]


def test_no_more_pictures_are_drawn_than_the_limit(tmp_path, monkeypatch):
    drawn, draw = [], shapes.draw_picture
    monkeypatch.setattr(shapes, "draw_picture", lambda random: drawn.append(1) or draw(random))
    options = {"split": "test", "cache_dir": str(tmp_path)}
    few = data_scripts.load("shapes", size=6, limit=2, **options)
    assert len(few) == len(drawn) == 2
    assert len(data_scripts.load("shapes", size=2, limit=9, **options)) == 2
    assert len(drawn) == 2  # the same two, kept


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "val"}, ["split 'val'", "train, validation, test"]),
        ({"task": "caption"}, ["task 'caption'", "segmentation, vqa"]),
        ({"size": 0}, ["size >= 1", "size=0"]),
        ({"size": "8"}, ["whole numbers", "size='8'"]),
        ({"seed": -1}, ["seed >= 0", "seed=-1"]),
        ({"sizes": 8}, ["option sizes", "size, seed, task"]),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError) as error:
        data_scripts.load("shapes", **options)
    assert all(word in str(error.value) for word in words)
