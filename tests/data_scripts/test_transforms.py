"""Transforms: examples as functions of row, seed, epoch and index."""

import re

import data_trees as trees
import numpy as np
import pytest
from data_trees import MINI, words

import data_scripts
from data_scripts.transforms import Draws, ReasoningTransform, ReferringTransform, SemanticTransform
from data_scripts.wordings import Wording


@pytest.fixture
def rows():
    return data_scripts.load("grefcoco", MINI)


def test_an_example(rows):
    example = ReferringTransform(num_expressions=2)(rows[0], seed=0, epoch=0, index=0)
    (turns,), (masks,) = example["conversations"], example["masks"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert masks.dtype == np.uint8 and masks.shape == (2, rows[0]["height"], rows[0]["width"])
    assert example["image"].mode == "RGB" and example["image_id"] == rows[0]["image_id"]
    present = [token == "[SEG]" for token in re.findall(r"\[(?:SEG|REJ)\]", turns[1]["content"])]
    assert present == masks.any(axis=(1, 2)).tolist()


def test_an_example_is_a_function_of_row_seed_epoch_and_index(rows):
    transform = ReferringTransform()
    row = rows[0]
    assert words(transform(row, 1, 2, 3)) == words(ReferringTransform()(dict(row), 1, 2, 3))
    others = [transform(row, *numbers) for numbers in ((2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert len({str(words(example)) for example in [transform(row, 1, 2, 3), *others] if example}) > 1


def test_another_wording(rows):
    wording = Wording(questions=("<image>\nFind {}.",), answers=(("Here:", "{} [SEG]"),), separator=" and ")
    question, answer = words(ReferringTransform(wording, num_expressions=2)(rows[0], 0, 0, 1))[0]
    assert question.startswith("<image>\nFind ") and answer.startswith("Here: ") and answer.count(" and ") >= 1


def test_draws_are_even():
    counts = np.bincount([Draws(0, 0, i).weighted([9, 3, 3, 1], "family") for i in range(4000)])
    assert np.abs(counts / 4000 - np.array([9, 3, 3, 1]) / 16).max() < 0.03
    assert sorted(Draws(1, 2, 3).subset(6, 6)) == list(range(6)) and Draws(0, 0, 0).subset(2, 3) == [0, 1]


def test_explanations():
    rows = data_scripts.load("ReasonSeg", MINI)
    explained = next(row for row in rows if row["expressions"][0]["explanation"])
    text_only = ReasoningTransform(explanatory=1.0)(explained)
    assert all(mask.shape == (0, explained["height"], explained["width"]) for mask in text_only["masks"])
    assert text_only["conversations"][0][1]["content"] == explained["expressions"][0]["explanation"]
    never = [ReasoningTransform(explanatory=-1)(explained, index=i) for i in range(20)]
    assert not any(explained["expressions"][0]["explanation"] in answer for one in never for answer in words(one)[0])


def test_a_part_has_two_names(root):
    trees.parts(root, "pascal_part", "dog:head")
    row = data_scripts.load("pascal_part", root)[0]
    asked = {words(SemanticTransform()(row, index=i))[0][0] for i in range(60)}
    assert any("dog head" in question for question in asked) and any("the head of the dog" in one for one in asked)
