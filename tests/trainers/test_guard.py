"""What is watched in training: the guard of T-acc, the metric of the best model, and that both can be measured."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import run_gres
from data_scripts import shapes
from data_scripts.mixture import TrainingDataset
from data_scripts.transforms import ReferringTransform
from evaluation.config import EvaluationConfig
from evaluation.loop import evaluate_rows
from metrics.gres import rejection_curve
from trainers import trainer as trainer_module
from trainers.arguments import GsvaTrainingArguments
from trainers.data import GsvaCollator
from trainers.guard import WATCHED, check_watched, guarded_checkpoint, steps_above
from trainers.trainer import GsvaTrainer

OPTIONS = {
    "use_cpu": True, "per_device_train_batch_size": 2, "seed": 3, "learning_rate": 1e-3, "disable_tqdm": True,
    "report_to": "none", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 100,
    "validation_pictures": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return [shapes.make_row(0, "train", index) for index in range(4)]


@pytest.fixture
def make(make_model, processor, rows, tmp_path):
    """Return a function that makes a trainer whose evaluations give the T-acc of a list in turn, by step."""

    def make(monkeypatch=None, values=None, folder="run", rejects=0.0, **arguments):
        args = GsvaTrainingArguments(**{**OPTIONS, "output_dir": str(tmp_path / folder), "max_steps": 6, **arguments})
        torch.manual_seed(0)
        trainer = GsvaTrainer(
            model=make_model(),
            args=args,
            train_dataset=TrainingDataset(rows, ReferringTransform(num_expressions=3, all_absent=True), 3),
            data_collator=GsvaCollator(processor),
            processing_class=processor,
            evaluation=EvaluationConfig(rows[:2], "shapes", "train", batch_size=2),
            eval_dataset=[],
        )
        if values is not None:

            def stand_in(model, processor, config, on_prediction=None):
                value = values[trainer.state.global_step - 1]
                undefined = math.nan if trainer.state.global_step < 3 else value
                metrics = {
                    "gIoU": 1 - value,
                    "N_acc": rejects,
                    "T_acc": value,
                    "malformed": value,
                    "IL_MCC": undefined,
                }
                return SimpleNamespace(metrics=lambda convention: metrics, rows=[])

            monkeypatch.setattr(trainer_module, "evaluate_rows", stand_in)
        return trainer

    return make


def steps_in(trainer):
    return sorted(int(path.name.partition("-")[2]) for path in (trainer_dir(trainer)).glob("checkpoint-*"))


def trainer_dir(trainer):
    from pathlib import Path

    return Path(trainer.args.output_dir)


def test_evaluations_on_the_way_log_both_and_the_area_of_their_curve(make, processor):
    trainer = make(max_steps=1)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "eval_T_acc" in entry)
    rows = evaluate_rows(trainer.model, processor, trainer.evaluation).rows
    assert entry["eval_curve_area"] == rejection_curve(rows)["area"] and 0 <= entry["eval_N_acc"] <= 1


def test_the_guard_warns_and_training_goes_on(make, monkeypatch, caplog, capsys):
    trainer = make(monkeypatch, [0.97, 0.96, 0.9, 0.91, 0.5, 0.94], guard_T_acc=0.95, save_total_limit=1)
    trainer.train()
    warnings = [record.message for record in caplog.records if "guard_T_acc" in record.message]
    assert len(warnings) == 4 and "at step 3 T_acc is 0.9000, below 0.95" in warnings[0]
    assert trainer.state.global_step == 6
    said = capsys.readouterr().out
    assert "at step 6 T_acc is 0.9400, below 0.95" in said
    assert f"The last checkpoint that is not below it is {trainer_dir(trainer) / 'checkpoint-2'} (0.9600)" in said


def test_the_guard_stops_and_keeps_the_last_checkpoint_above(make, monkeypatch, caplog, capsys):
    values = [0.97, 0.96, 0.9, 0.99, 0.99, 0.99]
    options = {"guard_T_acc": 0.95, "guard": "stop", "save_total_limit": 1}
    trainer = make(monkeypatch, values, **options)
    trainer.train()
    assert trainer.state.global_step == 3 and "Training stops." in caplog.text
    assert 2 in steps_in(trainer) and 1 not in steps_in(trainer)
    assert "checkpoint-2 (0.9600)" in capsys.readouterr().out
    again = make(monkeypatch, values, **options)  # the same command goes on from its last checkpoint, and stops again
    again.train(resume_from_checkpoint=str(trainer_dir(trainer) / "checkpoint-2"))
    assert again.state.global_step == 3
    assert all(
        torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), trainer.model.state_dict().values())
    )


def test_a_run_that_stopped_at_a_checkpoint_stays_stopped(make, monkeypatch):
    options = {"guard_T_acc": 0.95, "guard": "stop", "save_steps": 1}
    trainer = make(monkeypatch, [0.97, 0.9, 0.99, 0.99, 0.99, 0.99], **options)
    trainer.train()
    assert steps_in(trainer) == [1, 2]
    again = make(monkeypatch, [0.99] * 6, **options)
    again.train(resume_from_checkpoint=str(trainer_dir(trainer) / "checkpoint-2"))
    assert again.state.global_step == 2


def test_save_total_limit_never_deletes_what_the_guard_keeps(make, monkeypatch):
    trainer = make(monkeypatch, [0.97, 0.9, 0.9, 0.9, 0.9, 0.9], guard_T_acc=0.95, save_steps=1, save_total_limit=2)
    trainer.train()
    assert steps_in(trainer) == [1, 6]
    history = trainer.state.log_history
    assert guarded_checkpoint(history, 0.95, trainer.args.output_dir).endswith("checkpoint-1")
    assert (
        steps_above(history, 0.95) == {1: 0.97} and guarded_checkpoint(history, 0.98, trainer.args.output_dir) is None
    )


def test_without_any_checkpoint_above_this_is_said(make, monkeypatch, capsys):
    make(monkeypatch, [0.5] * 6, guard_T_acc=0.95, guard="stop").train()
    assert "at step 1 T_acc is 0.5000, below 0.95. No checkpoint has been above it." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "best"),
    [("T_acc", 2), ("T-acc", 2), ("eval_T_acc", 2), ("gIoU", 3), (None, 3), ("malformed", 3), ("IL_MCC", 4)],
)
def test_the_best_model_by_any_metric_is_loaded_at_the_end(make, monkeypatch, metric, best):
    values = [0.6, 0.9, 0.1, 0.5]
    trainer = make(
        monkeypatch, values, max_steps=4, save_steps=1, load_best_model_at_end=True, metric_for_best_model=metric
    )
    states = {}
    save = trainer._save_checkpoint

    def remember(model, trial):
        states[trainer.state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}
        save(model, trial)

    monkeypatch.setattr(trainer, "_save_checkpoint", remember)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    loaded = trainer.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in states[best].items())


@pytest.mark.parametrize("name", [*WATCHED, "eval_curve_area", "N-acc", "eval_N-acc"])
def test_every_metric_of_evaluation_can_choose_the_best_model(tmp_path, name):
    args = GsvaTrainingArguments(
        **{**OPTIONS, "save_steps": 1},
        output_dir=str(tmp_path),
        load_best_model_at_end=True,
        metric_for_best_model=name,
    )
    assert args.metric_for_best_model in WATCHED
    assert args.greater_is_better is (args.metric_for_best_model not in ("malformed", "ECE"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard_T_acc": 1.5}, "guard_T_acc=1.5 is not possible"),
        ({"guard_T_acc": 0.0}, "guard_T_acc=0.0 is not possible"),
        ({"guard_T_acc": float("nan")}, "guard_T_acc=nan is not possible"),
        ({"guard_T_acc": 0.9, "guard": "halt"}, "guard='halt' is not known; choose one of warn, stop"),
        ({"guard": "stop"}, "guard=stop needs the bound"),
        ({"guard_T_acc": 0.9, "eval_strategy": "no"}, "guard_T_acc needs evaluations during training"),
        ({"guard_T_acc": 0.9, "guard": "stop", "save_strategy": "no"}, "save_strategy=no saves none"),
        ({"save_strategy": "best", "eval_strategy": "no"}, "save_strategy=best needs evaluations during training"),
        ({"save_strategy": "best", "metric_for_best_model": "area"}, "'area' is not known; choose one of gIoU, cIoU"),
        ({"save_strategy": "best", "greater_is_better": False}, "would keep the worst model by gIoU"),
    ],
)
def test_what_cannot_be_watched_is_said_before_anything_is_loaded(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        GsvaTrainingArguments(**{**OPTIONS, **options, "output_dir": str(tmp_path)})


def test_metrics_that_the_evaluated_images_do_not_have_are_said_at_the_start(rows):
    def config(keep, protocol="slots"):
        kept = [{**row, "expressions": [one for one in row["expressions"] if keep(one)]} for row in rows]
        return EvaluationConfig(kept, "own", "val", protocol)

    def args(guard=None, metric=None):
        return SimpleNamespace(
            guard_T_acc=guard,
            load_best_model_at_end=metric is not None,
            save_strategy="steps",
            metric_for_best_model=metric,
        )

    present, absent = config(lambda one: one["num_targets"] > 0), config(lambda one: one["num_targets"] == 0)
    for given, where, message in (
        (
            args(metric="N_acc"),
            present,
            "metric_for_best_model: N_acc is not defined on the first 4 images of own val",
        ),
        (args(metric="curve_area"), present, "have no expression without a target"),
        (args(metric="Pr@0.7"), absent, "have no expression with a target"),
        (args(metric="REC"), absent, "have no expression with a single target"),
        (args(metric="IL_MCC"), present, "have no expression without a target"),
        (args(metric="ECE"), config(bool, "generate"), "ECE needs a score"),
        (args(guard=0.9), absent, "guard_T_acc: T_acc is not defined"),
        (args(metric="curve_area"), config(bool, "generate"), "put slots first in --protocols"),
    ):
        with pytest.raises(ValueError, match=message):
            check_watched(given, where)
    for given, where in ((args(), absent), (args(0.9, "gIoU"), present), (args(0.9, "curve_area"), config(bool))):
        check_watched(given, where)


def test_the_command_line_says_so_before_it_evaluates_or_trains(model_dir, tmp_path, capsys):
    options = json.dumps({"size": 8, "cache_dir": str(tmp_path / "cache")})
    words = ["--model", str(model_dir), "--dataset_options", options, "--use_cpu", "--do_train", "--eval_strategy", "steps",
             "--eval_steps", "1", "--guard_T_acc", "0.9", "--protocols", "generate", "--load_best_model_at_end", "true",
             "--save_steps", "1", "--metric_for_best_model", "curve_area", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    assert run_gres.main(words) == 1
    assert "metric_for_best_model: curve_area needs a score" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("rows*")) and not list((tmp_path / "run").glob("checkpoint*"))
    words = [
        "--model",
        str(model_dir),
        "--use_cpu",
        "--do_train",
        "--negatives",
        "1",
        "--output_dir",
        str(tmp_path / "no"),
    ]
    assert run_gres.main(words) == 1
    assert "negatives=1 is not possible" in capsys.readouterr().err and not (tmp_path / "no").exists()
