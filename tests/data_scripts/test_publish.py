"""Published data sets."""

import data_trees as trees
import pytest
from data_trees import SQUARE

import data_scripts
from data_scripts import publish
from data_scripts.masks import mask_area
from data_scripts.transforms import ReferringTransform


def test_publish_writes_a_folder_that_load_dataset_opens(root, tmp_path):
    from datasets import load_dataset

    refs = [trees.ref(), trees.ref(1, ann_id=2, split="testA", image_id=2)]
    trees.referring(root, "refcoco", refs, {1: [SQUARE], 2: [SQUARE]}, images=(1, 2))
    out = tmp_path / "published"
    assert publish.main(["refcoco", str(root), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "data"]
    picture = root / "refer_seg/images/mscoco/images/train2014/1.jpg"
    picture.unlink()  # pictures are embedded
    rows = load_dataset(str(out), cache_dir=str(tmp_path / "hub"))
    assert {split: len(part) for split, part in rows.items()} == {"train": 1, "test": 1, "testA": 1}
    assert rows["train"][0]["image"].size == (trees.WIDTH, trees.HEIGHT)
    assert mask_area(rows["train"][0]["expressions"][0]["mask"]) == 100
    assert ReferringTransform()(rows["train"][0])["masks"][0].sum() == 100
    assert data_scripts.load(str(out), split="testA")[0]["image_id"] == "2"


def test_publish_refuses_what_is_incomplete_or_there(root, tmp_path, capsys):
    trees.referring(root, "refcoco", [trees.ref()], pictures=False)
    assert publish.main(["refcoco", str(root), str(tmp_path / "published")]) == 1
    assert "1 of 1 images are missing" in capsys.readouterr().err
    assert not (tmp_path / "published").exists()
    with pytest.raises(FileExistsError, match="exists already"):
        publish.publish("refcoco", root, tmp_path)
