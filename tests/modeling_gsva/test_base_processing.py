"""The processor of a GSVA over any base: what the base's own processor gives, images once, and answers by its chat template."""

import importlib.util
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_processors as tiny
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

from modeling_gsva import GsvaPipeline, GsvaProcessor
from modeling_gsva.base_processing_gsva import check_extras, load_base_processor
from modeling_gsva.prompts_gsva import BARE_TEMPLATE, add_slot_tokens
from modeling_gsva.reading_gsva import AnsweredBatch, PrefixCache

NEEDS_TORCHVISION = pytest.mark.skipif(not tiny.HAS_TORCHVISION, reason="these processors need torchvision")
FAMILIES = [*tiny.WITH_PILLOW, *(pytest.param(name, marks=NEEDS_TORCHVISION) for name in tiny.WITH_TORCHVISION)]
EXPRESSIONS = [["the man in red", "a dog"], ["one more car"]]


def picture(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [picture(0, 40, 60), picture(1, 70, 33)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def processor(family) -> GsvaProcessor:
    return tiny.make_processor(family)


@pytest.fixture(scope="module")
def base(family):
    """The base's processor alone, with the same tokens."""
    alone = tiny.base_processor(family)
    add_slot_tokens(alone.tokenizer)
    alone.chat_template = tiny.TEMPLATES[family]
    return alone


@pytest.fixture(scope="module")
def model(family, processor):
    return tiny.make_model(family, processor)


def messages(image, question: str, answer: str | None = None) -> list[dict]:
    """A conversation as transformers' own templates take it."""
    asked = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    given = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return [asked] if answer is None else [asked, given]


def chat(base, image, question: str) -> dict:
    """What the base's processor alone gives for a question about an image."""
    return base.apply_chat_template(
        messages(image, question), tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )


def rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask)]


def question(processor, expressions: list[str]) -> str:
    return processor.build_conversation(expressions)[0]["content"].replace("<image>\n", "")


def test_prompts_and_images_are_the_bases_own(processor, base, family):
    """Each image is prepared once, as the base alone prepares it, however many conversations are about it."""
    inputs = processor(images=PICTURES, expressions=EXPRESSIONS, one_prompt_per_expression=True, return_tensors="pt")
    assert inputs["image_index"].tolist() == [0, 0, 1]
    asked = [(0, "the man in red"), (0, "a dog"), (1, "one more car")]
    for row, (image, text) in zip(rows(inputs["input_ids"], inputs["attention_mask"]), asked):
        assert row == chat(base, PICTURES[image], question(processor, [text]))["input_ids"][0].tolist()
    expected = base(
        images=[[image] for image in PICTURES], text=[base.image_token] * 2, padding=True, return_tensors="pt"
    )
    names = set(expected) - {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}
    assert "pixel_values" in names and names <= set(inputs)
    for name in names:
        assert torch.equal(inputs[name], expected[name]), name
    assert inputs["sam_pixel_values"].shape == (2, 3, 64, 64)
    assert inputs["original_sizes"].tolist() == [[40, 60], [70, 33]]
    answers = rows(inputs["answer_ids"], inputs["answer_attention_mask"])
    assert [processor.tokenizer.decode(row).strip() for row in answers] == [
        f"Sure,{text}:[SEG].{end_of_turn(processor)}" for _, text in asked
    ]


def end_of_turn(processor) -> str:
    return processor.tokenizer.eos_token


def test_images_are_read_as_they_are_shown(processor, tmp_path):
    """Turned by EXIF, with alpha, as bytes, as a path and as an array of floats: the base gets what Pillow shows."""
    turned = PICTURES[0].transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    alpha = PICTURES[0].convert("RGBA")
    alpha.putalpha(7)
    as_bytes = io.BytesIO()
    alpha.save(as_bytes, "PNG")
    floats = np.asarray(PICTURES[0], dtype=np.float32) / 255
    expected = processor(images=[PICTURES[0]], expressions=[["a dog"]], return_tensors="pt")
    for given in (tmp_path / "turned.png", str(tmp_path / "turned.png"), as_bytes.getvalue(), floats):
        inputs = processor(images=[given], expressions=[["a dog"]], return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        assert torch.equal(inputs["sam_pixel_values"], expected["sam_pixel_values"])
    with pytest.raises(ValueError, match=r"missing\.png' cannot be read as an image"):
        processor(images=["missing.png"], expressions=[["a dog"]])
    with pytest.raises(ValueError, match="1 entries of images hold 2 images"):
        processor(images=[np.zeros((2, 8, 8, 3), np.uint8)], expressions=[["a dog"]])


def test_training_supervises_answers_with_their_end(processor, family):
    talks = [
        [{"role": "user", "content": "<image>\nWhat is left?"}, {"role": "assistant", "content": "it is [SEG]."}],
        [{"role": "user", "content": "<image>\nAnd a unicorn?"}, {"role": "assistant", "content": "[REJ]"}],
        [{"role": "user", "content": "<image>\nAnd right?"}, {"role": "assistant", "content": "They are [SEG]"}],
    ]
    index, masks = [1, 0, 1], [np.ones((1, 70, 33)), np.zeros((1, 40, 60)), np.ones((1, 70, 33))]
    batch = processor(images=PICTURES, conversations=talks, image_index=index, masks=masks, return_tensors="pt")
    end = end_of_turn(processor)
    for row, talk in enumerate(talks):
        labels, kept = batch["labels"][row], batch["attention_mask"][row].bool()
        said = processor.tokenizer.decode(labels[labels != -100])
        assert said.strip() == talk[1]["content"] + end
        assert bool((batch["input_ids"][row][labels != -100] == labels[labels != -100]).all())
        assert labels[kept][-1] == processor.tokenizer.convert_tokens_to_ids(end)  # nothing follows the end
        # The prompt of training is that of generation.
        asked = processor.apply_chat_template(
            messages(PICTURES[index[row]], talk[0]["content"].replace("<image>\n", "")),
            tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
        )  # fmt: skip
        assert batch["input_ids"][row][kept & (labels == -100)].tolist() == asked["input_ids"][0].tolist()
    assert [mask.shape for mask in batch["mask_labels"]] == [(1, 70, 33), (1, 40, 60), (1, 70, 33)]


def test_a_string_with_the_marker_is_the_same_question(processor):
    asked = [{"role": "user", "content": "<image>\n  What is left?"}]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is left?"}]}]
    one, other = (processor.apply_chat_template(each, add_generation_prompt=True) for each in (asked, parts))
    assert one == other and one.count(processor.image_token) == 1


def own_states(model, base, image: Image.Image, question: str, answer: list[int]) -> torch.Tensor:
    """Hidden states (length, hidden) of the base alone over what its own processor gives, and an answer behind it."""
    inputs = {name: value for name, value in chat(base, image, question).items() if name != "labels"}
    count = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:  # 0 at text; an answer is 1 in PaliGemma
            kind = int(model.config.vlm_config.model_type == "paligemma")
            behind = torch.full((1, len(answer)), kind)
            inputs[name] = torch.cat([torch.as_tensor(inputs[name]), behind], 1)
    with torch.no_grad():
        outputs = model.vlm(**inputs, output_hidden_states=True, use_cache=False)
    assert inputs["input_ids"].shape[1] == count + len(answer)
    return outputs.hidden_states[-1][0]


def test_segment_answers_as_the_base_alone_reads(processor, base, model):
    """Left-padded, each image once and in tiles, against a plain forward pass over what the base's own processor gives."""
    inputs = processor(images=PICTURES, expressions=EXPRESSIONS, one_prompt_per_expression=True, return_tensors="pt")
    asked = [(0, "the man in red"), (0, "a dog"), (1, "one more car")]
    for method in ("slots", "teacher_forced"):
        outputs = model.segment(**inputs, method=method)
        for row, (image, text) in enumerate(asked):
            answer = rows(inputs["answer_ids"], inputs["answer_attention_mask"])[row]
            states = own_states(model, base, PICTURES[image], question(processor, [text]), answer)
            before = states[len(states) - len(answer) + answer.index(processor.seg_token_id) - 1]
            logits = model.language.logits(before)
            expected = logits[processor.seg_token_id] - logits[processor.rej_token_id]
            torch.testing.assert_close(outputs.scores[row][0], expected, rtol=2e-5, atol=2e-5)
        results = processor.post_process_segmentation(outputs, inputs)
        assert [[entry["text"] for entry in of_image] for of_image in results] == EXPRESSIONS
        assert [of_image[0]["mask"].shape for of_image in results] == [(40, 60), (70, 33)]


def test_whole_batches_train(processor, base, model, family):
    """The loss is that of the base alone over the same conversations, and the masks have a loss."""
    talks = [
        [{"role": "user", "content": "<image>\nWhat is left?"}, {"role": "assistant", "content": "it is [SEG]."}],
        [{"role": "user", "content": "<image>\nAnd right?"}, {"role": "assistant", "content": "[REJ]"}],
    ]
    masks = [np.ones((1, 70, 33)), np.zeros((1, 40, 60))]
    batch = processor(images=PICTURES, conversations=talks, image_index=[1, 0], masks=masks, return_tensors="pt")
    model.train()
    outputs = model(**batch)
    model.eval()
    total, count = 0.0, 0
    for row, (image, asked) in enumerate([(1, "What is left?"), (0, "And right?")]):
        answer = batch["labels"][row][batch["labels"][row] != -100].tolist()
        states = own_states(model, base, PICTURES[image], asked, answer)
        logits = model.language.logits(states[-len(answer) - 1 : -1]).detach()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        total += loss.item()
        count += len(answer)
    assert outputs.ce_loss.item() == pytest.approx(total / count, rel=1e-4)
    assert outputs.mask_bce_loss > 0 and outputs.loss.requires_grad


def test_chats_generate_what_the_base_writes(processor, base, model):
    """Free questions: the tokens are the base's own, a streamed answer has the same text, and its slots give masks."""
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    inputs = processor.apply_chat_template(
        messages(PICTURES[1], "Where is it?"), tokenize=True, return_dict=True, add_generation_prompt=True,
        return_tensors="pt",
    )  # fmt: skip
    own = {name: value for name, value in chat(base, PICTURES[1], "Where is it?").items() if name != "labels"}
    for name, value in own.items():
        assert torch.equal(torch.as_tensor(inputs[name]), torch.as_tensor(value)), name
    expected = model.vlm.generate(**own, **options)
    outputs = model.segment(**inputs, method="generate", **options)
    assert torch.equal(outputs.sequences, expected)
    assert torch.equal(model.generate(**inputs, **options), expected)
    (results,) = processor.post_process_segmentation(outputs, inputs)
    written = processor.read_answer(expected[0, own["input_ids"].shape[1] :].tolist())
    assert [(entry["text"], entry["is_rejected"]) for entry in results] == written
    with processor.stream(model, inputs, **options) as answer:
        text = "".join(answer)
        assert len(answer.results) == 1
    assert text == processor.tokenizer.decode(expected[0, own["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_batch_of_chats_pads_on_the_left(processor, model):
    chats = [messages(PICTURES[0], "Where is it?"), messages(PICTURES[1], "What is the colour of the car?")]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    assert inputs["attention_mask"][:, -1].all() and "image_index" not in inputs
    options = {"method": "generate", "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    outputs = model.segment(**inputs, **options)
    for row, single in enumerate(chats):
        alone = processor.apply_chat_template(
            single, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        assert torch.equal(outputs.sequences[row, -3:], model.segment(**alone, **options).sequences[0, -3:])


def test_several_turns(processor, family):
    """Each answer is learned, and the prompt of the second turn is the one that a chat gives."""
    talk = [
        {"role": "user", "content": "<image>\nWhat is left?"}, {"role": "assistant", "content": "it is [SEG]."},
        {"role": "user", "content": "And right?"}, {"role": "assistant", "content": "the dog [SEG], a cat [REJ]"},
    ]  # fmt: skip
    if family == "paligemma":
        with pytest.raises(ValueError, match="PaliGemmaProcessor lays out one question"):
            processor(images=PICTURES[:1], conversations=[talk], masks=[np.ones((3, 40, 60))])
        return
    batch = processor(images=PICTURES[:1], conversations=[talk], masks=[np.ones((3, 40, 60))], return_tensors="pt")
    ids, labels, end = batch["input_ids"][0], batch["labels"][0], end_of_turn(processor)
    said = processor.tokenizer.decode(labels[labels != -100])
    assert said.replace(" ", "") == f"itis[SEG].{end}thedog[SEG],acat[REJ]{end}"
    chat_messages = [dict(talk[0], content=messages(PICTURES[0], "What is left?")[0]["content"]), *talk[1:3]]
    asked = processor.apply_chat_template(
        chat_messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )["input_ids"][0]
    assert torch.equal(asked, ids[: len(asked)]) and labels[len(asked)] != -100
    assert len(ids) - len(asked) == len(
        processor.tokenizer(talk[3]["content"], add_special_tokens=False).input_ids
    ) + 1 + int(processor.tokenizer.decode(ids[len(asked)]) == " ")


def test_lengths(processor):
    inputs = processor(images=PICTURES, expressions=EXPRESSIONS, return_tensors="pt")
    lengths = (inputs["attention_mask"].sum(1) + inputs["answer_attention_mask"].sum(1)).tolist()
    processor(images=PICTURES, expressions=EXPRESSIONS, max_length=max(lengths))
    count = int((inputs["input_ids"][0] == processor.image_token_id).sum())
    with pytest.raises(ValueError, match=rf"of image 0 make a prompt .* of {lengths[0]} tokens\s\({count} of them"):
        processor(images=PICTURES, expressions=EXPRESSIONS, max_length=lengths[0] - 1)
    talk = processor.build_conversation(["a dog"])
    with pytest.raises(ValueError, match=f"cuts the image of conversation 0, which alone takes {count} tokens"):
        processor(images=PICTURES[:1], conversations=[talk], masks=[np.ones((1, 40, 60))], max_length=5)


def test_the_pipeline_joins_images_of_other_sizes(processor, model):
    segment = GsvaPipeline(model=model, processor=processor)
    together = segment(PICTURES, expressions=EXPRESSIONS, batch_size=2)
    for image, texts, results in zip(PICTURES, EXPRESSIONS, together, strict=True):
        alone = segment(image, expressions=texts)
        assert [entry["text"] for entry in results] == texts
        for one, other in zip(results, alone, strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=2e-5)


def test_saved_and_loaded(processor, family, tmp_path):
    """In the files of the base's processor, from which the base's own classes load, too."""
    processor.save_pretrained(tmp_path)
    expected = processor(images=PICTURES, expressions=EXPRESSIONS, return_tensors="pt")
    for loader in (GsvaProcessor, AutoProcessor):
        again = loader.from_pretrained(tmp_path)
        assert type(again) is type(processor) and again.chat_template == processor.chat_template
        assert again.to_dict() == {
            **processor.to_dict(),
            **({"auto_map": again.auto_map} if "auto_map" in vars(again) else {}),
        }
        inputs = again(images=PICTURES, expressions=EXPRESSIONS, return_tensors="pt")
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(value, inputs[name]) for name, value in expected.items() if name != "expressions")
    base = type(processor.base).from_pretrained(tmp_path)
    assert base.to_dict() == processor.base.to_dict() and base.chat_template == processor.chat_template
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path, backend="pil"), type(processor.image_processor))


REMOTE = """
import sys
import numpy as np
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules"), type(processor)
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
inputs = processor(images=[picture], expressions=[["a dog", "the man"]], return_tensors="pt")
print(*model.segment(**inputs).scores[0].tolist())
processor.save_pretrained(sys.argv[2])
again = AutoProcessor.from_pretrained(sys.argv[2], trust_remote_code=True)
assert again.to_dict() == processor.to_dict() and again.chat_template == processor.chat_template
"""


@pytest.mark.slow
def test_loads_where_the_project_is_not_installed(tmp_path):
    processor = tiny.make_processor("llava_next")
    model = tiny.make_model("llava_next", processor)
    processor.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    inputs = processor(images=PICTURES[:1], expressions=[["a dog", "the man"]], return_tensors="pt")
    expected = model.segment(**inputs).scores[0].tolist()
    (tmp_path / "code.py").write_text(REMOTE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "code.py", "saved", "again"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**environment, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [float(score) for score in done.stdout.split()] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["sam2", "sam3_tracker"])
def test_images_of_other_mask_models(kind):
    processor = tiny.make_processor("llava", sam=kind)
    model = tiny.make_model("llava", processor, sam=kind)
    inputs = processor(images=PICTURES, expressions=EXPRESSIONS, return_tensors="pt")
    side = processor.mask_input_size
    assert inputs["sam_pixel_values"].shape == (2, 3, side, side)
    assert inputs["reshaped_input_sizes"].tolist() == [[side, side]] * 2
    results = processor.post_process_segmentation(model.segment(**inputs, threshold=-1e9), inputs)
    assert [of_image[0]["mask"].shape for of_image in results] == [(40, 60), (70, 33)]


def sam_config():
    return AutoConfig.for_model(**{"model_type": "sam", **tiny.bases.mask_config("sam")})


def test_processors_that_are_refused():
    base = tiny.base_processor("llava")
    with pytest.raises(
        ValueError, match="PreTrainedTokenizerFast prepares no images|TokenizersBackend prepares no images"
    ):
        GsvaProcessor.from_base(base.tokenizer, sam_config())
    base.image_token = None
    with pytest.raises(ValueError, match="LlavaProcessor has no image token"):
        GsvaProcessor.from_base(base, sam_config())
    base = tiny.base_processor("paligemma")
    with pytest.raises(ValueError, match="PaliGemmaProcessor has no chat template.*BARE_TEMPLATE"):
        GsvaProcessor.from_base(base, sam_config())
    assert GsvaProcessor.from_base(base, sam_config(), chat_template=BARE_TEMPLATE).chat_template == BARE_TEMPLATE


@pytest.mark.parametrize(
    ("name", "needed", "extra"),
    [("Qwen3VLProcessor", "torchvision", "torchvision"), ("LlavaOnevisionProcessor", "torchvision", "torchvision"),
     ("InternVLProcessor", "torchvision", "torchvision"), ("Lfm2VlProcessor", "torchvision", "torchvision"),
     ("SmolVLMProcessor", "torchvision", "smolvlm"), ("SmolVLMProcessor", "num2words", "smolvlm")],
)  # fmt: skip
def test_what_a_processor_needs_is_named(name, needed, extra, monkeypatch):
    processor_class, other = getattr(transformers, name), transformers.LlavaNextProcessor  # imported before the patch
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda module, *rest: None if module == needed else find("os") if module in ("torchvision", "num2words") else find(module, *rest),
    )  # fmt: skip
    with pytest.raises(ImportError, match=rf"{name} needs {needed}, which is not installed: .*\[{extra}\]"):
        check_extras(processor_class)
    check_extras(other)


def test_a_bases_directory(tmp_path):
    """The base's processor is loaded from its directory; one that needs torchvision says so before anything else."""
    base = tiny.base_processor("gemma3")
    base.save_pretrained(tmp_path / "gemma3")
    tiny.bases.base_config("gemma3").save_pretrained(tmp_path / "gemma3")
    assert type(load_base_processor(tmp_path / "gemma3")).__name__ == "Gemma3Processor"
    AutoConfig.for_model("llama").save_pretrained(tmp_path / "llama")
    base.tokenizer.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="holds a model of type 'llama', which has no processor of images and text"):
        load_base_processor(tmp_path / "llama")
    if not tiny.HAS_TORCHVISION:
        tiny.bases.base_config("qwen3_vl").save_pretrained(tmp_path / "qwen3_vl")
        with pytest.raises(ImportError, match=r"Qwen3VLProcessor needs torchvision.*\[torchvision\]"):
            load_base_processor(tmp_path / "qwen3_vl")


def test_a_prefix_model_shares_no_prefix():
    processor = tiny.make_processor("paligemma")
    model = tiny.make_model("paligemma", processor)
    inputs = processor(images=PICTURES[:1], expressions=[["a dog"]], return_tensors="pt")
    images = model.language.encode(inputs)
    start = inputs["input_ids"].shape[1]
    batch = AnsweredBatch(inputs["input_ids"], inputs["attention_mask"], start, inputs["image_index"], images)
    with pytest.raises(ValueError, match="Prompts of paligemma cannot share the run of their beginning"):
        PrefixCache(model.language, batch)
