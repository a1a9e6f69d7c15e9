"""GsvaProcessor: every string of GSVA (prompts, chat templates, answers), their tokens and labels, and answers back to results."""

import operator
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from reprlib import repr as shown  # short, and safe for what is nested deeply or in itself
from typing import Any, cast

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import TextIteratorStreamer
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput
from transformers.utils.chat_template_utils import render_jinja_template

from .image_processing_gsva import upscale_mask_logits

IMAGE_TOKEN, SEG_TOKEN, REJ_TOKEN = "<image>", "[SEG]", "[REJ]"
IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<im_start>", "<im_end>"
# In the order in which the original adds them to the tokenizer; <image> comes last and has no embedding there.
ADDED_TOKENS = (SEG_TOKEN, REJ_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_TOKEN)

# Content is a string that may hold <image>, or the list of parts that transformers' chat templates use. What a template
# cannot place is refused: left out, it would change the question without a word.
_CONTENT = (
    "{%- macro words(text) -%}{%- if text is not string -%}{{- raise_exception('A message holds ' ~ text ~ ' instead of "
    "text; content is a string, or a list of parts of type text or image.') -}}{%- endif -%}"
    "{{- text | replace('<image>', '<im_start><image><im_end>') -}}{%- endmacro -%}"
    "{%- macro content(message) -%}"
    "{%- if message['content'] is defined and message['content'] is iterable and message['content'] is not string and "
    "message['content'] is not mapping -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{- '<im_start><image><im_end>\\n' -}}"
    "{%- elif part['type'] == 'text' -%}{{- words(part['text']) -}}"
    "{%- else -%}{{- raise_exception('A message has a part of type ' ~ part['type'] ~ '; text and image are known.') -}}"
    "{%- endif -%}{%- endfor -%}{%- else -%}{{- words(message['content']) -}}{%- endif -%}{%- endmacro -%}"
    "{%- if not messages -%}{{- raise_exception('A conversation is empty; ask something.') -}}{%- endif -%}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set system = content(messages[0]) -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = default_system -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for message in turns -%}{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}"
    "{{- raise_exception('Message ' ~ loop.index ~ ' is by ' ~ message['role'] ~ '; after an optional system message user "
    "and assistant speak in turn, the user first.') -}}{%- endif -%}{%- endfor -%}"
)
_TWO_SEPARATORS = (
    "{%- if system -%}{{- system + ' ' -}}{%- endif -%}"
    "{%- for message in turns -%}{%- if message['role'] == 'user' -%}{{- 'USER: ' + content(message) + ' ASSISTANT:' -}}"
    "{%- else -%}{%- generation -%}{{- ' ' + content(message) + eos_token -}}{%- endgeneration -%}{%- endif -%}"
    "{%- endfor -%}"
)
_LLAMA_2 = (
    "{%- for message in turns -%}{%- if message['role'] == 'user' -%}"
    "{%- if not loop.first -%}{{- bos_token -}}{%- endif -%}{{- '[INST] ' -}}"
    "{%- if loop.first and system -%}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -}}{%- endif -%}"
    "{{- content(message) + ' [/INST]' -}}"
    "{%- else -%}{%- generation -%}{{- ' ' + content(message) + ' ' + eos_token -}}{%- endgeneration -%}{%- endif -%}"
    "{%- endfor -%}"
)
# The two conversation styles of the original (model/llava/conversation.py: conv_llava_v1, conv_llava_llama_2), and one
# without a system prompt for small models. What stands in {% generation %} is supervised.
CHAT_TEMPLATES = {
    "llava_v1": "{%- set default_system = 'A chat between a curious human and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the human\\'s questions.' -%}"
    + _CONTENT
    + _TWO_SEPARATORS,
    "llava_llama_2": "{%- set default_system = 'You are a helpful language and vision assistant. You are able to understand "
    "the visual content that the user provides, and assist the user with a variety of tasks using natural language.' -%}"
    + _CONTENT
    + _LLAMA_2,
    "plain": "{%- set default_system = '' -%}" + _CONTENT + _TWO_SEPARATORS,
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
# What free answers put around a phrase: the wording of the evaluation prompt, of the training answers and of the reasoning
# answers (which name no phrase).
_BEFORE_PHRASE = re.compile(
    r"^(?:sure(?:,\s*|$))?(?:(?:the segmentation results? (?:are|is)|they are|it is|and)(?:\s+|$))?", re.IGNORECASE
)
_AROUND_PHRASE = re.compile(r"^the (?:mask of|segmentation of|referred)\s+(?P<phrase>.*?)\s+is$", re.IGNORECASE)


def _strip_wording(text: str) -> str:
    """The phrase alone, without what answers put around it."""
    phrase = _BEFORE_PHRASE.sub("", text.strip(" ,.;:\n"), count=1).strip(" ,.;:\n")
    around = _AROUND_PHRASE.match(phrase)
    return around["phrase"] if around else phrase


class StreamedAnswer:
    """
    A free answer while it is written, from [`GsvaProcessor.stream`].

    Iterate over it for the text, piece by piece; then, or instead, ask for `results`, its masks.
    """

    def __init__(self, processor, model, inputs, **generate_kwargs):
        self._streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def write():
            try:
                outputs = model.segment(**inputs, method="generate", streamer=self._streamer, **generate_kwargs)
            except BaseException:
                self._streamer.on_finalized_text("", stream_end=True)  # nobody shall wait for text that will not come
                raise
            return processor.post_process_segmentation(outputs, inputs)

        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answer")
        self._results = pool.submit(write)
        pool.shutdown(wait=False)

    def __iter__(self) -> Iterator[str]:
        """Raises what writing the answer raised."""
        yield from self._streamer
        if self._results.done() and self._results.exception() is not None:
            self._results.result()

    @property
    def results(self) -> list[list[dict]]:
        """What `post_process_segmentation` gives: per image, each `[SEG]` and `[REJ]` with the phrase before it."""
        return self._results.result()


def _files_named(part) -> Iterator[str]:
    """Everything in a part of a chat message that transformers would open as a path."""
    if isinstance(part, (str, os.PathLike)):
        if not str(part).startswith(("http://", "https://")) and os.path.exists(part):
            yield os.fspath(part)
    elif isinstance(part, Mapping):
        for name, value in part.items():
            if name not in ("type", "text"):
                yield from _files_named(value)
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from _files_named(value)


def _check_chat_files(conversation) -> None:
    """
    Chats are often written by somebody else: a path in one must lead into the working directory, or into a folder that the
    environment's `GSVA_TRUSTED_FOLDERS` lists (separated as PATH is; `/` for all).
    """
    messages = [conversation]
    while messages and isinstance(messages[0], (list, tuple)):
        messages = [message for one in messages for message in one]
    trusted = [os.getcwd(), *filter(None, os.environ.get("GSVA_TRUSTED_FOLDERS", "").split(os.pathsep))]
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for file in _files_named(content if isinstance(content, (list, tuple)) else []):
            real = os.path.realpath(file)
            if not any(real.startswith(os.path.join(os.path.realpath(folder), "")) for folder in trusted):
                raise ValueError(
                    f"A message names the file {file!r}, which leads out of the working directory. Pass the picture itself, "
                    f"or list folders that chats may name in the environment variable GSVA_TRUSTED_FOLDERS."
                )


def _check_messages(messages, where: str) -> None:
    """Raises ValueError for what is no list of {"role", "content"}, contents strings or lists of parts."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{where} is {shown(messages)}; give a list of messages {{'role': ..., 'content': ...}}.")
    for n, message in enumerate(messages):
        role, content = (message.get(k) for k in ("role", "content")) if isinstance(message, Mapping) else (None, None)
        is_known = role in ("user", "assistant") or (role == "system" and n == 0) if isinstance(role, str) else False
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not is_known or not isinstance(parts, (list, tuple)) or any(
            not isinstance(part, Mapping)
            or part.get("type") not in ("text", "image")
            or (part["type"] == "text" and not _is_text(part.get("text")))
            for part in parts
        ):  # fmt: skip
            raise ValueError(
                f"{where}, message {n}, is {shown(message)}; it needs a 'role', user or assistant (or system, of the first), "
                f"and a 'content', a text or a list of parts of type text or image."
            )


def _is_text(text) -> bool:
    """A string that can be written as UTF-8 (halves of surrogate pairs cannot)."""
    return isinstance(text, str) and text == text.encode("utf-8", "ignore").decode("utf-8")


class GsvaProcessor(ProcessorMixin):
    r"""
    Turns pictures and expressions (or conversations) into model inputs, and segmentation outputs into results.

    Args:
        image_processor ([`GsvaImageProcessor`]), tokenizer: the two halves. The tokenizer knows `[SEG]`, `[REJ]`,
            `<im_start>`, `<im_end>` and `<image>`.
        patch_size (`int`): side of a patch of the vision tower in pixels; with the crop size it gives the number of
            placeholders of an image.
        chat_template (`str`): a Jinja template, by default the original's `llava_v1` (see `CHAT_TEMPLATES`).
        prompts (`dict`): wording of questions and answers by name (see `PROMPTS`), merged over the original's.
    """

    def __init__(
        self, image_processor=None, tokenizer=None, patch_size=14, chat_template=None, prompts=None, **kwargs
    ):
        self.patch_size = patch_size
        if not isinstance(prompts, (Mapping, type(None))):
            raise ValueError(f"prompts is {shown(prompts)}; give wordings by their names, as in PROMPTS.")
        self.prompts = {**PROMPTS, **(prompts or {})}
        for name, wording in self.prompts.items():
            if not isinstance(wording, Mapping) or any(
                type(wording.get(field)) is not type(value) for field, value in PROMPTS["refer"].items()
            ):
                raise ValueError(
                    f"prompts[{name!r}] is {shown(wording)}; it needs {', '.join(PROMPTS['refer'])}, as in PROMPTS."
                )
        self.image_token = IMAGE_TOKEN
        if tokenizer is not None:
            vocabulary = tokenizer.get_vocab()
            if missing := [token for token in ADDED_TOKENS if token not in vocabulary]:
                raise ValueError(
                    f"The tokenizer lacks {missing}: a slot could not be read. Add them with tokenizer.add_tokens "
                    f"({list(ADDED_TOKENS)}, in this order) and resize the model's embedding."
                )
            self.image_token_id, self.seg_token_id, self.rej_token_id = (
                vocabulary[token] for token in (IMAGE_TOKEN, SEG_TOKEN, REJ_TOKEN)
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATES["llava_v1"])

    @property
    def image_seq_length(self) -> int:
        """Number of placeholders one image takes."""
        crop = self.image_processor.crop_size
        return (crop["height"] // self.patch_size) * (crop["width"] // self.patch_size)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """How many placeholders and pieces pictures of these (height, width) take; serving engines ask for it."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    def save_pretrained(self, save_directory, **kwargs):
        """As everywhere in transformers, without what is no property of the processor: where it and its code came from."""
        for noted_on_loading in ("is_local", "local_files_only", "dtype"):  # dtype: by pipelines
            self.tokenizer.init_kwargs.pop(noted_on_loading, None)
        saved = super().save_pretrained(save_directory, **kwargs)
        self.__dict__.pop("auto_map", None)
        return saved

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """
        As everywhere in transformers. Prompts to be answered (`add_generation_prompt`) are padded on the left unless
        `processor_kwargs` says otherwise. A message may name its picture by URL or path; paths are followed inside the
        working directory and the folders that the environment variable `GSVA_TRUSTED_FOLDERS` lists.

        Raises:
            ValueError: an empty conversation, or a message that names a file elsewhere.
        """
        if not len(conversation):
            raise ValueError("The conversation is empty; ask something.")
        _check_chat_files(conversation)
        if kwargs.get("add_generation_prompt"):
            kwargs["processor_kwargs"] = {"padding_side": "left", **(kwargs.get("processor_kwargs") or {})}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def normalize_expression(self, expression: str, prompt: str = "refer") -> str:
        """
        An expression as the prompt holds it: stripped, lower-cased, and then without dots at both ends, in this order,
        so that the blank of "right button ." stays (quirk Q4 of the original's data pipeline, which changes published
        numbers); the "reason" prompts only strip.

        Raises:
            ValueError: an expression that is no string, is empty, or holds a special token.
        """
        if not _is_text(expression):
            raise ValueError(
                f"Expression {shown(expression)} is a {type(expression).__name__}; give a string of UTF-8."
            )
        text = expression.strip()
        if self.prompts[prompt]["lower"]:
            text = text.lower().strip(".")
        if not text.strip():
            raise ValueError(f"Expression {expression!r} is empty; leave it out or give it words.")
        lowered = expression.lower()
        for token in {*ADDED_TOKENS, *self.tokenizer.all_special_tokens}:
            if token.lower() in lowered:
                raise ValueError(
                    f"Expression {expression!r} holds {token}, which the model reads as a token of its own; take it out."
                )
        return text

    def build_conversation(
        self, expressions: list[str], no_targets: list[bool] | None = None, prompt: str = "refer"
    ) -> list[dict[str, str]]:
        """
        The one prompt builder: question and answer for the expressions of one picture.

        Args:
            no_targets: which expressions are answered by `[REJ]`; by default none.
        """
        if not isinstance(prompt, str) or prompt not in self.prompts:
            raise ValueError(f"prompt={prompt!r} is not known; choose one of {sorted(self.prompts)}.")
        if not expressions:
            raise ValueError("A list of expressions is empty; give at least one expression for each prompt.")
        no_targets = [False] * len(expressions) if no_targets is None else no_targets
        if len(no_targets) != len(expressions):
            raise ValueError(f"{len(expressions)} expressions but {len(no_targets)} no_targets; give one for each.")
        wording = self.prompts[prompt]
        texts = [self.normalize_expression(expression, prompt) for expression in expressions]
        slots = [
            wording["slot"].replace("{token}", REJ_TOKEN if absent else SEG_TOKEN).replace("{expression}", text)
            for text, absent in zip(texts, no_targets)
        ]
        return [
            {"role": "user", "content": wording["question"].replace("{expressions}", ", ".join(texts))},
            {"role": "assistant", "content": wording["answer"].replace("{slots}", wording["separator"].join(slots))},
        ]

    def encode_conversations(
        self, conversations: list[list[dict]], add_generation_prompt: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """
        Renders and tokenizes conversations: per conversation the ids, `<image>` expanded, and the labels, -100
        wherever the assistant does not speak. Supervised are exactly the answers with their end-of-sequence token.
        """
        texts, spans = render_jinja_template(
            conversations=conversations,
            chat_template=self.chat_template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **self.tokenizer.special_tokens_map,
        )
        encoded = self.tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False)
        results = []
        for ids, offsets, answer_spans in zip(encoded["input_ids"], encoded["offset_mapping"], spans):
            if ids.count(self.image_token_id) > 1:
                raise ValueError(
                    f"A conversation holds {ids.count(self.image_token_id)} <image> placeholders; GSVA reads one image per "
                    "conversation. Ask about each image in a conversation of its own."
                )
            labels = [-100] * len(ids)
            for begin, end in answer_spans:
                for position, (token_begin, token_end) in enumerate(offsets):
                    if token_begin < end and token_end > begin:
                        labels[position] = ids[position]
            if self.image_token_id in ids:
                place, count = ids.index(self.image_token_id), self.image_seq_length
                ids = ids[:place] + [self.image_token_id] * count + ids[place + 1 :]
                labels = labels[:place] + [-100] * count + labels[place + 1 :]
            results.append((ids, labels))
        return results

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        expressions: list[list[str]] | list[str] | None = None,
        conversations: list[list[dict]] | None = None,
        image_index: list[int] | None = None,
        masks: list | None = None,
        no_targets: list[list[bool] | None] | None = None,
        prompt: str | None = None,
        one_prompt_per_expression: bool | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        r"""
        Three ways to call it:

        - `processor(images=[a, b], expressions=[["man in red", "the unicorn"], ["both dogs"]])`, to segment: `input_ids`
          (conversations, length) are the prompts padded on the left, `answer_ids` the wording of the answers padded on
          the right, each with its attention mask.
        - `processor(images=..., conversations=[[{"role": "user", "content": "<image>\n..."}, {"role": "assistant", ...}]],
          image_index=[0], masks=[(slots, height, width)])`, to train: `input_ids` padded on the right, `labels`,
          `mask_labels`.
        - `processor(images=..., text=...)` and `apply_chat_template`, as every processor of transformers. A text may hold
          several `<image>`, which the language model reads in order; to be segmented each has to hold one at most.

        Args:
            images: one picture or a list, each given once however many conversations it has.
            expressions: per image the expressions to look for.
            no_targets: per image, which expressions the answer rejects (the gold answer of `teacher_forced`).
            prompt: the name of the wording, see `prompts`; by default `"refer"`.
            one_prompt_per_expression: ask for each expression in a conversation of its own; by default all of an image
                share one.
            conversations: messages of user and assistant; `image_index` tells each one's image (-1 for none), by
                default one each, in order.
            masks: per conversation its true masks, arrays of (slots, height, width) at the picture's own size.
            return_tensors, and what else tokenizer and image processor know. Of it, conversations heed `max_length`: they
                are cut to so many tokens, placeholders of the image included.

        Raises:
            ValueError: lists whose lengths do not fit, masks of another size than their picture, expressions that are
                empty or hold a special token, text cut inside the image.
        """
        if expressions is None and conversations is None:
            return self._call_with_text(images, text, **kwargs)
        if text is not None or (expressions is not None and conversations is not None):
            raise ValueError("Give only one of text, expressions and conversations.")
        images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        return_tensors, max_length = kwargs.pop("return_tensors", None), kwargs.pop("max_length", None)
        data: dict[str, Any] = {}
        if expressions is not None:
            if not images:
                raise ValueError(
                    f"No image was given for {len(expressions)} list(s) of expressions; pass images=[...]."
                )
            if not isinstance(expressions, (list, tuple)):
                raise ValueError(f"expressions is {shown(expressions)}; give a list of strings for each image.")
            if expressions and all(isinstance(expression, str) for expression in expressions):
                expressions = [cast(list[str], expressions)]
            if len(images) != len(expressions):
                raise ValueError(
                    f"{len(images)} images but {len(expressions)} lists of expressions; give one list for each image."
                )
            no_targets = [None] * len(images) if no_targets is None else no_targets
            if not isinstance(no_targets, (list, tuple)):
                raise ValueError(f"no_targets is {shown(no_targets)}; give a list with true or false for each image.")
            if len(no_targets) != len(images):
                raise ValueError(
                    f"{len(images)} images but {len(no_targets)} lists of no_targets; give one for each image."
                )
            asked, answered, image_index = [], [], []
            for index, (texts, absent) in enumerate(zip(expressions, no_targets)):
                if isinstance(texts, str):
                    raise ValueError(
                        f"expressions[{index}] is the string {texts!r}; give a list of strings for each image."
                    )
                if not isinstance(texts, (list, tuple)):
                    raise ValueError(f"expressions[{index}] is {shown(texts)}; give a list of strings for each image.")
                if not isinstance(absent, (list, tuple, np.ndarray, type(None))):
                    raise ValueError(
                        f"no_targets[{index}] is {shown(absent)}; give a list with true or false for each."
                    )
                absent = [False] * len(texts) if absent is None else list(absent)
                if len(absent) != len(texts):
                    raise ValueError(f"{len(texts)} expressions but {len(absent)} no_targets; give one for each.")
                groups = [(list(texts), absent)]
                if one_prompt_per_expression:
                    groups = [([one], [flag]) for one, flag in zip(texts, absent)]
                asked += [group for group, _ in groups]
                answered += [self.build_conversation(*group, prompt or "refer") for group in groups]
                image_index += [index] * len(groups)
            data["expressions"] = asked
            encoded = self.encode_conversations(answered)
            starts = [next(n for n, label in enumerate(labels) if label != -100) for _, labels in encoded]
            prompts = [ids[:start] for (ids, _), start in zip(encoded, starts)]
            answers = [ids[start:] for (ids, _), start in zip(encoded, starts)]
            data["input_ids"], data["attention_mask"] = self._pad(prompts, side="left")
            data["answer_ids"], data["answer_attention_mask"] = self._pad(answers)
        else:
            if not isinstance(conversations, (list, tuple)) or not conversations:
                raise ValueError(
                    f"conversations is {shown(conversations)}; give a list of conversations, one at least."
                )
            for index, messages in enumerate(conversations):
                _check_messages(messages, f"Conversation {index}")
            image_index = list(range(len(conversations))) if image_index is None and images else image_index
            try:
                image_index = (
                    [-1] * len(conversations) if image_index is None else [operator.index(n) for n in image_index]
                )
            except TypeError:
                raise ValueError(
                    f"image_index is {shown(image_index)}; give for each conversation the number of its image, or -1."
                ) from None
            self._check_conversations(conversations, image_index, len(images))
            try:
                encoded = self.encode_conversations(conversations)
            except TemplateError as error:
                raise ValueError(f"The chat template does not take these conversations: {error}") from None
            if max_length is not None:
                if not isinstance(max_length, int) or max_length < 1:
                    raise ValueError(f"max_length={max_length!r} must be a number of tokens, 1 or more.")
                for index, (ids, _) in enumerate(encoded):
                    if self.image_token_id in ids[max_length:]:
                        raise ValueError(
                            f"max_length={max_length} cuts the image of conversation {index}, which alone takes "
                            f"{self.image_seq_length} tokens; raise it."
                        )
                encoded = [(ids[:max_length], labels[:max_length]) for ids, labels in encoded]
            data["input_ids"], data["attention_mask"] = self._pad([ids for ids, _ in encoded])
            data["labels"], _ = self._pad([labels for _, labels in encoded], value=-100)
        data["image_index"] = image_index
        if images:
            data.update(self.image_processor(images, **kwargs))
            if len(data["original_sizes"]) != len(images):
                raise ValueError(
                    f"{len(images)} entries of images hold {len(data['original_sizes'])} pictures; give one picture each."
                )
            if masks is not None:
                data["mask_labels"] = self._check_masks(masks, image_index, data["original_sizes"])
        elif masks is not None:
            data["mask_labels"] = self._check_masks(masks, image_index, [])
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["expressions", "mask_labels"])

    def _call_with_text(self, images, text, **kwargs) -> BatchFeature:
        data = super().__call__(images=images, text=text, **kwargs)
        if images is not None and text is not None:
            counts = [sample.count(self.image_token) for sample in ([text] if isinstance(text, str) else text)]
            index = [sum(counts[:n]) if count else -1 for n, count in enumerate(counts)]
            # One each, in order, need not be told: examples of one are batched by code that could not count on.
            if max(counts) <= 1 and index != list(range(len(index))):
                make = {torch.Tensor: torch.tensor, np.ndarray: np.array}.get(type(data["input_ids"]), list)
                data["image_index"] = make(index)
        return data

    def _pad(
        self, rows: list[list[int]], side: str = "right", value: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        width = max(map(len, rows))
        value = self.tokenizer.pad_token_id if value is None else value
        padded = np.full((len(rows), width), value, dtype=np.int64)
        mask = np.zeros_like(padded)
        for index, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            padded[index, place] = row
            mask[index, place] = 1
        return padded, mask

    def _check_conversations(self, conversations, image_index, num_images):
        if len(image_index) != len(conversations):
            raise ValueError(
                f"{len(conversations)} conversations but image_index has {len(image_index)} entries; give one each."
            )
        for index, (messages, image) in enumerate(zip(conversations, image_index)):
            if not -1 <= image < num_images:
                raise ValueError(
                    f"Conversation {index} points to image {image}, but {num_images} images were given; use 0 to "
                    f"{num_images - 1}, or -1 for none."
                )
            has_placeholder = any(
                "<image>" in message["content"]
                if isinstance(message["content"], str)
                else any(part["type"] == "image" for part in message["content"])
                for message in messages
            )
            if has_placeholder != (image >= 0):
                raise ValueError(
                    f"Conversation {index} {'holds' if has_placeholder else 'lacks'} <image>, but its image_index is "
                    f"{image}; write <image> where, and only where, a conversation has an image."
                )

    def _check_masks(self, masks, image_index, original_sizes):
        if not hasattr(masks, "__len__") or isinstance(masks, (str, bytes, Mapping)):
            raise ValueError(f"masks is {shown(masks)}; give for each conversation an array (slots, height, width).")
        if len(masks) != len(image_index):
            raise ValueError(f"{len(image_index)} conversations but {len(masks)} entries in masks; give one each.")
        checked = []
        for index, (mask, image) in enumerate(zip(masks, image_index)):
            try:
                mask = torch.as_tensor(np.asarray(mask))
                if mask.ndim == 0 or mask.is_complex():
                    raise TypeError("a single number" if mask.ndim == 0 else "complex numbers")
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"masks[{index}] is {shown(mask)}, no array (slots, height, width) of 0 and 1 ({error})."
                ) from None
            size = tuple(int(side) for side in original_sizes[image]) if image >= 0 else None
            if len(mask) and not len(original_sizes):
                raise ValueError("Masks were given without images; pass images=[...].")
            if len(mask) and size is None:
                raise ValueError(
                    f"masks[{index}] has shape {tuple(mask.shape)}, but conversation {index} has no image; give an empty list."
                )
            if len(mask) and (mask.ndim != 3 or tuple(mask.shape[1:]) != size):
                raise ValueError(
                    f"masks[{index}] has shape {tuple(mask.shape)}, but its picture is {size} (height, width); give "
                    "(slots, height, width) at the picture's own size, after EXIF orientation."
                )
            checked.append(mask.to(torch.uint8) if len(mask) else torch.zeros(0, *(size or (1, 1)), dtype=torch.uint8))
        return checked

    def read_answer(self, token_ids: list[int]) -> list[tuple[str, bool]]:
        """
        The slots of a free answer in order: the phrase before each, and whether it is rejected.

        >>> # "Sure, the dog:[SEG], a unicorn:[REJ]." → [("the dog", False), ("a unicorn", True)]
        """
        slots, begin = [], 0
        for position, token in enumerate(token_ids):
            if token in (self.seg_token_id, self.rej_token_id):
                phrase = self.tokenizer.decode(token_ids[begin:position], skip_special_tokens=True)
                slots.append((_strip_wording(phrase), token == self.rej_token_id))
                begin = position + 1
        return slots

    def _match_slots(self, asked: list[str], slots: list[tuple[str, bool]]) -> tuple[list[int | None], bool]:
        """Which slot answers each expression, and whether the answer is malformed (its slots are not the ones asked for)."""
        # Stripped alike: an expression may itself begin like an answer ("it is red").
        wanted = [_strip_wording(expression).lower() for expression in asked]
        said = [phrase.lower() for phrase, _ in slots]
        if len(slots) == len(asked) and all(not phrase or phrase == text for phrase, text in zip(said, wanted)):
            return list(range(len(asked))), False
        free = list(range(len(slots)))
        matched: list[int | None] = []
        for text in wanted:
            place = next((n for n in free if said[n] == text), None)
            if place is not None:
                free.remove(place)
            matched.append(place)
        return matched, True

    def stream(self, model, inputs, **generate_kwargs) -> StreamedAnswer:
        """
        Lets the model answer one conversation in the background, to be read while it is written.

        ```python
        answer = processor.stream(model, inputs, max_new_tokens=64)
        for piece in answer:
            print(piece, end="", flush=True)
        masks = [entry["mask"] for entry in answer.results[0]]
        ```

        Args:
            inputs: of one conversation, from `apply_chat_template(..., tokenize=True, return_dict=True)`.
            generate_kwargs: for `generate`.
        """
        if len(inputs["input_ids"]) != 1:
            raise ValueError(f"{len(inputs['input_ids'])} conversations cannot be streamed at once; give one.")
        return StreamedAnswer(self, model, inputs, **generate_kwargs)

    def post_process_segmentation(
        self, outputs, inputs, threshold: float | None = None, keep_rejected_masks: bool = False
    ) -> list[list[dict]]:
        r"""
        Results in the picture's own pixels.

        Args:
            outputs: what `model.segment(**inputs)` gave.
            inputs: what the processor gave it.
            threshold: decide anew by comparing scores with it. A slot that was rejected when it was made has no mask, so
                a threshold below the one given to `segment` only adds empty masks; one above it rejects more.
            keep_rejected_masks: also return the masks of rejected slots where there are any (`teacher_forced` makes
                them: the original's metric scores a rejected target by its mask).

        Returns:
            Per image, per expression `{"text", "mask", "is_rejected", "score", "is_malformed"}`: the expression (in free
            chat the phrase before the slot), a (height, width) boolean array (all False where rejected), the log-odds of
            `[SEG]` against `[REJ]` (NaN where the answer has no slot for the expression, which counts as rejected), and
            whether the answer's slots were not the ones asked for.
        """
        num_images = len(inputs.get("original_sizes", ()))
        input_size = self.image_processor.sam_size["longest_edge"]
        results: list[list[dict]] = [[] for _ in range(num_images)]
        asked_per_conversation = inputs.get("expressions")
        image_index = outputs.image_index.tolist()
        copies = len(image_index) // len(asked_per_conversation) if asked_per_conversation else 1
        for row, image in enumerate(image_index):
            if image < 0:
                continue
            height, width = (int(side) for side in inputs["original_sizes"][image])
            answer = outputs.sequences[row, int(outputs.answer_starts[row]) :].tolist()
            matched: list[int | None]
            slots = self.read_answer(answer)[: len(outputs.scores[row])]  # what stands behind the end is no answer
            if asked_per_conversation is None:
                asked, matched, malformed = [phrase for phrase, _ in slots], list(range(len(slots))), False
            elif outputs.method == "generate":
                asked = asked_per_conversation[row // copies]
                matched, malformed = self._match_slots(asked, slots)
            else:
                asked = asked_per_conversation[row // copies]
                matched, malformed = list(range(len(asked))), False
            scores, rejected = outputs.scores[row], outputs.is_rejected[row]
            kept = [n for n in matched if n is not None and outputs.mask_logits is not None]
            upscaled: dict[int | None, np.ndarray] = {}
            if kept:
                logits = upscale_mask_logits(
                    outputs.mask_logits[row][kept], inputs["reshaped_input_sizes"][image], (height, width), input_size
                )
                # The original's threshold in eval_gres is >= 0 (utils: a logit of exactly zero is foreground).
                upscaled.update(zip(kept, (logits >= 0).cpu().numpy()))
            for text, n in zip(asked, matched):
                score = float("nan") if n is None else float(scores[n])
                is_rejected = n is None or bool(rejected[n] if threshold is None else score < threshold)
                # A slot that was rejected when it was made has constant zero logits, which are no mask.
                has_mask = n in upscaled and (not bool(rejected[n]) or outputs.method == "teacher_forced")
                shown = has_mask and (keep_rejected_masks or not is_rejected)
                mask = upscaled[n] if shown else np.zeros((height, width), dtype=bool)
                results[image].append(
                    {
                        "text": text,
                        "mask": mask,
                        "is_rejected": is_rejected,
                        "score": score,
                        "is_malformed": malformed,
                    }
                )
        return results


__all__ = ["GsvaProcessor"]
