"""
Masks of the embedded models, as a pushed directory gives them in a process that knows nothing of the project:

    python tests/tools/pushed_masks.py save FOLDER             # what push_to_hub uploads, and the pictures that are asked about
    python -I tests/tools/pushed_masks.py ask FOLDER           # load it with trust_remote_code, and print the answers as JSON
    python tests/tools/pushed_masks.py record                  # write tests/fixtures/pushed_masks.json anew

`save` and `ask` may run with different versions of transformers (tests/test_pushed_masks.py; `make matrix` runs that at both ends).
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("tiny_gsva", "tiny_gsva_today", "tiny_gsva_gres")
RECORD = ROOT / "tests" / "fixtures" / "pushed_masks.json"
PICTURES = (3, 8)  # of the split "test", which no model has seen


def save(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from data_scripts import shapes
    from data_scripts.images import read_image
    from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor

    asked = {}
    for number in PICTURES:
        row = shapes.make_row(0, "test", number)
        read_image(row["image"]).save(folder / f"{number}.png")
        asked[number] = [entry["text"] for entry in row["expressions"]]
    (folder / "asked.json").write_text(json.dumps(asked))
    for name in MODELS:
        GsvaForConditionalGeneration.from_pretrained(ROOT / "assets" / name).save_pretrained(folder / name)
        GsvaProcessor.from_pretrained(ROOT / "assets" / name).save_pretrained(folder / name)


def ask(folder: Path) -> dict:
    """Return for each model and each expression: the score, whether it is rejected, and the mask's run lengths, row by row."""
    import numpy as np
    import torch
    import transformers
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    asked = json.loads((folder / "asked.json").read_text())
    pictures = [Image.open(folder / f"{number}.png") for number in asked]
    answers = {}
    for name in MODELS:
        processor = AutoProcessor.from_pretrained(folder / name, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(folder / name, dtype="float32", trust_remote_code=True)
        inputs = processor(images=pictures, expressions=list(asked.values()), return_tensors="pt")
        results = processor.post_process_segmentation(model.segment(**inputs), inputs)
        answers[name] = [
            {"expression": result["text"], "score": round(float(result["score"]), 4),
             "rejected": bool(result["is_rejected"]),
             "runs": np.diff(np.flatnonzero(np.diff(np.pad(result["mask"].ravel(), 1))), prepend=0).tolist()}
            for of_picture in results for result in of_picture
        ]  # fmt: skip
    of_project = "modeling_gsva" in sys.modules  # an editable installation would offer it
    return {"transformers": transformers.__version__, "of_project": of_project, "models": answers}


def record() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        command = [sys.executable, "-I", __file__, "ask", folder]
        answers = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=folder).stdout)
    RECORD.write_text(
        re.sub(r"\n {3,}", " ", json.dumps(answers["models"], indent=1)) + "\n"
    )  # a line for each expression


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "ask":
        print(json.dumps(ask(Path(*rest))))
    else:
        {"save": save, "record": record}[what](*map(Path, rest))
