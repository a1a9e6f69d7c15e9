"""Sharded training as it is, on two CPU processes: DeepSpeed's ZeRO-2 and ZeRO-3, and FSDP2, each in full and with LoRA.

`make deepspeed` installs the extra of that name and runs these tests. DeepSpeed compiles an operation once, which takes
minutes; TORCH_EXTENSIONS_DIR names the folder for it. A killed compilation leaves a lock there that stops all later ones.

The libraries are imported once for all runs but one (tests/tools/forked_runs.py). Each run is killed in its last but one step,
with a checkpoint of two steps, and started again.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import accelerate_cli
from conversions import FROZEN, assert_equal, expected, peft_names, run
from data_trees import picture, ref, referring, write
from paths import ROOT
from safetensors.torch import load_file

pytestmark = pytest.mark.deepspeed
MODEL = str(ROOT / "assets" / "tiny_gsva")
TODAY = ROOT / "assets" / "tiny_gsva_today"
WAYS = {"lora": (), "full": ("--train_language_model", "full")}
SHARDED = [(strategy, way) for strategy in ("zero2", "zero3", "fsdp2") for way in WAYS]
SIGKILL = -9


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("cache")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def forked(environment, tmp_path_factory):
    """Run a script in one or more processes, forked from one that has imported the libraries; return their exit codes."""
    pytest.importorskip("deepspeed")
    logs = tmp_path_factory.mktemp("logs")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/tools/forked_runs.py")],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip

    def answer():
        for line in server.stdout:
            if line.startswith("{"):  # DeepSpeed prints lines of its own
                return json.loads(line)
        raise AssertionError(f"forked_runs.py has ended with {server.wait()}")

    assert "ready" in answer()

    def start(script, words, killed=False, **options):
        log = logs / f"{len(list(logs.iterdir()))}.log"
        run = {"script": str(script), "words": [str(word) for word in words], "log": str(log), **options}
        server.stdin.write(json.dumps(run) + "\n")
        server.stdin.flush()
        codes = answer()["codes"]
        text = Path(f"{log}.0").read_text(errors="replace")
        assert set(codes) == {SIGKILL if killed else 0}, f"{codes}\n{text[-4000:]}"
        return text

    yield start
    server.kill()  # it has nothing to finish
    server.wait()


def words(strategy, way, out, on_cards=False):
    """The command of four steps with a checkpoint after two."""
    given = ["--model", MODEL, "--dataset_options", '{"size": 16}', "--do_train", "--max_steps", "4", "--save_steps", "2",
             "--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--threads", "1", "--logging_steps", "1",
             "--lora_dropout", "0", "--disable_tqdm", "true", "--output_dir", str(out), *WAYS[way]]  # fmt: skip
    if on_cards:
        return given
    # With --use_cpu accelerate trains data parallel whatever the config says. Without cards it knows FSDP2 in no other way, and
    # the tool for FSDP2 lets it shard all the same.
    return given + (["--use_cpu"] if strategy in ("ddp", "fsdp2") else ["--ddp_backend", "gloo"])


@pytest.fixture(scope="module")
def trained(forked, tmp_path_factory):
    """Train by a strategy and return the output folder; each combination is trained once, killed on the way and resumed."""
    folder = tmp_path_factory.mktemp("runs")

    def train(strategy, way):
        out = folder / f"{strategy}-{way}"
        if out.exists():
            return out
        script = "tests/tools/fsdp_on_cpu.py" if strategy == "fsdp2" else "run_gres.py"
        options = {"strategy": strategy, "processes": 2}
        if strategy != "ddp":
            forked(script, words(strategy, way, out), killed=True, kill_at=3, **options)
            assert (out / "checkpoint-2").exists() and not (out / "model.safetensors").exists()
        forked(script, words(strategy, way, out), **options)
        return out

    return train


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "log_history.json").read_text()) if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("strategy", "way"), SHARDED)
def test_killed_and_resumed_it_has_the_losses_and_weights_of_data_parallel(trained, strategy, way):
    sharded, plain = trained(strategy, way), trained("ddp", way)
    assert len(losses(sharded)) == 4 and losses(sharded) == pytest.approx(losses(plain), rel=1e-5)
    found, expected, start = weights(sharded), weights(plain), weights(Path(MODEL))
    assert found.keys() == expected.keys()
    moved = max(float((expected[name].float() - start[name].float()).abs().max()) for name in expected)
    worst = max(float((found[name].float() - expected[name].float()).abs().max()) for name in expected)
    assert moved > 1e-3 and worst < 0.05 * moved
    assert (sharded / "adapter").exists() == (way == "lora")
    parts = {"fsdp2": "pytorch_model_fsdp_0/__1_0.distcp"}.get(strategy, "global_step4/*model_states.pt")
    assert list((sharded / "checkpoint-4").glob(parts))  # the library wrote it


def launch(strategy, given, environment, processes=2):
    """Run the documented command; `strategy` is a config of configs/accelerate/, or a path without its ending."""
    if "zero" in str(strategy):
        pytest.importorskip("deepspeed")
    config = f"{ROOT / 'configs/accelerate' / strategy}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(processes),
               "--main_process_port", "0", "run_gres.py", *map(str, given)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_documented_command_ends_with_the_weights_of_the_resumed_run(trained, environment, tmp_path):
    launch("zero3", words("zero3", "lora", tmp_path / "out"), environment)
    resumed = weights(trained("zero3", "lora"))
    assert all(torch.equal(value, resumed[name]) for name, value in weights(tmp_path / "out").items())


# The forms in which the tools of the libraries write whole weights.
FORMS = {
    "zero_to_fp32": ([], ["--max_shard_size", "1MB"], ["--safe_serialization"],
                     ["--safe_serialization", "--max_shard_size", "1MB"]),
    "merge-weights": ([], ["--unsafe_serialization"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "way", "form"),
    [(strategy, way, form) for strategy, way in SHARDED
     for form in FORMS["merge-weights" if strategy == "fsdp2" else "zero_to_fp32"]],
)  # fmt: skip
def test_consolidated_checkpoints_are_the_end_of_training(trained, forked, tmp_path, strategy, way, form):
    out, whole = trained(strategy, way), tmp_path / "whole"
    checkpoint = out / "checkpoint-4"
    if strategy == "fsdp2":
        forked(accelerate_cli.__file__, ["merge-weights", checkpoint / "pytorch_model_fsdp_0", whole, *form])
    else:
        forked(checkpoint / "zero_to_fp32.py", [checkpoint, whole, *form])
    files = [path for path in whole.iterdir() if path.suffix in (".bin", ".safetensors")]
    assert (len(files) > 1) == ("--max_shard_size" in form)
    more = ["--model", MODEL, "--use_cpu", *WAYS[way], "--output_dir", tmp_path / "out"]
    forked("run_gres.py", [*more, "--consolidated", whole])
    expected, found = weights(out), weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("strategy", "more"), [("zero2", ["--train_tokens", "new"]), ("zero3", [])])
def test_a_head_that_is_the_embedding_stays_one(forked, tmp_path, strategy, more):
    """Of a base of today; zero_to_fp32.py writes such weights as .bin only, since they share memory."""
    base, out, whole = str(TODAY), tmp_path / "out", tmp_path / "whole"
    given = [*words(strategy, "lora", out), "--model", base, "--max_steps", "2", *more]
    forked("run_gres.py", given, strategy=strategy, processes=2)
    found, start = weights(out), weights(TODAY)
    assert found.keys() == start.keys() and not [name for name in found if "lm_head" in name]
    forked(out / "checkpoint-2" / "zero_to_fp32.py", [out / "checkpoint-2", whole])
    given = ["--model", base, "--use_cpu", *more, "--output_dir", tmp_path / "again"]
    forked("run_gres.py", [*given, "--consolidated", whole])
    again = weights(tmp_path / "again")
    assert again.keys() == found.keys()
    for name, value in again.items():
        torch.testing.assert_close(value, found[name], rtol=0, atol=1e-6, msg=name)


KINDS = {"slots", "all rejected", "no slot", "no image"}


def mixed_words(strategy, folder, on_cards=False):
    """Twelve steps over examples with slots, with rejected ones alone, without any, and without an image."""
    absent = {**ref(1), "ann_id": [-1], "no_target": True}
    data = referring(referring(folder / "data", "refcoco", [ref()]), "grefcoco", [absent], {})
    record = {"conversations": [{"from": "human", "value": "<image>\nA dog?"}, {"from": "gpt", "value": "No."}]}
    of_words = {"conversations": [{"from": "human", "value": "Any dog?"}, {"from": "gpt", "value": "No."}]}
    picture(data / "coco/train2017/1.jpg")
    write(data / "llava_dataset/llava_instruct_150k.json",
          [{"id": "1", "image": "1.jpg", **record}, {"id": "2", **of_words}])  # fmt: skip
    given = words(strategy, "lora", folder / strategy, on_cards)
    for argument, value in {
        "--dataset_options": "{}", "--per_device_train_batch_size": "1", "--max_steps": "12", "--save_steps": "100",
    }.items():  # fmt: skip
        given[given.index(argument) + 1] = value
    mixture = {"refer_seg": ["refcoco", "grefcoco"], "vqa": ["llava_instruct_150k"]}
    return [
        *given, "--dataset", "mixture", "--data_dir", str(data), "--mixture", json.dumps(mixture), "--steps_per_epoch", "12",
        "--mixture_rates", '{"refer_seg": 1, "vqa": 1}', "--all_absent", "true",
        "--seed", "7",  # with which each kind comes to each process alone
    ]  # fmt: skip


def kinds_of_steps(folder) -> list[tuple[str, str]]:
    """Return what the two processes have in each step of `mixed_words`: accelerate deals out batches in turn."""
    from modeling_gsva import GsvaProcessor
    from trainers.arguments import parse_arguments
    from trainers.data import load_training_data
    from trainers.trainer import EpochSampler

    given = [*mixed_words("ddp", folder), "--steps_per_epoch", "24"]  # this process is alone
    _, data, training = parse_arguments(given)
    examples = load_training_data(GsvaProcessor.from_pretrained(MODEL), data, training)
    kinds = [kind_of(examples[index]) for index in EpochSampler(len(examples), training.seed)]
    return list(zip(kinds[::2], kinds[1::2], strict=True))


def kind_of(example) -> str:
    if example["image"] is None:
        return "no image"
    if not sum(len(of_one) for of_one in example["masks"]):
        return "no slot"
    return "slots" if any(of_one.any() for of_one in example["masks"]) else "all rejected"


@pytest.fixture(scope="module")
def mixed(request, environment, tmp_path_factory):
    """Train by a strategy on two processes, once, and return the entries of its log."""
    folder = tmp_path_factory.mktemp("mixed")

    def train(strategy, device):
        given = mixed_words(strategy, folder / device, device == "cuda")
        log = folder / device / strategy / "log_history.json"
        if device == "cuda" and not log.exists():
            launch(strategy, given, environment)
        elif not log.exists():
            script = "tests/tools/fsdp_on_cpu.py" if strategy == "fsdp2" else "run_gres.py"
            request.getfixturevalue("forked")(script, given, strategy=strategy, processes=2)
        return [entry for entry in json.loads(log.read_text()) if "loss" in entry]

    return train


def test_each_kind_of_batch_comes_to_one_process_alone(tmp_path, monkeypatch, environment):
    monkeypatch.setenv("HF_DATASETS_CACHE", environment["HF_DATASETS_CACHE"])
    apart = [step for step in kinds_of_steps(tmp_path) if step[0] != step[1]]
    assert {step[0] for step in apart} == {step[1] for step in apart} == KINDS


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_a_process_may_have_no_slot_or_no_image(mixed, strategy, device):
    """By the command line; on cards it is the documented one, over NCCL, and accelerate shards by itself."""
    ddp, sharded = mixed("ddp", device), mixed(strategy, device)
    expected = [entry["loss"] for entry in ddp]
    tolerance = 1e-5 if device == "cpu" else 1e-3
    assert len(ddp) == 12 and [entry["loss"] for entry in sharded] == pytest.approx(expected, rel=tolerance)
    bce = [entry["mask_bce_loss"] for entry in ddp]
    assert any(bce) and not all(bce)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_offloading_on_one_card_has_the_losses_of_training_without(request, environment, tmp_path, strategy, device):
    """With PyTorch's AdamW, since DeepSpeed's own for the CPU is compiled first."""
    deepspeed = json.loads((ROOT / f"configs/accelerate/deepspeed_{strategy}.json").read_text())
    zero = deepspeed["zero_optimization"]
    for part in ["offload_optimizer", *["offload_param"] * (strategy == "zero3")]:
        zero[part] = {"device": "cpu"}
    config = yaml.safe_load((ROOT / f"configs/accelerate/{strategy}.yaml").read_text())
    config["deepspeed_config"]["deepspeed_config_file"] = str(
        write(tmp_path / "ds.json", {**deepspeed, "zero_force_ds_cpu_optimizer": False})
    )
    write(tmp_path / "zero_offload.yaml", yaml.safe_dump(config))
    for name, config_file in {"offload": tmp_path / "zero_offload", "plain": "one_gpu"}.items():
        if device == "cuda":
            given = words(strategy, "lora", tmp_path / name, on_cards=True)
            launch(config_file, given, environment, processes=1)
            continue
        given = words("zero2" if name == "offload" else "ddp", "lora", tmp_path / name)
        how = {"strategy": str(config_file)} if name == "offload" else {}
        request.getfixturevalue("forked")("run_gres.py", given, processes=1, **how)
    plain, offloaded = losses(tmp_path / "plain"), losses(tmp_path / "offload")
    assert len(plain) == 4 and offloaded == pytest.approx(plain, rel=1e-5 if device == "cpu" else 1e-3)


def test_a_file_of_the_original_s_training_form_becomes_a_model(forked, original, tmp_path):
    """DeepSpeed's ZeRO-2, as the original trains, around weights with peft's names, most of them frozen."""
    state = peft_names(original)
    torch.save(state, tmp_path / "state.pt")
    frozen = [
        name for name in state if "lora_" not in name and name.removeprefix("base_model.model.").startswith(FROZEN)
    ]
    (tmp_path / "frozen.json").write_text(json.dumps(frozen))
    forked("tests/tools/deepspeed_checkpoint.py", [tmp_path], strategy="zero2", processes=2)
    checkpoint = tmp_path / "checkpoint"
    for number, form in enumerate(FORMS["zero_to_fp32"]):
        whole = tmp_path / f"whole{number}"
        forked(checkpoint / "zero_to_fp32.py", [checkpoint, whole, *form])
        ours = run(original, whole, tmp_path / f"out{number}", "--sam", str(original / "sam.pth"))
        assert_equal(ours, expected(original))
        shutil.rmtree(whole)


@pytest.fixture(scope="module")
def larger_model(tmp_path_factory):
    """A random model of about 100 million parameters, beside which the memory of libraries and buffers is small."""
    from modeling_gsva import GsvaConfig, GsvaForConditionalGeneration, GsvaProcessor

    folder, config = tmp_path_factory.mktemp("larger"), GsvaConfig.from_pretrained(MODEL)
    for name, value in {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}.items():
        setattr(config.text_config, name, value)
    config.text_config.head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    GsvaForConditionalGeneration(config).save_pretrained(folder)
    GsvaProcessor.from_pretrained(MODEL).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "way"), [(s, way) for s in ("ddp", "zero2", "zero3", "fsdp2") for way in WAYS])
def test_the_plan_counts_what_the_processes_hold(forked, larger_model, tmp_path, monkeypatch, strategy, way):
    from trainers.arguments import parse_arguments
    from trainers.memory_plan import Strategy, count, memory_of

    more = ["--max_steps", "2", "--save_strategy", "no", "--max_length", "256", "--model", str(larger_model)]
    script = "tests/tools/fsdp_on_cpu.py" if strategy == "fsdp2" else "run_gres.py"
    given = [*words(strategy, way, tmp_path / "out"), *more]
    forked(script, given, strategy=strategy, processes=2, memory=str(tmp_path))
    held = max(json.loads((tmp_path / f"{rank}.json").read_text())["held"] for rank in range(2))
    monkeypatch.chdir(ROOT)
    sizes, activations = count(*parse_arguments([*words("ddp", way, tmp_path / "out"), *more]))
    plan = Strategy.read(f"configs/accelerate/{strategy}.yaml", 2)
    if strategy == "zero2":
        plan.bucket = min(plan.bucket, 2 * sizes.trained)  # on a CPU only what is written to is resident
    planned = memory_of(sizes, activations, plan, half=False)
    parts = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in vars(planned).items())
    print(f"{strategy} {way}: planned {planned.total / 2**20:.0f} MiB ({parts}), held {held / 2**20:.0f} MiB")
    assert held == pytest.approx(planned.total, rel=0.2)
