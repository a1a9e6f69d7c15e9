"""Tiles: one picture per expression with its mask, its text and what came of it."""

import numpy as np
import pytest
from PIL import Image

from evaluation.drawing import PALETTE, marked, overlay, striking_colours
from evaluation.questions import Question
from evaluation.tiles import all_masks, decision, make_tiles, sheet, verdict

NAN = float("nan")


def rectangle(left: int, right: int, height: int = 20, width: int = 40) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[4 : height - 4, left:right] = True
    return mask


def result(mask=None, is_rejected=False, text="a dog", score=2.0, probability=0.88):
    mask = rectangle(4, 14) if mask is None else mask
    return {"text": text, "mask": mask, "is_rejected": is_rejected, "score": score, "probability": probability}


def colours_in(image: Image.Image) -> set[tuple]:
    return {tuple(int(value) for value in colour) for colour in np.asarray(image).reshape(-1, 3)}


def test_a_mask_is_tinted_and_outlined_and_the_truth_is_white():
    black = Image.new("RGB", (40, 20), "black")
    drawn = marked(black, rectangle(25, 38), PALETTE[0], rectangle(4, 14), side=256)
    assert drawn.size == (256, 128)
    assert {PALETTE[0], (255, 255, 255), tuple(int(0.35 * part) for part in PALETTE[0])} <= colours_in(drawn)
    assert drawn.getpixel((9 * 6, 64)) == (0, 0, 0)  # inside the truth nothing is tinted
    nothing = np.zeros((20, 40), dtype=bool)
    assert colours_in(marked(black, nothing, PALETTE[0], nothing)) == {(0, 0, 0)}


@pytest.mark.parametrize("under", PALETTE)
def test_a_colour_stands_out_from_what_is_under_it(under):
    (colour,) = striking_colours(Image.new("RGB", (40, 20), under), [rectangle(4, 14)])
    assert np.abs(np.subtract(colour, under)).max() > 100


def test_masks_have_colours_of_their_own():
    image = Image.new("RGB", (40, 20), "grey")
    masks = [rectangle(2, 10)] * (len(PALETTE) + 1)
    assert sorted(striking_colours(image, masks)[: len(PALETTE)]) == sorted(PALETTE)
    assert len(striking_colours(image, masks)) == len(masks)
    assert len(striking_colours(image, [np.zeros((20, 40), dtype=bool)])) == 1


def test_outlines_of_equal_masks_stay_apart():
    image, mask = Image.new("RGB", (40, 20), "black"), rectangle(4, 34)
    drawn = overlay(image, [mask] * 3, PALETTE[:3])
    counts = [int((np.asarray(drawn) == colour).all(-1).sum()) for colour in PALETTE[:3]]
    assert counts[0] > counts[1] > counts[2] > 100
    tiny = np.zeros((20, 40), dtype=bool)
    tiny[10, 10] = True
    shown = overlay(image, [mask] * 3 + [tiny], PALETTE[:4])
    assert PALETTE[3] in colours_in(shown)  # too small to be drawn inside the others


def test_verdicts_and_decisions():
    there, absent = Question("a dog", rectangle(4, 14)), Question("a cat", rectangle(4, 4), num_targets=0)
    gone = {"is_rejected": True, "mask": rectangle(4, 4)}
    assert verdict(there, result()) == "right: IoU 1.00"
    assert verdict(there, result(rectangle(10, 20))) == "wrong: IoU 0.25"  # 4 of 16 columns
    assert verdict(there, gone) == "missed: it is there"
    assert verdict(absent, result()) == "wrong: it is not there"
    assert verdict(absent, gone) == "right: rejected"
    assert decision(result()) == "probability 0.880"
    assert decision(result(is_rejected=True, probability=NAN)) == "rejected: score +2.00"
    assert decision(result(is_rejected=True, score=NAN, probability=NAN)) == "rejected: no slot in the answer"


def test_a_rejected_tile_is_grey_and_shows_what_was_missed():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8))
    kept, gone = make_tiles(image, [result(), result(is_rejected=True)])
    assert not kept.is_rejected and gone.is_rejected and kept.verdict == ""
    red, green, blue = np.asarray(gone.picture, dtype=int).transpose(2, 0, 1)
    assert abs(red - green).max() <= 1 and abs(green - blue).max() <= 1 and red.min() > 100
    (missed,) = make_tiles(image, [result(is_rejected=True)], [Question("a dog", rectangle(4, 14))])
    assert missed.verdict == "missed: it is there" and not missed.is_right
    assert (np.asarray(missed.picture) == 255).all(-1).sum() > 100  # the outline of the truth


def test_sheets_have_a_tile_for_each_expression_in_rows():
    image = Image.new("RGB", (40, 20), "navy")
    tiles = make_tiles(image, [result(text=f"dog number {n}") for n in range(5)])
    one, two = sheet([("a title", tiles[:4])]), sheet([("a title", tiles)])
    assert one.width == two.width == 4 * 266 + 10 and two.height > 1.8 * one.height - 40
    assert sheet([("first", tiles[:1]), ("second", tiles[:1])]).width == 276
    assert sheet([]).size > (0, 0)
    colours = [
        tile.colour for tile in make_tiles(image, [result(), result(rectangle(20, 30)), result(is_rejected=True)])
    ]
    assert colours[2] is None and len(set(colours)) == 3
    everything = all_masks(image, [result(), result(rectangle(20, 30), is_rejected=True)])
    assert everything.decision == "1 of 2 expressions"
    struck = np.asarray(sheet([("", make_tiles(image, [result(is_rejected=True)]))]))
    plain = np.asarray(sheet([("", make_tiles(image, [result()]))]))
    assert struck.shape == plain.shape and (struck != plain).any()
