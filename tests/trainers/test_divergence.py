"""Training that goes wrong is reported at once, and its batch is saved."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from trainers.divergence import DivergenceWatch

SEG, REJ = 7, 8


def batch(wanted=(SEG, REJ), said=(SEG, REJ)):
    """Inputs and outputs of one conversation whose slots should be `wanted` and which the model answers with `said`."""
    ids = torch.tensor([[1, *wanted]])
    places = torch.tensor([[0, n + 1] for n in range(len(wanted))])
    logits = torch.tensor([[1.0, 0.0] if token == SEG else [0.0, 1.0] for token in said])
    inputs = {"input_ids": ids, "mask_labels": [torch.ones(2, 3, 4)]}
    return inputs, {"slot_positions": places, "slot_logits": logits}


def run(watch, losses, **options):
    inputs, outputs = batch(**options)
    return [watch.check_batch(step, {"loss": loss}, inputs, outputs, SEG) for step, loss in enumerate(losses, 1)]


def test_nan_stops_and_leaves_the_batch_with_its_texts(tmp_path):
    watch = DivergenceWatch(tmp_path, decode=lambda ids: ["words"] * len(ids))
    run(watch, [1.0, 1.0])
    with pytest.raises(FloatingPointError, match=r"Step 3: the loss is nan.*step3-rank0-1"):
        watch.check_batch(3, {"loss": math.nan, "ce_loss": 0.5}, *batch(), SEG)
    tensors = load_file(tmp_path / "divergence" / "step3-rank0-1.safetensors")
    assert tensors["input_ids"].tolist() == [[1, SEG, REJ]] and tensors["mask_labels.0"].shape == (2, 3, 4)
    told = json.loads((tmp_path / "divergence" / "step3-rank0-1.json").read_text())
    assert told["step"] == 3 and told["losses"] == {"loss": "nan", "ce_loss": 0.5} and told["texts"] == ["words"]
    assert not list((tmp_path / "divergence").glob("*.tmp"))


def test_warn_goes_on_and_off_does_not_look(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert run(DivergenceWatch(tmp_path, mode="warn"), [math.inf]) == ["the loss is inf"]
    assert "Step 1: the loss is inf" in caplog.text
    assert run(DivergenceWatch(tmp_path / "off", mode="off"), [math.nan]) == [None]
    assert not (tmp_path / "off").exists()


@pytest.mark.parametrize(
    ("losses", "spikes"),
    [
        ([1.0] * 5 + [4.9], 0),  # below five times the median
        ([1.0] * 5 + [5.1], 1),
        ([1.0] * 4 + [100.0], 0),  # too early to tell
        ([9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 6.0, 1.0], 1),  # the median, so that an early high loss does not hide it
        ([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.12], 0),  # training as it should be
    ],
)
def test_spikes(tmp_path, losses, spikes):
    found = run(DivergenceWatch(tmp_path, window=10), losses)
    assert sum(entry is not None and "jumped" in entry for entry in found) == spikes


@pytest.mark.parametrize(
    ("said", "wanted", "collapses"),
    [
        ((REJ, REJ), (SEG, REJ), True),
        ((SEG, REJ), (SEG, REJ), False),
        ((REJ, REJ), (REJ, REJ), False),  # rejecting what is absent is right
    ],
)
def test_collapse_to_rejection(tmp_path, said, wanted, collapses):
    watch = DivergenceWatch(tmp_path, window=5, min_slots=4)
    found = run(watch, [1.0] * 12, wanted=wanted, said=said)
    assert [n for n, entry in enumerate(found, 1) if entry] == ([5] if collapses else [])  # said once


def test_no_more_than_max_files_are_written(tmp_path):
    watch = DivergenceWatch(tmp_path, mode="warn", max_files=2)
    run(watch, [math.nan] * 5)
    assert len(list((tmp_path / "divergence").glob("*.safetensors"))) == 2


def test_the_trainer_stops_before_a_bad_batch_counts(make_model, processor, make_picture, tmp_path):
    """A real step: a broken weight gives NaN, the run stops, no weight has moved."""
    import numpy as np

    from trainers.arguments import GsvaTrainingArguments
    from trainers.data import GsvaCollator
    from trainers.trainer import GsvaTrainer

    class Data(SimpleNamespace):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            talk = processor.build_conversation(["a thing"], [False])
            return {"image": make_picture(), "conversations": [talk], "masks": [np.ones((1, 30, 40), np.uint8)]}

    model = make_model()
    with torch.no_grad():
        model.mask_projector[0].bias[0] = math.nan
    before = model.lm_head.weight.clone()
    args = GsvaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=1)
    trainer = GsvaTrainer(
        model=model, args=args, train_dataset=Data(), data_collator=GsvaCollator(processor), processing_class=processor
    )
    with pytest.raises(FloatingPointError, match="Step 1"):
        trainer.train()
    assert torch.equal(model.lm_head.weight, before)
    assert (tmp_path / "divergence" / "step1-rank0-1.safetensors").is_file()
