"""Every page that the project writes fits a phone: no page is wider than its window, what is wider scrolls in itself."""

import json

import pytest
import torch
from browsers import chromium, in_browser
from paths import ROOT

import run_gres
from benchmarks import gpu
from benchmarks._gpu_report import Figure
from data_scripts import negatives
from data_scripts.files import render
from evaluation import calibrate

WIDTH = 360
SCREENSHOTS = ROOT / "runs" / "screenshots"
LONG = "the_expression_without_a_blank_" * 8
TEMPLATES = [
    path for path in ROOT.glob("*/templates/*.html.jinja") if path.name not in ("page.html.jinja", "tiles.html.jinja")
]
# Whether the page is wider than its window, and the boxes that begin in the window and end right of it, but scroll nowhere.
TOO_WIDE = """
const wide = [...document.body.querySelectorAll('*')].filter(one => {
  for (let box = one; box; box = box.parentElement) if (getComputedStyle(box).overflowX == 'auto') return false;
  return one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5;
});
return [document.documentElement.clientWidth, document.scrollingElement.scrollWidth, wide.map(one => one.outerHTML.slice(0, 80))]
"""


@pytest.fixture(scope="module")
def pages(model_dir, tmp_path_factory):
    """The pages of an evaluation, of image files, of a calibration, of drawn absent expressions and of figures, with long texts."""
    folder = tmp_path_factory.mktemp("pages")
    images = folder / "a_long_name_of_a_folder"
    options = json.dumps({"size": 12, "cache_dir": str(folder / "cache")})
    words = ["--model", str(model_dir), "--use_cpu", "--report_to", "none", "--dataset_options", options]
    protocols = ["--protocols", "slots", "teacher_forced", "--conventions", "rela", "gsva"]
    assert run_gres.main([*words, "--do_eval", *protocols, "--output_dir", str(images)]) == 0
    picture = folder / f"{LONG[:120]}.png"
    from data_scripts import load

    load("shapes", split="test", size=1, cache_dir=str(folder / "cache"))[0]["image"].save(picture)
    asked = ["--image", str(picture), "--expressions", LONG, "all stars"]
    assert run_gres.main([*words, "--do_predict", *asked, "--output_dir", str(folder / "predicted")]) == 0
    rows = images / "rows_as_loaded_slots_shapes_validation.jsonl"
    assert calibrate.main([str(rows), "--balance"]) == 0
    assert (
        negatives.main(["shapes", "--dataset_options", options, "--out", str(folder / "n.jsonl"), "--drop_no_targets"])
        == 0
    )
    figures = [Figure(LONG, 1234.5, "ms per image"), Figure("short", None, "", LONG)]
    gpu.run(["mask_decoder"], torch.device("cpu"), 9, folder, lambda *of: iter(figures * 11), lambda words: None)
    found = sorted(folder.rglob("*.html"))
    assert {path.stem.split("_")[0] for path in found} == {
        "report",
        "pictures",
        "predictions",
        "calibration",
        "n",
        "gpu",
    }
    return found


def test_every_page_has_the_same_frame():
    assert len(TEMPLATES) == 5
    for path in TEMPLATES:
        text = path.read_text()
        assert text.startswith('{% extends "page.html.jinja" %}') and "</html>" not in text, path
        assert text.count("<table>") == text.count("<div class=wide><table>"), path


@in_browser
def test_no_page_is_wider_than_a_phone(pages, tmp_path):
    (tmp_path / "bad.html").write_text(
        render(ROOT / "data_scripts/templates/page.html.jinja", title="A page without a wrapper").replace(
            "</html>", f"<table><tr>{'<td>number</td>' * 20}</tr></table></html>"
        )
    )
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with chromium(tmp_path / "profile") as browser:
        measure = {"width": WIDTH, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", measure)

        def look_at(path):
            browser.get(path.as_uri())
            # everything that can be opened is opened
            browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
            browser.save_screenshot(str(SCREENSHOTS / f"phone_{path.stem}.png"))
            return browser.execute_script(TOO_WIDE)

        _, width, wide = look_at(tmp_path / "bad.html")
        assert width > WIDTH and wide  # the test sees what it looks for
        for path in pages:
            assert look_at(path) == [WIDTH, WIDTH, []], path.name
