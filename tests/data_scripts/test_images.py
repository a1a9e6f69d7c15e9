"""Images are read upright; a missing or damaged one is named or skipped."""

import data_trees as trees
import pytest
from PIL import Image

import data_scripts
from data_scripts.images import PictureError, read_image
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
