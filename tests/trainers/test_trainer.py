"""Training on a tiny random model: batches, order, parts, equal splits of a step, exact resume, and evaluation."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from transformers import TrainerCallback

from data_scripts import shapes
from data_scripts.mixture import Mixture, TrainingDataset
from data_scripts.schema import decode_mask
from data_scripts.transforms import ConversationTransform, ReferringTransform
from evaluation.config import PROTOCOL_NOTES, EvaluationConfig
from evaluation.loop import evaluate_rows
from trainers.arguments import GsvaTrainingArguments, ModelArguments, parse_arguments
from trainers.data import GsvaCollator, ProcessorWording
from trainers.freezing import merge_lora, parts_table, prepare_for_training, snapshot, unmoved
from trainers.trainer import LOSS_PARTS as ALL_PARTS
from trainers.trainer import EpochSampler, GsvaTrainer, last_complete_checkpoint

LOSS_PARTS = tuple(name for name in ALL_PARTS if name != "object_score_loss")  # which SAM does not have

MODES = ("lora", "full", "frozen")


@pytest.fixture(scope="module")
def rows():
    """Six pictures with 1 to 4 expressions, so that examples differ in masks and in tokens."""
    made = [shapes.make_row(0, "train", index) for index in range(6)]
    return [{**row, "expressions": row["expressions"][: 1 + n % 4]} for n, row in enumerate(made)]


@pytest.fixture
def make_trainer(make_model, processor, rows, tmp_path):
    def make(
        mode="full", model=None, data=None, folder="run", trainer_class=GsvaTrainer, evaluation=None, **arguments
    ):
        torch.manual_seed(0)
        model = prepare_for_training(
            make_model() if model is None else model, ModelArguments(train_language_model=mode)
        )
        options = {
            "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "seed": 3,
            "save_strategy": "no", "output_dir": str(tmp_path / folder), "use_cpu": True, "disable_tqdm": True,
            "report_to": "none", "logging_nan_inf_filter": False, "dataloader_pin_memory": False, "save_total_limit": None,
        }  # fmt: skip
        return trainer_class(
            model=model,
            args=GsvaTrainingArguments(**{**options, **arguments}),
            train_dataset=TrainingDataset(rows, ReferringTransform(num_expressions=6, all_absent=True), 3)
            if data is None
            else data,
            data_collator=GsvaCollator(processor),
            processing_class=processor,
            evaluation=evaluation,
            eval_dataset=[] if evaluation is not None else None,
        )

    return make


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# --- batches, order, checkpoints, arguments, wording ---


def test_a_batch_holds_each_picture_once_and_conversations_point_to_it(processor, make_picture):
    def talk(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    two = np.zeros((2, 30, 40), np.uint8)
    two[0, :5] = 1
    none = np.zeros((0, 0, 0), np.uint8)
    batch = GsvaCollator(processor)(
        [
            {"image": make_picture(0), "conversations": [talk("<image>\na, b?", "[SEG] [REJ]"), talk("<image>\nHi", "Ho")],
             "masks": [two, none]},
            {"image": None, "conversations": [talk("Who are you?", "A model.")], "masks": [none]},
            {"image": make_picture(1, 20, 50), "conversations": [talk("<image>\nc?", "[SEG]"), talk("d?", "e")],
             "masks": [np.ones((1, 50, 20), np.uint8), none]},
        ]
    )  # fmt: skip
    assert batch["image_index"].tolist() == [0, 0, -1, 1, -1]
    assert len(batch["pixel_values"]) == len(batch["sam_pixel_values"]) == 2
    assert batch["original_sizes"].tolist() == [[30, 40], [50, 20]]
    assert [len(mask) for mask in batch["mask_labels"]] == [2, 0, 0, 1, 0]
    assert batch["mask_labels"][0].sum() == 5 * 40
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert not (batch["labels"][batch["attention_mask"] == 0] != -100).any()


def test_a_batch_without_pictures_has_no_pixels(processor):
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    example = {"image": None, "conversations": [talk], "masks": [np.zeros((0, 0, 0), np.uint8)]}
    batch = GsvaCollator(processor)([example, example])
    assert "pixel_values" not in batch and batch["image_index"].tolist() == [-1, -1]


def test_the_collator_cuts_long_conversations(processor, rows):
    example = ReferringTransform(all_absent=True)(rows[3])
    assert GsvaCollator(processor, max_length=100)([example])["input_ids"].shape == (1, 100)


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(10, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 2) == order(0, 2)
    assert sorted(order(0, 2)) == list(range(20, 30))  # epoch * length + item
    assert [index - 10 for index in order(0, 1)] != order(0, 0) != order(1, 0)
    assert len(EpochSampler(10, 0)) == 10


def test_half_written_checkpoints_are_skipped(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None and last_complete_checkpoint(tmp_path / "none") is None
    for step, state in (
        (2, '{"global_step": 2}'),
        (10, '{"global_step": 10}'),
        (12, '{"global_st'),
        (14, None),
        (16, "{}"),
    ):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-last").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")  # by number, not by name


def test_arguments_come_from_a_preset_and_the_command_line_overrides_it(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        f"output_dir: {tmp_path}\nlearning_rate: 3e-4\ndo_train: true\nprotocols: [slots, generate]\n"
        "dataset_options: {size: 8}\nwarmup_steps: 50\nimage: []\ndata_dir: null\nuse_cpu: true\n"
    )
    model, data, training = parse_arguments([str(preset), "--warmup_steps", "7", "--conventions", "gsva", "rela"])
    assert (training.learning_rate, training.warmup_steps, training.do_train) == (3e-4, 7, True)
    assert (data.protocols, data.conventions, data.options) == (["slots", "generate"], ["gsva", "rela"], {"size": 8})
    assert (model.lora_r, data.num_expressions, training.remove_unused_columns) == (8, 3, False)
    assert training.report_to == []
    *_, training = parse_arguments([str(preset), "--report_to", "tensorboard", "wandb"])
    assert training.report_to == ["tensorboard", "wandb"]
    _, data, _ = parse_arguments([str(preset), "--protocols", "teacher_forced", "--dataset_options", '{"size": 9}'])
    assert (data.protocols, data.options) == (["teacher_forced"], {"size": 9})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["configs/none.yaml"], "preset configs/none.yaml does not exist"),
        (["--learning_rat", "1"], "['--learning_rat', '1'] is not understood"),  # no guessing of abbreviations
        (["--protocols", "slot"], "protocols='slot' is not known; choose one of teacher_forced, slots, generate"),
        (["--conventions", "coco"], "conventions='coco'"),
        (
            ["--train_language_model", "half"],
            "train_language_model='half' is not known; choose one of lora, full, frozen",
        ),
        (["--wording", "mine"], "wording='mine'"),
        (["--dataset_options", "[8]"], "dataset_options='[8]' is no JSON object"),
        (["--dataset_options", "{size"], "dataset_options='{size' is no JSON object"),
    ],
)
def test_bad_arguments_are_named(words, message):
    with pytest.raises(ValueError) as error:
        parse_arguments(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n", "holds list"), ("a: [1\n", "is no YAML"), ("colour: 1\n", "--colour")]
)
def test_bad_presets_are_named(tmp_path, text, message):
    (tmp_path / "preset.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(tmp_path / "preset.yaml")])


def test_the_presets_in_configs_are_understood():
    _, data, training = parse_arguments([str(ROOT / "configs/finetune_shapes.yaml"), "--use_cpu"])
    assert data.dataset == "shapes" and training.do_train and training.do_eval


def test_training_can_be_worded_as_evaluation_is(processor, rows):
    names = [entry["text"] for entry in rows[3]["expressions"]]
    present = [entry["num_targets"] > 0 for entry in rows[3]["expressions"]]
    wording = ProcessorWording(processor)
    expected = processor.build_conversation(names, [not there for there in present])
    assert [turn["content"] for turn in expected] == [wording.question(0, names), wording.answer(0, names, present)]
    example = ReferringTransform(wording, num_expressions=6, all_absent=True)(rows[3], epoch=1)
    (talk,) = example["conversations"]
    assert "What are " in talk[0]["content"] and talk[1]["content"].startswith("Sure,")
    slots = [
        is_rejected for _, is_rejected in processor.read_answer(processor.tokenizer(talk[1]["content"])["input_ids"])
    ]
    assert slots == [not mask.any() for mask in example["masks"][0]]


# --- which parts learn ---


@pytest.mark.parametrize("mode", MODES)
def test_the_parts_that_learn(make_model, mode):
    model = make_model()
    total = sum(parameter.numel() for parameter in model.parameters())
    model = prepare_for_training(model, ModelArguments(train_language_model=mode))
    trained = {
        name.replace(".modules_to_save.default", "")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert not any(
        part in name for name in trained for part in ("vision_tower", "multi_modal_projector", "vision_encoder")
    )
    assert not any(part in name for name in trained for part in ("prompt_encoder", "shared_image_embedding"))
    assert not any("iou_prediction_head" in name or "mlps.1" in name for name in trained)
    for part in ("embed_tokens", "lm_head", "sam.mask_decoder", "mask_projector.0", "mask_projector.2"):
        assert any(part in name for name in trained), part
    layers = {name for name in trained if "language_model.layers" in name}
    if mode == "lora":
        assert len(layers) == 2 * 2 * 2  # layers, q and v, A and B
        assert all(
            "self_attn" in name and "lora_" in name and ("q_proj" in name or "v_proj" in name) for name in layers
        )
        assert {name for name in trained if "lora_" in name} == layers
    else:
        assert bool(layers) == (mode == "full")
    last = parts_table(model).splitlines()[-1].replace(",", "").split()
    assert int(last[1]) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert int(last[1]) + int(last[2]) == total + sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


# --- training ---


@pytest.mark.parametrize("mode", MODES)
def test_every_trained_parameter_changes_and_no_frozen_one_does(make_trainer, mode):
    # Two steps: LoRA's A has no gradient while B is still zero.
    trainer = make_trainer(mode, learning_rate=1e-2, weight_decay=0.0, max_steps=3)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    prints = snapshot(trainer.model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
    assert unmoved(trainer.model, prints) == []
    plain = merge_lora(trainer.model)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name or "modules_to_save" in name]
    assert torch.equal(plain.lm_head.weight, dict(plain.named_parameters())["vlm.lm_head.weight"])
    changed = dict(plain.named_parameters())["vlm.model.language_model.layers.0.self_attn.q_proj.weight"]
    start = before.get("base_model.model.vlm.model.language_model.layers.0.self_attn.q_proj.base_layer.weight")
    start = before.get("vlm.model.language_model.layers.0.self_attn.q_proj.weight") if start is None else start
    assert torch.equal(changed, start) == (mode == "frozen")  # merged LoRA is in the plain weight


class PlainAverages(GsvaTrainer):
    """What this project's trainer must not do: average each micro-batch by itself."""

    def get_batch_samples(self, *args):
        batches, _ = super().get_batch_samples(*args)
        return [{k: v for k, v in batch.items() if k != "num_masks_in_batch"} for batch in batches], None


def test_batch_1_with_accumulation_4_equals_batch_4(make_trainer, make_model, rows):
    """In float64 and with SGD, whose steps are linear in the gradient; float32 parts of LLaMA leave 1e-7."""

    def weights(trainer_class=GsvaTrainer, **arguments):
        data = TrainingDataset(rows[:4], ReferringTransform(num_expressions=6, all_absent=True), 3)
        trainer = make_trainer(
            model=make_model().double(), data=data, trainer_class=trainer_class, optim="sgd", learning_rate=1e-2,
            max_grad_norm=0.0, **arguments,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 2
        flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        return flat, [entry["loss"] for entry in losses(trainer)]

    whole, whole_loss = weights(per_device_train_batch_size=4)
    split, split_loss = weights(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    plain, _ = weights(PlainAverages, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert (whole - split).abs().max() < 2e-6
    assert split_loss == pytest.approx(whole_loss, rel=1e-5)
    assert (whole - plain).abs().max() > 2e-4  # the examples do differ


class Kill(TrainerCallback):
    """Dies in the middle of a step, with one done step unsaved."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_killed_training_resumed_equals_unbroken_training(make_trainer, make_model, tmp_path):
    """Three steps make an epoch. Killed within the first one, continued from another model's weights."""
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}
    unbroken = make_trainer(folder="unbroken", **options)
    unbroken.train()
    killed = make_trainer(folder="killed", **options)
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    shutil.copytree(tmp_path / "killed/checkpoint-2", tmp_path / "killed/checkpoint-3")  # a half-written one
    (tmp_path / "killed/checkpoint-3/trainer_state.json").unlink()
    checkpoint = last_complete_checkpoint(tmp_path / "killed")
    assert checkpoint.endswith("checkpoint-2")
    resumed = make_trainer(model=make_model(seed=1), folder="killed", **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert equal(resumed.model, unbroken.model)
    facts = ("step", "epoch", "loss", "grad_norm", "learning_rate", "slot_accuracy", *LOSS_PARTS)
    assert [[entry[k] for k in facts] for entry in losses(resumed)] == [
        [entry[k] for k in facts] for entry in losses(unbroken)
    ]

    # Within the second epoch, whose sentences and order are its own.
    later = make_trainer(model=make_model(seed=1), folder="later", **options)
    later.train(resume_from_checkpoint=str(tmp_path / "unbroken/checkpoint-4"))
    assert equal(later.model, unbroken.model)

    # A finished run has nothing left to do.
    done = make_trainer(model=make_model(seed=1), folder="unbroken", **options)
    done.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "unbroken"))
    assert done.state.global_step == 5 and equal(done.model, unbroken.model)


def test_lora_resumes_exactly_too_at_the_border_of_epochs(make_trainer, tmp_path):
    """With dropout, whose random state has to be restored; the adapter's frozen parts stay frozen."""
    options = {"mode": "lora", "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    unbroken = make_trainer(folder="unbroken", **options)
    unbroken.train()
    resumed = make_trainer(folder="resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken/checkpoint-3"))
    assert equal(resumed.model, unbroken.model)
    trained = [[n for n, p in trainer.model.named_parameters() if p.requires_grad] for trainer in (unbroken, resumed)]
    assert trained[0] == trained[1]


def test_logged_parts_add_up_to_the_loss(make_trainer):
    trainer = make_trainer(max_steps=3, logging_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    trainer.train()
    for entry in losses(trainer):
        assert sum(entry[name] for name in LOSS_PARTS) == pytest.approx(entry["loss"], rel=1e-5)
        assert all(entry[name] > 0 for name in LOSS_PARTS)
        assert (
            0 <= entry["slot_accuracy"] <= 1 and 0 <= entry["data_wait_share"] <= 1 and entry["images_per_second"] > 0
        )


def test_batches_without_slots_masks_or_pictures_stay_finite(make_trainer, rows):
    """Questions in words, one without a picture, and pictures of which nothing asked is there, in batches of one."""
    absent = [
        {**row, "expressions": [e for e in shapes_row["expressions"] if e["num_targets"] == 0][:2]}
        for row, shapes_row in ((shapes.make_row(0, "train", n), shapes.make_row(0, "train", n)) for n in (0, 1))
    ]
    words = [shapes.make_row(0, "train", n, "vqa") for n in range(2)]
    words.append({"image": None, "image_id": "text", "conversation": [
        {"role": "user", "text": "Who are you?"}, {"role": "assistant", "text": "A model."}]})  # fmt: skip
    transform = ReferringTransform(all_absent=True)
    data = Mixture(
        {
            "present": (1, [TrainingDataset(rows, transform)]),
            "absent": (2, [TrainingDataset(absent, transform)]),
            "words": (3, [TrainingDataset(words, ConversationTransform())]),
        },
        length=8,
    )
    shown = [
        (example["image"] is None, int(sum(mask.any() for m in example["masks"] for mask in m))) for example in data
    ]
    assert {(True, 0), (False, 0)} <= set(shown) and any(count for _, count in shown)
    trainer = make_trainer("lora", data=data, max_steps=8, per_device_train_batch_size=1)
    trainer.train()
    history = losses(trainer)
    assert len(history) == 8 and all(np.isfinite(entry[name]) for entry in history for name in ("loss", *LOSS_PARTS))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert sum("slot_accuracy" not in entry for entry in history) == sum(
        not any(
            "[SEG]" in turn["content"] or "[REJ]" in turn["content"]
            for talk in example["conversations"]
            for turn in talk
        )
        for example in data
    )


def test_answers_that_max_length_cuts_off_teach_nothing(make_trainer, processor):
    trainer = make_trainer(max_steps=1)
    trainer.data_collator = GsvaCollator(processor, max_length=60)  # ends within the system text's question
    trainer.train()
    (entry,) = losses(trainer)
    assert entry["ce_loss"] == 0 and np.isfinite(entry["loss"])


# --- evaluation ---


def plan_of(rows, **options):
    return EvaluationConfig(rows=rows, dataset="shapes", split="train", **options)


def test_evaluation_during_training_is_the_evaluation_of_that_moment(make_trainer, processor, rows):
    plan = plan_of(rows[:3], batch_size=2)
    trainer = make_trainer(max_steps=2, eval_strategy="steps", eval_steps=1, evaluation=plan)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_gIoU" in entry]
    assert [entry["step"] for entry in evaluations] == [1, 2] and trainer.model.training
    metrics = evaluate_rows(trainer.model, processor, plan).metrics()
    assert evaluations[-1]["eval_gIoU"] == metrics["gIoU"] and evaluations[-1]["eval_T_acc"] == metrics["T_acc"]
    alone = make_trainer(max_steps=2)
    alone.train()
    assert equal(trainer.model, alone.model)  # looking changes nothing
    with pytest.raises(ValueError, match="no evaluation"):
        alone.evaluate()


@pytest.mark.parametrize("protocol", ["teacher_forced", "slots", "generate"])
def test_every_expression_gives_one_row_in_order(model, processor, rows, protocol):
    seen = []
    plan = plan_of(rows[:4], protocol=protocol, batch_size=3, max_new_tokens=4)
    result = evaluate_rows(
        model, processor, plan, on_prediction=lambda index, row, questions, results: seen.append((index, len(results)))
    )
    asked = [(row["image_id"], entry) for row in rows[:4] for entry in row["expressions"]]
    assert [(found["image_id"], found["expression"]) for found in result.rows] == [(i, e["text"]) for i, e in asked]
    assert [found["is_no_target"] for found in result.rows] == [e["num_targets"] == 0 for _, e in asked]
    assert seen == [(n, len(row["expressions"])) for n, row in enumerate(rows[:4])]
    for found, (_, entry) in zip(result.rows, asked):
        area = int(decode_mask(entry["mask"]).sum())
        assert found["intersection"] <= area <= found["union"] <= 128 * 128
        assert found["protocol"] == protocol and (found["intersection"] == 0 or not found["is_no_target"])


TWO_PROCESSES = """
import json, sys
import torch
torch.set_num_threads(1)
from data_scripts import shapes
from data_scripts.mixture import TrainingDataset
from data_scripts.transforms import ReferringTransform
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor
from trainers.arguments import GsvaTrainingArguments, ModelArguments
from trainers.data import GsvaCollator
from evaluation import EvaluationConfig, evaluate_rows
from trainers.freezing import prepare_for_training
from trainers.trainer import GsvaTrainer

folder, out = sys.argv[1:]
processor = GsvaProcessor.from_pretrained(folder)
rows = [shapes.make_row(0, "train", n) for n in range(7)]

def train(checkpoint=None, count=6, name="run", **more):
    model = GsvaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 4, **more}
    arguments = GsvaTrainingArguments(
        output_dir=f"{out}/{name}", per_device_train_batch_size=1, optim="sgd", learning_rate=1e-2, max_grad_norm=0.0,
        logging_steps=1, disable_tqdm=True, report_to="none", seed=3, **options,
    )
    data = [{**row, "expressions": row["expressions"][: 1 + n % 4]} for n, row in enumerate(rows[:count])]
    trainer = GsvaTrainer(
        model=prepare_for_training(model, ModelArguments(train_language_model="full")), args=arguments,
        train_dataset=TrainingDataset(data, ReferringTransform(num_expressions=6, all_absent=True), 3),
        data_collator=GsvaCollator(processor), processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer

trainer = train()
resumed = train(f"{out}/run/checkpoint-4")
epoch = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "no"}
steps = {count: train(None, count, f"uneven-{count}", **epoch).state.global_step for count in (5, 1)}
rank = trainer.accelerator.process_index
weights = trainer.model.state_dict()
equal = all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())
if rank == 0:
    torch.save(weights, f"{out}/weights.pt")
found = {"processes": trainer.accelerator.num_processes, "resumed": equal, "history": trainer.state.log_history, "seen": {},
         "steps": steps}
model = GsvaForConditionalGeneration.from_pretrained(folder).to(trainer.args.device)
for count in (7, 1):
    seen = []
    plan = EvaluationConfig(rows[:count], "shapes", "train", batch_size=2)
    result = evaluate_rows(model, processor, plan, on_prediction=lambda index, *rest: seen.append(index))
    found["seen"][count], found[f"rows of {count}"] = seen, result.rows
with open(f"{out}/{rank}.json", "w") as file:
    json.dump(found, file)
"""


def test_two_processes_train_and_count_as_one_does(make_trainer, make_model, model_dir, model, processor, tmp_path):
    """Batches of 1 on two processes are batches of 2 on one; resumed within the second epoch; 7 samples on 2 processes."""
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
               "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "two.py"), str(model_dir), str(tmp_path)], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert zero["processes"] == 2 and zero["resumed"] and one["resumed"]
    # An epoch of five batches, and of one: the process that has none of its own in the last step gets one of the first.
    assert zero["steps"] == one["steps"] == {"5": 3, "1": 1}

    alone = make_trainer(model=make_model().double(), max_steps=5, optim="sgd", learning_rate=1e-2, max_grad_norm=0.0)
    alone.train()
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert max((value - weights[name]).abs().max() for name, value in alone.model.state_dict().items()) < 5e-6
    history = [entry for entry in zero["history"] if "loss" in entry]
    for name in ("loss", "slot_accuracy", *LOSS_PARTS):
        expected = [entry[name] for entry in losses(alone)]
        assert [entry[name] for entry in history] == pytest.approx(expected, rel=1e-4)

    for count in (7, 1):  # one sample leaves the other process without any
        mine = [found["seen"][str(count)] for found in (zero, one)]
        assert sorted(mine[0] + mine[1]) == list(range(count)) and bool(mine[1]) == (count > 1)
        rows = [shapes.make_row(0, "train", n) for n in range(count)]
        result = evaluate_rows(model, processor, plan_of(rows, batch_size=2))
        assert zero[f"rows of {count}"] == one[f"rows of {count}"] == result.rows


BASE = ROOT / "assets/tiny_gsva"


@pytest.mark.skipif(not (BASE / "model.safetensors").exists(), reason="assets/tiny_gsva is not made yet (make base)")
def test_the_base_answers_from_the_picture_and_from_nothing_else():
    """With the pictures exchanged among the rows, masks fall to what guessing gives."""
    from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor

    model, processor = (
        GsvaForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32),
        GsvaProcessor.from_pretrained(BASE),
    )
    right = [shapes.make_row(0, "validation", n) for n in range(40)]
    for row in right:
        row["expressions"] = [entry for entry in row["expressions"] if entry["num_targets"]]
    wrong = [{**row, "image": right[(n + 1) % len(right)]["image"]} for n, row in enumerate(right)]

    def mean_iou(rows):
        found = evaluate_rows(model, processor, plan_of(rows, batch_size=20)).rows
        return np.mean([row["intersection"] / row["union"] if row["union"] else 0.0 for row in found])

    seen, guessed = mean_iou(right), mean_iou(wrong)
    assert seen > 0.6 and guessed < seen / 2, (seen, guessed)


# --- seen ---


@pytest.fixture
def logged(make_trainer, rows, tmp_path, monkeypatch):
    """A short run that reports to TensorBoard, and everything in its event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    plan = plan_of(rows[:3], batch_size=2)
    trainer = make_trainer(
        max_steps=2,
        report_to=["tensorboard"],
        eval_strategy="steps",
        eval_steps=2,
        evaluation=plan,
        validation_pictures=2,
    )
    trainer.train()
    events = EventAccumulator(str(tmp_path / "run/runs"), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    return trainer, events.Reload()


def test_what_is_to_be_seen_is_in_the_log_and_in_tensorboard(logged):
    trainer, events = logged
    names = ("loss", *LOSS_PARTS, "slot_accuracy", "mask_iou", "learning_rate", "grad_norm", "images_per_second",
             "data_wait_share", "memory_gib")  # fmt: skip
    history = losses(trainer)
    assert [entry["step"] for entry in history] == [1, 2]
    for name in names:
        told = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert told == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in history], name
    for entry in history:
        assert 0 <= entry["mask_iou"] <= 1 and entry["grad_norm"] > 0
        assert 0.05 < entry["memory_gib"] < 64  # of a process that has imported torch
    (evaluated,) = [entry for entry in trainer.state.log_history if "eval_gIoU" in entry]
    assert (evaluated["eval_protocol"], evaluated["eval_convention"]) == ("slots", "rela")
    assert evaluated["eval_protocol_note"] == PROTOCOL_NOTES["slots"]
    assert [event.value for event in events.Scalars("eval/gIoU")] == pytest.approx([evaluated["eval_gIoU"]])
    for name, said in (("protocol", b"slots"), ("convention", b"rela")):
        assert events.Tensors(f"eval/{name}/text_summary")[0].tensor_proto.string_val == [said]


def test_each_evaluation_draws_a_few_pictures(logged, rows, tmp_path):
    folder = tmp_path / "run/validation/step-2"
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", "001.png"]
    assert [path.name for path in (tmp_path / "run/validation").iterdir()] == ["step-2"]
    for n, path in enumerate(sorted(folder.iterdir())):
        with Image.open(path) as sheet:
            assert sheet.width == 10 + 266 * len(rows[n]["expressions"]) and sheet.height > 256 + 3 * 17
            colours = {colour for _, colour in sheet.getcolors(2**24)}
        assert (20, 20, 20) in colours or not rows[n]["expressions"][0][
            "num_targets"
        ]  # the rim of the truth's outline
        assert colours & {(17, 112, 58), (176, 0, 32)}  # what became of it, in words
        (shown,) = logged[1].Images(f"validation/{n:03d}")
        assert (shown.step, shown.width, shown.height) == (2, *sheet.size)


def test_the_logged_mask_iou_is_the_mean_over_the_masks_of_a_step(make_trainer):
    """Two micro-batches to a step, with other numbers of masks."""
    found = []

    class Watched(GsvaTrainer):
        def _collect(self, inputs, outputs):
            found.extend(outputs["mask_ious"].tolist())
            super()._collect(inputs, outputs)

    trainer = make_trainer(trainer_class=Watched, max_steps=1, gradient_accumulation_steps=2)
    trainer.train()
    (entry,) = losses(trainer)
    assert len(found) > 2 and entry["mask_iou"] == pytest.approx(np.mean(found), rel=1e-5)
