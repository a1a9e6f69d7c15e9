"""Rows of two kinds, referring and reasoning, for the tests of evaluation."""

import pytest
from evaluations import mask_of

from data_scripts.schema import decode_mask, expression


@pytest.fixture(scope="module")
def rows(make_picture):
    """Five pictures of two sizes with 1 to 4 expressions; every third expression is a no-target."""
    texts = ["Man in red", "the dog.", "both cats", "a unicorn"]
    made = []
    for n in range(5):
        width, height = (40, 30) if n % 2 else (28, 44)
        entries = [
            expression(
                text, mask_of(height, width, None if (n + k) % 3 == 2 else (2 + k, 3, 20, 20 + k)), (n + k) % 3 + 1
            )
            for k, text in enumerate(texts[: n % 4 + 1])
        ]
        for entry in entries:
            entry["num_targets"] *= bool(decode_mask(entry["mask"]).any())
        made.append(
            {
                "image": make_picture(n, width, height),
                "image_id": f"p{n}",
                "height": height,
                "width": width,
                "expressions": entries,
            }
        )
    return made


@pytest.fixture(scope="module")
def reasoning(make_picture):
    """A sentence, a phrase, a sentence; the first two with pixels that do not count."""
    made = []
    for n, (text, is_sentence) in enumerate([("What can cut?", True), ("The Tool", False), ("Where is it.", True)]):
        ignore = mask_of(30, 40, (0, 0, 30, 12)) if n < 2 else None
        entries = [
            expression(t, mask_of(30, 40, (5, 15, 20, 30)), 1, is_sentence, ignore) for t in (text, "never asked for")
        ]
        made.append({"image": make_picture(n), "image_id": f"r{n}", "height": 30, "width": 40, "expressions": entries})
    return made
