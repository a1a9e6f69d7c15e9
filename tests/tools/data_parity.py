"""Compare the data pipeline with recorded outputs of the original, on any folder laid out like golden_data.

    python tests/tools/data_parity.py GOLDEN_DATA_DIR --tokenizer tokenizer.model

GOLDEN_DATA_DIR holds `mini/` (a small tree of every data set) and `golden/{val,train,enumerate}/*.json` and
`golden/{images,mixed}.json`. Prints one JSON line per file and check, `{"case", "quantity", "value", "limit", "ok"}`;
exits with 1 when a value is above its limit.

The random choices of the original are replayed through `data_scripts.transforms.Draws`' interface, or enumerated. Where
this project fixes a quirk of the original, a sample that differs must equal the original's after the quirk is applied to it
(`QUIRKS`), and there may be no more such samples than samples with the quirk's cause.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from unittest import mock

import numpy as np
from paths import ROOT
from PIL import Image
from pycocotools import mask as coco_mask
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(ROOT))

import data_scripts
from convert_checkpoint import build_llama_tokenizer
from data_scripts import mixture, referring, semantic, transforms
from data_scripts.masks import decode_mask, empty_mask, encode_labels, encode_mask, mask_area, merge_masks
from modeling_gsva import GsvaImageProcessor, GsvaProcessor
from modeling_gsva.processing_gsva import ADDED_TOKENS, CHAT_TEMPLATES

QUIRKS = {
    "Q19": "[REJ] is also written into an expression that holds SEG",
    "Q22": "dots are stripped after blanks, and not again",
    "Q24": "degenerate polygons are rasterised in training",
    "Q26": "a class is looked up by its name, so the first of two equal names gives the mask",
    "undecodable": "an annotation that cannot be decoded throws the whole picture away",
}
IMAGE_ID = -200  # of the placeholder in the recorded ids
TEXT_LENGTH = 1024  # the original's model_max_length, which counts the picture's 256 patches


# ---- the original's random choices -----------------------------------------------------------------------------------
class OriginalDraws:
    """`Draws` with the generators that the original calls, in its order (DATA_SPEC section 4)."""

    def subset(self, n: int, k: int) -> list[int]:
        return np.random.choice(range(n), size=k, replace=False).tolist() if n >= k else list(range(n))

    def index(self, n: int, of: str) -> int:
        if of == "data set" and n == 1:  # a family of one has no list to draw from
            return 0
        return int(np.random.randint(n)) if of == "answer template" else random.randint(0, n - 1)

    def chance(self, of: str) -> float:
        return random.random()

    def weighted(self, weights, of: str) -> int:
        return int(np.random.choice(len(weights), p=np.array(weights) / np.sum(weights)))


class Branches:
    """`Draws` that takes every way in turn: `for draws in Branches.all(): ...`."""

    def __init__(self, taken: list[list[int]]):
        self.taken, self.place = taken, 0

    @classmethod
    def all(cls) -> Iterator[Branches]:
        taken: list[list[int]] = []
        while True:
            yield cls(taken)
            while taken and taken[-1][0] == taken[-1][1] - 1:
                taken.pop()
            if not taken:
                return
            taken[-1][0] += 1

    def index(self, n: int, of: str = "") -> int:
        if self.place == len(self.taken):
            self.taken.append([0, n])
        self.place += 1
        return self.taken[self.place - 1][0]

    def subset(self, n: int, k: int) -> list[int]:
        rest = list(range(n))
        return [rest.pop(self.index(len(rest))) for _ in range(k)] if n >= k else rest

    def chance(self, of: str) -> float:
        return (0.0, 0.999)[self.index(2)]


# ---- the original's quirks, put back ---------------------------------------------------------------------------------
def _unfiltered(segmentation, height: int, width: int) -> dict:
    if isinstance(segmentation, list) and segmentation and isinstance(segmentation[0], list):
        return encode_mask(coco_mask.decode(coco_mask.frPyObjects(segmentation, height, width)).sum(axis=2))
    return schema_segmentation_to_rle(segmentation, height, width)


schema_segmentation_to_rle = referring.segmentation_to_rle


class OriginalWording(transforms.Wording):
    def part(self, template: str, name: str, present: bool) -> str:
        part = template.replace("{}", name)
        return part if present else part.replace("SEG", "REJ")


def original_clean(text: str) -> str:
    return text.strip().strip(".")


def with_quirks(transform: transforms.Transform, quirks: tuple[str, ...]) -> transforms.Transform:
    """`transform` changed in place to what the original does."""
    if "Q19" in quirks:
        transform.wording = OriginalWording(separator=transform.wording.separator)
    if "Q22" in quirks:
        transform.candidates = lambda row: [(original_clean(entry["text"]), entry) for entry in row["expressions"]]
    if {"Q26", "undecodable"} & set(quirks):
        transform.candidates = lambda row: [(entry["text"], entry) for entry in row["expressions"]]
    if "undecodable" in quirks:
        ours = transform.words

        def words(row: dict, draws) -> tuple | None:
            worded = ours(row, draws)
            return worded if worded is None or all(mask.any() for mask in worded[1][0]) else None

        transform.words = words
    return transform


class Tree:
    """Rows of the mini tree, by picture."""

    def __init__(self, folder: Path, cache_dir: str):
        self.folder, self.cache_dir = folder, cache_dir
        self.rows = cache(self._rows)
        self.called: dict[str, set[str]] = defaultdict(set)

    def place(self, row: dict) -> str:
        return Path(row["image"]["path"]).relative_to(self.folder).as_posix()

    def _rows(self, name: str, split: str = "train", quirks: tuple[str, ...] = ()) -> dict[str, dict]:
        """Picture -> row; of llava_instruct_150k, whose pictures repeat, number -> row."""
        if quirks:
            rows = list(self._original(name, split, quirks))
        else:
            from datasets import Image as ImageFeature

            rows = data_scripts.load(name, self.folder, split, self.cache_dir)
            rows = list(rows.cast_column("image", ImageFeature(decode=False)))
        for row in rows:
            self.called[row["image_id"]].add(self.place(row))
        if name == "llava_instruct_150k":
            return dict(enumerate(rows))
        return {self.place(row): row for row in rows}

    def pictures_called(self, image_id: str) -> set[str]:
        """The pictures of rows with this `image_id` in the data sets read so far."""
        return self.called[image_id]

    def builder(self, name: str):
        return data_scripts.load_builder(name, self.folder, self.cache_dir)

    def _original(self, name: str, split: str, quirks: tuple[str, ...]) -> Iterator[dict]:
        builder = self.builder(name)
        if "undecodable" in quirks and isinstance(builder, semantic.PartsBuilder):
            with mock.patch.object(semantic, "mask_area", lambda mask: 1):
                yield from builder.rows(split)
        elif "Q26" in quirks and isinstance(builder, semantic.MapillaryBuilder):
            for picture, label in builder.pairs():
                row, masks = builder.row(picture, label), encode_labels(np.array(Image.open(label)))
                names = list(builder.classes.values())
                for entry in row["expressions"]:
                    entry["mask"] = masks.get(names.index(entry["text"]), empty_mask(row["height"], row["width"]))
                yield row
        elif "Q24" in quirks and isinstance(builder, referring.ReferringBuilder):
            with mock.patch.object(referring, "segmentation_to_rle", _unfiltered):
                yield from builder.rows(split)
        else:
            yield from self.rows(name, split).values()

    def has_cause(self, name: str, quirk: str, place: str) -> bool:
        """Whether a picture's data could bring a quirk about."""
        texts = [entry["text"] for entry in self.rows(name)[place].get("expressions", ())]
        if quirk == "Q19":
            return any("SEG" in text for text in texts)
        if quirk == "Q22":
            return any(original_clean(text) != transforms.clean_expression(text) for text in texts)
        return self.rows(name)[place] != self.rows(name, "train", (quirk,))[place]


# ---- reporting -------------------------------------------------------------------------------------------------------
class Report:
    def __init__(self, write: Callable[[str], None] = print):
        self.write, self.failed = write, 0

    def __call__(self, case: str, quantity: str, value: float, limit: float = 0) -> None:
        ok = value <= limit
        self.failed += not ok
        self.write(json.dumps({"case": case, "quantity": quantity, "value": value, "limit": limit, "ok": ok}))


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """Stands in where no ids are compared: it knows the added tokens and no word."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(list(ADDED_TOKENS))
    return tokenizer


class Tokens:
    """The processor's road from conversations to ids and labels, in the original's notation."""

    def __init__(self, tokenizer: str | None):
        tokenizer = build_llama_tokenizer(tokenizer) if tokenizer else _no_tokenizer()
        self.processor = GsvaProcessor(GsvaImageProcessor(), tokenizer, patch_size=14)

    def mismatches(self, conversations: list[list[dict]], golden: dict, template: str, cut: bool) -> Counter:
        """Which of conversations, ids, labels differ from one recorded sample."""
        processor, found = self.processor, Counter()
        processor.chat_template = CHAT_TEMPLATES[template]
        if "conversations" in golden:
            texts = [processor.apply_chat_template(turns, tokenize=False) for turns in conversations]
            found["conversations"] = golden["conversations"] != texts
        if "tokens" not in golden:
            return found
        tokens = golden["tokens"]["legacy"]
        encoded = processor(
            images=[np.zeros((8, 8, 3), np.uint8)],
            conversations=conversations,
            image_index=[0 if any("<image>" in turn["content"] for turn in turns) else -1 for turns in conversations],
            max_length=TEXT_LENGTH if cut else None,
            size={"shortest_edge": 224},
            sam_size={"longest_edge": 16},
        )
        for key, filler in (("input_ids", 0), ("labels", -100)):
            ours = [self._collapse(ids, row) for ids, row in zip(encoded["input_ids"], encoded[key], strict=True)]
            ours = [row[: sum(mask) - self.patches(ids)] for row, mask, ids in
                    zip(ours, encoded["attention_mask"], encoded["input_ids"], strict=True)]  # fmt: skip
            theirs = [row[: len(one)] for row, one in zip(tokens[key], ours, strict=True)]
            rest = [row[len(one) :] for row, one in zip(tokens[key], ours, strict=True)]
            found[key] = ours != theirs or any(value != filler for row in rest for value in row)
            found["attention"] |= [len(row) for row in ours] != tokens["attention_mask_sum"]
        return found

    def patches(self, ids) -> int:
        count = int((np.asarray(ids) == self.processor.image_token_id).sum())
        return max(count - 1, 0)

    def _collapse(self, ids, row) -> list[int]:
        """`row` with the positions of the picture's patches drawn together into one."""
        image = np.asarray(ids) == self.processor.image_token_id
        keep = ~image | (np.cumsum(image) == 1) & image
        return [IMAGE_ID if value == self.processor.image_token_id else int(value) for value in np.asarray(row)[keep]]

    def picture_mismatch(self, path: Path, facts: dict) -> bool:
        """Whether a picture's two tensors differ from the recorded hashes."""
        image = transforms.read_image({"path": str(path), "bytes": None})
        array = np.asarray(image).transpose(2, 0, 1)
        resized = self.processor.image_processor.resize_for_sam(array, 1024).astype(np.uint8).transpose(1, 2, 0)
        clip = self.processor.image_processor(image)["pixel_values"][0].astype(np.float32)
        hashes = [hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest() for x in (resized, clip)]
        return hashes != [facts["sam_resized_u8_sha256"], facts["clip_sha256"]]


# ---- the three kinds of recorded files -------------------------------------------------------------------------------
def check_val(path: Path, tree: Tree, tokens: Tokens, report: Report) -> None:
    golden = json.loads(path.read_text())
    name, *_, split = golden["spec"].split("|")
    rows = tree.rows(name, split)
    found = Counter(pictures=set(rows) != {sample["image"] for sample in golden["samples"]})
    for sample in golden["samples"]:
        row = rows[sample["image"]]
        if name == "ReasonSeg":
            entry = row["expressions"][0]  # only the first text is evaluated (Q6), ignored pixels are target (Q5)
            chosen = [merge_masks([mask for mask in (entry["mask"], entry["ignore_mask"]) if mask])]
            texts, prompt = [entry["text"]], "reason_sentence" if entry["is_sentence"] else "reason_phrase"
            absent = [False]
        else:
            chosen, prompt = [entry["mask"] for entry in row["expressions"]], "refer"
            texts, absent = [entry["text"] for entry in row["expressions"]], [not mask_area(mask) for mask in chosen]
        found["masks"] += chosen != sample["masks"]
        found["sizes"] += [row["height"], row["width"]] != sample["label_shape"]
        found["picture tensors"] += tokens.picture_mismatch(tree.folder / sample["image"], sample["image_facts"])
        turns = tokens.processor.build_conversation(texts, absent, prompt)
        for template, recorded in sample["conv"].items():
            for key, differs in tokens.mismatches([turns], recorded, template, cut=False).items():
                found[f"{key}, {template}"] += differs
    for quantity, value in found.items():
        report(f"val/{path.stem}", quantity, int(value))


def _transform(kind: str, count: int, explanatory: float = 0.1) -> transforms.Transform:
    if kind == "vqa":
        return transforms.ConversationTransform()
    if kind == "reason_seg":
        return transforms.ReasoningTransform(num_expressions=count, explanatory=explanatory)
    return {"sem_seg": transforms.SemanticTransform, "refer_seg": transforms.ReferringTransform}[kind](
        num_expressions=count
    )


def _with_causes(tree: Tree, name: str, places: list, kind: str) -> Iterator[tuple[str, ...]]:
    """Sets of quirks that the pictures give cause for, the empty one first."""
    quirks = [] if kind in ("vqa", "reason_seg") else [
        quirk for quirk in QUIRKS if any(tree.has_cause(name, quirk, place) for place in places)
    ]  # fmt: skip
    for size in range(len(quirks) + 1):
        yield from combinations(quirks, size)


def _numbers(sample: dict) -> dict[str, int]:
    return {"index": sample["index"], "seed": sample["seed"]}


def replay(kind: str, transform: transforms.Transform, rows: list[dict], index: int, seed: int) -> tuple:
    """Row, conversations and masks of item `index` of the original without sampling, with its generators seeded."""
    random.seed(seed)
    np.random.seed(seed)
    while True:
        if kind == "refer_seg":
            random.randint(0, 0)  # the original draws a data set even when there is one
        worded = transform.words(rows[index], OriginalDraws())
        if worded is not None:
            return rows[index], *worded
        index = 0


def check_train(path: Path, tree: Tree, tokens: Tokens, report: Report) -> None:
    golden = json.loads(path.read_text())
    kind, name = golden["kind"], golden["dataset"].split("|")[0]
    places = list(range(len(golden["order"]))) if kind == "vqa" else golden["order"]
    found, departures, possible = Counter(), Counter(), Counter()

    def mismatches(sample: dict, quirks: tuple[str, ...]) -> Counter:
        transform = with_quirks(_transform(kind, golden["num_classes_per_sample"], golden["explanatory"]), quirks)
        rows = tree.rows(name, "train", quirks)
        row, conversations, masks = replay(kind, transform, [rows[place] for place in places], **_numbers(sample))
        differ = Counter(pictures=kind != "vqa" and tree.place(row) != sample["image"])
        ours = [encode_mask(mask) for several in masks for mask in several]
        differ["masks"] += ours != sample["masks"]
        if "height" in row:
            differ["sizes"] += [row["height"], row["width"]] != sample["label_shape"]
        for template, recorded in sample["conv"].items():
            for key, value in tokens.mismatches(conversations, recorded, template, cut=True).items():
                differ[f"{key}, {template}"] += value
        return differ

    for sample in golden["samples"]:
        involved = [places[sample["index"]], places[0]]
        sets = list(_with_causes(tree, name, involved, kind))
        for quirk in sets[-1]:
            possible[quirk] += 1
        results = {}
        for quirks in sets:
            results[quirks] = mismatches(sample, quirks)
            if not results[quirks].total():
                break
        best = min(results, key=lambda quirks: results[quirks].total())
        found.update(results[best])
        departures.update(best)
        image = tree.folder / sample["image"]
        found["picture tensors"] += tokens.picture_mismatch(image, sample["image_facts"])
    for quantity, value in found.items():
        report(f"train/{path.stem}", quantity, int(value))
    for quirk in possible:
        report(f"train/{path.stem}", f"samples that {quirk} changes", departures[quirk], possible[quirk])


def _digest(pairs: set[str]) -> str:
    return hashlib.sha256("\n".join(sorted(pairs)).encode()).hexdigest()


def _enumerate(kind: str, row: dict, count: int, quirks: tuple[str, ...]) -> tuple[int, int, dict[str, tuple]]:
    """Number of outcomes, of re-draws, and every distinct question and answer with its masks."""
    transform = with_quirks(_transform(kind, count), quirks)
    outcomes, redraws, pairs = 0, 0, {}
    for draws in Branches.all():
        worded = transform.words(row, draws)
        first = worded is None or not worded[0]
        redraws += worded is None
        outcomes += 1
        for turns, masks in () if first else zip(*worded, strict=True):
            pairs["\x1f".join(turn["content"] for turn in turns)] = masks
    return outcomes, redraws, pairs


def check_enumerate(path: Path, tree: Tree, tokens: Tokens, report: Report, largest: int = 5) -> None:
    golden = json.loads(path.read_text())
    kind, name = golden["kind"], golden["dataset"].split("|")[0]
    found, departures, possible = Counter(), Counter(), Counter()

    def mismatches(recorded: dict, row: dict, quirks: tuple[str, ...]) -> Counter:
        differ = Counter()
        for count in range(1, largest + 1):
            wanted = recorded.get(f"k{count}")
            if wanted is None or "skipped" in wanted:
                continue
            outcomes, redraws, pairs = _enumerate(kind, row, count, quirks)
            differ[f"k={count} outcomes"] += wanted["outcomes"] != outcomes
            differ[f"k={count} re-draws"] += wanted["redraws"] != redraws
            differ[f"k={count} questions and answers"] += wanted["sha256"] != _digest(set(pairs))
            for entry in wanted.get("rows") or ():
                masks = pairs.get(f"{entry['question']}\x1f{entry['answer']}")
                expected = [recorded["masks"][i] for i in entry["masks"]]
                differ[f"k={count} masks"] += masks is None or [encode_mask(mask) for mask in masks] != expected
        return differ

    for recorded in golden["images"]:
        place = recorded["index"] if kind == "vqa" else recorded["image"]
        if kind == "vqa":
            turns = tree.rows(name)[place]
            conversations, _ = transforms.ConversationTransform().words(turns, None)
            tokens.processor.chat_template = CHAT_TEMPLATES["llava_v1"]
            text = tokens.processor.apply_chat_template(conversations[0], tokenize=False)
            found["conversation"] += text.replace("<im_start><image><im_end>", "<image>") != recorded["conversation"]
            continue
        results = {}
        for quirks in _with_causes(tree, name, [place], kind):
            results[quirks] = mismatches(recorded, tree.rows(name, "train", quirks)[place], quirks)
            if not results[quirks].total():
                break
        possible.update(quirk for quirk in QUIRKS if kind != "reason_seg" and tree.has_cause(name, quirk, place))
        best = min(results, key=lambda quirks: results[quirks].total())
        found.update(results[best])
        departures.update(best)
    for quantity, value in found.items():
        report(f"enumerate/{path.stem}", quantity, int(value))
    for quirk in possible:
        report(f"enumerate/{path.stem}", f"pictures that {quirk} changes", departures[quirk], possible[quirk])


# The original's; `referring.LAYOUTS` has more.
REFER_SEG = ("refclef", "refcoco", "refcoco+", "refcocog", "grefcoco", "refzom")


def check_mixed(path: Path, tree: Tree, tokens: Tokens, report: Report) -> None:
    """200 draws of the mixture, and one batch of four items for each template."""
    golden, found = json.loads(path.read_text()), Counter()
    # the sets and their order as recorded; quirks put back where pictures of the mini trees give cause
    families = {
        "sem_seg": {"ade20k": (), "cocostuff": (), "mapillary": ("Q26",), "paco_lvis": (),
                    "pascal_part": ("undecodable",)},
        "refer_seg": dict.fromkeys(REFER_SEG, ("Q19", "Q22", "Q24")),
        "vqa": {"llava_instruct_150k": ()},
        "reason_seg": {"ReasonSeg": ()},
    }  # fmt: skip

    def ordered(name: str, quirks: tuple[str, ...]) -> list[dict]:
        files = (path.parent / "train" / f"{stem}.json" for stem in (name, f"{name}_train"))
        order = json.loads(next(file for file in files if file.exists()).read_text())["order"]
        rows = tree.rows(name, "train", quirks)
        return list(rows.values()) if name == "llava_instruct_150k" else [rows[place] for place in order]

    def source(kind: str, name: str, quirks: tuple[str, ...]) -> mixture.TrainingDataset:
        return mixture.TrainingDataset(ordered(name, quirks), with_quirks(_transform(kind, 3), quirks))

    mixed = mixture.Mixture(
        {
            kind: (rate, [source(kind, name, quirks) for name, quirks in members.items()])
            for rate, (kind, members) in zip(golden["sample_rate"], families.items(), strict=True)
        },
        len(golden["trace"]),
    )
    tokens.processor.chat_template = CHAT_TEMPLATES["llava_v1"]
    random.seed(7)
    np.random.seed(7)
    with mock.patch.object(mixture, "Draws", lambda *key: OriginalDraws()):
        for recorded, example in zip(golden["trace"], mixed, strict=True):
            shown = tree.pictures_called(example["image_id"])
            found["draws: pictures"] += recorded["image"] not in shown
            texts = [tokens.processor.apply_chat_template(turns, tokenize=False) for turns in example["conversations"]]
            texts = [text.replace("<im_start><image><im_end>", "<image>") for text in texts]
            found["draws: conversations"] += texts != recorded["conversations"]
            areas = [int(mask.sum()) for masks in example["masks"] for mask in masks]
            found["draws: masks"] += areas != recorded["mask_areas"]
    for title, batch in golden["batches"].items():
        template, kind_of_tokenizer = title.split("/")
        if kind_of_tokenizer != "legacy":
            continue
        conversations, offsets = [], [0]
        for kind, name, index in batch["items"]:
            name = name.split("|")[0]
            quirks = families[kind][name]
            transform = with_quirks(_transform(kind, 3), quirks)
            conversations += replay(kind, transform, ordered(name, quirks), index, 1000 + index)[1]
            offsets.append(len(conversations))
        found["batch: offsets"] += offsets != batch["offset"]
        recorded = {key: batch[key] for key in ("input_ids", "labels")}
        recorded["attention_mask_sum"] = [sum(row) for row in batch["attention_mask"]]
        for key, value in tokens.mismatches(
            conversations, {"tokens": {"legacy": recorded}}, template, cut=True
        ).items():
            found[f"batch: {key}, {template}"] += value
    for quantity, value in found.items():
        report("mixed", quantity, int(value))


def check_images(path: Path, tree: Tree, report: Report) -> None:
    """Every picture upright and in RGB, every label map as its indices."""
    differ = Counter()
    for place, facts in json.loads(path.read_text()).items():
        if "cv2_rgb_sha256" in facts:
            array = np.asarray(transforms.read_image({"path": str(tree.folder / place), "bytes": None}))
            differ["pictures"] += hashlib.sha256(array.tobytes()).hexdigest() != facts["cv2_rgb_sha256"]
        else:
            masks = encode_labels(np.array(Image.open(tree.folder / place)))
            differ["label maps"] += sorted(masks) != facts["values"]
            array = sum(value * decode_mask(mask) for value, mask in masks.items()).astype(np.uint8)
            differ["label maps"] += hashlib.sha256(array.tobytes()).hexdigest() != facts["sha256"]
    for quantity, value in differ.items():
        report("images", quantity, int(value))


def check_tokenizer(path: Path, tokens: Tokens, report: Report) -> None:
    """Awkward strings, and strings with a picture in them."""
    golden, found = json.loads(path.read_text()), Counter()
    tokenizer = tokens.processor.tokenizer
    for recorded in golden["legacy"]:
        found["ids"] += tokenizer(recorded["text"]).input_ids != recorded["ids"]
        plain = tokenizer(recorded["text"], add_special_tokens=False).input_ids
        found["ids without the first"] += plain != recorded["ids_no_special"]
    for recorded in golden["legacy_image_token"]:
        ids = tokenizer(recorded["text"]).input_ids
        found["ids with a picture"] += tokens._collapse([0] * len(ids), ids) != recorded["ids"]
    for quantity, value in found.items():
        report("tokenizer", quantity, int(value))


def run(golden_data: Path, tokenizer: str | None, write: Callable[[str], None] = print, only: str = "") -> int:
    """Number of checks that failed. `only` names the files to check by a part of their path."""
    report = Report(write)
    with tempfile.TemporaryDirectory() as cache_dir:
        tree, tokens = Tree((golden_data / "mini").resolve(), cache_dir), Tokens(tokenizer)
        for kind, check in (("val", check_val), ("train", check_train), ("enumerate", check_enumerate)):
            for path in sorted((golden_data / "golden" / kind).glob("*.json")):
                if only in f"{kind}/{path.stem}":
                    check(path, tree, tokens, report)
        others = {
            "mixed": lambda path: check_mixed(path, tree, tokens, report),
            "images": lambda path: check_images(path, tree, report),
            "tokenizer": lambda path: check_tokenizer(path, tokens, report),
        }
        for name, check in others.items():
            path = golden_data / "golden" / f"{name}.json"
            if only in name and path.exists():
                check(path)
    return report.failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("golden_data", type=Path)
    parser.add_argument("--tokenizer", required=True, help="LLaMA's tokenizer.model")
    parser.add_argument("--only", default="", help="check only files whose path holds this, e.g. val/grefcoco")
    arguments = parser.parse_args(argv)
    import datasets

    datasets.disable_progress_bars()
    return 1 if run(arguments.golden_data, arguments.tokenizer, only=arguments.only) else 0


if __name__ == "__main__":
    sys.exit(main())
