"""Texts of every alphabet on pictures: in a font that has them, else beside the picture, never as question marks."""

import numpy as np
import pytest
from PIL import Image

from evaluation import fonts
from evaluation.fonts import font_for
from evaluation.pages import file_page
from evaluation.tiles import drawable, make_tiles, sheet

RUSSIAN, ARABIC, CHINESE = "собака слева", "الكلب الأيسر", "左边的狗"


def result(text):
    return {"text": text, "is_rejected": False, "score": 1.0, "mask": np.ones((20, 30), bool)}


@pytest.mark.parametrize("text", ["the left dog", "café", RUSSIAN, ARABIC, "αβγ"])
def test_a_font_that_has_the_characters_is_found(text):
    font = font_for(text)
    assert font is not None
    missing = bytes(font.getmask("\U000fffff"))  # the box that stands for a character without a glyph
    assert all(bytes(font.getmask(character)) != missing for character in set(text) - {" "})


def test_without_a_font_the_text_is_in_the_page(monkeypatch):
    monkeypatch.setattr(fonts, "_system_fonts", list)
    fonts.font_for.cache_clear()
    assert font_for(CHINESE) is None
    text, font = drawable(CHINESE, "expression 1")
    assert text == "expression 1" and font is not None
    tiles = make_tiles(Image.new("RGB", (30, 20)), [result(CHINESE), result(RUSSIAN)])
    assert sheet([("a.jpg", tiles)]).height > tiles[0].picture.height
    page = file_page("note", [("a.jpg", tiles)])
    assert CHINESE in page and RUSSIAN in page and "???" not in page
    fonts.font_for.cache_clear()


def test_a_system_font_is_taken_where_it_has_the_characters(monkeypatch):
    has = {"own.ttf": frozenset(map(ord, RUSSIAN)), "cjk.ttf": frozenset(map(ord, CHINESE))}
    monkeypatch.setattr(fonts, "_system_fonts", lambda: list(has))
    monkeypatch.setattr(fonts, "_characters", lambda path: has.get(path, frozenset()))
    monkeypatch.setattr(fonts.ImageFont, "truetype", lambda path, size: (path, size))
    fonts.font_for.cache_clear()
    assert font_for(CHINESE, 11) == ("cjk.ttf", 11)
    fonts.font_for.cache_clear()
