"""One evaluation from its settings to its files: rows, records, exhibits and a page of pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from data_scripts.files import replacing, write_json, write_text
from data_scripts.transforms import read_image

from .config import EvaluationConfig
from .exhibits import make_exhibits
from .loop import EvaluationResult, check_evaluation, evaluate_rows
from .pages import AnsweredImage, prediction_page
from .questions import questions_of
from .records import (
    Record,
    make_record,
    read_results,
    record_key,
    record_keys,
    results_table,
    rows_name,
    summary_line,
    write_results,
)
from .resume import EvaluationProgress, evaluation_identity
from .tiles import result_of, sheet

ON_SHEET = 6  # images of an evaluation on its contact sheet, which the model card shows


def recorded(output_dir: str | Path, config: EvaluationConfig, stage: str) -> list[Record]:
    """Return the records that an earlier start has made of this evaluation; none unless they are complete.

    Records whose rows file is gone do not count.
    """
    keys = record_keys(config, stage)
    records = [record for record in _with_rows(output_dir) if record_key(record) in keys]
    return records if {record_key(record) for record in records} == keys else []


def _with_rows(output_dir: str | Path) -> list[Record]:
    return [record for record in read_results(output_dir) if (Path(output_dir) / record.get("rows", "")).exists()]


def run_evaluation(
    model,
    processor,
    config: EvaluationConfig,
    output_dir: str | Path,
    stage: str,
    model_name: str,
    resume: bool = False,
    save_masks: bool = False,
    num_pictures: int = 24,
) -> None:
    """Evaluate by one protocol, and write the rows file, `results.json`, the exhibits and a page of pictures.

    Every process calls this; the main process writes and prints the table.

    Args:
        config: The settings. The labels `stage` and `model` are added to every row.
        stage: "before" or "after" training, or "as loaded".
        model_name: The name of the model, as the user gave it.
        resume: Go on with the finished batches of a killed start.
        save_masks: Keep the predicted masks in the rows file. A complete evaluation without them is repeated.
        num_pictures: Images on the page of pictures.

    Raises:
        ValueError: There is nothing to evaluate, model and processor do not belong together, or `resume` meets the rows
            of another evaluation.
    """
    output_dir, state = Path(output_dir), PartialState()
    config = replace(config, labels={**config.labels, "stage": stage, "model": model_name}).for_model(model)
    check_evaluation(model, processor, config)
    path = output_dir / rows_name(config, stage)
    identity = evaluation_identity(model, processor, config) if state.is_main_process else None
    with EvaluationProgress(path, identity, resume, save_masks) as progress:
        result = evaluate_rows(model, processor, config, progress)
        is_known = result.was_complete and not result.has_masks and recorded(output_dir, config, stage)
        if state.is_main_process and not (is_known or _lacks_masks(result, save_masks)):
            _write(result, config, path, stage, model_name, num_pictures, str(model.dtype).removeprefix("torch."))
    if _lacks_masks(result, save_masks):
        if state.is_main_process:
            print(f"{path} holds no masks; evaluating again for --save_masks", flush=True)
        state.wait_for_everyone()  # until every process has read the rows, which go now
        run_evaluation(
            model, processor, config, output_dir, stage, model_name, save_masks=True, num_pictures=num_pictures
        )
    elif state.is_main_process:
        print(summary_line(recorded(output_dir, config, stage)[0]), flush=True)


def _lacks_masks(result: EvaluationResult, save_masks: bool) -> bool:
    return save_masks and result.was_complete and not result.has_masks


def _write(
    result: EvaluationResult,
    config: EvaluationConfig,
    path: Path,
    stage: str,
    model_name: str,
    num_pictures: int,
    dtype: str,
) -> None:
    """Write all files that are made from the rows."""
    records = [
        make_record(result, config, convention, stage, model_name, rows=path.name, dtype=dtype)
        for convention in config.conventions
    ]
    if result.has_masks:
        write_json(path.with_suffix(".pictures.json"), make_exhibits(result, config), indent=None)
        title = f"{config.dataset} {config.split}, {config.protocol}, "
        title += stage if stage == "as loaded" else f"{stage} training"
        answered = [_answered(config, result, number) for number in range(min(num_pictures, len(config.rows)))]
        page = path.with_name(path.name.replace("rows_", "pictures_", 1)).with_suffix(".html")
        write_text(page, prediction_page(title, results_table(records), answered))
        with replacing(page.with_suffix(".png")) as temporary:
            sheet([(one.image_id, one.tiles) for one in answered[:ON_SHEET]]).save(temporary)
    keys = record_keys(config, stage)
    others = [record for record in _with_rows(path.parent) if record_key(record) not in keys]
    write_results(path.parent, others + records)


def _answered(config: EvaluationConfig, result: EvaluationResult, number: int) -> AnsweredImage:
    """Return an image with its questions and the results that its metric rows hold."""
    row = config.rows[number]
    results = [result_of(metric_row) for metric_row in result.rows_by_image[number]]
    return AnsweredImage(row["image_id"], read_image(row["image"]), questions_of(row, config), results)
