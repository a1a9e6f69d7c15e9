"""
Embed the model of a run on *shapes* in assets/: weights as bf16, the log of its training, and no copy of the code.

    python assets/embed_run.py runs/tiny_gsva_gres assets/tiny_gsva_gres
"""

import argparse
import json
from pathlib import Path

import torch
from make_tiny_gsva import leave_code_out

from data_scripts.files import write_text
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor
from trainers.output_folder import LOG_HISTORY


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of run_gres.py")
    parser.add_argument("output", type=Path, help="folder of the embedded model; what it holds is replaced")
    args = parser.parse_args(argv)
    model = GsvaForConditionalGeneration.from_pretrained(args.run, dtype=torch.bfloat16)
    model.save_pretrained(args.output)
    GsvaProcessor.from_pretrained(args.run).save_pretrained(args.output)
    leave_code_out(args.output)
    history = json.loads((args.run / LOG_HISTORY).read_text(encoding="utf-8"))
    write_text(args.output / "training_log.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))


if __name__ == "__main__":
    main()
