"""Measure start-up, memory and mask decoding with a tree of gRefCOCO's size, compared with pycocotools and the original.

    python -m benchmarks data_scale WORK_DIR [--variant A|B] [--json FILE]

The benchmark writes a synthetic tree to WORK_DIR: 20k images, which are links to one JPEG, and 146k annotations of about 60
points, 1.2 % of them crowds. Variant A has 60,287 refs with 278,232 sentences, variant B 259,859 refs of one sentence each. It
then measures in fresh processes: the first start, which builds the rows; a second start, up to the first training example; the
private memory of that process beyond its imports; and the masks decoded per second on one core.

The original with such a tree (DATA_SPEC section 12, two cores shared with other work) takes 24-27 s (A) and 258-275 s (B) at
every start and 1.2-1.4 GB per process, and decodes 300-500 masks per second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SPLITS = {"train": 16994, "val": 1500, "testA": 750, "testB": 750}
ANNOTATIONS, CROWDS, NO_TARGET, MULTI_TARGET = 146_000, 0.012, 0.116, 0.288
HEIGHT, WIDTH = 480, 640
VARIANTS = {"A": (60_287, 278_232), "B": (259_859, 259_859)}  # refs, sentences
WORDS = [
    "man",
    "woman",
    "dog",
    "left",
    "right",
    "red",
    "blue",
    "second",
    "standing",
    "holding",
    "the",
    "with",
    "a",
    "on",
    "of",
    "near",
    "table",
    "bus",
    "cat",
    "white",
]


def _polygon(draw: random.Random) -> list[float]:
    """Return an outline of about 60 points around a random centre."""
    cx, cy, size = draw.uniform(80, 560), draw.uniform(60, 420), draw.uniform(15, 110)
    points, radius = [], size
    count = draw.randint(40, 80)
    for i in range(count):
        radius = min(max(radius + draw.uniform(-0.1, 0.1) * size, 0.5 * size), 1.3 * size)
        angle = 2 * math.pi * i / count
        points.append(round(min(max(cx + radius * math.cos(angle), 0), WIDTH), 2))
        points.append(round(min(max(cy + radius * math.sin(angle), 0), HEIGHT), 2))
    return points


def _crowd(draw: random.Random) -> dict:
    counts, left = [], HEIGHT * WIDTH
    while left:
        counts.append(min(draw.randint(20, 900), left))
        left -= counts[-1]
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def write_tree(folder: Path, variant: str, seed: int = 0) -> None:
    """Write the tree to `folder`, in gRefCOCO's published layout."""
    from PIL import Image

    draw = random.Random(seed)
    num_refs, num_sentences = VARIANTS[variant]
    image_folder = folder / "refer_seg/images/mscoco/images/train2014"
    target = folder / "refer_seg/grefcoco"
    image_folder.mkdir(parents=True)
    target.mkdir(parents=True)
    noise = Image.effect_noise((WIDTH // 8, HEIGHT // 8), 90).resize((WIDTH, HEIGHT))
    noise.convert("RGB").save(folder / "picture.jpg", quality=90)
    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    images, annotations, of_image = [], [], {}
    for number in range(len(splits)):
        name = f"COCO_train2014_{number:012d}.jpg"
        os.link(folder / "picture.jpg", image_folder / name)
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        of_image[number] = []
    for number in range(ANNOTATIONS):
        image = number % len(images)
        crowd = draw.random() < CROWDS
        segmentation = _crowd(draw) if crowd else [_polygon(draw)]
        category = 1 if draw.random() < 0.4 else draw.randint(2, 90)
        annotations.append({"id": number + 1, "image_id": image, "category_id": category, "iscrowd": int(crowd),
                            "segmentation": segmentation, "bbox": [0, 0, 1, 1], "area": 1.0})  # fmt: skip
        of_image[image].append(number + 1)
    refs, sentence_id = [], 0
    for number in range(num_refs):
        image = number % len(images)
        kind = draw.random()
        count = 0 if kind < NO_TARGET else draw.randint(2, 4) if kind < NO_TARGET + MULTI_TARGET else 1
        chosen = draw.sample(of_image[image], min(count, len(of_image[image]))) or [-1]
        share = (num_sentences * (number + 1)) // num_refs - (num_sentences * number) // num_refs
        sentences = []
        for _ in range(share):
            text = " ".join(draw.choices(WORDS, k=draw.randint(2, 7)))
            sentences.append({"sent": text, "raw": text, "sent_id": sentence_id, "tokens": text.split()})
            sentence_id += 1
        refs.append({"ref_id": number, "ann_id": chosen, "image_id": image, "split": splits[image],
                     "category_id": [1], "sentences": sentences, "file_name": images[image]["file_name"],
                     "sent_ids": [one["sent_id"] for one in sentences]})  # fmt: skip
    (target / "grefs(unc).json").write_text(json.dumps(refs))
    (target / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]})
    )


def _private_megabytes() -> float:
    """Return the private memory of this process in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def start(folder: Path, cache_dir: Path) -> dict[str, float]:
    """Measure the start of a process after its imports, up to the first training example."""
    import data_scripts.referring  # so that it is imported before the measurement begins
    from data_scripts.mixture import TrainingDataset
    from data_scripts.transforms import ReferringTransform

    before, wall, cpu = _private_megabytes(), time.perf_counter(), time.process_time()
    rows = data_scripts.load("grefcoco", folder, "train", str(cache_dir))
    dataset = TrainingDataset(rows, ReferringTransform(), seed=0)
    dataset[0]
    figures = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    figures["private_mb_beyond_imports"] = _private_megabytes() - before
    order = random.Random(0).sample(range(len(dataset)), 300)
    wall = time.perf_counter()
    for i in order:
        dataset[i]
    figures["examples_per_second"] = len(order) / (time.perf_counter() - wall)
    figures["private_mb_after_300_examples"] = _private_megabytes() - before
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    figures["peak_rss_mb"] = int(status["VmHWM"].split()[0]) / 1024
    return figures


def decode(folder: Path, cache_dir: Path, num_images: int = 150) -> dict[str, float]:
    """Measure how fast the masks of 150 images are decoded: from rows, by pycocotools alone, and in the original's way."""
    import numpy as np
    from pycocotools import mask as coco_mask

    import data_scripts
    from data_scripts.schema import decode_mask

    rows = data_scripts.load("grefcoco", folder, "val", str(cache_dir)).remove_columns("image")
    content = json.loads((folder / "refer_seg/grefcoco/instances.json").read_text())
    segmentations = {annotation["id"]: annotation["segmentation"] for annotation in content["annotations"]}
    by_image: dict[int, list[list[int]]] = {}
    for ref in json.loads((folder / "refer_seg/grefcoco/grefs(unc).json").read_text()):
        if ref["split"] == "val":
            by_image.setdefault(ref["image_id"], []).extend([ref["ann_id"]] * len(ref["sentences"]))

    def ours() -> int:
        return sum(len([decode_mask(entry["mask"]) for entry in rows[i]["expressions"]]) for i in range(num_images))

    encodings = [entry["mask"] for i in range(num_images) for entry in rows[i]["expressions"]]

    def theirs() -> int:
        return sum(coco_mask.decode(encoding).ndim > 0 for encoding in encodings)

    ids_of_sentences = [ids for image in sorted(by_image)[:num_images] for ids in by_image[image]]

    def original() -> int:
        for ids in ids_of_sentences:
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            for number in ids:
                if number != -1:
                    encoded = coco_mask.frPyObjects(segmentations[number], HEIGHT, WIDTH)
                    decoded = coco_mask.decode(encoded)
                    mask |= (decoded.sum(axis=2) if decoded.ndim == 3 else decoded).astype(np.uint8) > 0
        return len(ids_of_sentences)

    rates = {}
    for name, action in (("ours", ours), ("pycocotools_decode", theirs), ("as_the_original", original)):
        best = 0.0
        for _ in range(3):
            began = time.process_time()
            count = action()
            best = max(best, count / (time.process_time() - began))
        rates[f"masks_per_cpu_second_{name}"] = best
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks data_scale", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("work_dir", metavar="WORK_DIR", type=Path, help="folder for the tree and its cache")
    parser.add_argument("--variant", choices=VARIANTS, default="A", help="size of the tree (default: A)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--step", choices=["start", "decode"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder, cache_dir = arguments.work_dir / arguments.variant, arguments.work_dir / f"cache_{arguments.variant}"
    if arguments.step:
        import datasets

        datasets.disable_progress_bars()
        print(json.dumps({"start": start, "decode": decode}[arguments.step](folder, cache_dir)))
        return
    if not folder.exists():
        print(f"Writing {folder} ...", file=sys.stderr)
        write_tree(folder, arguments.variant)

    def run(step: str) -> dict[str, float]:
        command = [sys.executable, __file__, str(arguments.work_dir), "--variant", arguments.variant, "--step", step]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {key: round(value, 2) for key, value in json.loads(output.splitlines()[-1]).items()}

    figures = {"variant": arguments.variant, "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    figures["first_start"] = "was built before" if cache_dir.exists() else run("start")
    figures["second_start"] = run("start")
    figures["decode"] = run("decode")
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
