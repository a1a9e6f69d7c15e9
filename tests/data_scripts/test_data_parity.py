"""The data pipeline gives the recorded outputs of the original (tests/fixtures/golden_data holds a part, without token ids)."""

import json

import data_parity
import pytest
from paths import FIXTURES, SHARED

FIXTURE = FIXTURES / "golden_data"
FILES = [f"{path.parent.name}/{path.stem}" for path in sorted(FIXTURE.glob("golden/*/*.json"))] + ["images"]


@pytest.mark.parametrize("file", FILES)
def test_equals_the_original(file):
    lines = []
    failed = data_parity.run(FIXTURE, None, lines.append, only=file)
    assert lines
    assert not failed, [line for line in lines if not json.loads(line)["ok"]]


def test_a_departure_is_found(monkeypatch):
    """The comparison is not blind: another separator between answers must show."""
    monkeypatch.setattr(data_parity.transforms, "SEMANTIC_WORDING", data_parity.transforms.Wording(separator=", "))
    lines = []
    assert data_parity.run(FIXTURE, None, lines.append, only="train/ade20k")
    wrong = [json.loads(line)["quantity"] for line in lines if not json.loads(line)["ok"]]
    assert wrong == ["conversations, llava_v1"]


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "golden_data").is_dir(), reason="needs GSVA_SHARED, a folder with golden_data")
@pytest.mark.parametrize("kind", ["val/", "train/", "enumerate/", "mixed", "images", "tokenizer"])
def test_equals_the_original_in_full(kind):
    tokenizer = SHARED / "llama_tokenizer.model"
    lines = []
    failed = data_parity.run(SHARED / "golden_data", str(tokenizer), lines.append, only=kind)
    assert lines
    assert not failed, [line for line in lines if not json.loads(line)["ok"]]
