"""`Predictor`: batches of rows with images and expressions to rows of predictions, in any process or engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor
from modeling_gsva.segmentation_gsva import check_threshold

from .config import check_choice
from .loop import check_slot_tokens, cpu_threads, evaluation_mode
from .prediction_rows import MASKS, bare_row, columns_of, error_row, result_row
from .requests import Asking, Prompt, Request, batches, check_expressions, joined_pictures, joined_texts

METHODS = ("slots", "generate")


class Predictor:
    """Answers batches of rows. It can be pickled and sent to other processes; each loads the model when it is first called.

    ```python
    predict = Predictor("assets/tiny_gsva_gres", expressions=["the red circle", "all stars"])
    columns = predict({"image": ["a.jpg", "b.jpg"], "image_id": ["a", "b"]})  # two rows for each image
    dataset.map_batches(predict, ...)  # Ray Data, or any engine that gives columns and takes columns
    ```

    Args:
        model: A directory or Hub id of a GSVA model.
        threshold: Reject where the score is below it; by default the model's calibrated threshold, or 0.
        method: "slots", or "generate" to let the model write its answers.
        masks: How rows keep masks: "rle" (COCO), "png" or "none".
        revision: Branch, tag or commit of a Hub id.
        expressions: What to look for in every image, where rows name nothing themselves.
        batch_size: Images at a time.
        max_new_tokens: The longest answer in tokens, of "generate" and of questions.
        dtype: Type of the weights.
        device: Where the model goes; by default the accelerator, or else the CPU.
        threads: CPU threads of the model where there is no accelerator. The same number gives the same rows.
        one_prompt_per_expression: Ask for each expression in a separate prompt.
        loaded: (processor, model) that are loaded already, which `model` only names.

    Raises:
        ValueError: A method, a way to keep masks or a threshold that does not exist; too many or too long expressions.
    """

    def __init__(
        self,
        model: str,
        *,
        threshold: float | None = None,
        method: str = "slots",
        masks: str = "rle",
        revision: str | None = None,
        expressions: Sequence[str] = (),
        batch_size: int = 8,
        max_new_tokens: int = 128,
        dtype: str = "float32",
        device: str | None = None,
        threads: int = 1,
        one_prompt_per_expression: bool = False,
        loaded: tuple[Any, Any] | None = None,
    ):
        check_choice("method", method, METHODS)
        check_choice("masks", masks, MASKS)
        if threshold is not None:
            check_threshold(threshold)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} answers nothing; give 1 or more.")
        check_expressions(expressions)
        self.model_name, self.threshold, self.method, self.masks = str(model), threshold, method, masks
        self.revision, self.expressions, self.batch_size = revision, list(expressions), batch_size
        self.max_new_tokens, self.dtype, self.device, self.threads = max_new_tokens, dtype, device, threads
        self.one_prompt_per_expression, self.given = one_prompt_per_expression, loaded
        self.tokens = self.padded_tokens = 0  # of what was answered so far, without and with padding
        self._loaded: tuple[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def load(self) -> tuple[Any, Any]:
        """Load processor and model where this process has not done so yet, and return them."""
        if self._loaded is None:
            self._loaded = self.given or self._read()
            check_slot_tokens(self._loaded[1], self._loaded[0])
        return self._loaded

    def _read(self) -> tuple[Any, Any]:
        if Path(self.model_name).is_dir():
            processor = GsvaProcessor.from_pretrained(self.model_name)
            model = GsvaForConditionalGeneration.from_pretrained(self.model_name, dtype=self.dtype)
        else:
            options = {"trust_remote_code": True, "revision": self.revision}
            processor = AutoProcessor.from_pretrained(self.model_name, **options)
            model = AutoModelForImageTextToText.from_pretrained(self.model_name, dtype=self.dtype, **options)
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return processor, model.to(self.device or accelerator or "cpu").eval()

    def facts(self) -> dict[str, Any]:
        """Return the columns that name the model: its revision is the commit, where the Hub has one."""
        commit = getattr(self.load()[1].config, "_commit_hash", None)
        return {"model": self.model_name, "revision": commit or self.revision}

    def asking(self, is_question: bool = False, is_copy: bool = False) -> Asking:
        """Return what prepares requests for this model; a copy has a processor of its own, for another thread."""
        processor, model = self.load()
        if is_copy:
            processor = copy.deepcopy(processor)
        room = self.max_new_tokens if is_question or self.method == "generate" else None
        return Asking(processor, model.config, room, self.one_prompt_per_expression)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the predictions for rows, as the columns of `PREDICTION_SCHEMA`; one row for each expression.

        Args:
            batch: Columns of equal length: `image` (a path, URL, PIL image, array, the bytes of a file, or `datasets`'
                mapping of `bytes` and `path`); `image_id`, or else `path`; `expressions` (a list of strings each) or
                `question` (a string each), unless the predictor has its own expressions.

        Raises:
            ValueError: There is no `image` column, or nothing to ask.
        """
        if "image" not in batch:
            raise ValueError(
                f"There is no column 'image' among {sorted(batch)}; rename the one that holds the images."
            )
        if not self.expressions and not {"expressions", "question"} & batch.keys():
            raise ValueError(
                "There is nothing to look for: give Predictor(..., expressions=[...]), or a column 'expressions' or 'question'."
            )
        count = len(batch["image"])
        asking = self.asking("question" in batch)
        rows = [{name: values[n] for name, values in batch.items()} for n in range(count)]
        return columns_of([row for rows in self.answer([self.prepare(row, asking) for row in rows]) for row in rows])

    def prepare(self, row: Mapping[str, Any], asking: Asking) -> Request:
        """Return the request of one row, see `__call__`. It does not touch the model: threads may call it, each with its `asking`."""
        image, image_id = row["image"], row.get("image_id", row.get("path"))
        if image_id is None and isinstance(image, Mapping):
            image_id = image.get("path")
        facts = {"image_id": None if image_id is None else str(image_id)}
        if "question" in row:
            return asking.about_question(image, row["question"], {**facts, "question": row["question"]})
        texts = row.get("expressions")
        texts = self.expressions if texts is None else [texts] if isinstance(texts, str) else texts
        return asking.about_expressions(image, [_text_of(text) for text in texts], facts)

    @torch.no_grad()
    def answer(self, requests: Sequence[Request]) -> list[list[dict[str, Any]]]:
        """Return the rows of each request. Images of like size, and prompts of like length, are answered together.

        Each image is encoded once, however many prompts and requests are about it.
        """
        found: dict[int, list[tuple[Prompt, str, list[dict[str, Any]]]]] = {}
        images: dict[str, list[Request]] = {}
        for request in requests:
            if request.prompts:
                images.setdefault(request.image_key, []).append(request)
        model = self.load()[1]
        with evaluation_mode(model), cpu_threads(self.threads):
            for group in batches(
                list(images.values()),
                shape=lambda about: about[0].shape,
                most=self.batch_size,
                order=lambda about: max(prompt.lengths for request in about for prompt in request.prompts),
            ):
                for request, answered in self._answer_images(group):
                    found.setdefault(id(request), []).append(answered)
        facts = self.facts()
        return [self._rows(request, found.get(id(request), []), facts) for request in requests]

    def _answer_images(
        self, images: list[list[Request]]
    ) -> Iterator[tuple[Request, tuple[Prompt, str, list[dict[str, Any]]]]]:
        """Encode a batch of images, each with all requests about it, and yield each prompt with its answer and results."""
        processor, model = self.load()
        pictures = {
            name: value.to(model.device) for name, value in joined_pictures([about[0] for about in images]).items()
        }
        inputs = {name: value for name, value in pictures.items() if name in model.language.other_inputs}
        features = {
            "vision_features": model.language.encode({**inputs, "pixel_values": pictures.get("pixel_values")}),
            "sam_embeddings": model.get_sam_embeddings(pictures["sam_pixel_values"]),
        }
        sizes = {name: pictures[name].cpu() for name in ("original_sizes", "reshaped_input_sizes")}
        prompts = [
            (n, request, prompt) for n, about in enumerate(images) for request in about for prompt in request.prompts
        ]
        for chunk in batches(prompts, shape=lambda entry: entry[2].lengths, most=self.batch_size, size=sum):
            asked = [prompt for _, _, prompt in chunk]
            texts = joined_texts(asked, processor.tokenizer.pad_token_id)
            self.tokens += sum(sum(prompt.lengths) for prompt in asked)
            self.padded_tokens += sum(value.numel() for name, value in texts.items() if name.endswith("_ids"))
            index = torch.tensor([n for n, _, _ in chunk])
            outputs = model.segment(
                **{name: value.to(model.device) for name, value in {**texts, "image_index": index}.items()},
                **features,
                **self._options(asked),
            )
            sizes_of_chunk = {**sizes}
            if asked[0].expressions is not None:
                sizes_of_chunk["expressions"] = [prompt.expressions for prompt in asked]
            results = [iter(of_image) for of_image in processor.post_process_segmentation(outputs, sizes_of_chunk)]
            for row, (n, request, prompt) in enumerate(chunk):
                count = len(outputs.scores[row]) if prompt.expressions is None else len(prompt.expressions)
                tokens = outputs.sequences[row, int(outputs.answer_starts[row]) :].tolist()
                if "answer_attention_mask" in prompt.tensors and outputs.method != "generate":
                    tokens = tokens[: prompt.lengths[1]]
                answer = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                yield request, (prompt, answer, [next(results[n]) for _ in range(count)])

    def _options(self, prompts: list[Prompt]) -> dict[str, Any]:
        """Return the arguments of `segment` for prompts, all of one kind."""
        if self.method == "generate" or prompts[0].expressions is None:
            options = {"do_sample": False, "num_return_sequences": 1, "max_new_tokens": self.max_new_tokens}
            return {"method": "generate", **options}
        return {"method": "slots", "threshold": self.threshold}

    def _rows(
        self, request: Request, answered: list[tuple[Prompt, str, list[dict[str, Any]]]], model_facts: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the rows of a request: its answers in the order of its prompts, then its errors."""
        facts = {**request.facts, **model_facts}
        order = {id(prompt): n for n, prompt in enumerate(request.prompts)}
        rows = []
        for prompt, answer, results in sorted(answered, key=lambda entry: order[id(entry[0])]):
            said = {**facts, "answer": answer}
            rows += [result_row(result, self.masks, said) for result in results]
            if not results:  # a free answer without a slot
                rows.append(bare_row(said))
        rows += [error_row(error, {**facts, "expression": text}) for text, error in request.errors]
        return rows


def _text_of(entry: Any) -> Any:
    """Return the text of an entry of an `expressions` column: this project's data sets hold mappings."""
    return entry["text"] if isinstance(entry, Mapping) and "text" in entry else entry
