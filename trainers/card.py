"""The model card of a run: data, hyper-parameters, results, licences of the bases, citation."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markupsafe import Markup
from transformers import __version__ as transformers_version

from data_scripts.files import render, write_text
from evaluation.measured import measured_on
from evaluation.records import (
    Record,
    fact_cells,
    metric_cells,
    metric_notes,
    protocol_notes,
    read_results,
    shown_keys,
)
from metrics.gres import METRIC_KEYS
from modeling_gsva.llava_v1_gsva import LlavaV1Config

from .arguments import DataArguments, GsvaTrainingArguments, ModelArguments
from .output_folder import ADAPTER, CARD, LOG_HISTORY, TRAINING
from .run_record import changes_table, read_record

TEMPLATE = Path(__file__).resolve().parent / "templates" / "model_card.md.jinja"
# Facts and metrics in the table of results.
FACTS = ("dataset", "split", "stage", "protocol", "convention", "samples")


def markdown(text: Any) -> Markup:
    """Return text escaped for a line or a table cell of Markdown.

    >>> markdown("a|b <script> it's")
    Markup("a\\\\|b &lt;script&gt; it's")
    """
    line = " ".join(str(text).split())
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        line = line.replace(character, escaped)
    return Markup(line)


def card_of(base: str) -> ModelCard | None:
    """Return the base's card; None if there is none, or no connection to the Hub."""
    path = Path(base) / CARD
    try:
        return ModelCard.load(path if Path(base).is_dir() else base)
    except (OSError, ValueError):
        return None


def licence_of(base: str) -> str | None:
    """Return the licence that the base's card names, or None."""
    card = card_of(base)
    return None if card is None else card.data.get("license")


def parts_with_licences(base: str, output_dir: Path) -> dict[str, str]:
    """
    Return what the model was made of and the licences of these parts, by the part; empty for LLaVA v1 with SAM.

    The card of a start by `convert_checkpoint.py --base` states both. Where there is none, the trained model's configuration
    tells the types.
    """
    path = output_dir / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kinds = {
        "base": config.get("vlm_config", {}).get("model_type", LlavaV1Config.model_type),
        "mask model": config.get("sam_config", {}).get("model_type", "sam"),
    }
    if kinds == {"base": LlavaV1Config.model_type, "mask model": "sam"}:
        return {}
    card = card_of(base)
    stated = dict(
        re.findall(r"^\| (base|mask model) \| (.+) \|$", card.text if card is not None else "", re.MULTILINE)
    )
    return {part: stated.get(part, f"of the type {kind}, licence not stated") for part, kind in kinds.items()}


def public_name(base: str) -> str:
    """Return a Hub id or a relative path unchanged, and only the last part of an absolute path."""
    return Path(base).name if Path(base).is_absolute() else base


def training_facts(
    model: ModelArguments,
    data: DataArguments,
    training: GsvaTrainingArguments,
    history: list[dict],
    measured: dict[str, Any],
    record: dict[str, Any],
) -> dict[str, Any]:
    """Return the rows of the card's table on training."""
    language_model = model.train_language_model
    if language_model == "lora":
        language_model = f"LoRA, rank {model.lora_r}, alpha {model.lora_alpha}, dropout {model.lora_dropout}"
    if model.quantization:
        language_model += f", over a base in {model.quantization}"
    return {
        "base": f"`{public_name(model.model)}`",
        "language model": language_model,
        "data": data_name(data),
        "split": data.train_split,
        "pictures": f"{measured['pictures']:,}" if "pictures" in measured else data.max_train_samples or "all",
        "expressions per picture": data.num_expressions,
        "wording": data.wording,
        "steps": max((entry.get("step", 0) for entry in history), default=0),
        "batch": f"{training.per_device_train_batch_size} per device x {training.world_size} devices x "
        f"{training.gradient_accumulation_steps} micro-batches",
        "optimizer": f"{getattr(training.optim, 'value', training.optim)}, learning rate {training.learning_rate:g}, betas "
        f"{training.adam_beta1:g} and {training.adam_beta2:g}, weight decay {training.weight_decay:g}",
        "schedule": f"{getattr(training.lr_scheduler_type, 'value', training.lr_scheduler_type)}, "
        f"{training.warmup_steps:g} warm-up steps, gradients clipped at {training.max_grad_norm:g}",
        "precision": "bfloat16" if training.bf16 else "float16" if training.fp16 else model.dtype,
        "seed": training.seed,
        "changed on the way": "; ".join(changes_table(record)) or "nothing",
        "time": f"{measured['seconds']:.0f} s of the last start" if "seconds" in measured else "not recorded",
        "transformers": transformers_version,
    }


def data_name(data: DataArguments) -> str:
    """Return the name of the training data, with the parts of a mixture."""
    if data.dataset != "mixture":
        return data.dataset
    return f"mixture of {data.mixture or 'the original data sets'}, rates {data.mixture_rates or '9, 3, 3, 1'}"


def public_arguments(model: ModelArguments, data: DataArguments) -> dict[str, Any]:
    """Return the arguments of data and model that are set, without folders of this machine."""
    arguments = {**asdict(data), **asdict(model), "model": public_name(model.model)}
    for private in ("data_dir", "image", "expressions"):
        arguments.pop(private)
    arguments["dataset_options"] = {k: v for k, v in data.options.items() if k != "cache_dir"} or None
    return {name: value for name, value in arguments.items() if value not in (None, [], "")}


def evaluation_results(records: list[dict]) -> list[EvalResult]:
    """Return the metrics after training in the form of the Hub's metadata."""
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=record["dataset"],
            dataset_name=record["dataset"],
            dataset_split=record["split"],
            metric_type=name,
            metric_name=f"{name} ({record['protocol']}, {record['convention']})",
            metric_value=record["metrics"][name],
        )
        for record in records
        if record["stage"] == "after"
        for name in METRIC_KEYS
        if record["metrics"].get(name) is not None
    ]


def result_cells(record: Record, keys: Sequence[str]) -> list[Markup]:
    """Return the cells of a record in the table of results, which shows these metrics."""
    facts = fact_cells(record)
    return [
        *(markdown(facts[name]) for name in FACTS),
        *(markdown(cell.text) for cell in metric_cells(record, keys).values()),
    ]


def write_card(model: ModelArguments, data: DataArguments, training: GsvaTrainingArguments) -> Path:
    """
    Write `OUTPUT_DIR/README.md`, and the adapter's card beside the adapter; return the former's path.

    All facts come from the arguments and from files of the run: results.json, training.json, log_history.json and
    pictures. A number that is in none of them is not in the card.
    """
    output_dir = Path(training.output_dir)

    def read(name: str) -> Any:
        path = output_dir / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    records, licence = read_results(output_dir), licence_of(model.model)
    notes = [*(f"{protocol}: {note}" for protocol, note in protocol_notes(records).items()), *metric_notes(records)]
    notes += measured_on(records)
    keys = shown_keys(records)
    table = training_facts(model, data, training, read(LOG_HISTORY), dict(read(TRAINING)), read_record(output_dir))
    facts = {
        "base": markdown(public_name(model.model)),
        "data": markdown(data_name(data)),
        "columns": (*FACTS, *keys),
        "results": [result_cells(record, keys) for record in records],
        "notes": [markdown(note) for note in notes],
        "training": {name: markdown(value) for name, value in table.items()},
        "licence": licence,
        "parts": {part: markdown(what) for part, what in parts_with_licences(model.model, output_dir).items()},
        # In a fenced block, which only a line of backticks would end; JSON has no such line.
        "arguments": Markup(json.dumps(public_arguments(model, data), indent=1, default=str)),
    }

    def write(folder: Path, name: str, is_adapter: bool, pictures: list[str], pages: list[str]) -> None:
        front = ModelCardData(
            library_name="peft" if is_adapter else "transformers",
            pipeline_tag="image-segmentation",
            tags=["gsva", "referring-expression-segmentation"],
            license=licence or "other",
            base_model=None if Path(model.model).exists() else model.model,  # the Hub only takes ids of its models
            model_name=name,
            eval_results=evaluation_results(records) or None,
        )
        text = render(
            TEMPLATE,
            **facts,
            front=Markup(front.to_yaml()),
            name=markdown(name),
            is_adapter=is_adapter,
            pictures=pictures,
            pages=pages,
        )
        write_text(folder / CARD, text)

    names = sorted(path.name for path in output_dir.glob("*.png"))
    pictures = [name for name in names if name.startswith(("curves", "pictures_after"))]
    pages = sorted(path.name for path in output_dir.glob("*.html"))
    write(output_dir, training.hub_model_id or output_dir.name, False, pictures, pages)
    if (adapter := output_dir / ADAPTER).is_dir():
        write(adapter, training.hub_adapter_id or f"{output_dir.name}/adapter", True, [], [])
    return output_dir / CARD
