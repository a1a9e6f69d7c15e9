"""Slots in every kind of tokenizer, and answers found in every style of chat template, or refused by name."""

import pytest
import tiny_processors as tiny
from tiny_bases import mask_config
from tiny_tokenizers import CHAT, KINDS, make_tokenizer
from tokenizers import AddedToken
from transformers import AutoConfig

from modeling_gsva import GsvaProcessor
from modeling_gsva.conversations_gsva import ConversationFormat
from modeling_gsva.prompts_gsva import BARE_TEMPLATE, add_slot_tokens

BEFORE = ["a", ":", " ", ": ", ".", "\n", ">", "(", "é", "1", "]", "[SEG]", ", ", "▁"]
BEHIND = [",", ".", " b", "b", "\n", "[REJ]", "", ")"]
PARTS = (
    "{% macro body(message) %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endmacro %}"
)
MISTRAL = (
    PARTS + "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + body(message) + ' [/INST]' }}{% else %}{{ ' ' + body(message) | trim + eos_token }}{% endif %}"
    "{% endfor %}"
)
MARKED = (
    PARTS + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ body(message) }}{% endgeneration %}{% else %}"
    "{{ body(message) }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Phi's: behind the whole conversation, but not behind each turn, stands another token.
ENDED = tiny.chatml("<image>\n") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
STRINGS = (
    "{% for message in messages %}{{ message['role'] + '> ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant>' }}{% endif %}"
)
GEMMA = tiny.GEMMA.replace("<start_of_image>", "<image>")
STYLES = {
    "llava": (tiny.LLAVA, "</s>"), "chatml": (tiny.chatml("<image>"), "<|im_end|>"), "mistral": (MISTRAL, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"), "marked": (MARKED, "<|im_end|>"), "ended": (ENDED, "<|im_end|>"),
    "strings": (STRINGS, "</s>"), "bare": (BARE_TEMPLATE, "</s>"),
}  # fmt: skip
TALK = [
    {"role": "user", "content": "What are the dog, a cat in this image?"},
    {"role": "assistant", "content": "Sure,the dog:[SEG], a cat:[REJ]."},
    {"role": "user", "content": "Sure,the dog:[SEG], a cat:[REJ]."},
    {"role": "assistant", "content": "[SEG]"},
]
# As Qwen3's: an empty thinking block stands before the last answer alone.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_processor(kind: str, template: str) -> GsvaProcessor:
    base = tiny.base_processor("llava", make_tokenizer(kind))
    config = AutoConfig.for_model(**{"model_type": "sam", **mask_config("sam")})
    return GsvaProcessor.from_base(base, config, chat_template=template)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_is_one_token_behind_any_character(kind):
    tokenizer = make_tokenizer(kind)
    assert add_slot_tokens(tokenizer) == ["[SEG]", "[REJ]"]
    assert add_slot_tokens(tokenizer) == []
    seg = tokenizer.convert_tokens_to_ids("[SEG]")
    assert seg == len(tokenizer) - 2
    for before in BEFORE:
        for behind in BEHIND:
            text = f"the dog{before}[SEG]{behind}"
            assert tokenizer(text)["input_ids"].count(seg) == text.count("[SEG]"), text
    ids = tokenizer("it is [SEG].")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).count("[SEG]") == 1  # an answer shows its slots


def test_a_plain_string_would_be_missed_in_old_sentencepiece():
    """Why the tokens are added as they are."""
    tokenizer = make_tokenizer("sentencepiece old")
    tokenizer.add_tokens(["[SEG]"])
    assert tokenizer.convert_tokens_to_ids("[SEG]") not in tokenizer("a dog:[SEG]")["input_ids"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_in_every_style(kind, style):
    """Each turn's words with the token that ends it, nothing behind; the prompt of each is what a chat gives."""
    template, end = STYLES[style]
    processor = make_processor(kind, template)
    tokenizer = processor.tokenizer
    ((ids, labels),) = processor.encode_conversations([TALK])
    ends = [n for n, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids(end) and labels[n] != -100]
    assert len(ends) == 2 and ends[-1] == len(ids) - 1
    for number, last in zip((1, 3), ends, strict=True):
        prompt = processor.apply_chat_template(
            TALK[:number], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0]
        assert ids[: len(prompt)] == prompt and labels[len(prompt)] != -100 == labels[len(prompt) - 1]
        said = ids[len(prompt) : last]
        assert labels[len(prompt) : last] == said
        assert tokenizer.decode(said).replace(" ", "") == TALK[number]["content"].replace(" ", "")
        assert processor.read_answer(said) == ([("the dog", False), ("a cat", True)] if number == 1 else [("", False)])


def test_thinking_is_learned_where_it_is_written():
    """One turn with a block is learned whole, as it will be written; several turns show it only in the last."""
    processor = make_processor("qwen2", THINKING)
    labels = processor.encode_conversations([TALK[:2]])[0][1]
    said = processor.tokenizer.decode([token for token in labels if token != -100])
    assert said == f"<think>\n\n</think>\n\n{TALK[1]['content']}<|im_end|>"
    with pytest.raises(
        ValueError, match=r"The chat template of LlavaProcessor renders .* each question in a conversation"
    ):
        processor.encode_conversations([TALK])
    with_open_block = tiny.chatml("<image>").replace(
        "assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"
    )
    with pytest.raises(ValueError, match="asked in other words than it learned"):
        make_processor("qwen2", with_open_block)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}", "cannot place an image"),
        ("{{ raise_exception('no images') }}", r"cannot place an image.*\(no images\)"),
        (tiny.LLAVA.replace("'ASSISTANT:'", "'ASSISTANT: '"), "joins .* which ends a prompt"),
        (tiny.LLAVA.replace("'ASSISTANT:'", "'AI:'"), "asked in other words than it learned"),
    ],
)  # fmt: skip
def test_templates_that_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        make_processor("gpt2", template)


def test_a_tokenizer_without_an_end():
    tokenizer = make_tokenizer("gpt2")
    tokenizer.eos_token = None
    add_slot_tokens(tokenizer)
    with pytest.raises(ValueError, match="has a token that ends an answer"):
        ConversationFormat(tokenizer, tiny.LLAVA, "<image>", "LlavaProcessor")


@pytest.mark.parametrize(
    ("options", "named"),
    [({"normalized": True}, "normalized=True"), ({"special": True, "normalized": False}, "special=True"),
     ({"normalized": False, "lstrip": True}, "lstrip=True")],
)  # fmt: skip
def test_slots_that_mean_something_else(options, named):
    tokenizer = make_tokenizer("gpt2")
    tokenizer.add_tokens([AddedToken("[REJ]", **options)], special_tokens=options.get("special", False))
    count = len(tokenizer)
    with pytest.raises(
        ValueError, match=rf"\[REJ\] means something else .* with {named}, .* to {named.split('=')[0]}="
    ):
        add_slot_tokens(tokenizer)
    assert len(tokenizer) == count  # not even [SEG] was added


def test_a_slot_that_is_an_ordinary_word():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "dog": 1, "[SEG]": 2}, unk_token="<unk>"))
    with pytest.raises(ValueError, match=r"\[SEG\] is an ordinary entry of the tokenizer's vocabulary \(2\)"):
        add_slot_tokens(PreTrainedTokenizerFast(tokenizer_object=words))


def test_expressions_that_hold_special_tokens():
    processor = make_processor("gpt2", tiny.LLAVA)
    for token in ("[SEG]", "<image>", "</s>", *CHAT):
        with pytest.raises(ValueError, match="which is a special token of the model"):
            processor.build_conversation([f"the dog {token}"])
