"""One question per expression: ReasonSeg's rules, blank expressions, and the same IoU on pictures and in rows."""

import numpy as np
import pytest
from evaluations import config_of

from data_scripts.schema import decode_mask
from evaluation.loop import evaluate_rows
from evaluation.questions import Question, num_questions, questions_of
from evaluation.run import run_evaluation
from evaluation.tiles import verdict
from metrics.gres import check_together, read_rows

PROTOCOLS = ("teacher_forced", "slots", "generate")


def test_reasoning_asks_for_the_first_text_with_its_own_prompt(model, processor, reasoning, monkeypatch):
    asked = []
    build = type(processor).build_conversation

    def spy(self, expressions, no_targets=None, prompt="refer"):
        talk = build(self, expressions, no_targets, prompt)
        asked.append((expressions, talk[0]["content"], talk[1]["content"]))
        return talk

    monkeypatch.setattr(type(processor), "build_conversation", spy)
    result = evaluate_rows(model, processor, config_of(reasoning, dataset="ReasonSeg", batch_size=3))
    assert [row["expression"] for row in result.rows] == ["What can cut?", "The Tool", "Where is it."]
    assert {text[0]: question for text, question, _ in asked} == {
        "What can cut?": "<image>\n What can cut? Please output segmentation mask.",
        "Where is it.": "<image>\n Where is it. Please output segmentation mask.",
        "The Tool": "<image>\n What is The Tool in this image? Please output segmentation mask.",
    }
    assert {answer for *_, answer in asked} == {"[SEG]"}
    # as they are answered one by one
    alone = [evaluate_rows(model, processor, config_of([row], dataset="ReasonSeg")).rows[0] for row in reasoning]
    for together, single in zip(result.rows, alone):
        assert together["score"] == pytest.approx(single["score"], abs=1e-4)


def test_ignored_pixels_are_foreground_or_left_out_by_name(model, processor, reasoning):
    results = {
        name: evaluate_rows(
            model,
            processor,
            config_of(reasoning, dataset="ReasonSeg", ignore_region=name, threshold=-1e9),
            keep_masks=True,
        )
        for name in ("foreground", "ignored")
    }
    for name, result in results.items():
        assert check_together(result.rows)["ignore_region"] == name
        for row, picture in zip(result.rows, reasoning):
            entry, mask = picture["expressions"][0], decode_mask(row["prediction"]).astype(bool)
            truth = decode_mask(entry["mask"]).astype(bool)
            ignore = decode_mask(entry["ignore_mask"]).astype(bool) if entry["ignore_mask"] else np.zeros_like(truth)
            if name == "foreground":
                truth = truth | ignore
            else:
                mask = mask & ~ignore
            assert (row["intersection"], row["union"]) == (int((mask & truth).sum()), int((mask | truth).sum()))
    first, second = (results[name].rows for name in ("foreground", "ignored"))
    assert first[0]["union"] > second[0]["union"] and first[2]["union"] == second[2]["union"]


def test_blank_expressions_are_not_asked_for(model, processor, rows):
    entries = [{**rows[1]["expressions"][0], "text": " . "}, *rows[1]["expressions"]]
    result = evaluate_rows(
        model, processor, config_of([{**rows[1], "expressions": entries}, {**rows[0], "expressions": []}])
    )
    assert [len(group) for group in result.rows_by_image] == [len(rows[1]["expressions"]), 0]


@pytest.mark.parametrize("ignore_region", ["foreground", "ignored"])
def test_the_iou_on_a_picture_is_that_of_its_row(model, processor, reasoning, ignore_region):
    """Verdicts on pages and validation sheets, and the metric rows, read the same truth and the same counted pixels."""
    config = config_of(reasoning, dataset="ReasonSeg", ignore_region=ignore_region, threshold=-1e9)
    verdicts = []
    result = evaluate_rows(
        model,
        processor,
        config,
        on_prediction=lambda index, row, questions, results: verdicts.extend(map(verdict, questions, results)),
    )
    ious = [row["intersection"] / row["union"] for row in result.rows]
    assert verdicts == [f"{'right' if iou >= 0.5 else 'wrong'}: IoU {iou:.2f}" for iou in ious]
    raw = [
        (decode_mask(row["expressions"][0]["mask"]) & mask).sum()
        / (decode_mask(row["expressions"][0]["mask"]) | mask).sum()
        for row, mask in zip(
            reasoning,
            [decode_mask(row["prediction"]) for row in evaluate_rows(model, processor, config, keep_masks=True).rows],
        )
    ]
    assert abs(raw[0] - ious[0]) > 0.01 and raw[2] == pytest.approx(ious[2])  # the excluded pixels do matter


def test_pages_show_the_iou_of_the_rows(model, processor, reasoning, tmp_path):
    config = config_of(reasoning, dataset="ReasonSeg", threshold=-1e9)
    run_evaluation(model, processor, config, tmp_path, "as loaded", "tiny")
    (page,), (rows_file,) = tmp_path.glob("pictures_*.html"), tmp_path.glob("rows_*ReasonSeg_val*.jsonl")
    for row in read_rows(rows_file):
        assert f"IoU {row['intersection'] / row['union']:.2f}</span>" in page.read_text()


def test_overlap_counts_by_hand():
    truth = np.array([[1, 1, 0, 0]], dtype=bool)
    question = Question("a cat", truth, counted=np.array([[1, 0, 1, 1]], dtype=bool))
    assert question.overlap(np.array([[1, 1, 1, 0]], dtype=bool)) == (
        1,
        3,
    )  # the second pixel of the mask does not count
    assert Question("a cat", truth).overlap(np.array([[0, 1, 1, 0]], dtype=bool)) == (1, 3)
    assert Question("a cat", truth & False, num_targets=0).is_no_target


def test_questions_are_counted_without_their_masks(rows, reasoning):
    for config in (config_of(rows), config_of(reasoning, dataset="ReasonSeg"), config_of(reasoning)):
        assert all(num_questions(row, config) == len(questions_of(row, config)) for row in config.rows)
