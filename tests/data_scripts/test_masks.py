"""Run-length encodings: label maps, unions, every form of a mask."""

import numpy as np
import pytest

from data_scripts.masks import (
    check_annotation,
    encode_labels,
    encode_mask,
    is_none,
    mask_area,
    merge_masks,
    segmentation_to_rle,
)


def test_encodings_of_a_label_map_are_those_of_its_masks():
    labels = np.random.default_rng(0).integers(0, 4, (13, 7))
    masks = encode_labels(labels)
    assert masks == {value: encode_mask(labels == value) for value in range(4)}
    assert merge_masks(list(masks.values())) == encode_mask(np.ones((13, 7)))
    assert encode_labels(np.zeros((2, 3), np.uint8)) == {0: encode_mask(np.ones((2, 3)))}


def test_masks_of_different_sizes_do_not_unite():
    with pytest.raises(ValueError, match=r"\[\(2, 2\), \(3, 3\)\]"):
        merge_masks([encode_mask(np.eye(2)), encode_mask(np.eye(3))])


NONE = [None, float("nan"), "", " ", "null", "none", "NaN", [], [[]], [[], []], [None], [""], {}, "[]", "[[]]", (), {"counts": []},
        {"size": [30, 40], "counts": ""}, {"size": [30, 40], "counts": None}]  # fmt: skip


@pytest.mark.parametrize("value", NONE, ids=repr)
@pytest.mark.parametrize(
    "evidence", [{"bbox": [1, 2, 3, 4]}, {"area": 4.0}, {"keypoints": [0, 0, 2]}, {"num_keypoints": 1}]
)
def test_no_mask_beside_a_box_an_area_or_keypoints(value, evidence):
    assert is_none(value)
    check_annotation({"segmentation": value, "bbox": [0, 0, 0, 0], "area": 0.0})  # says nothing of the object
    with pytest.raises(ValueError, match=f"it has {next(iter(evidence))} .* but no mask"):
        check_annotation({"segmentation": value, **evidence})


def test_a_missing_field_is_no_mask():
    with pytest.raises(ValueError, match="but no mask .segmentation: missing"):
        check_annotation({"area": 3})
    assert not any(
        map(is_none, ([[1, 2]], [[1, 1, 5, 5]], 0, "masks/1.png", {"size": [2, 2], "counts": [4]}, [{"a": 1}]))
    )


def test_run_lengths_of_another_size():
    rle = {"size": [60, 40], "counts": [100, 50, 2250]}
    with pytest.raises(
        ValueError, match=r"its mask is \[60, 40\] .*, its image \[40, 60\] \(height and width are swapped"
    ):
        segmentation_to_rle(rle, 40, 60)
    with pytest.raises(ValueError, match=r"its mask is \[60, 40\] .*, its image \[40, 50\]"):
        segmentation_to_rle([rle], 40, 50)
    assert mask_area(segmentation_to_rle(rle, 60, 40)) == 50


def test_coordinates_that_can_only_be_parts_of_the_image():
    for polygon in ([0.1, 0.1, 0.9, 0.1, 0.9, 0.9], [0, 0, 1, 0, 1, 1, 0, 1], [-0.001, 0.5, 1.002, 0.5, 0.5, 1]):
        with pytest.raises(ValueError, match="between 0 and 1.*multiply them by its width .60. and height .40."):
            segmentation_to_rle([polygon], 40, 60)
    assert mask_area(segmentation_to_rle([[0.1, 0.1, 0.9, 0.1, 0.9, 5.9, 0.1, 5.9]], 40, 60)) > 0  # a narrow one
    assert mask_area(segmentation_to_rle([[1, 1]], 40, 60)) == 0  # encloses nothing, so it is left out
