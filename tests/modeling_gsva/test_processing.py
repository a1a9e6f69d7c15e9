"""GsvaProcessor: exact strings, tokens and labels, results from answers, and the message for every bad input."""

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_gsva import GsvaProcessor
from modeling_gsva.image_processing_gsva import upscale_mask_logits

LLAVA_V1 = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the human's questions. "
)
LLAMA_2 = (
    "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
)
IMAGE = "<im_start><image><im_end>"
TWO_ROUNDS = [
    {"role": "user", "content": "<image>\nWhat is this?"},
    {"role": "assistant", "content": "[SEG] is a dog."},
    {"role": "user", "content": "And a cat?"},
    {"role": "assistant", "content": "[REJ]"},
]
RENDERED = {
    "llava_v1": LLAVA_V1
    + f"USER: {IMAGE}\nWhat is this? ASSISTANT: [SEG] is a dog.</s>USER: And a cat? ASSISTANT: [REJ]</s>",
    "llava_llama_2": LLAMA_2
    + f"{IMAGE}\nWhat is this? [/INST] [SEG] is a dog. </s><s>[INST] And a cat? [/INST] [REJ] </s>",
    "plain": f"USER: {IMAGE}\nWhat is this? ASSISTANT: [SEG] is a dog.</s>USER: And a cat? ASSISTANT: [REJ]</s>",
}
SUPERVISED = {
    "llava_v1": " [SEG] is a dog.</s> [REJ]</s>",
    "llava_llama_2": " [SEG] is a dog. </s> [REJ] </s>",
    "plain": " [SEG] is a dog.</s> [REJ]</s>",
}
TEMPLATES = list(RENDERED)


def text_of(processor, ids) -> str:
    """Ids back to text, letter by letter (the tokenizer is byte-level), padding left out."""
    ids = [int(n) for n in ids if n != processor.tokenizer.pad_token_id]
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_refer_prompt_to_the_letter(processor):
    messages = processor.build_conversation([" The Man in RED. ", "a unicorn", "...dogs ."], [False, True, False])
    assert messages == [
        {
            "role": "user",
            "content": "<image>\n What are the man in red, a unicorn, dogs in this image? Please output segmentation masks.",
        },
        {"role": "assistant", "content": "Sure,the man in red:[SEG], a unicorn:[REJ], dogs :[SEG]."},
    ]


def test_reason_prompts_to_the_letter(processor):
    phrase = processor.build_conversation([" The thing to Drink from. "], prompt="reason_phrase")
    assert phrase == [
        {
            "role": "user",
            "content": "<image>\n What is The thing to Drink from. in this image? Please output segmentation mask.",
        },
        {"role": "assistant", "content": "[SEG]"},
    ]
    sentence = processor.build_conversation(["Where would He sit?"], [True], prompt="reason_sentence")
    assert sentence == [
        {"role": "user", "content": "<image>\n Where would He sit? Please output segmentation mask."},
        {"role": "assistant", "content": "[REJ]"},
    ]


def test_braces_percent_signs_and_jinja_are_only_text(processor, make_picture):
    odd = "a {mask} of {{ x }} {% if %} 100%s"
    inputs = processor(make_picture(), expressions=[odd], return_tensors="pt")
    assert f"What are {odd}in this image?" in text_of(processor, inputs["input_ids"][0])
    assert text_of(processor, inputs["answer_ids"][0]) == f" Sure,{odd}:[SEG].</s>"


def test_own_wording_is_merged_over_the_originals(make_processor, tmp_path):
    wording = {
        "question": "<image>Q {expressions}",
        "answer": "A {slots}",
        "slot": "{token}",
        "separator": "",
        "lower": True,
    }
    processor = make_processor(prompts={"short": wording})
    assert processor.build_conversation(["X", "Y"], prompt="short")[1]["content"] == "A [SEG][SEG]"
    assert processor.build_conversation(["x"])[1]["content"] == "Sure,x:[SEG]."
    processor.save_pretrained(tmp_path)
    again = GsvaProcessor.from_pretrained(tmp_path)
    assert again.prompts == processor.prompts and again.patch_size == processor.patch_size == 8
    assert again.chat_template == processor.chat_template and again.image_seq_length == 16


# --- chat templates, ids and labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_template_to_the_letter(make_processor, template):
    assert make_processor(template).apply_chat_template(TWO_ROUNDS, tokenize=False) == RENDERED[template]


@pytest.mark.parametrize("template", TEMPLATES)
def test_parts_system_and_generation_prompt(make_processor, template):
    processor = make_processor(template)
    parts = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]},
    ]
    head = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n" if template == "llava_llama_2" else "Be brief. USER: "
    tail = " [/INST]" if template == "llava_llama_2" else " ASSISTANT:"
    assert processor.apply_chat_template(parts, tokenize=False) == head + IMAGE + "\nHi?" + tail


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_exactly_the_answers_with_their_end(make_processor, make_picture, template):
    processor = make_processor(template)
    inputs = processor([make_picture()], conversations=[TWO_ROUNDS], return_tensors="pt")
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    kept = labels != -100
    assert text_of(processor, labels[kept]) == SUPERVISED[template]
    assert torch.equal(ids[kept], labels[kept])
    # one run of labels per round, each ending with </s>
    runs = (kept[1:] & ~kept[:-1]).sum()
    assert runs == 2 and (labels == processor.tokenizer.eos_token_id).sum() == 2
    text = "<s>" + RENDERED[template].replace("<image>", "<image>" * 16)
    assert text_of(processor, ids) == text


@pytest.mark.parametrize("answer", ["[SEG]", "[SEG], [SEG].", "Ünïcödé ✓ [SEG]", "It is [REJ]"])
def test_labels_of_odd_answers(processor, make_picture, answer):
    messages = [{"role": "user", "content": "<image>\n?"}, {"role": "assistant", "content": answer}]
    inputs = processor([make_picture()], conversations=[messages], return_tensors="pt")
    labels = inputs["labels"][0]
    assert text_of(processor, labels[labels != -100]) == f" {answer}</s>"


def test_image_expands_to_one_placeholder_per_patch(processor, make_picture):
    none = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    inputs = processor([make_picture()], conversations=[TWO_ROUNDS, none], image_index=[0, -1], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 0]
    assert processor.image_seq_length == (32 // 8) ** 2
    assert inputs["image_index"].tolist() == [0, -1]
    text = processor(images=[make_picture()], text=f"{IMAGE} Hi", return_tensors="pt")
    assert (text["input_ids"] == processor.image_token_id).sum() == 16


@pytest.mark.parametrize("kind, array", [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_texts_tell_their_images(processor, make_picture, kind, array):
    texts = ["Hi", f"{IMAGE} Hi", "Hello", f"A {IMAGE}"]
    inputs = processor(images=[make_picture(0), make_picture(1)], text=texts, padding=True, return_tensors=kind)
    assert isinstance(inputs["image_index"], array) and list(inputs["image_index"]) == [-1, 0, -1, 1]
    assert "image_index" not in processor(text=texts[:1]) and "image_index" not in processor(images=[make_picture()])
    several = processor(images=[make_picture(0), make_picture(1)], text=f"{IMAGE} and {IMAGE}", return_tensors=kind)
    assert "image_index" not in several


def test_apply_chat_template_gives_model_inputs(processor, make_picture):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": make_picture()}, {"type": "text", "text": "Hi?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 3, 32, 32) and inputs["sam_pixel_values"].shape == (1, 3, 64, 64)
    expected = f"<s>USER: <im_start>{'<image>' * 16}<im_end>\nHi? ASSISTANT:"
    assert text_of(processor, inputs["input_ids"][0]) == expected


def test_prompts_are_padded_left_and_answers_right(processor, make_picture):
    images = [make_picture(0), make_picture(1)]
    inputs = processor(images, expressions=[["a", "much longer expression"], ["b"]], return_tensors="pt")
    prompts, answers = inputs["attention_mask"], inputs["answer_attention_mask"]
    assert prompts[0].all() and answers[0].all()
    short = int(prompts[1].sum())
    assert 0 < short < prompts.shape[1] and prompts[1, -short:].all() and not prompts[1, :-short].any()
    length = int(answers[1].sum())
    assert 0 < length < answers.shape[1] and answers[1, :length].all() and not answers[1, length:].any()
    assert (inputs["input_ids"][prompts == 0] == processor.tokenizer.pad_token_id).all()
    assert text_of(processor, inputs["input_ids"][1]).endswith(
        "What are bin this image? Please output segmentation masks. ASSISTANT:"
    )
    assert text_of(processor, inputs["answer_ids"][1]) == " Sure,b:[SEG].</s>"
    assert inputs["expressions"] == [["a", "much longer expression"], ["b"]]


def test_conversations_are_padded_right(processor, make_picture):
    short = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    inputs = processor([make_picture()], conversations=[TWO_ROUNDS, short], image_index=[0, -1], return_tensors="pt")
    length = int(inputs["attention_mask"][1].sum())
    assert inputs["attention_mask"][1, :length].all() and not inputs["attention_mask"][1, length:].any()
    assert (inputs["labels"][1, length:] == -100).all()


def test_one_prompt_per_expression(processor, make_picture):
    images = [make_picture(0), make_picture(1)]
    asked = [["a", "b"], ["c"]]
    inputs = processor(images, expressions=asked, no_targets=[[False, True], [True]], one_prompt_per_expression=True,
                       return_tensors="pt")  # fmt: skip
    assert inputs["image_index"].tolist() == [0, 0, 1] and inputs["expressions"] == [["a"], ["b"], ["c"]]
    assert len(inputs["pixel_values"]) == len(inputs["sam_pixel_values"]) == 2
    answers = [text_of(processor, row) for row in inputs["answer_ids"]]
    assert answers == [" Sure,a:[SEG].</s>", " Sure,b:[REJ].</s>", " Sure,c:[REJ].</s>"]


def test_one_picture_with_a_plain_list_of_expressions(processor, make_picture):
    once = processor(make_picture(), expressions=["a", "b"], return_tensors="pt")
    listed = processor([make_picture()], expressions=[["a", "b"]], return_tensors="pt")
    assert torch.equal(once["input_ids"], listed["input_ids"]) and once["expressions"] == [["a", "b"]]


def test_no_targets_change_the_answer_and_not_the_question(processor, make_picture):
    plain = processor(make_picture(), expressions=["a", "b"], return_tensors="pt")
    gold = processor(make_picture(), expressions=["a", "b"], no_targets=[[True, False]], return_tensors="pt")
    assert torch.equal(plain["input_ids"], gold["input_ids"])
    assert text_of(processor, gold["answer_ids"][0]) == " Sure,a:[REJ], b:[SEG].</s>"


def test_masks_become_labels_and_move_with_the_batch(processor, make_picture):
    rng = np.random.default_rng(0)
    masks = [rng.random((2, 30, 40)) > 0.5, []]
    none = [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "Hello"}]
    inputs = processor(
        [make_picture()], conversations=[TWO_ROUNDS, none], image_index=[0, 0], masks=masks, return_tensors="pt"
    )
    assert [tuple(mask.shape) for mask in inputs["mask_labels"]] == [(2, 30, 40), (0, 30, 40)]
    assert torch.equal(inputs["mask_labels"][0].bool(), torch.from_numpy(masks[0]))
    assert inputs.to("cpu")["mask_labels"][0].shape == (2, 30, 40)
    text_only = processor(
        conversations=[[{"role": "user", "content": "Hi"}, none[1]]], masks=[[]], return_tensors="pt"
    )
    assert len(text_only["mask_labels"][0]) == 0 and "pixel_values" not in text_only


def test_max_length_cuts_text_and_labels_alike(processor, make_picture):
    whole = processor([make_picture()], conversations=[TWO_ROUNDS], return_tensors="pt")
    length = whole["input_ids"].shape[1] - 10
    cut = processor([make_picture()], conversations=[TWO_ROUNDS], max_length=length, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(cut[name], whole[name][:, :length]), name


# --- answers back to results -----------------------------------------------------------------------------------------


def ids_of(processor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


# The original's evaluation answer, its five training answers, its reasoning answers (model/llava/constants.py), in order.
ANSWERS = [
    ("Sure,{a}:{x}, {b}:{y}.", True),
    ("The segmentation results are {a} {x}, {b} {y}.", True),
    ("Sure, they are {a}:{x}, {b}:{y}.", True),
    ("Sure, the mask of {a} is {x}, the mask of {b} is {y}.", True),
    ("Sure, the segmentation of {a} is {x}, the segmentation of {b} is {y}.", True),
    ("Sure, the referred {a} is {x}, the referred {b} is {y}.", True),
    ("Sure, they are {a}:{x},{b}:{y}.", True),  # the semantic sets' joint without a blank
    ("Sure, {a}:{x} and {b}:{y}.", True),
    ("It is {x}. It is {y}.", False),
    ("Sure, {x}. Sure, {y}.", False),
    ("Sure, it is {x}. Sure, it is {y}.", False),
    ("Sure, the segmentation result is {x}. Sure, the segmentation result is {y}.", False),
    ("{x}.{y}.", False),
]


@pytest.mark.parametrize("answer, names", ANSWERS)
def test_read_answer(processor, answer, names):
    text = " " + answer.format(a="the man, left", b="a Dog", x="[SEG]", y="[REJ]") + "</s>"
    phrases = ["the man, left", "a Dog"] if names else ["", ""]
    assert processor.read_answer(ids_of(processor, text)) == [(phrases[0], False), (phrases[1], True)]


def test_read_answer_without_slots(processor):
    assert processor.read_answer(ids_of(processor, " I cannot see one.</s>")) == []
    assert processor.read_answer([]) == []


@pytest.mark.parametrize(
    "asked, answer, matched, malformed",
    [
        (["a", "b"], "Sure,a:[SEG], b:[REJ].", [0, 1], False),
        (["A.", " b "], "Sure,a:[SEG], b:[REJ].", [0, 1], False),
        (["it is red", "they are two"], "Sure,it is red:[SEG], they are two:[SEG].", [0, 1], False),
        (
            ["the mask of zorro is black", "and you"],
            "Sure,the mask of zorro is black:[SEG], and you:[SEG].",
            [0, 1],
            False,
        ),
        (["a, b", "c"], "Sure,a, b:[SEG], c:[SEG].", [0, 1], False),
        (["a", "b"], "[SEG], [SEG].", [0, 1], False),  # no phrases: by order
        (["a", "b"], "Sure,b:[SEG], a:[REJ].", [1, 0], True),
        (["a", "b"], "Sure,b:[SEG].", [None, 0], True),
        (["a", "b"], "No.", [None, None], True),
        (["a"], "Sure,a:[SEG], b:[SEG].", [0], True),
        (["a", "a"], "Sure,a:[SEG], c:[SEG], a:[REJ].", [0, 2], True),  # asked twice: each slot answers once
        (["a", "b"], "Sure,c:[SEG], b:[SEG].", [None, 1], True),
    ],
)
def test_match_slots(processor, asked, answer, matched, malformed):
    slots = processor.read_answer(ids_of(processor, f" {answer}</s>"))
    assert processor._match_slots(asked, slots) == (matched, malformed)


def outputs_of(processor, answers, scores, method="slots", threshold=0.0, image_index=None, seed=0):
    """What `segment` gives, by hand: random masks, zero logits where a slot is rejected."""
    rows = [ids_of(processor, answer) for answer in answers]
    width = max(map(len, rows))
    sequences = torch.tensor([[1, *row, *[0] * (width - len(row))] for row in rows])
    scores = tuple(torch.tensor(row) for row in scores)
    rejected = tuple(row < threshold for row in scores)
    generator = torch.Generator().manual_seed(seed)
    logits = tuple(torch.randn(len(row), 32, 32, generator=generator) for row in scores)
    if method != "teacher_forced":
        logits = tuple(row * ~drop[:, None, None] for row, drop in zip(logits, rejected))
    return SimpleNamespace(
        method=method,
        sequences=sequences,
        answer_starts=torch.ones(len(rows), dtype=torch.long),
        mask_logits=logits,
        scores=scores,
        probabilities=tuple(torch.sigmoid(row) for row in scores),
        iou_scores=tuple(torch.full_like(row, 0.75) for row in scores),
        object_scores=None,
        is_rejected=rejected,
        num_candidates=1,
        image_index=torch.arange(len(rows)) if image_index is None else torch.tensor(image_index),
    )


def test_post_process_gives_masks_in_the_pictures_own_size(processor, make_picture):
    inputs = processor(
        [make_picture(0, 40, 30), make_picture(1, 20, 50)], expressions=[["a", "b"], ["c"]], return_tensors="pt"
    )
    outputs = outputs_of(processor, [" Sure,a:[SEG], b:[REJ].", " Sure,c:[SEG]."], [[2.0, -1.0], [0.5]])
    results = processor.post_process_segmentation(outputs, inputs)
    assert [[entry["text"] for entry in image] for image in results] == [["a", "b"], ["c"]]
    assert [entry["mask"].shape for image in results for entry in image] == [(30, 40), (30, 40), (50, 20)]
    assert [entry["is_rejected"] for image in results for entry in image] == [False, True, False]
    assert [str(entry["iou_score"]) for image in results for entry in image] == ["0.75", "nan", "0.75"]
    assert [entry["score"] for image in results for entry in image] == [2.0, -1.0, 0.5]
    assert not any(entry["is_malformed"] for image in results for entry in image)
    assert all(entry["mask"].dtype == bool for image in results for entry in image)
    # (30, 40) fills (48, 64) of SAM's input
    expected = upscale_mask_logits(outputs.mask_logits[0][:1], (48, 64), (30, 40), 64)[0] >= 0
    assert np.array_equal(results[0][0]["mask"], expected.numpy()) and 0 < expected.float().mean() < 1
    assert not results[0][1]["mask"].any()  # zero logits are no mask


def test_post_process_thresholds(processor, make_picture):
    inputs = processor(make_picture(), expressions=["a", "b", "c"], return_tensors="pt")
    answer = " Sure,a:[SEG], b:[SEG], c:[REJ]."
    outputs = outputs_of(processor, [answer], [[2.0, 1.0, -1.0]])
    (higher,) = processor.post_process_segmentation(outputs, inputs, threshold=1.5)
    assert [entry["is_rejected"] for entry in higher] == [False, True, True]
    assert higher[0]["mask"].any() and not higher[1]["mask"].any()
    (kept,) = processor.post_process_segmentation(outputs, inputs, threshold=1.5, keep_rejected_masks=True)
    assert [entry["is_rejected"] for entry in kept] == [False, True, True]
    assert kept[1]["mask"].any() and not kept[2]["mask"].any()  # the third was never made
    (lower,) = processor.post_process_segmentation(outputs, inputs, threshold=-2.0)
    assert [entry["is_rejected"] for entry in lower] == [False, False, False]
    assert not lower[2]["mask"].any()


def test_post_process_keeps_the_masks_teacher_forcing_makes(processor, make_picture):
    inputs = processor(make_picture(), expressions=["a", "b"], return_tensors="pt")
    outputs = outputs_of(processor, [" Sure,a:[SEG], b:[REJ]."], [[2.0, -1.0]], method="teacher_forced")
    (plain,) = processor.post_process_segmentation(outputs, inputs)
    (kept,) = processor.post_process_segmentation(outputs, inputs, keep_rejected_masks=True)
    assert not plain[1]["mask"].any() and kept[1]["mask"].any() and kept[1]["is_rejected"]
    assert np.array_equal(plain[0]["mask"], kept[0]["mask"])


def test_post_process_of_a_malformed_answer(processor, make_picture):
    inputs = processor(make_picture(), expressions=["a", "b"], return_tensors="pt")
    outputs = outputs_of(processor, [" Sure,b:[SEG]."], [[3.0]], method="generate")
    ((first, second),) = processor.post_process_segmentation(outputs, inputs)
    assert first["text"] == "a" and first["is_rejected"] and math.isnan(first["score"]) and not first["mask"].any()
    assert second["text"] == "b" and not second["is_rejected"] and second["score"] == 3.0 and second["mask"].any()
    assert first["is_malformed"] and second["is_malformed"]
    # also under a threshold: what has no slot is rejected whatever the threshold
    ((first, _),) = processor.post_process_segmentation(outputs, inputs, threshold=-1e9)
    assert first["is_rejected"]


def test_post_process_of_several_prompts_and_free_chat(processor, make_picture):
    inputs = processor([make_picture(0), make_picture(1)], expressions=[["a", "b"], ["c"]], one_prompt_per_expression=True,
                       return_tensors="pt")  # fmt: skip
    outputs = outputs_of(processor, [" Sure,a:[SEG].", " Sure,b:[SEG].", " Sure,c:[SEG]."], [[1.0], [2.0], [3.0]],
                         image_index=[0, 0, 1])  # fmt: skip
    results = processor.post_process_segmentation(outputs, inputs)
    assert [[(entry["text"], entry["score"]) for entry in image] for image in results] == [
        [("a", 1.0), ("b", 2.0)],
        [("c", 3.0)],
    ]
    chat = {name: inputs[name] for name in inputs if name != "expressions"}
    outputs = outputs_of(processor, [" A dog [SEG] and a cat:[REJ].", " None.", " [SEG]"], [[1.0, -1.0], [], [0.5]],
                         method="generate", image_index=[1, 0, -1])  # fmt: skip
    results = processor.post_process_segmentation(outputs, chat)
    assert results[0] == [] and [entry["text"] for entry in results[1]] == ["A dog", "a cat"]
    assert [entry["is_rejected"] for entry in results[1]] == [False, True] and results[1][0]["mask"].any()


def test_post_process_of_a_chat_without_pictures_is_empty(processor):
    outputs = outputs_of(processor, [" Hello.</s>"], [[]], method="generate", image_index=[-1])
    outputs.mask_logits = None
    assert processor.post_process_segmentation(outputs, {"input_ids": torch.ones(1, 3)}) == []


# --- bad input -------------------------------------------------------------------------------------------------------

NO_IMAGE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TWO_IMAGES = [{"role": "user", "content": "<image>\n<image>\nHi"}, {"role": "assistant", "content": "Hello"}]
PICTURE = np.zeros((30, 40, 3), np.uint8)
BAD_EXPRESSIONS = {
    "no image": ({"expressions": [["a"]]}, "No image was given for 1 list.*pass images="),
    "empty images": ({"images": [], "expressions": [["a"]]}, "No image was given.*pass images="),
    "image is None": ({"images": [None], "expressions": [["a"]]}, "An image is None: give a PIL image"),
    "missing path": (
        {"images": ["nowhere.jpg"], "expressions": [["a"]]},
        r"'nowhere\.jpg' cannot be read.*Give the path",
    ),
    "wrong type": ({"images": [3], "expressions": [["a"]]}, "An image of type int is not supported: give"),
    "empty expression": ({"images": [PICTURE], "expressions": [["a", " "]]}, "Expression ' ' is empty; leave it out"),
    "only dots": ({"images": [PICTURE], "expressions": [["..."]]}, r"Expression '\.\.\.' is empty; leave it out"),
    "no expressions": (
        {"images": [PICTURE], "expressions": [[]]},
        "A list of expressions is empty; give at least one",
    ),
    "holds [SEG]": (
        {"images": [PICTURE], "expressions": [["a [SEG] b"]]},
        r"'a \[SEG\] b' holds \[SEG\].*take it out",
    ),
    "holds [seg]": ({"images": [PICTURE], "expressions": [["a [seg] b"]]}, r"holds \[SEG\].*take it out"),
    "holds [REJ]": ({"images": [PICTURE], "expressions": [["[REJ]"]]}, r"holds \[REJ\].*take it out"),
    "holds <image>": ({"images": [PICTURE], "expressions": [["an <image>"]]}, "holds <image>.*take it out"),
    "holds </s>": ({"images": [PICTURE], "expressions": [["a</s>"]]}, "holds </s>.*take it out"),
    "not a string": ({"images": [PICTURE], "expressions": [[3]]}, "Expression 3 is a int; give a string"),
    "a string for a list": (
        {"images": [PICTURE] * 2, "expressions": ["a", ["b"]]},
        r"expressions\[0\] is the string 'a'; give a list",
    ),
    "more images": (
        {"images": [PICTURE] * 2, "expressions": [["a"]]},
        "2 images but 1 lists of expressions; give one list",
    ),
    "more lists": (
        {"images": [PICTURE], "expressions": [["a"], ["b"]]},
        "1 images but 2 lists of expressions; give one list",
    ),
    "no_targets lists": (
        {"images": [PICTURE], "expressions": [["a"]], "no_targets": []},
        "1 images but 0 lists of no_targets; give",
    ),
    "no_targets entries": (
        {"images": [PICTURE], "expressions": [["a"]], "no_targets": [[True, False]]},
        "1 expressions but 2 no_targets; give one for each",
    ),
    "no_targets entries, single prompts": (
        {
            "images": [PICTURE],
            "expressions": [["a"]],
            "no_targets": [[True, False]],
            "one_prompt_per_expression": True,
        },
        "1 expressions but 2 no_targets; give one for each",
    ),
    "unknown wording": (
        {"images": [PICTURE], "expressions": [["a"]], "prompt": "rhyme"},
        "prompt='rhyme' is not known; choose one of",
    ),
    "two roads": (
        {"images": [PICTURE], "expressions": [["a"]], "text": "b"},
        "Give only one of text, expressions and conversations",
    ),
}
BAD_CONVERSATIONS = {
    "two <image>": (
        {"images": [PICTURE], "conversations": [TWO_IMAGES]},
        "holds 2 <image> placeholders.*conversation of its own",
    ),
    "<image> without image": (
        {"conversations": [TWO_ROUNDS]},
        "Conversation 0 holds <image>, but its image_index is -1; write",
    ),
    "image without <image>": (
        {"images": [PICTURE], "conversations": [NO_IMAGE]},
        "Conversation 0 lacks <image>.*is 0; write",
    ),
    "image_index too large": (
        {"images": [PICTURE], "conversations": [TWO_ROUNDS], "image_index": [1]},
        "Conversation 0 points to image 1, but 1 images were given; use 0 to 0",
    ),
    "image_index too small": (
        {"images": [PICTURE], "conversations": [TWO_ROUNDS], "image_index": [-2]},
        "Conversation 0 points to image -2, but 1 images were given; use 0 to 0, or -1",
    ),
    "image_index too long": (
        {"images": [PICTURE], "conversations": [TWO_ROUNDS], "image_index": [0, 0]},
        "1 conversations but image_index has 2 entries; give one each",
    ),
    "mask of another size": (
        {"images": [PICTURE], "conversations": [TWO_ROUNDS], "masks": [np.zeros((2, 40, 30))]},
        r"masks\[0\] has shape \(2, 40, 30\), but its image is \(30, 40\) \(height, width\); give",
    ),
    "mask without slots": (
        {"images": [PICTURE], "conversations": [TWO_ROUNDS], "masks": [np.zeros((30, 40))]},
        r"masks\[0\] has shape \(30, 40\).*give \(slots, height, width\)",
    ),
    "masks for another number": (
        {"images": [PICTURE], "conversations": [TWO_ROUNDS], "masks": []},
        "1 conversations but 0 entries in masks; give one each",
    ),
    "masks without images": (
        {"conversations": [NO_IMAGE], "masks": [np.zeros((1, 3, 3))]},
        "Masks were given without images; pass images=",
    ),
    "masks where the conversation has no image": (
        {
            "images": [PICTURE],
            "conversations": [TWO_ROUNDS, NO_IMAGE],
            "image_index": [0, -1],
            "masks": [[], np.zeros((1, 30, 40))],
        },
        r"masks\[1\] has shape \(1, 30, 40\), but conversation 1 has no image; give an empty list",
    ),
    "cut inside the image": (
        {"images": [PICTURE], "conversations": [TWO_ROUNDS], "max_length": 15},
        "max_length=15 cuts the image of conversation 0, which alone takes 16 tokens; raise it",
    ),
    "cut before the image": (
        {"images": [PICTURE], "conversations": [TWO_ROUNDS], "max_length": 3},
        "max_length=3 cuts the image of conversation 0",
    ),
    "two roads": (
        {"conversations": [NO_IMAGE], "expressions": [["a"]]},
        "Give only one of text, expressions and conversations",
    ),
}


@pytest.mark.parametrize("name", BAD_EXPRESSIONS)
def test_bad_expressions_are_named(processor, name):
    arguments, message = BAD_EXPRESSIONS[name]
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


@pytest.mark.parametrize("name", BAD_CONVERSATIONS)
def test_bad_conversations_are_named(processor, name):
    arguments, message = BAD_CONVERSATIONS[name]
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_tokenizer_without_the_tokens_is_named(processor, make_tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer.__class__.from_str(
        '{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,"post_processor":null,"decoder":null,'
        '"truncation":null,"padding":null,"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}'))  # fmt: skip
    with pytest.raises(ValueError, match=r"The tokenizer lacks \['\[SEG\]', .*Add them with tokenizer.add_tokens"):
        GsvaProcessor(processor.image_processor, bare)


def test_threads_with_a_processor_each_get_what_one_thread_gets(make_processor, make_picture):
    texts = [[f"thing {n}"] * (n % 5 + 1) for n in range(60)]

    def ask(processor, asked):
        return processor(images=[make_picture(0, 8, 8)], expressions=[asked], return_tensors="pt")

    processors = [make_processor() for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda n: [ask(processors[n], asked) for asked in texts], range(6)))
    for n, asked in enumerate(texts):
        alone = ask(processors[0], asked)
        for of_thread in together:
            assert all((of_thread[n][name] == alone[name]).all() for name in ("input_ids", "answer_ids"))
