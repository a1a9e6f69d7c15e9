"""
Makes the embedded base, `assets/tiny_gsva`: a small GSVA before generalised fine-tuning, as LLaVA and SAM are before GSVA.

    python assets/make_tiny_gsva.py            # or: make base

Two stages, each resumable from its last checkpoint in `--work_dir`:

1. *towers*: both image encoders learn colour, shape and size patch by patch, and SAM's decoder learns to draw what an
   attribute prompt names, as CLIP and SAM are pretrained before anything else. They are frozen from then on.
2. *language*: projector, language model and mask prompts learn to answer questions in words (is there a …? what is there
   from left to right?) and to segment what *is* there, one or several targets. Nothing absent is ever asked to be
   segmented and `[REJ]` is never said: rejecting is what the generalised fine-tuning of `configs/demo.yaml` teaches.
"""

import argparse
import json
import math
import multiprocessing
import os
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
from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaImageProcessor, GsvaProcessor
from modeling_gsva.modeling_gsva import mask_losses
from modeling_gsva.processing_gsva import ADDED_TOKENS, CHAT_TEMPLATES

# The pictures of the demo are drawn with seed 0; the base sees others.
PICTURE_SEED = 1
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
    """A byte-level BPE: the words of *shapes* are single tokens, any other text falls apart into smaller ones."""
    corpus = []
    for index in range(2000):
        row = shapes.make_row(PICTURE_SEED, "train", index, "vqa")
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
    image_processor = GsvaImageProcessor(
        size={"shortest_edge": IMAGE_SIDE},
        crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        sam_size={"longest_edge": IMAGE_SIDE},
    )
    return GsvaProcessor(
        image_processor, build_tokenizer(), patch_size=PATCH, chat_template=CHAT_TEMPLATES["plain"], prompts=PROMPTS
    )


def build_config(processor: GsvaProcessor) -> GsvaConfig:
    """Sizes of the embedded base: about two million parameters."""
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
        # Only three layers, all trained as one tower here: nothing is gained by dropping the last.
        vision_feature_layer=-1,
    )  # fmt: skip


def _draw(index: int):
    """A picture as uint8, its things without masks, and one map of which thing is where (they never overlap)."""
    image, things = shapes.draw_picture(np.random.default_rng([PICTURE_SEED, shapes.SPLIT_CODES["train"], index, 0]))
    owner = np.zeros((image.height, image.width), dtype=np.uint8)
    for number, thing in enumerate(things, start=1):
        owner[thing.mask] = number
    light = [shapes.Thing(t.colour, t.shape, t.size, t.x, t.y, np.asarray(n)) for n, t in enumerate(things, start=1)]
    return image, light, owner


class Pictures:
    """All training pictures in memory, ready for the towers."""

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

    def mask(self, picture: int, things: list[shapes.Thing]) -> torch.Tensor:
        return torch.isin(self.owners[picture], torch.tensor([int(thing.mask) for thing in things], dtype=torch.uint8))


class Stage:
    """A resumable training stage: fixed steps, warm-up and cosine, a checkpoint now and then, a log line every 50 steps."""

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
        state = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def run(self, losses, evaluate=None):
        """`losses(random)` gives a dict of loss parts, from a generator that depends on seed and step alone."""
        bar = tqdm(range(self.step, self.steps), self.name, initial=self.step, total=self.steps, mininterval=10)
        sums, begun = dict[str, list[float]](), time.time()
        for step in bar:
            warm, turn = min(1.0, (step + 1) / 100), math.pi * step / self.steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * warm * (0.02 + 0.98 * (1 + math.cos(turn)) / 2)
            parts = losses(np.random.default_rng([PICTURE_SEED, 100, step]))
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
                entry["seconds_per_step"] = round((time.time() - begun) / max(len(next(iter(sums.values()))), 1), 3)
                if evaluate is not None and (self.step % 300 == 0 or self.step == self.steps):
                    entry.update(evaluate())
                self.log.append(entry)
                tqdm.write(json.dumps(entry))
                sums, begun = {}, time.time()
            if self.step % self.save_every == 0 or self.step == self.steps:
                self.save()


def train_towers(model, pictures: Pictures, args, log):
    """Stage 1. The classifiers and the attribute prompts are scaffolding, thrown away afterwards."""
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
        rows = torch.from_numpy(random.integers(len(pictures.things), size=args.batch))
        targets = torch.gather(pictures.classes[rows], 1, pictures.patches[rows].flatten(1)).flatten()
        clip = model.model.get_vision_features(pictures.clip[rows].float())
        embeddings = model.get_sam_embeddings(pictures.sam[rows].float())
        prompts, images, truths = [], [], []
        for n, row in enumerate(rows.tolist()):
            things = pictures.things[row]
            for _ in range(2):
                thing = things[random.integers(len(things))]
                named = random.random(3) < (0.6, 0.6, 0.25)
                if not named.any():
                    named[random.integers(2)] = True
                wanted = [a for a, used in zip((thing.colour, thing.shape, thing.size), named) if used]
                same = [t for t in things if all(a in (t.colour, t.shape, t.size) for a in wanted)]
                prompts.append([(COLOURS + SHAPES + SIZES).index(a) for a in wanted])
                images.append(n)
                truths.append(pictures.mask(row, same))
        offsets = torch.tensor([0, *np.cumsum([len(p) for p in prompts])[:-1].tolist()])
        states = scaffold["prompt"](torch.tensor([a for p in prompts for a in p]), offsets)
        masks, _ = model.decode_masks(states, embeddings, torch.tensor(images))
        bce, dice = picture_mask_losses(masks, torch.stack(truths))
        return {
            "clip": F.cross_entropy(scaffold["clip"](clip).flatten(0, 1), targets),
            "sam": F.cross_entropy(scaffold["sam"](embeddings.flatten(2).transpose(1, 2)).flatten(0, 1), targets),
            "bce": 2.0 * bce,
            "dice": 0.5 * dice,
        }

    model.train()
    stage.run(losses)
    model.mask_projector = saved_projector


def picture_mask_losses(masks: torch.Tensor, truths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over the masks of the BCE and dice losses of square pictures."""
    upscaled = F.interpolate(masks[:, None].float(), truths.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    bce, dice = mask_losses(upscaled, truths.float())
    return bce / len(masks), dice / len(masks)


def train_language(model, processor, pictures: Pictures, args, log):
    """Stage 2, over kept features of the frozen towers."""
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
        batches = tqdm(range(0, len(pictures.things), 256), "features", leave=False)
        spans = [slice(n, n + 256) for n in batches]
        clip = torch.cat([model.model.get_vision_features(pictures.clip[span].float()).half() for span in spans])
        sam = torch.cat([model.get_sam_embeddings(pictures.sam[span].float()).half() for span in spans])
    model.train()
    trained = nn.ModuleDict(
        {
            "projector": model.model.multi_modal_projector, "language": model.model.language_model,
            "head": model.lm_head, "prompts": model.mask_projector, "decoder": model.sam.mask_decoder,
        }
    )  # fmt: skip
    stage = Stage("language", trained, args.language_steps, 2e-3, args.work_dir, log)

    def conversation(random, row):
        """Rounds in words, and one of expressions that all have a target, in random order."""
        things = pictures.things[row]
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
        return turns, torch.stack([pictures.mask(row, targets) for _, targets in asked])

    def losses(random):
        rows = random.integers(len(pictures.things), size=args.batch)
        turns, truths = zip(*(conversation(random, row) for row in rows))
        encoded = processor.encode_conversations(list(turns))
        inputs = processor.tokenizer.pad(
            {"input_ids": [ids for ids, _ in encoded]}, padding_side="right", return_tensors="pt"
        )
        labels = [torch.tensor(labels) for _, labels in encoded]
        rows = torch.from_numpy(rows)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=pad_sequence(labels, batch_first=True, padding_value=-100),
            vision_features=clip[rows].float(),
            sam_embeddings=sam[rows].float(),
        )
        # Every second pixel is enough here, and a quarter of the work.
        bce, dice = picture_mask_losses(torch.cat(outputs.mask_logits), torch.cat(truths)[:, ::2, ::2])
        return {"ce": outputs.ce_loss, "bce": 2.0 * bce, "dice": 0.5 * dice}

    def evaluate():
        """On pictures that no stage trains on: existence questions answered rightly, IoU of the masks."""
        model.eval()
        random = np.random.default_rng(7)
        right, ious = [], []
        yes, no = (processor.tokenizer(word, add_special_tokens=False)["input_ids"][-1] for word in (" yes", " no"))
        for start in range(0, 192, 64):
            images, asked, questions, truth, answers = [], [], [], [], []
            for index in range(start, start + 64):
                image, things = shapes.draw_picture(
                    np.random.default_rng([PICTURE_SEED, shapes.SPLIT_CODES["test"], index, 0])
                )
                items = shapes.make_expressions(random, things)
                images.append(image)
                asked.append([text for text, targets in items if targets])
                truth.append([np.any([t.mask for t in targets], 0) for _, targets in items if targets])
                text, targets = items[random.integers(len(items))]
                question = {"role": "user", "content": f"<image>\nis there {text}?"}
                questions.append([question, {"role": "assistant", "content": "yes"}])
                answers.append(bool(targets))
            inputs = processor(images=images, expressions=asked, return_tensors="pt")
            results = processor.post_process_segmentation(model.segment(**inputs), inputs)
            for entries, masks in zip(results, truth):
                ious += [(e["mask"] & m).sum() / (e["mask"] | m).sum() for e, m in zip(entries, masks)]
            encoded = processor.encode_conversations(questions)
            prompts = {"input_ids": [ids[:-2] for ids, _ in encoded]}  # up to before "yes</s>"
            padded = processor.tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
            ids, mask = padded["input_ids"], padded["attention_mask"]
            with torch.no_grad():
                logits = model(
                    input_ids=ids, attention_mask=mask,
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                    pixel_values=inputs["pixel_values"], logits_to_keep=1,
                ).logits[:, -1]  # fmt: skip
            said = logits[:, yes] > logits[:, no]
            right += (said == torch.tensor(answers)).tolist()
        model.train()
        return {"existence": round(float(np.mean(right)), 4), "mask_iou": round(float(np.mean(ious)), 4)}

    stage.run(losses, evaluate)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("assets/tiny_gsva"))
    parser.add_argument("--work_dir", type=Path, default=Path("runs/base"), help="checkpoints, to resume from")
    parser.add_argument("--pictures", type=int, default=24000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tower_steps", type=int, default=2000)
    parser.add_argument("--language_steps", type=int, default=2300)
    args = parser.parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    torch.manual_seed(PICTURE_SEED)
    processor = build_processor()
    model = GsvaForConditionalGeneration(build_config(processor))
    log_path = args.work_dir / "log.jsonl"
    log = [json.loads(line) for line in log_path.read_text().splitlines()] if log_path.exists() else []

    class Log(list):
        def append(self, entry):
            super().append(entry)
            with open(log_path, "a") as file:
                file.write(json.dumps(entry) + "\n")

    log = Log(log)
    pictures = Pictures(processor, args.pictures)
    train_towers(model, pictures, args, log)
    train_language(model, processor, pictures, args, log)
    log.append({"stage": "done", "seconds_of_this_start": round(time.time() - begun)})
    save_base(model, processor, args.output_dir, log)


def save_base(model, processor, output_dir: Path, log: list) -> None:
    model = model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, max_new_tokens=128)
    output_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    leave_code_out(output_dir)
    (output_dir / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))


def leave_code_out(directory: Path) -> None:
    """Beside the project a saved directory needs no copy of its code: a second one would only grow stale."""

    code_names = ("auto_map", "custom_pipelines")

    def without_code(value):
        if isinstance(value, dict):
            return {name: without_code(entry) for name, entry in value.items() if name not in code_names}
        return value

    for code in directory.glob("*.py"):
        code.unlink()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        content = without_code(json.loads((directory / name).read_text()))
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
