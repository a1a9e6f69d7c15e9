"""Kept features give the losses of fresh ones, and are never those of another picture or other weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trainers.collator import GsvaCollator
from trainers.features import FeatureCache
from trainers.parts import prepare_for_training


@pytest.fixture
def gsva(make_model):
    from trainers.arguments import ModelArguments

    return prepare_for_training(make_model(), ModelArguments(train_language_model="frozen"))


@pytest.fixture
def batch(processor, make_picture):
    def make(*seeds):
        talk = processor.build_conversation(["a thing"], [False])
        mask = np.ones((1, 30, 40), np.uint8)
        examples = [{"image": make_picture(seed), "conversations": [talk], "masks": [mask]} for seed in seeds]
        return GsvaCollator(processor)(examples)

    return make


def count_encodings(model):
    calls = []
    model.sam.vision_encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_losses_are_those_of_fresh_features_cold_and_warm(gsva, batch, tmp_path, dtype, tolerance):
    cache = FeatureCache(tmp_path, gsva, dtype)
    inputs = batch(0, 1)
    fresh = gsva(**inputs)
    for _ in range(2):
        kept = gsva(**cache.fill(inputs))
        for name in ("ce_loss", "mask_bce_loss", "mask_dice_loss"):
            torch.testing.assert_close(kept[name], fresh[name], rtol=tolerance, atol=tolerance)
    assert (cache.misses, cache.hits) == (2, 2)


def test_a_picture_is_encoded_once_whatever_batch_it_is_in(gsva, batch, tmp_path):
    cache = FeatureCache(tmp_path, gsva, verify_every=10**9)
    cache.hits = 1  # no verification in this test
    calls = count_encodings(gsva)
    for seeds in ((0, 1), (1, 2), (2, 0)):
        cache.fill(batch(*seeds))
    assert calls == [2, 1]
    again = FeatureCache(tmp_path, gsva, verify_every=10**9)  # a run that goes on
    again.hits = 1
    again.fill(batch(0, 1, 2))
    assert calls == [2, 1] and again.misses == 0


def test_other_weights_have_other_features(make_model, gsva, batch, tmp_path):
    other = make_model(seed=1).requires_grad_(False)
    assert FeatureCache(tmp_path, gsva).folder != FeatureCache(tmp_path, other).folder
    FeatureCache(tmp_path, gsva).fill(batch(0))
    cache = FeatureCache(tmp_path, other)
    cache.fill(batch(0))
    assert cache.misses == 1


def test_a_broken_file_is_made_again_and_a_wrong_one_is_refused(gsva, batch, tmp_path):
    FeatureCache(tmp_path, gsva).fill(batch(0))
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    cache = FeatureCache(tmp_path, gsva)
    cache.fill(batch(0))
    assert cache.misses == 1 and not list(tmp_path.glob("*/*.tmp"))
    wrong = {name: value + 1 for name, value in load_file(path).items()}
    save_file(wrong, path)
    with pytest.raises(ValueError, match="differ by .* from what the tower gives"):
        FeatureCache(tmp_path, gsva).fill(batch(0))


def test_size_is_announced_and_is_the_files_size(gsva, batch, tmp_path):
    cache = FeatureCache(tmp_path, gsva)
    assert "features of 5 pictures" in cache.announce(5) and " 0 are there" in cache.announce(5)
    cache.fill(batch(0))
    (path,) = tmp_path.glob("*/*.safetensors")
    assert cache.bytes_per_picture <= path.stat().st_size <= cache.bytes_per_picture + 400
    assert " 1 are there" in cache.announce(5)
    with pytest.raises(ValueError, match="give another --feature_cache"):
        cache.announce(10**12)


def test_trained_towers_and_batches_without_pictures(make_model, gsva, tmp_path):
    with pytest.raises(ValueError, match="is trained"):
        FeatureCache(tmp_path, make_model().requires_grad_(True))
    words = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    assert FeatureCache(tmp_path, gsva).fill(words) is words


def test_training_with_the_cache_gives_the_same_losses(make_model, processor, make_picture, tmp_path):
    from trainers.arguments import GsvaTrainingArguments, ModelArguments
    from trainers.trainer import GsvaTrainer

    class Pictures:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            talk = processor.build_conversation(["a thing"], [False])
            image = make_picture(index % 2)
            return {"image": image, "conversations": [talk], "masks": [np.ones((1, 30, 40), np.uint8)]}

    losses = []
    for options in ({}, {"feature_cache": str(tmp_path / "kept"), "feature_cache_dtype": "float32"}):
        args = GsvaTrainingArguments(
            output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=3, per_device_train_batch_size=2, save_strategy="no",
            logging_steps=1, **options,
        )  # fmt: skip
        model = prepare_for_training(make_model(), ModelArguments(lora_dropout=0.0))
        trainer = GsvaTrainer(
            model=model, args=args, train_dataset=Pictures(), data_collator=GsvaCollator(processor),
            processing_class=processor,
        )  # fmt: skip
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3
    assert (trainer.features.misses, trainer.features.hits) == (2, 4)
