"""CVAT's auto-annotation function, with CVAT's own package."""

from types import SimpleNamespace

import numpy as np
import pytest
from example_files import load_example
from paths import ROOT

cvat = pytest.importorskip("cvat_sdk.auto_annotation")
TEXTS = ["the red circle", "all stars", "a unicorn"]


@pytest.fixture(scope="module")
def function(model_dir):
    return load_example("cvat_function.py").create(str(model_dir), "; ".join([*TEXTS, TEXTS[0]]))


def context(threshold=None, polygons=False):
    return SimpleNamespace(frame_name="a.png", conf_threshold=threshold, conv_mask_to_poly=polygons)


def test_the_labels_are_the_expressions(function):
    assert isinstance(function.spec, cvat.DetectionFunctionSpec)
    assert [(label.name, label.id) for label in function.spec.labels] == list(zip(TEXTS, range(3)))


def test_masks_are_those_of_the_pipeline(function, make_picture):
    from cvat_sdk.masks import decode_mask

    picture = make_picture(0)
    expected = {
        n: one
        for n, one in enumerate(function.segment(picture, expressions=TEXTS))
        if not one["is_rejected"] and one["mask"].any()
    }
    shapes = function.detect(context(), picture)
    assert expected and {shape.label_id for shape in shapes} == set(expected)
    for shape in shapes:
        mask = decode_mask(shape.points, image_width=picture.width, image_height=picture.height)
        assert shape.type.value == "mask" and shape.frame == 0
        assert (mask == expected[shape.label_id]["mask"]).all()


def test_the_threshold_is_cvats(function, make_picture):
    picture = make_picture(0)
    everything = function.segment(picture, expressions=TEXTS, threshold=-1e9)
    order = sorted(one["probability"] for one in everything if one["mask"].any())
    assert len(function.detect(context(0.0), picture)) == len(order) > 1
    kept = function.detect(context(order[-1]), picture)
    assert [everything[shape.label_id]["probability"] for shape in kept] == [order[-1]]


def test_polygons_cover_the_same_pixels(function, make_picture):
    from data_scripts.masks import decode_mask, merge_masks, segmentation_to_rle

    picture = make_picture(0)
    masks = function.segment(picture, expressions=TEXTS, threshold=-1e9)
    shapes = function.detect(context(0.0, polygons=True), picture)
    assert {shape.type.value for shape in shapes} == {"polygon"}
    for label in {shape.label_id for shape in shapes}:
        outlines = [shape.points for shape in shapes if shape.label_id == label]
        size = picture.height, picture.width
        drawn = merge_masks([segmentation_to_rle([outline], *size, in_pixels=True) for outline in outlines])
        assert np.array_equal(decode_mask(drawn), masks[label]["mask"])


def test_no_expression_is_an_error(model_dir):
    with pytest.raises(ValueError, match="names nothing to look for"):
        load_example("cvat_function.py").create(str(model_dir), " ; ")


def test_the_command_line_loads_the_function(model_dir):
    common = pytest.importorskip("cvat_cli._internal.common")
    parameters = {"model": str(model_dir), "expressions": "all stars;a unicorn"}
    function = common.FunctionLoader(None, ROOT / "examples/cvat_function.py", parameters).load()
    assert [label.name for label in function.spec.labels] == ["all stars", "a unicorn"]
