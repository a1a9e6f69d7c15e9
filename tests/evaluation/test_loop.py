"""Evaluation: protocols and prompts, ReasonSeg's rules, exactly once, resuming, records and what is refused."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from data_scripts.schema import decode_mask, encode_mask, expression
from evaluation.config import EvaluationConfig, conventions_for
from evaluation.loop import check_slot_tokens, evaluate_rows
from evaluation.records import make_record, record_key, record_keys, results_table, rows_name
from evaluation.resume import EvaluationProgress, evaluation_identity
from metrics.gres import check_together, gres_metrics, read_rows

PROTOCOLS = ("teacher_forced", "slots", "generate")
MAIN_FIELDS = (
    "dataset", "split", "protocol", "image_id", "expression", "is_no_target", "is_rejected", "score", "intersection",
    "union",
)  # fmt: skip


def mask_of(height, width, box):
    """A box (top, left, bottom, right) as run-length encoding; None is empty."""
    mask = np.zeros((height, width), np.uint8)
    if box is not None:
        mask[box[0] : box[2], box[1] : box[3]] = 1
    return encode_mask(mask)


@pytest.fixture(scope="module")
def rows(make_picture):
    """Five pictures of two sizes with 1 to 4 expressions; every third expression is a no-target."""
    texts = ["Man in red", "the dog.", "both cats", "a unicorn"]
    made = []
    for n in range(5):
        width, height = (40, 30) if n % 2 else (28, 44)
        entries = [
            expression(
                text, mask_of(height, width, None if (n + k) % 3 == 2 else (2 + k, 3, 20, 20 + k)), (n + k) % 3 + 1
            )
            for k, text in enumerate(texts[: n % 4 + 1])
        ]
        for entry in entries:
            entry["num_targets"] *= bool(decode_mask(entry["mask"]).any())
        made.append(
            {
                "image": make_picture(n, width, height),
                "image_id": f"p{n}",
                "height": height,
                "width": width,
                "expressions": entries,
            }
        )
    return made


def config_of(rows, **options):
    options = {"dataset": "grefcoco", "split": "val", "batch_size": 2, "max_new_tokens": 8, **options}
    return EvaluationConfig(rows=rows, **options)


def evaluate_to(file, model, processor, config, resume=True, save_masks=False):
    """Evaluate with a rows file, as `run_evaluation` does."""
    identity = evaluation_identity(model, processor, config)
    with EvaluationProgress(file, identity, resume, save_masks) as progress:
        return evaluate_rows(model, processor, config, progress)


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
    result = evaluate_rows(model, processor, config_of(rows, threshold=math.inf), keep_masks=True)
    for row in result.rows:
        assert row["is_rejected"] and not decode_mask(row["prediction"]).any() and row["intersection"] == 0
    assert result.metrics()["N_acc"] == 1.0 and result.metrics()["T_acc"] == 0.0
    assert sum(row["union"] for row in result.rows) == sum(
        int(decode_mask(e["mask"]).sum()) for row in rows for e in row["expressions"]
    )


def test_slots_move_with_the_threshold_and_teacher_forcing_does_not(model, processor, rows):
    none = evaluate_rows(model, processor, config_of(rows, threshold=-math.inf)).metrics()
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


# ---------------------------------------------------------------------------------------------- ReasonSeg


@pytest.fixture(scope="module")
def reasoning(make_picture):
    """A sentence, a phrase, a sentence; the first two with pixels that do not count."""
    made = []
    for n, (text, is_sentence) in enumerate([("What can cut?", True), ("The Tool", False), ("Where is it.", True)]):
        ignore = mask_of(30, 40, (0, 0, 30, 12)) if n < 2 else None
        entries = [
            expression(t, mask_of(30, 40, (5, 15, 20, 30)), 1, is_sentence, ignore) for t in (text, "never asked for")
        ]
        made.append({"image": make_picture(n), "image_id": f"r{n}", "height": 30, "width": 40, "expressions": entries})
    return made


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
            config_of(reasoning, dataset="ReasonSeg", ignore_region=name, threshold=-math.inf),
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


def test_a_split_without_no_targets(model, processor, reasoning):
    config = config_of(reasoning, dataset="ReasonSeg", conventions=("gsva_validate",))
    result = evaluate_rows(model, processor, config)
    entry = make_record(result, config, "gsva_validate", "as loaded", "tiny")
    assert math.isnan(result.metrics("gsva_validate")["N_acc"]) and entry["metrics"]["N_acc"] is None
    assert "not defined here" in entry["notes"]["N_acc"] and entry["metrics"]["gIoU"] is not None
    assert conventions_for("ReasonSeg", ["rela", "gsva", "gsva_validate"]) == ("rela", "gsva_validate")
    assert conventions_for("grefcoco", ["rela", "gsva"]) == ("rela", "gsva")


# ---------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_record_says_everything(model, processor, rows, protocol):
    config = config_of(rows, protocol=protocol)
    result = evaluate_rows(model, processor, config)
    entry = make_record(result, config, "rela", "before", "tiny")
    assert {
        "protocol",
        "convention",
        "stage",
        "dataset",
        "split",
        "samples",
        "metrics",
        "model",
        "seconds",
    } <= entry.keys()
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert ("gold answers were in" in entry["protocol_note"]) == (protocol == "teacher_forced")
    assert sum(part["samples"] for part in entry["breakdown"]["kind"].values()) == len(result.rows)
    assert set(entry["breakdown"]["num_expressions"]) == {"1", "2", "3", "4"}
    low, high = entry["intervals"]["gIoU"]
    assert low <= entry["metrics"]["gIoU"] <= high
    assert entry["metrics"] == pytest.approx(gres_metrics(result.rows, "rela"))
    if protocol == "slots":
        assert 0 <= entry["curve"]["area"] <= 1 and entry["curve"]["points"]["threshold"] and entry["threshold"] == 0


# ---------------------------------------------------------------------------------------------- kill and resume


class Killed(Exception):
    pass


def kill_after(monkeypatch, model, batches):
    """The model dies when it is asked for one batch more."""
    segment, count = model.segment, iter(range(batches))

    def dying(*args, **kwargs):
        if next(count, None) is None:
            raise Killed
        return segment(*args, **kwargs)

    monkeypatch.setattr(model, "segment", dying)


@pytest.mark.parametrize("save_masks", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_killed_evaluation_goes_on(model, processor, rows, protocol, save_masks, tmp_path, monkeypatch):
    def evaluate(name):
        file = tmp_path / name / "rows_x.jsonl"
        return evaluate_to(file, model, processor, config_of(rows, protocol=protocol), save_masks=save_masks)

    unbroken = evaluate("unbroken")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, model, 2)
        evaluate("killed")
    part = tmp_path / "killed" / "rows_x.part0.jsonl"
    text = part.read_text()
    assert len(text.splitlines()) == 2 and not (tmp_path / "killed" / "rows_x.jsonl").exists()
    part.write_text(text[:-40])  # the second line half-written
    asked = []
    segment = model.segment
    monkeypatch.setattr(model, "segment", lambda *a, **k: asked.append(1) or segment(*a, **k))
    resumed = evaluate("killed")
    assert len(asked) == 2 and resumed.taken_over == 2
    assert resumed.rows_by_image == unbroken.rows_by_image and resumed.metrics() == pytest.approx(
        unbroken.metrics(), abs=0, nan_ok=True
    )
    files = [(tmp_path / name / "rows_x.jsonl").read_bytes() for name in ("unbroken", "killed")]
    assert files[0] == files[1]
    kept = read_rows(tmp_path / "killed" / "rows_x.jsonl")
    assert all(("prediction" in row) == save_masks for row in kept)
    assert gres_metrics(kept, "rela") == pytest.approx(resumed.metrics(), abs=0, nan_ok=True)


def test_a_complete_evaluation_is_not_repeated(model, processor, rows, tmp_path, monkeypatch):
    file, config = tmp_path / "rows_x.jsonl", config_of(rows)
    first = evaluate_to(file, model, processor, config)
    assert first.has_masks and not first.was_complete
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows_x.jsonl", "rows_x.meta.json"]
    with monkeypatch.context() as patch:
        kill_after(patch, model, 0)
        again = evaluate_to(file, model, processor, config)
        assert again.metrics() == first.metrics() and again.taken_over == len(rows)
        assert again.was_complete and not again.has_masks
        assert [len(group) for group in again.rows_by_image] == [len(row["expressions"]) for row in rows]
        with pytest.raises(Killed):  # without resume everything is evaluated again
            evaluate_to(file, model, processor, config, resume=False)
    assert not file.exists()


@pytest.mark.parametrize(
    "changed",
    [
        "threshold",
        "protocol",
        "data",
        "samples",
        "weights",
        "batch_size",
        "picture",
        "threads",
        "attention",
        "processor",
    ],
)
def test_what_changed_since_is_named(make_model, processor, rows, make_picture, tmp_path, changed):
    file, options = tmp_path / "rows_x.jsonl", {}
    evaluate_to(file, make_model(), processor, config_of(rows))
    model = make_model(seed=1 if changed == "weights" else 0)
    if changed == "threshold":
        options["threshold"] = 0.5
    elif changed == "protocol":
        options["protocol"] = "generate"
    elif changed == "batch_size":
        options["batch_size"] = 3
    elif changed == "samples":
        rows = rows[:-1]
    elif changed == "data":
        entries = [{**rows[2]["expressions"][0], "text": "somebody else"}, *rows[2]["expressions"][1:]]
        rows = [*rows[:2], {**rows[2], "expressions": entries}, *rows[3:]]
    elif changed == "picture":
        rows = [{**rows[0], "image": make_picture(99, *rows[0]["image"].size)}, *rows[1:]]
    elif changed == "threads":
        options["threads"] = 2
    elif changed == "attention":
        model.config._attn_implementation = "eager"
    elif changed == "processor":  # as many tokens, one of them another
        processor = copy.deepcopy(processor)
        vocabulary = dict(processor.tokenizer.get_vocab())
        vocabulary["another"] = vocabulary.pop(next(iter(vocabulary)))
        processor.tokenizer.get_vocab = lambda: vocabulary
    name = "data" if changed == "picture" else changed
    with pytest.raises(ValueError, match=rf"rows_x.jsonl was begun with something else.*{name} was .*--resume_eval"):
        evaluate_to(file, model, processor, config_of(rows, **options))


def test_a_picture_on_disk_of_the_same_size_is_another_picture(model, processor, rows, tmp_path):
    import datasets
    from PIL import Image

    def on_disk(value):
        Image.new("RGB", (40, 30), (value, 0, 0)).save(tmp_path / "a.bmp")
        row = {**rows[1], "image": str(tmp_path / "a.bmp")}
        return datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())

    file = tmp_path / "rows_x.jsonl"
    evaluate_to(file, model, processor, config_of(on_disk(1)))
    size = (tmp_path / "a.bmp").stat().st_size
    evaluate_to(file, model, processor, config_of(on_disk(1)))  # the same again
    changed = on_disk(2)
    assert (tmp_path / "a.bmp").stat().st_size == size
    with pytest.raises(ValueError, match="data was"):
        evaluate_to(file, model, processor, config_of(changed))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_options_of_other_protocols_do_not_stop_a_resume(model, processor, rows, protocol, tmp_path):
    file = tmp_path / "rows_x.jsonl"
    evaluate_to(file, model, processor, config_of(rows, protocol=protocol))
    for name, value, counts_for in (("max_new_tokens", 9, "generate"), ("threshold", 0.5, "slots")):
        config = config_of(rows, protocol=protocol, **{name: value})
        if protocol == counts_for:
            with pytest.raises(ValueError, match=f"{name} was"):
                evaluate_to(file, model, processor, config)
        else:
            assert evaluate_to(file, model, processor, config).taken_over == len(rows)


def test_a_broken_meta_file_is_named(model, processor, rows, tmp_path):
    file = tmp_path / "rows_x.jsonl"
    evaluate_to(file, model, processor, config_of(rows))
    (tmp_path / "rows_x.meta.json").write_text('{"samples": ')
    with pytest.raises(ValueError, match=r"rows_x.meta.json does not say what was begun.*--resume_eval"):
        evaluate_to(file, model, processor, config_of(rows))


def test_thresholds_have_rows_files_and_records_of_their_own():
    configs = [EvaluationConfig([], "refcoco", "val", threshold=value) for value in (0.0, 25.0, -1.5)]
    names = [rows_name(config, "after") for config in configs]
    assert names == [f"rows_after_slots_refcoco_val{end}.jsonl" for end in ("", "_threshold_25_0", "_threshold_-1_5")]
    facts = {
        "protocol": "slots",
        "convention": "rela",
        "dataset": "refcoco",
        "split": "val",
        "stage": "after",
        "samples": 3,
    }
    records = [
        {**facts, "prompts": config.prompts, "threshold": config.threshold, "metrics": {"gIoU": 0.5, "N_acc": None},
         "notes": {"N_acc": "not defined here: no no-target expressions"}}
        for config in configs
    ]  # fmt: skip
    assert len({record_key(entry) for entry in records}) == 3
    given = EvaluationConfig([], "refcoco", "val", "generate", threshold=25.0)  # which has no threshold
    assert rows_name(given, "after") == "rows_after_generate_refcoco_val.jsonl"
    assert record_keys(given, "after") == record_keys(replace(given, threshold=0.0), "after")
    table = results_table(records).splitlines()
    assert table[0].split()[:7] == ["dataset", "split", "stage", "protocol", "prompts", "threshold", "convention"]
    assert "refcoco  val" in table[2] and "all expressions in one" in table[2] and "25.0" in table[2]
    assert len(table) == 5 and table[4] == "N_acc on refcoco val: not defined here: no no-target expressions"


# ---------------------------------------------------------------------------------------------- several processes


def _in_process(rank, world, port, directory, model, processor, rows):
    import os

    from accelerate import PartialState

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    PartialState._reset_state()
    state = PartialState(cpu=True)
    assert state.num_processes == world
    result = evaluate_to(directory / "rows_x.jsonl", model, processor, config_of(rows))
    assert len(result.rows_by_image) == len(rows)
    state.wait_for_everyone()
    state.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])  # 3 batches: an uneven share, and one process without any
def test_processes_count_every_expression_once(model, processor, rows, tmp_path, monkeypatch, world):
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "rows_x.jsonl"
    evaluate_to(alone, model, processor, config_of(rows))
    # a killed start on one process is continued on several
    together = tmp_path / "rows_x.jsonl"
    if world == 2:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, model, 1)
            evaluate_to(together, model, processor, config_of(rows))
    mp.start_processes(_in_process, (world, port, tmp_path, model, processor, rows), nprocs=world, start_method="fork")
    assert together.read_bytes() == alone.read_bytes()


# ---------------------------------------------------------------------------------------------- bad input


def test_a_model_without_rej(make_model, processor):
    model = make_model()
    model.config.rej_token_id = 10**6
    with pytest.raises(ValueError, match=r"no \[REJ\] in its vocabulary.*cannot reject"):
        evaluate_rows(model, processor, config_of([{}]))
    model.config.rej_token_id = processor.seg_token_id
    with pytest.raises(ValueError, match=r"means token \d+ by \[REJ\], the processor \d+"):
        check_slot_tokens(model, processor)


def test_a_mask_of_another_size(model, processor, rows):
    entries = [{**entry, "mask": mask_of(31, 40, (1, 1, 9, 9))} for entry in rows[1]["expressions"]]
    with pytest.raises(ValueError, match=r"image p1 is \(31, 40\), the image \(30, 40\)"):
        evaluate_rows(model, processor, config_of([{**rows[1], "expressions": entries}]))


@pytest.mark.parametrize(
    "options", [{"protocol": "honest"}, {"ignore_region": "255"}, {"task": "vqa"}, {"batch_size": 0}]
)
def test_unknown_names_are_listed(rows, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        config_of(rows, **options)


def test_nothing_to_evaluate(model, processor):
    with pytest.raises(ValueError, match="grefcoco val has no rows"):
        evaluate_rows(model, processor, config_of([]))


def test_blank_expressions_are_not_asked_for(model, processor, rows):
    entries = [{**rows[1]["expressions"][0], "text": " . "}, *rows[1]["expressions"]]
    result = evaluate_rows(
        model, processor, config_of([{**rows[1], "expressions": entries}, {**rows[0], "expressions": []}])
    )
    assert [len(group) for group in result.rows_by_image] == [len(rows[1]["expressions"]), 0]
