"""The mask models that the benchmark of evaluation compares stand for the published ones."""

import pytest

from benchmarks._mask_models import HIERAS, SMALL_HIERA, SMALL_VIT, VITS, encoder_cost, hiera_config, vit_config


def test_the_small_encoders_have_the_published_ones_ratio_of_operations():
    small, published = (
        encoder_cost(vit_config(*vit))["operations"] / encoder_cost(hiera_config(*hiera))["operations"]
        for vit, hiera in ((SMALL_VIT, SMALL_HIERA), (VITS["SAM ViT-H"], HIERAS["SAM 2.1 B+"]))
    )
    assert published == pytest.approx(9.22, abs=0.01) and small == pytest.approx(published, rel=0.1)
