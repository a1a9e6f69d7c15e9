"""What numbers were measured on: the digest of annotations, and runs side by side that differ in it."""

import json
import shutil

import data_trees as trees
import pytest
from evaluations import config_of

import data_scripts
from evaluation.loop import evaluate_rows
from evaluation.measured import annotations_digest, describe, differences, kinds_of, measured_on
from evaluation.pages import Run, report_page
from evaluation.records import make_record, results_table
from evaluation.report import main


def own_data(folder, texts=("the dog", "a cat")):
    trees.picture(folder / "1.jpg")
    expressions = [{"text": text, "mask": trees.SQUARE} for text in texts]
    trees.write(folder / "val.jsonl", json.dumps({"image": "1.jpg", "expressions": expressions, "absent": ["a cow"]}))
    return folder


def test_the_digest_is_of_the_annotations_and_of_nothing_of_the_machine(tmp_path):
    here, there = own_data(tmp_path / "here"), own_data(tmp_path / "deep" / "there")
    digests = [data_scripts.annotations_digest("own", folder) for folder in (here, there)]
    rows = [annotations_digest(data_scripts.load("own", folder, "val")) for folder in (here, there)]
    assert digests[0] == digests[1] and rows[0] == rows[1] and len(rows[0]) == len(digests[0]) == 16
    other = own_data(tmp_path / "other", ("the dog", "a cats"))
    assert data_scripts.annotations_digest("own", other) != digests[0]
    assert annotations_digest(data_scripts.load("own", other, "val")) != rows[0]
    assert data_scripts.annotations_digest("shapes") is None


def test_files_are_read_once_for_their_digest(tmp_path):
    folder = own_data(tmp_path / "own")
    data_scripts.load("own", folder, "val", cache_dir=tmp_path / "cache")
    first = data_scripts.annotations_digest("own", folder, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").rglob("annotations.sha256")
    assert kept.read_text() == first
    kept.write_text("half")  # of a killed process, or edited
    assert data_scripts.annotations_digest("own", folder, tmp_path / "cache") == first
    (folder / "val.jsonl").write_text((folder / "val.jsonl").read_text().replace("dog", "cow"))
    assert data_scripts.annotations_digest("own", folder, tmp_path / "cache") != first


def test_a_record_says_what_it_was_measured_on(model, processor, rows):
    config = config_of(rows)
    record = make_record(evaluate_rows(model, processor, config), config, "rela", "after", "tiny")
    assert record["annotations"] == {"rows": annotations_digest(rows), "files": None}
    assert record["kinds"] == kinds_of(record) and sum(record["kinds"].values()) == record["expressions"]
    assert set(record["kinds"]) == {"no-target", "single-target", "multi-target"}
    table = results_table([record, {**record, "stage": "before"}])
    assert table.splitlines()[-1] == measured_on([record])[0] and record["annotations"]["rows"] in table


def made(rows="aa", files=None, samples=2, absent=3, **more):
    counts = {"no-target": absent, "single-target": 4}
    return {
        "dataset": "grefcoco", "split": "val", "protocol": "slots", "convention": "rela", "stage": "after", "metrics": {},
        "samples": samples, "breakdown": {"kind": {kind: {"samples": n, "metrics": {}} for kind, n in counts.items()}},
        "annotations": {"rows": rows, "files": files}, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        (made(), made(), False),
        (made("aa"), made("bb"), True),
        (made("aa", "1"), made("aa", "2"), False),  # the same annotations in other files
        (made(None, "1"), made("bb", "2"), True),
        (made(annotations=None), made(), False),  # of an older version, with equal counts
        (made(annotations=None), made(absent=2), True),
        (made(annotations=None, breakdown=None), made(samples=5), True),
        (made(annotations=None, breakdown=None, samples=None), made(), False),
        (made("aa"), made("bb", split="testA"), False),  # not side by side
    ],
)
def test_what_differs(one, other, differ):
    sentences = differences([("a", one), ("b", other)])
    assert bool(sentences) == differ
    if differ:
        assert "cannot be compared (grefcoco val): a: " in sentences[0] and describe(other) in sentences[0]


def test_the_page_and_the_table_say_that_runs_differ():
    one, other = made("aa"), made("bb", absent=5, stage="before")
    page = report_page([Run("new", [one], {}), Run("old", [other], {})])
    assert (
        "so their numbers cannot be compared (grefcoco val): new: 2 images with 7 expressions (3 no-target, 4" in page
    )
    assert "not measured on the same data" in results_table([one, other])
    alone = report_page([Run("new", [one], {}), Run("same", [made("aa")], {})])
    assert "cannot be compared" not in alone
    assert "Measured on 2 images with 7 expressions (3 no-target, 4 single-target), annotations aa." in alone


def test_the_command_line_says_that_runs_differ(tmp_path, capsys):
    for name, record in (("a", made("aa")), ("b", made("bb"))):
        trees.write(tmp_path / name / "results.json", json.dumps([record]))
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr()
    assert "not measured on the same data" in said.err and said.out.strip() == str(tmp_path / "page.html")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert main([str(tmp_path / "a"), str(tmp_path / "c"), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().err == ""


def test_records_of_older_versions_are_still_shown():
    old = {key: value for key, value in made().items() if key not in ("annotations", "breakdown")}
    assert measured_on([old]) == [] and "cannot be compared" not in report_page([Run("old", [old], {})])
