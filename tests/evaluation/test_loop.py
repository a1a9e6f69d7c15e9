"""Evaluation by every protocol: every expression exactly once, in order; refused input."""

import datasets
import pytest
import tiny_processors
from evaluations import Killed, config_of, evaluate_to, kill_after, mask_of

from data_scripts.images import PictureError
from data_scripts.schema import decode_mask
from evaluation.loop import check_slot_tokens, evaluate_rows
from metrics.gres import check_together

PROTOCOLS = ("teacher_forced", "slots", "generate")
MAIN_FIELDS = (
    "dataset", "split", "protocol", "image_id", "expression", "is_no_target", "is_rejected", "score", "intersection",
    "union",
)  # fmt: skip


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_expression_once_in_order(model, processor, rows, protocol, single):
    result = evaluate_rows(model, processor, config_of(rows, protocol=protocol, one_prompt_per_expression=single))
    asked = [(row["image_id"], entry["text"]) for row in rows for entry in row["expressions"]]
    assert [(row["image_id"], row["expression"]) for row in result.rows] == asked
    assert all(set(MAIN_FIELDS) <= row.keys() for row in result.rows)
    told = check_together(result.rows)
    assert told["protocol"] == protocol and told["prompts"] == (
        "one per expression" if single else "all expressions in one"
    )
    sizes = [1 if single else len(row["expressions"]) for row in rows for _ in row["expressions"]]
    assert [row["num_expressions"] for row in result.rows] == sizes
    truth = [not decode_mask(entry["mask"]).any() for row in rows for entry in row["expressions"]]
    assert [row["is_no_target"] for row in result.rows] == truth and any(truth) and not all(truth)
    if protocol != "generate":
        assert not any(row["is_malformed"] for row in result.rows)


def test_areas_are_those_of_the_mask(model, processor, rows):
    result = evaluate_rows(model, processor, config_of(rows, protocol="teacher_forced"), keep_masks=True)
    pairs = [
        (r, e)
        for rows_, row in zip(result.rows_by_image, rows)
        for r, e in zip(rows_, row["expressions"], strict=True)
    ]
    assert any(decode_mask(row["prediction"]).any() for row, _ in pairs)
    for row, entry in pairs:
        truth, mask = decode_mask(entry["mask"]), decode_mask(row["prediction"])
        assert (row["intersection"], row["union"]) == (int((truth & mask).sum()), int((truth | mask).sum()))


def test_a_rejected_slot_has_an_empty_prediction(model, processor, rows):
    result = evaluate_rows(model, processor, config_of(rows, threshold=1e9), keep_masks=True)
    for row in result.rows:
        assert row["is_rejected"] and not decode_mask(row["prediction"]).any() and row["intersection"] == 0
    assert result.metrics()["N_acc"] == 1.0 and result.metrics()["T_acc"] == 0.0
    assert sum(row["union"] for row in result.rows) == sum(
        int(decode_mask(e["mask"]).sum()) for row in rows for e in row["expressions"]
    )


def test_slots_move_with_the_threshold_and_teacher_forcing_does_not(model, processor, rows):
    none = evaluate_rows(model, processor, config_of(rows, threshold=-1e9)).metrics()
    assert none["T_acc"] == 1.0 and none["N_acc"] == 0.0
    forced = [
        evaluate_rows(model, processor, config_of(rows, protocol="teacher_forced", threshold=t)).rows
        for t in (-9.0, 9.0)
    ]
    assert forced[0] == forced[1]


def test_gold_answers_are_in_the_input_of_teacher_forcing_only(model, processor, rows):
    seen = []

    class Spy:
        def __getattr__(self, name):
            return getattr(processor, name)

        def __call__(self, **inputs):
            seen.append(inputs["no_targets"])
            return processor(**inputs)

    for protocol in PROTOCOLS:
        seen.clear()
        evaluate_rows(model, Spy(), config_of(rows, protocol=protocol))
        gold = [[not decode_mask(e["mask"]).any() for e in row["expressions"]] for row in rows]
        told = [group for batch in seen for group in batch] if seen[0] is not None else None
        assert told == (gold if protocol == "teacher_forced" else None)


def test_the_order_of_rows_changes_no_metric(model, processor, rows):
    one = evaluate_rows(model, processor, config_of(rows, batch_size=1))
    other = evaluate_rows(model, processor, config_of(rows[::-1], batch_size=1))
    assert one.metrics() == pytest.approx(other.metrics(), abs=0, nan_ok=True)
    assert [p for p in reversed(other.rows_by_image)] == one.rows_by_image


def test_a_model_without_rej(make_model, processor):
    model = make_model()
    model.config.rej_token_id = 10**6
    with pytest.raises(ValueError, match=r"no \[REJ\] in its vocabulary.*cannot reject"):
        evaluate_rows(model, processor, config_of([{}]))
    model.config.rej_token_id = processor.seg_token_id
    with pytest.raises(ValueError, match=r"means token \d+ by \[REJ\], the processor \d+"):
        check_slot_tokens(model, processor)


@pytest.mark.parametrize("family", ["llava_v1", "llava", "gemma3"])
def test_a_processor_that_writes_another_token_for_an_image(family, make_model, processor):
    model = make_model()
    if family != "llava_v1":
        processor = tiny_processors.make_processor(family)
        model = tiny_processors.make_model(family, processor)
    check_slot_tokens(model, processor)
    model.config.vlm_config.image_token_id += 1
    with pytest.raises(ValueError, match=r"takes token \d+ for an image, the processor writes \d+; load both"):
        check_slot_tokens(model, processor)


def test_a_mask_of_another_size(model, processor, rows):
    entries = [{**entry, "mask": mask_of(31, 40, (1, 1, 9, 9))} for entry in rows[1]["expressions"]]
    with pytest.raises(ValueError, match=r"image p1 is \(31, 40\), the image \(30, 40\)"):
        evaluate_rows(model, processor, config_of([{**rows[1], "expressions": entries}]))


def test_nothing_to_evaluate(model, processor):
    with pytest.raises(ValueError, match="grefcoco val has no rows"):
        evaluate_rows(model, processor, config_of([]))


@pytest.mark.parametrize("way_out", ["end", "error", "nothing to do"])
def test_the_model_trains_on_after_every_way_out(make_model, processor, rows, tmp_path, monkeypatch, way_out):
    model, file = make_model().train(), tmp_path / "rows_x.jsonl"
    if way_out == "error":
        kill_after(monkeypatch, model, 1)
        with pytest.raises(Killed):
            evaluate_to(file, model, processor, config_of(rows))
    else:
        evaluate_to(file, model, processor, config_of(rows))
    if way_out == "nothing to do":
        assert evaluate_to(file, model, processor, config_of(rows)).was_complete
    assert all(module.training for module in model.modules())


def test_metrics_of_a_convention_are_computed_once(model, processor, rows, monkeypatch):
    calls = []
    monkeypatch.setattr("evaluation.loop.gres_metrics", lambda rows, name: calls.append(name) or {"gIoU": 0.5})
    result = evaluate_rows(model, processor, config_of(rows))
    assert calls == [] and result.metrics("rela") is result.metrics() and result.metrics("gsva") == {"gIoU": 0.5}
    assert calls == ["rela", "gsva"]


def test_a_first_image_that_cannot_be_read_is_named(model, processor, rows, tmp_path):
    """The check that there is something to evaluate looks at the first row without decoding its image."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    row = {**rows[1], "image": str(tmp_path / "broken.png")}
    broken = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
    with pytest.raises(PictureError, match=r"broken\.png cannot be read"):
        evaluate_rows(model, processor, config_of(broken))
