"""Files of weights that are none say what they are, by every way to load a directory."""

import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_gsva import GsvaForConditionalGeneration, GsvaModel
from modeling_gsva.loading_gsva import GsvaWeightsError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
BROKEN = {
    "pointer": (lambda whole: POINTER, "is a Git LFS pointer.*git lfs pull"),
    "page": (lambda whole: b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "error": (lambda whole: b'{"error": "Repository not found"}', "is text, not weights"),
    "empty": (lambda whole: b"", "is empty"),
    "zeros": (lambda whole: bytes(len(whole)), "begins with zeros alone"),
    "cut off": (lambda whole: whole[: len(whole) // 2], "is cut off: it has [\\d,]+ of [\\d,]+ bytes"),
    "cut off in the header": (lambda whole: whole[:1000], "is cut off"),
}


@pytest.fixture
def saved(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "saved")


@pytest.mark.parametrize("kind", BROKEN)
def test_what_it_is_instead(saved, kind):
    change, complaint = BROKEN[kind]
    file = saved / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    for load in (GsvaForConditionalGeneration, GsvaModel, AutoModelForImageTextToText):
        with pytest.raises(GsvaWeightsError, match=f"unreadable: model.safetensors {complaint}") as error:
            load.from_pretrained(saved)
        assert str(saved) in str(error.value) and error.value.wrong.keys() == {"unreadable"}
        assert "strict=False" not in str(error.value)  # would not help
    with pytest.raises(ValueError, match=complaint):
        GsvaForConditionalGeneration.from_pretrained(saved, strict=False)


def test_the_broken_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = min(tmp_path.glob("model-00002-of-*.safetensors"))
    shard.write_bytes(POINTER)
    with pytest.raises(GsvaWeightsError, match=f"1 unreadable: {shard.name} is a Git LFS pointer"):
        GsvaForConditionalGeneration.from_pretrained(tmp_path)


def test_weights_in_torchs_format(model, saved):
    (saved / "model.safetensors").unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    whole = (saved / "pytorch_model.bin").read_bytes()
    for content, complaint in ((whole[:5000], "is cut off"), (POINTER, "is a Git LFS pointer")):
        (saved / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(GsvaWeightsError, match=f"pytorch_model.bin {complaint}"):
            GsvaForConditionalGeneration.from_pretrained(saved)


def test_an_adapters_file(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        GsvaForConditionalGeneration.from_pretrained(saved), LoraConfig(target_modules=r".*language_model.*q_proj")
    )
    adapted.save_pretrained(adapter := tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(POINTER)
    with pytest.raises(GsvaWeightsError, match="adapter_model.safetensors is a Git LFS pointer"):
        GsvaForConditionalGeneration.from_pretrained(adapter)


def test_other_errors_stay_what_they_are(saved):
    with pytest.raises(TypeError):
        GsvaForConditionalGeneration.from_pretrained(saved, nonsense=1)
    with pytest.raises(OSError, match="connect|nowhere"):
        GsvaForConditionalGeneration.from_pretrained("nobody/nowhere")
