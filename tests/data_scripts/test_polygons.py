"""Filled polygons are those of OpenCV 4.10.0."""

import json

import numpy as np
from paths import FIXTURES

from data_scripts.masks import encode_mask
from data_scripts.polygons import fill_polygon


def test_fill_polygon_is_opencv_4_10_0():
    """60 polygons, inside and far beyond the picture, as cv2.fillPoly of 4.10.0 drew them."""
    cases = json.loads((FIXTURES / "fill_poly_opencv_4_10_0.json").read_text())
    assert len(cases) == 60
    for case in cases:
        assert encode_mask(fill_polygon(np.array(case["points"]), *case["mask"]["size"])) == case["mask"], case
