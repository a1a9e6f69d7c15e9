"""Every preset can be parsed and has the original's figures, and accelerate accepts every accelerate config."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from paths import ROOT
from PIL import Image

CONFIGS = ROOT / "configs"
PRESETS = ("pretrain_7b", "pretrain_13b", "finetune_gres_7b", "finetune_gres_13b")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_parsed_and_nothing_in_it_is_lost(path):
    from trainers.arguments import parse_arguments

    groups = parse_arguments([str(path), "--plan"])  # as on a machine without a card
    for name, value in yaml.safe_load(path.read_text()).items():
        (found,) = [getattr(group, name) for group in groups if hasattr(group, name)]
        if isinstance(value, dict):
            assert json.loads(found) == value
        else:
            known = found or "none" if name == "report_to" else found
            assert known in (value, [value]) or str(known).lower() == str(value).lower(), name


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_the_paper_hold_its_figures(name):
    """The figures of the issue, which are main.py's defaults in the original."""
    from trainers.arguments import parse_arguments

    model, data, training = parse_arguments([str(CONFIGS / f"{name}.yaml"), "--plan"])
    assert (training.learning_rate, training.adam_beta1, training.adam_beta2) == (3e-4, 0.9, 0.95)
    assert (training.weight_decay, training.warmup_steps, training.max_grad_norm) == (0.0, 100, 1.0)
    assert training.lr_scheduler_type == "linear" and training.optim.startswith("adamw_torch")
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (20, 1)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (64 if "13b" in name else 8, 16, 0.05)
    assert model.train_language_model == "lora" and model.quantization is None
    if name.startswith("pretrain"):
        assert data.steps_per_epoch * training.num_train_epochs == 5000
        assert data.mixture_family_rates == {"sem_seg": 9, "refer_seg": 3, "vqa": 3, "reason_seg": 1}
    else:
        assert training.max_steps == 5000 and data.dataset == "grefcoco"


def test_the_presets_mixture_is_the_one_data_scripts_knows():
    from data_scripts.mixture import FAMILIES
    from trainers.arguments import parse_arguments

    _, data, _ = parse_arguments([str(CONFIGS / "pretrain_7b.yaml"), "--plan"])
    assert data.mixture_family_rates == {family: rate for family, (rate, _, _) in FAMILIES.items()}
    assert {f: set(n) for f, n in data.mixture_families.items()} == {f: set(n) for f, (_, _, n) in FAMILIES.items()}


def test_loss_weights_are_the_models_defaults(model):
    assert (model.config.ce_loss_weight, model.config.bce_loss_weight, model.config.dice_loss_weight) == (
        1.0,
        2.0,
        0.5,
    )


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_are_accepted_by_its_own_loader(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    expected = {"ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}.get(path.stem, "NO")
    assert config.distributed_type == expected
    assert config.use_cpu == (path.stem == "cpu")
    if expected == "NO":
        assert config.num_processes == 1


def test_fsdp2_wraps_layers_that_the_model_has(model):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / "accelerate" / "fsdp2.yaml")).fsdp_config
    assert config["fsdp_version"] == 2
    layers = {type(module).__name__ for module in model.modules()}
    assert set(config["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= layers


def launched(name: str) -> dict[str, str]:
    """The environment that `accelerate launch --config_file configs/accelerate/NAME.yaml` gives its processes."""
    from accelerate.commands import launch
    from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    args = launch.launch_command_parser().parse_args(
        ["--config_file", str(CONFIGS / "accelerate" / f"{name}.yaml"), "x.py"]
    )
    args, defaults, _ = launch._validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as launch_command does
    return prepare_deepspeed_cmd_env(args)[1] if name.startswith("zero") else prepare_multi_gpu_env(args)


def test_fsdp2_becomes_accelerates_plugin(model, monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

    environment = launched("fsdp2")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT and not plugin.cpu_ram_efficient_loading
    assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    plugin.set_auto_wrap_policy(model)  # raises where the model has no such layer
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configs_become_accelerates_plugin(stage, monkeypatch):
    from accelerate.utils import DeepSpeedPlugin

    monkeypatch.chdir(CONFIGS.parent)  # the yaml names its json from there
    environment = launched(f"zero{stage}")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    for name, value in environment.items():
        if name.startswith("ACCELERATE_DEEPSPEED_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage and not plugin.zero3_init_flag
    assert (plugin.hf_ds_config.is_zero2(), plugin.hf_ds_config.is_zero3()) == (stage == 2, stage == 3)
    assert (
        plugin.offload_param_device == plugin.offload_optimizer_device == "none"
        and not plugin.hf_ds_config.is_offload()
    )
    assert bool(plugin.zero3_save_16bit_model) == (stage == 3)
    plugin.set_mixed_precision("bf16")
    # what the preset and the Trainer say goes where the json says auto; a value that contradicts is an error
    values = {"train_micro_batch_size_per_gpu": 20, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    values |= {"train_batch_size": 160, "zero_optimization.reduce_bucket_size": 4096**2}
    values |= {
        "zero_optimization.stage3_prefetch_bucket_size": 1,
        "zero_optimization.stage3_param_persistence_threshold": 1,
    }
    plugin.deepspeed_config_process(must_match=False, **values)
    config = plugin.deepspeed_config
    assert (
        config["train_batch_size"] == 160 and config["gradient_clipping"] == 1.0 and config["bf16"]["enabled"] is True
    )
    assert "auto" not in str(config)


def write_own_data(folder: Path, pictures: int = 3) -> Path:
    """A folder in the form of "Your own data" with one present and one absent expression per picture."""
    folder.mkdir()
    lines = []
    for number in range(pictures):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        mask = [5, 5, 30, 5, 30, 20 + number, 5, 20 + number]
        entries = [{"text": f"thing {number}", "mask": mask}, {"text": "a unicorn", "mask": None}]
        lines.append(json.dumps({"image": f"{number}.png", "expressions": entries}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


def test_a_mixture_is_trained_on_by_name(tmp_path, monkeypatch):
    from data_scripts.transforms import Wording
    from trainers.arguments import parse_arguments
    from trainers.data import training_data

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = write_own_data(tmp_path / "own")
    words = ["--dataset", "mixture", "--data_dir", str(folder), "--mixture", '{"refer_seg": ["own"]}', "--use_cpu"]
    words += ["--steps_per_epoch", "4", "--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2"]
    _, data, training = parse_arguments(words)
    mixture = training_data(data, training, Wording())
    assert len(mixture) == 4 * 3 * 2
    example = mixture[5]
    assert example["image"].size == (40, 30) and example["conversations"][0][0]["role"] == "user"
    assert str(mixture[5]["conversations"]) == str(example["conversations"])  # a pure function of the index
    with pytest.raises(ValueError, match="name an eval_dataset"):
        data.evaluated  # noqa: B018


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "mixture"], "needs data_dir"),
        (["--dataset", "mixture", "--data_dir", "x", "--mixture", '{"birds": ["a"]}'], "There is no family"),
    ],
)
def test_a_mixture_that_cannot_be_says_why(words, message):
    from data_scripts.transforms import Wording
    from trainers.arguments import parse_arguments
    from trainers.data import training_data

    _, data, training = parse_arguments([*words, "--use_cpu"])
    with pytest.raises(ValueError, match=message):
        training_data(data, training, Wording())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mixture", "{}x"], "is no JSON object"),
        (["--mixture_rates", '{"vqa": 1}'], "are for dataset='mixture'"),
        (["--steps_per_epoch", "0"], "must be at least 1"),
        (["--quantization", "2bit"], "choose one of 4bit, 8bit"),
        (["--quantization", "4bit", "--train_language_model", "full"], "choose 'lora'"),
        (["--architecture", "70b"], "choose one of 7b, 13b, llava15_sam2"),
    ],
)
def test_bad_arguments_say_what_to_write(words, message):
    from trainers.arguments import parse_arguments

    with pytest.raises(ValueError, match=message):
        parse_arguments([*words, "--use_cpu"])
