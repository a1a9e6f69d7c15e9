"""Absent expressions drawn from other images: what is never drawn, how many, and the list for people."""

import json
import pickle
import re

import data_trees as trees
import numpy as np
import pytest
from torch.utils.data import DataLoader

import data_scripts
from data_scripts import shapes
from data_scripts.masks import encode_mask, mask_area
from data_scripts.mixture import TrainingDataset, load_mixture
from data_scripts.negatives import Negatives, check_negatives, main
from data_scripts.nouns import Categories, read_phrase
from data_scripts.schema import expression
from data_scripts.transforms import Draws, ReferringTransform


def box(left, right):
    mask = np.zeros((10, 20), np.uint8)
    mask[2:8, left:right] = 1
    return encode_mask(mask)


def row(number, **boxes):
    """A row of texts with their boxes as (left, right); None for an absent one."""
    entries = [
        expression(text.replace("_", " "), box(*place) if place else box(0, 0), int(bool(place)))
        for text, place in boxes.items()
    ]
    return {"image": trees_image(), "image_id": str(number), "height": 10, "width": 20, "expressions": entries}


def trees_image():
    from PIL import Image

    return Image.new("RGB", (20, 10))


@pytest.fixture(scope="module")
def drawn_shapes():
    rows = [shapes.make_row(0, "train", index) for index in range(90)]
    return [{**row, "expressions": [one for one in row["expressions"] if one["num_targets"]]} for row in rows]


def is_absent(text, things):
    """Return whether no part of an expression of *shapes* is in the picture. Place and size are not looked at."""
    for part in text.split(" and "):
        words = {word.rstrip("s") for word in part.split()}
        if any(
            words.isdisjoint(set(shapes.COLOURS) - {thing.colour})
            and words.isdisjoint(set(shapes.SHAPES) - {thing.shape})
            for thing in things
        ):
            return False
    return True


@pytest.mark.parametrize(("like", "right"), [("noun", 0.85), ("attribute", 0.9)])
def test_what_is_drawn_is_absent_as_far_as_the_texts_say(drawn_shapes, like, right):
    negatives = Negatives([drawn_shapes], 0.3, like)
    absent, alike = [], 0
    for index, one in enumerate(drawn_shapes):
        own = {entry["text"] for entry in one["expressions"]}
        nouns = {noun for text in own for noun in read_phrase(text).nouns}
        texts = negatives.draw(one, 3, Draws(0, 0, index))
        assert len(set(texts)) == len(texts) and own.isdisjoint(texts)
        things = shapes.draw_picture(np.random.default_rng([0, 0, index, 0]))[1]
        absent += [is_absent(text, things) for text in texts]
        alike += sum(not read_phrase(text).heads.isdisjoint(nouns) for text in texts)
        if like == "noun":
            assert all(read_phrase(text).heads.isdisjoint(nouns) and "shape" not in text for text in texts)
    assert len(absent) > 240 and np.mean(absent) > right
    assert (alike > 0.5 * len(absent)) == (like == "attribute")


def test_another_attribute_must_be_that_of_everything_shown():
    other = row(9, the_blue_car=(0, 5), the_green_car=(6, 9))
    for texts, is_possible in (
        ({"the_red_car": (0, 5)}, True),
        ({"the_red_car": (0, 5), "the_left_car": (0, 5)}, True),  # which is the red one
        ({"the_red_car": (0, 5), "the_left_car": (9, 14)}, False),  # which may be blue
        ({"the_red_car": (0, 5), "the_left_car": (0, 6)}, False),  # a part of which may be blue
        ({"the_red_car": (0, 5), "the_dog": (9, 14)}, True),
        ({"the_red_car": (0, 5), "the_blue_dog": (9, 14)}, True),
        ({"the_red_car": (0, 5), "the_blue_thing": (9, 14)}, False),
        ({"the_red_car": (0, 5), "the_blue_thing": (9, 14), "the_dog": (9, 14)}, True),
        ({"the_red_and_blue_car": (0, 5)}, False),
        ({"the_car": (0, 5)}, False),
        ({"the_red_car": (0, 5), "the_BLUE_car": None}, False),
    ):
        one = row(1, **texts)
        negatives = Negatives([[one, other]], 0.3, "attribute")
        assert negatives.has_another_attribute("the blue car", one, negatives.facts(one)) == is_possible, texts


def test_categories_exclude_what_words_do_not():
    rows = [row(1, the_left_thing=(0, 5)), row(2, the_collie=(0, 5)), row(3, a_tower=(0, 5))]
    assert set(Negatives([rows], 0.5).draw(rows[0], 5, Draws(0))) == {"the collie", "a tower"}
    known = Categories({"1": frozenset({"dog"})}, {"the collie": frozenset({"dog"})})
    assert Negatives([rows], 0.5, categories=known).draw(rows[0], 5, Draws(0)) == ["a tower"]
    named = Categories({"1": frozenset({"tower"})})  # the category's name is a noun that the image has
    assert Negatives([rows], 0.5, categories=named).draw(rows[0], 5, Draws(0)) == ["the collie"]


def test_the_published_sets_have_categories():
    known = data_scripts.categories("grefcoco", trees.MINI)
    assert known.of_image["20355"] == {"bottle", "chair", "dog", "clock"}
    assert known.of_text["the pink thing right side"] == {"bottle"}
    assert data_scripts.categories("shapes") == Categories()


def test_captions_of_own_coco_files_have_categories(tmp_path):
    trees.picture(tmp_path / "1.jpg")
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 7, "caption": "the collie", "segmentation": [trees.SQUARE]},
        {"id": 2, "image_id": 1, "category_id": 8, "segmentation": [trees.SQUARE]},
    ]
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": trees.HEIGHT, "width": trees.WIDTH}],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "dog"}, {"id": 8, "name": "cat"}],
    }
    trees.write(tmp_path / "train.json", content)
    known = data_scripts.categories("own", tmp_path)
    assert known == Categories.of({"1": ["dog", "cat"]}, {"the collie": ["dog"], "cat": ["cat"]})
    assert data_scripts.categories("own", own_data(tmp_path / "lines")) == Categories()


def test_rows_of_one_image_share_what_they_say():
    rows = [row(1, a_dog=(0, 5)), row(1, a_cat=(6, 9)), row(2, a_cow=(0, 5))]
    assert Negatives([rows[:1], rows[1:]], 0.5).draw(rows[0], 3, Draws(0)) == ["a cow"]


def test_texts_that_name_nothing_are_never_drawn():
    rows = [row(1, a_dog=(0, 5)), row(2, second_from_left=(0, 5), the_red_thing=(6, 9), a_unicorn=None)]
    rows[1]["expressions"].append(expression("Where can we sit?", box(0, 4), is_sentence=True))
    assert Negatives([rows], 0.5).draw(rows[0], 3, Draws(0)) == []


@pytest.mark.parametrize("rows", [[row(1, a_dog=(0, 5))], [row(n, a_dog=(0, 5), the_dog=(6, 9)) for n in range(4)]])
def test_nothing_left_to_draw_is_said_and_training_goes_on(rows):
    negatives = Negatives([rows], 0.5, "attribute")
    assert "No image has any left to draw by noun" in str(negatives)
    transform = ReferringTransform(num_expressions=4)
    plain = TrainingDataset(rows, ReferringTransform(num_expressions=4))[0]
    transform.negatives = negatives
    (masks,) = TrainingDataset(rows, transform)[0]["masks"]
    assert masks.shape == plain["masks"][0].shape and masks.any(axis=(1, 2)).all()


def test_some_images_without_any_are_counted():
    rows = [row(1, a_dog=(0, 5), a_cat=(6, 9)), row(2, a_dog=(0, 5))]
    assert str(Negatives([rows], 0.5)).endswith("1 of 2 images have none left to draw by noun.")


@pytest.mark.parametrize(("num_expressions", "share"), [(3, 0.3), (6, 0.3), (2, 0.5), (6, 0.5)])
def test_the_share_is_exact_on_average(drawn_shapes, num_expressions, share):
    transform = ReferringTransform(num_expressions=num_expressions)
    transform.negatives = Negatives([drawn_shapes], share, "attribute")
    absent, places = [], []
    for index in range(360):
        one = drawn_shapes[index % 90]
        chosen = transform.choose(one, Draws(0, index // 90, index))
        is_drawn = [entry["num_targets"] == 0 for _, entry in chosen]
        assert len(chosen) <= num_expressions and not all(is_drawn)
        own = {entry["text"] for entry in one["expressions"]}
        assert sum(name in own for name, _ in chosen) == len(chosen) - sum(is_drawn)
        absent.append((sum(is_drawn), len(chosen)))
        places += [place / (len(chosen) - 1) for place, one in enumerate(is_drawn) if one]
    drawn, asked = np.sum(absent, axis=0)
    assert drawn / asked == pytest.approx(share, abs=0.02)
    assert np.mean(places) == pytest.approx(0.5, abs=0.06)  # no place in the question gives them away


def test_own_no_targets_stay_and_can_be_left_out():
    rows = [row(1, a_dog=(0, 5), a_unicorn=None), row(2, a_cow=(0, 5)), row(3, a_unicorn=(0, 5))]
    transform = ReferringTransform(num_expressions=6)
    transform.negatives = Negatives([rows], 0.4)
    texts = {name for n in range(20) for name, _ in transform.choose(rows[0], Draws(0, 0, n))}
    assert texts == {"a dog", "a unicorn", "a cow"}
    transform = ReferringTransform(num_expressions=6, drop_no_targets=True)
    assert [name for name, _ in transform.choose(rows[0], Draws(0))] == ["a dog"]
    transform.negatives = Negatives(
        [rows], 0.4, drop_no_targets=True
    )  # as if the data had never named a unicorn there
    drawn = [entry for n in range(20) for _, entry in transform.choose(rows[0], Draws(0, 0, n))]
    assert {entry["text"] for entry in drawn} == {"a dog", "a cow", "a unicorn"}
    assert not any(mask_area(entry["mask"]) for entry in drawn if entry["text"] != "a dog")


def _same(example):
    return example


def worded(example):
    return example["image_id"], example["conversations"], example["masks"][0].tobytes()


def test_workers_copies_and_later_starts_draw_the_same(drawn_shapes):
    def make():
        transform = ReferringTransform(num_expressions=6)
        transform.negatives = Negatives([drawn_shapes[:20]], 0.3, "attribute")
        return TrainingDataset(drawn_shapes[:20], transform, seed=5)

    one = make()
    items = [worded(one[index]) for index in range(40)]  # two epochs
    assert items[:20] != items[20:] and "[REJ]" in str(items)
    loader = DataLoader(one, batch_size=None, num_workers=2, multiprocessing_context="fork", collate_fn=_same)
    assert [worded(item) for item in loader] == items[:20]
    resumed = pickle.loads(pickle.dumps(make()))
    assert [worded(resumed[index]) for index in range(25, 40)] == items[25:]


def test_without_negatives_nothing_changes(drawn_shapes):
    rows = drawn_shapes[:10]
    never = ReferringTransform(num_expressions=3)
    never.negatives = Negatives([rows], 0.0)
    plain = TrainingDataset(rows, ReferringTransform(num_expressions=3))
    # The shape of a question is that of before; only with a share above 0 does `trainers.data` set `negatives`.
    assert [len(item["masks"][0]) for item in TrainingDataset(rows, never)] == [len(i["masks"][0]) for i in plain]


def test_a_mixture_draws_for_its_referring_sets_from_all_of_them():
    sets = {"refer_seg": ["refclef", "grefcoco"], "sem_seg": ["ade20k"]}
    mixed = load_mixture(trees.MINI, datasets=sets, length=60, seed=1, negatives=0.4)
    semantic, referring = mixed.sources[1], mixed.sources[0]
    assert referring[0].transform.negatives is referring[1].transform.negatives
    assert getattr(semantic[0].transform, "negatives", None) is None
    assert len(re.findall(r"\[REJ\]", str([item["conversations"] for item in mixed]))) > 5
    with pytest.raises(ValueError, match="this mixture does not have"):
        load_mixture(trees.MINI, datasets={"sem_seg": ["ade20k"]}, length=1, negatives=0.4)


@pytest.mark.parametrize(
    ("share", "count", "message"),
    [
        (1.0, 3, "negatives=1 is not possible"),
        (-0.1, 3, "negatives=-0.1 is not possible"),
        (float("nan"), 3, "negatives=nan is not possible"),
        (0.3, 1, "leaves no room for an expression that has a target. Give more num_expressions"),
        (0.8, 3, "Give at most 0.66, more num_expressions, or all_absent"),
    ],
)
def test_shares_that_cannot_be(share, count, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_negatives(share, count, all_absent=False)


def test_shares_that_can_be():
    check_negatives(0.3, 1, all_absent=True)
    check_negatives(0.5, 2, all_absent=False)
    check_negatives(0, 1, all_absent=False)
    with pytest.raises(ValueError, match="negatives_like='colour' is not known"):
        Negatives([[]], 0.3, "colour")


# --- the list for people ---


def own_data(folder):
    records = []
    for number, texts in enumerate((["a red car", "the dog"], ["a blue car"], ["two cows", "the barn"])):
        trees.picture(folder / f"{number}.jpg")
        expressions = [{"text": text, "mask": trees.SQUARE} for text in texts]
        records.append({"image": f"{number}.jpg", "expressions": expressions, "absent": ["a <b>unicorn"]})
    trees.write(folder / "train.jsonl", "\n".join(map(json.dumps, records)))
    return folder


def test_the_list_and_its_page(tmp_path, capsys):
    words = [str(own_data(tmp_path / "own")), "--out", str(tmp_path / "list.jsonl"), "--negatives", "0.5"]
    words += ["--negatives_like", "attribute", "--num_expressions", "6", "--seed", "3"]
    assert main(words) == 0
    assert str(tmp_path / "list.html") in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == ["0.jpg", "1.jpg", "2.jpg"]
    assert lines[0]["present"] == ["a red car", "the dog"] and lines[0]["absent"] == ["a <b>unicorn"]
    drawn = {one["text"] for line in lines for one in line["negatives"]}
    assert drawn and {one["like"] for one in lines[1]["negatives"]} <= {"noun", "attribute"}
    assert {"text": "a red car", "nouns": ["car"], "like": "attribute"} in lines[1]["negatives"]
    page = (tmp_path / "list.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "a &lt;b&gt;unicorn" in page and "a red car" in page
    # It is what training draws in its first epoch.
    transform = ReferringTransform(num_expressions=6, all_absent=True)
    rows = data_scripts.load("own", tmp_path / "own")
    transform.negatives = Negatives([rows], 0.5, "attribute")
    trained = {name for name, entry in transform.choose(rows[1], Draws(3, 0, 1)) if not entry["num_targets"]}
    assert trained - {"a <b>unicorn"} == {one["text"] for one in lines[1]["negatives"]}


def test_nothing_is_overwritten_and_wrong_options_are_named(tmp_path, capsys):
    folder, out = str(own_data(tmp_path / "own")), tmp_path / "list.jsonl"
    trees.write(tmp_path / "list.html", "mine")
    assert main([folder, "--out", str(out)]) == 1
    assert "list.html exists already" in capsys.readouterr().err and not out.exists()
    out = tmp_path / "other.jsonl"
    assert main([folder, "--out", str(out), "--negatives", "1.5"]) == 1
    assert "negatives=1.5 is not possible" in capsys.readouterr().err
    assert main([folder, "--out", str(out), "--split", "val"]) == 1
    assert "has no split 'val'" in capsys.readouterr().err
    assert main(["nothing", "--out", str(out)]) == 1
    assert "There is no data set 'nothing'" in capsys.readouterr().err
    assert main([folder, "--out", str(out), "--dataset_options", "{"]) == 1
    assert "dataset_options" in capsys.readouterr().err and not out.exists()
