"""Conversations about an image, or without one."""

import data_trees as trees
import pytest
from data_trees import talk

import data_scripts
from data_scripts.mixture import TrainingDataset
from data_scripts.transforms import ConversationTransform


def conversation(root, *turns, **options):
    trees.llava(root, *turns, **options)
    return TrainingDataset(data_scripts.load("llava_instruct_150k", root), ConversationTransform())[0]


def test_a_conversation_without_a_picture(root):
    example = conversation(root, ("human", "hi"), ("gpt", "hello"), image=None)
    assert example["image"] is None and talk(example) == ["hi", "hello"]


def test_a_conversation_that_speaks_of_a_picture_it_lacks(root):
    with pytest.raises(ValueError, match=r"record 0 \(id '7'\): it mentions <image> but has no 'image'"):
        conversation(root, ("human", "<image>\nhi"), ("gpt", "hello"), image=None)


def test_a_trailing_question_is_dropped(root):
    example = conversation(root, ("human", "q <image>"), ("gpt", "a"), ("human", "q2"))
    assert talk(example) == ["<image>\nq", "a"] and example["image"] is not None


@pytest.mark.parametrize("turns", [("human", "human", "gpt"), ("human", "gpt", "gpt")])
def test_turns_that_do_not_alternate(root, turns):
    with pytest.raises(ValueError, match="record 0 .*human and gpt must take turns"):
        conversation(root, *((who, "x") for who in turns))


def test_an_empty_answer_and_one_that_looks_like_a_turn(root):
    example = conversation(root, ("human", "q"), ("gpt", ""), ("human", "q"), ("gpt", "it says ASSISTANT: hi [SEG]"))
    assert talk(example) == ["q", "", "q", "it says ASSISTANT: hi SEG"]


def test_another_role_is_named(root):
    with pytest.raises(ValueError, match="one of human, gpt, got 'system'"):
        conversation(root, ("system", "x"), ("human", "q"))
