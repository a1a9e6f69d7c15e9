"""GsvaBaseProcessor: a base's own processor, and images for the mask model beside it."""

import copy
import importlib.util
import os
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .chat_gsva import check_chat_files, check_contents
from .conversations_gsva import PROBE, AnsweredText, ConversationFormat
from .image_processing_gsva import GsvaSamImageProcessor
from .processing_gsva import GsvaProcessor
from .prompts_gsva import BASE_PROMPTS, IMAGE_TOKEN, REJ_TOKEN, SEG_TOKEN, add_slot_tokens, merged_prompts

# What the base's processor makes of text, beside what it makes of images.
_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "text_replacement_offsets"}
_ANY_IMAGE = Image.new("RGB", (1, 1))  # stands for one where its pixels do not matter


def check_extras(processor_class: type[ProcessorMixin]) -> None:
    """
    Raise ImportError where a processor needs a library that is not installed, with the extra that brings it. By itself
    transformers says so only in some cases.
    """
    needs_words = processor_class.__name__ == "SmolVLMProcessor"
    # Lfm2Vl's images have no way by Pillow alone.
    has_videos = "video_processor" in processor_class.get_attributes() or processor_class.__name__ == "Lfm2VlProcessor"
    extra = "smolvlm" if needs_words else "torchvision"
    for name in ["torchvision"] * has_videos + ["num2words"] * needs_words:
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"{processor_class.__name__} needs {name}, which is not installed: pip install -e '.[{extra}]'"
                f"{' (from the index that torch came from)' if name == 'torchvision' else ''}."
            )


def load_base_processor(base: str | os.PathLike, **kwargs) -> ProcessorMixin:
    """
    Return the processor of a base's directory or Hub id.

    Raises:
        ImportError: it needs a library that is not installed.
        ValueError: a model without a processor for images.
    """
    model_type = AutoConfig.from_pretrained(base, **kwargs).model_type
    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        raise ValueError(
            f"{str(base)!r} holds a model of type {model_type!r}, which has no processor of images and text, so it cannot be the "
            "base of a GSVA. Take a vision-language model, such as llava, qwen3_vl, internvl or smolvlm."
        )
    check_extras(processor_class_from_name(name))
    processor = AutoProcessor.from_pretrained(base, **kwargs)
    _check_base(processor)
    return processor


def _check_base(processor: Any) -> None:
    """Raise ValueError unless it is a processor of images and text with a placeholder for images."""
    name = type(processor).__name__
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{name} prepares no images with their text, so its model cannot be the base of a GSVA: it needs a tokenizer and "
            "an image processor. Give the processor of a vision-language model, such as LlavaNextProcessor."
        )
    if getattr(processor, "image_token", None) is None:
        raise ValueError(
            f"{name} has no image token, so its model cannot be the base of a GSVA: the text must say where the image is. "
            "Take a model of the type llava, qwen3_vl, internvl or smolvlm."
        )
    if getattr(transformers, name, None) is not type(processor):
        raise ValueError(
            f"{name} is not a processor of transformers, so a saved directory could not be loaded. Take a base that needs no "
            "code of its own."
        )


def named_images(chat: list[dict]) -> list:
    """Return the images that the parts of a chat's messages hold or name, in the order of transformers."""
    contents = [message["content"] for message in chat if isinstance(message["content"], (list, tuple))]
    parts = [part for content in contents for part in content if part["type"] == "image"]
    return [part[name] for part in parts for name in ("image", "url", "path", "base64") if name in part]


class GsvaBaseProcessor(GsvaProcessor):
    r"""
    The processor of a GSVA over any base, from [`GsvaProcessor.from_base`].

    Text, chat template and the images of the language model are the base's: its processor gets each image as it is shown
    (upright, RGB) and gives what it gives for the base alone. `pixel_values` and whatever describes them (`image_grid_thw`,
    `image_sizes`, ...) hold each image once. The types of tokens follow from `input_ids` and the model makes them itself; where
    text is given as such (`processor(images=..., text=...)`, `apply_chat_template`), all inputs of the base are there.

    Saved, it is the base's processor in its own files, with our entries in `processor_config.json`.

    Args:
        base_processor (`ProcessorMixin`): of the base.
        sam_image_processor ([`GsvaSamImageProcessor`]): prepares images for the mask model.
        prompts (`dict`): wording by name, merged over `BASE_PROMPTS`.
        chat_template (`str`): in place of the base's.
    """

    def __init__(self, base_processor, sam_image_processor, prompts=None, chat_template=None):
        _check_base(base_processor)
        name, tokenizer = type(base_processor).__name__, base_processor.tokenizer
        templates = chat_template or base_processor.chat_template or getattr(tokenizer, "chat_template", None)
        template = templates.get("default") if isinstance(templates, dict) else templates
        if not template:
            raise ValueError(
                f"{name} has no chat template, without which nobody knows how questions are asked. Give one: GsvaProcessor."
                "from_base(..., chat_template=...); BARE_TEMPLATE puts the answer behind the question, as PaliGemma's does."
            )
        add_slot_tokens(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.base = copy.copy(base_processor)
        self.base.chat_template = templates
        self._sam_image_processor = sam_image_processor
        self.prompts = merged_prompts(BASE_PROMPTS, prompts)
        self.image_token = self.base.image_token  # in text, for one image
        self.image_token_id = self.base.image_token_ids[0]  # in input_ids, many; Gemma 3's differ
        self.seg_token_id, self.rej_token_id = tokenizer.convert_tokens_to_ids([SEG_TOKEN, REJ_TOKEN])
        ProcessorMixin.__init__(self, tokenizer, chat_template=templates)
        self.format = ConversationFormat(tokenizer, template, self.image_token, name)
        defaults = self.base._merge_kwargs(tokenizer_init_kwargs=tokenizer.init_kwargs)["text_kwargs"]
        self.adds_special_tokens = defaults.get("add_special_tokens", True)
        self._tokenize(self.format.answered(PROBE).pieces())  # raises where it would be asked otherwise than it learns

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return the parts that `ProcessorMixin` sets and saves; the others are the base's."""
        return ["tokenizer"]

    @property
    def image_processor(self):
        """Return the base's, which prepares images for the language model."""
        return self.base.image_processor

    @property
    def sam_image_processor(self) -> GsvaSamImageProcessor:
        """Return what prepares images for the mask model."""
        return self._sam_image_processor

    @property
    def reserved_tokens(self) -> set[str]:
        """Return the texts that no expression may hold."""
        return {SEG_TOKEN, REJ_TOKEN, IMAGE_TOKEN, self.image_token, *self.format.special_tokens}

    def image_settings(self) -> dict[str, Any]:
        """Return how images are prepared, for the language model and for the mask model."""
        return {"base": self.image_processor.to_dict(), "sam": self.sam_image_processor.to_dict()}

    @property
    def image_seq_length(self) -> int:
        """The number of placeholders depends on the image."""
        raise AttributeError(f"An image of {type(self.base).__name__} takes as many placeholders as it needs.")

    @property
    def model_input_names(self) -> list[str]:
        return [*self.base.model_input_names, *self.sam_image_processor.model_input_names]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.base.replace_image_token(image_inputs, image_idx, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        return self.base._get_num_multimodal_tokens(image_sizes, **kwargs)

    # ---- images ----
    def _read(self, images: Any) -> list[Image.Image]:
        """Return images as they are shown, in a flat list."""
        reader = self.sam_image_processor
        arrays = [reader.process_image(image) for image in make_flat_list_of_images(reader.fetch_images(images))]
        return [Image.fromarray(np.ascontiguousarray(np.moveaxis(array[:3], 0, -1))) for array in arrays]

    def _encode_images(self, images: list, **kwargs) -> tuple[dict[str, Any], list[str] | None]:
        """Return the base's and the mask model's inputs of the images, and the text by which the base replaces each."""
        if not images:
            return {}, None
        pictures = self._read(images)
        if len(pictures) != len(images):
            raise ValueError(f"{len(images)} entries of images hold {len(pictures)} images; give one image each.")
        texts: list[str] = []
        recorder = copy.copy(self.base)

        def record(text, images_replacements=(), *others, **named):
            texts.extend(images_replacements)
            return self.base.get_text_with_replacements(text, images_replacements, *others, **named)

        recorder.get_text_with_replacements = record
        text = [self.image_token] * len(pictures)
        options = {"padding": True, **kwargs, "return_tensors": "pt"}
        inputs = recorder(images=[[picture] for picture in pictures], text=text, **options)
        if len(texts) != len(pictures):
            raise ValueError(
                f"{type(self.base).__name__} does not say by which text it replaces an image "
                f"({len(texts)} for {len(pictures)} images), so its model cannot be the base of a GSVA."
            )
        of_images = {name: value for name, value in inputs.items() if name not in _OF_TEXT}
        return {**of_images, **self.sam_image_processor(pictures, return_tensors="pt")}, texts

    # ---- conversations ----
    def encode_conversations(
        self, conversations: list[list[dict]], add_generation_prompt: bool = False, images: list | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """
        Overrides [`GsvaProcessor.encode_conversations`], for images that take different numbers of placeholders.

        Args:
            images: per conversation its image, or None.
        """
        images = [None] * len(conversations) if images is None else images
        texts = iter(self._encode_images([image for image in images if image is not None])[1] or [])
        of_rows = [None if image is None else next(texts) for image in images]
        return [
            self._row(conversation, text, add_generation_prompt)
            for conversation, text in zip(conversations, of_rows, strict=True)
        ]

    def _encode_rows(self, conversations, image_index, image_texts) -> list[tuple[list[int], list[int]]]:
        texts = [image_texts[image] if image >= 0 else None for image in image_index]
        return [self._row(conversation, text) for conversation, text in zip(conversations, texts, strict=True)]

    def _row(
        self, conversation: list[dict], image_text: str | None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """Return ids and labels of a conversation about an image that the base replaces by `image_text`, None for none."""
        if add_generation_prompt:
            answered = AnsweredText(self.format.render(conversation, add_generation_prompt=True), [])
        else:
            answered = self.format.answered(conversation)
        if (count := answered.text.count(self.image_token)) != (image_text is not None):
            raise ValueError(
                f"A conversation holds {count} <image> placeholders; GSVA reads one image per conversation, and only where "
                "there is one. Ask about each image in a conversation of its own."
            )
        pieces = answered.pieces()
        pieces[0] = self._lay_out(pieces[0], image_text is not None, len(pieces) > 2)
        if image_text is not None:
            pieces = [piece.replace(self.image_token, image_text) for piece in pieces]
        return self._tokenize(pieces)

    def _lay_out(self, prompt: str, has_image: bool, has_more: bool) -> str:
        """Return the first prompt as the base's processor lays it out."""
        if not has_image:
            self.base.validate_inputs(images=None, text=[prompt])
            return prompt
        _, (text,), *_ = self.base.prepare_inputs_layout(images=[[_ANY_IMAGE]], text=[prompt])
        if has_more and text != prompt:
            raise ValueError(
                f"{type(self.base).__name__} lays out one question with its answer; ask each question in a conversation of its "
                "own."
            )
        return text

    def _tokenize(self, pieces: list[str]) -> tuple[list[int], list[int]]:
        """Return ids and labels of a text in pieces, of which every second is said by the assistant."""
        text = "".join(pieces)
        bos = self.tokenizer.bos_token
        begins_with_bos = bos is not None and text.startswith(bos)  # asked as apply_chat_template does
        options = {"add_special_tokens": self.adds_special_tokens and not begins_with_bos}
        ids = self.tokenizer(text, return_attention_mask=False, **options)["input_ids"]
        labels, done = [-100] * len(ids), 0
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        for number, end in enumerate(ends[:-1]):
            before = self.tokenizer(text[:end], return_attention_mask=False, **options)["input_ids"]
            if ids[: len(before)] != before:
                self._raise_joined(pieces[number], pieces[number + 1])
            if number % 2:
                labels[done : len(before)] = ids[done : len(before)]
            done = len(before)
        if len(pieces) % 2 == 0:
            labels[done:] = ids[done:]
        return ids, labels

    def _raise_joined(self, before: str, behind: str) -> None:
        raise ValueError(
            f"The tokenizer of {type(self.base).__name__} joins {before[-10:]!r}, which ends a prompt or an answer, with what "
            f"follows it, {behind[:10]!r}: the model would be asked in other tokens than it learned. Give a chat_template whose "
            "prompt does not end in a blank."
        )

    # ---- text and chats, as the base's processor takes them ----
    def _call_with_text(self, images, text, **kwargs) -> BatchFeature:
        if images is None or (isinstance(images, (list, tuple)) and not images):
            return self.base(text=text, **kwargs)
        pictures = self._read(images)
        if text is None:
            raise ValueError("Images were given without text, expressions or conversations.")
        texts = [text] if isinstance(text, str) else list(text)
        counts = [sample.count(self.image_token) for sample in texts]
        if sum(counts) != len(pictures):
            raise ValueError(
                f"{len(pictures)} images were given, but the text holds {sum(counts)} {self.image_token!r}; write one where each "
                "image is."
            )
        ends = np.cumsum(counts).tolist()
        nested = [pictures[end - count : end] for end, count in zip(ends, counts)]
        data = self.base(images=nested, text=texts, **kwargs)
        if "labels" in data and bool((torch.as_tensor(np.asarray(data["labels"])) == -100).all()):
            del data["labels"]  # PaliGemma's, of a prompt without an answer
        tensors = kwargs.get("return_tensors", (kwargs.get("text_kwargs") or {}).get("return_tensors"))
        data.update(self.sam_image_processor(pictures, return_tensors=tensors))
        return self._add_image_index(data, counts)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """
        Overrides [`GsvaProcessor.apply_chat_template`]: messages may be strings in which `<image>` stands for the image, and
        answers end with a token that ends them, as in training.
        """
        check_contents(conversation)
        check_chat_files(conversation)
        if chat_template is None:
            is_batch = isinstance(conversation[0], (list, tuple))
            chats: list[list[dict]] = conversation if is_batch else [conversation]
            images = [named_images(chat) for chat in chats]
            if "user" not in self.format.parts_of and any(images):  # strings name no images
                options = kwargs.get("processor_kwargs") or {}
                kwargs["processor_kwargs"] = {"images": images if is_batch else images[0], **options}
            is_continued = bool(kwargs.get("continue_final_message"))
            prepared = [self.format.messages(chat, is_continued) for chat in chats]
            conversation = prepared if is_batch else prepared[0]
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    # ---- saving and loading ----
    def to_dict(self) -> dict[str, Any]:
        """Return the base's settings with ours."""
        ours = {
            "processor_class": GsvaProcessor.__name__,
            "base_processor_class": type(self.base).__name__,
            "sam_image_processor": self.sam_image_processor.to_dict(),
            "prompts": self.prompts,
            # Which of transformers' two ways prepares images; they differ by a level of 255 where images are reduced.
            "image_backend": getattr(self.image_processor, "backend", None),
        }
        own = {"auto_map": self.auto_map} if hasattr(self, "auto_map") else {}
        return {**self.base.to_dict(), **ours, **own}

    @classmethod
    def load_base(cls, directory: str, settings: dict[str, Any], **kwargs) -> ProcessorMixin:
        """Return the base's processor of a saved directory."""
        base_class = getattr(transformers, settings["base_processor_class"], None)
        if base_class is None:
            raise ValueError(
                f"{directory} holds a GSVA over {settings['base_processor_class']}, which this version of transformers does not "
                "have; install a newer one."
            )
        check_extras(base_class)
        for name in ("chat_template", "prompts", "sam_image_processor"):
            kwargs.pop(name, None)
        base = base_class.from_pretrained(directory, **kwargs)
        if settings.get("image_backend") == "pil" != base.image_processor.backend:  # by itself it prefers torchvision
            base.image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil", **kwargs)
        return base

    @classmethod
    def with_settings(cls, base_processor, settings: dict[str, Any]) -> "GsvaBaseProcessor":
        """Return the processor of a saved directory over its base's."""
        sam_image_processor = settings["sam_image_processor"]
        if isinstance(sam_image_processor, dict):
            sam_image_processor = GsvaSamImageProcessor(**sam_image_processor)
        return cls(base_processor, sam_image_processor, settings.get("prompts"), settings.get("chat_template"))


__all__ = ["GsvaBaseProcessor", "check_extras", "load_base_processor"]
