"""The key table."""

import doctest
import json

import pytest
from paths import FIXTURES

from conversion import keys, to_original, to_ours
from conversion.bases import check_filled

KEYS = FIXTURES / "original_keys.json"


def test_every_key_of_the_original_has_one_place():
    keys = json.loads(KEYS.read_text())
    names = [to_ours(key) for key in keys]
    assert None not in names and len(set(names)) == len(keys)
    assert [to_original(name) for name in names] == list(keys)


def test_examples_in_docstrings():
    assert doctest.testmod(keys).attempted >= 2
    assert doctest.testmod(keys).failed == 0


def test_table_against_known_names_of_transformers():
    known = {
        "model.visual_model.mask_decoder.transformer.norm_final_attn.bias": "sam.mask_decoder.transformer.layer_norm_final_attn.bias",
        "model.visual_model.image_encoder.blocks.7.norm2.weight": "sam.vision_encoder.layers.7.layer_norm2.weight",
        "model.visual_model.image_encoder.neck.3.bias": "sam.vision_encoder.neck.layer_norm2.bias",
        "model.visual_model.prompt_encoder.mask_downscaling.6.bias": "sam.prompt_encoder.mask_embed.conv3.bias",
        "model.visual_model.mask_decoder.iou_prediction_head.layers.1.bias": "sam.mask_decoder.iou_prediction_head.layers.0.bias",
        "model.text_hidden_fcs.0.2.weight": "mask_projector.2.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": "model.vision_tower.pre_layrnorm.bias",
    }
    assert {key: to_ours(key) for key in known} == known
    assert to_ours("model.visual_model.unheard_of") is None and to_original("sam.unheard_of") is None
    with pytest.raises(
        ValueError, match=r"1 that --sam supplies: sam\.unheard_of"
    ):  # by our name: the original has none
        check_filled({"sam.unheard_of": (1,)}, {}, ["--checkpoint"])
