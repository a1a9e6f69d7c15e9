"""Predictions on image files: names that are not UTF-8, images that cannot be read, texts of every alphabet."""

import io
import json
import os
import sys

import data_trees as trees
import numpy as np
import pytest
import torch

from data_scripts.images import PictureError
from data_scripts.skipped import SkipList
from evaluation import fonts, predict
from evaluation.config import EvaluationConfig


@pytest.fixture
def run(tmp_path, monkeypatch):
    def segment(model, processor, images, expressions, config):
        mask = np.ones((images[0].height, images[0].width), bool)
        return [
            [
                {
                    "text": text,
                    "mask": mask,
                    "is_rejected": False,
                    "is_malformed": False,
                    "score": 1.0,
                    "probability": 0.7,
                }
                for text in expressions[0]
            ]
        ]

    monkeypatch.setattr(predict, "segment_images", segment)
    config = EvaluationConfig(rows=[], dataset="own", split="val", protocol="slots")

    def run(paths, expressions=("a cat",), **options):
        predict.predict_files(
            torch.nn.Identity(),
            None,
            [os.fspath(path) for path in paths],
            expressions,
            config,
            tmp_path / "out",
            **options,
        )
        return read()

    def read():
        return json.loads((tmp_path / "out/predictions.json").read_text(encoding="utf-8"))

    run.read = read
    return run


def test_a_file_name_that_is_not_utf8_loses_no_predictions(run, tmp_path, monkeypatch):
    good = trees.picture(tmp_path / "good.jpg")
    bad = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        with open(bad, "wb") as file:
            file.write(good.read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    )  # errors="strict", as in a shell
    monkeypatch.setattr(fonts, "_system_fonts", list)
    fonts.font_for.cache_clear()
    predictions = run([os.fsdecode(bad), good], ["a cat", "左边的狗"])
    fonts.font_for.cache_clear()
    assert [one["image"].rpartition("/")[2] for one in predictions] == ["caf\\udce9.jpg", "good.jpg"]
    assert [one["expressions"][1]["text"] for one in predictions] == ["左边的狗"] * 2
    assert all((tmp_path / "out" / one["overlay"]).is_file() for one in predictions)
    page = (tmp_path / "out/predictions.html").read_text(encoding="utf-8")
    assert page.count("左边的狗") == 2 and "good.jpg" in page


def test_an_image_that_cannot_be_read_loses_no_predictions(run, tmp_path):
    good = trees.picture(tmp_path / "good.jpg")
    bad = trees.write(tmp_path / "bad.jpg", good.read_bytes()[:300])
    with pytest.raises(PictureError, match=r"bad\.jpg cannot be read"):
        run([good, bad, good])
    assert len(run.read()) == 1
    skipped = SkipList(tmp_path / "out/skipped_images.txt")
    assert len(run([good, bad, good], skip_list=skipped)) == 2
    (line,) = skipped.read()
    assert "bad.jpg cannot be read" in line
