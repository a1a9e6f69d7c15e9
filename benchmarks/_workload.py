"""The workload M of `benchmarks/eval.py` and `benchmarks/train.py`: models, rows, times of stages, and the machine's load."""

import json
import os
import platform
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.sam.modeling_sam import SamMaskDecoder

from benchmarks._mask_models import SMALL_VIT, vit_config
from data_scripts.files import write_text
from data_scripts.schema import encode_mask
from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaImageProcessor, GsvaProcessor
from modeling_gsva.image_processing_gsva import sam_preparation
from modeling_gsva.processing_gsva import ADDED_TOKENS, CHAT_TEMPLATES, PROMPTS

RESULTS = Path(__file__).resolve().parent / "results"
THREADS, SEED, VOCABULARY = 2, 0, 32004
SIZES = [(640, 480), (480, 640), (640, 427), (500, 375), (640, 640), (612, 612)]  # (width, height), in turn
PHRASES = [["the man in the red shirt", "both dogs on the grass", "a purple unicorn", "the left chair"],
           ["a woman holding an umbrella", "the two cups", "the airplane above", "a brown horse"],
           ["the boy with a bat", "all three boats", "a snowman", "the traffic light on the right"]]  # fmt: skip
TARGETS = [1, 2, 0, 1]  # of the four expressions: single, double, no-target, single


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the prompts, so that they are about as long as with LLaMA's tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    wording = [
        CHAT_TEMPLATES["llava_v1"],
        PROMPTS["refer"]["question"],
        *(text for texts in PHRASES for text in texts),
    ]
    tokenizer.train_from_iterator(wording * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                      clean_up_tokenization_spaces=False)  # fmt: skip
    wrapped.add_tokens(list(ADDED_TOKENS))
    return wrapped


class PlainMaskDecoder(SamMaskDecoder):
    """transformers' mask decoder, which gets a copy of the image embedding for every slot."""

    def forward(self, embeddings, positions, prompts, no_mask, multimask_output, slot_images=None):
        if slot_images is None:
            return super().forward(embeddings, positions, prompts, no_mask, multimask_output)
        masks, iou = super().forward(
            embeddings[slot_images],
            positions.expand(len(prompts), -1, -1, -1),
            prompts[:, None],
            no_mask,
            multimask_output,
        )
        return masks[:, 0], iou[:, 0]


def make_models() -> tuple[GsvaForConditionalGeneration, GsvaForConditionalGeneration, GsvaProcessor]:
    """Return two models with the same weights, and the processor.

    The first is this project's model. The second has transformers' eager attention in SAM and transformers' mask decoder.
    """
    ours, processor = make_model(vit_config(*SMALL_VIT))
    plain = GsvaForConditionalGeneration._from_config(ours.config, attn_implementation={"sam_config": "eager"}).eval()
    plain.load_state_dict(ours.state_dict())
    plain.sam.mask_decoder.__class__ = PlainMaskDecoder
    return ours, plain, processor


def make_model(sam_config: PreTrainedConfig) -> tuple[GsvaForConditionalGeneration, GsvaProcessor]:
    """Return this project's model with a mask model, and the processor."""
    image_processor = GsvaImageProcessor(**sam_preparation(sam_config))
    processor = GsvaProcessor(image_processor, make_tokenizer(), patch_size=14)
    config = GsvaConfig(
        vision_config=CLIPVisionConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
                                       image_size=224, patch_size=14),
        text_config=LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                                vocab_size=VOCABULARY, initializer_range=0.05),
        sam_config=sam_config,
        image_token_id=processor.image_token_id, seg_token_id=processor.seg_token_id, rej_token_id=processor.rej_token_id,
    )  # fmt: skip
    torch.manual_seed(SEED)
    ours = GsvaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in ours.sam.vision_encoder.named_parameters():
            if (
                "rel_pos" in name or "pos_embed" in name
            ):  # initialized with zeros, which would hide an error in the bias
                parameter.normal_(std=0.2)
        weights = ours.lm_head.weight[[processor.seg_token_id, processor.rej_token_id]]
        mean = slot_states(ours, processor, make_rows(4)).mean(0)
        # A random model would predict neither token, or always the same one, and there would be no decisions to compare.
        # These weights make both tokens likely at every slot; the state's difference from the mean decides between them.
        weights -= torch.outer(weights @ mean, mean) / mean.square().sum()
        ours.lm_head.weight[[processor.seg_token_id, processor.rej_token_id]] = 20 * (weights + mean / mean.norm())
    return ours, processor


def make_rows(count: int) -> list[dict]:
    """Return `count` rows of the data schema: images of smooth noise, with boxes as targets."""
    rows, draw = [], np.random.default_rng(SEED)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        small = draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        entries = []
        for text, targets in zip(PHRASES[number % len(PHRASES)], TARGETS, strict=True):
            mask = np.zeros((height, width), np.uint8)
            for _ in range(targets):
                top, left = draw.integers(0, height // 2), draw.integers(0, width // 2)
                mask[top : top + height // 3, left : left + width // 4] = 1
            entries.append({"text": text, "is_sentence": False, "num_targets": targets, "mask": encode_mask(mask)})
        rows.append({"image": Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC),
                     "image_id": str(number), "height": height, "width": width, "expressions": entries})  # fmt: skip
    return rows


def slot_states(model, processor, rows) -> torch.Tensor:
    """Return the states (slots, hidden) that predict the slots of the rows' answers."""
    inputs = processor(images=[row["image"] for row in rows], return_tensors="pt",
                       expressions=[[entry["text"] for entry in row["expressions"]] for row in rows])  # fmt: skip
    ids = torch.cat([inputs["input_ids"], inputs["answer_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], inputs["answer_attention_mask"]], 1)
    hidden = model.model(ids, mask, inputs["pixel_values"]).last_hidden_state
    slots = model.find_slots(ids)
    return hidden[slots[:, 0], slots[:, 1] - 1]


def parts_of(model: GsvaForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """Return the modules of each part whose time is measured."""
    return {"SAM encoder": [model.sam.vision_encoder], "CLIP": [model.model.vision_tower],
            "language model": [model.model.language_model, model.lm_head], "mask decoder": [model.sam.mask_decoder]}  # fmt: skip


@contextmanager
def stages(parts: dict[str, list[nn.Module]]):
    """Measure the seconds in the forward pass of each part, by name. "all" is the time of the whole `with` block."""
    seconds, begun, hooks = defaultdict(float), {}, []
    for name, modules in parts.items():
        for module in modules:
            hooks.append(module.register_forward_pre_hook(lambda *_, n=name: begun.update({n: _now()})))
            hooks.append(
                module.register_forward_hook(lambda *_, n=name: seconds.update({n: seconds[n] + _now() - begun[n]}))
            )
    start = _now()
    try:
        yield seconds
    finally:
        seconds["all"] = _now() - start
        for hook in hooks:
            hook.remove()


def _now() -> float:
    """Return the time when the work given to a GPU until now is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Elsewhere:
    """Measures the share of the machine's cores that other processes use, from the creation of this object on."""

    def __init__(self):
        self.begun, self.before = time.perf_counter(), self._busy()

    def _busy(self) -> float:
        machine, mine = psutil.cpu_times(), psutil.Process().cpu_times()
        return machine.user + machine.system + machine.nice - mine.user - mine.system

    def share(self) -> float:
        cores = os.cpu_count() or 1
        return (self._busy() - self.before) / (time.perf_counter() - self.begun) / cores


def machine(elsewhere: Elsewhere) -> dict:
    """Return the facts of the machine, and the load that other processes put on it during the measurement."""
    return {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__,
            "busy_elsewhere": round(elsewhere.share(), 3)}  # fmt: skip


def busy_line(result: dict) -> str:
    busy = result["machine"]["busy_elsewhere"]
    return f"other processes used {100 * busy:.0f} % of the machine" + (": measure again" if busy > 0.1 else "")


def write_result(name: str, result: dict) -> None:
    """Write `benchmarks/results/NAME.json`."""
    write_text(RESULTS / f"{name}.json", json.dumps(result, indent=1) + "\n")
