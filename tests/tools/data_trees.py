"""Small trees of data sets for tests, in their published layouts."""

import json
import pickle
from pathlib import Path

import numpy as np
from paths import FIXTURES
from PIL import Image

from data_scripts.masks import mask_area

MINI = FIXTURES / "golden_data" / "mini"
HEIGHT, WIDTH = 30, 40
SQUARE = [5, 5, 15, 5, 15, 15, 5, 15]  # 10 x 10 pixels


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def picture(path: Path, size=(WIDTH, HEIGHT), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(size).convert("RGB").save(path, **options)
    return path


def label_map(path: Path, values) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


def ref(number=0, ann_id=1, image_id=1, split="train", texts=("a cat",)):
    return {
        "ref_id": number,
        "ann_id": ann_id,
        "image_id": image_id,
        "split": split,
        "category_id": 1,
        "sentences": [
            {"sent": text, "sent_id": i, "tokens": text.split(), "raw": text} for i, text in enumerate(texts)
        ],
        "file_name": f"COCO_train2014_{image_id:012d}_{number}.jpg",
    }


def referring(root: Path, name: str, refs, segmentations=None, images=(1,), pictures=True) -> Path:
    """A referring set; `segmentations` is annotation id -> segmentation, on the picture of the first ref that names it."""
    segmentations = {1: [SQUARE]} if segmentations is None else segmentations
    folder = root / "refer_seg" / name
    records = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in images]
    named = {
        number: one["image_id"]
        for one in reversed(refs)
        for number in (one["ann_id"] if isinstance(one["ann_id"], list) else [one["ann_id"]])
    }
    annotations = [
        {"id": i, "image_id": named.get(i, images[0]), "category_id": 1, "segmentation": segmentation, "iscrowd": 0}
        for i, segmentation in segmentations.items()
    ]
    write(folder / "instances.json", {"images": records, "annotations": annotations, "categories": []})
    if name == "grefcoco":
        write(folder / "grefs(unc).json", refs)
    else:
        file = {"refcocog": "refs(umd).p", "refzom": "Ref_ZOM.p"}.get(name, "refs(unc).p")
        write(folder / file, pickle.dumps(refs, protocol=0))
    place = "saiapr_tc-12" if name == "refclef" else "mscoco/images/train2014"
    for i in images if pictures else ():
        picture(root / "refer_seg/images" / place / f"{i}.jpg")
    return root


def absence(root: Path, folder: str, refs_file: str, sentences, split="val") -> Path:
    """A set over RefCOCO whose sentences say whether they are there: one ref of SQUARE with these sentences."""
    referring(root, folder, [{**ref(split=split), "sentences": list(sentences)}])
    place = root / "refer_seg" / folder
    (place / "refs(unc).p").rename(place / refs_file)
    return root


def halluseg(folder: Path, *pairs) -> Path:
    """A subset of HalluSegBench; pairs are fields that differ from those of a pair of its own images."""
    records = []
    for number, changes in enumerate(pairs):
        names = {
            "factual_image_path": f"factual_images/{number}.jpg",
            "factual_mask_path": f"factual_masks/{number}_7_mask.png",
            "counterfactual_image_path": f"counterfactual_images/{number}_7_edited.png",
            "counterfactual_mask_path": f"counterfactual_masks/{number}_7_newmask.png",
        }
        labels = {"factual_label": "red tie", "counterfactual_label": "blue scarf", "ann_id": 7}
        records.append({**names, **labels, "gpt_instruction": "Change red tie to blue scarf.", **changes})
        for name in ("factual_image_path", "counterfactual_image_path"):
            picture(folder / records[-1][name])
        for name, rows in (("factual_mask_path", 5), ("counterfactual_mask_path", 10)):
            label_map(
                folder / records[-1][name], np.pad(np.full((rows, 4), 255), ((0, HEIGHT - rows), (0, WIDTH - 4)))
            )
    write(folder / "data.json", records)
    return folder


def reason_seg(root: Path, record=None, split="train", explanations=None, stem="a") -> Path:
    record = {"text": ["what purrs"], "is_sentence": False, "shapes": []} if record is None else record
    folder = root / "reason_seg/ReasonSeg"
    picture(folder / split / f"{stem}.jpg")
    write(folder / split / f"{stem}.json", record)
    if explanations is not None:
        write(folder / "explanatory/train.json", explanations)
    return root


def llava(root: Path, *turns, image="1.jpg", **record) -> Path:
    record = {"id": "7", "conversations": [{"from": who, "value": text} for who, text in turns], **record}
    if image:
        record["image"] = image
    write(root / "llava_dataset/llava_instruct_150k.json", [record])
    picture(root / "coco/train2017/1.jpg")
    return root


def ade20k(root: Path, *maps) -> Path:
    for number, values in enumerate(maps):
        picture(root / f"ade20k/images/training/{number}.jpg")
        label_map(root / f"ade20k/annotations/training/{number}.png", values)
    return root


def cocostuff(root: Path, *maps) -> Path:
    for number, values in enumerate(maps):
        picture(root / f"coco/train2017/{number}.jpg")
        label_map(root / f"cocostuff/train2017/{number}.png", values)
    return root


def mapillary(root: Path, names, *maps) -> Path:
    write(root / "mapillary/config_v2.0.json", {"labels": [{"readable": name} for name in names]})
    for number, values in enumerate(maps):
        picture(root / f"mapillary/training/images/{number}.jpg")
        label_map(root / f"mapillary/training/v2.0/labels/{number}.png", values)
    return root


def parts(root: Path, name: str, category: str, segmentation=(SQUARE,)) -> Path:
    file, folder = {
        "paco_lvis": ("vlpart/paco/annotations/paco_lvis_v1_train.json", "coco"),
        "pascal_part": ("vlpart/pascal_part/train.json", "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"),
    }[name]
    write(
        root / file,
        {
            "images": [{"id": 1, "file_name": "1.jpg", "height": HEIGHT, "width": WIDTH}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": list(segmentation)}],
            "categories": [{"id": 1, "name": category}],
        },
    )
    picture(root / folder / "1.jpg")
    return root


def full(value: int):
    return np.full((HEIGHT, WIDTH), value)


# ---- parts of rows and examples ----------------------------------------------------------------------------------------
def areas(rows, i=0) -> list[int]:
    """Pixels of each expression of row `i`."""
    return [mask_area(entry["mask"]) for entry in rows[i]["expressions"]]


def talk(example) -> list[str]:
    """The texts of an example's first conversation."""
    return [turn["content"] for turn in example["conversations"][0]]


def words(example):
    """The texts of all conversations of an example, and the areas of its masks."""
    return [turn["content"] for turns in example["conversations"] for turn in turns], [
        mask.sum(axis=(1, 2)).tolist() for mask in example["masks"]
    ]


# ---- own data, as annotation tools write it ------------------------------------------------------------------------------
SMALL = [20, 20, 30, 20, 30, 25, 20, 25]  # 10 x 5 pixels, beside SQUARE


def shape(label: str, points, **more) -> dict:
    return {"label": label, "points": points, "group_id": None, "shape_type": "polygon", "flags": {}, **more}


def corners(polygon) -> list:
    return [polygon[i : i + 2] for i in range(0, len(polygon), 2)]


def labelme(root: Path, *shapes, stem="a", folder=".", **more) -> Path:
    """A folder of labelme: an image and a .json of its name."""
    picture(root / folder / f"{stem}.jpg")
    content = {"version": "5.5.0", "flags": {}, "shapes": list(shapes), "imagePath": f"{stem}.jpg", "imageData": None}
    write(root / folder / f"{stem}.json", {**content, "imageHeight": HEIGHT, "imageWidth": WIDTH, **more})
    return root


def coco(*annotations, images=("a.jpg",), categories=("cat", "dog"), **more) -> dict:
    """A COCO file with categories; annotations are (image, category, segmentation) by number from 1."""
    return {
        "info": {},
        "images": [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in enumerate(images, 1)],
        "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(categories, 1)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": 0,
             "area": 1.0, "bbox": [1, 1, 1, 1]}
            for i, (image, category, segmentation) in enumerate(annotations, 1)
        ],
        **more,
    }  # fmt: skip


def roboflow(root: Path, content: dict, split="train") -> Path:
    """Roboflow's COCO export: a folder per split, with images and the annotations beside them."""
    for image in content["images"]:
        picture(root / split / image["file_name"])
    write(root / split / "_annotations.coco.json", content)
    return root


def cvat(root: Path, content: dict, subset="default", folder="images") -> Path:
    """CVAT's COCO export: annotations/instances_SUBSET.json, and images in images/ or images/SUBSET/."""
    for image in content["images"]:
        picture(root / folder / image["file_name"])
    write(root / "annotations" / f"instances_{subset}.json", content)
    return root


def yolo(
    root: Path, lines, names=("cat", "dog"), split="train", images="images/train", place="images/train", **more
) -> Path:
    """YOLO segmentation: data.yaml, an image, and its label file of `lines`; None for no label file."""
    text = "".join(f"  {i}: {name}\n" for i, name in enumerate(names))
    extra = "".join(f"{key}: {value}\n" for key, value in more.items())
    write(root / "data.yaml", f"{extra}{split}: {place}\nnc: {len(names)}\nnames:\n{text}")
    picture(root / images / "a.jpg")
    if lines is not None:
        write(root / images.replace("images", "labels") / "a.txt", "\n".join(lines) + "\n")
    return root


def yolo_line(number: int, polygon) -> str:
    return " ".join([str(number), *(f"{value / (HEIGHT if i % 2 else WIDTH):.6f}" for i, value in enumerate(polygon))])


def index_maps(
    root: Path, values, classes=("background", "cat", "dog"), images="images/train", masks="masks/train"
) -> Path:
    """Label maps with a class list."""
    write(root / "classes.txt", "\n".join(classes) + "\n")
    picture(root / images / "a.jpg")
    label_map(root / masks / "a.png", values)
    return root
