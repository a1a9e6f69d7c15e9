"""GsvaPipeline: images and expressions in, masks and rejections out, one by one or streamed through a data set."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import AutoModelForImageTextToText, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import no_collate_fn
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils.logging import get_logger, tqdm

from .segmentation_gsva import check_threshold

logger = get_logger(__name__)
TASK = "generalized-referring-segmentation"
# The entry of config.json by which `pipeline(TASK, model=directory, trust_remote_code=True)` finds this file.
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_gsva.GsvaPipeline", "pt": ["AutoModelForImageTextToText"]}}
TEXT_INPUTS = ("input_ids", "attention_mask", "answer_ids", "answer_attention_mask")
MAX_NEW_TOKENS = 128  # of a generated answer, where neither the call nor the model's generation config says otherwise


class _Rows(Dataset):
    """A sequence of rows as a torch data set, which transformers streams."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.rows[index]


class _Stream(IterableDataset):
    """Rows without a length. A generator expression in its place could not be sent to a worker process."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def image_of(row):
    """Return the image of a row, or the row itself where it is one."""
    if not isinstance(row, Mapping):
        return row
    if "image" not in row:
        raise ValueError(f"A row holds {sorted(row)} but no 'image'; rename the column that holds the images.")
    return row["image"]


def prepare(
    processor, row, expressions=None, prompt="refer", one_prompt_per_expression=False, timeout=None
) -> dict[str, Any]:
    """Return the model's inputs for one row. It knows the processor alone, so that workers need not hold the model."""
    if expressions is None and isinstance(row, Mapping):
        expressions = row.get("expressions")
    if isinstance(expressions, str):
        expressions = [expressions]
    if expressions is None or not len(expressions):
        raise ValueError("No expressions were given: pass expressions=[...], or rows that hold 'expressions'.")
    texts = [entry["text"] if isinstance(entry, Mapping) else entry for entry in expressions]
    example = processor(
        images=[processor.sam_image_processor.fetch_images(image_of(row), timeout)],
        expressions=[texts],
        prompt=prompt,
        one_prompt_per_expression=one_prompt_per_expression,
        return_tensors="pt",
    )
    return {"example": example}


def form_of(images: Any) -> tuple[bool, bool]:
    """
    Return whether `images` is a single image or row, and whether it is a list (or a batched array) of them; neither for rows
    that are read one after the other.

    Raises:
        ValueError: no images, or an object that holds none.
    """
    if images is None:
        raise ValueError("No image was given: pass an image, a list of images, or rows of 'image' and 'expressions'.")
    is_array = hasattr(images, "ndim")
    is_file = hasattr(images, "read")
    is_one = is_file or isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image, Mapping))
    is_one = is_one or (is_array and images.ndim < 4)
    is_list = isinstance(images, (list, tuple)) or (is_array and not is_one)
    if not (is_one or is_list or isinstance(images, Iterable) or hasattr(images, "__getitem__")):
        raise ValueError(
            f"Images of type {type(images).__name__} are not supported: give a path, URL, PIL image or array, a list "
            "of them, or rows of 'image' and 'expressions'."
        )
    return is_one, is_list


def rows_of(images: Any, expressions: Any) -> list[dict[str, Any]]:
    """
    Return rows of each image with the list of its expressions.

    Raises:
        ValueError: another number of lists than of images, or strings among the lists.
    """
    if len(images) != len(expressions):
        raise ValueError(
            f"{len(images)} images but {len(expressions)} lists of expressions; give one list for each image, or "
            "one list of strings for all."
        )
    if strings := [entry for entry in expressions if isinstance(entry, (str, Mapping))]:
        raise ValueError(f"expressions holds lists, but also {strings[0]!r}; give a list of strings for each image.")
    return [{"image": image_of(image), "expressions": of_image} for image, of_image in zip(images, expressions)]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the examples of a batch as a list, which `_forward` joins."""
    return {"example": [item["example"] for item in items]}


def joined_images(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return inputs of images one after another; those that a base cuts into fewer tiles get tiles of zeros, as it does."""
    sizes = torch.tensor([part.shape[1:] for part in parts]).amax(0).tolist()

    def padded(part: torch.Tensor) -> torch.Tensor:
        missing = [n for size, side in zip(sizes[::-1], part.shape[:0:-1]) for n in (0, size - side)]
        return torch.nn.functional.pad(part, missing)

    return torch.cat([padded(part) for part in parts])


class _Results(Iterable):
    """Results that are computed while they are read, again in each pass, one for each row."""

    def __init__(self, begin, total: int | None, progress: bool):
        self.begin, self.total, self.progress = begin, total, progress

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("The results of a stream have no length.")
        return self.total

    def __iter__(self) -> Iterator[list[dict]]:
        return iter(tqdm(self.begin(), total=self.total, disable=not self.progress))


class GsvaPipeline(Pipeline):
    r"""
    Segments every expression in every image.

    ```python
    segment = pipeline("generalized-referring-segmentation", model=directory, trust_remote_code=True)
    segment("street.jpg", expressions=["the man in red", "the unicorn"])  # a list of two results
    segment(["a.jpg", "b.jpg"], expressions=[["the cat"], ["all dogs", "a tree"]])  # a list of lists
    for results in segment(dataset, batch_size=8, progress=True):  # rows of "image" and "expressions", streamed
        ...
    ```

    Needs a model and its processor; `pipeline` loads both.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(
        self,
        images: Any = None,
        expressions: Any = None,
        progress: bool = False,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **kwargs,
    ) -> Any:
        r"""
        Args:
            images: a path, URL, PIL image, array, or the bytes of an image's file; a list or a batched array of them; or rows
                `{"image": ..., "expressions": [...]}`: one, a list, a `datasets.Dataset`, a streamed one, any generator.
                The expressions of a row are strings, or mappings with a "text" as in this project's data sets.
            expressions: the expressions to look for: strings, for every image; or, with a list of images, one list of
                strings for each. They replace the expressions of rows.
            threshold (`float`): reject where the log-odds of `[SEG]` against `[REJ]` (`score`) are below it. The default
                is the calibrated threshold of the model, or 0.0, its own choice. With method="generate" the answer is
                already written: a higher one rejects more, a lower one changes nothing.
            method (`str`): "slots" (default) or "generate", see [`GsvaForConditionalGeneration.segment`].
            prompt (`str`): the name of the wording, see [`GsvaProcessor`].
            one_prompt_per_expression (`bool`): ask for each expression in a separate prompt.
            generate_kwargs (`dict`): arguments of `generate`, for method="generate".
            timeout (`float`): seconds to wait for a URL; by default without limit.
            progress: show a progress bar.
            batch_size, num_workers: how many images are answered together, and how many processes prepare them.

        Returns:
            For an image the list that [`GsvaProcessor.post_process_segmentation`] gives: per expression
            `{"text", "mask", "is_rejected", "score", "is_malformed", ...}`, mask a (height, width) boolean array. For a list
            of images a list of these lists. With `num_return_sequences` in `generate_kwargs`, each image has one such list
            per candidate. For a data set or generator an iterable of them, computed while it is read.

        Raises:
            ValueError: an image that cannot be read, no expressions, another number of lists than of images.
        """
        is_one, is_list = form_of(images)
        if isinstance(expressions, str):
            expressions = [expressions]
        if expressions is not None and any(not isinstance(expression, (str, Mapping)) for expression in expressions):
            if not (is_one or is_list):
                raise ValueError(
                    "A list of lists of expressions needs a list of images; rows of a stream bring their own."
                )
            rows = rows_of([images] if is_one else images, expressions)
            images, expressions = rows[0] if is_one else rows, None
        if expressions is not None:
            kwargs["expressions"] = expressions
        if is_one:
            return super().__call__(images, **kwargs)
        total = len(images) if isinstance(images, Sized) else None
        self._sanitize_parameters(**kwargs)  # raises here, not at the first result
        call = partial(super().__call__, batch_size=batch_size, num_workers=num_workers, **kwargs)

        def begin():
            return call(_Rows(images) if total is not None else _Stream(images))

        results = _Results(begin, total, progress)
        return list(results) if is_list else results

    def _sanitize_parameters(self, **kwargs):
        stages = (
            ("expressions", "prompt", "one_prompt_per_expression", "timeout"),
            ("method", "threshold", "generate_kwargs"),
        )
        if unknown := kwargs.keys() - {name for names in stages for name in names}:
            raise TypeError(f"{TASK} has no options {sorted(unknown)}; choose among {[n for s in stages for n in s]}.")
        if kwargs.get("threshold") is not None:
            check_threshold(kwargs["threshold"])
        return *({name: kwargs[name] for name in names if name in kwargs} for names in stages), {}

    def preprocess(self, row, **options) -> dict[str, Any]:
        return prepare(self.processor, row, **options)

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        """
        Overrides [`Pipeline.get_iterator`], whose workers get the whole pipeline with its model: under spawn and forkserver
        it would have to be pickled, which neither a large nor a compiled nor a used model can be.
        """
        process = partial(prepare, self.processor)
        if isinstance(inputs, Sized):
            rows: Dataset = PipelineDataset(inputs, process, preprocess_params)
        else:
            most = 0 if isinstance(getattr(inputs, "rows", inputs), Iterator) else 1
            if num_workers > most:
                logger.warning(
                    f"num_workers={num_workers} is too many for a stream, of which each worker would read every row; "
                    f"{most} is used. Pass a list or a data set with a length to prepare images in several processes."
                )
            num_workers = min(num_workers, most)
            rows = PipelineIterator(inputs, process, preprocess_params)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's threads do not survive a fork
        loader = DataLoader(
            rows,
            num_workers=num_workers,
            batch_size=batch_size,
            collate_fn=no_collate_fn if batch_size == 1 else collate,
        )
        outputs = PipelineIterator(loader, self.forward, forward_params, loader_batch_size=batch_size)
        return PipelineIterator(outputs, self.postprocess, postprocess_params)

    def _forward(self, model_inputs, method="slots", threshold=None, generate_kwargs=None) -> dict[str, Any]:
        examples = model_inputs["example"]
        inputs = self._join(examples if isinstance(examples, list) else [examples])
        options, decided = {}, threshold
        if method == "slots":
            options, decided = {"threshold": threshold}, None
        elif method == "generate":
            length = self.model.generation_config.max_new_tokens or MAX_NEW_TOKENS
            options = {"max_new_tokens": length, **(generate_kwargs or {})}
        else:
            raise ValueError(f"method={method!r} cannot answer without gold answers; choose 'slots' or 'generate'.")
        outputs = self.model.segment(**inputs, method=method, **options)
        results = self.processor.post_process_segmentation(outputs, inputs, threshold=decided)
        return {"results": results if isinstance(examples, list) else results[0]}

    def postprocess(self, model_outputs) -> list[dict[str, Any]]:
        return model_outputs["results"]

    def _join(self, examples: list[Mapping]) -> dict[str, Any]:
        """Return one batch of examples that hold an image each."""
        joined: dict[str, Any] = {}
        for name in examples[0]:
            parts = [part for example in examples for part in example[name]]
            if name == "expressions":
                joined[name] = parts
            elif name == "image_index":
                joined[name] = torch.cat([example[name] + n for n, example in enumerate(examples)])
            elif name in TEXT_INPUTS:  # all prompts end, and all answers begin, in the same column
                joined[name] = pad_sequence(
                    parts,
                    batch_first=True,
                    padding_value=self.tokenizer.pad_token_id if name.endswith("_ids") else 0,
                    padding_side="right" if name.startswith("answer") else "left",
                )
            else:
                joined[name] = joined_images([example[name] for example in examples])
        return joined

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save model, code and the whole processor, from which `pipeline` loads."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


if TASK not in PIPELINE_REGISTRY.get_supported_tasks():  # for models that are loaded already
    PIPELINE_REGISTRY.register_pipeline(TASK, GsvaPipeline, pt_model=AutoModelForImageTextToText, type="multimodal")

__all__ = ["GsvaPipeline"]
