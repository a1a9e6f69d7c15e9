"""How fast evaluation is, stage by stage, beside a plain road of the original's cost.

    python -m benchmarks eval [--quick]

Workload M: random weights from a fixed seed in fp32 on two threads, 12 pictures of COCO's sizes with 4 expressions each. The
plain road is the original's: SAM's attention as transformers' eager one, CLIP and the language model twice for every
picture (the second time with every slot `[SEG]`), logits at every position, one picture at a time. Both run in turns in one
process, on the same inputs and weights, and must reach the same decisions; only ratios within one run mean something.

Prints a table and writes benchmarks/results/eval.json.
"""

import argparse
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
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, SamConfig
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

from data_scripts.schema import decode_mask, encode_mask
from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaImageProcessor, GsvaProcessor
from modeling_gsva.modeling_gsva import GsvaSegmentationOutput
from modeling_gsva.processing_gsva import ADDED_TOKENS, CHAT_TEMPLATES, PROMPTS
from trainers.evaluation import EvaluationPlan, evaluate_rows

RESULT = Path(__file__).resolve().parent / "results" / "eval.json"
THREADS, SEED, VOCABULARY = 2, 0, 32004
SIZES = [(640, 480), (480, 640), (640, 427), (500, 375), (640, 640), (612, 612)]  # (width, height), in turn
PHRASES = [["the man in the red shirt", "both dogs on the grass", "a purple unicorn", "the left chair"],
           ["a woman holding an umbrella", "the two cups", "the airplane above", "a brown horse"],
           ["the boy with a bat", "all three boats", "a snowman", "the traffic light on the right"]]  # fmt: skip
TARGETS = [1, 2, 0, 1]  # of the four expressions: single, double, no-target, single
# What one picture costs the original on two cores, in seconds (issue and specification of this project).
ORIGINAL = {"SAM encoder": 2.95, "language model": 0.78, "mask decoder": 0.39, "CLIP": 0.08, "data and metrics": 0.1}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs of the prompts' own wording, so that prompts are about as long as LLaMA's tokenizer makes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    wording = [CHAT_TEMPLATES["llava_v1"], PROMPTS["refer"]["question"], *(text for texts in PHRASES for text in texts)]
    tokenizer.train_from_iterator(wording * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                      clean_up_tokenization_spaces=False)  # fmt: skip
    wrapped.add_tokens(list(ADDED_TOKENS))
    return wrapped


def make_models() -> tuple[GsvaForConditionalGeneration, GsvaForConditionalGeneration, GsvaProcessor]:
    """The model of workload M as it is, the same weights with transformers' eager SAM attention, and the processor."""
    processor = GsvaProcessor(GsvaImageProcessor(), make_tokenizer(), patch_size=14)
    config = GsvaConfig(
        vision_config=CLIPVisionConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
                                       image_size=224, patch_size=14),
        text_config=LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                                vocab_size=VOCABULARY, initializer_range=0.05),
        sam_config=SamConfig(
            vision_config={"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "mlp_dim": 768,
                           "global_attn_indexes": [2, 5], "image_size": 1024, "patch_size": 16, "window_size": 14,
                           "output_channels": 256, "initializer_range": 0.02},
            prompt_encoder_config={"hidden_size": 256}, mask_decoder_config={"layer_norm_eps": 1e-5}),
        image_token_id=processor.image_token_id, seg_token_id=processor.seg_token_id, rej_token_id=processor.rej_token_id,
    )  # fmt: skip
    torch.manual_seed(SEED)
    ours = GsvaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in ours.sam.vision_encoder.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:  # zero from the start: no bias, nothing to compare
                parameter.normal_(std=0.2)
        weights = ours.lm_head.weight[[processor.seg_token_id, processor.rej_token_id]]
        mean = slot_states(ours, processor, make_rows(4)).mean(0)
        # Both tokens are likely before every slot, and which of them is a matter of how its state differs from the mean:
        # otherwise a random model says neither, or always the same, and there is no decision to compare.
        weights -= torch.outer(weights @ mean, mean) / mean.square().sum()
        ours.lm_head.weight[[processor.seg_token_id, processor.rej_token_id]] = 20 * (weights + mean / mean.norm())
    plain = GsvaForConditionalGeneration._from_config(config, attn_implementation={"sam_config": "eager"}).eval()
    plain.load_state_dict(ours.state_dict())
    return ours, plain, processor


def make_rows(pictures: int) -> list[dict]:
    """Rows of the data schema: smooth noise, and boxes as targets."""
    rows, draw = [], np.random.default_rng(SEED)
    for number in range(pictures):
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
    """(slots, hidden): the states that predict each slot of the rows' answers."""
    inputs = processor(images=[row["image"] for row in rows], return_tensors="pt",
                       expressions=[[entry["text"] for entry in row["expressions"]] for row in rows])  # fmt: skip
    ids = torch.cat([inputs["input_ids"], inputs["answer_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], inputs["answer_attention_mask"]], 1)
    hidden = model.model(ids, mask, inputs["pixel_values"]).last_hidden_state
    slots = model.find_slots(ids)
    return hidden[slots[:, 0], slots[:, 1] - 1]


@contextmanager
def stages(model: GsvaForConditionalGeneration):
    """Seconds spent inside each part of a model; "all" is everything between entering and leaving."""
    parts = {"SAM encoder": [model.sam.vision_encoder], "CLIP": [model.model.vision_tower],
             "language model": [model.model.language_model, model.lm_head], "mask decoder": [model.sam.mask_decoder]}  # fmt: skip
    seconds, begun, hooks = defaultdict(float), {}, []
    for name, modules in parts.items():
        for module in modules:
            hooks.append(module.register_forward_pre_hook(lambda *_, n=name: begun.update({n: time.perf_counter()})))
            hooks.append(
                module.register_forward_hook(
                    lambda *_, n=name: seconds.update({n: seconds[n] + time.perf_counter() - begun[n]})
                )
            )
    start = time.perf_counter()
    try:
        yield seconds
    finally:
        seconds["all"] = time.perf_counter() - start
        seconds["data and metrics"] = seconds["all"] - sum(seconds[name] for name in parts)
        for hook in hooks:
            hook.remove()


class Elsewhere:
    """The share of the machine's cores that other processes kept busy since this was made."""

    def __init__(self):
        self.begun, self.before = time.perf_counter(), self._busy()

    def _busy(self) -> float:
        machine, mine = psutil.cpu_times(), psutil.Process().cpu_times()
        return machine.user + machine.system + machine.nice - mine.user - mine.system

    def share(self) -> float:
        cores = os.cpu_count() or 1
        return (self._busy() - self.before) / (time.perf_counter() - self.begun) / cores


def verdicts(rows: list[dict]) -> list[tuple[bool, int, int]]:
    return [(row["is_rejected"], row["intersection"], row["union"]) for row in rows]


def run_ours(model, processor, rows, protocol="teacher_forced", batch_size=4, **options) -> list[tuple[bool, int, int]]:
    options |= {"protocol": protocol, "batch_size": batch_size, "threads": THREADS}
    plan = EvaluationPlan(rows, "workload M", "all", **options)
    return verdicts(evaluate_rows(model, processor, plan).rows)


@torch.no_grad()
def run_plain(model, processor, rows) -> list[tuple[bool, int, int]]:
    """`teacher_forced` at the original's cost."""
    seg_id, rej_id, found = model.config.seg_token_id, model.config.rej_token_id, []
    for row in rows:
        truths = [decode_mask(entry["mask"]).astype(bool) for entry in row["expressions"]]
        inputs = processor(images=[row["image"]], expressions=[[entry["text"] for entry in row["expressions"]]],
                           no_targets=[[not truth.any() for truth in truths]], return_tensors="pt")  # fmt: skip
        ids, start = torch.cat([inputs["input_ids"], inputs["answer_ids"]], 1), inputs["input_ids"].shape[1]
        first = model(input_ids=ids, pixel_values=inputs["pixel_values"])
        second = model(input_ids=ids.masked_fill(ids == rej_id, seg_id), pixel_values=inputs["pixel_values"],
                       sam_pixel_values=inputs["sam_pixel_values"])  # fmt: skip
        places = second.slot_positions[:, 1]
        gold, said = ids[0, places], first.logits[0, places - 1].argmax(-1)
        outputs = GsvaSegmentationOutput(
            method="teacher_forced", sequences=ids, answer_starts=torch.tensor([start]), mask_logits=second.mask_logits,
            scores=(first.logits[0, places - 1, seg_id] - first.logits[0, places - 1, rej_id],),
            is_rejected=(torch.where(gold == rej_id, said == rej_id, said != seg_id),), image_index=torch.tensor([0]),
        )  # fmt: skip
        results = processor.post_process_segmentation(outputs, inputs, keep_rejected_masks=True)[0]
        for truth, result in zip(truths, results, strict=True):
            mask = result["mask"]
            found.append((result["is_rejected"], int((mask & truth).sum()), int((mask | truth).sum())))
    return found


@torch.no_grad()
def measure_encoder(ours, plain, processor, rows, repeats: int) -> dict:
    """
    Seconds of SAM's encoder for one picture and how far the embeddings are apart. Best of two turns of `repeats` in a row:
    what one road leaves in caches and allocator shall not count against the next.
    """
    pixels = processor(images=[rows[0]["image"]], expressions=[["a"]], return_tensors="pt")["sam_pixel_values"]
    best = defaultdict(lambda: float("inf"))
    encoders = {"eager": plain.sam.vision_encoder, "ours": ours.sam.vision_encoder}
    for name in ("eager", "sdpa", "ours", "no bias") * 2:
        # the floor: what is left without any position bias, whose results are other ones
        attentions = [layer.attn for layer in ours.sam.vision_encoder.layers] if name in ("sdpa", "no bias") else []
        kinds = [(type(attention), attention.use_rel_pos) for attention in attentions]
        for attention in attentions:
            attention.__class__, attention.use_rel_pos = SamVisionSdpaAttention, name == "sdpa"
        for _ in range(repeats):
            begun = time.perf_counter()
            encoders.get(name, ours.sam.vision_encoder)(pixels)
            best[name] = min(best[name], time.perf_counter() - begun)
        for attention, (kind, use_rel_pos) in zip(attentions, kinds, strict=True):
            attention.__class__, attention.use_rel_pos = kind, use_rel_pos
    wanted, found = (encoder(pixels).last_hidden_state for encoder in encoders.values())
    return {
        "seconds": dict(best), "speedup": best["eager"] / best["ours"],
        "largest_difference": float((wanted - found).abs().max()), "largest_value": float(wanted.abs().max()),
    }  # fmt: skip


def measure_evaluation(ours, plain, processor, rows, batch_size: int) -> dict:
    """`teacher_forced` on both roads, batch by batch in turns: stages in seconds per picture, and the decisions."""
    seconds = {"plain": defaultdict(float), "ours": defaultdict(float)}
    found = {"plain": [], "ours": []}
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        for name, model, run in (("plain", plain, run_plain), ("ours", ours, run_ours)):
            with stages(model) as spent:
                found[name] += run(model, processor, part)
            for stage, value in spent.items():
                seconds[name][stage] += value / len(rows)
    pixels = [abs(a[1] - b[1]) + abs(a[2] - b[2]) for a, b in zip(found["plain"], found["ours"], strict=True)]
    return {
        "seconds_per_picture": {name: dict(values) for name, values in seconds.items()},
        "speedup": seconds["plain"]["all"] / seconds["ours"]["all"],
        "identical_decisions": [a[0] for a in found["plain"]] == [b[0] for b in found["ours"]],
        "rejected": sum(a[0] for a in found["plain"]), "expressions": len(found["plain"]),
        "largest_pixel_difference": max(pixels),
    }  # fmt: skip


def measure_further(ours, processor, rows, batch_size: int) -> dict:
    """`slots`, one prompt per expression: what the expressions after the first of a picture cost. None is rejected."""
    seconds = {}
    for count in (1, len(TARGETS)):
        asked = [{**row, "expressions": row["expressions"][:count]} for row in rows]
        options = {"batch_size": batch_size, "one_prompt_per_expression": True, "threshold": float("-inf")}
        with stages(ours) as spent:
            run_ours(ours, processor, asked, "slots", **options)
        seconds[count] = {stage: value / len(rows) for stage, value in spent.items()}
    last = seconds[len(TARGETS)]
    further = {stage: (last[stage] - seconds[1][stage]) / (len(TARGETS) - 1) for stage in last}
    return {"first_seconds": seconds[1], "further_seconds": further, "share": further["all"] / seconds[1]["all"]}


def table(result: dict) -> str:
    encoder, evaluation, slots = result["sam_encoder"], result["teacher_forced"], result["slots"]
    lines = [f"{'seconds per picture':<20}{'plain road':>12}{'ours':>10}{'ratio':>8}{'the original':>14}"]
    for stage in (*ORIGINAL, "all"):
        plain, ours = (evaluation["seconds_per_picture"][name][stage] for name in ("plain", "ours"))
        reference = ORIGINAL.get(stage, 4.38)
        lines.append(f"{stage:<20}{plain:>12.3f}{ours:>10.3f}{plain / ours:>8.2f}{reference:>14.2f}")
    same = "the same" if evaluation["identical_decisions"] else "DIFFERENT"
    lines.append(
        f"teacher_forced: {evaluation['speedup']:.2f} times as fast, {same} decisions ({evaluation['rejected']} of "
        f"{evaluation['expressions']} rejected), areas differ by at most {evaluation['largest_pixel_difference']} pixels"
    )
    lines.append(
        f"SAM's encoder: {encoder['speedup']:.2f} times as fast as eager, largest difference "
        f"{encoder['largest_difference']:.1e} (largest value {encoder['largest_value']:.1f}); "
        + ", ".join(f"{name} {value:.2f} s" for name, value in encoder["seconds"].items())
    )
    further, first = slots["further_seconds"], slots["first_seconds"]
    lines.append(
        f"slots: a further expression costs {100 * slots['share']:.1f} % of the first ({further['all']:.3f} s of "
        f"{first['all']:.3f} s; mask decoder {further['mask decoder']:.3f} s)"
    )
    busy = result["machine"]["busy_elsewhere"]
    lines.append(f"other processes took {100 * busy:.0f} % of the machine meanwhile" + (": measure again" if busy > 0.1 else ""))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks eval", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="2 pictures; prints, but leaves the result file alone")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures per batch on our road (default 4)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    elsewhere = Elsewhere()
    ours, plain, processor = make_models()
    rows = make_rows(2 if arguments.quick else 12)
    for model, run in ((plain, run_plain), (ours, run_ours)):  # the first calls set things up
        run(model, processor, rows[:1])
    measured = {
        "sam_encoder": measure_encoder(ours, plain, processor, rows, 1 if arguments.quick else 3),
        "teacher_forced": measure_evaluation(ours, plain, processor, rows, arguments.batch_size),
        "slots": measure_further(ours, processor, rows, arguments.batch_size),
    }
    result = {
        "workload": {"pictures": len(rows), "expressions": len(TARGETS), "batch_size": arguments.batch_size,
                     "threads": THREADS, "dtype": "float32"},
        "machine": {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__,
                    "busy_elsewhere": round(elsewhere.share(), 3)},
        **measured,
    }  # fmt: skip
    print(table(result))
    if not arguments.quick:
        unfinished = RESULT.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(unfinished, RESULT)


if __name__ == "__main__":
    main()
