"""The page of the web demo, made with gradio."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from data_scripts import shapes
from data_scripts.transforms import read_image
from evaluation.pages import tiles_html
from evaluation.tiles import all_masks, make_tiles

from .session import Assistant, Session, as_json, decide, write_archive

MAX_FILE_SIZE = "20mb"
MAX_QUEUE = 32  # visitors that wait; others are told that the demo is busy
SESSION_SECONDS = 3600  # after which the image of a visitor is forgotten
EXAMPLES = (3, 12, 29)  # images of the test split of *shapes*
HELP = (
    "Drop an image and write what to look for, one expression on each line. Each expression gets a mask, or is rejected "
    "because it is not there. The slider decides anew at once, without the model."
)


def build(assistant: Assistant, examples: Path) -> gr.Blocks:
    """Return the page.

    Args:
        assistant: The model.
        examples: A folder that the example images are drawn into.
    """
    with gr.Blocks(title="GSVA", delete_cache=(SESSION_SECONDS, SESSION_SECONDS)) as page:
        session = gr.State(None, time_to_live=SESSION_SECONDS)
        gr.Markdown(f"# GSVA\n{HELP}")
        with gr.Row():
            with gr.Column(scale=1):
                image = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", elem_id="image")
                image.preprocess = _path_of  # the processor reads the file: gradio says only "Error" of a broken one
                expressions = gr.Textbox(label="Expressions, one on each line", lines=4, elem_id="expressions")
                segment = gr.Button("Segment", variant="primary", elem_id="segment")
                question = gr.Textbox(label="Or a question in your own words", elem_id="question")
                ask = gr.Button("Ask", elem_id="ask")
                threshold = gr.Slider(
                    0,
                    1,
                    assistant.probability_threshold,
                    step=0.01,
                    label="Reject below this probability",
                    elem_id="threshold",
                )
            with gr.Column(scale=2):
                status = gr.Markdown("", elem_id="status")
                tiles = gr.HTML("", elem_id="tiles")
                download = gr.DownloadButton(
                    "Download masks (PNG and COCO JSON)", interactive=False, elem_id="download"
                )
        shown = [session, status, tiles, download]
        listed = {
            "fn": _answer(assistant, Assistant.ask, str.splitlines),
            "inputs": [session, image, expressions, threshold],
        }
        asked = {"fn": _answer(assistant, Assistant.ask_freely, str), "inputs": [session, image, question, threshold]}
        for events, what in (((segment.click,), listed), ((ask.click, question.submit), asked)):
            for event in events:
                event(**what, outputs=shown, api_visibility="private")
        threshold.change(
            _show, [session, threshold], [status, tiles, download], api_visibility="private", show_progress="hidden"
        )
        image.change(lambda: (None, "", "", None), None, shown, api_visibility="private")
        gr.Examples(_examples(examples), [image, expressions])
        gr.api(_api(assistant), api_name="segment")
    return page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)


def _path_of(payload: Any) -> str | None:
    return payload.path if payload is not None else None


def _answer(assistant: Assistant, ask: Callable[..., None], read: Callable[[str], Any]) -> Callable[..., tuple]:
    """Return the function of a button: ask about the image, which is opened first where it is new."""

    def answer(session: Session | None, path: str | None, text: str, probability: float):
        try:
            if path is None:
                raise ValueError("There is no image; drop one, or take an example.")
            if session is None:
                session = assistant.open(path)
            ask(assistant, session, read(text or ""))
        except ValueError as error:
            return session, f"**Error:** {_plain(str(error))}", "", gr.update(value=None, interactive=False)
        return session, *_show(session, probability)

    return answer


def _show(session: Session | None, probability: float) -> tuple:
    """Return status, tiles and download of a session's results, decided by the slider."""
    if session is None or not (session.results or session.answer):
        return "", "", gr.update(value=None, interactive=False)
    results = decide(session.results, probability)
    kept = sum(not result["is_rejected"] for result in results)
    words = f"{kept} of {len(results)} expressions are there." if results else "The answer names nothing to segment."
    if session.answer:
        words = f"{_plain(session.answer)}\n\n{words}"
    tiles = [*([all_masks(session.image, results)] if kept > 1 else []), *make_tiles(session.image, results)]
    folder = Path(tempfile.mkdtemp(prefix="gsva-demo-"))
    write_archive(session.image, results, folder / "masks.zip")
    return words, tiles_html(tiles), gr.update(value=str(folder / "masks.zip"), interactive=True)


def _plain(text: str) -> str:
    """Return a text for Markdown in which nothing is markup."""
    return "".join(f"&#{ord(character)};" if character in "<>&*_`[]#|\\$~" else character for character in text)


def _examples(folder: Path) -> list[list[str]]:
    """Draw the example images, and return them with their expressions."""
    examples = []
    for number in EXAMPLES:
        row = shapes.make_row(0, "test", number)
        path = folder / f"shapes_{number}.png"
        read_image(row["image"]).save(path)
        examples.append([str(path), "\n".join(entry["text"] for entry in row["expressions"])])
    return examples


def _api(assistant: Assistant) -> Callable[..., list[dict]]:
    def segment(image: dict, expressions: list[str], probability: float | None = None) -> list[dict]:
        """Segment expressions in an image.

        Args:
            image: A file as gradio's clients upload it: `handle_file(path or URL)`.
            expressions: What to look for.
            probability: Reject what is less probable; by default the model's own threshold.

        Returns:
            For each expression its text, `is_rejected`, score, probability, area and mask as COCO run lengths.
        """
        try:
            session = assistant.open(_uploaded(image))
            assistant.ask(session, expressions)
        except ValueError as error:
            raise gr.Error(str(error)) from None
        limit = assistant.probability_threshold if probability is None else probability
        return as_json(decide(session.results, limit))

    return segment


def _uploaded(image: Any) -> str:
    """Return the path of an uploaded file. Raises ValueError for any other: clients may not name files of this machine."""
    path = image.get("path") if isinstance(image, dict) else None
    folder = Path(get_upload_folder()).resolve()
    if not isinstance(path, str) or folder not in Path(path).resolve().parents:
        raise ValueError(
            "image is no uploaded file; pass handle_file(path or URL) of gradio_client, or upload it first."
        )
    return path


def launch_options() -> dict[str, Any]:
    """Return the options of `launch` that limit what visitors can send."""
    return {"max_file_size": MAX_FILE_SIZE, "show_error": True, "ssr_mode": False}
