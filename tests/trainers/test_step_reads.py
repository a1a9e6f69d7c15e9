"""How often a training step and an evaluation through the real classes read the device: the same for any batch."""

import numpy as np
import pytest
import torch
from host_reads import HostReads

from data_scripts.schema import encode_mask
from evaluation.config import EvaluationConfig
from evaluation.loop import evaluate_rows
from trainers.arguments import GsvaTrainingArguments, ModelArguments
from trainers.data import GsvaCollator
from trainers.feature_cache import FeatureCache
from trainers.freezing import prepare_for_training
from trainers.trainer import GsvaTrainer

NAMES = ["the circle", "a star", "the ring", "a red thing", "blue"]
SIZES = ((2, 2), (2, 5), (4, 5))  # images, and expressions of each


class Pictures:
    """One batch of images with as many expressions each; every other one is absent."""

    def __init__(self, processor, make_picture, images, expressions):
        self.processor, self.make_picture = processor, make_picture
        self.images, self.expressions = images, expressions

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        index %= self.images
        masks = np.zeros((self.expressions, 30 + index, 40), np.uint8)
        masks[1::2, 5:20, 5:20] = 1
        talk = self.processor.build_conversation(NAMES[: self.expressions], [not mask.any() for mask in masks])
        image = self.make_picture(index, 40, 30 + index)
        return {"image": image, "conversations": [talk], "masks": [masks]}

    def row(self, index):
        example = self[index]
        entries = [
            {"text": name, "mask": encode_mask(mask), "num_targets": int(mask.any()), "is_sentence": False}
            for name, mask in zip(NAMES, example["masks"][0])
        ]
        height, width = example["masks"][0].shape[1:]
        return {"image": example["image"], "height": height, "width": width, "image_id": index, "expressions": entries}


@pytest.fixture
def pictures(processor, make_picture):
    return lambda *size: Pictures(processor, make_picture, *size)


@pytest.fixture
def make_trainer(make_model, processor, tmp_path):
    def make(data, model=None, **options):
        torch.manual_seed(0)
        model = prepare_for_training(model or make_model(), ModelArguments(lora_dropout=0.0))
        parts = options.get("gradient_accumulation_steps", 1)
        settings = {
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "max_steps": 3,
            "per_device_train_batch_size": len(data) // parts,
            "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": "none",
            "dataloader_num_workers": 1,  # what prepares a batch is no read of the device, and counts in another process
        }  # fmt: skip
        return GsvaTrainer(
            model=model, args=GsvaTrainingArguments(**{**settings, **options}), train_dataset=data,
            data_collator=GsvaCollator(processor), processing_class=processor,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("rejected", ["zero_logits", "ignore"])
@pytest.mark.parametrize(
    "options", [{}, {"divergence": "off"}, {"gradient_accumulation_steps": 2}, {"feature_cache": True}], ids=str
)
def test_a_training_step_reads_a_constant_number_of_times(
    options, rejected, make_model, make_trainer, pictures, tmp_path
):
    """Loss parts, slot accuracy, mask IoU, the watch of divergence and the log are in it; the cache is warm."""
    counts = []
    for size in SIZES:
        data, own = pictures(*size), dict(options)
        if "feature_cache" in own:
            own["feature_cache"] = str(tmp_path / "features")
            make_trainer(data, **own).train()
        trainer = make_trainer(data, make_model(rejected_slot_loss=rejected), **own)
        if trainer.features is not None:
            trainer.features.files.reads.fill_(1)  # no comparison in this test
        with HostReads() as reads:
            trainer.train()
        assert [entry["step"] for entry in trainer.state.log_history if "slot_accuracy" in entry] == [1, 2, 3]
        if trainer.features is not None:
            assert (trainer.features.misses, trainer.features.hits) == (0, 3 * size[0])
        counts.append(reads.count)
    # Nine of the model's forward pass, two of the watch, two of the log; and the order of an epoch, which is on the CPU.
    watch, parts = 2 * (options.get("divergence") != "off"), options.get("gradient_accumulation_steps", 1)
    assert counts == [3 * ((9 + watch) * parts + 2 + 1)] * 3, reads.places


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_a_warm_cache_reads_nothing(kind, make_model, processor, pictures, tmp_path):
    """Neither pixels nor features come back from the device, and pixels do not even go there."""
    model = prepare_for_training(make_model(), ModelArguments())
    counts = []
    for size in SIZES:
        data = pictures(*size)
        examples = [data[index] for index in range(len(data))]
        cache = FeatureCache(tmp_path, model.base_model.model, getattr(torch, kind))
        collator = cache.collator(GsvaCollator(processor))
        cold = collator(examples)
        cache.fill(cold)
        cache.files.reads.fill_(1)  # no comparison in this test
        batch = collator(examples)
        assert not {"pixel_values", "sam_pixel_values"} & set(batch)
        with HostReads() as filling:
            inputs = cache.fill(batch)
        with HostReads() as step:
            model(**inputs).loss.backward()
        assert cache.hits >= size[0] and filling.count == 0, filling.places
        counts.append(step.count)
    assert counts[0] == counts[1] == counts[2] <= 10


@pytest.mark.parametrize(("protocol", "number"), [("slots", 25), ("teacher_forced", 26), ("generate", 27)])
def test_an_evaluated_batch_reads_a_constant_number_of_times(
    protocol, number, make_model, processor, pictures, monkeypatch
):
    """With masks as on a card, where they are counted on their device."""
    monkeypatch.setattr("evaluation.loop.stays_on_device", lambda device: True)
    model, counts = make_model(), []
    for size in SIZES:
        data = pictures(*size)
        rows = [data.row(index) for index in range(len(data))]
        config = EvaluationConfig(
            rows=rows, dataset="shapes", split="train", protocol=protocol, batch_size=len(rows), max_new_tokens=4
        )
        with HostReads() as reads:
            result = evaluate_rows(model, processor, config, keep_masks=True)
        assert len(result.rows) == size[0] * size[1]
        counts.append(reads.count)
    assert counts == [number] * 3, reads.places
