"""The embedded bases: they segment what is said and shown, the demo runs over the base of today's parts, and both can be made."""

import json
import sys

import numpy as np
import pytest
import torch
from paths import ROOT

import run_gres
from data_scripts import shapes
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor

TODAY = ROOT / "assets/tiny_gsva_today"


@pytest.fixture(scope="module")
def today():
    return GsvaForConditionalGeneration.from_pretrained(TODAY, dtype=torch.float32), GsvaProcessor.from_pretrained(
        TODAY
    )


def test_the_base_of_todays_parts_is_small_and_of_the_types_that_it_names(today):
    model, _ = today
    assert (TODAY / "model.safetensors").stat().st_size < 6e6
    config = model.config
    kinds = (config.vlm_config, config.text_config, config.vision_config, config.sam_config)
    assert [kind.model_type for kind in kinds] == ["llava", "qwen3", "siglip_vision_model", "sam2"]
    assert not list(TODAY.glob("*.py")) and "auto_map" not in (TODAY / "config.json").read_text()


def test_it_segments_expressions_and_answers_in_words(today):
    model, processor = today
    images, things_of = zip(
        *(shapes.draw_picture(np.random.default_rng([0, shapes.SPLIT_CODES["validation"], n, 0])) for n in range(12))
    )
    random = np.random.default_rng(0)
    items_of = [[item for item in shapes.make_expressions(random, things) if item[1]] for things in things_of]
    inputs = processor(
        images=list(images), expressions=[[text for text, _ in items] for items in items_of], return_tensors="pt"
    )
    results = processor.post_process_segmentation(model.segment(**inputs), inputs)
    ious = []
    for items, entries in zip(items_of, results, strict=True):
        for (text, targets), entry in zip(items, entries, strict=True):
            truth = np.any([thing.mask for thing in targets], axis=0)
            assert entry["text"] == text and not entry["is_rejected"]
            ious.append((entry["mask"] & truth).sum() / (entry["mask"] | truth).sum())
    assert np.mean(ious) > 0.7
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is there from left to right?"}]}
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[images[0]], text=[prompt], return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    named = processor.tokenizer.decode(answer, skip_special_tokens=True).split(", ")
    assert len(named) == len(things_of[0])
    right = [
        f"{thing.size} {thing.name}" == name
        for thing, name in zip(sorted(things_of[0], key=lambda thing: thing.x), named, strict=True)
    ]
    assert np.mean(right) >= 0.5, (named, things_of[0])


def test_the_demo_runs_over_it(tmp_path):
    options = json.dumps({"size": 8, "cache_dir": str(tmp_path / "cache")})
    words = ["configs/demo_today.yaml", "--output_dir", str(tmp_path / "out"), "--dataset_options", options]
    words += ["--model", str(TODAY), "--max_steps", "1", "--warmup_steps", "0", "--per_device_train_batch_size", "2"]
    words += [
        "--max_eval_samples",
        "4",
        "--protocols",
        "slots",
        "--num_pictures",
        "0",
        "--use_cpu",
        "--disable_tqdm",
        "true",
    ]
    words[0] = str(ROOT / words[0])
    assert run_gres.main(words) in (0, None)
    entries = json.loads((tmp_path / "out/results.json").read_text())
    records = entries if isinstance(entries, list) else entries["records"]
    assert {entry["stage"] for entry in records} == {"before", "after"}
    before = next(entry for entry in records if entry["stage"] == "before")
    assert before["metrics"]["gIoU"] > 0.3 and before["metrics"]["N_acc"] == 0
    GsvaProcessor.from_pretrained(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llava_v1", "today"])
def test_a_base_is_made_and_its_making_resumes(arch, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "assets"))
    import make_tiny_gsva

    words = ["--arch", arch, "--images", "16", "--batch", "4", "--steps", "1", "--work_dir", str(tmp_path / "work")]
    words += ["--output_dir", str(tmp_path / "out")]
    first = next(iter(make_tiny_gsva.BASES[arch].steps))
    make_tiny_gsva.main([*words, "--stage", first])
    log = tmp_path / "work/log.jsonl"
    assert [json.loads(line)["stage"] for line in log.read_text().splitlines()] == [first]
    make_tiny_gsva.main(words)
    made = [json.loads(line)["stage"] for line in log.read_text().splitlines()]
    assert made == [*make_tiny_gsva.BASES[arch].steps, "done"]
    model = GsvaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.config.seg_token_id == GsvaProcessor.from_pretrained(tmp_path / "out").seg_token_id
    assert "make_tiny_gsva" in sys.modules
