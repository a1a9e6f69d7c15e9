"""Chat: content that templates refuse, batches, prefilled answers, the stock pipeline, streamed text with masks."""

import gc
import io
import threading

import numpy as np
import pytest
import torch
from jinja2.exceptions import TemplateError
from paths import BASE
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

import data_scripts
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor
from modeling_gsva.processing_gsva import CHAT_TEMPLATES


def user(text, *images):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
    }


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def tokenized(processor, messages, **options):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt", **options}
    return processor.apply_chat_template(messages, **options)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_what_the_assistant_says_is_masked_as_it_is_trained(make_processor, make_picture, template, system):
    processor, picture = make_processor(template), make_picture()
    messages = [user("What is [it]?", picture), assistant("A [SEG]."), user("Ünsure?"), assistant("Nö, [REJ].")]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    inputs = tokenized(processor, messages, add_generation_prompt=False, return_assistant_tokens_mask=True)
    ((ids, labels),) = processor.encode_conversations([messages])
    assert inputs["input_ids"].tolist() == [ids] and (system is None) == (
        system not in processor.tokenizer.decode(ids) if system else True
    )
    assert (inputs["assistant_masks"][0] == 1).tolist() == [label != -100 for label in labels]
    assert inputs["sam_pixel_values"].shape == (1, 3, 64, 64) and inputs["original_sizes"].tolist() == [[30, 40]]


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "empty"),
        ([assistant("Hi")], "Message 1 is by assistant"),
        ([user("a"), user("b")], "Message 2 is by user"),
        ([user("a"), assistant("b"), {"role": "system", "content": "c"}], "Message 3 is by system"),
        ([{"role": "tool", "content": "a"}], "Message 1 is by tool"),
        (
            [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}],
            "part of type 'video'|part of type video",
        ),
        ([{"role": "user", "content": None}], "instead of text"),
        ([{"role": "user"}], "instead of text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "instead of text"),
    ],
)
def test_templates_refuse_what_they_cannot_place(make_processor, template, messages, complaint):
    processor = make_processor(template)
    with pytest.raises((TemplateError, ValueError), match=complaint):
        processor.apply_chat_template(messages, tokenize=False)
    with pytest.raises(TemplateError, match=complaint):
        processor.encode_conversations([messages])


def test_images_are_never_lost_nor_guessed(processor, model, make_picture):
    one, two = make_picture(0), make_picture(1)
    written = [{"role": "user", "content": "<image>\nHi?"}]
    for messages in (written, [user("<image> Hi?")], [{"role": "user", "content": [{"type": "image"}]}]):
        with pytest.raises(ValueError, match="no images were passed"):
            tokenized(processor, messages)
    with pytest.raises(ValueError, match="2 <image> tokens and 1 images"):
        tokenized(processor, [user("<image> Hi?", one)])
    given = tokenized(processor, written, processor_kwargs={"images": [one]})
    both = tokenized(processor, [user("Which?", one, two)])
    assert (both["input_ids"] == processor.image_token_id).sum() == 2 * processor.image_seq_length
    later = tokenized(processor, [user("First?", one), assistant("Yes."), user("And this?", two)])
    none = tokenized(processor, [[user("Which?", one, two)], [user("Hi?")]], processor_kwargs={"padding": True})
    for inputs in (both, later, none):
        with pytest.raises(ValueError, match="image"):
            model.segment(**inputs, method="generate", max_new_tokens=2)
    assert len(model.segment(**given, method="generate", max_new_tokens=2).sequences) == 1


def test_a_batch_answers_as_each_conversation_alone(processor, model, make_picture):
    chats = [[user("Hi?")], [user("What is the longest word?", make_picture(0))], [user("Red?", make_picture(1))]]
    batch = tokenized(processor, chats, processor_kwargs={"padding": True})
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    segmented = model.segment(**batch, method="generate", **options)
    assert segmented.image_index.tolist() == [-1, 0, 1]
    for n, chat in enumerate(chats):
        alone = tokenized(processor, chat)
        said = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert together[n, : len(said)].tolist() == said.tolist()
        assert segmented.sequences[n, batch["input_ids"].shape[1] :][: len(said)].tolist() == said.tolist()


def test_prompts_padded_on_the_wrong_side_are_refused(processor, model):
    padding = {"padding": True, "padding_side": "right"}
    inputs = tokenized(processor, [[user("Hi?")], [user("Longer?")]], processor_kwargs=padding)
    for run in (model.generate, model.segment):
        with pytest.raises(ValueError, match="padded on the right"):
            run(**inputs, **({"method": "generate"} if run == model.segment else {}), max_new_tokens=2)


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_a_begun_answer_is_continued(make_processor, template):
    processor = make_processor(template)
    text = processor.apply_chat_template([user("Hi?"), assistant("It is the")], continue_final_message=True)
    assert text.endswith(("ASSISTANT: It is the", "[/INST] It is the"))


# --- the stock pipeline -----------------------------------------------------------------------------------------------


def test_stock_pipeline_for_chat(model_dir, processor, model, make_picture):
    pipe = pipeline("image-text-to-text", model=str(model_dir), trust_remote_code=True, device="cpu")
    chats = [[user(text, make_picture(n))] for n, text in enumerate(["Hi?", "What?"])]
    expected = []
    for chat in chats:
        inputs = tokenized(processor, chat)
        new = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(new, skip_special_tokens=True))
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 5, "do_sample": False}}
    assert [pipe(text=chat, **options)[0]["generated_text"] for chat in chats] == expected
    full = pipe(text=chats[0], max_new_tokens=5)[0]["generated_text"]
    assert [message["role"] for message in full] == ["user", "assistant"] and full[-1]["content"] == expected[0]
    prompt = processor.apply_chat_template(chats[1])
    assert pipe(images=make_picture(1), text=prompt, **options)[0]["generated_text"] == expected[1]
    with pytest.raises(ValueError, match="padded on the right"):
        pipe(text=chats, batch_size=2, **options)
    pipe.tokenizer.padding_side = "left"
    assert [results[0]["generated_text"] for results in pipe(text=chats, batch_size=2, **options)] == expected


# --- streaming --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    """The embedded base, which does answer with [SEG]; and a question about a picture."""
    processor = GsvaProcessor.from_pretrained(BASE)
    model = GsvaForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    (row,) = data_scripts.load("shapes", split="train", size=1)
    inputs = tokenized(processor, [user(f"segment {row['expressions'][0]['text']}.", row["image"])])
    return processor, model, inputs


def test_text_streams_and_masks_follow(base):
    processor, model, inputs = base
    outputs = model.segment(**inputs, method="generate", max_new_tokens=32)
    (expected,) = processor.post_process_segmentation(outputs, inputs)
    said = processor.tokenizer.decode(outputs.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "[SEG]" in said and expected[0]["mask"].any()
    answer = processor.stream(model, inputs, max_new_tokens=32)
    pieces = list(answer)
    assert len([piece for piece in pieces if piece]) > 1 and "".join(pieces) == said
    for one, other in zip(answer.results[0], expected, strict=True):
        assert one["text"] == other["text"] and np.array_equal(one["mask"], other["mask"])
    (only,) = processor.stream(model, inputs, max_new_tokens=32).results  # without reading the text
    assert np.array_equal(only[0]["mask"], expected[0]["mask"])


def test_streamers_of_transformers(base):
    processor, model, inputs = base
    streamer, found = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True), []

    def write():
        found.append(model.segment(**inputs, method="generate", max_new_tokens=32, streamer=streamer))

    thread = threading.Thread(target=write)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.count("[SEG]") == len(found[0].mask_logits[0]) > 0


def test_a_failing_stream_ends_with_its_error(base):
    processor, model, inputs = base
    answer = processor.stream(model, {**inputs, "attention_mask": inputs["attention_mask"] * 0}, max_new_tokens=4)
    with pytest.raises(ValueError, match="padded on the right"):
        for _ in answer:
            pass
        _ = answer.results
    with pytest.raises(ValueError, match="2 conversations cannot be streamed"):
        processor.stream(model, {**inputs, "input_ids": inputs["input_ids"].repeat(2, 1)})


def answer_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("answer")]


@pytest.fixture
def endless(base):
    """The embedded base, which never ends its answer by itself; and how often it was called."""
    processor, model, inputs = base
    calls = []
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    yield processor, model, inputs, {"max_new_tokens": 400, "eos_token_id": -1}, calls
    hook.remove()


def test_a_closed_answer_ends_with_its_thread(endless):
    processor, model, inputs, options, calls = endless
    answer = processor.stream(model, inputs, **options)
    next(iter(answer))
    answer.close()
    assert answer_threads() == [] and 0 < len(calls) < 400
    made = len(calls)
    list(answer)  # neither waits nor fails
    with pytest.raises(ValueError, match="closed before it was finished"):
        _ = answer.results
    answer.close()  # again
    assert len(calls) == made


def test_leaving_a_with_ends_the_writing(endless):
    processor, model, inputs, options, calls = endless
    with pytest.raises(KeyboardInterrupt), processor.stream(model, inputs, **options) as answer:
        for _ in answer:
            raise KeyboardInterrupt
    assert answer_threads() == [] and len(calls) < 400


def test_an_answer_that_nobody_holds_is_not_written_on(endless):
    processor, model, inputs, options, calls = endless
    for _ in processor.stream(model, inputs, **options):
        break
    gc.collect()
    for thread in answer_threads():
        thread.join(timeout=60)
    assert answer_threads() == [] and len(calls) < 400


def test_a_finished_answer_keeps_its_results_when_closed(base):
    processor, model, inputs = base
    with processor.stream(model, inputs, max_new_tokens=32) as answer:
        list(answer)
        results = answer.results
    assert answer.results is results and results[0][0]["mask"].any()


def test_own_stopping_criteria_count_as_well(base):
    processor, model, inputs = base
    stop = StoppingCriteriaList([MaxLengthCriteria(inputs["input_ids"].shape[1] + 3)])
    with processor.stream(model, inputs, max_new_tokens=32, stopping_criteria=stop) as answer:
        assert len(processor.tokenizer("".join(answer), add_special_tokens=False)["input_ids"]) <= 3


# --- what messages may hold -------------------------------------------------------------------------------------------

WRONG_MESSAGES = [
    (None, "conversation is None"),
    (5, "conversation is 5"),
    ("Hi?", "conversation is 'Hi\\?'"),
    ([None], "Message 1 is None"),
    ([5], "Message 1 is 5"),
    (["Hi?"], "Message 1 is 'Hi\\?'"),
    ([{"role": "user", "content": None}], "Message 1 holds None instead of text"),
    ([{"role": "user", "content": 5}], "Message 1 holds 5 instead of text"),
    ([{"role": "user", "content": {"type": "text"}}], "Message 1 holds .* instead of text"),
    ([{"role": "user"}], "Message 1 holds None instead of text"),
    ([{"role": "user", "content": [None]}], "Message 1 has the part None"),
    ([{"role": "user", "content": [5]}], "Message 1 has the part 5"),
    ([{"role": "user", "content": ["Hi?"]}], "Message 1 has the part 'Hi\\?'"),
    ([{"role": "user", "content": [{"text": "Hi?"}]}], "part of type None"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "holds 5 instead of text"),
    ([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], "instead of text"),
    ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], "part of type 'audio'"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}], "part of type 'image_url'"),
    ([{"role": "user", "content": [{"type": "image", "image": None}]}], "an image that is None"),
    ([user("Hi?"), {"role": "assistant", "content": None}], "Message 2 holds None"),
    ([[user("Hi?")], [{"role": "user", "content": None}]], "Message 1 holds None"),
    ([[user("Hi?")], None], "conversation is None"),
]


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(("messages", "complaint"), WRONG_MESSAGES, ids=lambda value: str(value)[:40])
def test_messages_that_are_none_are_refused_in_words(processor, messages, complaint, tokenize):
    with pytest.raises(ValueError, match=complaint):
        processor.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize)


@pytest.mark.parametrize("image", [5, 0.5, {"a": 1}, object()])
def test_images_of_messages_that_are_none_are_refused_in_words(processor, image):
    with pytest.raises(ValueError, match="not supported"):
        tokenized(processor, [user("Hi?", image)])


def test_bytes_of_a_picture_do_as_an_image(processor, make_picture):
    file = io.BytesIO()
    make_picture().save(file, "png")
    expected = tokenized(processor, [user("Hi?", make_picture())])
    made = tokenized(processor, [user("Hi?", file.getvalue())])
    assert torch.equal(made["pixel_values"], expected["pixel_values"])


# --- whose template ---------------------------------------------------------------------------------------------------


def test_a_directory_without_its_template_does_not_take_anothers(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert GsvaProcessor.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATES["plain"]
    (tmp_path / "chat_template.jinja").unlink()
    for load in (GsvaProcessor, AutoProcessor):
        with pytest.raises(ValueError, match="holds no chat template .chat_template.jinja"):
            load.from_pretrained(tmp_path)
    chosen = GsvaProcessor.from_pretrained(tmp_path, chat_template=CHAT_TEMPLATES["llava_llama_2"])
    assert chosen.chat_template == CHAT_TEMPLATES["llava_llama_2"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHAT_TEMPLATES["plain"]
    tokenizer.save_pretrained(tmp_path)
    assert GsvaProcessor.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATES["plain"]
    made = GsvaProcessor(processor.image_processor, processor.tokenizer)  # by hand: the original's
    assert made.chat_template == CHAT_TEMPLATES["llava_v1"]
