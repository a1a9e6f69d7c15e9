"""Two steps of training over bases of today, by GsvaTrainer: what learns, what stays, saving, resuming, evaluating."""

import math

import pytest
import tiny_processors
import torch
from safetensors.torch import load_file

import data_scripts
from data_scripts.mixture import TrainingDataset
from data_scripts.transforms import ReferringTransform
from evaluation.config import EvaluationConfig
from evaluation.loop import evaluate_rows
from evaluation.resume import evaluation_identity
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor
from trainers.arguments import ModelArguments, parse_arguments
from trainers.data import GsvaCollator, ProcessorWording
from trainers.digests import model_digest
from trainers.freezing import merge_lora, moved_table, prepare_for_training, snapshot, unmoved
from trainers.publishing import save
from trainers.trainer import GsvaTrainer

PAIRS = [("llava", "sam"), ("llava", "sam2"), ("gemma3", "sam2"), ("llava_next", "sam_hq")]
if tiny_processors.HAS_TORCHVISION:
    PAIRS += [("qwen3_vl", "sam2")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return data_scripts.load("shapes", None, "train", size=4)


@pytest.mark.parametrize(("family", "sam"), PAIRS)
def test_two_steps(family, sam, rows, tmp_path):
    processor = tiny_processors.make_processor(family, sam)
    model = tiny_processors.make_model(family, processor, sam)
    digest = model_digest(model, processor)
    prepared = prepare_for_training(model, ModelArguments(lora_dropout=0.0))
    frozen = {name: p.detach().clone() for name, p in prepared.named_parameters() if not p.requires_grad}
    words = ["--use_cpu", "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--learning_rate", "1e-2"]
    words += [
        "--per_device_train_batch_size",
        "2",
        "--save_steps",
        "1",
        "--save_strategy",
        "steps",
        "--logging_steps",
        "1",
    ]
    words += ["--warmup_steps", "0", "--lr_scheduler_type", "constant"]
    *_, arguments = parse_arguments(words)
    dataset = TrainingDataset(rows, ReferringTransform(ProcessorWording(processor), 2, False), 0)
    before = snapshot(prepared)
    trainer = GsvaTrainer(
        model=prepared,
        args=arguments,
        train_dataset=dataset,
        data_collator=GsvaCollator(processor, None),
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert not [name for name in unmoved(prepared, before) if "lora" in name]
    assert "LoRA of the language model" in moved_table(prepared, before)
    assert all(torch.equal(p, frozen[name]) for name, p in prepared.named_parameters() if name in frozen)

    again = prepare_for_training(tiny_processors.make_model(family, processor, sam), ModelArguments(lora_dropout=0.0))
    resumed = GsvaTrainer(
        model=again,
        args=arguments,
        train_dataset=dataset,
        data_collator=GsvaCollator(processor, None),
        processing_class=processor,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    for (name, first), (_, second) in zip(prepared.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, msg=name)

    trained = merge_lora(prepared).eval()
    trained.tie_weights()
    save(processor, trained, tmp_path / "saved")
    loaded = GsvaForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    processor_again = GsvaProcessor.from_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() and model_digest(loaded) != digest
    for protocol in ("slots", "teacher_forced"):
        config = EvaluationConfig(rows=rows, dataset="shapes", split="train", protocol=protocol, batch_size=2)
        config = config.for_model(loaded)
        first, second = (evaluate_rows(m, p, config) for m, p in ((trained, processor), (loaded, processor_again)))
        assert first.metrics("rela") == pytest.approx(second.metrics("rela"), nan_ok=True)
        identity = evaluation_identity(loaded, processor_again, config)
        assert len(identity["attention"]) >= 2 and identity == evaluation_identity(loaded, processor_again, config)
