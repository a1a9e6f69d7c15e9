"""A killed evaluation continues, a complete one is not repeated, and a change since then is named."""

import copy

import pytest
from evaluations import Killed, config_of, evaluate_to, kill_after

from metrics.gres import gres_metrics, read_rows

PROTOCOLS = ("teacher_forced", "slots", "generate")


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
