"""GSVA's wording: special tokens, chat templates, prompts for expressions, and how answers are read."""

import re

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
# The wording around a phrase in free answers: that of the evaluation prompt, of the training answers and of the reasoning
# answers (which name no phrase).
_BEFORE_PHRASE = re.compile(
    r"^(?:sure(?:,\s*|$))?(?:(?:the segmentation results? (?:are|is)|they are|it is|and)(?:\s+|$))?", re.IGNORECASE
)
_AROUND_PHRASE = re.compile(r"^the (?:mask of|segmentation of|referred)\s+(?P<phrase>.*?)\s+is$", re.IGNORECASE)


def strip_wording(text: str) -> str:
    """
    Return the phrase alone, without the wording that answers put around it.

    >>> strip_wording("Sure, the mask of the red dog is")
    'the red dog'
    """
    phrase = _BEFORE_PHRASE.sub("", text.strip(" ,.;:\n"), count=1).strip(" ,.;:\n")
    around = _AROUND_PHRASE.match(phrase)
    return around["phrase"] if around else phrase


__all__ = ["ADDED_TOKENS", "CHAT_TEMPLATES", "PROMPTS", "strip_wording"]
