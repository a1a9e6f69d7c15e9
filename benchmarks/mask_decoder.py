"""Measure the mask decoders that share an image among its slots, compared with transformers' own.

    python -m benchmarks mask_decoder [--quick]

The decoders of SAM and SAM 2 have their true sizes (256 channels, a map of 64 x 64, SAM 2's finer maps of 128 x 128 and
256 x 256) and random weights from a fixed seed. Eight slots of one image are decoded in fp32 on one thread: by transformers'
class one slot at a time and all at once, and by this project's. The three take turns in one process; each counts with the best
of its turns, in seconds of processor time. Only ratios within one run are meaningful.

The benchmark prints a table and writes benchmarks/results/mask_decoder.json.
"""

import argparse
import copy
import time

import torch
from transformers import Sam2Config, SamConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder
from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder

from benchmarks._workload import SEED, Elsewhere, busy_line, machine, write_result
from modeling_gsva.sam_decoder_gsva import SHARED_DECODERS

SLOTS, CHANNELS, SIDE = 8, 256, 64  # of SAM ViT-H and of every SAM 2 at 1024 px
DECODERS = {"SAM": (SamMaskDecoder, SamConfig), "SAM 2": (Sam2MaskDecoder, Sam2Config)}


def make_decoders(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return transformers' decoder and this project's, with the same weights."""
    kind, config = DECODERS[name][0], DECODERS[name][1]().mask_decoder_config
    config._attn_implementation = "sdpa"
    torch.manual_seed(SEED)
    plain = kind(config).eval()
    for parameter in plain.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    plain.dynamic_multimask_via_stability = False
    ours = copy.deepcopy(plain)
    ours.__class__ = SHARED_DECODERS[kind]
    return plain, ours


def make_runs(name: str) -> dict:
    """Return for each way to decode the slots of one image a function that does so and returns the masks."""
    plain, ours = make_decoders(name)
    generator = torch.Generator().manual_seed(SEED)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    image, positions = random(1, CHANNELS, SIDE, SIDE), random(1, CHANNELS, SIDE, SIDE)
    prompts, dense = random(SLOTS, 1, CHANNELS), random(1, CHANNELS, 1, 1)
    finer = [random(1, CHANNELS // 8, 4 * SIDE, 4 * SIDE), random(1, CHANNELS // 4, 2 * SIDE, 2 * SIDE)]
    more = [finer] if name == "SAM 2" else []

    def one_at_a_time() -> torch.Tensor:
        return torch.cat([plain(image, positions, p[None, None], dense, False, *more)[0][:, 0, 0] for p in prompts])

    def at_once() -> torch.Tensor:  # transformers' class copies the image for the slots itself
        return plain(image, positions, prompts[None], dense, False, *more)[0][0, :, 0]

    def shared() -> torch.Tensor:
        return ours(image, positions, prompts, dense, False, *more, torch.zeros(SLOTS, dtype=torch.long))[0][:, 0]

    return {"one at a time": one_at_a_time, "at once": at_once, "ours": shared}


@torch.no_grad()
def measure(name: str, turns: int) -> dict:
    """Measure seconds per slot, the speed against the faster way of transformers, and the largest relative difference."""
    runs, best, masks = make_runs(name), {}, {}
    for _ in range(turns):
        for way, run in runs.items():
            begun = time.process_time()
            masks[way] = run()
            best[way] = min(best.get(way, float("inf")), (time.process_time() - begun) / SLOTS)
    difference = (masks["ours"] - masks["one at a time"]).abs().max() / masks["one at a time"].abs().max()
    fastest = min(best["one at a time"], best["at once"])
    return {
        "seconds_per_slot": best, "speedup": fastest / best["ours"], "largest_relative_difference": float(difference)
    }  # fmt: skip


def table(result: dict) -> str:
    lines = [f"{'ms per slot':<10}{'one at a time':>15}{'at once':>10}{'ours':>8}{'ratio':>8}{'difference':>12}"]
    for name, measured in result["decoders"].items():
        single, many, ours = (1000 * value for value in measured["seconds_per_slot"].values())
        difference = measured["largest_relative_difference"]
        lines.append(
            f"{name:<10}{single:>15.0f}{many:>10.0f}{ours:>8.0f}{measured['speedup']:>8.2f}{difference:>12.1e}"
        )
    return "\n".join([*lines, busy_line(result)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks mask_decoder", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one turn each, and do not write the result file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    elsewhere = Elsewhere()
    decoders = {name: measure(name, 1 if arguments.quick else 3) for name in DECODERS}
    result = {
        "workload": {"slots": SLOTS, "images": 1, "channels": CHANNELS, "side": SIDE, "threads": 1, "dtype": "float32"},
        "machine": machine(elsewhere),
        "decoders": decoders,
    }  # fmt: skip
    print(table(result))
    if not arguments.quick:
        write_result("mask_decoder", result)


if __name__ == "__main__":
    main()
