"""Stored features give the losses of fresh ones, and never belong to another image or other weights."""

import hashlib
import multiprocessing

import numpy as np
import pytest
import tiny_bases as bases
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from modeling_gsva.masks_gsva import mask_adapter_class
from trainers.data import GsvaCollator
from trainers.feature_cache import FeatureCache
from trainers.freezing import prepare_for_training


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
    cache.files.reads.fill_(1)  # no comparison in this test
    calls = count_encodings(gsva)
    for seeds in ((0, 1), (1, 2), (2, 0)):
        cache.fill(batch(*seeds))
    assert calls == [2, 1]
    again = FeatureCache(tmp_path, gsva, verify_every=10**9)  # a run that goes on
    again.files.reads.fill_(1)
    again.fill(batch(0, 1, 2))
    assert calls == [2, 1] and again.misses == 0


def test_other_weights_have_other_features(make_model, gsva, batch, tmp_path):
    other = make_model(seed=1).requires_grad_(False)
    assert FeatureCache(tmp_path, gsva).folder != FeatureCache(tmp_path, other).folder
    FeatureCache(tmp_path, gsva).fill(batch(0))
    cache = FeatureCache(tmp_path, other)
    cache.fill(batch(0))
    assert cache.misses == 1


def test_features_of_another_layer_are_other_features(gsva, batch, tmp_path):
    """The same weights, read elsewhere: keyed by what the output depends on."""
    before = FeatureCache(tmp_path, gsva).folder
    gsva.config.vlm_config.vision_feature_layer = -1
    assert FeatureCache(tmp_path, gsva).folder != before
    gsva.config.vlm_config.vision_feature_layer = -2
    gsva.config.vision_config.transformers_version = "0"  # says nothing about what is computed
    assert FeatureCache(tmp_path, gsva).folder == before


@pytest.mark.parametrize("tower_dtype", [torch.float32, torch.bfloat16])
def test_features_kept_without_autocast_serve_a_run_with_it(gsva, batch, tmp_path, tower_dtype):
    """Whoever fills the cache: it holds what the towers give in their own type, and each read passes verification."""
    gsva.model.vision_tower.to(tower_dtype)
    gsva.sam.vision_encoder.to(tower_dtype)
    FeatureCache(tmp_path, gsva).fill(batch(0, 1))
    cache = FeatureCache(tmp_path, gsva, verify_every=1)
    with torch.autocast("cpu", torch.bfloat16):
        for seeds in ((0, 1), (1,), (0,)):  # in batches of other sizes, too
            cache.fill(batch(*seeds))
    assert (cache.misses, cache.hits) == (0, 4)


def _fill(folder, model, batches):
    torch.set_num_threads(1)
    for inputs in batches:
        FeatureCache(folder, model).fill(inputs)


def test_processes_share_a_folder(gsva, batch, tmp_path):
    """Three at once make the same features in other orders; what is left is whole, and what one process makes."""
    batches = [batch(n, n + 1) for n in range(5)]
    processes = [
        multiprocessing.get_context("fork").Process(
            target=_fill, args=(tmp_path / "shared", gsva, batches[n:] + batches[:n])
        )
        for n in (0, 0, 2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    _fill(tmp_path / "alone", gsva, batches)
    shared, alone = (sorted((tmp_path / name).rglob("*.*")) for name in ("shared", "alone"))
    assert [path.name for path in shared] == [path.name for path in alone] and len(alone) == 6
    for ours, theirs in zip(shared, alone, strict=True):
        kept, expected = load_file(ours), load_file(theirs)
        for name, value in expected.items():
            torch.testing.assert_close(kept[name], value, rtol=0, atol=2e-3)


def test_a_batch_is_looked_up_where_it_is_made(gsva, processor, batch, make_picture, tmp_path):
    """Pixels stay of the image that is new, and of the one in so many that is compared, beginning with the first."""
    cache = FeatureCache(tmp_path, gsva, verify_every=3)
    plain = batch(0, 1)
    new = cache.files.look_up(plain)
    assert new["fresh_images"] == [0, 1] and new["stored_images"] == new["stored_features"] == []
    assert torch.equal(new["sam_pixel_values"], plain["sam_pixel_values"])
    cache.fill(new)
    seen = []
    for seeds in ((0, 2), (1, 0), (0, 1)):
        given = cache.files.look_up(batch(*seeds))
        seen.append((given["stored_images"], given["fresh_images"]))
        assert ("pixel_values" in given) == ("sam_pixel_values" in given) == bool(given["fresh_images"])
        assert all(len(part) == len(given["stored_images"]) for part in given["stored_features"])
        assert len(given.get("pixel_values", ())) == len(given["fresh_images"])
    assert seen == [([0], [0, 1]), ([0, 1], []), ([0, 1], [0])]
    assert (
        plain.keys() >= {"pixel_values", "sam_pixel_values"} and "image_names" not in plain
    )  # the batch itself stays


def test_what_was_stored_after_a_batch_was_made_is_not_computed_again(gsva, batch, tmp_path):
    """A data loader makes batches ahead of the steps."""
    cache = FeatureCache(tmp_path, gsva)
    ahead = [cache.files.look_up(batch(0, 1)) for _ in range(3)]
    calls = count_encodings(gsva)
    cache.files.reads.fill_(1)  # no comparison in this test
    filled = [cache.fill(inputs)["sam_embeddings"] for inputs in ahead]
    assert calls == [2] and (cache.misses, cache.hits) == (2, 4)
    for embeddings in filled[1:]:
        torch.testing.assert_close(embeddings, filled[0])


def test_a_cache_of_before_is_found_again(gsva, batch, tmp_path):
    """A file is named by the SHA-256 of the image's bytes for CLIP and for SAM, one after the other."""
    inputs, cache = batch(0, 1), FeatureCache(tmp_path, gsva, torch.float32)
    cache.folder.mkdir(parents=True)
    clip, sam = (
        gsva.model.get_vision_features(inputs["pixel_values"]),
        gsva.get_sam_embeddings(inputs["sam_pixel_values"]),
    )
    for n in range(2):
        pixels = inputs["pixel_values"][n].numpy().tobytes() + inputs["sam_pixel_values"][n].numpy().tobytes()
        features = {"vision_features": clip[n].contiguous(), "sam_embeddings": sam[n].contiguous()}
        save_file(features, cache.folder / f"{hashlib.sha256(pixels).hexdigest()}.safetensors")
    filled = cache.fill(inputs)
    assert (cache.misses, cache.hits) == (0, 2) and len(list(cache.folder.iterdir())) == 2
    torch.testing.assert_close(filled["vision_features"], clip)
    torch.testing.assert_close(filled["sam_embeddings"], sam)


def test_a_broken_file_is_made_again_and_a_wrong_one_is_refused(gsva, batch, tmp_path):
    FeatureCache(tmp_path, gsva).fill(batch(0))
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    cache = FeatureCache(tmp_path, gsva)
    cache.fill(batch(0))
    assert cache.misses == 1 and not list(tmp_path.glob("*/*.tmp"))
    wrong = {name: value + 1 for name, value in load_file(path).items()}
    save_file(wrong, path)
    with pytest.raises(ValueError, match="differ by .* from the tower"):
        FeatureCache(tmp_path, gsva).fill(batch(0))


def test_size_is_announced_and_is_the_files_size(gsva, batch, tmp_path):
    cache = FeatureCache(tmp_path, gsva)
    assert "features of 5 images" in cache.disk_report(5) and " 0 are stored" in cache.disk_report(5)
    cache.fill(batch(0))
    (path,) = tmp_path.glob("*/*.safetensors")
    assert cache.bytes_per_image <= path.stat().st_size <= cache.bytes_per_image + 400
    assert " 1 are stored" in cache.disk_report(5)
    with pytest.raises(ValueError, match="give another --feature_cache"):
        cache.disk_report(10**12)


def test_trained_towers_and_batches_without_pictures(make_model, gsva, tmp_path):
    with pytest.raises(ValueError, match="is trained"):
        FeatureCache(tmp_path, make_model().requires_grad_(True))
    words = {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    assert FeatureCache(tmp_path, gsva).fill(words) is words


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("bf16", "kind", "tolerance"), [(False, "float32", 1e-5), (False, "float16", 2e-3), (True, "float16", 0.03)]
)
def test_training_with_the_cache_gives_the_same_losses(
    make_model, processor, make_picture, tmp_path, bf16, kind, tolerance, workers
):
    """In bfloat16 the towers themselves round, which the cache does not: it keeps what they give in their own type."""
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
    for options in ({}, {"feature_cache": str(tmp_path / "kept"), "feature_cache_dtype": kind}):
        args = GsvaTrainingArguments(
            output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=3, per_device_train_batch_size=2, save_strategy="no",
            logging_steps=1, bf16=bf16, dataloader_num_workers=workers, **options,
        )  # fmt: skip
        model = prepare_for_training(make_model(), ModelArguments(lora_dropout=0.0))
        calls = count_encodings(model.base_model.model)
        trainer = GsvaTrainer(
            model=model, args=args, train_dataset=Pictures(), data_collator=GsvaCollator(processor),
            processing_class=processor,
        )  # fmt: skip
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=tolerance) and len(losses[0]) == 3
    assert (trainer.features.misses, trainer.features.hits) == (2, 4)
    assert calls == [2, 1]  # the first read of all epochs and workers is compared


# ---- other mask models and bases -----------------------------------------------------------------------------------------
def frozen(kind: str, base: str = "llava"):
    model = bases.make_gsva(base, bases.mask_config(kind))
    for part in model.masks.encoding_parts().values():
        part.requires_grad_(False)
    return model


@pytest.fixture
def inputs():
    def make(model, kind: str, base: str) -> dict:
        images = bases.make_images(base)
        with torch.no_grad():
            counts = [len(features) for features in model.language.encode(images).features.pooler_output]
        rows = [[1, *[bases.IMAGE] * count, 7, bases.SEG, 2] for count in counts]
        ids, mask = bases.padded_rows(rows, left=True)
        pixels = torch.randn(2, 3, bases.SIDES[kind], bases.SIDES[kind], generator=torch.Generator().manual_seed(4))
        return {"input_ids": ids, "attention_mask": mask, "sam_pixel_values": pixels, **images}

    return make


@pytest.mark.parametrize(
    ("kind", "base"),
    [*((kind, "llava") for kind in bases.MASK_MODELS), ("sam2", "gemma3"), ("sam2", "qwen3_vl"), ("sam", "smolvlm")],
)
def test_all_maps_of_an_image_are_in_one_file(kind, base, inputs, tmp_path):
    """Beside any base, of whose own images nothing is kept."""
    model = frozen(kind, base)
    inputs = inputs(model, kind, base)
    cache = FeatureCache(tmp_path, model, torch.float32)
    assert f"MB each, {kind})" in cache.disk_report(2) and not list(tmp_path.iterdir())
    expected = model(**inputs)
    for _ in range(2):
        filled = cache.fill(inputs)
        assert "sam_pixel_values" not in filled and filled["pixel_values"] is inputs["pixel_values"]
        given = model(**filled)
        for masks, others in zip(given.mask_logits, expected.mask_logits, strict=True):
            torch.testing.assert_close(masks, others, rtol=1e-5, atol=1e-5)
    assert (cache.misses, cache.hits) == (2, 2)
    files = list(tmp_path.glob("*/*.safetensors"))
    assert len(files) == 2
    assert all(cache.bytes_per_image <= path.stat().st_size <= cache.bytes_per_image + 600 for path in files)


def test_what_the_maps_depend_on_names_the_cache(tmp_path):
    """The mask model's type and preparation, and also the last layers of SAM 2's maps, which are in its decoder."""
    folders, model = [], frozen("sam2")
    for change in (
        None,
        "mask_decoder.conv_s0.weight",
        "no_memory_embedding",
        "mask_decoder.iou_token.weight",
        "side",
    ):
        if change == "side":
            model.config.sam_config.prompt_encoder_config.image_size = 80
        elif change:
            model.sam.get_parameter(change).data += 1
        folders.append(FeatureCache(tmp_path, model).folder)
    assert folders[2] == folders[3] and len(set(folders)) == 4
    model.sam.mask_decoder.conv_s1.requires_grad_(True)
    with pytest.raises(ValueError, match="the mask model's encoder is trained"):
        FeatureCache(tmp_path, model)


@pytest.mark.parametrize("kind, megabytes", [("sam", 4.2), ("sam2", 16.8)])
def test_the_size_of_the_true_models(kind, megabytes, tmp_path):
    """In fp32 at 1024 px; the weights are not needed."""
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        sam = AutoModel.from_config(config)
    maps = mask_adapter_class(kind)(sam).empty(torch.empty(0, device="meta"))
    maps = [maps] if isinstance(maps, torch.Tensor) else maps
    assert sum(4 * part.numel() for part in maps) / 1e6 == pytest.approx(megabytes, abs=0.05)
