"""What an expression names: heads, attributes and nouns by the rules of `nouns.py`."""

import pytest

from data_scripts.nouns import Categories, name_of, read_phrase, singular

RED, BLUE = 0, 4  # the numbers of these colours in the table


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        ("the red circle", ["circle"]),
        ("all red shapes", ["shape"]),
        ("the red circle and the blue squares", ["circle", "square"]),
        ("guy left", ["person"]),  # RefCOCO's order of words
        ("second from left", [""]),
        ("girl blue shirt", ["person", "shirt"]),
        ("black and white dog", ["dog"]),
        ("the two red cars parked on the left", ["car"]),
        ("a slice of pizza", ["pizza"]),
        ("one of the dogs", ["dog"]),
        ("glass of wine", ["glass"]),
        ("woman riding a horse", ["person"]),
        ("the building on the right", ["building"]),
        ("the left orange", ["orange"]),
        ("the orange bus", ["bus"]),
        ("white", [""]),
        ("", [""]),
        ("...", [""]),
        ("das Auto", ["auto"]),
        ("红色的圆", ["红色的圆"]),
    ],
)
def test_head_nouns(text, heads):
    assert [part.head for part in read_phrase(text).parts] == heads


def test_all_nouns_of_a_text_count_for_its_image():
    assert read_phrase("man with a racket near the nets, next to dogs").nouns == {"person", "racket", "net", "dog"}


@pytest.mark.parametrize(
    ("plural", "one"),
    [("buses", "bus"), ("houses", "house"), ("knives", "knife"), ("cherries", "cherry"), ("boxes", "box"), ("gas", "gas"),
     ("people", "person"), ("firemen", "fireman"), ("skis", "ski"), ("grass", "grass"), ("ties", "tie"), ("as", "as")],
)  # fmt: skip
def test_singulars(plural, one):
    assert singular(plural) == one == singular(one)


def test_words_for_one_thing_have_one_name():
    assert name_of("women") == name_of("guy") == name_of("fireman") == name_of("man's")
    assert name_of("human") == "person" and name_of("couches") == name_of("sofa") != name_of("chair")


def test_attributes_belong_to_what_carries_them():
    def attributes(text):
        return read_phrase(text).parts[0].attributes

    assert attributes("man in red") == attributes("red man") == {("colour", ""): {RED}}
    assert attributes("man in a red shirt") == {("colour", "shirt"): {RED}}
    assert attributes("cat sitting") == attributes("sitting cat") == {("posture", ""): {0}}
    assert attributes("the big left cat") == {}  # size and place are relative


def test_what_excludes_what():
    def part(text):
        return read_phrase(text).parts[0]

    red = part("the red car")
    assert red.excludes(part("the blue car")) and red.excludes(part("the red dog"))
    assert red.excludes(part("the blue thing")) and not red.excludes(part("the red thing"))
    assert not red.excludes(part("the car")) and not part("the car").excludes(red)
    assert not red.excludes(part("the red and blue car")) and not red.excludes(part("the second from left"))
    assert not part("man in a red shirt").excludes(part("man with a blue hat"))


def test_categories_of_several_sets_are_united():
    one = Categories({"1": frozenset({"dog"})}, {"it": frozenset({"dog"})})
    both = Categories.united([one, Categories({"1": frozenset({"cat"})}), Categories()])
    assert both.of_image == {"1": {"dog", "cat"}} and both.of_text == {"it": {"dog"}}
