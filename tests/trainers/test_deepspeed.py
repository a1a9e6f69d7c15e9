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
from accelerate.commands import accelerate_cli
from conversions import FROZEN, assert_equal, expected, peft_names, run
from data_trees import llava, ref, referring
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
    pytest.importorskip("deepspeed")
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("cache")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def forked(environment, tmp_path_factory):
    """Run a script in one or more processes, forked from one that has imported the libraries; return their exit codes."""
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


def launch(strategy, given, environment):
    """Run the documented command on two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{strategy}.yaml",
               "--num_processes", "2", "--main_process_port", "0", "run_gres.py", *map(str, given)]  # fmt: skip
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


def test_with_zero3_batches_may_have_no_image(forked, tmp_path):
    """In some steps on one process, in some on both, in some on none."""
    from data_scripts.shapes import make_row

    pictures = tmp_path / "data" / "coco" / "train2017"
    pictures.mkdir(parents=True)
    records = []
    for number, has_image in enumerate((True, True, False, False, True, False, False, False)):
        turns = [{"from": "human", "value": "Is there a dog?"}, {"from": "gpt", "value": "No."}]
        record = {"id": str(number), "conversations": turns}
        if has_image:
            (pictures / f"{number}.png").write_bytes(make_row(0, "train", number)["image"]["bytes"])
            record["image"], turns[0]["value"] = f"{number}.png", "<image>\nIs there a dog?"
        records.append(record)
    (tmp_path / "data" / "llava_dataset").mkdir()
    (tmp_path / "data" / "llava_dataset" / "llava_instruct_150k.json").write_text(json.dumps(records))
    given = words("zero3", "lora", tmp_path / "out")
    given[given.index("--dataset_options") + 1] = "{}"
    given[given.index("--per_device_train_batch_size") + 1] = "1"
    given += ["--dataset", "llava_instruct_150k", "--data_dir", tmp_path / "data", "--save_strategy", "no"]
    forked("run_gres.py", given, strategy="zero3", processes=2)
    assert len(losses(tmp_path / "out")) == 4


def mixed_words(strategy, folder, on_cards=False):
    """Eight steps over examples of which half are of words alone: in some, one process has slots, in some both or none."""
    data = llava(referring(folder / "data", "refcoco", [ref()]), ("human", "<image>\nA dog?"), ("gpt", "No."))
    given = words(strategy, "lora", folder / strategy, on_cards)
    for argument, value in {
        "--dataset_options": "{}", "--per_device_train_batch_size": "1", "--max_steps": "8", "--save_steps": "100",
    }.items():  # fmt: skip
        given[given.index(argument) + 1] = value
    mixture = {"refer_seg": ["refcoco"], "vqa": ["llava_instruct_150k"]}
    return [
        *given, "--dataset", "mixture", "--data_dir", data, "--mixture", json.dumps(mixture), "--steps_per_epoch", "8",
        "--mixture_rates", '{"refer_seg": 1, "vqa": 1}',
    ]  # fmt: skip


def assert_mixed_losses(folder, strategy, tolerance):
    ddp = losses(folder / "ddp")
    assert len(ddp) == 8 and losses(folder / strategy) == pytest.approx(ddp, rel=tolerance)
    bce = [entry["mask_bce_loss"] for entry in json.loads((folder / "ddp/log_history.json").read_text())[:8]]
    assert any(bce) and not all(bce)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_process_may_have_no_slot(forked, tmp_path, strategy):
    for name in ("ddp", strategy):
        forked("run_gres.py", mixed_words(name, tmp_path), strategy=name, processes=2)
    assert_mixed_losses(tmp_path, strategy, 1e-5)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_a_process_may_have_no_slot_on_cards(environment, tmp_path, strategy):
    """By the documented command, over NCCL, and sharded by accelerate itself."""
    for name in ("ddp", strategy):
        launch(name, mixed_words(name, tmp_path, on_cards=True), environment)
    assert_mixed_losses(tmp_path, strategy, 1e-3)


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
