#!/usr/bin/env python
"""
Trains, evaluates and predicts with GSVA.

    accelerate launch run_gres.py configs/demo.yaml
    accelerate launch run_gres.py configs/demo.yaml --max_steps 100 --output_dir runs/short
    python run_gres.py --do_predict --model runs/demo --image a.jpg b.png --expressions "the red circle" "all stars" \
        --output_dir runs/predictions

`python run_gres.py --help` lists every name; presets are in configs/.
"""

import sys
from pathlib import Path

import transformers

from trainers import runs
from trainers.arguments import parse_arguments
from trainers.loading import load_model
from trainers.publishing import describe, push
from trainers.sharding import consolidate, refuse_what_shards_cannot
from trainers.training import train


def main(argv: list[str] | None = None) -> int:
    try:
        model_args, data_args, training_args = parse_arguments(argv)
        if training_args.plan:
            from trainers.memory_plan import plan

            print(plan(model_args, data_args, training_args))
            return 0
        if not (
            training_args.do_train or training_args.do_eval or training_args.do_predict or training_args.consolidated
        ):
            raise ValueError("There is nothing to do; give --do_train, --do_eval or --do_predict.")
        refuse_what_shards_cannot(model_args, training_args)
        transformers.set_seed(training_args.seed)
        if training_args.consolidated:
            source, output_dir = Path(training_args.consolidated), Path(training_args.output_dir)
            processor, model = consolidate(source, model_args, output_dir)
        else:
            processor, model = load_model(model_args)
        if training_args.do_eval and data_args.eval_before_training and training_args.do_train:
            runs.evaluate(processor, model, model_args, data_args, training_args, stage="before")
        if training_args.do_train:
            model = train(processor, model, model_args, data_args, training_args)
        if training_args.do_eval:
            stage = "after" if training_args.do_train else "as loaded"
            runs.evaluate(processor, model, model_args, data_args, training_args, stage=stage)
        if training_args.do_train:
            describe(model_args, data_args, training_args)
        if training_args.do_predict:
            runs.predict(processor, model, data_args, training_args)
        if training_args.push_to_hub:
            push(training_args)
        runs.summary(training_args)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if "debug" in (sys.argv if argv is None else argv):  # --log_level debug
            raise
        print(f"run_gres.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
