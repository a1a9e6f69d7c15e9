"""The settings of an evaluation."""

from dataclasses import FrozenInstanceError

import pytest
from evaluations import config_of

PROTOCOLS = ("teacher_forced", "slots", "generate")


@pytest.mark.parametrize(
    "options", [{"protocol": "honest"}, {"ignore_region": "255"}, {"task": "vqa"}, {"batch_size": 0}]
)
def test_unknown_names_are_listed(rows, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        config_of(rows, **options)


def test_settings_never_change(rows):
    with pytest.raises(FrozenInstanceError):
        config_of(rows).protocol = "generate"
