"""Run-length encodings: label maps, unions, every form of a mask."""

import numpy as np
import pytest

from data_scripts.masks import encode_labels, encode_mask, merge_masks


def test_encodings_of_a_label_map_are_those_of_its_masks():
    labels = np.random.default_rng(0).integers(0, 4, (13, 7))
    masks = encode_labels(labels)
    assert masks == {value: encode_mask(labels == value) for value in range(4)}
    assert merge_masks(list(masks.values())) == encode_mask(np.ones((13, 7)))
    assert encode_labels(np.zeros((2, 3), np.uint8)) == {0: encode_mask(np.ones((2, 3)))}


def test_masks_of_different_sizes_do_not_unite():
    with pytest.raises(ValueError, match=r"\[\(2, 2\), \(3, 3\)\]"):
        merge_masks([encode_mask(np.eye(2)), encode_mask(np.eye(3))])
