"""Tasks of Label Studio: brush masks in its run-length encoding, and the records of its JSON export.

The encoding is that of https://docs.thi.ng/umbrella/rle-pack/ over the RGBA values of an image, row by row; the other fields
are those of https://labelstud.io/tags/brushlabels and https://labelstud.io/guide/predictions.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from .masks import check_size, encode_mask, mask_area, segmentation_to_rle
from .records import at, expect, short_repr

HEADER = "05b"  # bits per value less one, after 32 bits of the number of values
VALUE_BITS = 8
LENGTH_BITS = (3, 7, 11, 16)  # a run's length is written in one of four widths
LONGEST = 2 ** LENGTH_BITS[-1]
_TASKS = re.compile(rb'^\s*\[\s*\{(?:.|\n)*?"(annotations|predictions|completed_by|data)"\s*:')
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # in front of the name of a file that was uploaded


def encode_brush(mask: np.ndarray) -> list[int]:
    """Return the bytes that Label Studio stores for a mask (height, width).

    >>> encode_brush(np.array([[0, 1, 1]]))
    [0, 0, 0, 12, 57, 53, 124, 96, 19, 255, 128]
    """
    values = np.where(mask.ravel(), 255, 0)
    starts = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
    lengths = 4 * np.diff(np.append(starts, values.size))  # red, green, blue and alpha are all 0 or 255
    bits = [f"{4 * values.size:032b}", f"{VALUE_BITS - 1:{HEADER}}", *(f"{width - 1:04b}" for width in LENGTH_BITS)]
    for value, length in zip(values[starts].tolist(), lengths.tolist(), strict=True):
        while length:
            run = min(length, LONGEST)
            kind = next(n for n, width in enumerate(LENGTH_BITS) if run <= 2**width)
            bits.append(f"1{kind:02b}{run - 1:0{LENGTH_BITS[kind]}b}{value:08b}")
            length -= run
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def decode_brush(content: Any, height: int, width: int) -> np.ndarray:
    """Return the mask (height, width), booleans, that Label Studio's bytes describe: every pixel that is not transparent.

    Raises:
        ValueError: They are not bytes, are cut off, or are of an image of another size.
    """
    check_size([height, width])
    if not isinstance(content, list) or any(type(byte) is not int or not 0 <= byte < 256 for byte in content):
        raise ValueError(f"its rle must be a list of bytes, got {short_repr(content)}")
    bits = "".join(f"{byte:08b}" for byte in content)
    place = 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        if place > len(bits):
            raise ValueError(f"its rle of {len(content)} bytes is cut off; export it again")
        return int(bits[place - count : place], 2)

    size, value_bits = read(32), read(5) + 1
    length_bits = [read(4) + 1 for _ in range(4)]
    if size != 4 * height * width or value_bits != VALUE_BITS:
        raise ValueError(
            f"its rle holds {size} values of {value_bits} bits, but an image of {height} x {width} (height x width) has "
            f"{4 * height * width} of {VALUE_BITS}; export it again"
        )
    values, filled = np.zeros(size, np.uint8), 0
    while filled < size:
        is_run = read(1)
        count = min(read(length_bits[read(2)]) + 1, size - filled)
        if is_run:
            values[filled : filled + count] = read(VALUE_BITS)
        else:
            values[filled : filled + count] = [read(VALUE_BITS) for _ in range(count)]
        filled += count
    return values.reshape(height, width, 4)[..., 3] > 0


def is_tasks(path: Path) -> bool:
    """Return whether a JSON file is a list of tasks, as Label Studio exports it and `data_scripts.export` writes it."""
    with open(path, "rb") as file:
        return bool(_TASKS.match(file.read(4096).removeprefix(b"\xef\xbb\xbf")))


def task_record(root: Path, where: str, task: Any) -> dict[str, Any]:
    """Return the record of a task, see `own_formats.py`: its newest annotation that was not cancelled, else its newest prediction."""
    data = expect(expect(task, where, data=dict)["data"], f"{where}: data")
    results: list[Any] = []
    for kind in ("annotations", "predictions"):
        answers = task.get(kind) or []
        if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
            raise ValueError(f"{where}: {kind} is {short_repr(answers)}, not a list of objects; export it again.")
        if done := [answer for answer in answers if not answer.get("was_cancelled")]:
            results = expect(done[-1], f"{where}: {kind}", result=list)["result"]
            break
    url = data.get("image", next((value for value in data.values() if isinstance(value, str)), None))
    return {
        "image": _local_name(root, url),
        "absent": data.get("absent"),
        "expressions": partial(_expressions, results),
    }


def _local_name(root: Path, url: Any) -> Any:
    """Return the path below `root` of the image that a task's URL names: the longest end of the URL's path that is there."""
    if not isinstance(url, str) or "\0" in url:
        return url
    parts = urlsplit(url)
    named = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]  # /data/local-files/?d=PATH
    names = [name for name in PurePosixPath(named).parts if name not in ("/", "..")]
    for first in range(len(names)):
        for folder in (".", "images"):
            for last in (names[-1], _UPLOADED.sub("", names[-1])):
                candidate = PurePosixPath(folder, *names[first:-1], last)
                if os.path.isfile(root / candidate):
                    return candidate.as_posix()
    return "/".join(names)


def _expressions(results: list[Any], height: int, width: int) -> list[dict[str, Any]]:
    """Return one expression per label of a task's results: brush strokes and polygons, each one thing."""
    things: dict[str, list[dict]] = {}
    for number, result in enumerate(results):
        with at(f"result {number}"):
            kind = result.get("type") if isinstance(result, dict) else None
            if not isinstance(kind, str) or not isinstance(value := result.get("value"), dict):
                raise ValueError(f"a result has a type and a value, got {short_repr(result)}")
            if kind not in ("brushlabels", "polygonlabels"):
                if kind.endswith("labels"):
                    raise ValueError(f"its type is {short_repr(kind)}, which has no mask; draw it with the brush")
                continue  # choices, texts and the like
            if not isinstance(labels := value.get(kind), list) or not all(isinstance(text, str) for text in labels):
                raise ValueError(f"its {kind} are {short_repr(labels)}; they must be a list of texts")
            if not mask_area(mask := _mask(kind, value, height, width)):
                raise ValueError("its mask has no pixel; draw it or take it out")
            for text in labels:
                things.setdefault(text, []).append(mask)
    return [{"text": text, "masks": masks} for text, masks in things.items()]


def _mask(kind: str, value: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Return the encoding of a brush mask, or of a polygon whose points are in percent of the image."""
    if kind == "brushlabels":
        return encode_mask(decode_brush(value.get("rle"), height, width))
    points: Any = value.get("points")
    is_pair = isinstance(points, list) and all(isinstance(point, list) and len(point) == 2 for point in points)
    if not is_pair or not all(isinstance(number, (int, float)) for point in points for number in point):
        raise ValueError(f"its points are {short_repr(points)}; they must be [[x, y], ...] in percent of the image")
    outline = [number * (height if place else width) / 100 for point in points for place, number in enumerate(point)]
    return segmentation_to_rle([outline], height, width, in_pixels=True)
