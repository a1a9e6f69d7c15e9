"""Roads through the project on a pretended card (pretend_card.py): pytest gets this file by name, in a process of its own.

Each road is taken on the CPU and on the card, and has to end with the same numbers. A tensor left on the host raises on the way.
"""

import copy
import re
from collections.abc import Mapping

import numpy as np
import pretend_card
import pytest
import tiny_bases as bases
import torch
from accelerate.state import AcceleratorState, PartialState

from benchmarks import _gpu_parts
from benchmarks._gpu_workload import TINY
from benchmarks.gpu import PARTS, TESTS
from data_scripts import shapes
from data_scripts.mixture import TrainingDataset
from data_scripts.transforms import ReferringTransform
from evaluation import EvaluationConfig, evaluate_rows
from evaluation.predictor import Predictor
from modeling_gsva.pipeline_gsva import GsvaPipeline
from modeling_gsva.sam_attention_gsva import WAYS, use_gsva_attention
from trainers.arguments import GsvaTrainingArguments, ModelArguments
from trainers.data import GsvaCollator
from trainers.feature_cache import FeatureCache
from trainers.freezing import prepare_for_training
from trainers.trainer import GsvaTrainer

CARD = "card:0"


@pytest.fixture(scope="module", autouse=True)
def card():
    pretend_card.register()
    with torch.autograd.set_multithreading_enabled(False):  # PyTorch aborts in a thread of a device written in Python
        yield


def to_host(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {name: to_host(part) for name, part in value.items()}
    return [to_host(part) for part in value] if isinstance(value, (list, tuple)) else value


def to_card(value):
    if isinstance(value, torch.Tensor):
        return value.to(CARD)
    if isinstance(value, Mapping):
        return {name: to_card(part) for name, part in value.items()}
    return [to_card(part) for part in value] if isinstance(value, (list, tuple)) else value


def assert_same(found, expected, where="result", tolerance=1e-4):
    """Compare nested outputs; numbers within a tolerance, the rest exactly."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_same(found[name], expected[name], f"{where}[{name!r}]", tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected)):
            assert_same(one, other, f"{where}[{number}]", tolerance)
    elif isinstance(expected, (torch.Tensor, np.ndarray, float)):
        torch.testing.assert_close(
            torch.as_tensor(to_host(found)),
            torch.as_tensor(expected),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda message: f"{where}: {message}",
        )
    else:
        assert found == expected, where


def on_card(model):
    model = copy.deepcopy(model).to(CARD)
    model.tie_weights()
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {torch.device(CARD)}
    return model


def test_the_card_refuses_what_cards_refuse():
    here, there = torch.arange(3.0), torch.arange(3.0, device=CARD)
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.functional.linear(there[None], here[None])
    (_, read), (_, not_read) = waits(there.max().item), waits(there.max)
    assert (read, not_read) == (1, 0) and waits(lambda: there[there > 1])[1] == 1 and waits(there.cpu)[1] == 1
    assert (there + 1).device == torch.device(CARD) and (there * torch.tensor(2.0)).tolist() == [0, 2, 4]


@pytest.mark.parametrize("single", [False, True], ids=["one prompt", "a prompt each"])
@pytest.mark.parametrize("method", ["slots", "teacher_forced", "generate"])
def test_segment(model, processor, asked, method, single):
    options = {"max_new_tokens": 4} if method == "generate" else {}
    inputs, card = asked(2, 5, single), on_card(model)
    moved = inputs.__class__(dict(inputs), tensor_type=None).to(CARD)
    expected = model.segment(**inputs, method=method, **options)
    found = card.segment(**moved, method=method, **options)
    assert_same(dict(found), dict(expected))
    for more in ({}, {"as_tensors": True}, {"keep_rejected_masks": True}):
        results = [processor.post_process_segmentation(*of, **more) for of in ((found, moved), (expected, inputs))]
        assert_same(*results)
    instances = [processor.post_process_instance_segmentation(*of) for of in ((found, moved), (expected, inputs))]
    assert_same(*instances)


def waits(function, *arguments, **options):
    before = pretend_card.CardTensor.reads
    return function(*arguments, **options), pretend_card.CardTensor.reads - before


@pytest.mark.parametrize("method", ["slots", "teacher_forced", "generate"])
def test_segment_waits_as_often_for_any_number_of_slots(model, processor, asked, method):
    """What transformers waits for is in the number."""
    options = {"max_new_tokens": 4, "min_new_tokens": 4} if method == "generate" else {}
    card, counts = on_card(model), []
    for images, expressions in ((2, 2), (2, 5), (4, 5)):
        inputs = asked(images, expressions)
        inputs = inputs.__class__(dict(inputs), tensor_type=None).to(CARD)
        outputs, during = waits(card.segment, **inputs, method=method, **options)
        results, after = waits(processor.post_process_segmentation, outputs, inputs, as_tensors=True)
        assert [len(of_image) for of_image in results] == [expressions] * images
        counts.append((during, after))
    assert counts[1] == counts[2] and counts[0][0] <= counts[1][0] and counts[1][1] > 0


def test_training_waits_as_often_for_any_number_of_slots(make_model, learned):
    card, counts = on_card(make_model().train()), []
    for size in ((2, 2), (2, 5), (4, 5)):
        outputs, forward = waits(card, **to_card(dict(learned(*size))))
        counts.append((forward, waits(outputs.loss.backward)[1]))
    assert counts[0] == counts[1] == counts[2] and counts[0][0] > 0 and counts[0][1] == 0


def test_a_warm_feature_cache_waits_for_nothing(make_model, learned, tmp_path):
    """The same features as on the CPU, and no pixel on the card."""
    model = make_model().requires_grad_(False)
    card, caches = on_card(model), {}
    for size in ((2, 2), (4, 5)):
        batch = learned(*size)
        for name, one in (("cpu", model), ("card", card)):
            cache = caches.setdefault(name, FeatureCache(tmp_path / name, one, torch.float32))
            move = to_card if name == "card" else dict
            cache.fill(move(cache.files.look_up(batch)))
            cache.files.reads.fill_(1)  # no comparison in this test
        looked_up = to_card(caches["card"].files.look_up(batch))
        assert not {"pixel_values", "sam_pixel_values"} & set(looked_up)
        filled, count = waits(caches["card"].fill, looked_up)
        assert count == 0
        assert_same(filled, caches["cpu"].fill(batch))


@pytest.mark.parametrize("way", sorted(set(WAYS) - {"flex"}))  # which refuses devices that it does not know
def test_sam_attention(model, asked, way):
    pixels = asked(2, 1)["sam_pixel_values"]
    card, model = on_card(model), copy.deepcopy(model)
    for one in (model, card):
        use_gsva_attention(one, way)
    with torch.no_grad():
        assert_same(card.get_sam_embeddings(pixels.to(CARD)), model.get_sam_embeddings(pixels))


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=["dynamic", "static"]
)
def test_generate(model, asked, options):
    inputs = asked(2, 3)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_index")}
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    found = on_card(model).generate(**to_card(inputs), **options)
    assert_same(found, copy.deepcopy(model).generate(**inputs, **options))


def test_conversations_share_what_a_cache_keeps(model, asked):
    inputs, card = asked(1, 3), on_card(model)
    options = {"method": "generate", "max_new_tokens": 4}
    here, there = model.new_cache(), card.new_cache()
    for _ in range(2):  # the second time from the cache
        expected, found = (
            model.segment(**inputs, cache=here, **options),
            card.segment(**to_card(inputs), cache=there, **options),
        )
        assert_same(dict(found), dict(expected))


def test_a_streamed_answer(model, processor, make_picture):
    talk = [
        {"role": "user", "content": [{"type": "image", "image": make_picture()}, {"type": "text", "text": "A dog?"}]}
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs, answers = processor.apply_chat_template(talk, **options), []
    for one in (model, on_card(model)):
        answer = processor.stream(one, copy.copy(inputs).to(one.device), max_new_tokens=5, do_sample=False)
        answers.append(("".join(answer), answer.results))
    assert_same(answers[1], answers[0])


def test_the_pipeline(model, processor, make_picture):
    images, results = [make_picture(n, 40, 30 + n) for n in range(3)], []
    for one in (model, on_card(model)):
        segment = GsvaPipeline(model=one, processor=processor, device=one.device)
        results.append(segment(images, expressions=[["a dog", "a cat"]] * 3, batch_size=2))
    assert_same(results[1], results[0])


def steps_of(model, batch, count=2):
    """Train some steps; return losses and the gradients of the last one."""
    model.train()
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3), []
    for _ in range(count):
        optimizer.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        losses.append(float(outputs.loss.detach()))
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"rejected_slot_loss": "zero_logits"}], ids=str)
def test_training(make_model, learned, options):
    model, batch = make_model(**options), dict(learned(2, 5))
    card = on_card(model)
    (losses, gradients), (expected, wanted) = steps_of(card, to_card(batch)), steps_of(model, batch)
    assert_same(losses, expected)
    assert_same(gradients, wanted, tolerance=1e-3)


TEXT = ("input_ids", "attention_mask", "answer_ids", "answer_attention_mask")


@pytest.mark.parametrize("sam", bases.MASK_MODELS)
@pytest.mark.parametrize("family", [*bases.FIRST_RANK, *bases.SECOND_RANK, *bases.WINDOWED])
def test_every_base_and_mask_model(family, sam):
    if sam != "sam" and family != "qwen3_vl":
        pytest.skip("each mask model over one base, each base with one mask model")
    model = bases.make_gsva(family, bases.mask_config(sam))
    inputs = bases.make_inputs(model, family, bases.SIDES[sam])
    card = on_card(model)
    for method in ("slots", "teacher_forced", "generate"):
        options = {"max_new_tokens": 3, "do_sample": False} if method == "generate" else {}
        given = {n: v for n, v in inputs.items() if method != "generate" or not n.startswith("answer")}
        assert_same(dict(card.segment(**to_card(given), method=method, **options)),
                    dict(model.segment(**given, method=method, **options)))  # fmt: skip
    ids, mask = (
        torch.cat([inputs[a], inputs[b]], 1)
        for a, b in (("input_ids", "answer_ids"), ("attention_mask", "answer_attention_mask"))
    )
    kept = {name: value for name, value in inputs.items() if name not in TEXT}
    sizes = torch.tensor([[bases.SIDES[sam]] * 2] * 2)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), **kept, "original_sizes": sizes,
             "reshaped_input_sizes": sizes, "mask_labels": [torch.ones(2, *sizes[0], dtype=torch.uint8)] * 3}  # fmt: skip
    if sam in ("sam2", "sam3_tracker"):
        model.config.object_score_loss_weight = card.config.object_score_loss_weight = 1.0
    (losses, _), (expected, _) = steps_of(card, to_card(batch), 1), steps_of(model, batch, 1)
    assert_same(losses, expected)


@pytest.mark.parametrize("protocol", ["slots", "teacher_forced", "generate"])
def test_an_evaluation(model, processor, protocol):
    rows, results = [shapes.make_row(0, "train", index) for index in range(3)], []
    config = EvaluationConfig(rows, "shapes", "train", protocol, batch_size=2, max_new_tokens=4)
    for one in (model, on_card(model)):
        results.append(evaluate_rows(one, processor, config, keep_masks=True))
    assert_same(results[1].rows, results[0].rows)


def test_predictions(model, processor):
    rows, results = [shapes.make_row(0, "train", index) for index in range(3)], []
    batch = {"image": [row["image"] for row in rows], "expressions": [["a circle", "a star"]] * 3}
    for one in (model, on_card(model)):
        results.append(Predictor("tiny", loaded=(processor, one))(batch))
    assert_same(results[1], results[0])


@pytest.mark.parametrize(
    "options", [{}, {"feature_cache": "cache"}, {"gradient_accumulation_steps": 2}, {"divergence": "off"}], ids=str
)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_trainer(make_model, processor, tmp_path, monkeypatch, mode, options):
    rows = [shapes.make_row(0, "train", index) for index in range(6)]
    evaluation = EvaluationConfig(rows[:3], "shapes", "train", "slots", batch_size=2)
    histories = []
    for device in ("cpu", CARD):
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device)
        PartialState._reset_state()
        AcceleratorState._reset_state()
        torch.manual_seed(0)
        if "feature_cache" in options:
            options = {**options, "feature_cache": str(tmp_path / "cache")}
        model = prepare_for_training(make_model(), ModelArguments(train_language_model=mode, lora_dropout=0.0))
        arguments = GsvaTrainingArguments(
            max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, optim="sgd", logging_steps=1, seed=3, disable_tqdm=True,
            output_dir=str(tmp_path / device[:4]), report_to="none", dataloader_pin_memory=False, eval_strategy="steps", eval_steps=3,
            save_strategy="no", max_grad_norm=1.0, **options,
        )  # fmt: skip
        data = TrainingDataset(rows, ReferringTransform(num_expressions=6, all_absent=True), 3)
        trainer = GsvaTrainer(
            model=model, args=arguments, train_dataset=data, data_collator=GsvaCollator(processor),
            processing_class=processor, evaluation=evaluation, eval_dataset=[],
        )  # fmt: skip
        assert arguments.device == torch.device(device)
        trainer.train()
        assert {parameter.device for parameter in model.parameters()} == {torch.device(device)}
        history = [{n: v for n, v in entry.items() if not re.search("second|runtime|memory|flos|share", n)}
                   for entry in trainer.state.log_history]  # fmt: skip
        histories.append(history)
    assert len(histories[0]) >= 4
    assert_same(histories[1], histories[0], tolerance=2e-4)


# Their libraries know the devices that there are.
NOT_HERE = {TESTS, "loading", "qlora_step", "conversion"}


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in PARTS if part not in NOT_HERE])
def test_the_parts_of_make_gpu(part):
    figures = list(getattr(_gpu_parts, part)(_gpu_parts.Bench(TINY, torch.device(CARD))))
    missing = [figure for figure in figures if figure.value is None]
    assert figures and not [f for f in missing if "CUDA" not in f.reason and not f.what.startswith("flex")], missing
