"""transformers' own Trainer, without a subclass: it finds the loss in evaluation, and trains on the loss of the whole step."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

TEXT = [[{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": answer}] for answer in "ab"]


@pytest.fixture(scope="module")
def examples(make_picture):
    """Four images of one expression each, with as many tokens and masks in each: every micro-batch weighs the same."""
    rng = np.random.default_rng(0)
    return [
        {
            "image": make_picture(n),
            "conversation": [
                {"role": "user", "content": f"<image>\n{color}?"},
                {"role": "assistant", "content": f"{color}:[SEG]"},
            ],
            "mask": rng.random((1, 30, 40)) > 0.5,
        }
        for n, color in enumerate(["red", "tan", "sky", "jet"])
    ]


@pytest.fixture
def model(make_model):
    """One for each test: a Trainer changes the configuration of its model."""
    return make_model()


@pytest.fixture
def collate(processor):
    def collate(rows):
        return processor(
            images=[row["image"] for row in rows],
            conversations=[row["conversation"] for row in rows],
            masks=[row["mask"] for row in rows],
            return_tensors="pt",
        )

    return collate


def trainer(model, tmp_path, collate, examples, **options):
    class_options = {name: options.pop(name) for name in ("compute_metrics",) if name in options}
    settings = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
    settings |= {"use_cpu": True, "report_to": [], "remove_unused_columns": False, "save_strategy": "no", **options}
    arguments = TrainingArguments(str(tmp_path), disable_tqdm=True, max_steps=1, **settings)
    return Trainer(
        model, arguments, data_collator=collate, train_dataset=examples, eval_dataset=examples, **class_options
    )


def test_evaluation_has_the_models_loss(model, tmp_path, collate, examples):
    plain = trainer(model, tmp_path, collate, examples, per_device_eval_batch_size=2)
    assert plain.label_names == ["labels", "mask_labels"]
    with torch.no_grad():
        losses = [float(model(**collate(examples[n : n + 2])).loss) for n in (0, 2)]
    assert plain.evaluate()["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_text_alone_has_a_loss_too(model, processor, tmp_path):
    def collate(rows):
        return processor(conversations=rows, return_tensors="pt")

    with torch.no_grad():
        expected = float(model(**collate(TEXT)).loss)
    assert trainer(model, tmp_path, collate, TEXT).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_predictions_are_the_logits(model, tmp_path, collate, examples):
    seen = []

    def metrics(predictions):
        seen.append((predictions.predictions.shape, predictions.label_ids.shape))
        return {"seen": 1.0}

    options = {"per_device_eval_batch_size": 2, "label_names": ["labels"], "compute_metrics": metrics}
    results = trainer(model, tmp_path, collate, examples, **options).evaluate()
    length = collate(examples)["labels"].shape[1]
    assert seen == [((4, length, model.config.text_config.vocab_size), (4, length))]
    assert results["eval_seen"] == 1.0 and "eval_loss" in results


@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_batches_learn_what_one_batch_does(make_model, tmp_path, collate, examples, size):
    trained = []
    for batch, steps in ((4, 1), (size, 4 // size)):
        model = make_model().double()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        trainer(model, tmp_path, collate, examples, **options).train()
        trained.append(model.state_dict())
    start = make_model().double().state_dict()
    for part in ("mask_projector.0.weight", "vlm.lm_head.weight", "vlm.model.multi_modal_projector.weight"):
        moved = [weights[part] - start[part] for weights in trained]
        assert moved[0].abs().max() > 1e-4
        torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-6)
