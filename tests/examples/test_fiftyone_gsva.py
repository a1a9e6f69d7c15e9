"""FiftyOne's model source, with FiftyOne's own package where it is installed."""

import json
import os

import numpy as np
import pytest
from example_files import load_example
from paths import ROOT

TEXTS = ["the red circle", "all stars", "a unicorn"]


@pytest.fixture(scope="module")
def source():
    pytest.importorskip("fiftyone")
    return load_example("fiftyone_gsva/__init__.py")


@pytest.fixture(scope="module")
def model(source, model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "gsva"
    source.download_model("gsva", str(path))
    assert path.is_file()  # FiftyOne takes a model whose file is there as downloaded
    return source.load_model("gsva", str(path), model=str(model_dir), expressions=TEXTS)


def test_detections_are_those_of_the_pipeline(model, make_picture):
    pictures = [make_picture(0), make_picture(1, 24, 50)]
    found = model.predict_all([np.asarray(picture) for picture in pictures])
    assert len(found) == 2 and any(detections.detections for detections in found)
    for picture, detections in zip(pictures, found):
        expected = [
            one for one in model.segment(picture, expressions=TEXTS) if not one["is_rejected"] and one["mask"].any()
        ]
        assert [one.label for one in detections.detections] == [one["text"] for one in expected]
        for one, other in zip(detections.detections, expected):
            assert one.confidence == pytest.approx(other["probability"], abs=1e-5)
            frame = (picture.width, picture.height)
            drawn = one.to_segmentation(frame_size=frame, target=1).mask > 0  # FiftyOne pastes the mask into its box
            assert np.array_equal(drawn, other["mask"])


def test_one_image(model, make_picture):
    picture = np.asarray(make_picture(0))
    (batch,) = model.predict_all([picture])
    assert [one.label for one in model.predict(picture).detections] == [one.label for one in batch.detections]


def test_fiftyone_sees_a_model_of_images(model):
    from fiftyone.core import models

    assert isinstance(model, models.Model) and model.media_type == "image"
    assert not model.has_logits and not model.has_embeddings
    with model as entered:
        assert entered is model


def test_a_sample_takes_the_labels_and_filters_them(model, make_picture):
    import fiftyone

    found = model.predict(np.asarray(make_picture(0)))
    best = max(one.confidence for one in found.detections)
    sample = fiftyone.Sample(filepath="a.png")
    sample.add_labels(found, label_field="gsva", confidence_thresh=best)
    assert [one.confidence for one in sample["gsva"].detections] == [best]


def test_the_manifest_names_what_the_source_has():
    with open(ROOT / "examples/fiftyone_gsva/manifest.json", encoding="utf-8") as file:
        manifest = json.load(file)
    assert [entry["base_name"] for entry in manifest["models"]] == ["gsva"]
    zoo = pytest.importorskip("fiftyone.zoo.models")
    read = zoo.RemoteZooModelsManifest.from_json(os.fspath(ROOT / "examples/fiftyone_gsva/manifest.json"))
    assert [entry.name for entry in read.models] == ["gsva"]


@pytest.mark.parametrize("expressions", ["all stars", []])
def test_expressions_are_a_list(source, model_dir, expressions):
    with pytest.raises(ValueError, match="must be a list of texts"):
        source.GsvaModel(str(model_dir), expressions)
