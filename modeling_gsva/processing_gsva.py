"""GsvaProcessor: images and expressions, or conversations, to model inputs; results_gsva.py reads the answers."""

from reprlib import repr as shown  # short, and safe for values that are nested deeply or contain themselves
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import TextInput

from .chat_gsva import StreamedAnswer, check_chat_files, check_contents, is_utf8
from .checking_gsva import check_conversations, check_expressions, check_masks, check_max_length
from .image_processing_gsva import GsvaSamImageProcessor
from .prompts_gsva import (
    ADDED_TOKENS,
    CHAT_TEMPLATES,
    IMAGE_TOKEN,
    PROMPTS,
    REJ_TOKEN,
    SEG_TOKEN,
    merged_prompts,
    render_conversations,
)
from .results_gsva import ResultsMixin

# The entry of processor_config.json that names the processor of another base than LLaVA v1.
BASE_CLASS = "base_processor_class"


# ProcessorMixin comes first: transformers compares a processor with its first base to see what it overrides.
class GsvaProcessor(ProcessorMixin, ResultsMixin):
    r"""
    Turns images and expressions (or conversations) into model inputs, and segmentation outputs into results.

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
        self.prompts = merged_prompts(PROMPTS, prompts)
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

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        """
        Overrides [`ProcessorMixin.from_args_and_dict`], which makes the processor of a directory, to refuse one without a
        chat template: the model would be asked in the wording of another. Over another base it makes a [`GsvaBaseProcessor`].
        """
        if BASE_CLASS in processor_dict:
            from .base_processing_gsva import GsvaBaseProcessor

            return GsvaBaseProcessor.with_settings(args[0], {**processor_dict, **kwargs})
        template = kwargs.get("chat_template") or processor_dict.get("chat_template")
        template = template or getattr(args[1] if len(args) > 1 else None, "chat_template", None)  # of the tokenizer
        if not template:
            raise ValueError(
                "The directory holds no chat template (chat_template.jinja), without which the model would be asked in "
                "another's words. Copy that file from where the model was saved, or choose a template: GsvaProcessor."
                "from_pretrained(directory, chat_template=CHAT_TEMPLATES[name]), name one of "
                f"{', '.join(CHAT_TEMPLATES)}."
            )
        return super().from_args_and_dict(args, {**processor_dict, "chat_template": template}, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """Overrides the parent, which loads tokenizer and image processor, to load a base's processor where there is one."""
        if BASE_CLASS in (processor_dict or {}):
            from .base_processing_gsva import GsvaBaseProcessor

            return [GsvaBaseProcessor.load_base(pretrained_model_name_or_path, processor_dict, **kwargs)]
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)

    @classmethod
    def from_base(cls, base_processor, sam_config, prompts=None, chat_template=None) -> "GsvaProcessor":
        """
        Return the processor of a GSVA over any base: the base's own processor, which prepares images and text as for the base
        alone, and images for the mask model beside it. `[SEG]` and `[REJ]` are added to its tokenizer where they are missing.

        Args:
            base_processor (`ProcessorMixin`): of the base, such as `LlavaNextProcessor`.
            sam_config (`PreTrainedConfig`): of the mask model.
            prompts (`dict`): wording by name, merged over `BASE_PROMPTS`.
            chat_template (`str`): in place of the base's.

        Raises:
            ValueError: a processor without tokenizer, images or image token, without a chat template, whose template is not
                usable (see [`ConversationFormat`]), or in whose tokenizer `[SEG]` or `[REJ]` means something else.
        """
        from .base_processing_gsva import GsvaBaseProcessor

        sam_image_processor = GsvaSamImageProcessor.for_config(sam_config)
        return GsvaBaseProcessor(base_processor, sam_image_processor, prompts=prompts, chat_template=chat_template)

    @property
    def reserved_tokens(self) -> set[str]:
        """Return the texts that no expression may hold."""
        return {*ADDED_TOKENS, *self.tokenizer.all_special_tokens}

    def image_settings(self) -> dict[str, Any]:
        """Return how images are prepared."""
        return self.image_processor.to_dict()

    @property
    def image_seq_length(self) -> int:
        """Return the number of placeholders of one image."""
        crop = self.image_processor.crop_size
        return (crop["height"] // self.patch_size) * (crop["width"] // self.patch_size)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """Return how many placeholders and patches images of these (height, width) take; serving engines call this."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)

    def save_pretrained(self, save_directory, **kwargs):
        """Save like the parent, but without attributes set on loading (source path, dtype, auto_map)."""
        for set_on_loading in ("is_local", "local_files_only", "dtype"):  # dtype: by pipelines
            self.tokenizer.init_kwargs.pop(set_on_loading, None)
        saved = super().save_pretrained(save_directory, **kwargs)
        self.__dict__.pop("auto_map", None)
        return saved

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """
        Overrides [`ProcessorMixin.apply_chat_template`] to pad prompts that wait for an answer (`add_generation_prompt`)
        on the left, unless `processor_kwargs` sets a side, and to open only files of trusted folders. A message may name
        its image by URL or path; paths may lead into the working directory and the folders that the environment variable
        `GSVA_TRUSTED_FOLDERS` lists.

        Raises:
            ValueError: an empty conversation, or a message that names a file elsewhere.
        """
        check_contents(conversation)
        check_chat_files(conversation)
        if kwargs.get("add_generation_prompt"):
            kwargs["processor_kwargs"] = {"padding_side": "left", **(kwargs.get("processor_kwargs") or {})}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def normalize_expression(self, expression: str, prompt: str = "refer") -> str:
        """
        Return an expression as the prompt holds it: stripped, lower-cased, and then without dots at both ends, in this
        order, so that the blank of "right button ." stays (quirk Q4 of the original's data pipeline, which changes
        published numbers); the "reason" prompts only strip.

        Raises:
            ValueError: an expression that is not a string, is empty, or holds a special token.
        """
        if not is_utf8(expression):
            raise ValueError(
                f"Expression {shown(expression)} is a {type(expression).__name__}; give a string of UTF-8."
            )
        text = expression.strip()
        if self.prompts[prompt]["lower"]:
            text = text.lower().strip(".")
        if not text.strip():
            raise ValueError(f"Expression {expression!r} is empty; leave it out or give it words.")
        lowered = expression.lower()
        for token in self.reserved_tokens:
            if token.lower() in lowered:
                raise ValueError(
                    f"Expression {expression!r} holds {token}, which is a special token of the model; take it out."
                )
        return text

    def build_conversation(
        self, expressions: list[str], no_targets: list[bool] | None = None, prompt: str = "refer"
    ) -> list[dict[str, str]]:
        """
        Build the question and the answer for the expressions of one image. All prompts for expressions are made here.

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
        self, conversations: list[list[dict]], add_generation_prompt: bool = False, images: list | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """
        Render and tokenize conversations. Return for each the ids, `<image>` expanded, and the labels: the assistant's
        answers with their end-of-sequence tokens are supervised, everything else is -100.

        Args:
            images: per conversation its image, or None; here of no use, as all images take the same number of placeholders.
        """
        texts, spans = render_conversations(
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
        Make model inputs. There are three ways to call it:

        - `processor(images=[a, b], expressions=[["man in red", "the unicorn"], ["both dogs"]])`, to segment: `input_ids`
          (conversations, length) are the prompts padded on the left, `answer_ids` the wording of the answers padded on
          the right, each with its attention mask.
        - `processor(images=..., conversations=[[{"role": "user", "content": "<image>\n..."}, {"role": "assistant", ...}]],
          image_index=[0], masks=[(slots, height, width)])`, to train: `input_ids` padded on the right, `labels`,
          `mask_labels`.
        - `processor(images=..., text=...)` and `apply_chat_template`, like every processor of transformers. A text may hold
          several `<image>`, which the language model reads in order; a text to be segmented may hold only one.

        Args:
            images: one image or a list, each given once however many conversations it has.
            expressions: per image the expressions to look for.
            no_targets: per image, which expressions the answer rejects (the gold answer of `teacher_forced`).
            prompt: the name of the wording, see `prompts`; by default `"refer"`.
            one_prompt_per_expression: ask for each expression in a separate conversation; by default all expressions of an
                image share one.
            conversations: messages of user and assistant.
            image_index: the image of each conversation (-1 for none), by default one each, in order.
            masks: per conversation its true masks, arrays of (slots, height, width) at the image's own size; by default
                none, where no conversation has a slot.
            return_tensors, max_length and other options of tokenizer and image processor. `max_length` counts tokens,
                placeholders of the image included: it cuts conversations, and refuses expressions whose prompt and answer
                together are longer, as a cut would lose some of them.

        Raises:
            ValueError: lists whose lengths do not fit, masks of another size than their image, expressions that are
                empty or hold a special token, text cut inside the image.
        """
        if expressions is None and conversations is None:
            return self._call_with_text(images, text, **kwargs)
        if text is not None or (expressions is not None and conversations is not None):
            raise ValueError("Give only one of text, expressions and conversations.")
        images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        return_tensors, max_length = kwargs.pop("return_tensors", None), kwargs.pop("max_length", None)
        if max_length is not None:
            check_max_length(max_length)
        if expressions is not None:
            talks, index, asked = self._ask(images, expressions, no_targets, prompt, one_prompt_per_expression)
        else:
            index, asked = check_conversations(conversations, image_index, len(images)), None
            talks = list(conversations or [])
        of_images, image_texts = self._encode_images(images, **kwargs)
        try:
            encoded = self._encode_rows(talks, index, image_texts)
        except TemplateError as error:
            raise ValueError(f"The chat template does not take these conversations: {error}") from None
        if asked is not None:
            data = self._for_segmentation(encoded, asked, index, max_length)
        else:
            data = self._for_training(encoded, index, max_length)
        data.update(of_images)
        if masks is None and expressions is None and not self._has_slots(data["input_ids"]):
            masks = [[]] * len(index)  # transformers' Trainer evaluates only batches that hold all labels
        if masks is not None:
            data["mask_labels"] = check_masks(masks, index, data.get("original_sizes", []))
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["expressions", "mask_labels"])

    def _encode_images(self, images: list, **kwargs) -> tuple[dict[str, Any], list[str] | None]:
        """Return the inputs of the images, and the text that stands for each in a conversation, where they differ."""
        if not images:
            return {}, None
        inputs = self.image_processor(images, **kwargs)
        if len(inputs["original_sizes"]) != len(images):
            raise ValueError(
                f"{len(images)} entries of images hold {len(inputs['original_sizes'])} images; give one image each."
            )
        return dict(inputs), None

    def _encode_rows(self, conversations, image_index, image_texts) -> list[tuple[list[int], list[int]]]:
        """Return ids and labels of conversations, of whose images `_encode_images` gave the texts."""
        return self.encode_conversations(conversations)

    def _ask(
        self, images: list, expressions, no_targets, prompt: str | None, one_prompt_per_expression: bool | None
    ) -> tuple[list[list[dict]], list[int], list[list[str]]]:
        """Return conversations with their answers, the image of each, and the expressions that each asks for."""
        texts_of, absent_of = check_expressions(images, expressions, no_targets)
        answered, image_index, asked = [], [], []
        for index, (texts, absent) in enumerate(zip(texts_of, absent_of)):
            groups = [(texts, absent)]
            if one_prompt_per_expression:
                groups = [([text], [flag]) for text, flag in zip(texts, absent)]
            answered += [self.build_conversation(*group, prompt or "refer") for group in groups]
            image_index += [index] * len(groups)
            asked += [group for group, _ in groups]
        return answered, image_index, asked

    def _for_segmentation(self, encoded, asked, image_index: list[int], max_length: int | None) -> dict[str, Any]:
        """Return prompts padded on the left and answers padded on the right."""
        for texts, (ids, _), image in zip(asked, encoded, image_index):
            if max_length is not None and len(ids) > max_length:
                raise ValueError(
                    f"The {len(texts)} expressions of image {image} make a prompt and an answer of {len(ids)} tokens "
                    f"({ids.count(self.image_token_id)} of them for the image), more than max_length={max_length}. Ask for "
                    "fewer at once, or for each in a prompt of its own (one_prompt_per_expression=True)."
                )
        starts = [next(n for n, label in enumerate(labels) if label != -100) for _, labels in encoded]
        prompts = self._pad([ids[:start] for (ids, _), start in zip(encoded, starts)], "left")
        answers = self._pad([ids[start:] for (ids, _), start in zip(encoded, starts)], "right")
        return {
            "expressions": asked,
            **prompts,
            **{f"answer_{name.removeprefix('input_')}": value for name, value in answers.items()},
            "image_index": image_index,
        }

    def _for_training(self, encoded, image_index: list[int], max_length: int | None) -> dict[str, Any]:
        """Return whole conversations padded on the right, with labels, cut to `max_length` tokens."""
        if max_length is not None:
            for index, (ids, _) in enumerate(encoded):
                if self.image_token_id in ids[max_length:]:
                    raise ValueError(
                        f"max_length={max_length} cuts the image of conversation {index}, which alone takes "
                        f"{ids.count(self.image_token_id)} tokens; raise it."
                    )
            encoded = [(ids[:max_length], labels[:max_length]) for ids, labels in encoded]
        labels = [torch.tensor(labels) for _, labels in encoded]
        return {
            **self._pad([ids for ids, _ in encoded], "right"),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100).numpy(),
            "image_index": image_index,
        }

    def _has_slots(self, input_ids) -> bool:
        return bool(np.isin(input_ids, [self.seg_token_id, self.rej_token_id]).any())

    def _pad(self, rows: list[list[int]], side: str) -> dict[str, np.ndarray]:
        """Return `input_ids` and `attention_mask`, (rows, length)."""
        options = {"return_attention_mask": True, "return_tensors": "np"}
        return dict(self.tokenizer.pad({"input_ids": rows}, padding_side=side, **options))

    def _call_with_text(self, images, text, **kwargs) -> BatchFeature:
        data = super().__call__(images=images, text=text, **kwargs)
        if images is None or text is None:
            return data
        return self._add_image_index(
            data, [sample.count(self.image_token) for sample in ([text] if isinstance(text, str) else text)]
        )

    @staticmethod
    def _add_image_index(data: BatchFeature, counts: list[int]) -> BatchFeature:
        """Add the image of each text, of texts that hold `counts` images, unless it is one each."""
        index = [sum(counts[:n]) if count else -1 for n, count in enumerate(counts)]
        # Leave `image_index` out when there is one image per text: code that concatenates single examples would not
        # offset it.
        if max(counts) <= 1 and index != list(range(len(index))):
            make = {torch.Tensor: torch.tensor, np.ndarray: np.array}.get(type(data["input_ids"]), list)
            data["image_index"] = make(index)
        return data

    def stream(self, model, inputs, **generate_kwargs) -> StreamedAnswer:
        """
        Let the model answer one conversation in the background, and return the answer to read while it is written.

        ```python
        answer = processor.stream(model, inputs, max_new_tokens=64)
        for piece in answer:
            print(piece, end="", flush=True)
        masks = [entry["mask"] for entry in answer.results[0]]
        ```

        Args:
            inputs: of one conversation, from `apply_chat_template(..., tokenize=True, return_dict=True)`.
            generate_kwargs: for `generate`, and the `cache` of the conversation ([`ConversationCache`]).

        The answer is a context manager: leaving its `with`, or `close()`, ends the writing.
        """
        if (number := generate_kwargs.get("num_return_sequences") or 1) != 1:
            raise ValueError(f"num_return_sequences={number} answers cannot be streamed at once; ask for one.")
        if len(inputs["input_ids"]) != 1:
            raise ValueError(f"{len(inputs['input_ids'])} conversations cannot be streamed at once; give one.")
        return StreamedAnswer(self, model, inputs, **generate_kwargs)


__all__ = ["ADDED_TOKENS", "CHAT_TEMPLATES", "PROMPTS", "GsvaProcessor"]
