"""
Train the embedded base model, `assets/tiny_gsva`: a small GSVA before generalized fine-tuning, like LLaVA and SAM before GSVA.

    python assets/make_tiny_gsva.py            # or: make base

It has two stages, and each resumes at its last checkpoint in `--work_dir`:

1. *towers*: both image encoders learn the colour, shape and size of each patch, and SAM's decoder learns to segment things by
   their attributes, as CLIP and SAM are pretrained. They are frozen afterwards.
2. *language*: projector, language model and mask prompts learn to answer questions in words (is there a …? what is there
   from left to right?) and to segment expressions with one or several targets. Expressions without a target do not occur,
   and `[REJ]` is never an answer: the generalized fine-tuning of `configs/demo.yaml` teaches rejection.
"""

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers import trainers as tokenizer_trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast, SamConfig

from data_scripts import shapes
from data_scripts.files import replacing, write_text
from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaImageProcessor, GsvaProcessor
from modeling_gsva.modeling_gsva import mask_losses
from modeling_gsva.processing_gsva import ADDED_TOKENS, CHAT_TEMPLATES

# The images of the demo are drawn with seed 0, those of the base with another one.
IMAGE_SEED = 1
IMAGE_SIDE, PATCH = 64, 8
GRID = IMAGE_SIDE // PATCH
PROMPTS = {
    "refer": {
        "question": "<image>\nsegment {expressions}.",
        "answer": "{slots}.",
        "slot": "{expression}:{token}",
        "separator": ", ",
        "lower": True,
    }
}
COLOURS, SHAPES, SIZES = list(shapes.COLOURS), list(shapes.SHAPES), list(shapes.RADII)
NUM_CLASSES = 1 + len(COLOURS) * len(SHAPES) * len(SIZES)  # 0 is background


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer in which the words of *shapes* are single tokens."""
    corpus = []
    for index in range(2000):
        row = shapes.make_row(IMAGE_SEED, "train", index, "vqa")
        corpus += [turn["text"].replace("<image>\n", "\n") for turn in row["conversation"]]
    corpus += ["USER: \nsegment the red circle. ASSISTANT: the red circle:"] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        tokenizer_trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    wrapped.add_tokens(list(ADDED_TOKENS), special_tokens=False)
    return wrapped


def build_processor() -> GsvaProcessor:
    """Return the processor of the embedded base."""
    image_processor = GsvaImageProcessor(
        size={"shortest_edge": IMAGE_SIDE},
        crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        sam_size={"longest_edge": IMAGE_SIDE},
    )
    return GsvaProcessor(
        image_processor, build_tokenizer(), patch_size=PATCH, chat_template=CHAT_TEMPLATES["plain"], prompts=PROMPTS
    )


def build_config(processor: GsvaProcessor) -> GsvaConfig:
    """Return the configuration of the embedded base, which has about two million parameters."""
    vocab_size = len(processor.tokenizer) - 1  # <image> has no embedding, as in the original
    return GsvaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE_SIDE,
            patch_size=PATCH, projection_dim=96,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        sam_config=SamConfig(
            vision_config={
                "hidden_size": 96, "output_channels": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                "image_size": IMAGE_SIDE, "patch_size": PATCH, "window_size": 0, "global_attn_indexes": [0, 1, 2],
                "num_pos_feats": 32, "mlp_dim": 384, "initializer_range": 0.02,
            },
            prompt_encoder_config={"hidden_size": 64, "image_size": IMAGE_SIDE, "patch_size": PATCH},
            mask_decoder_config={
                "hidden_size": 64, "mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64,
                "layer_norm_eps": 1e-5,
            },
        ),
        image_token_id=processor.image_token_id,
        seg_token_id=processor.seg_token_id,
        rej_token_id=processor.rej_token_id,
        # Do not drop the last of only three layers: they are trained here as one tower.
        vision_feature_layer=-1,
    )  # fmt: skip


def _draw(index: int):
    """Return an image, its things without masks, and a map with the number of the thing at each pixel."""
    image, things = shapes.draw_picture(np.random.default_rng([IMAGE_SEED, shapes.SPLIT_CODES["train"], index, 0]))
    owner = np.zeros((image.height, image.width), dtype=np.uint8)
    for number, thing in enumerate(things, start=1):
        owner[thing.mask] = number
    light = [shapes.Thing(t.colour, t.shape, t.size, t.x, t.y, np.asarray(n)) for n, t in enumerate(things, start=1)]
    return image, light, owner


class Images:
    """All training images in memory, as the towers take them."""

    def __init__(self, processor: GsvaProcessor, count: int):
        self.things, owners, clip, sam = [], [], [], []
        with multiprocessing.Pool(2) as pool:
            for image, things, owner in tqdm(
                pool.imap(_draw, range(count), chunksize=64), "drawing", count, leave=False
            ):
                tensors = processor.image_processor(image, return_tensors="pt")
                clip.append(tensors["pixel_values"][0].half())
                sam.append(tensors["sam_pixel_values"][0].half())
                self.things.append(things)
                owners.append(torch.from_numpy(owner))
        self.clip, self.sam, self.owners = torch.stack(clip), torch.stack(sam), torch.stack(owners)
        classes = torch.zeros(count, 8, dtype=torch.long)  # thing number → class
        for n, things in enumerate(self.things):
            for k, t in enumerate(things, start=1):
                combined = (COLOURS.index(t.colour) * len(SHAPES) + SHAPES.index(t.shape)) * len(SIZES) + SIZES.index(
                    t.size
                )
                classes[n, k] = 1 + combined
        self.classes = classes
        # A patch belongs to the thing that covers most of it; patches covered by less than a quarter are background.
        cell = self.owners.shape[-1] // GRID
        cells = self.owners.reshape(count, GRID, cell, GRID, cell).permute(0, 1, 3, 2, 4).flatten(3)
        shares = torch.stack([(cells == number).float().mean(-1) for number in range(1, 5)], -1)
        best = shares.max(-1)
        self.patches = torch.where(best.values > 0.25, best.indices + 1, 0)  # (count, GRID, GRID)

    def mask(self, image: int, things: list[shapes.Thing]) -> torch.Tensor:
        """Return the mask of some things of an image."""
        return torch.isin(self.owners[image], torch.tensor([int(thing.mask) for thing in things], dtype=torch.uint8))


class Stage:
    """A training stage that can be resumed: warm-up and cosine schedule, checkpoints, a log line every 50 steps."""

    def __init__(
        self, name, modules: nn.Module, steps: int, lr: float, work_dir: Path, log: list, save_every: int = 200
    ):
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

    def run(self, losses, evaluate=None):
        """Train. `losses(random)` returns the loss parts; its generator depends on seed and step alone."""
        bar = tqdm(range(self.step, self.steps), self.name, initial=self.step, total=self.steps, mininterval=10)
        sums, start = dict[str, list[float]](), time.time()
        for step in bar:
            warm, turn = min(1.0, (step + 1) / 100), math.pi * step / self.steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * warm * (0.02 + 0.98 * (1 + math.cos(turn)) / 2)
            parts = losses(np.random.default_rng([IMAGE_SEED, 100, step]))
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


def train_towers(model, images: Images, args, log):
    """Run stage 1. Its classifiers and attribute prompts are not part of the model and are discarded."""
    width = model.config.sam_config.prompt_encoder_config.hidden_size
    scaffold = nn.ModuleDict(
        {
            "clip": nn.Linear(model.config.vision_config.hidden_size, NUM_CLASSES),
            "sam": nn.Linear(width, NUM_CLASSES),
            "prompt": nn.EmbeddingBag(len(COLOURS) + len(SHAPES) + len(SIZES), width, mode="sum"),
        }
    )
    trained = nn.ModuleDict(
        {"vision": model.model.vision_tower, "encoder": model.sam.vision_encoder, "decoder": model.sam.mask_decoder}
    )
    stage = Stage(
        "towers", nn.ModuleDict({**trained, "scaffold": scaffold}), args.tower_steps, 2e-3, args.work_dir, log
    )
    saved_projector, model.mask_projector = model.mask_projector, nn.Identity()

    def losses(random):
        rows = torch.from_numpy(random.integers(len(images.things), size=args.batch))
        targets = torch.gather(images.classes[rows], 1, images.patches[rows].flatten(1)).flatten()
        clip = model.model.get_vision_features(images.clip[rows].float())
        embeddings = model.get_sam_embeddings(images.sam[rows].float())
        prompts, image_index, truths = [], [], []
        for n, row in enumerate(rows.tolist()):
            things = images.things[row]
            for _ in range(2):
                thing = things[random.integers(len(things))]
                named = random.random(3) < (0.6, 0.6, 0.25)
                if not named.any():
                    named[random.integers(2)] = True
                attributes = [a for a, used in zip((thing.colour, thing.shape, thing.size), named) if used]
                same = [t for t in things if all(a in (t.colour, t.shape, t.size) for a in attributes)]
                prompts.append([(COLOURS + SHAPES + SIZES).index(a) for a in attributes])
                image_index.append(n)
                truths.append(images.mask(row, same))
        offsets = torch.tensor([0, *np.cumsum([len(p) for p in prompts])[:-1].tolist()])
        states = scaffold["prompt"](torch.tensor([a for p in prompts for a in p]), offsets)
        masks, _ = model.decode_masks(states, embeddings, torch.tensor(image_index))
        bce, dice = square_mask_losses(masks, torch.stack(truths))
        return {
            "clip": F.cross_entropy(scaffold["clip"](clip).flatten(0, 1), targets),
            "sam": F.cross_entropy(scaffold["sam"](embeddings.flatten(2).transpose(1, 2)).flatten(0, 1), targets),
            "bce": 2.0 * bce,
            "dice": 0.5 * dice,
        }

    model.train()
    stage.run(losses)
    model.mask_projector = saved_projector


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


def train_language(model, processor, images: Images, args, log):
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
    model.eval()
    with torch.no_grad():
        batches = tqdm(range(0, len(images.things), 256), "features", leave=False)
        spans = [slice(n, n + 256) for n in batches]
        clip = torch.cat([model.model.get_vision_features(images.clip[span].float()).half() for span in spans])
        sam = torch.cat([model.get_sam_embeddings(images.sam[span].float()).half() for span in spans])
    model.train()
    trained = nn.ModuleDict(
        {
            "projector": model.model.multi_modal_projector, "language": model.model.language_model,
            "head": model.lm_head, "prompts": model.mask_projector, "decoder": model.sam.mask_decoder,
        }
    )  # fmt: skip
    stage = Stage("language", trained, args.language_steps, 2e-3, args.work_dir, log)

    def conversation(random, row):
        """Return a conversation with turns in words and a turn of expressions with targets, in random order, and the masks."""
        things = images.things[row]
        asked = [item for item in shapes.make_expressions(random, things, 6) if item[1]]
        asked = asked[: random.integers(1, len(asked) + 1)] if random.random() < 0.2 else asked
        words = [
            {"role": t["role"], "content": t["text"].replace("<image>\n", "")}
            for t in shapes.make_conversation(random, things)
        ]
        segment = processor.build_conversation([text for text, _ in asked])
        segment[0]["content"] = segment[0]["content"].replace("<image>\n", "")
        turns = segment + words if random.random() < 0.6 else words + segment
        turns[0] = {"role": "user", "content": "<image>\n" + turns[0]["content"]}
        return turns, torch.stack([images.mask(row, targets) for _, targets in asked])

    def losses(random):
        rows = random.integers(len(images.things), size=args.batch)
        turns, truths = zip(*(conversation(random, row) for row in rows))
        encoded = processor.encode_conversations(list(turns))
        ids, mask = pad([ids for ids, _ in encoded])
        labels, _ = pad([labels for _, labels in encoded], value=-100)
        rows = torch.from_numpy(rows)
        outputs = model(
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            vision_features=clip[rows].float(),
            sam_embeddings=sam[rows].float(),
        )
        # Every second pixel is enough here and takes a quarter of the time.
        bce, dice = square_mask_losses(torch.cat(outputs.mask_logits), torch.cat(truths)[:, ::2, ::2])
        return {"ce": outputs.ce_loss, "bce": 2.0 * bce, "dice": 0.5 * dice}

    stage.run(losses, lambda: evaluate(model, processor))


def evaluate(model, processor) -> dict[str, float]:
    """Return the share of right answers to existence questions and the mean IoU of masks, on images of another split."""
    model.eval()
    random = np.random.default_rng(7)
    right, ious = [], []
    yes, no = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][-1] for word in (" yes", " no"))
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
            questions.append([question, {"role": "assistant", "content": "yes"}])
            answers.append(bool(targets))
        inputs = processor(images=batch, expressions=expressions, return_tensors="pt")
        results = processor.post_process_segmentation(model.segment(**inputs), inputs)
        for entries, masks in zip(results, truth):
            ious += [(e["mask"] & m).sum() / (e["mask"] | m).sum() for e, m in zip(entries, masks)]
        encoded = processor.encode_conversations(questions)
        ids, mask = pad([ids[:-2] for ids, _ in encoded], side="left")  # without "yes</s>"
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                pixel_values=inputs["pixel_values"], logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
        answers_yes = logits[:, yes] > logits[:, no]
        right += (answers_yes == torch.tensor(answers)).tolist()
    model.train()
    return {"existence": round(float(np.mean(right)), 4), "mask_iou": round(float(np.mean(ious)), 4)}


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
    parser.add_argument("--output_dir", type=Path, default=Path("assets/tiny_gsva"))
    parser.add_argument(
        "--work_dir", type=Path, default=Path("runs/base"), help="folder of the checkpoints, to resume from"
    )
    parser.add_argument("--images", type=int, default=24000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tower_steps", type=int, default=2000)
    parser.add_argument("--language_steps", type=int, default=2300)
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    start = time.time()
    torch.manual_seed(IMAGE_SEED)
    processor = build_processor()
    model = GsvaForConditionalGeneration(build_config(processor))
    log = Log(args.work_dir / "log.jsonl")
    images = Images(processor, args.images)
    train_towers(model, images, args, log)
    train_language(model, processor, images, args, log)
    log.append({"stage": "done", "seconds_of_this_start": round(time.time() - start)})
    save_base(model, processor, args.output_dir, log)


def save_base(model, processor, output_dir: Path, log: list) -> None:
    """Save model, processor and training log, without a copy of the code."""
    model = model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_new_tokens=128)
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
