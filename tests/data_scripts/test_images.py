"""Images are read upright; a missing or damaged one is named or skipped."""

import data_trees as trees
import numpy as np
import pytest
from PIL import Image

import data_scripts
from data_scripts import images
from data_scripts.images import PictureError, image_size, read_image
from data_scripts.mixture import TrainingDataset
from data_scripts.transforms import SemanticTransform


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_read_upright(root, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = trees.picture(root / "a.jpg", size=(6, 4), exif=exif)
    assert read_image({"path": str(path), "bytes": None}).size == ((6, 4) if orientation < 5 else (4, 6))
    assert read_image({"path": None, "bytes": path.read_bytes()}).size == ((6, 4) if orientation < 5 else (4, 6))


def test_a_missing_picture_is_named_or_skipped(root, caplog):
    trees.ade20k(root, trees.full(1), trees.full(2))
    rows = data_scripts.load("ade20k", root)
    path = root / "ade20k/images/training/0.jpg"
    path.unlink()
    with pytest.raises(PictureError, match=f"{path} is missing"):
        TrainingDataset(rows, SemanticTransform())[0]
    skipping = TrainingDataset(rows, SemanticTransform(), on_bad_image="skip")
    assert skipping[0]["image_id"] == "1" and skipping.skipped >= 1
    assert str(path) in caplog.text


def test_a_truncated_picture_is_named(root):
    trees.ade20k(root, trees.full(1))
    path = root / "ade20k/images/training/0.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(PictureError, match=f"(?i){path} cannot be read .*truncated"):
        TrainingDataset(data_scripts.load("ade20k", root), SemanticTransform())[0]


# ---- sizes from headers, and pixels as they are shown -------------------------------------------------------------------
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_upright_size_is_in_the_header(root, orientation, suffix, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = trees.picture(root / f"a.{suffix}", size=(60, 40), exif=exif)
    size = (40, 60) if orientation < 5 else (60, 40)  # (height, width)
    read = read_image({"path": str(path), "bytes": None})
    assert (read.height, read.width) == size
    for module in (
        "PngImagePlugin.PngImageFile",
        "Image.Image",
        "ImageFile.ImageFile",
        "TiffImagePlugin.TiffImageFile",
    ):
        monkeypatch.setattr(f"PIL.{module}.load", lambda self: pytest.fail("decoded"))
    assert (
        image_size({"path": str(path), "bytes": None})
        == image_size({"path": None, "bytes": path.read_bytes()})
        == size
    )


def test_exif_after_the_pixels_of_a_png_counts(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = trees.picture(root / "a.png", size=(60, 40), exif=exif)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    tail = content.index(b"IEND") - 4
    moved = content[:start] + content[end:tail] + content[start:end] + content[tail:]
    assert image_size({"path": None, "bytes": moved}) == (60, 40)
    assert read_image({"path": None, "bytes": moved}).size == (40, 60)


def test_a_stated_size_that_is_not_the_images(root):
    exif = Image.Exif()
    exif[0x0112] = 8
    turned = trees.picture(root / "turned.jpg", size=(60, 40), exif=exif)
    plain = trees.picture(root / "plain.jpg", size=(60, 40))
    for read in (read_image, image_size):
        with pytest.raises(PictureError, match="turned.jpg is 60 x 40 .*EXIF orientation .8. swaps height and width"):
            read({"path": str(turned), "bytes": None}, (40, 60))
        with pytest.raises(PictureError, match="plain.jpg is 40 x 60 .*for 60 x 40; height and width are swapped"):
            read({"path": str(plain), "bytes": None}, (60, 40))
        with pytest.raises(PictureError, match="plain.jpg is 40 x 60 .*for 80 x 120"):
            read({"path": str(plain), "bytes": None}, (80, 120))


def test_every_mode_is_read_as_what_it_shows(tmp_path):
    grey = np.arange(256, dtype=np.uint8)[None].repeat(8, 0)
    image = Image.fromarray(grey)
    sixteen = grey.astype(np.uint16) * 257
    images = {
        **{mode: image.convert(mode) for mode in ("L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "HSV", "YCbCr")},
        "PA": image.convert("P").convert("PA"),
        "I;16": Image.fromarray(sixteen),
        "I;16B": Image.frombytes("I;16B", (256, 8), sixteen.astype(">u2").tobytes()),
        "I": Image.fromarray(grey.astype(np.int32)),
        "RGBa": image.convert("RGBA").convert("RGBa"),
        "La": image.convert("LA").convert("La"),
    }
    Image.fromarray(sixteen).save(tmp_path / "a.png")
    (tmp_path / "a.pgm").write_bytes(b"P5 256 8 65535\n" + sixteen.astype(">u2").tobytes())
    images |= {name: {"path": str(tmp_path / name), "bytes": None} for name in ("a.png", "a.pgm")}
    for mode, one in images.items():
        pixels = np.asarray(read_image(one)).astype(int)
        assert np.abs(pixels - grey[..., None]).max() <= (2 if mode == "YCbCr" else 0), mode
    one_bit = np.asarray(read_image(image.convert("1", dither=Image.Dither.NONE)))
    assert set(np.unique(one_bit)) == {0, 255}
    for wrong in (Image.fromarray(grey.astype(np.float32)), Image.fromarray(grey.astype(np.int32) * 300)):
        with pytest.raises(PictureError, match="range is not known; save it with 8 bits"):
            read_image(wrong)


def test_heic_names_the_package_that_opens_it(tmp_path):
    path = trees.write(tmp_path / "a.HEIC", b"\0\0\0\x18ftypheic" + b"\0" * 40)
    for image in ({"path": str(path), "bytes": None}, {"path": None, "bytes": path.read_bytes()}):
        with pytest.raises(PictureError, match="HEIC.*pillow-heif"):
            read_image(image)


def test_a_missing_image_names_the_one_in_another_case(root):
    path = trees.picture(root / "Photos/1.JPG")
    with pytest.raises(PictureError, match=f"is missing; there is {path}"):
        read_image({"path": str(root / "photos/1.jpg"), "bytes": None})


MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("high", [1, 255, 60000])
def test_the_model_reads_images_by_the_same_rule(mode, high):
    """Model code is copied without data_scripts, so the rule is written in both; every mode gives the same, errors too."""
    from modeling_gsva import image_processing_gsva

    values = np.linspace(0, high, 24).reshape(4, 6)
    if mode in ("I", "F", "I;16"):
        image = Image.fromarray(values.astype({"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]))
    else:
        colours = np.random.default_rng(high).integers(0, min(high, 255) + 1, (4, 6, 4), dtype=np.uint8)
        image = Image.fromarray(colours, "RGBA")
        steps = {"La": ("LA", "La"), "PA": ("RGB", "P", "PA")}.get(
            mode, ("RGB", mode) if mode != "RGBa" else ("RGBa",)
        )
        if mode == "LAB":
            image = Image.fromarray(np.ascontiguousarray(colours[..., :3]), "LAB")
            steps = ()
        for step in steps:
            image = image.convert(step)
    image.getexif()[0x0112] = 6

    def outcome(rule):
        try:
            return np.asarray(rule(image)).tolist()
        except ValueError as error:
            return str(error)

    assert image.mode == mode and outcome(images.upright_rgb) == outcome(image_processing_gsva.upright_rgb)
