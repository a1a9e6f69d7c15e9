#!/usr/bin/env python
"""
Train, evaluate and predict with GSVA.

    accelerate launch run_gres.py configs/demo.yaml
    accelerate launch run_gres.py configs/finetune_shapes.yaml --max_steps 100 --output_dir runs/short
    python run_gres.py --do_predict --model assets/tiny_gsva_gres --image a.jpg b.png --expressions "the red circle" "all stars" \
        --output_dir runs/predictions
    accelerate launch run_gres.py --do_predict --model assets/tiny_gsva_gres --dataset FOLDER_OR_HUB_ID --expressions "the red circle" \
        --output_dir runs/predicted

`python run_gres.py --help` lists every name; presets are in configs/.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers
from accelerate import PartialState

from evaluation import predict_files, predict_rows, run_evaluation
from evaluation.records import read_results, results_table
from evaluation.report import write_report
from evaluation.run import recorded
from trainers.arguments import DataArguments, GsvaTrainingArguments, ModelArguments, parse_arguments
from trainers.card import write_card
from trainers.console import quieten
from trainers.data import evaluation_config, skip_list, skipped_images
from trainers.failures import allow_any_file_name_in_output, report_failure
from trainers.loading import load_model
from trainers.lock import run_lock
from trainers.output_folder import where_to_look
from trainers.predicting import is_stream, open_predictions, predict_stream
from trainers.preflight import check_before_run
from trainers.publishing import push
from trainers.sharding import consolidate, refuse_what_shards_cannot
from trainers.trainer import last_complete_checkpoint
from trainers.training import begin_run, train


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status. An expected failure is one line, any other one a traceback."""
    output_dir = None
    allow_any_file_name_in_output()
    try:
        arguments = parse_arguments(argv)
        output_dir = Path(arguments[-1].output_dir)
        run(*arguments)
    except (Exception, KeyboardInterrupt) as error:
        if "debug" in (sys.argv if argv is None else argv):  # --log_level debug
            raise
        report_failure(error, output_dir)
        return 1
    return 0


def run(model_args: ModelArguments, data_args: DataArguments, training_args: GsvaTrainingArguments) -> None:
    """Run the stages that the arguments select, in this order: evaluate, train, evaluate again, describe, predict, push."""
    if training_args.plan:
        from trainers.memory_plan import plan

        return print(plan(model_args, data_args, training_args))
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict or training_args.consolidated):
        raise ValueError("There is nothing to do; give --do_train, --do_eval or --do_predict.")
    refuse_what_shards_cannot(model_args, training_args)
    with run_lock(training_args.output_dir):
        stages(model_args, data_args, training_args)


def stages(model_args: ModelArguments, data_args: DataArguments, training_args: GsvaTrainingArguments) -> None:
    """Run the stages of a run, while no other run writes to the output folder."""
    check_before_run(training_args)
    quieten(training_args.log_level)
    stream = open_predictions(data_args, training_args) if is_stream(data_args, training_args) else None
    transformers.set_seed(training_args.seed)
    record = None
    if training_args.consolidated:
        processor, model = consolidate(Path(training_args.consolidated), model_args, Path(training_args.output_dir))
    else:
        processor, model = load_model(model_args)
    if training_args.do_train:
        record = begin_run(processor, model, model_args, data_args, training_args)
    if training_args.do_eval and training_args.do_train and data_args.eval_before_training:
        evaluate(processor, model, model_args, data_args, training_args, stage="before")
    if training_args.do_train:
        model = train(processor, model, model_args, data_args, training_args, record)
    if training_args.do_eval:
        stage = "after" if training_args.do_train else "as loaded"
        evaluate(processor, model, model_args, data_args, training_args, stage)
    if training_args.do_train and PartialState().is_main_process:
        write_card(model_args, data_args, training_args)
    if stream is not None:
        predict_stream(processor, model, stream, model_args, data_args, training_args)
    elif training_args.do_predict:
        predict(processor, model, data_args, training_args)
    if training_args.push_to_hub and stream is None:
        push(training_args)
    if PartialState().is_main_process:
        print_summary(Path(training_args.output_dir))


def evaluate(
    processor,
    model,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: GsvaTrainingArguments,
    stage: str,
) -> None:
    """Evaluate by every protocol, and write the report.

    The stage "before" is not evaluated again if an earlier start of the same run has done it.
    """
    output_dir = Path(training_args.output_dir)
    is_resumed = training_args.resume and last_complete_checkpoint(output_dir)
    for protocol in data_args.protocols:
        config = evaluation_config(data_args, training_args, protocol).for_model(model)
        if stage == "before" and is_resumed and recorded(output_dir, config, stage):
            continue
        run_evaluation(
            model,
            processor,
            config,
            output_dir,
            stage,
            model_args.model,
            resume=data_args.resume_eval,
            save_masks=data_args.save_masks,
            num_pictures=data_args.num_pictures,
        )
    if PartialState().is_main_process:
        write_report(output_dir)


def predict(processor, model, data_args: DataArguments, training_args: GsvaTrainingArguments) -> None:
    """Predict on the image files of the command line, or else on the evaluation split."""
    output_dir, skipped = training_args.output_dir, skip_list(data_args, training_args)
    rows: list | None = [] if data_args.image else None
    config = evaluation_config(data_args, training_args, data_args.protocols[0], rows=rows)
    if data_args.image:
        predict_files(model, processor, data_args.image, data_args.expressions, config, output_dir, skipped)
    else:
        predict_rows(model, processor, config, output_dir, data_args.num_pictures)


def print_summary(output_dir: Path) -> None:
    """Print the results of the run, and where to look."""
    records = read_results(output_dir)
    table = f"\n{results_table(records)}\n" if records else ""
    print(table, skipped_images(output_dir), where_to_look(output_dir), sep="", end="")


if __name__ == "__main__":
    sys.exit(main())
