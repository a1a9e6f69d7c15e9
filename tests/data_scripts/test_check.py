"""The check of data sets."""

import data_trees as trees

from data_scripts import check


def test_check_says_what_is_complete_and_what_is_missing(root, capsys):
    trees.ade20k(root, trees.full(1), trees.full(2))
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1]), trees.ref(1, ann_id=[-1])])
    assert check.main([str(root)]) == 0
    text = capsys.readouterr().out
    assert "ade20k: complete (train 2), 2 expressions, 0 without a target" in text
    assert "grefcoco: complete (train 1), 2 expressions, 1 without a target" in text
    assert "not there: refclef, refcoco, " in text
    (root / "ade20k/images/training/1.jpg").write_bytes(b"no picture")
    (root / "refer_seg/images/mscoco/images/train2014/1.jpg").unlink()
    assert check.main([str(root), "--open"]) == 1
    text = capsys.readouterr().out
    assert "1 of 2 images are missing or wrong" in text and "training/1.jpg cannot be read" in text
    assert "grefcoco: INCOMPLETE" in text and "0 complete, 2 incomplete" in text
    assert check.main([str(root), "mapillary"]) == 1
    assert "mapillary/config_v2.0.json is missing" in capsys.readouterr().out
