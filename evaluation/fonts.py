"""Fonts for texts on pictures: one that has all characters of a text, or none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache

from PIL import ImageFont


@lru_cache(maxsize=1024)
def font_for(text: str, size: int = 13) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """Return a font that has every character of `text`, or None if there is none on this machine.

    Pillow's font has ASCII, matplotlib's DejaVu Sans most alphabets (accented Latin, Cyrillic, Greek, Arabic, Hebrew), and
    the system's fonts perhaps Chinese, Japanese and Korean.
    """
    characters = {ord(character) for character in text if not character.isspace()}
    if all(32 <= character < 127 for character in characters):
        return ImageFont.load_default(size)
    for path, covered in _fonts():
        if characters <= covered:
            return ImageFont.truetype(path, size)
    return None


def _fonts() -> Iterator[tuple[str, frozenset[int]]]:
    from matplotlib import font_manager

    own = font_manager.findfont("DejaVu Sans")
    for path in [own, *_system_fonts()]:
        if covered := _characters(path):
            yield path, covered


@cache
def _system_fonts() -> list[str]:
    from matplotlib import font_manager

    return sorted(font_manager.findSystemFonts())


@cache
def _characters(path: str) -> frozenset[int]:
    """Return the code points that a font file has; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(path, 13)
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
