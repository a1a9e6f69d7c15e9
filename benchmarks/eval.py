"""Measure evaluation stage by stage, compared with a plain implementation of the original's cost.

    python -m benchmarks eval [--quick] [--sam sam2]

Workload M has random weights from a fixed seed, in fp32 on two threads, and 12 images of COCO's sizes with 4 expressions each.
The plain implementation works as the original does: SAM with transformers' eager attention, CLIP and the language model twice
for every image (the second time with every slot `[SEG]`), logits at every position, one image at a time. Both run in turns in
one process, on the same inputs and weights, and must reach the same decisions. Only ratios within one run are meaningful.

With `--sam sam2` this project's evaluation with an encoder of ViT-H's kind takes turns with one of Hiera B+'s (SAM 2.1). Both are
scaled down so that the ratio of their floating point operations is that of the published encoders to 3 % (8.95 and 9.22). The
operations of the published encoders, and of these two, are counted on tensors without data.

The benchmark prints a table and writes benchmarks/results/eval.json, with `--sam sam2` benchmarks/results/eval_sam2.json.
"""

import argparse
import copy
import time
from collections import defaultdict

import torch
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

from benchmarks._mask_models import SMALL_HIERA, SMALL_VIT, encoder_cost, hiera_config, true_costs, vit_config
from benchmarks._workload import (
    TARGETS,
    THREADS,
    Elsewhere,
    busy_line,
    machine,
    make_model,
    make_models,
    make_rows,
    parts_of,
    stages,
    write_result,
)
from data_scripts.schema import decode_mask
from evaluation import EvaluationConfig, evaluate_rows
from modeling_gsva.modeling_gsva import GsvaSegmentationOutput

# Seconds per image of the original on two cores (specification of this project).
ORIGINAL = {"SAM encoder": 2.95, "language model": 0.78, "mask decoder": 0.39, "CLIP": 0.08, "data and metrics": 0.1}


def with_rest(seconds: dict[str, float]) -> dict[str, float]:
    return {**seconds, "data and metrics": 2 * seconds["all"] - sum(seconds.values())}


def verdicts(rows: list[dict]) -> list[tuple[bool, int, int]]:
    return [(row["is_rejected"], row["intersection"], row["union"]) for row in rows]


def run_ours(
    model, processor, rows, protocol="teacher_forced", batch_size=4, **options
) -> list[tuple[bool, int, int]]:
    options |= {"protocol": protocol, "batch_size": batch_size, "threads": THREADS}
    plan = EvaluationConfig(rows, "workload M", "all", **options)
    return verdicts(evaluate_rows(model, processor, plan).rows)


@torch.no_grad()
def run_plain(model, processor, rows) -> list[tuple[bool, int, int]]:
    """Evaluate by `teacher_forced` at the original's cost."""
    seg_id, rej_id, results = model.config.seg_token_id, model.config.rej_token_id, []
    for row in rows:
        truths = [decode_mask(entry["mask"]).astype(bool) for entry in row["expressions"]]
        inputs = processor(images=[row["image"]], expressions=[[entry["text"] for entry in row["expressions"]]],
                           no_targets=[[not truth.any() for truth in truths]], return_tensors="pt")  # fmt: skip
        ids, start = torch.cat([inputs["input_ids"], inputs["answer_ids"]], 1), inputs["input_ids"].shape[1]
        first = model(input_ids=ids, pixel_values=inputs["pixel_values"])
        second = model(input_ids=ids.masked_fill(ids == rej_id, seg_id), pixel_values=inputs["pixel_values"],
                       sam_pixel_values=inputs["sam_pixel_values"])  # fmt: skip
        places = second.slot_positions[:, 1]
        gold, likeliest = ids[0, places], first.logits[0, places - 1].argmax(-1)
        outputs = GsvaSegmentationOutput(
            method="teacher_forced", sequences=ids, answer_starts=torch.tensor([start]), mask_logits=second.mask_logits,
            scores=(first.logits[0, places - 1, seg_id] - first.logits[0, places - 1, rej_id],),
            is_rejected=(torch.where(gold == rej_id, likeliest == rej_id, likeliest != seg_id),), image_index=torch.tensor([0]),
        )  # fmt: skip
        answers = processor.post_process_segmentation(outputs, inputs, keep_rejected_masks=True)[0]
        for truth, answer in zip(truths, answers, strict=True):
            mask = answer["mask"]
            results.append((answer["is_rejected"], int((mask & truth).sum()), int((mask | truth).sum())))
    return results


@torch.no_grad()
def measure_encoder(ours, plain, processor, rows, repeats: int) -> dict:
    """
    Measure the seconds of SAM's encoder for one image, and the largest difference of the embeddings.

    The result is the best of two turns of `repeats` calls in a row, so that the state in which one encoder leaves caches and
    allocator does not count against the next one.
    """
    pixels = processor(images=[rows[0]["image"]], expressions=[["a"]], return_tensors="pt")["sam_pixel_values"]
    best = defaultdict(lambda: float("inf"))
    encoders = {"eager": plain.sam.vision_encoder, "ours": ours.sam.vision_encoder}
    for name in ("eager", "sdpa", "ours", "no bias") * 2:
        # "no bias" is the lower limit: without the position bias, which changes the outputs
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
    plain_states, our_states = (encoder(pixels).last_hidden_state for encoder in encoders.values())
    return {
        "seconds": dict(best), "speedup": best["eager"] / best["ours"],
        "largest_difference": float((plain_states - our_states).abs().max()),
        "largest_value": float(plain_states.abs().max()),
    }  # fmt: skip


def measure_evaluation(ours, plain, processor, rows, batch_size: int) -> dict:
    """Measure `teacher_forced` by both implementations, in turns: seconds per image of each stage, and the decisions."""
    seconds = {"plain": defaultdict(float), "ours": defaultdict(float)}
    results = {"plain": [], "ours": []}
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        for name, model, run in (("plain", plain, run_plain), ("ours", ours, run_ours)):
            with stages(parts_of(model)) as spent:
                results[name] += run(model, processor, part)
            for stage, value in with_rest(spent).items():
                seconds[name][stage] += value / len(rows)
    pixels = [abs(a[1] - b[1]) + abs(a[2] - b[2]) for a, b in zip(results["plain"], results["ours"], strict=True)]
    return {
        "seconds_per_picture": {name: dict(values) for name, values in seconds.items()},
        "speedup": seconds["plain"]["all"] / seconds["ours"]["all"],
        "identical_decisions": [a[0] for a in results["plain"]] == [b[0] for b in results["ours"]],
        "rejected": sum(a[0] for a in results["plain"]), "expressions": len(results["plain"]),
        "largest_pixel_difference": max(pixels),
    }  # fmt: skip


def measure_further(ours, processor, rows, batch_size: int, repeats: int) -> dict:
    """
    Measure the cost of each expression of an image after its first, for `slots` with one prompt per expression.

    No expression is rejected. Each batch counts with the best of `repeats` turns, because the result is a small difference of
    two long and noisy times.
    """
    options = {"batch_size": batch_size, "one_prompt_per_expression": True, "threshold": -1e9}
    seconds = {1: defaultdict(float), len(TARGETS): defaultdict(float)}
    for first in range(0, len(rows), batch_size):
        turns = {count: [] for count in seconds}
        for count in (*seconds,) * repeats:
            asked = [{**row, "expressions": row["expressions"][:count]} for row in rows[first : first + batch_size]]
            with stages(parts_of(ours)) as spent:
                run_ours(ours, processor, asked, "slots", **options)
            turns[count].append(with_rest(spent))
        for count, spent_in_turns in turns.items():
            for stage, value in min(spent_in_turns, key=lambda spent: spent["all"]).items():
                seconds[count][stage] += value / len(rows)
    last = seconds[len(TARGETS)]
    further = {stage: (last[stage] - seconds[1][stage]) / (len(TARGETS) - 1) for stage in last}
    return {"first_seconds": dict(seconds[1]), "further_seconds": further, "share": further["all"] / seconds[1]["all"]}


def measure_mask_models(models: dict, rows, batch_size: int) -> dict:
    """Measure `slots` with each mask model, in turns: seconds per image of each stage, and the operations of its encoder."""
    seconds = {name: defaultdict(float) for name in models}
    for first in range(0, len(rows), batch_size):
        for name, (model, processor) in models.items():
            with stages(parts_of(model)) as spent:
                run_ours(model, processor, rows[first : first + batch_size], "slots", batch_size=batch_size)
            for stage, value in with_rest(spent).items():
                seconds[name][stage] += value / len(rows)
    small = {name: encoder_cost(copy.deepcopy(model.config.sam_config)) for name, (model, _) in models.items()}
    return {
        "seconds_per_picture": {name: dict(values) for name, values in seconds.items()},
        "encoders": {**small, **true_costs()},
    }


def mask_models_table(result: dict) -> str:
    seconds = result["slots"]["seconds_per_picture"]
    lines = [f"{'seconds per image':<20}" + "".join(f"{name:>12}" for name in seconds)]
    for stage in (*ORIGINAL, "all"):
        lines.append(f"{stage:<20}" + "".join(f"{values.get(stage, 0.0):>12.3f}" for values in seconds.values()))
    lines.append(f"{'encoder':<20}{'parameters':>14}{'operations':>14}")
    for name, cost in result["slots"]["encoders"].items():
        lines.append(f"{name:<20}{cost['parameters'] / 1e6:>12.1f} M{cost['operations'] / 1e12:>12.3f} T")
    return "\n".join([*lines, busy_line(result)])


def compare_mask_models(rows: list[dict], batch_size: int, elsewhere: Elsewhere) -> dict:
    models = {"ViT of M": make_model(vit_config(*SMALL_VIT)), "Hiera of M": make_model(hiera_config(*SMALL_HIERA))}
    for model, processor in models.values():  # the first call takes longer
        run_ours(model, processor, rows[:1], "slots")
    measured = measure_mask_models(models, rows, batch_size)
    workload = {"pictures": len(rows), "expressions": len(TARGETS), "batch_size": batch_size, "threads": THREADS}
    return {"workload": {**workload, "dtype": "float32"}, "machine": machine(elsewhere), "slots": measured}


def table(result: dict) -> str:
    encoder, evaluation, slots = result["sam_encoder"], result["teacher_forced"], result["slots"]
    lines = [f"{'seconds per image':<20}{'plain':>12}{'ours':>10}{'ratio':>8}{'the original':>14}"]
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
    return "\n".join([*lines, busy_line(result)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks eval", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="use 2 images, and do not write the result file")
    parser.add_argument("--batch-size", type=int, default=4, help="images per batch of this project (default: 4)")
    parser.add_argument(
        "--sam", choices=("sam", "sam2"), default="sam", help="compare mask models instead (default: sam)"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    elsewhere = Elsewhere()
    rows = make_rows(2 if arguments.quick else 12)
    if arguments.sam == "sam2":
        result = compare_mask_models(rows, arguments.batch_size, elsewhere)
        print(mask_models_table(result))
        if not arguments.quick:
            write_result("eval_sam2", result)
        return
    ours, plain, processor = make_models()
    for model, run in ((plain, run_plain), (ours, run_ours)):  # the first call of each takes longer
        run(model, processor, rows[:1])
    measured = {
        "sam_encoder": measure_encoder(ours, plain, processor, rows, 1 if arguments.quick else 3),
        "teacher_forced": measure_evaluation(ours, plain, processor, rows, arguments.batch_size),
        "slots": measure_further(ours, processor, rows, arguments.batch_size, 1 if arguments.quick else 3),
    }
    result = {
        "workload": {"pictures": len(rows), "expressions": len(TARGETS), "batch_size": arguments.batch_size,
                     "threads": THREADS, "dtype": "float32"},
        "machine": machine(elsewhere),
        **measured,
    }  # fmt: skip
    print(table(result))
    if not arguments.quick:
        write_result("eval", result)


if __name__ == "__main__":
    main()
