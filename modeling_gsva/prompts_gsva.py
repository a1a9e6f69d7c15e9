"""GSVA's wording: special tokens, chat templates, prompts for expressions, and how answers are read."""

import re
import threading
from collections.abc import Mapping
from reprlib import repr as shown  # short, and safe for values that are nested deeply or contain themselves
from typing import Any

from transformers import AddedToken
from transformers.utils.chat_template_utils import render_jinja_template

IMAGE_TOKEN, SEG_TOKEN, REJ_TOKEN = "<image>", "[SEG]", "[REJ]"
IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<im_start>", "<im_end>"
# In the order in which the original adds them to the tokenizer; <image> comes last and has no embedding there.
ADDED_TOKENS = (SEG_TOKEN, REJ_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_TOKEN)

# Every tag of the templates below eats the white space around it, so that they can be laid out for reading: only {{- ... -}}
# writes. Content is a string that may hold <image>, or the list of parts that transformers' chat templates use. Content that
# a template cannot place is refused: left out, it would change the question silently.
_CONTENT = r"""
{%- macro words(text) -%}
  {%- if text is not string -%}
    {{- raise_exception('A message holds ' ~ text ~ ' instead of text; content is a string, or a list of parts of type '
                        ~ 'text or image.') -}}
  {%- endif -%}
  {{- text | replace('<image>', '<im_start><image><im_end>') -}}
{%- endmacro -%}

{%- macro content(message) -%}
  {%- set parts = message['content'] -%}
  {%- if parts is defined and parts is iterable and parts is not string and parts is not mapping -%}
    {%- for part in parts -%}
      {%- if part['type'] == 'image' -%}
        {{- '<im_start><image><im_end>\n' -}}
      {%- elif part['type'] == 'text' -%}
        {{- words(part['text']) -}}
      {%- else -%}
        {{- raise_exception('A message has a part of type ' ~ part['type'] ~ '; text and image are known.') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- else -%}
    {{- words(parts) -}}
  {%- endif -%}
{%- endmacro -%}

{%- if not messages -%}
  {{- raise_exception('A conversation is empty; ask something.') -}}
{%- endif -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = content(messages[0]) -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = default_system -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
    {{- raise_exception('Message ' ~ loop.index ~ ' is by ' ~ message['role'] ~ '; after an optional system message '
                        ~ 'user and assistant speak in turn, the user first.') -}}
  {%- endif -%}
{%- endfor -%}
"""
_LLAVA_V1_TURNS = r"""
{%- if system -%}
  {{- system + ' ' -}}
{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' + content(message) + ' ASSISTANT:' -}}
  {%- else -%}
    {%- generation -%}
      {{- ' ' + content(message) + eos_token -}}
    {%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
"""
_LLAMA_2_TURNS = r"""
{%- for message in turns -%}
  {%- if message['role'] == 'user' -%}
    {%- if not loop.first -%}
      {{- bos_token -}}
    {%- endif -%}
    {{- '[INST] ' -}}
    {%- if loop.first and system -%}
      {{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' -}}
    {%- endif -%}
    {{- content(message) + ' [/INST]' -}}
  {%- else -%}
    {%- generation -%}
      {{- ' ' + content(message) + ' ' + eos_token -}}
    {%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
"""
_LLAVA_V1_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the human\\'s questions."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


_RENDERING = threading.Lock()


def render_conversations(**arguments: Any) -> tuple[list[str], list]:
    """
    Return conversations as text, and the spans of the assistant's answers, as `render_jinja_template` does, in any thread:
    transformers shares a compiled template among threads and notes the answers in it.
    """
    with _RENDERING:
        return render_jinja_template(**arguments)


def _template(default_system: str, turns: str) -> str:
    return f"{{%- set default_system = '{default_system}' -%}}\n{_CONTENT.strip()}\n{turns.strip()}"


# The two conversation styles of the original (model/llava/conversation.py: conv_llava_v1, conv_llava_llama_2), and one
# without a system prompt for small models. The text inside {% generation %} is supervised.
CHAT_TEMPLATES = {
    "llava_v1": _template(_LLAVA_V1_SYSTEM, _LLAVA_V1_TURNS),
    "llava_llama_2": _template(_LLAMA_2_SYSTEM, _LLAMA_2_TURNS),
    "plain": _template("", _LLAVA_V1_TURNS),
}

# How expressions are asked for and answered. "refer" and the two "reason" prompts are the original's evaluation prompts to
# the letter (data/dataset.py:494-537): no blank before "in this image", one after the newline, none after "Sure,".
# They change published numbers.
PROMPTS = {
    "refer": {
        "question": "<image>\n What are {expressions}in this image? Please output segmentation masks.",
        "answer": "Sure,{slots}.",
        "slot": "{expression}:{token}",
        "separator": ", ",
        "lower": True,
    },
    "reason_phrase": {
        "question": "<image>\n What is {expressions} in this image? Please output segmentation mask.",
        "answer": "{slots}",
        "slot": "{token}",
        "separator": ", ",
        "lower": False,
    },
    "reason_sentence": {
        "question": "<image>\n {expressions} Please output segmentation mask.",
        "answer": "{slots}",
        "slot": "{token}",
        "separator": ", ",
        "lower": False,
    },
}
# The wording for other bases: the original's, with the blank that it lacks. The base's chat template places the image.
BASE_PROMPTS = {
    **PROMPTS,
    "refer": {
        **PROMPTS["refer"],
        "question": "<image>\nWhat are {expressions} in this image? Please output segmentation masks.",
    },
}
# For a base without a chat template, such as PaliGemma: the question behind the image, then the answer and its end.
BARE_TEMPLATE = r"""
{%- for message in messages -%}
  {%- for part in message['content'] -%}
    {%- if part['type'] == 'image' -%}
      {{- '<image>' -}}
    {%- else -%}
      {{- part['text'] -}}
    {%- endif -%}
  {%- endfor -%}
  {%- if message['role'] == 'assistant' -%}
    {{- eos_token -}}
  {%- endif -%}
{%- endfor -%}
""".strip()
# The wording around a phrase in free answers: that of the evaluation prompt, of the training answers and of the reasoning
# answers (which name no phrase).
_BEFORE_PHRASE = re.compile(
    r"^(?:sure(?:,\s*|$))?(?:(?:the segmentation results? (?:are|is)|they are|it is|and)(?:\s+|$))?", re.IGNORECASE
)
_AROUND_PHRASE = re.compile(r"^the (?:mask of|segmentation of|referred)\s+(?P<phrase>.*?)\s+is$", re.IGNORECASE)


def merged_prompts(defaults: dict[str, dict], prompts: Any) -> dict[str, dict]:
    """
    Return `prompts` merged over the defaults.

    Raises:
        ValueError: not a mapping of wordings, each with the fields of `PROMPTS`.
    """
    if not isinstance(prompts, (Mapping, type(None))):
        raise ValueError(f"prompts is {shown(prompts)}; give wordings by their names, as in PROMPTS.")
    merged = {**defaults, **(prompts or {})}
    for name, wording in merged.items():
        if not isinstance(wording, Mapping) or any(
            type(wording.get(field)) is not type(value) for field, value in PROMPTS["refer"].items()
        ):
            raise ValueError(
                f"prompts[{name!r}] is {shown(wording)}; it needs {', '.join(PROMPTS['refer'])}, as in PROMPTS."
            )
    return merged


def add_slot_tokens(tokenizer) -> list[str]:
    """
    Add `[SEG]` and `[REJ]` to a base's tokenizer where they are missing, and return which were. The model's embedding needs a
    row for each.

    They are not normalized: a SentencePiece tokenizer that puts a blank before its text would not find them behind a word.
    Nor are they special, so that `decode(skip_special_tokens=True)` shows them.

    Raises:
        ValueError: a tokenizer in which `[SEG]` or `[REJ]` means something else already.
    """
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    vocabulary = tokenizer.get_vocab()
    new = []
    for name in (SEG_TOKEN, REJ_TOKEN):
        slot = AddedToken(name, normalized=False, special=False)
        options = ("normalized", "special", "lstrip", "rstrip", "single_word")
        if name not in vocabulary and name not in added:
            new.append(slot)
        elif name not in added:
            raise ValueError(
                f"{name} is an ordinary entry of the tokenizer's vocabulary ({vocabulary[name]}), so that text may hold it. "
                "Rename that entry in tokenizer.json, or take another base."
            )
        elif wrong := [option for option in options if getattr(added[name], option) != getattr(slot, option)]:
            raise ValueError(
                f"{name} means something else in this tokenizer: it is an added token with "
                f"{', '.join(f'{option}={getattr(added[name], option)}' for option in wrong)}, and would be missed in text or "
                f"left out of answers. Take the tokenizer without it, or correct its entry in tokenizer.json to "
                f"{', '.join(f'{option}={getattr(slot, option)}' for option in wrong)}."
            )
    tokenizer.add_tokens(new)
    return [slot.content for slot in new]


def strip_wording(text: str) -> str:
    """
    Return the phrase alone, without the wording that answers put around it.

    >>> strip_wording("Sure, the mask of the red dog is")
    'the red dog'
    """
    phrase = _BEFORE_PHRASE.sub("", text.strip(" ,.;:\n"), count=1).strip(" ,.;:\n")
    around = _AROUND_PHRASE.match(phrase)
    return around["phrase"] if around else phrase


__all__ = [
    "ADDED_TOKENS",
    "BARE_TEMPLATE",
    "BASE_PROMPTS",
    "CHAT_TEMPLATES",
    "PROMPTS",
    "add_slot_tokens",
    "merged_prompts",
    "strip_wording",
]
