"""The model card of a run: what was trained on what and how, what it came to, whose work it stands on."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import __version__ as transformers_version

from data_scripts.files import write_text

from .arguments import DataArguments, GsvaTrainingArguments, ModelArguments

CARD = "README.md"
TRAINING = "training.json"  # what a run notes for its card: pictures it could draw from, seconds it took
METRICS = ("gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9", "malformed")
# What the paper's models are built from, for a base whose own card names no licence.
BASES = """The weights may derive from these; their licences apply:

| part | work | licence |
| --- | --- | --- |
| language model | LLaMA / Vicuna through LLaVA | Meta's licence of LLaMA, not for commercial use in its first version |
| vision tower | CLIP ViT-L/14 | MIT |
| masks | Segment Anything | Apache-2.0 |
| method and original code | GSVA, built on LISA | Apache-2.0 |"""
CITATION = """```bibtex
@InProceedings{Xia_2024_CVPR,
    author    = {Xia, Zhuofan and Han, Dongchen and Han, Yizeng and Pan, Xuran and Song, Shiji and Huang, Gao},
    title     = {GSVA: Generalized Segmentation via Multimodal Large Language Models},
    booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
    month     = {June},
    year      = {2024},
    pages     = {3858-3869}
}
```"""
USE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
inputs = processor(images=[image], expressions=[["the man in red", "the unicorn"]], return_tensors="pt")
results = processor.post_process_segmentation(model.segment(**inputs), inputs)
```"""


USE_ADAPTER = """This is the adapter alone (LoRA and the parts that were trained in full); it needs its base.

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{base}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{name}").merge_and_unload()
inputs = processor(images=[image], expressions=[["the man in red", "the unicorn"]], return_tensors="pt")
results = processor.post_process_segmentation(model.segment(**inputs), inputs)
```"""


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _licence_of(base: str) -> str | None:
    """The licence that the base's own card names."""
    path = Path(base) / CARD
    try:
        return ModelCard.load(path if Path(base).is_dir() else base).data.get("license")
    except (OSError, ValueError):  # no card, or no Hub to ask
        return None


def _named(base: str) -> str:
    """A base as a reader knows it: a Hub id or a relative path as it is, of any other path the last part."""
    return Path(base).name if Path(base).is_absolute() else base


def _trained_on(data: DataArguments) -> str:
    if data.dataset != "mixture":
        return data.dataset
    return f"mixture of {data.mixture or 'the original data sets'}, rates {data.mixture_rates or '9, 3, 3, 1'}"


def _training(
    model: ModelArguments,
    data: DataArguments,
    training: GsvaTrainingArguments,
    history: list[dict],
    facts: dict[str, Any],
) -> str:
    learns = {"lora": f"LoRA, rank {model.lora_r}, alpha {model.lora_alpha}, dropout {model.lora_dropout}"}
    rows = {
        "base": f"`{_named(model.model)}`",
        "language model": learns.get(model.train_language_model, model.train_language_model)
        + (f", over a base in {model.quantization}" if model.quantization else ""),
        "data": _trained_on(data),
        "split": data.train_split,
        "pictures": f"{facts['pictures']:,}" if "pictures" in facts else data.max_train_samples or "all",
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
        "time": f"{facts['seconds']:.0f} s of the last start" if "seconds" in facts else "not recorded",
        "transformers": transformers_version,
    }
    return _table(rows)


def undefined_in(records: list[dict]) -> list[str]:
    """A sentence for each metric of a split that is `-` in a table, such as "N_acc on refcoco val: not defined here: ..."."""
    told = (
        f"{name} on {Path(record['dataset']).name} {record['split']}: {note}"
        for record in records
        for name, note in record.get("notes", {}).items()
        if name in METRICS
    )
    return list(dict.fromkeys(told))


def _results(records: list[dict]) -> str:
    if not records:
        return "Not evaluated."
    names = ("dataset", "split", "stage", "protocol", "convention", "samples")
    lines = ["| " + " | ".join((*names, *METRICS)) + " |", "| --- " * (len(names) + len(METRICS)) + "|"]
    for record in records:
        values = [record["metrics"].get(name) for name in METRICS]
        numbers = ["-" if value is None or math.isnan(value) else f"{value:.4f}" for value in values]
        lines.append("| " + " | ".join([*(str(record[name]) for name in names), *numbers]) + " |")
    notes = {record["protocol"]: record["protocol_note"] for record in records}
    told = [*(f"{protocol}: {note}" for protocol, note in notes.items()), *undefined_in(records)]
    return "\n".join([*lines, "", *(f"- {sentence}." for sentence in told)])


def write_card(model: ModelArguments, data: DataArguments, training: GsvaTrainingArguments) -> Path:
    """
    Writes `OUTPUT_DIR/README.md`, and beside an adapter its own, from the arguments and from what the run left:
    results.json, training.json, log_history.json and pictures. Numbers that are not there are not in it.
    """
    output_dir = Path(training.output_dir)

    def read(name: str) -> Any:
        return json.loads((output_dir / name).read_text()) if (output_dir / name).is_file() else []

    records, licence, base = read("results.json"), _licence_of(model.model), _named(model.model)
    evaluated = [
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
        for name in METRICS
        if record["metrics"].get(name) is not None
    ]
    told = {**asdict(data), **asdict(model), "model": base}
    for private in ("data_dir", "image", "expressions"):  # of the machine, not of the model
        told.pop(private)
    told["dataset_options"] = {name: value for name, value in data.options.items() if name != "cache_dir"} or None
    options = {name: value for name, value in told.items() if value not in (None, [], "")}
    told_as_json = json.dumps(options, indent=1, default=str)
    facts = (
        f"## Results\n\n{_results(records)}",
        f"## Training\n\n{_training(model, data, training, read('log_history.json'), dict(read(TRAINING)))}",
    )
    sources = (
        f"## Licences\n\nThe base's card states `{licence}`." if licence else f"## Licences\n\n{BASES}",
        f"## Citation\n\n{CITATION}",
        f"<details><summary>All arguments of data and model</summary>\n\n```json\n{told_as_json}\n```\n</details>",
    )

    def write(folder: Path, name: str, library: str, use: str, pictures: list[str]) -> None:
        front = ModelCardData(
            library_name=library,
            pipeline_tag="image-segmentation",
            tags=["gsva", "referring-expression-segmentation"],
            license=licence or "other",
            base_model=None if Path(model.model).exists() else model.model,  # the Hub takes ids of its own
            model_name=name,
            eval_results=evaluated or None,
        )
        introduction = (
            "GSVA segments what an expression names and rejects the expressions whose thing is not in the picture: "
            f"`{base}` after training on {_trained_on(data)}."
        )
        head = (
            f"---\n{front.to_yaml()}\n---",
            f"# {name}",
            introduction,
            f"## Use\n\n{use.format(name=name, base=base)}",
        )
        write_text(folder / CARD, "\n\n".join([*head, *facts, *pictures, *sources]) + "\n")

    shown = [
        path.name for path in sorted(output_dir.glob("*.png")) if path.name.startswith(("curves", "pictures_after"))
    ]
    pages = sorted(path.name for path in output_dir.glob("*.html"))
    pictures = [f"![{Path(name).stem}]({name})" for name in shown]
    pictures += ["Pictures: " + ", ".join(f"[{name}]({name})" for name in pages) + "."] if pages else []
    write(output_dir, training.hub_model_id or output_dir.name, "transformers", USE, pictures)
    if (adapter := output_dir / "adapter").is_dir():
        write(adapter, training.hub_adapter_id or f"{output_dir.name}/adapter", "peft", USE_ADAPTER, [])
    return output_dir / CARD
