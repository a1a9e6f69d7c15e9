"""The model card of a run: what was trained on what and how, what it came to, whose work it stands on."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import __version__ as transformers_version

from .arguments import DataArguments, GsvaTrainingArguments, ModelArguments
from .pictures import write_text

CARD = "README.md"
METRICS = ("gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9")
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

processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)
inputs = processor(images=[image], expressions=[["the man in red", "the unicorn"]], return_tensors="pt")
results = processor.post_process_segmentation(model.segment(**inputs), inputs)
```"""


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _licence_of(base: str) -> str | None:
    """The licence that a local base's own card names."""
    path = Path(base) / CARD
    return ModelCard.load(path).data.get("license") if path.is_file() else None


def _trained_on(data: DataArguments) -> str:
    if data.dataset != "mixture":
        return data.dataset
    return f"mixture of {data.mixture or 'the original data sets'}, rates {data.mixture_rates or '9, 3, 3, 1'}"


def _training(model: ModelArguments, data: DataArguments, training: GsvaTrainingArguments, history: list[dict]) -> str:
    learns = {"lora": f"LoRA, rank {model.lora_r}, alpha {model.lora_alpha}, dropout {model.lora_dropout}"}
    rows = {
        "base": f"`{model.model}`",
        "language model": learns.get(model.train_language_model, model.train_language_model)
        + (f", over a base in {model.quantization}" if model.quantization else ""),
        "data": _trained_on(data),
        "split": data.train_split,
        "pictures": data.max_train_samples or "all",
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
        "transformers": transformers_version,
    }
    return _table(rows)


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
    return "\n".join([*lines, "", *(f"- {protocol}: {note}." for protocol, note in notes.items())])


def write_card(model: ModelArguments, data: DataArguments, training: GsvaTrainingArguments) -> Path:
    """
    Writes `OUTPUT_DIR/README.md` from the arguments and from what the run left: results.json, log_history.json and
    pictures. Numbers that are not there are not in it.
    """
    output_dir = Path(training.output_dir)

    def read(name: str) -> list[dict]:
        return json.loads((output_dir / name).read_text()) if (output_dir / name).is_file() else []

    records, licence = read("results.json"), _licence_of(model.model)
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
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=["gsva", "referring-expression-segmentation"],
        license=licence or "other",
        model_name=output_dir.name,
        eval_results=evaluated or None,
    )
    files = [path for path in sorted(output_dir.glob("*.png")) if path.name == "curves.png"]
    pages = sorted(path.name for path in output_dir.glob("*.html"))
    introduction = (
        "GSVA segments what an expression names and rejects the expressions whose thing is not in the picture: "
        f"`{model.model}` after training on {data.dataset}."
    )
    sections = [
        f"---\n{front.to_yaml()}\n---",
        f"# {output_dir.name}",
        introduction,
        f"## Use\n\n{USE}",
        f"## Results\n\n{_results(records)}",
        f"## Training\n\n{_training(model, data, training, read('log_history.json'))}",
        *(f"![{path.stem}]({path.name})" for path in files),
        *(["Pictures: " + ", ".join(f"[{name}]({name})" for name in pages) + "."] if pages else []),
        f"## Licences\n\nThe base's card states `{licence}`." if licence else f"## Licences\n\n{BASES}",
        f"## Citation\n\n{CITATION}",
    ]
    told = {**asdict(data), **asdict(model)}
    for private in ("data_dir", "image", "expressions"):  # of the machine, not of the model
        told.pop(private)
    options = {name: value for name, value in told.items() if value not in (None, [], "")}
    sections.append(
        "<details><summary>All arguments of data and model</summary>\n\n```json\n"
        f"{json.dumps(options, indent=1, default=str)}\n```\n</details>"
    )
    write_text(output_dir / CARD, "\n\n".join(sections) + "\n")
    return output_dir / CARD
