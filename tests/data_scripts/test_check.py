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


def test_check_names_every_bad_record_and_goes_on(root, capsys):
    trees.ade20k(root, trees.full(1), trees.full(200), trees.full(201))
    trees.referring(root, "grefcoco", [trees.ref(i, ann_id=[i + 10]) for i in range(3)] + [trees.ref(9, ann_id=[1])])
    trees.picture(root / "1.jpg")
    lines = ['{"image": "1.jpg", "expressions": []}', "{", '{"image": "2.jpg", "expressions": []}', "[]"]
    trees.write(root / "train.jsonl", "\n".join([*lines, *lines[2:3] * 40]))
    trees.write(root / "val.jsonl", '{"image": "none.jpg", "expressions": []}\n[1]')
    assert check.main([str(root)]) == 1
    text = capsys.readouterr().out
    for words in ("0.png", "1.png holds the value 200", "2.png holds the value 201", "ref 0 names annotation 10", "ref 1 names annotation 11",
                  "ref 2 names annotation 12", "train.jsonl, line 2 is not JSON", "line 3: ", "line 4: a record needs"):  # fmt: skip
        assert (words in text) == (words != "0.png"), words
    assert text.count("train.jsonl, line") == 20 and "... and 25 more (--max_errors)" in text
    assert "0 complete, 3 incomplete" in text
    assert check.main([str(root), "own", "--max_errors", "60"]) == 1
    text = capsys.readouterr().out
    assert text.count("train.jsonl, line") == 43 and text.count("val.jsonl, line") == 2 and "more" not in text


def test_check_counts_what_the_metrics_will_count(root):
    texts = {1: [trees.SQUARE], 2: [[1, 1]]}  # the second encloses nothing
    refs = [trees.ref(ann_id=[1], texts=["a cat", " . "]), trees.ref(1, ann_id=[2]), trees.ref(2, ann_id=[-1])]
    trees.referring(root, "grefcoco", refs, texts)
    assert "3 expressions, 2 without a target, and 1 blank ones" in str(check.check("grefcoco", root))


def test_check_names_a_missing_image_in_another_case(root):
    trees.referring(root, "grefcoco", [trees.ref(ann_id=[1])])
    folder = root / "refer_seg/images/mscoco/images/train2014"
    (folder / "1.jpg").rename(folder / "1.JPG")
    assert f"is missing; there is {folder / '1.JPG'}" in str(check.check("grefcoco", root))
