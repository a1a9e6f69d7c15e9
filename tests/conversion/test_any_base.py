"""`--base` and `--sam` make the start of a GSVA: the base is still itself, new rows are drawn, and the directory loads and segments."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_bases as bases
import tiny_directories as tiny
import torch
from isolation import WITHOUT_PROJECT
from safetensors.torch import load_file, save_file
from tiny_bases import rms
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from conversion.any_base import build_start, check_contract, open_mask_model
from conversion.directories import find_base, require_weights
from conversion.new_rows import SlotTokens
from conversion.writing import write_shards
from convert_checkpoint import main
from modeling_gsva import GsvaForConditionalGeneration

FAMILIES = (*bases.FIRST_RANK, *bases.SECOND_RANK)
CASES = [(family, bases.MASK_MODELS[n % 4], (20, 0)[n % 2]) for n, family in enumerate(FAMILIES)]
OPTIONS = {"max_new_tokens": 6, "do_sample": False}


def convert(base: Path, sam: Path, output: Path, *options: str) -> GsvaForConditionalGeneration:
    """Run the command line, and load what it wrote."""
    main(["--base", str(base), "--sam", str(sam), "--output", str(output), *options])
    return AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True, dtype="auto").eval()


@pytest.fixture(scope="module")
def mask_models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mask_models")
    return {kind: tiny.write_mask_model(folder / kind, kind) for kind in bases.MASK_MODELS}


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A base with padding rows; tests do not change it."""
    return tiny.write_base(tmp_path_factory.mktemp("bases") / "llava", "llava")


def assert_the_base_is_itself(base, ours, inputs: dict) -> None:
    with torch.no_grad():
        expected = base(**inputs, output_hidden_states=True, use_cache=False)
        given = ours(**inputs, output_hidden_states=True, use_cache=False)
    assert rms(given.hidden_states[-1], expected.hidden_states[-1]) < 1e-6
    new = {ours.config.seg_token_id, ours.config.rej_token_id}
    kept = [token for token in range(expected.logits.shape[-1]) if token not in new]
    assert rms(given.logits[..., kept], expected.logits[..., kept]) < 1e-6
    options = {**OPTIONS, "suppress_tokens": sorted(new), "eos_token_id": None}
    assert torch.equal(ours.generate(**inputs, **options), base.generate(**inputs, **options))


def assert_rows_are_right(base, ours, tokens: SlotTokens) -> None:
    """New rows are near the mean of the tokens; the base's are as they were, tied or not as they were."""
    old = base.get_input_embeddings().weight
    rows = max(len(old), tokens.count)
    assert ours.config.text_config.vocab_size == rows == ours.vlm.config.get_text_config().vocab_size
    tables = [(old, ours.get_input_embeddings().weight)]
    assert (ours.lm_head.weight is tables[0][1]) == (base.get_output_embeddings().weight is old)
    if base.get_output_embeddings().weight is not old:
        tables.append((base.get_output_embeddings().weight, ours.lm_head.weight))
    for before, after in tables:
        assert len(after) == rows
        same = [token for token in range(len(before)) if token not in (tokens.seg, tokens.rej)]
        assert torch.equal(after[same], before[same])
        known = before[: tokens.old_count]
        for token in {tokens.seg, tokens.rej, *range(len(before), rows)}:
            assert 0 < (after[token] - known.mean(0)).div(known.std(0)).abs().max() < 0.5
        assert (after[tokens.seg] - after[tokens.rej]).abs().min() > 0


def conversation_inputs(processor, picture) -> dict:
    """Return what the base's own processor makes of a question about an image."""
    if processor.chat_template is None:
        return dict(processor(images=picture, text="<image>what is red?", return_tensors="pt"))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what is red?"}]
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )
    )  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in tiny.WITH_PROCESSOR], ids=lambda case: case[0])
def test_each_family_by_the_command_line(case, mask_models, make_picture, tmp_path):
    family, kind, padding = case
    directory = tiny.write_base(tmp_path / "base", family, padding)
    base = AutoModelForImageTextToText.from_pretrained(directory)
    own = AutoProcessor.from_pretrained(directory)
    ours = convert(directory, mask_models[kind], tmp_path / "start")
    assert_the_base_is_itself(base, ours, conversation_inputs(own, make_picture(1, 60, 40)))
    processor = AutoProcessor.from_pretrained(tmp_path / "start", trust_remote_code=True)
    assert (ours.config.seg_token_id, ours.config.rej_token_id) == (processor.seg_token_id, processor.rej_token_id)
    assert_rows_are_right(base, ours, SlotTokens.of(processor.tokenizer, own.tokenizer.get_vocab()))
    weights = AutoModel.from_pretrained(mask_models[kind]).state_dict()
    assert all(torch.equal(ours.sam.state_dict()[name], value) for name, value in weights.items())
    assert ours.generation_config.to_dict() == base.generation_config.to_dict()
    assert processor.image_processor.to_dict() == own.image_processor.to_dict()
    assert own.chat_template in (None, processor.chat_template)
    pictures = [make_picture(2, 50, 40), make_picture(3, 30, 60)]
    inputs = processor(images=pictures, expressions=[["the man", "a unicorn"], ["red"]], return_tensors="pt")
    results = processor.post_process_segmentation(ours.segment(**inputs, threshold=-1e9), inputs)
    assert [[entry["mask"].shape for entry in image] for image in results] == [[(40, 50)] * 2, [(60, 30)]]
    assert results[0][0]["mask"].any() and not results[0][0]["is_rejected"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[0] not in tiny.WITH_PROCESSOR], ids=lambda case: case[0]
)
def test_each_family_without_its_processor(case, mask_models, tmp_path):
    """Their processors need torchvision; the weights and the configuration do not."""
    family, kind, padding = case
    path = tiny.write_base(tmp_path / "base", family, padding)
    base = AutoModelForImageTextToText.from_pretrained(path)
    directory, config = find_base(str(path))
    check_contract(directory, config)
    require_weights(directory)
    old = len(base.get_input_embeddings().weight) - padding
    tokens = SlotTokens(seg=old, rej=old + 1, new=(old, old + 1), old_count=old, count=old + 2)
    start = build_start(directory, config, open_mask_model(str(mask_models[kind])), tokens, 0, None)
    start.model.save_pretrained(tmp_path / "start", state_dict={})
    write_shards(tmp_path / "start", start.tensors, None, "100KB")
    ours = GsvaForConditionalGeneration.from_pretrained(tmp_path / "start")
    images, image = bases.make_images(family, 1), config.image_token_id
    with torch.no_grad():
        features = torch.cat(list(ours.language.encode(images).features.pooler_output))
    ids = torch.tensor([[1, 40, 41, *[image] * len(features), 42, 43, 44]])
    types = {"mm_token_type_ids": (ids == image).long()} if "qwen" in family else {}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images, **types}
    assert_the_base_is_itself(base, ours, inputs)
    assert_rows_are_right(base, ours, tokens)


def test_the_saved_names_are_those_of_save_pretrained(mask_models, llava, tmp_path):
    ours = convert(llava, mask_models["sam2"], tmp_path / "start")
    ours.save_pretrained(tmp_path / "again")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        first, second = (tmp_path / folder / name for folder in ("start", "again"))
        if name.endswith("json"):
            assert json.loads(first.read_text()) == json.loads(second.read_text())
            continue
        weights, again = load_file(first), load_file(second)
        assert weights.keys() == again.keys()
        assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_a_seed_draws_what_is_new(mask_models, llava, tmp_path):
    first = convert(llava, mask_models["sam"], tmp_path / "0").state_dict()
    again = convert(llava, mask_models["sam"], tmp_path / "again", "--seed", "0").state_dict()
    other = convert(llava, mask_models["sam"], tmp_path / "1", "--seed", "1").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    changed = {name for name, value in first.items() if not torch.equal(value, other[name])}
    tables = {"vlm.model.language_model.embed_tokens.weight", "vlm.lm_head.weight"}
    assert changed == tables | {name for name in first if name.startswith("mask_projector")}
    bound = first["mask_projector.0.weight"].shape[1] ** -0.5
    assert 0.9 * bound < first["mask_projector.0.weight"].abs().max() <= bound  # torch.nn.Linear's own


def test_a_tied_base_stays_tied(mask_models, tmp_path):
    base = tiny.write_base(tmp_path / "base", "llava", 0, tie_word_embeddings=True)
    ours = convert(base, mask_models["sam"], tmp_path / "start")
    assert ours.lm_head.weight is ours.get_input_embeddings().weight and len(ours.lm_head.weight) == 262
    from safetensors import safe_open

    with safe_open(tmp_path / "start/model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lm_head" in name]  # noqa: SIM118


def test_a_language_head_that_the_configuration_denies(mask_models, tmp_path):
    """transformers keeps both where they differ; the start's configuration says so, and both are grown."""
    base = tiny.write_base(tmp_path / "base", "llava", 0)
    content = json.loads((base / "config.json").read_text())
    content["text_config"]["tie_word_embeddings"] = content["tie_word_embeddings"] = True
    (base / "config.json").write_text(json.dumps(content))
    own = AutoModelForImageTextToText.from_pretrained(base)
    ours = convert(base, mask_models["sam"], tmp_path / "start")
    assert torch.equal(ours.lm_head.weight[:260], own.lm_head.weight)
    assert not torch.equal(ours.lm_head.weight[:260], ours.get_input_embeddings().weight[:260])
    assert not ours.config.tie_word_embeddings and len(ours.lm_head.weight) == 262


def test_types_and_shards(mask_models, tmp_path):
    """`auto` keeps the base's type; another is chosen; large weights are split."""
    base = tiny.write_base(tmp_path / "base", "llava")
    model = AutoModelForImageTextToText.from_pretrained(base).bfloat16()
    model.save_pretrained(base)
    kept = convert(base, mask_models["sam2"], tmp_path / "kept")
    assert kept.dtype == torch.bfloat16 == kept.sam.dtype == kept.config.vlm_config.get_text_config().dtype
    weights = kept.vlm.state_dict()
    for name, value in model.state_dict().items():
        if "embed_tokens" not in name and "lm_head" not in name:
            assert torch.equal(weights[name], value)
    wide = convert(base, mask_models["sam2"], tmp_path / "wide", "--dtype", "float32", "--max_shard_size", "200KB")
    assert wide.dtype == torch.float32 and len(list((tmp_path / "wide").glob("*.safetensors"))) > 3
    assert torch.equal(
        wide.vlm.state_dict()["model.language_model.norm.weight"].bfloat16(),
        weights["model.language_model.norm.weight"],
    )


def test_layouts_of_the_hub(mask_models, llava, tmp_path):
    """
    The names of transformers 4.52 to 4.57 (others save the older ones, as most repositories have them), pickled shards, and a
    template in a file of its own.
    """
    base = Path(shutil.copytree(llava, tmp_path / "base"))
    assert any(name.startswith("language_model.model.") for name in load_file(base / "model.safetensors"))
    weights = dict(AutoModelForImageTextToText.from_pretrained(base).state_dict())
    assert "lm_head.weight" in weights and "model.language_model.norm.weight" in weights
    (base / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"pytorch_model-0000{n + 1}-of-00002.bin": names[n::2] for n in range(2)}
    for file, keys in shards.items():
        torch.save({key: weights[key] for key in keys}, base / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    ours = convert(base, mask_models["sam"], tmp_path / "start").state_dict()
    expected = convert(llava, mask_models["sam"], tmp_path / "expected").state_dict()
    assert all(torch.equal(ours[name], value) for name, value in expected.items()) and ours.keys() == expected.keys()
    assert (tmp_path / "start/chat_template.jinja").read_text() == template


def test_a_template_of_the_tokenizer(mask_models, llava, tmp_path):
    base = Path(shutil.copytree(llava, tmp_path / "base"))
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    content = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**content, "chat_template": template}))
    convert(base, mask_models["sam"], tmp_path / "start")
    assert AutoProcessor.from_pretrained(tmp_path / "start", trust_remote_code=True).chat_template == template


def test_generation_stays_as_it_was_published(mask_models, llava, tmp_path):
    """Also settings that transformers would not save again once they were changed."""
    base = Path(shutil.copytree(llava, tmp_path / "base"))
    content = {**json.loads((base / "generation_config.json").read_text()), "temperature": 0.2, "top_p": 0.6}
    (base / "generation_config.json").write_text(json.dumps(content))
    ours = convert(base, mask_models["sam"], tmp_path / "start")
    assert (ours.generation_config.temperature, ours.generation_config.top_p) == (0.2, 0.6)
    assert ours.generation_config.eos_token_id == content["eos_token_id"]


def test_sam_of_segment_anything(original, llava, tmp_path):
    ours = convert(llava, original / "sam.pth", tmp_path / "start")
    weights = torch.load(original / "sam.pth", weights_only=True)
    assert ours.config.sam_config.model_type == "sam"
    assert torch.equal(ours.sam.mask_decoder.mask_tokens.weight, weights["mask_decoder.mask_tokens.weight"])
    assert torch.equal(ours.sam.vision_encoder.pos_embed, weights["image_encoder.pos_embed"])


@pytest.mark.parametrize("kind, video", [("sam2", "sam2_video"), ("sam3_tracker", "sam3_tracker_video")])
def test_mask_models_for_videos_are_read_as_those_for_images(kind, video, mask_models, llava, tmp_path):
    """As facebook/sam2.1-hiera-* say it, with a memory that images do not need."""
    sam = Path(shutil.copytree(mask_models[kind], tmp_path / "sam"))
    content = json.loads((sam / "config.json").read_text())
    for part in ("prompt_encoder_config", "mask_decoder_config"):
        content[part]["model_type"] = content[part].get("model_type", f"{kind}_x").replace(kind, video)
    (sam / "config.json").write_text(json.dumps({**content, "model_type": video, "architectures": None}))
    weights = load_file(sam / "model.safetensors")
    save_file(
        {**weights, "memory_attention.layer_norm.weight": torch.ones(3)}, sam / "model.safetensors", {"format": "pt"}
    )
    ours = convert(llava, sam, tmp_path / "start")
    assert ours.config.sam_config.model_type == kind
    own = AutoModel.from_pretrained(mask_models[kind]).state_dict()
    assert all(torch.equal(ours.sam.state_dict()[name], value) for name, value in own.items())


def test_the_tracker_of_sam3_is_read_from_the_layout_of_the_hub(llava, tmp_path):
    weights = tiny.write_sam3_video(tmp_path / "sam3")
    ours = convert(llava, tmp_path / "sam3", tmp_path / "start")
    assert ours.config.sam_config.model_type == "sam3_tracker"
    places = {
        "vision_encoder.backbone.": "detector_model.vision_encoder.backbone.",
        "vision_encoder.neck.": "tracker_neck.",
    }
    for name, tensor in ours.sam.state_dict().items():
        place = next(
            (place + name.removeprefix(ours) for ours, place in places.items() if name.startswith(ours)), None
        )
        assert torch.equal(tensor, weights[place or f"tracker_model.{name}"]), name


def test_the_summary_and_the_card_tell_the_parts_and_their_licences(mask_models, llava, tmp_path, capsys):
    base, sam = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (llava, mask_models["sam2"]))
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# LLaVA\n")
    (sam / "README.md").write_text("---\nlicense: apache-2.0\n---\n# SAM\n")
    convert(base, sam, tmp_path / "start")
    printed, card = capsys.readouterr().out, (tmp_path / "start/README.md").read_text()
    weights = load_file(tmp_path / "start/model.safetensors").values()
    for text in (printed, card):
        assert "llava (llava), licence llama2" in text and "sam2 (sam2), licence apache-2.0" in text
        assert (
            str(sum(value.numel() for value in weights)) in text
            and str(sum(value.nbytes for value in weights)) in text
        )
        assert "[SEG] 260, [REJ] 261" in text and "280, as in the base" in text
        assert str(tmp_path) not in card and str(tmp_path) not in (tmp_path / "start/config.json").read_text()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# LLaVA\n")
    convert(base, sam, tmp_path / "free")
    assert 'license: "apache-2.0"' in (tmp_path / "free/README.md").read_text()


def test_uploads(mask_models, llava, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo, **options: calls.append(("create", repo))
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, *, repo_id, folder_path: calls.append((repo_id, folder_path)),
    )
    convert(llava, mask_models["sam"], tmp_path / "start", "--push_to_hub", "someone/start")
    assert calls == [("create", "someone/start"), ("someone/start", tmp_path / "start")]
    assert "# someone/start" in (tmp_path / "start/README.md").read_text()


# Runs isolated (-I: no working directory, no PYTHONPATH).
SCRIPT = (
    WITHOUT_PROJECT
    + """
import sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = processor(images=[Image.new("RGB", (40, 30), "red")], expressions=[["the man", "a dog"]], return_tensors="pt")
results = processor.post_process_segmentation(model.segment(**inputs, threshold=-1e9), inputs)
assert [entry["mask"].shape for entry in results[0]] == [(30, 40)] * 2
print(type(model).__module__.split(".")[0], [entry["score"] for entry in results[0]])
"""
)


@pytest.mark.slow
def test_a_start_segments_where_the_project_is_not_installed(mask_models, llava, tmp_path):
    convert(llava, mask_models["sam3_tracker"], tmp_path / "start")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", SCRIPT, str(tmp_path / "start")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert ended.returncode == 0 and ended.stdout.startswith("transformers_modules "), ended.stderr


@pytest.mark.slow
def test_memory_is_that_of_the_base_and_a_shard(tmp_path):
    """Of 200 MB; what Python and the libraries take by themselves is taken off."""
    from benchmarks.convert_base import measure

    figures = measure(tmp_path, 200)
    for name in ("padding", "growing"):
        more = figures[f"{name}_peak_megabytes"] - figures["nothing_peak_megabytes"]
        assert more < figures[f"{name}_base_megabytes"] + figures["shard_megabytes"]
