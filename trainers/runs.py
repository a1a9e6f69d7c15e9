"""The stages of a run, in the order in which `run_gres.py` calls them."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForImageTextToText, AutoProcessor

import data_scripts
from data_scripts.mixture import TrainingDataset
from data_scripts.transforms import ReferringTransform, Wording, read_image
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor

from .arguments import DataArguments, GsvaTrainingArguments, ModelArguments
from .collator import GsvaCollator
from .evaluation import EvaluationPlan, evaluate_rows, record
from .parts import merged, parts_table, prepare_for_training, snapshot, unmoved
from .pictures import labelled_overlay, prediction_page, training_curves, write_text
from .trainer import GsvaTrainer, last_complete_checkpoint

logger = logging.getLogger(__name__)
RESULTS = "results.json"


class ProcessorWording(Wording):
    """Training examples worded as the processor words evaluation: a small model need not learn twenty phrasings."""

    def __init__(self, processor: GsvaProcessor):
        super().__init__(questions=("processor",), answers=(("processor", ""),))
        object.__setattr__(self, "processor", processor)

    def question(self, template, names):
        return self.processor.build_conversation(list(names))[0]["content"]

    def answer(self, template, names, present):
        return self.processor.build_conversation(list(names), [not there for there in present])[1]["content"]


def load_model(args: ModelArguments) -> tuple[GsvaProcessor, GsvaForConditionalGeneration]:
    """
    Processor and model. A local directory is read by the project's own classes, anything else as remote code.

    Raises:
        ValueError: what is asked for is no GSVA model, or cannot be read.
    """
    options: dict[str, Any] = {"dtype": args.dtype}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    try:
        if Path(args.model).is_dir():
            processor = GsvaProcessor.from_pretrained(args.model)
            model = GsvaForConditionalGeneration.from_pretrained(args.model, **options)
        else:
            processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
            model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, **options)
    except OSError as error:
        raise ValueError(
            f"model={args.model!r} cannot be loaded ({error}). Give a directory that save_pretrained or "
            "convert_checkpoint.py wrote, or a Hub id."
        ) from error
    return processor, model.to(PartialState().device)


def _rows(args: DataArguments, split: str, limit: int | None):
    rows = data_scripts.load(args.dataset, args.data_dir, split, **args.options)
    return rows.select(range(min(limit, len(rows)))) if limit is not None else rows


def _plan(args: DataArguments, training: GsvaTrainingArguments, protocol: str) -> EvaluationPlan:
    return EvaluationPlan(
        rows=_rows(args, args.eval_split, args.max_eval_samples),
        dataset=args.dataset,
        split=args.eval_split,
        protocol=protocol,
        batch_size=training.per_device_eval_batch_size,
        one_prompt_per_expression=args.one_prompt_per_expression,
        threshold=args.threshold,
        convention=args.conventions[0],
        max_new_tokens=args.max_new_tokens,
    )


def read_results(output_dir: str | Path) -> list[dict[str, Any]]:
    """The records of `results.json`, none if it does not exist."""
    path = Path(output_dir) / RESULTS
    return json.loads(path.read_text()) if path.exists() else []


def evaluate(processor, model, model_args, data_args, training_args, stage: str) -> None:
    """
    Runs every protocol and writes `results.json`, the rows and a page of pictures. A stage "before" that an earlier
    start of the same run has evaluated is not evaluated again.
    """
    output_dir, state = Path(training_args.output_dir), PartialState()
    done = read_results(output_dir)
    resumed = training_args.resume and last_complete_checkpoint(output_dir)
    wanted = {(protocol, convention) for protocol in data_args.protocols for convention in data_args.conventions}
    if stage == "before" and resumed and wanted <= {(r["protocol"], r["convention"]) for r in done if r["stage"] == stage}:
        return
    for protocol in data_args.protocols:
        plan = _plan(data_args, training_args, protocol)
        pictures: list = []

        def keep(index, row, results, pictures=pictures):
            if index < data_args.num_pictures:
                pictures.append((row, results))

        result = evaluate_rows(model, processor, plan, keep)
        if not state.is_main_process:
            continue
        records = [record(result, plan, name, stage, model_args.model) for name in data_args.conventions]
        same = {(r["stage"], r["protocol"], r["convention"], r["dataset"], r["split"]) for r in records}
        done = [r for r in done if (r["stage"], r["protocol"], r["convention"], r["dataset"], r["split"]) not in same]
        done += records
        write_text(output_dir / RESULTS, json.dumps(done, indent=1))
        name = f"{stage}_{protocol}".replace(" ", "_")
        write_text(output_dir / f"rows_{name}.jsonl", "".join(json.dumps(row) + "\n" for row in result.rows))
        title = f"{plan.dataset} {plan.split}, {protocol}, {stage} training" if stage != "as loaded" else f"{plan.dataset} {plan.split}, {protocol}"
        write_text(output_dir / f"pictures_{name}.html", prediction_page(title, results_table(records), pictures))
        print(results_table(records), flush=True)


def train(processor, model, model_args, data_args, training_args):
    """Fine-tunes, resuming from the last complete checkpoint; returns the plain model and saves it in `output_dir`."""
    output_dir, state = Path(training_args.output_dir), PartialState()
    wording = ProcessorWording(processor) if data_args.wording == "processor" else Wording()
    transform = ReferringTransform(wording, data_args.num_expressions, data_args.all_absent)
    rows = _rows(data_args, data_args.train_split, data_args.max_train_samples)
    model = prepare_for_training(model, model_args)
    if state.is_main_process:
        print(parts_table(model), flush=True)
    before = snapshot(model)
    trainer = GsvaTrainer(
        model=model,
        args=training_args,
        train_dataset=TrainingDataset(rows, transform, training_args.seed),
        data_collator=GsvaCollator(processor, data_args.max_length),
        processing_class=processor,
        evaluation=_plan(data_args, training_args, data_args.protocols[0]) if training_args.do_eval else None,
        eval_dataset=[] if training_args.eval_strategy != "no" else None,
    )
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None and training_args.resume:
        checkpoint = last_complete_checkpoint(output_dir)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step and (still := unmoved(trainer.model, before)) and checkpoint is None:
        logger.warning("%d trained parameters did not move: %s", len(still), ", ".join(still[:8]))
    model = merged(trainer.accelerator.unwrap_model(trainer.model))
    if state.is_main_process:
        save(processor, model, output_dir)
        write_text(output_dir / "log_history.json", json.dumps(trainer.state.log_history, indent=1))
        training_curves(trainer.state.log_history, output_dir / "curves.png")
        print(f"trained {trainer.state.global_step} steps in {result.metrics['train_runtime']:.0f} s", flush=True)
    state.wait_for_everyone()
    return model


def save(processor, model, output_dir: Path) -> None:
    """Model and processor as a directory that the Auto classes load; written aside and moved file by file."""
    aside = output_dir / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    for file in aside.iterdir():
        file.replace(output_dir / file.name)
    aside.rmdir()


def predict(processor, model, data_args: DataArguments, training_args: GsvaTrainingArguments) -> None:
    """Looks for every expression in every picture; writes overlays and `predictions.json`."""
    if not data_args.image:
        return predict_rows(processor, model, data_args, training_args)
    if not data_args.expressions:
        raise ValueError("--do_predict got pictures but no --expressions; say what to look for.")
    from pycocotools import mask as coco_mask  # noqa: F401 - a clear error now rather than after the first picture

    from data_scripts.schema import encode_mask

    output_dir = Path(training_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    predictions = []
    for number, path in enumerate(data_args.image):
        if not Path(path).is_file():
            raise FileNotFoundError(f"--image {path} does not exist.")
        image = read_image({"path": path, "bytes": None})
        inputs = processor(
            images=[image],
            expressions=[data_args.expressions],
            one_prompt_per_expression=data_args.one_prompt_per_expression,
            return_tensors="pt",
        ).to(model.device)
        method = data_args.protocols[0]
        options = {"threshold": data_args.threshold} if method == "slots" else {"max_new_tokens": data_args.max_new_tokens}
        outputs = model.eval().segment(**inputs, method=method, **options)
        (results,) = processor.post_process_segmentation(outputs, inputs)
        overlay_file = f"{number:03d}_{Path(path).stem}.png"
        labelled_overlay(image, results).save(output_dir / overlay_file)
        predictions.append(
            {
                "image": path,
                "height": image.height,
                "width": image.width,
                "overlay": overlay_file,
                "protocol": method,
                "expressions": [
                    {
                        "text": result["text"],
                        "is_rejected": result["is_rejected"],
                        "score": result["score"] if result["score"] == result["score"] else None,
                        "area": int(result["mask"].sum()),
                        "mask": encode_mask(result["mask"]),
                    }
                    for result in results
                ],
            }
        )
        for result in results:
            said = "rejected" if result["is_rejected"] else f"{int(result['mask'].sum())} pixels"
            print(f"{path}: {result['text']}: {said} (score {result['score']:+.2f})")
    write_text(output_dir / "predictions.json", json.dumps(predictions, indent=1))


def predict_rows(processor, model, data_args: DataArguments, training_args: GsvaTrainingArguments) -> None:
    """Predicts on the pictures of the evaluation split: `predictions.json` and a page of pictures."""
    from data_scripts.schema import encode_mask

    output_dir, pictures, predictions = Path(training_args.output_dir), [], []

    def keep(index, row, results):
        if index < data_args.num_pictures:
            pictures.append((row, results))
        entries = [
            {"text": r["text"], "is_rejected": r["is_rejected"], "mask": encode_mask(r["mask"])} for r in results
        ]
        predictions.append({"image_id": row["image_id"], "expressions": entries})

    plan = _plan(data_args, training_args, data_args.protocols[0])
    evaluate_rows(model, processor, plan, keep)
    write_text(output_dir / "predictions.json", json.dumps(predictions, indent=1))
    write_text(output_dir / "predictions.html", prediction_page(f"{plan.dataset} {plan.split}", "", pictures))


def push(processor, model, args: GsvaTrainingArguments) -> None:
    """Uploads model and processor to `hub_model_id` (by default the name of output_dir)."""
    name = args.hub_model_id or Path(args.output_dir).name
    model.push_to_hub(name, private=args.hub_private_repo, token=args.hub_token)
    processor.push_to_hub(name, private=args.hub_private_repo, token=args.hub_token)


_COLUMNS = ("gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9", "malformed")


def results_table(records: list[dict[str, Any]]) -> str:
    """Records as a table of plain text; `-` where a metric is not defined."""
    lines = [f"{'stage':<10}{'protocol':<15}{'convention':<15}{'pictures':>9} " + "".join(f"{c:>11}" for c in _COLUMNS)]
    for entry in records:
        values = (entry["metrics"].get(name) for name in _COLUMNS)
        numbers = "".join(f"{'-' if value is None else format(value, '.4f'):>11}" for value in values)
        lines.append(f"{entry['stage']:<10}{entry['protocol']:<15}{entry['convention']:<15}{entry['samples']:>9} {numbers}")
    return "\n".join(lines)


def summary(args: GsvaTrainingArguments) -> None:
    """Prints what the run came to and where its pictures are."""
    if not PartialState().is_main_process:
        return
    output_dir = Path(args.output_dir)
    if records := read_results(output_dir):
        print(f"\n{results_table(records)}")
    pictures = sorted([*output_dir.glob("*.html"), *output_dir.glob("*.png")])
    if pictures:
        print("\npictures:\n" + "\n".join(f"  {path}" for path in pictures))
