"""The stages of a run, in the order in which `run_gres.py` calls them."""

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from data_scripts.files import replacing, write_text
from data_scripts.schema import encode_mask
from data_scripts.transforms import read_image

from .arguments import DataArguments, GsvaTrainingArguments
from .card import undefined_in
from .data import evaluation_config
from .evaluation import (
    PROTOCOL_NOTES,
    EvaluationPlan,
    answer,
    as_results,
    askable,
    conventions_for,
    cpu_threads,
    evaluate_rows,
    record,
)
from .kept_rows import KeptRows
from .pictures import contact_sheet, labelled_overlay, prediction_page
from .report import RESULTS, exhibits, read_run, report_page
from .trainer import last_complete_checkpoint

logger = logging.getLogger(__name__)

SHOWN = 6  # pictures of an evaluation on its contact sheet, which the card shows


def read_results(output_dir: str | Path) -> list[dict[str, Any]]:
    """The records of `results.json`, none if it does not exist."""
    path = Path(output_dir) / RESULTS
    return json.loads(path.read_text()) if path.exists() else []


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What a later evaluation of the same kind replaces in `results.json`."""
    names = ("stage", "protocol", "convention", "dataset", "split", "prompts", "ignore_region")
    threshold = entry.get("threshold") if entry.get("protocol") == "slots" else None
    return (*(entry.get(name) for name in names), threshold)


def rows_name(plan: EvaluationPlan, stage: str) -> str:
    """The file of an evaluation's rows: one for each stage, protocol, way of asking, threshold and split."""
    words = [stage, plan.protocol, Path(plan.dataset).name, plan.split]
    words += ["one per prompt"] * plan.one_prompt_per_expression + ["ignored"] * (plan.ignore_region == "ignored")
    words += [f"threshold {plan.threshold}"] * (plan.protocol == "slots" and plan.threshold != 0)
    return re.sub(r"[^\w+-]+", "_", f"rows_{'_'.join(words)}") + ".jsonl"


def _in_order(found: list[tuple]) -> list[tuple]:
    """What all processes found, sorted by the index that comes first in each tuple."""
    gathered = gather_object(found) if PartialState().num_processes > 1 else found
    return sorted(gathered, key=lambda entry: entry[0])


def evaluate(processor, model, model_args, data_args, training_args, stage: str) -> None:
    """
    Runs every protocol and writes `results.json`, the rows and a page of pictures. A stage "before" that an earlier
    start of the same run has evaluated is not evaluated again.
    """
    output_dir, state = Path(training_args.output_dir), PartialState()
    # A record whose rows a killed evaluation has removed is none any more.
    done = [entry for entry in read_results(output_dir) if (output_dir / entry.get("rows", "")).exists()]
    resumed = training_args.resume and last_complete_checkpoint(output_dir)
    conventions = conventions_for(data_args.evaluated, data_args.conventions)
    dtype = str(model.dtype).removeprefix("torch.")
    for protocol in data_args.protocols:
        plan = evaluation_config(data_args, training_args, protocol)
        plan.labels = {"stage": stage, "model": model_args.model}
        plan.resume, plan.save_masks = data_args.resume_eval, data_args.save_masks
        name = rows_name(plan, stage)
        plan.rows_file = output_dir / name
        wanted = {_key({**vars(plan), **plan.labels, "prompts": plan.prompts, "convention": c}) for c in conventions}
        known = wanted <= {_key(entry) for entry in done}
        if stage == "before" and resumed and known:
            continue
        result = evaluate_rows(model, processor, plan)
        if plan.save_masks and not result.has_masks:  # complete before, without the masks that are asked for now
            if state.is_main_process:
                print(f"{plan.rows_file} holds no masks; evaluating again for --save_masks", flush=True)
            state.wait_for_everyone()  # nobody reads the rows any more, which go now
            plan.resume = False
            result = evaluate_rows(model, processor, plan)
        if not state.is_main_process:
            continue
        if known and not result.has_masks:  # complete before, and with its pictures written
            print(results_table([entry for entry in done if _key(entry) in wanted]), flush=True)
            continue
        records = [
            {**record(result, plan, c, stage, model_args.model), "rows": name, "dtype": dtype} for c in conventions
        ]
        if result.has_masks:
            write_text(plan.rows_file.with_suffix(".pictures.json"), json.dumps(exhibits(plan, result)))
            count = min(data_args.num_pictures, len(plan.rows))
            asked = [askable(plan.rows[n], plan) for n in range(count)]
            pictures = [(row, as_results(rows)) for row, rows in zip(asked, result.pictures)]
            title = (
                f"{plan.dataset} {plan.split}, {protocol}, {stage if stage == 'as loaded' else stage + ' training'}"
            )
            page = prediction_page(title, results_table(records), pictures)
            page_file = output_dir / name.replace("rows_", "pictures_", 1).replace(".jsonl", ".html")
            write_text(page_file, page)
            sheet = contact_sheet(
                [labelled_overlay(read_image(row["image"]), found) for row, found in pictures[:SHOWN]]
            )
            with replacing(page_file.with_suffix(".png")) as temporary:
                sheet.save(temporary)
        done = [entry for entry in done if _key(entry) not in wanted] + records
        write_text(output_dir / RESULTS, json.dumps(done, indent=1))
        KeptRows(plan.rows_file).close()
        print(results_table(records), flush=True)
    if state.is_main_process and done:
        write_text(output_dir / "report.html", report_page([read_run(output_dir)]))


def predict(processor, model, data_args: DataArguments, training_args: GsvaTrainingArguments) -> None:
    """
    Looks for every expression in every picture file; writes overlays and `predictions.json`. Without picture files it
    predicts on the evaluation split and writes a page of pictures instead of overlays.
    """
    if not data_args.image:
        return predict_rows(processor, model, data_args, training_args)
    if not data_args.expressions:
        raise ValueError("--do_predict got pictures but no --expressions; say what to look for.")
    plan = evaluation_config(data_args, training_args, data_args.protocols[0], rows=[])
    if plan.protocol == "teacher_forced":
        raise ValueError(
            "protocols=teacher_forced needs gold answers, which picture files have not; choose slots or generate."
        )
    for path in data_args.image:  # before the first is predicted
        if not Path(path).is_file():
            raise FileNotFoundError(f"--image {path} does not exist; give the path of a picture file.")
    if not PartialState().is_main_process:
        return
    output_dir, predictions = Path(training_args.output_dir), []
    for number, path in enumerate(data_args.image):
        image = read_image({"path": path, "bytes": None})
        with cpu_threads(plan.threads):
            (results,) = answer(model.eval(), processor, [image], [data_args.expressions], plan)
        overlay_file = f"{number:03d}_{Path(path).stem}.png"
        with replacing(output_dir / overlay_file) as temporary:
            labelled_overlay(image, results).save(temporary)
        predictions.append(
            {
                "image": path,
                "height": image.height,
                "width": image.width,
                "overlay": overlay_file,
                "protocol": plan.protocol,
                "protocol_note": PROTOCOL_NOTES[plan.protocol],
                "expressions": [_entry(result) for result in results],
            }
        )
        for result in results:
            said = "rejected" if result["is_rejected"] else f"{int(result['mask'].sum())} pixels"
            print(f"{path}: {result['text']}: {said} (score {result['score']:+.2f})")
    write_text(output_dir / "predictions.json", json.dumps(predictions, indent=1))


def _entry(result: dict[str, Any]) -> dict[str, Any]:
    """A result as `predictions.json` holds it: the mask as COCO RLE, the score null where the answer has no slot."""
    return {
        "text": result["text"],
        "is_rejected": result["is_rejected"],
        "score": None if math.isnan(result["score"]) else result["score"],
        "area": int(result["mask"].sum()),
        "mask": encode_mask(result["mask"]),
    }


def predict_rows(processor, model, data_args: DataArguments, training_args: GsvaTrainingArguments) -> None:
    """Predicts on the pictures of the evaluation split: `predictions.json` and a page of pictures."""
    output_dir = Path(training_args.output_dir)
    plan = evaluation_config(data_args, training_args, data_args.protocols[0])
    found: list[tuple] = []

    def keep(index, row, results):
        entries = [_entry(result) for result in results]
        said = {"protocol": plan.protocol, "protocol_note": PROTOCOL_NOTES[plan.protocol]}
        prediction = {"image_id": row["image_id"], **said, "expressions": entries}
        found.append((index, prediction, (row, results) if index < data_args.num_pictures else None))

    evaluate_rows(model, processor, plan, keep)
    found = _in_order(found)
    if not PartialState().is_main_process:
        return
    write_text(output_dir / "predictions.json", json.dumps([prediction for _, prediction, _ in found], indent=1))
    note = f"{plan.protocol}: {PROTOCOL_NOTES[plan.protocol]}"
    shown = [pair for *_, pair in found if pair is not None]
    page = prediction_page(f"{plan.dataset} {plan.split}, {plan.protocol}", note, shown)
    write_text(output_dir / "predictions.html", page)


_COLUMNS = ("gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9", "malformed")


def results_table(records: list[dict[str, Any]]) -> str:
    """Records as a table of plain text; `-` where a metric is not defined, and below it why."""
    names = ("dataset", "split", "stage", "protocol", "prompts", "threshold", "convention")
    table = [[*names, "pictures", *_COLUMNS]]
    for entry in records:
        facts = [
            Path(entry["dataset"]).name,
            *(str(entry.get(name, "-")) for name in names[1:]),
            str(entry["samples"]),
        ]
        values = (entry["metrics"].get(name) for name in _COLUMNS)
        table.append(facts + ["-" if value is None else format(value, ".4f") for value in values])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [
        "  ".join(
            f"{cell:{'<' if n < len(names) else '>'}{width}}" for n, (cell, width) in enumerate(zip(line, widths))
        )
        for line in table
    ]
    lines += undefined_in(records)
    if any(entry["protocol"] == "teacher_forced" for entry in records):
        lines.append(f"teacher_forced: {PROTOCOL_NOTES['teacher_forced']}")
    return "\n".join(lines)


def summary(args: GsvaTrainingArguments) -> None:
    """Prints what the run came to and where its pictures are."""
    if not PartialState().is_main_process:
        return
    output_dir = Path(args.output_dir)
    if records := read_results(output_dir):
        print(f"\n{results_table(records)}")
    pictures = sorted([*output_dir.glob("*.html"), *output_dir.glob("*.png"), *output_dir.glob("validation")])
    if pictures:
        print("\npictures:\n" + "\n".join(f"  {path}" for path in pictures))
