"""GsvaImageProcessor against hand-computed sizes and a direct computation with Pillow and numpy; masks at the original size."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_gsva import GsvaImageProcessor
from modeling_gsva.image_processing_gsva import upscale_mask_logits

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
SAM_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
SAM_STD = np.array([58.395, 57.12, 57.375], np.float32)


@pytest.fixture
def small():
    return GsvaImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, sam_size={"longest_edge": 64}
    )


def direct_clip(image: Image.Image, side: int) -> np.ndarray:
    """Shortest side to `side` (the other rounded down), centre crop, mean and deviation; written out once more."""
    width, height = image.size
    width, height = (side, int(side * height / width)) if width < height else (int(side * width / height), side)
    left, top = (width - side) // 2, (height - side) // 2
    array = np.asarray(image.resize((width, height), Image.BICUBIC))[top : top + side, left : left + side]
    return ((array.astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)


def direct_sam(image: Image.Image, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    width, height = image.size
    scale = side / max(width, height)
    width, height = int(width * scale + 0.5), int(height * scale + 0.5)
    array = np.asarray(image.resize((width, height), Image.BILINEAR)).astype(np.float32)
    padded = np.zeros((side, side, 3), np.float32)
    padded[:height, :width] = (array - SAM_MEAN) / SAM_STD
    return padded.transpose(2, 0, 1), (height, width)


# (height, width) of the picture → (height, width) inside SAM's input of 1024; by hand, from int(side * 1024 / longest + 0.5)
@pytest.mark.parametrize(
    "original, reshaped",
    [
        ((480, 640), (768, 1024)),
        ((640, 427), (1024, 683)),  # 683.2
        ((375, 500), (768, 1024)),
        ((333, 500), (682, 1024)),  # 681.98: rounded, not cut
        ((1024, 1024), (1024, 1024)),
        ((1, 1), (1024, 1024)),
    ],
)
def test_sizes_of_the_paper(original, reshaped):
    inputs = GsvaImageProcessor()(Image.new("RGB", original[::-1]), return_tensors="pt")
    assert inputs["original_sizes"].tolist() == [list(original)]
    assert inputs["reshaped_input_sizes"].tolist() == [list(reshaped)]
    assert inputs["pixel_values"].shape == (1, 3, 224, 224) and inputs["sam_pixel_values"].shape == (1, 3, 1024, 1024)


def test_thin_pictures_keep_a_pixel(small):
    # 128 → 64: one pixel becomes 0.5, which rounds up; 256 → 64: 0.25 would leave none
    assert small.resize_for_sam(np.zeros((3, 128, 1), np.uint8), 64).shape == (3, 64, 1)
    assert small.resize_for_sam(np.zeros((3, 1, 256), np.uint8), 64).shape == (3, 1, 64)


@pytest.mark.parametrize("width, height", [(40, 30), (30, 40), (100, 33), (32, 32), (64, 64), (17, 90), (200, 150)])
def test_pixel_values_equal_a_direct_computation(small, make_picture, width, height):
    image = make_picture(1, width, height)
    inputs = small(image, return_tensors="np")
    np.testing.assert_allclose(inputs["pixel_values"][0], direct_clip(image, 32), atol=1e-6)
    expected, reshaped = direct_sam(image, 64)
    np.testing.assert_array_equal(inputs["sam_pixel_values"][0], expected)
    assert tuple(inputs["reshaped_input_sizes"][0]) == reshaped
    assert inputs["pixel_values"].dtype == inputs["sam_pixel_values"].dtype == np.float32


def test_padding_is_zero_right_and_below(small, make_picture):
    inputs = small([make_picture(0, 64, 16), make_picture(0, 16, 64)], return_tensors="pt")["sam_pixel_values"]
    assert inputs[0, :, 16:].eq(0).all() and inputs[0, :, :16].ne(0).all()
    assert inputs[1, :, :, 16:].eq(0).all() and inputs[1, :, :, :16].ne(0).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_is_read_as_rgb(small, make_picture, mode):
    image = make_picture(2).convert(mode)
    inputs, expected = small(image, return_tensors="pt"), small(image.convert("RGB"), return_tensors="pt")
    for name in expected:
        assert torch.equal(inputs[name], expected[name]), name


def test_exif_orientation_is_applied(small, make_picture, tmp_path):
    image = make_picture(3, 40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    (tmp_path / "turned.png").write_bytes(buffer.getvalue())
    expected = small(image.transpose(Image.Transpose.ROTATE_270), return_tensors="pt")
    for turned in (Image.open(tmp_path / "turned.png"), str(tmp_path / "turned.png")):
        inputs = small(turned, return_tensors="pt")
        assert inputs["original_sizes"].tolist() == [[40, 30]]
        for name in expected:
            assert torch.equal(inputs[name], expected[name]), name


def test_arrays_tensors_and_paths_equal_the_picture(small, make_picture, tmp_path):
    image = make_picture(4)
    image.save(tmp_path / "a picture.png")
    array = np.asarray(image)
    kinds = {
        "array (height, width, 3)": array,
        "array (3, height, width)": array.transpose(2, 0, 1),
        "tensor (3, height, width)": torch.from_numpy(array.transpose(2, 0, 1).copy()),
        "path as a string": str(tmp_path / "a picture.png"),
        "pathlib.Path": tmp_path / "a picture.png",
    }
    expected = small(image, return_tensors="pt")
    for kind, value in kinds.items():
        inputs = small(value, return_tensors="pt")
        for name in expected:
            assert torch.equal(inputs[name], expected[name]), (kind, name)


def test_grey_arrays_become_three_channels(small, make_picture):
    grey = np.asarray(make_picture(5).convert("L"))
    expected = small(Image.fromarray(grey).convert("RGB"), return_tensors="pt")
    for value in (grey, grey[None], grey[..., None]):
        assert torch.equal(small(value, return_tensors="pt")["sam_pixel_values"], expected["sam_pixel_values"])


def test_arrays_with_alpha_lose_it_as_pictures_do(small, make_picture):
    image = make_picture(6)
    image.putalpha(make_picture(7).convert("L"))
    expected = small(image, return_tensors="pt")["sam_pixel_values"]
    assert torch.equal(small(np.asarray(image), return_tensors="pt")["sam_pixel_values"], expected)


def test_batches_of_mixed_sizes_equal_single_pictures(small, make_picture):
    images = [make_picture(n, width, height) for n, (width, height) in enumerate([(40, 30), (20, 50), (64, 64)])]
    together = small(images, return_tensors="pt")
    for n, image in enumerate(images):
        alone = small(image, return_tensors="pt")
        for name in alone:
            assert torch.equal(together[name][n], alone[name][0]), name


def test_saved_sizes_come_back(small, tmp_path, make_picture):
    small.save_pretrained(tmp_path)
    again = GsvaImageProcessor.from_pretrained(tmp_path)
    assert again.sam_size["longest_edge"] == 64
    expected, inputs = small(make_picture(), return_tensors="pt"), again(make_picture(), return_tensors="pt")
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_what_is_no_image_is_named(small, tmp_path, make_picture):
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    whole = io.BytesIO()
    make_picture(0, 200, 200).save(whole, format="JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    cases = [
        (None, "An image is None: give a PIL image"),
        ([make_picture(), None], "An image is None"),
        (str(tmp_path / "missing.jpg"), r"missing\.jpg.*cannot be read as an image.*Give the path or URL"),
        (tmp_path / "missing.jpg", r"missing\.jpg.*cannot be read as an image.*Give the path or URL"),
        (str(text), r"text\.jpg.*cannot be read as an image.*Give the path or URL"),
        (str(cut), r"cut\.jpg.*cannot be read as an image.*Give the path or URL"),
        (Image.open(cut), r"cut\.jpg.*cannot be read as an image.*Give"),
        (7, "An image of type int is not supported: give a PIL image"),
        ({"pixels": b""}, "An image of type dict is not supported: give a PIL image"),
        ({"bytes": None, "path": None}, "An image is None"),
        (np.zeros((0, 5, 3), np.uint8), r"An image has shape \(0, 5, 3\); give .height, width, 3."),
        (np.zeros((8, 8, 7), np.uint8), r"An image has shape \(8, 8, 7\).*give .height, width, 3."),
        (np.zeros(8, np.uint8), r"An image has shape \(8,\).*give .height, width, 3."),
        (Image.new("RGB", (0, 5)), r"An image has shape \(.*give .height, width, 3."),
    ]
    for image, message in cases:
        with pytest.raises(ValueError, match=message):
            small(image)


def test_upscale_of_a_square_picture_is_one_bilinear_step():
    logits = torch.tensor([[[0.0, 4.0], [8.0, 12.0]]])
    # 2 → 4 samples at -0.25, 0.25, 0.75, 1.25 (held inside [0, 1]): 0, 1/4, 3/4, 1 of the way
    steps = torch.tensor([0.0, 0.25, 0.75, 1.0])
    expected = 4 * steps[None, :] + 8 * steps[:, None]
    assert torch.equal(upscale_mask_logits(logits, (4, 4), (4, 4), 4), expected[None])


def test_upscale_cuts_the_padding_before_the_second_step():
    # The right half is padding with other logits: nothing of it reaches the picture, not even at its last column.
    logits = torch.full((2, 4, 4), -100.0)
    logits[:, :, :2] = torch.tensor([1.0, 3.0])[:, None, None]
    small = upscale_mask_logits(logits, (4, 2), (8, 4), 4)
    assert small.shape == (2, 8, 4)
    assert small[0].eq(1).all() and small[1].eq(3).all()


def test_upscale_takes_half_precision_tensors_sizes_and_no_slots():
    logits = torch.tensor([[[-1.0, 1.0]]], dtype=torch.bfloat16).expand(1, 2, 2)
    result = upscale_mask_logits(logits, torch.tensor([2, 2]), torch.tensor([2, 2]), 2)
    assert result.dtype == torch.float32 and result[0].tolist() == [[-1, 1], [-1, 1]]
    assert upscale_mask_logits(torch.zeros(0, 2, 2), (2, 2), (5, 7), 2).shape == (0, 5, 7)


# ---- pixels of more or less than eight bits -----------------------------------------------------------------------------
RAMP = np.arange(256, dtype=np.uint8)[None].repeat(32, 0)
RAMP_RGB = np.stack([RAMP] * 3, axis=-1)


def images_of_the_ramp():
    """The same grey ramp as everything that people give."""
    file = io.BytesIO()
    Image.fromarray(RAMP_RGB).save(file, "PNG")
    sixteen = RAMP.astype(np.uint16) * 257
    png16 = io.BytesIO()
    Image.fromarray(sixteen).save(png16, "PNG")
    pgm = io.BytesIO(b"P5 256 32 65535\n" + sixteen.astype(">u2").tobytes())
    fractions = RAMP_RGB.astype(np.float32) / 255
    return {
        "uint8": RAMP_RGB,
        "grey array": RAMP,
        "int64": RAMP_RGB.astype(np.int64),
        "uint16": RAMP_RGB.astype(np.uint16) * 257,
        "grey uint16": sixteen,
        "float32 in 0 to 1": fractions,
        "float64 in 0 to 1": fractions.astype(np.float64),
        "float16 in 0 to 1": fractions.astype(np.float16),
        "float in 0 to 255": RAMP_RGB.astype(np.float32),
        "ToTensor": torch.from_numpy(fractions.transpose(2, 0, 1).copy()).requires_grad_(),
        "uint8 tensor": torch.from_numpy(RAMP_RGB.transpose(2, 0, 1).copy()),
        "bytes": file.getvalue(),
        "bytearray": bytearray(file.getvalue()),
        "file": io.BytesIO(file.getvalue()),
        "16-bit PNG": png16.getvalue(),
        "16-bit PGM": pgm.getvalue(),
        "I;16": Image.fromarray(sixteen),
        "I;16B": Image.frombytes("I;16B", (256, 32), sixteen.astype(">u2").tobytes()),
        "I": Image.fromarray(RAMP.astype(np.int32)),
        "L": Image.fromarray(RAMP),
        "LA": Image.fromarray(RAMP).convert("LA"),
        "P": Image.fromarray(RAMP).convert("P"),
        "PA": Image.fromarray(RAMP).convert("P").convert("PA"),
        "RGBA": Image.fromarray(RAMP_RGB).convert("RGBA"),
        "RGBa": Image.fromarray(RAMP_RGB).convert("RGBa"),
        "RGBX": Image.fromarray(RAMP_RGB).convert("RGBX"),
    }


@pytest.mark.parametrize("name", list(images_of_the_ramp()))
def test_images_are_read_as_what_they_show(small, name):
    expected = small(RAMP_RGB, return_tensors="np")
    for images in (images_of_the_ramp()[name], [images_of_the_ramp()[name]]):
        inputs = small(images, return_tensors="np")
        assert np.abs(inputs["sam_pixel_values"] - expected["sam_pixel_values"]).max() < 1e-6
        assert np.abs(inputs["pixel_values"] - expected["pixel_values"]).max() < 1e-6


def test_booleans_are_black_and_white(small):
    mask = RAMP > 127
    expected = small(mask.astype(np.uint8) * 255, return_tensors="np")["sam_pixel_values"]
    for image in (mask, torch.from_numpy(mask), Image.fromarray(mask)):
        assert (small(image, return_tensors="np")["sam_pixel_values"] == expected).all()


@pytest.mark.parametrize("convert", [lambda image: image, torch.from_numpy])
def test_floats_of_0_to_1_are_rescaled_once(small, convert):
    """do_rescale=False is what callers say of such images."""
    image = convert(RAMP_RGB.astype(np.float32) / 255)
    expected = small(RAMP_RGB, return_tensors="np")
    for options in ({}, {"do_rescale": False}, {"do_rescale": True}):
        inputs = small(image, return_tensors="np", **options)
        assert np.abs(inputs["pixel_values"] - expected["pixel_values"]).max() < 1e-6
        assert np.abs(inputs["sam_pixel_values"] - expected["sam_pixel_values"]).max() < 1e-6


@pytest.mark.parametrize(
    "image",
    [RAMP_RGB.astype(np.float32) / 127.5 - 1, RAMP_RGB.astype(np.int32) * 300, np.full((32, 32, 3), np.nan),
     torch.randn(3, 32, 32), Image.fromarray(RAMP.astype(np.float32)), Image.fromarray(RAMP.astype(np.int32) * 300)],
    ids=["normalized", "int32", "nan", "normal", "F", "I"],
)  # fmt: skip
def test_pixels_of_an_unknown_range_are_refused(small, image):
    with pytest.raises(ValueError, match="pixels .*from"):
        small(image)


def test_heic_names_the_package_that_opens_it(small, tmp_path):
    content = b"\0\0\0\x18ftypheic" + b"\0" * 40
    (tmp_path / "a.heic").write_bytes(content)
    for image in (content, str(tmp_path / "a.heic")):
        with pytest.raises(ValueError, match="HEIC.*pillow-heif"):
            small(image)


# --- files that are not on the disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        lambda content, path: content,
        lambda content, path: bytearray(content),
        lambda content, path: memoryview(content),
        lambda content, path: io.BytesIO(content),
        lambda content, path: path.open("rb"),
        lambda content, path: {"bytes": content, "path": None},
        lambda content, path: {"bytes": None, "path": str(path)},
    ],
    ids=["bytes", "bytearray", "memoryview", "buffer", "file", "bytes of datasets", "path of datasets"],
)
def test_bytes_of_a_file_do_as_an_image(processor, make_picture, tmp_path, given):
    make_picture().save(tmp_path / "a.png")
    expected = processor.image_processor([make_picture()], return_tensors="pt")
    image = given((tmp_path / "a.png").read_bytes(), tmp_path / "a.png")
    (fetched,) = processor.image_processor.fetch_images([image])
    made = processor.image_processor([fetched], return_tensors="pt")
    assert all((made[name] == expected[name]).all() for name in expected)


def test_bytes_that_are_no_picture_are_refused_without_printing_them(processor):
    with pytest.raises(ValueError, match="'4000 bytes' cannot be read as an image"):
        processor.image_processor.fetch_images(b"\0x" * 2000)
