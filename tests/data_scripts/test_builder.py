"""Rows are built once, and again when a file changes."""

import subprocess
import sys

import data_trees as trees
import pytest
from data_trees import MINI
from paths import ROOT

import data_scripts
from data_scripts.masks import decode_mask, mask_area


def test_a_row():
    row = data_scripts.load("grefcoco", MINI, "val")[0]
    assert (row["image_id"], row["height"], row["width"]) == ("5617", 104, 260)
    assert row["image"].size == (260, 104)
    first = row["expressions"][0]
    assert (first["text"], first["num_targets"], first["part"]) == ("black thing top side", 1, None)
    assert decode_mask(first["mask"]).shape == (104, 260)
    assert not any(mask_area(entry["mask"]) for entry in row["expressions"] if not entry["num_targets"])


def test_a_second_start_finds_what_the_first_built(root, monkeypatch):
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1])])
    assert len(data_scripts.load("grefcoco", root)) == 1
    monkeypatch.setattr("data_scripts.referring.read_json", lambda path: pytest.fail("read again"))
    rows = data_scripts.load("grefcoco", root)
    assert rows.cache_files and rows[0]["expressions"][0]["text"] == "a cat"


def test_a_changed_file_is_built_again(root):
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1])])
    assert len(data_scripts.load("grefcoco", root)[0]["expressions"]) == 1
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1], texts=["a cat", "a dog"])])
    assert len(data_scripts.load("grefcoco", root)[0]["expressions"]) == 2


def test_loading_needs_neither_torch_nor_the_model():
    code = (
        "import sys, data_scripts.mixture, data_scripts.check, data_scripts.publish, data_scripts.own\n"
        "import data_scripts.referring, data_scripts.semantic, data_scripts.reason_seg, data_scripts.vqa\n"
        "assert not {'torch', 'transformers', 'modeling_gsva', 'trainers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_small_build_does_not_import_scipy(root):
    """`datasets` patches the module of a builder for remote files, and imports scipy for that."""
    trees.ade20k(root, trees.full(1))
    code = (
        "import sys, data_scripts, datasets\n"
        "before = set(sys.modules)\n"
        f"assert len(data_scripts.load('ade20k', {str(root)!r}, cache_dir={str(root / 'arrow')!r})) == 1\n"
        "assert not {'scipy', 'torch'} & (set(sys.modules) - before), sorted(set(sys.modules) - before)[:20]\n"
        "from data_scripts import semantic; from pathlib import Path; assert semantic.Path is Path"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
