"""
Train an embedded base model, a small GSVA before generalized fine-tuning, like LLaVA and SAM before GSVA.

    python assets/make_tiny_gsva.py                # assets/tiny_gsva; or: make base
    python assets/make_tiny_gsva.py --arch today   # assets/tiny_gsva_today; or: make base ARCH=today

Its stages resume at their last checkpoints in `--work_dir`:

1. *towers*: both image encoders learn the colour, shape and size of each patch, and the mask decoder learns to segment things by
   their attributes, as CLIP and SAM are pretrained. They are frozen afterwards. Over today's parts these are two stages, *vision*
   and *masks*, that also learn the place of each thing among the others; the decoder is prompted by the words of expressions.
2. *language*: projector, language model and mask prompts learn to answer questions in words (is there a …? what is there
   from left to right?) and to segment expressions with one or several targets. Expressions without a target do not occur,
   and `[REJ]` is never an answer: the generalized fine-tuning of `configs/finetune_shapes.yaml` teaches rejection. Over today's parts a
   stage *words* comes first, without masks; then mask prompts also learn to be those that the decoder has learned from words.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from base_recipes import BASES, COLOURS, GRID, IMAGE_SEED, SHAPES, SIZES
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import GenerationConfig

from data_scripts import shapes
from data_scripts.files import replacing, write_text
from modeling_gsva.masks_gsva import main_map
from modeling_gsva.modeling_gsva import mask_losses

PLACES = ("leftmost", "rightmost", "top", "bottom")
NUM_CLASSES = 1 + len(COLOURS) * len(SHAPES) * len(SIZES)  # 0 is background


def _draw(index: int):
    """Return an image, its things without masks, and a map with the number of the thing at each pixel."""
    image, things = shapes.draw_picture(np.random.default_rng([IMAGE_SEED, shapes.SPLIT_CODES["train"], index, 0]))
    owner = np.zeros((image.height, image.width), dtype=np.uint8)
    for number, thing in enumerate(things, start=1):
        owner[thing.mask] = number
    light = [shapes.Thing(t.colour, t.shape, t.size, t.x, t.y, np.asarray(n)) for n, t in enumerate(things, start=1)]
    return image, light, owner


class Images:
    """All training images in memory, as the towers take them. They are drawn once and kept in a file, to resume with."""

    def __init__(self, prepare: Callable[[Image.Image], tuple[torch.Tensor, torch.Tensor]], count: int, path: Path):
        if not path.exists():
            with replacing(path) as temporary:
                torch.save(self._draw(prepare, count), temporary)
        drawn = torch.load(path, weights_only=True, mmap=True)
        self.things = [
            [shapes.Thing(*fields, np.asarray(n)) for n, fields in enumerate(of, 1)] for of in drawn["things"]
        ]
        self.clip, self.sam, self.owners = drawn["clip"], drawn["sam"], drawn["owners"]
        if len(self.things) != count:
            raise ValueError(f"{path} holds {len(self.things)} images instead of {count}; give another --work_dir.")
        classes = torch.zeros(count, 8, dtype=torch.long)  # thing number → class
        for n, things in enumerate(self.things):
            for k, t in enumerate(things, start=1):
                combined = (COLOURS.index(t.colour) * len(SHAPES) + SHAPES.index(t.shape)) * len(SIZES) + SIZES.index(
                    t.size
                )
                classes[n, k] = 1 + combined
        self.classes = classes
        # Whether a thing is the first from the left, right, top and bottom: of all things, and of those of its shape.
        self.places = torch.zeros(count, 8, 8)
        for n, things in enumerate(self.things):
            for k, thing in enumerate(things, start=1):
                for m, others in enumerate((things, [t for t in things if t.shape == thing.shape])):
                    x, y = [t.x for t in others], [t.y for t in others]
                    first = (thing.x == min(x), thing.x == max(x), thing.y == min(y), thing.y == max(y))
                    self.places[n, k, 4 * m : 4 * m + 4] = torch.tensor(first, dtype=torch.float)
        # A patch belongs to the thing that covers most of it; patches covered by less than a quarter are background.
        cell = self.owners.shape[-1] // GRID
        cells = self.owners.reshape(count, GRID, cell, GRID, cell).permute(0, 1, 3, 2, 4).flatten(3)
        shares = torch.stack([(cells == number).float().mean(-1) for number in range(1, 5)], -1)
        best = shares.max(-1)
        self.patches = torch.where(best.values > 0.25, best.indices + 1, 0)  # (count, GRID, GRID)

    @staticmethod
    def _draw(prepare, count: int) -> dict:
        """Return things, prepared images and owners of the pixels."""
        things_of, owners, clip, sam = [], [], [], []
        with multiprocessing.Pool(2) as pool:
            for image, things, owner in tqdm(
                pool.imap(_draw, range(count), chunksize=64), "drawing", count, leave=False
            ):
                for kept, tensor in zip((clip, sam), prepare(image)):
                    kept.append(tensor.half())
                things_of.append([(t.colour, t.shape, t.size, float(t.x), float(t.y)) for t in things])
                owners.append(torch.from_numpy(owner))
        return {"things": things_of, "clip": torch.stack(clip), "sam": torch.stack(sam), "owners": torch.stack(owners)}

    def mask(self, image: int, things: list[shapes.Thing]) -> torch.Tensor:
        """Return the mask of some things of an image."""
        return torch.isin(self.owners[image], torch.tensor([int(thing.mask) for thing in things], dtype=torch.uint8))


class Drawn(Dataset):
    """The batches of some steps, each drawn when it is needed."""

    def __init__(self, draw, series: int, steps: range):
        self.draw, self.series, self.steps = draw, series, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int):
        return self.draw(np.random.default_rng([IMAGE_SEED, self.series, self.steps[index]]))


class Stage:
    """A training stage that can be resumed: warm-up and cosine schedule, checkpoints, a log line every 50 steps."""

    def __init__(
        self,
        name,
        modules: nn.Module,
        steps: int,
        lr: float,
        work_dir: Path,
        log: list,
        save_every: int = 200,
        series: int = 100,
    ):
        """Prepare a stage, or continue it. `series` is part of the seed of its batches."""
        self.series = series
        self.name, self.modules, self.steps, self.lr = name, modules, steps, lr
        self.path, self.log, self.save_every = work_dir / f"{name}.pt", log, save_every
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def save(self):
        """Write a checkpoint."""
        state = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        with replacing(self.path) as temporary:
            torch.save(state, temporary)

    def run(self, draw, losses, evaluate=None):
        """
        Train. `draw(random)` returns a batch, in a process of its own and by a generator that depends on seed and step alone;
        `losses(*batch)` returns the loss parts.
        """
        batches = iter(
            DataLoader(Drawn(draw, self.series, range(self.step, self.steps)), batch_size=None, num_workers=1)
        )
        bar = tqdm(range(self.step, self.steps), self.name, initial=self.step, total=self.steps, mininterval=10)
        sums, start = dict[str, list[float]](), time.time()
        for step in bar:
            warm, turn = min(1.0, (step + 1) / 100), math.pi * step / self.steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * warm * (0.02 + 0.98 * (1 + math.cos(turn)) / 2)
            parts = losses(*next(batches))
            sum(parts.values()).backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step = step + 1
            for key, value in parts.items():
                sums.setdefault(key, []).append(float(value.detach()))
            if self.step % 50 == 0 or self.step == self.steps:
                entry = {
                    "stage": self.name,
                    "step": self.step,
                    **{k: round(sum(v) / len(v), 4) for k, v in sums.items()},
                }
                entry["seconds_per_step"] = round((time.time() - start) / max(len(next(iter(sums.values()))), 1), 3)
                if evaluate is not None and (self.step % 300 == 0 or self.step == self.steps):
                    entry.update(evaluate())
                self.log.append(entry)
                tqdm.write(json.dumps(entry))
                sums, start = {}, time.time()
            if self.step % self.save_every == 0 or self.step == self.steps:
                self.save()


def train_towers(model, base, images: Images, args, log) -> nn.Module:
    """Run stage 1 and return the module that made its prompts. It and the classifiers are not part of the model."""
    width = model.config.sam_config.prompt_encoder_config.hidden_size
    scaffold = nn.ModuleDict(
        {
            "clip": nn.Linear(model.config.vision_config.hidden_size, NUM_CLASSES),
            "sam": nn.Linear(width, NUM_CLASSES),
            "prompt": base.build_prompts(width),
        }
    )
    if base.learns_places:
        scaffold["clip_places"] = nn.Linear(model.config.vision_config.hidden_size, images.places.shape[-1])
        scaffold["sam_places"] = nn.Linear(width, images.places.shape[-1])
    saved_projector, model.mask_projector = model.mask_projector, nn.Identity()

    def of_patches(name, features, rows):
        """Return the losses of naming the thing in each patch, and its place, by features (images, patches, channels)."""
        owners = images.patches[rows].flatten(1)
        named = scaffold[name](features).flatten(0, 1)
        parts = {name: F.cross_entropy(named, torch.gather(images.classes[rows], 1, owners).flatten())}
        if base.learns_places:
            places = images.places[rows].gather(1, owners[..., None].expand(-1, -1, images.places.shape[-1]))
            guessed = scaffold[f"{name}_places"](features)[owners > 0]
            parts[f"{name}_places"] = F.binary_cross_entropy_with_logits(guessed, places[owners > 0])
        return parts

    def vision_losses(rows, *others):
        return of_patches("clip", base.vision_features(model, images.clip[rows].float()), rows)

    def masks_losses(rows, prompts, image_index, truths):
        embeddings = model.get_sam_embeddings(images.sam[rows].float())
        masks, _ = model.decode_masks(scaffold["prompt"](prompts), embeddings, image_index)
        bce, dice = square_mask_losses(masks, truths)
        cells = main_map(embeddings).flatten(2).transpose(1, 2)
        return {**of_patches("sam", cells, rows), "bce": 2.0 * bce, "dice": 0.5 * dice}

    def draw(random, with_prompts):
        rows = random.integers(len(images.things), size=args.batch)
        if not with_prompts:
            return (torch.from_numpy(rows),)
        prompts, image_index, truths = [], [], []
        for n, row in enumerate(rows.tolist()):
            for prompt, things in base.tower_prompts(random, images.things[row]):
                prompts.append(prompt)
                image_index.append(n)
                truths.append(images.mask(row, things)[:: base.mask_stride, :: base.mask_stride])
        return torch.from_numpy(rows), prompts, torch.tensor(image_index), torch.stack(truths)

    parts = {
        "vision": ({"vision": model.model.vision_tower}, ("clip", "clip_places"), vision_losses),
        "masks": (
            {"encoder": model.sam.vision_encoder, "decoder": model.sam.mask_decoder}, ("sam", "prompt", "sam_places"), masks_losses,
        ),
    }  # fmt: skip
    model.train()
    for name, of_stage in base.tower_stages.items():
        modules = {key: module for part in of_stage for key, module in parts[part][0].items()}
        names = [key for part in of_stage for key in parts[part][1]]
        modules["scaffold"] = nn.ModuleDict({key: layer for key, layer in scaffold.items() if key in names})
        stage = Stage(name, nn.ModuleDict(modules), args.steps or base.steps[name], 2e-3, args.work_dir, log)
        if args.stage not in (None, name):
            continue

        def losses(*batch, of_stage=of_stage):
            return {key: loss for part in of_stage for key, loss in parts[part][2](*batch).items()}

        stage.run(partial(draw, with_prompts="masks" in of_stage), losses)
    model.mask_projector = saved_projector
    return scaffold["prompt"]


def square_mask_losses(masks: torch.Tensor, truths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means over the masks of the BCE and dice losses of square images."""
    upscaled = F.interpolate(masks[:, None].float(), truths.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    bce, dice = mask_losses(upscaled, truths.float())
    return bce / len(masks), dice / len(masks)


def pad(sequences: list, value: int = 0, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Return token sequences padded to one length with `value`, and a mask that is 0 at the padding."""
    tensors = [torch.as_tensor(sequence) for sequence in sequences]
    masks = [torch.ones_like(tensor) for tensor in tensors]
    options = {"batch_first": True, "padding_side": side}
    return pad_sequence(tensors, padding_value=value, **options), pad_sequence(masks, **options)


class Conversations:
    """Draws batches of conversations: questions in words, and expressions with targets to be segmented."""

    def __init__(self, base, processor, images: Images, batch: int):
        self.base, self.processor, self.images, self.batch = base, processor, images, batch

    def __call__(self, random: np.random.Generator):
        """Return the images' numbers, ids, their mask, labels, the expressions of each conversation, and all their masks."""
        rows = random.integers(len(self.images.things), size=self.batch)
        turns, texts, truths = zip(*(self._conversation(random, row) for row in rows))
        encoded = self.base.encode(self.processor, list(turns))
        ids, mask = pad([ids for ids, _ in encoded])
        labels, _ = pad([labels for _, labels in encoded], value=-100)
        # Every second pixel is enough here and takes a quarter of the time.
        return torch.from_numpy(rows), ids, mask, labels, texts, torch.cat(truths)[:, ::2, ::2].clone()

    def _conversation(self, random, row):
        """Return a conversation, with the questions in words and the expressions in random order, the expressions and masks."""
        things = self.images.things[row]
        asked = [item for item in shapes.make_expressions(random, things, 6) if item[1]]
        asked = asked[: random.integers(1, len(asked) + 1)] if random.random() < 0.2 else asked
        words = [
            {"role": t["role"], "content": t["text"].replace("<image>\n", "")}
            for t in shapes.make_conversation(random, things)
        ]
        texts = [text for text, _ in asked]
        segment = self.processor.build_conversation(texts)
        segment[0]["content"] = segment[0]["content"].replace("<image>\n", "")
        turns = segment + words if random.random() < 0.6 else words + segment
        turns[0] = {"role": "user", "content": "<image>\n" + turns[0]["content"]}
        return turns, texts, torch.stack([self.images.mask(row, targets) for _, targets in asked])


def train_language(model, base, processor, teacher, images: Images, args, log):
    """Run stage 2 on stored features of the frozen towers."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for frozen in (
        model.model.vision_tower,
        model.sam.vision_encoder,
        model.sam.prompt_encoder,
        model.sam.shared_image_embedding,
    ):
        frozen.requires_grad_(False)
    if hasattr(model.sam, "no_memory_embedding"):
        model.sam.no_memory_embedding.requires_grad_(False)
    model.train()
    clip = Kept(lambda rows: [base.vision_features(model, images.clip[rows].float())], len(images.things))
    sam = Kept(lambda rows: encode_masks(model, images.sam[rows].float()), len(images.things))
    speaking = {
        "projector": model.model.multi_modal_projector, "language": model.model.language_model, "head": model.lm_head,
    }  # fmt: skip
    drawing = {"prompts": model.mask_projector, "decoder": model.sam.mask_decoder}
    draw = Conversations(base, processor, images, args.batch)
    prompts: list[torch.Tensor] = []
    model.mask_projector.register_forward_hook(lambda module, inputs, output: prompts.append(output))

    def word_losses(rows, ids, mask, labels, texts, truths):
        (features,) = clip(rows)
        outputs = model(input_ids=ids, attention_mask=mask, labels=labels, **base.kept_features(model, features))
        return {"ce": outputs.ce_loss}

    def losses(rows, ids, mask, labels, texts, truths):
        (features,), maps = clip(rows), sam(rows)
        prompts.clear()
        outputs = model(
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            sam_embeddings=maps if len(maps) > 1 else maps[0],
            **base.kept_features(model, features),
        )
        bce, dice = square_mask_losses(torch.cat(outputs.mask_logits), truths)
        parts = {"ce": outputs.ce_loss, "bce": 2.0 * bce, "dice": 0.5 * dice}
        if base.learns_prompts:
            with torch.no_grad():
                taught = teacher([base.words_of(text) for of_image in texts for text in of_image])
            parts["prompt"] = F.mse_loss(prompts[0], taught) / taught.var()
        return parts

    if "words" in base.steps:
        stage = Stage(
            "words", nn.ModuleDict(speaking), args.steps or base.steps["words"], 2e-3, args.work_dir, log, series=101
        )
        if args.stage in (None, "words"):
            stage.run(draw, word_losses)
    if args.stage in (None, "language"):
        trained = nn.ModuleDict({**speaking, **drawing})
        stage = Stage("language", trained, args.steps or base.steps["language"], 2e-3, args.work_dir, log)
        stage.run(draw, losses, lambda: evaluate(model, base, processor))


class Kept:
    """Outputs of frozen towers for images, computed when they are first asked for and kept in half precision."""

    def __init__(self, encode: Callable[[torch.Tensor], list[torch.Tensor]], count: int):
        self.encode, self.known, self.outputs = encode, torch.zeros(count, dtype=torch.bool), None

    @torch.no_grad()
    def __call__(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs for the images of these numbers, each (rows, ...)."""
        new = rows[~self.known[rows]].unique()
        if len(new):
            outputs = self.encode(new)
            if self.outputs is None:
                self.outputs = [part.new_empty(len(self.known), *part.shape[1:], dtype=torch.half) for part in outputs]
            for kept, part in zip(self.outputs, outputs):
                kept[new] = part.half()
            self.known[new] = True
        return [kept[rows].float() for kept in self.outputs]


def encode_masks(model, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the maps of the mask model's encoder."""
    maps = model.get_sam_embeddings(pixels)
    return [maps] if isinstance(maps, torch.Tensor) else maps


def evaluate(model, base, processor) -> dict[str, float]:
    """
    Return the share of right answers to existence questions, the mean IoU of masks and their share of 0.7 or more, of all
    expressions and of those that name a place, on images of another split.
    """
    model.eval()
    random = np.random.default_rng(7)
    right, ious, placed = [], [], []
    for start in range(0, 192, 64):
        batch, expressions, questions, truth, answers = [], [], [], [], []
        for index in range(start, start + 64):
            image, things = shapes.draw_picture(
                np.random.default_rng([IMAGE_SEED, shapes.SPLIT_CODES["test"], index, 0])
            )
            items = shapes.make_expressions(random, things)
            batch.append(image)
            expressions.append([text for text, targets in items if targets])
            truth.append([np.any([t.mask for t in targets], 0) for _, targets in items if targets])
            text, targets = items[random.integers(len(items))]
            question = {"role": "user", "content": f"<image>\nis there {text}?"}
            questions.append([[question, {"role": "assistant", "content": word}] for word in ("yes", "no")])
            answers.append(bool(targets))
        inputs = processor(images=batch, expressions=expressions, return_tensors="pt")
        results = processor.post_process_segmentation(model.segment(**inputs), inputs)
        for texts, entries, masks in zip(expressions, results, truth):
            ious += [(e["mask"] & m).sum() / (e["mask"] | m).sum() for e, m in zip(entries, masks)]
            placed += [any(word in text.split() for word in PLACES) for text in texts]
        encoded = [base.encode(processor, both) for both in questions]
        begins = [next(n for n, label in enumerate(both[0][1]) if label != -100) for both in encoded]
        yes, no = (encoded[0][n][0][begins[0]] for n in (0, 1))
        ids, mask = pad([both[0][0][:begin] for both, begin in zip(encoded, begins)], side="left")
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                pixel_values=inputs["pixel_values"], logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
        answers_yes = logits[:, yes] > logits[:, no]
        right += (answers_yes == torch.tensor(answers)).tolist()
    model.train()
    ious, placed = np.asarray(ious), np.asarray(placed)
    figures = {"existence": np.mean(right), "mask_iou": ious.mean(), "precision_0.7": (ious >= 0.7).mean()}
    figures |= {"place_iou": ious[placed].mean(), "place_precision_0.7": (ious[placed] >= 0.7).mean()}
    return {name: round(float(value), 4) for name, value in figures.items()}


class Log(list):
    """A list of log entries that is also a file with one JSON object per line."""

    def __init__(self, path: Path):
        super().__init__(
            json.loads(line) for line in path.read_text().splitlines()
        ) if path.exists() else super().__init__()
        self.path = path

    def append(self, entry: dict) -> None:
        super().append(entry)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(BASES), default="llava_v1", help="the parts of the base")
    stages = sorted({stage for kind in BASES.values() for stage in kind.steps})
    parser.add_argument("--stage", choices=stages, help="run this stage alone and save no base")
    parser.add_argument("--output_dir", type=Path, help="by default the base's folder in assets")
    parser.add_argument(
        "--work_dir",
        type=Path,
        help="folder of the checkpoints, to resume from; by default runs/base or runs/base_ARCH",
    )
    parser.add_argument("--images", type=int, default=24000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, help="of every stage, in place of the base's own numbers")
    args = parser.parse_args(argv)
    base = BASES[args.arch]()
    if args.stage is not None and args.stage not in base.steps:
        parser.error(f"--stage {args.stage}: the stages of --arch {args.arch} are {', '.join(base.steps)}")
    args.output_dir = args.output_dir or Path(base.output_dir)
    args.work_dir = args.work_dir or Path(base.work_dir)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    start = time.time()
    torch.manual_seed(IMAGE_SEED)
    processor = base.build_processor()
    model = base.build_model(base.build_config(processor))
    log = Log(args.work_dir / "log.jsonl")
    images = Images(base.image_preparation(model.config, processor), args.images, args.work_dir / "images.pt")
    teacher = train_towers(model, base, images, args, log)
    train_language(model, base, processor, teacher, images, args, log)
    if args.stage is not None:
        return
    log.append({"stage": "done", "seconds_of_this_start": round(time.time() - start)})
    save_base(model, base, processor, args.output_dir, log)


def save_base(model, base, processor, output_dir: Path, log: list) -> None:
    """Save model, processor and training log, without a copy of the code."""
    model = model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(**base.generation_config)
    output_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    leave_code_out(output_dir)
    write_text(output_dir / "training_log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))


def leave_code_out(directory: Path) -> None:
    """Remove the copy of the code from a saved directory, because the project beside it holds the current version."""

    code_names = ("auto_map", "custom_pipelines")

    def without_code(value):
        if isinstance(value, dict):
            return {name: without_code(entry) for name, entry in value.items() if name not in code_names}
        return value

    for code in directory.glob("*.py"):
        code.unlink()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        content = without_code(json.loads((directory / name).read_text()))
        write_text(directory / name, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
