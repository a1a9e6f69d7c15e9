"""Every argument of transformers is honoured, refused at the start, or known to have no effect."""

import json
from dataclasses import fields

import pytest
from paths import ROOT
from transformers import TrainingArguments

from trainers.arguments import GsvaTrainingArguments
from trainers.inherited_arguments import FREE, KEPT, REFUSED, REPORTED, UNUSED, table


def test_every_inherited_argument_has_one_treatment():
    kinds = [*KEPT, *REPORTED, *FREE, *REFUSED, *UNUSED]
    assert len(kinds) == len(set(kinds))
    assert set(kinds) == {argument.name for argument in fields(TrainingArguments)}


def test_the_table_in_the_guide_is_that_of_the_code():
    assert table() in (ROOT / "trainers/README.md").read_text(encoding="utf-8")


OTHER_VALUES = {
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "auto_find_batch_size": True,
    "enable_jit_checkpoint": True,
    "hub_revision": "other",
    "ignore_data_skip": True,
    "accelerator_config": {"split_batches": True},
    "parallelism_config": {"tp_size": 2},
    "dataloader_in_order": False,
    "remove_unused_columns": True,
    "train_sampling_strategy": "group_by_length",
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_honoured_is_refused_at_the_start(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=.* is not supported: .*Leave it out"):
        GsvaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: OTHER_VALUES[name]})


def test_the_command_line_refuses_too(tmp_path, capsys):
    import run_gres

    words = ["--do_train", "--use_cpu", "--output_dir", str(tmp_path / "out"), "--label_smoothing_factor", "0.1"]
    assert run_gres.main(words) == 1
    assert (
        "label_smoothing_factor=0.1 is not supported: the loss would no longer be the model's"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_arguments_is_not_refused(tmp_path):
    from dataclasses import replace

    args = GsvaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert replace(args, seed=7).seed == 7


HONOURED = {  # in one run: those whose effect on the weights or on files can be seen
    "neftune_noise_alpha": 5.0,
    "max_grad_norm": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_steps": 2,
    "optim": "sgd",
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.1,
    "learning_rate": 1e-4,
    "seed": 5,
    "data_seed": 5,
    "bf16": True,
}


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    """Train two steps with some arguments and return the digest of the weights."""
    import run_gres
    from modeling_gsva import GsvaForConditionalGeneration
    from trainers.digests import model_digest

    folder = tmp_path_factory.mktemp("honoured")

    def train(**arguments):
        out = folder / "_".join(arguments or ["none"])
        values = {"max_steps": 3, "learning_rate": 1e-3, "save_strategy": "no", **arguments}
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        words += ["--dataset_options", json.dumps({"size": 8, "cache_dir": str(folder / "cache")}), "--threads", "1"]
        words += ["--model", str(model_dir), "--do_train", "--use_cpu", "--per_device_train_batch_size", "2"]
        assert run_gres.main([*words, "--output_dir", str(out), "--disable_tqdm", "true", "--lora_dropout", "0"]) == 0
        return model_digest(GsvaForConditionalGeneration.from_pretrained(out))

    return train


def test_arguments_that_decide_what_is_learned_do(trained):
    plain = trained()
    assert trained(logging_steps=1) == plain
    same = [name for name, value in HONOURED.items() if trained(**{name: value}) == plain]
    assert same == []
    assert set(HONOURED) <= KEPT


def test_do_eval_false_also_ends_the_evaluations_of_a_preset(tmp_path):
    from trainers.arguments import parse_arguments

    preset = tmp_path / "preset.yaml"
    preset.write_text("do_train: true\ndo_eval: true\neval_strategy: steps\neval_steps: 5\nuse_cpu: true\n")
    *_, args = parse_arguments([str(preset)])
    assert args.do_eval and args.eval_strategy == "steps"
    *_, args = parse_arguments([str(preset), "--do_eval", "false"])
    assert args.do_eval is False and args.eval_strategy == "no"
    *_, args = parse_arguments(["--use_cpu", "--eval_strategy", "steps", "--eval_steps", "5"])
    assert args.do_eval is True and args.eval_strategy == "steps"  # as in transformers
    *_, args = parse_arguments(["--use_cpu"])
    assert args.do_eval is False


def test_the_best_model_is_that_of_the_highest_giou(tmp_path):
    options = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_steps": 5,
    }
    args = GsvaTrainingArguments(**options, load_best_model_at_end=True)
    assert (args.metric_for_best_model, args.greater_is_better) == ("gIoU", True)
    args = GsvaTrainingArguments(**options, load_best_model_at_end=True, metric_for_best_model="eval_malformed")
    assert args.greater_is_better is False
    with pytest.raises(ValueError, match="metric_for_best_model='gIou' is not known; choose one of gIoU, cIoU"):
        GsvaTrainingArguments(**options, load_best_model_at_end=True, metric_for_best_model="gIou")
    with pytest.raises(ValueError, match="load_best_model_at_end needs evaluations during training"):
        GsvaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, load_best_model_at_end=True)
