"""What cannot be a part of a GSVA is refused in one sentence that says what to give, before anything is written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_directories as tiny
import torch
from safetensors.torch import load_file, save_file

from conversion.directories import licence_in
from convert_checkpoint import main

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4221\n"


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("bases") / "llava", "llava")


@pytest.fixture(scope="module")
def sam2(tmp_path_factory) -> Path:
    return tiny.write_mask_model(tmp_path_factory.mktemp("mask_models") / "sam2", "sam2")


@pytest.fixture
def base(llava, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(llava, tmp_path / "base"))


@pytest.fixture
def sam(sam2, tmp_path) -> Path:
    return Path(shutil.copytree(sam2, tmp_path / "sam"))


def refused(base: Path, sam: Path, *options: str) -> str:
    """Return the sentence with which the command line ends; nothing is written."""
    before = sorted(base.parent.iterdir())
    with pytest.raises(SystemExit) as error:
        main(["--base", str(base), "--sam", str(sam), "--output", str(base.parent / "start"), *options])
    assert sorted(base.parent.iterdir()) == before
    message = str(error.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


def edit(file: Path, **values) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(file.read_text()) if file.exists() else {}
    content = {name: value for name, value in {**content, **values}.items() if value is not None}
    file.write_text(json.dumps(content))


# entries of config.json, words of the message
OTHER_BASES = {
    "text only": ({"model_type": "llama"}, "--base .* reads text only .*'llama'.*Pass a vision-language model"),
    "no language": ({"model_type": "clip"}, "is no vision-language model .*'clip'"),
    "mask model": ({"model_type": "sam2_video"}, "is a mask model .sam2_video.: pass it with --sam"),
    "GSVA": ({"model_type": "gsva"}, "is a GSVA already.*run_gres.py --model"),
    "remote code": (
        {"model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}},
        "'internvl_chat'.*its code lies in its own repository.*ends with -hf",
    ),
    "unknown type": ({"model_type": "llava_9"}, "'llava_9', which this version of transformers does not have. Install a newer"),
    "no type": ({"model_type": None}, "names no model_type"),
    "quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized .'gptq'.*before it was quantized"),
    "authors' layout": ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "layout of its authors.*llava-hf/llava-1.5-7b-hf"),
    "broken": ({"text_config": {"model_type": "llama", "hidden_size": "big"}}, "does not describe a model .*download it again"),
    "another image token": ({"image_token_index": -1, "image_token_id": -1}, "its processor writes 259 for an image, its model reads -1"),
    "no image token": ({"model_type": "blip-2"}, "'blip-2'. cannot be the base.*it lacks config.image_token_id. Take .*llava"),
    "no contract": ({"model_type": "pix2struct"}, "'pix2struct'. cannot be the base.*lacks get_image_features, mm_encoder_outputs"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_BASES)
def test_other_models_given_as_base(case, base, sam2):
    values, message = OTHER_BASES[case]
    edit(base / "config.json", **values)
    if case.startswith("no ") and values["model_type"] in ("blip-2", "pix2struct"):
        (base / "config.json").write_text(json.dumps(values))
    assert re.search(message, refused(base, sam2))


def test_a_tokenizer_without_the_image_token(base, sam2):
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    (base / "tokenizer.json").write_text(json.dumps(content))
    edit(
        base / "tokenizer_config.json", image_token=None, extra_special_tokens=None, model_specific_special_tokens=None
    )
    assert "image" in refused(base, sam2)


def test_slots_that_mean_something_else(base, sam2):
    content = json.loads((base / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["[SEG]"] = vocabulary.pop("a")
    (base / "tokenizer.json").write_text(json.dumps(content))
    assert "[SEG] is an ordinary entry of the tokenizer's vocabulary" in refused(base, sam2)


def test_slots_that_are_added_in_another_way(base, sam2):
    content = json.loads((base / "tokenizer.json").read_text())
    entry = {"content": "[REJ]", "id": 260, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
             "special": False}  # fmt: skip
    content["added_tokens"].append(entry)
    (base / "tokenizer.json").write_text(json.dumps(content))
    assert "[REJ] means something else in this tokenizer: it is an added token with normalized=True" in refused(
        base, sam2
    )


def test_no_model_at_all(base, sam2, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no config.json. Pass a directory that save_pretrained wrote" in refused(tmp_path / "empty", sam2)
    assert "does not exist" in refused(tmp_path / "nowhere", sam2)
    assert "is a file: pass the directory" in refused(base / "model.safetensors", sam2)
    (base / "config.json").write_text("<!DOCTYPE html>\n<html>")
    assert "is a web page" in refused(base, sam2)


def test_adapters(base, sam2):
    edit(base / "adapter_config.json", base_model_name_or_path="llava-hf/llava-1.5-7b-hf", peft_type="LORA")
    assert "is an adapter of PEFT, not a whole model. Merge it into its base ('llava-hf/llava-1.5-7b-hf')" in refused(
        base, sam2
    )


def test_a_base_without_processor_or_template(base, sam2):
    (base / "chat_template.jinja").unlink()
    assert "has no chat template" in refused(base, sam2)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (base / name).unlink(missing_ok=True)
    assert "has no processor that GSVA can use" in refused(base, sam2)


@pytest.mark.parametrize("part", ["base", "sam"])
@pytest.mark.parametrize("content, message", [
    (POINTER.encode(), "is a Git LFS pointer"), (b"<!DOCTYPE html><html>Access denied</html>", "is a web page"),
    (b"", "is empty"), (None, "is cut off: it has .* Copy or download it again"),
])  # fmt: skip
def test_broken_weights(part, content, message, base, sam):
    file = {"base": base, "sam": sam}[part] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    found = refused(base, sam)
    assert re.search(f"{part}/model.safetensors {message}", found)


def test_weights_that_are_not_all_there(base, sam2):
    weights = load_file(base / "model.safetensors")
    lost = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    save_file(
        {name: value for name, value in weights.items() if name != lost}, base / "model.safetensors", {"format": "pt"}
    )
    assert "is missing. The directory is not whole" in refused(base, sam2)
    save_file({**weights, lost: weights[lost][:3].contiguous()}, base / "model.safetensors", {"format": "pt"})
    assert "up_proj.weight is (3, 32), config.json says (64, 32)" in refused(base, sam2)
    save_file({**weights, lost: weights[lost] * float("nan")}, base / "model.safetensors", {"format": "pt"})
    assert "up_proj.weight are not finite" in refused(base, sam2)
    index = {"metadata": {}, "weight_map": {name: "model-00001-of-00002.safetensors" for name in weights}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors is missing" in refused(base, sam2)
    (base / "model-00001-of-00002.safetensors").unlink()
    (base / "model.safetensors.index.json").unlink()
    assert "has no weights that transformers reads" in refused(base, sam2)


# entries of config.json, words of the message
OTHER_MASK_MODELS = {
    "SAM 3's detector": ({"model_type": "sam3"}, "is SAM 3's detector.*holds its tracker"),
    "EfficientSAM": (
        {"model_type": "EfficientSAM"},
        "transformers has no such model; give facebook/sam2.1-hiera-tiny",
    ),
    "vision-language model": (
        {"model_type": "qwen3_vl"},
        "is a vision-language model .qwen3_vl.: pass it with --base",
    ),
    "CLIP": ({"model_type": "clip"}, "'clip' cannot be prompted by GSVA; take one of sam, sam_hq, sam2, sam3_tracker"),
    "quantized": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantized .'bitsandbytes'"),
}


@pytest.mark.parametrize("case", OTHER_MASK_MODELS)
def test_other_models_given_as_mask_model(case, llava, sam):
    values, message = OTHER_MASK_MODELS[case]
    edit(sam / "config.json", **values)
    base = sam.parent / "base"
    base.symlink_to(llava)
    assert re.search(message, refused(base, sam))


@pytest.mark.parametrize("kind, names", [
    ("SAM 2", ["image_encoder.trunk.blocks.0.norm1.weight"]),
    ("MobileSAM", ["image_encoder.patch_embed.seq.0.c.weight"]),
    ("EfficientSAM", ["mask_decoder.final_output_upscaling_layers.0.0.weight", "image_encoder.pos_embed"]),
    ("SAM 3", ["detector.backbone.x"]),
])  # fmt: skip
def test_files_of_other_mask_models(kind, names, base):
    file = base.parent / "weights.pth"
    torch.save({name: torch.ones(2) for name in names}, file)
    message = refused(base, file)
    assert f"it is {kind}," in message
    assert (
        "--sam also takes a directory or Hub id of SAM, SAM-HQ, SAM 2" in message
        and "facebook/sam2.1-hiera" in message
    )


def test_an_output_that_exists(base, sam2, tmp_path):
    (tmp_path / "start").mkdir()
    (tmp_path / "start/mine.txt").write_text("kept")
    assert "exists" in refused(base, sam2)
    assert (tmp_path / "start/mine.txt").read_text() == "kept"


@pytest.mark.skipif(tiny.HAS_TORCHVISION, reason="torchvision is installed")
def test_processors_that_need_torchvision_say_so_at_once(sam2, tmp_path):
    base = tiny.write_base(tmp_path / "base", "internvl")
    (base / "model.safetensors").write_bytes(b"")  # is not looked at before
    message = refused(base, sam2)
    assert "InternVLProcessor needs torchvision" in message and "pip install -e '.[torchvision]'" in message


@pytest.mark.parametrize("words, message", [
    (["--checkpoint", "x"], "--base is a model of today, and --checkpoint belongs to checkpoints of the original"),
    (["--llava", "x"], "and --llava belongs"), (["--llama", "x"], "and --llama belongs"), (["--clip", "x"], "and --clip belongs"),
    (["--reverse"], "and --reverse belongs"), (["--keep_lora"], "and --keep_lora belongs"), ([], "--base needs --sam"),
])  # fmt: skip
def test_options_that_do_not_go_together(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--base", "b", "--output", str(tmp_path / "out"), *words])
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text, licence", [
    ("---\nlicense: apache-2.0\n---\n# a", "apache-2.0"), ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
    ("---\nlicense: [mit, llama2]\n---\n", "mit, llama2"), ("# no metadata", None), ("---\nlicense: [\n---\n", None),
    ("---\ntags: [x]\n---\n", None), (None, None),
])  # fmt: skip
def test_licences_of_cards(text, licence, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_in(tmp_path / "README.md") == licence
