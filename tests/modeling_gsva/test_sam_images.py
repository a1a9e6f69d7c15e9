"""
Images for each mask model: against transformers' own processors where torchvision imports, against a direct computation elsewhere.

Measured over images of 1x1 to 4000x300 pixels: SAM 2's are equal to transformers' own when both sides are enlarged, and at most
one level of 255 off otherwise (0.1 to 21 % of the values). SAM 3's are at most one level off, but for one value in 100,000 that
is two off, where torchvision rounds to bytes between its two passes. Exact arithmetic is less than one level off either.
"""

import importlib.util
import json

import numpy as np
import pytest
import tiny_bases as bases
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor
from transformers.processing_utils import ProcessorMixin

from modeling_gsva import GsvaImageProcessor, GsvaSamImageProcessor
from modeling_gsva.image_processing_gsva import mask_input_size, sam_preparation, upscale_mask_logits
from modeling_gsva.masks_gsva import MASK_ADAPTERS

PADDED, STRETCHED = ("sam", "sam_hq"), ("sam2", "sam3_tracker")
MEANS = {"sam2": [0.485, 0.456, 0.406], "sam3_tracker": [0.5] * 3}  # of 0 to 1, as their processors have them
STDS = {"sam2": [0.229, 0.224, 0.225], "sam3_tracker": [0.5] * 3}
SIZES = [(640, 480), (100, 33), (1500, 2000), (4000, 300), (1, 1)]  # (width, height)


def full_size(kind: str) -> GsvaSamImageProcessor:
    return GsvaSamImageProcessor.for_config(AutoConfig.for_model(kind))


def in_levels(processor, pixels) -> np.ndarray:
    """Undo the normalization."""
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (processor.sam_image_mean, processor.sam_image_std))
    return np.asarray(pixels, dtype=np.float64) * std + mean


def test_every_mask_model_has_a_preparation():
    for kind in MASK_ADAPTERS:
        config = AutoConfig.for_model(**bases.mask_config(kind))
        fields = sam_preparation(config)
        assert fields["sam_size"] == (
            {"longest_edge": 64} if kind in PADDED else dict.fromkeys(("height", "width"), bases.SIDES[kind])
        )
        assert mask_input_size(config) == bases.SIDES[kind]
        assert GsvaSamImageProcessor.for_config(config).mask_input_size == bases.SIDES[kind]
    assert {full_size(kind).mask_input_size for kind in ("sam", "sam_hq", "sam2")} == {1024}
    assert full_size("sam3_tracker").mask_input_size == 1008


@pytest.mark.parametrize("kind", PADDED)
def test_sam_is_prepared_as_for_llava_v1(kind, make_picture):
    """Alone, and beside CLIP's tensor."""
    images = [make_picture(0, 640, 480), make_picture(1, 33, 100)]
    expected, given = GsvaImageProcessor()(images, return_tensors="pt"), full_size(kind)(images, return_tensors="pt")
    assert list(given) == ["sam_pixel_values", "original_sizes", "reshaped_input_sizes"]
    assert all(torch.equal(given[name], expected[name]) for name in given)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", STRETCHED)
def test_stretched_images_equal_a_direct_computation(kind, make_picture, size):
    image, processor = make_picture(2, *size), full_size(kind)
    side = processor.mask_input_size
    inputs = processor(image, return_tensors="np")
    assert inputs["original_sizes"].tolist() == [list(size[::-1])]
    assert inputs["reshaped_input_sizes"].tolist() == [[side, side]]
    resized = np.asarray(image.resize((side, side), Image.BILINEAR), dtype=np.float32) / 255
    expected = (resized - np.float32(MEANS[kind])) / np.float32(STDS[kind])
    np.testing.assert_allclose(inputs["sam_pixel_values"][0], expected.transpose(2, 0, 1), atol=1e-6)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    exact = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)[0].numpy()
    assert np.abs(in_levels(processor, inputs["sam_pixel_values"][0]) - exact).max() < 1.01  # rounded in two passes


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="transformers' own need torchvision")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind, name", [("sam2", "Sam2ImageProcessor"), ("sam3_tracker", "Sam3ImageProcessor")])
def test_stretched_images_are_within_a_level_of_transformers_own(kind, name, make_picture, size):
    import transformers

    image, processor = make_picture(3, *size), full_size(kind)
    theirs = getattr(transformers, name)()(image, return_tensors="pt")
    given = in_levels(processor, processor(image, return_tensors="np")["sam_pixel_values"][0])
    difference = np.abs(given - in_levels(processor, theirs["pixel_values"][0]))
    assert (difference > 1.01).mean() <= (0 if kind == "sam2" else 1e-4) and difference.max() < 2.01
    assert theirs["original_sizes"].tolist() == [list(size[::-1])]


def test_llava_v1_beside_sam_2(make_picture):
    """The fields say how, and both tensors are those of the two processors alone."""
    image, fields = make_picture(4, 90, 40), sam_preparation(AutoConfig.for_model("sam2"))
    both, alone = GsvaImageProcessor(**fields), full_size("sam2")
    inputs = both(image, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], GsvaImageProcessor()(image, return_tensors="pt")["pixel_values"])
    expected = alone(image, return_tensors="pt")
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert both.mask_input_size == 1024 and GsvaImageProcessor().mask_input_size == 1024


def test_masks_go_back_the_way_the_image_came(make_picture):
    """A mask of SAM 2's whole square is the whole image's, whatever its ratio."""
    config = AutoConfig.for_model(**bases.mask_config("sam2"))
    inputs = GsvaSamImageProcessor.for_config(config)(make_picture(5, 90, 40), return_tensors="pt")
    logits = torch.linspace(-1, 1, 16).expand(1, 16, 16)  # left half empty
    sizes = inputs["reshaped_input_sizes"][0], inputs["original_sizes"][0]
    mask = upscale_mask_logits(logits, *sizes, mask_input_size(config))[0] > 0
    assert mask.shape == (40, 90) and mask[:, 45:].all() and not mask[:, :45].any()


@pytest.mark.parametrize("kind", MASK_ADAPTERS)
def test_saved_and_loaded(kind, make_picture, tmp_path):
    processor = GsvaSamImageProcessor.for_config(AutoConfig.for_model(**bases.mask_config(kind)))
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoImageProcessor": "image_processing_gsva.GsvaSamImageProcessor"}
    expected = processor(make_picture(), return_tensors="pt")["sam_pixel_values"]
    for again in (
        GsvaSamImageProcessor.from_pretrained(tmp_path),
        GsvaSamImageProcessor.from_dict(processor.to_dict()),
        AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert type(again).__name__ == "GsvaSamImageProcessor"
        assert torch.equal(again(make_picture(), return_tensors="pt")["sam_pixel_values"], expected)


def test_a_processor_holds_it():
    class Holder(ProcessorMixin):
        def __init__(self, sam_image_processor=None, **kwargs):
            super().__init__(sam_image_processor, **kwargs)

    holder = Holder(full_size("sam2"))
    assert holder.to_dict()["sam_image_processor"]["sam_size"] == {"height": 1024, "width": 1024}


def test_images_are_read_as_for_llava_v1(make_picture, tmp_path):
    processor = full_size("sam2")
    make_picture(6, 40, 30).save(tmp_path / "a.png")
    (read,) = processor.read_images([tmp_path / "a.png"])
    assert read.mode == "RGB" and np.array_equal(np.asarray(read), np.asarray(make_picture(6, 40, 30)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    make_picture(6, 40, 30).convert("RGBA").save(tmp_path / "turned.png", exif=exif)
    (read,) = processor.read_images(str(tmp_path / "turned.png"))
    assert read.mode == "RGB" and read.size == (30, 40)
    for image, message in ((None, "An image is None"), (7, "An image of type int"), (b"\0" * 40, "'40 bytes' cannot")):
        with pytest.raises(ValueError, match=message):
            processor(image)
    with pytest.raises(ValueError, match="more than max_image_pixels=1000"):
        GsvaSamImageProcessor(max_image_pixels=1000)(make_picture(6, 40, 30))


def test_what_cannot_be_prepared_is_refused():
    config = AutoConfig.for_model(**bases.mask_config("sam2"))
    config.prompt_encoder_config.image_size = [64, 48]
    with pytest.raises(ValueError, match=r"input is \[64, 48\] \(height, width\).*square"):
        GsvaSamImageProcessor.for_config(config)
    with pytest.raises(
        ValueError, match="for a mask model of type 'edgetam' is not known; take one of sam, sam_hq, sam2"
    ):
        GsvaSamImageProcessor.for_config(AutoConfig.for_model("edgetam"))
    with pytest.raises(ValueError, match="'height': 5.*is not a square: give"):
        GsvaSamImageProcessor(sam_size={"height": 5, "width": 6})
