"""The report page: its facts and images, no need of a network, and the runs that it refuses."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from evaluation.exhibits import choose_exhibits
from evaluation.pages import report_page
from evaluation.published import PUBLISHED, published
from evaluation.report import main, read_run
from metrics.gres import read_rows

PROTOCOLS = ["teacher_forced", "slots", "generate"]


@pytest.fixture(scope="module")
def run_dir(model, processor, tmp_path_factory):
    """A real evaluation of the tiny model by the command line, every protocol and convention."""
    import run_gres

    directory = tmp_path_factory.mktemp("run")
    model.save_pretrained(directory / "model")
    processor.save_pretrained(directory / "model")
    words = ["--model", str(directory / "model"), "--do_eval", "--output_dir", str(directory / "a"), "--use_cpu"]
    words += ["--max_eval_samples", "5", "--per_device_eval_batch_size", "2", "--dataset_options", '{"size": 6}']
    words += [
        "--protocols",
        *PROTOCOLS,
        "--conventions",
        "rela",
        "gsva",
        "--max_new_tokens",
        "8",
        "--report_to",
        "none",
    ]
    assert run_gres.main(words) == 0
    return directory / "a"


@pytest.fixture(scope="module")
def page(run_dir):
    return (run_dir / "report.html").read_text()


def test_the_run_directory(run_dir):
    records = json.loads((run_dir / "results.json").read_text())
    assert [(r["protocol"], r["convention"]) for r in records] == [(p, c) for p in PROTOCOLS for c in ("rela", "gsva")]
    for record in records:
        rows = read_rows(run_dir / record["rows"])
        assert len(rows) == record["expressions"] and {row["stage"] for row in rows} == {"as loaded"}
        assert record["intervals"]["level"] == 0.95 and record["breakdown"]["kind"] and "curve" in record
    assert not list(run_dir.glob("*.part*")) and not list(run_dir.glob(".*"))
    assert len(list(run_dir.glob("pictures_*.html"))) == 3


def test_the_page_stands_alone(page):
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not re.search(r"(src|href)\s*=\s*['\"]?(?!data:)[\w/.]|@import|url\(|fetch\(|https?://", page)
    assert page.count("<script>") == 1


def test_every_number_is_there_with_its_protocol_and_convention(page, run_dir):
    for record in json.loads((run_dir / "results.json").read_text()):
        for key in ("gIoU", "cIoU", "N_acc", "T_acc"):
            assert f"{record['metrics'][key]:.4f}" in page
        low, high = record["intervals"]["gIoU"]
        assert f"{low:.4f}–{high:.4f}" in page
    for word in (*PROTOCOLS, "rela", "gsva", "gold answers were in the model&#39;s input", "no-target", "per prompt"):
        assert word in page
    assert "balancing threshold" in page and "data:image/png;base64," in page


def test_the_pictures_are_pictures(page, run_dir):
    shown = re.findall(
        r'<figure data-run="([^"]+)" data-group="([^"]+)" data-kind="([^"]+)"><img alt="" src="data:image/jpeg;base64,([^"]+)"',
        page,
    )
    kept = [entry for file in run_dir.glob("rows_*.pictures.json") for entry in json.loads(file.read_text())]
    assert len(shown) == len(kept) > 3
    assert {kind for *_, kind, _ in shown} == {entry["kind"] for entry in kept}
    for picture in {picture for *_, picture in shown}:
        assert max(Image.open(io.BytesIO(base64.b64decode(picture))).size) == 256
    for name in ("run", "group", "kind"):  # filters
        assert f"<select name={name}>" in page


def test_published_numbers_stand_beside_ours_on_their_split_only(run_dir):
    run = read_run(run_dir)
    assert "published</td>" not in report_page([run]) and len(PUBLISHED) == 6
    for record in run.records:
        record["dataset"], record["split"] = "grefcoco", "testA"
    page = report_page([run])
    assert page.count("<tr class=published>") == 2 and "LeapLabTHU/GSVA" in page
    for metrics in (r["metrics"] for r in published("grefcoco", "testA")):
        assert all(f"{value:.4f}" in page for value in metrics.values())
    assert published("refcoco", "testA") == [] and published("grefcoco", "train") == []


def test_several_runs_side_by_side(run_dir, tmp_path, capsys):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    output = tmp_path / "both.html"
    assert main([str(run_dir), str(other), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    page = output.read_text()
    table = page[page.index("<table>") : page.index("</table>")]
    assert table.count("<td>a</td>") == table.count("<td>other</td>") == 6
    assert page.count("<h2>") == 2  # one split, and the pictures
    assert main([str(run_dir), str(run_dir)]) == 1
    assert "given twice" in capsys.readouterr().err


def test_a_metric_that_is_not_defined(run_dir):
    run = read_run(run_dir)
    for record in run.records:
        record["metrics"]["N_acc"] = None
        record["notes"]["N_acc"] = "not defined here: no no-target expressions"
    page = report_page([run])
    assert (
        page.count('<span class=none title="not defined here: no no-target expressions">not defined here</span>') == 6
    )


def test_thresholds_and_dtypes_have_columns_where_they_are_not_the_usual_ones(run_dir, page):
    assert "<th>threshold</th>" not in page and "<th>dtype</th>" not in page
    run = read_run(run_dir)
    for record in run.records:
        record["dataset"], record["split"], record["dtype"] = "grefcoco", "testA", "bfloat16"
        if record["protocol"] == "slots":
            record["threshold"] = 25.0
    page = report_page([run])
    table = page[page.index("<table>") : page.index("</table>")]
    assert "<th>threshold</th><th>dtype</th><th>convention</th>" in table
    assert table.count("<td>25</td><td>bfloat16</td>") == 2 and table.count("<td></td><td>bfloat16</td>") == 4
    assert "a, as loaded, slots, all expressions in one, threshold 25: numbers" in page
    assert "N-acc" not in page and "the curve: " in page


@pytest.mark.parametrize("damage", ["results", "no list", "rows", "mixed", "numbers", "path", "pictures"])
def test_a_run_that_does_not_fit_is_refused(run_dir, tmp_path, capsys, damage):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    records = json.loads((other / "results.json").read_text())
    rows, slots = (other / next(r["rows"] for r in records if r["protocol"] == p) for p in ("teacher_forced", "slots"))
    if damage == "results":
        (other / "results.json").unlink()
        said = "results.json does not exist"
    elif damage == "no list":
        (other / "results.json").write_text('{"gIoU": 1}')
        said = "no list of records"
    elif damage == "rows":
        shutil.copy(slots, rows)
        said = "protocol 'slots', not 'teacher_forced'"
    elif damage == "mixed":
        rows.write_text(rows.read_text() + slots.read_text())
        said = "these rows do not belong together: protocol is"
    elif damage == "numbers":
        rows.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[:-3]))
        said = "does not belong to the record of teacher_forced"
    elif damage == "pictures":
        rows.with_suffix(".pictures.json").write_text("[{")
        said = ".pictures.json is no JSON"
    else:
        records[0]["rows"] = "../a/rows.jsonl"
        (other / "results.json").write_text(json.dumps(records))
        said = "must lie beside"
    assert main([str(other)]) == 1
    assert said in capsys.readouterr().err


def row_of(kind, rejected, score, iou=0.0):
    return {
        "is_no_target": kind == 0, "num_targets": kind, "is_rejected": rejected, "score": score,
        "intersection": round(iou * 100), "union": 100,
    }  # fmt: skip


def test_which_rows_are_worth_looking_at():
    pictures = [
        [row_of(0, False, 2.0), row_of(0, False, 5.0), row_of(0, True, -9.0)],
        [row_of(1, True, -1.0), row_of(1, True, -7.0), row_of(1, True, None), row_of(2, True, -3.0)],
        [row_of(1, False, 1.0, 0.9), row_of(1, False, 1.0, 0.2), row_of(2, False, 1.0, 0.5)],
    ]
    assert choose_exhibits(pictures, each=2) == [
        ("worst false rejections", 1, 3),
        ("worst false rejections", 1, 1),
        ("worst false rejections", 1, 0),
        ("worst missed rejections", 0, 1),
        ("worst missed rejections", 0, 0),
        ("worst masks", 2, 2),
        ("worst masks", 2, 1),
        ("worst masks", 2, 0),
        ("best masks", 2, 2),
        ("best masks", 2, 0),
        ("best masks", 2, 1),
    ]
