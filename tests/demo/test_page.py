"""The web demo in a real browser: upload, ask, slide, a second turn, a bad file, markup in an expression; and its API."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from browsers import chromium, in_browser
from documents import blocks
from paths import ROOT
from pycocotools import mask as rle

pytest.importorskip("gradio", reason="the web demo needs gradio: pip install '.[demo]'")
SCREENSHOTS = ROOT / "runs" / "screenshots"
SCRIPT = '<script>document.title="broken"</script><img src=x onerror=\'document.title="broken"\'>'


@pytest.fixture(scope="module")
def address(tmp_path_factory, model_dir):
    """The address of a running demo of a model with random weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("demo") / "log"
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }  # fmt: skip
    command = [sys.executable, "-m", "demo", "--model", str(model_dir), "--port", str(port)]
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(f"the demo did not start in 300 s: {log.read_text()}")
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from data_scripts import shapes
    from data_scripts.transforms import read_image

    path = tmp_path_factory.mktemp("pictures") / "shapes.png"
    read_image(shapes.make_row(0, "test", 12)["image"]).save(path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


class Page:
    """The page as a visitor sees it."""

    def __init__(self, browser, address: str):
        self.browser = browser
        browser.get(address)
        self.wait(lambda: self.find("#segment"))

    def find(self, selector: str):
        found = self.browser.find_elements("css selector", selector)
        return found[0] if found else None

    def wait(self, condition, seconds: float = 60):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, seconds).until(lambda _: condition())

    def upload(self, path) -> None:
        self.find("#image input[type=file]").send_keys(str(path))
        self.wait(lambda: self.find("#image img") or "rror" in self.browser.page_source)

    def write(self, where: str, text: str) -> None:
        box = self.find(f"#{where} textarea")
        box.clear()
        box.send_keys(text)

    def press(self, what: str) -> None:
        before = self.status
        self.find(f"#{what}").click()
        self.wait(lambda: self.status and (self.status != before or before == ""))

    @property
    def status(self) -> str:
        return self.find("#status").text.strip()

    @property
    def tiles(self) -> list[str]:
        return [one.text for one in self.browser.find_elements("css selector", "#tiles figure")]

    @property
    def rejected(self) -> int:
        return len(self.browser.find_elements("css selector", "#tiles figure.rejected"))

    def slide(self, to: str) -> None:
        """Move the slider to its "END" (1.0) or "HOME" (0.0)."""
        from selenium.webdriver.common.keys import Keys

        self.find("#threshold input[type=range]").send_keys(getattr(Keys, to))

    def keep(self, name: str) -> None:
        self.browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


@in_browser
def test_upload_ask_slide_and_ask_again(browser, address, picture):
    page = Page(browser, address)
    page.keep("1_start")
    page.upload(picture)
    page.write("expressions", f"the blue circle\nall triangles\n{SCRIPT}")
    page.press("segment")
    assert page.status.endswith("of 3 expressions are there.")
    page.slide("HOME")
    page.wait(lambda: page.status == "3 of 3 expressions are there.")
    page.wait(lambda: len(page.tiles) == 4)  # and all masks in one
    assert "the blue circle" in page.tiles[1] and "probability" in page.tiles[1]
    assert SCRIPT.replace("'", "") in page.tiles[3].replace("'", "") and browser.title == "GSVA"
    page.keep("2_segmented")
    page.slide("END")
    page.wait(lambda: page.status == "0 of 3 expressions are there.")
    page.wait(lambda: page.rejected == 3)
    page.keep("3_slid")
    page.slide("HOME")
    page.wait(lambda: page.rejected == 0 and page.tiles)
    page.write("expressions", "the yellow triangle")
    page.find("#segment").click()
    page.wait(lambda: page.status == "1 of 1 expressions are there.")
    page.write("question", "what is there from left to right?")
    page.find("#ask").click()
    page.wait(lambda: "of 1 expressions" not in page.status and page.status)
    page.keep("4_asked")


@in_browser
def test_errors_are_words_in_the_page(browser, address, picture, tmp_path):
    page = Page(browser, address)
    page.find("#segment").click()
    page.wait(lambda: "There is no image" in page.status)
    page = Page(browser, address)
    (tmp_path / "bad.png").write_bytes(b"no image")
    page.upload(tmp_path / "bad.png")
    page.write("expressions", "a dog")
    page.find("#segment").click()
    page.wait(lambda: "cannot be read as an image" in page.status)
    page.keep("5_bad_file")
    page = Page(browser, address)
    page.upload(picture)
    page.write("expressions", "the [SEG]")
    page.find("#segment").click()
    page.wait(lambda: "special token" in page.status)
    page.keep("6_refused")


def test_the_api_segments_uploaded_files_and_no_others(address, picture):
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False)
    results = client.predict(handle_file(str(picture)), ["the blue circle", "all triangles"], 0.0, api_name="/segment")
    assert [one["text"] for one in results] == ["the blue circle", "all triangles"]
    assert rle.decode(results[0]["mask"]).shape == (128, 128) and results[0]["area"] > 0
    assert np.isfinite(results[0]["score"])
    (rejected,) = client.predict(handle_file(str(picture)), ["the blue circle"], 1.0, api_name="/segment")
    assert rejected["is_rejected"] and rejected["area"] == 0
    with pytest.raises(Exception, match="no uploaded file"):
        client.predict({"path": str(picture)}, ["a dog"], api_name="/segment")
    with pytest.raises(Exception, match="There is no expression"):
        client.predict(handle_file(str(picture)), [], api_name="/segment")


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_calls_of_the_readme_give_the_same_answer(address, picture, monkeypatch):
    calls = [block for block in blocks(ROOT / "demo/README.md") if "127.0.0.1:7860" in block.text]
    _, in_python, by_curl = (block.text.replace("http://127.0.0.1:7860", address) for block in calls)
    monkeypatch.chdir(picture.parent)  # which holds shapes.png
    namespace: dict = {}
    exec(in_python, namespace)  # noqa: S102
    results = namespace["results"]
    assert [one["text"] for one in results] == ["the red circle", "all stars"]
    said = subprocess.run(["bash", "-ec", by_curl], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.startswith("event: complete\ndata: ")
    assert json.loads(said.partition("data: ")[2]) == [results]
    (documented,) = re.findall(r"Each result is `(.*?)`", (ROOT / "demo/README.md").read_text())
    assert set(re.findall(r"\w+", documented)) == set(results[0])
