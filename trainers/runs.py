"""The stages of a run, in the order in which `run_gres.py` calls them."""

import copy
import gc
import json
import logging
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_scripts.schema import encode_mask
from data_scripts.transforms import Wording, read_image
from modeling_gsva import GsvaForConditionalGeneration, GsvaProcessor

from .adapters import (
    ADAPTER,
    base_of,
    cast_trained,
    is_adapter,
    kept_apart,
    merge,
    quantization_config,
    save_adapter,
)
from .arguments import DataArguments, GsvaTrainingArguments, ModelArguments
from .card import CARD, TRAINING, undefined_in, write_card
from .collator import GsvaCollator
from .data import load_rows, pictures_in, training_data
from .evaluation import (
    PROTOCOL_NOTES,
    EvaluationPlan,
    answer,
    as_results,
    askable,
    conventions_for,
    cpu_threads,
    evaluate_rows,
    record,
)
from .kept_rows import KeptRows
from .parts import merged, moved_table, parts_table, prepare_for_training, snapshot, unmoved
from .pictures import contact_sheet, labelled_overlay, prediction_page, replacing, training_curves, write_text
from .report import RESULTS, exhibits, read_run, report_page
from .trainer import GsvaTrainer, last_complete_checkpoint

logger = logging.getLogger(__name__)

SHOWN = 6  # pictures of an evaluation on its contact sheet, which the card shows
# What a run publishes: nothing that names folders of this machine, and no file that others have put beside it.
PUBLISHED = ("*.safetensors", "*.json", "*.jinja", "*.py", CARD, "curves.png", "pictures_*")
UNPUBLISHED = (
    "*/*",
    ".*",
    "rows_*",
    "predictions*",
    "results.json",
    TRAINING,
)  # "*/*": of no folder, checkpoints among them


class ProcessorWording(Wording):
    """Training examples worded as the processor words evaluation: a small model need not learn twenty phrasings."""

    processor: GsvaProcessor

    def __init__(self, processor: GsvaProcessor):
        super().__init__(questions=("processor",), answers=(("processor", ""),))
        object.__setattr__(self, "processor", processor)

    def question(self, template, names):
        return self.processor.build_conversation(list(names))[0]["content"]

    def answer(self, template, names, present):
        return self.processor.build_conversation(list(names), [not there for there in present])[1]["content"]


def training_threads(args: GsvaTrainingArguments) -> int:
    """This process's share of the cores: `accelerate launch` leaves all but one idle where nobody says otherwise."""
    return args.threads or max((os.cpu_count() or 1) // PartialState().num_processes, 1)


def shares_weights(args: GsvaTrainingArguments) -> bool:
    """Whether training cuts the weights themselves in shares, one for each process: FSDP, or DeepSpeed's ZeRO-3."""
    if args.deepspeed_plugin is not None:
        return args.deepspeed_plugin.zero_stage == 3
    return args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")


def refuse_what_shards_cannot(model_args: ModelArguments, args: GsvaTrainingArguments) -> None:
    """
    Raises:
        ValueError: something is asked for that needs each process to hold the whole weights, and they are to be shared out.
    """
    if not (args.do_train and shares_weights(args)):
        return
    evaluated = args.eval_strategy.value if args.eval_strategy != "no" else None
    for name, value, instead in (
        ("feature_cache", args.feature_cache, "train without it"),
        ("quantization", model_args.quantization, "train without it, or data parallel (configs/accelerate/ddp.yaml)"),
        (
            "eval_strategy",
            evaluated,
            "give --eval_strategy no; --do_eval evaluates whole weights before and after training",
        ),
    ):
        if value:
            raise ValueError(
                f"{name}={value} is not possible where weights are shared out (FSDP, DeepSpeed ZeRO-3): {instead}."
            )


def load_model(
    args: ModelArguments, device: torch.device | str | None = None
) -> tuple[GsvaProcessor, GsvaForConditionalGeneration]:
    """
    Processor and model, on this process's device if no other is named. A local directory is read by the project's own
    classes, anything else as remote code. An adapter's directory gives its base with the adapter merged into it, as does a
    converted one with LoRA kept apart.

    Raises:
        ValueError: what is asked for is no GSVA model, or cannot be read.
    """
    if is_adapter(args.model):
        if args.quantization:
            raise ValueError(
                f"model={args.model!r} is an adapter, which cannot be merged into a quantized base: train from the merged "
                "model in the folder above it."
            )
        base = args.base_model or base_of(args.model)
        try:
            processor, model = load_model(replace(args, model=base, base_model=None), device)
            if kept_apart(base) is not None:  # it is merged by now
                return processor, model
        except ValueError as error:
            raise ValueError(
                f"model={args.model!r} is an adapter; name its base with --base_model: {error}"
            ) from error
        return processor, merge(model, args.model)
    apart = kept_apart(args.model)
    if apart is not None and args.quantization:
        raise ValueError(
            f"model={args.model!r} keeps its LoRA apart in {apart}, which cannot be merged into a quantized base: convert the "
            "checkpoint without --keep_lora."
        )
    options: dict[str, Any] = {"dtype": args.dtype}
    if args.quantization:
        options["quantization_config"] = quantization_config(args.quantization, args.dtype)
        options["device_map"] = {"": PartialState().device}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    try:
        if Path(args.model).is_dir():
            processor = GsvaProcessor.from_pretrained(args.model)
            model = GsvaForConditionalGeneration.from_pretrained(args.model, **options)
        else:
            processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
            model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, **options)
    except OSError as error:
        raise ValueError(
            f"model={args.model!r} cannot be loaded ({error}). Give a directory that save_pretrained or "
            "convert_checkpoint.py wrote, or a Hub id."
        ) from error
    if apart is not None:
        model = merge(model, apart)
    return processor, model if args.quantization else model.to(device or PartialState().device)


def _plan(
    args: DataArguments, training: GsvaTrainingArguments, protocol: str, rows=None, limit: int | None = None
) -> EvaluationPlan:
    limit = min((n for n in (limit, args.max_eval_samples) if n is not None), default=None)
    return EvaluationPlan(
        rows=load_rows(args, args.eval_split, limit, args.evaluated) if rows is None else rows,
        dataset=args.evaluated,
        split=args.eval_split,
        protocol=protocol,
        batch_size=training.per_device_eval_batch_size,
        one_prompt_per_expression=args.one_prompt_per_expression,
        threshold=args.threshold,
        convention=conventions_for(args.evaluated, args.conventions)[0],
        threads=training.threads or 1,
        max_new_tokens=args.max_new_tokens,
        ignore_region=args.ignore_region,
        task=args.eval_task,
    )


def read_results(output_dir: str | Path) -> list[dict[str, Any]]:
    """The records of `results.json`, none if it does not exist."""
    path = Path(output_dir) / RESULTS
    return json.loads(path.read_text()) if path.exists() else []


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What a later evaluation of the same kind replaces in `results.json`."""
    names = ("stage", "protocol", "convention", "dataset", "split", "prompts", "ignore_region")
    threshold = entry.get("threshold") if entry.get("protocol") == "slots" else None
    return (*(entry.get(name) for name in names), threshold)


def rows_name(plan: EvaluationPlan, stage: str) -> str:
    """The file of an evaluation's rows: one for each stage, protocol, way of asking, threshold and split."""
    words = [stage, plan.protocol, Path(plan.dataset).name, plan.split]
    words += ["one per prompt"] * plan.one_prompt_per_expression + ["ignored"] * (plan.ignore_region == "ignored")
    words += [f"threshold {plan.threshold}"] * (plan.protocol == "slots" and plan.threshold != 0)
    return re.sub(r"[^\w+-]+", "_", f"rows_{'_'.join(words)}") + ".jsonl"


def _in_order(found: list[tuple]) -> list[tuple]:
    """What all processes found, sorted by the index that comes first in each tuple."""
    gathered = gather_object(found) if PartialState().num_processes > 1 else found
    return sorted(gathered, key=lambda entry: entry[0])


def evaluate(processor, model, model_args, data_args, training_args, stage: str) -> None:
    """
    Runs every protocol and writes `results.json`, the rows and a page of pictures. A stage "before" that an earlier
    start of the same run has evaluated is not evaluated again.
    """
    output_dir, state = Path(training_args.output_dir), PartialState()
    # A record whose rows a killed evaluation has removed is none any more.
    done = [entry for entry in read_results(output_dir) if (output_dir / entry.get("rows", "")).exists()]
    resumed = training_args.resume and last_complete_checkpoint(output_dir)
    conventions = conventions_for(data_args.evaluated, data_args.conventions)
    dtype = str(model.dtype).removeprefix("torch.")
    for protocol in data_args.protocols:
        plan = _plan(data_args, training_args, protocol)
        plan.labels = {"stage": stage, "model": model_args.model}
        plan.resume, plan.save_masks = data_args.resume_eval, data_args.save_masks
        name = rows_name(plan, stage)
        plan.rows_file = output_dir / name
        wanted = {_key({**vars(plan), **plan.labels, "prompts": plan.prompts, "convention": c}) for c in conventions}
        known = wanted <= {_key(entry) for entry in done}
        if stage == "before" and resumed and known:
            continue
        result = evaluate_rows(model, processor, plan)
        if plan.save_masks and not result.has_masks:  # complete before, without the masks that are asked for now
            if state.is_main_process:
                print(f"{plan.rows_file} holds no masks; evaluating again for --save_masks", flush=True)
            state.wait_for_everyone()  # nobody reads the rows any more, which go now
            plan.resume = False
            result = evaluate_rows(model, processor, plan)
        if not state.is_main_process:
            continue
        if known and not result.has_masks:  # complete before, and with its pictures written
            print(results_table([entry for entry in done if _key(entry) in wanted]), flush=True)
            continue
        records = [
            {**record(result, plan, c, stage, model_args.model), "rows": name, "dtype": dtype} for c in conventions
        ]
        if result.has_masks:
            write_text(plan.rows_file.with_suffix(".pictures.json"), json.dumps(exhibits(plan, result)))
            count = min(data_args.num_pictures, len(plan.rows))
            asked = [askable(plan.rows[n], plan) for n in range(count)]
            pictures = [(row, as_results(rows)) for row, rows in zip(asked, result.pictures)]
            title = (
                f"{plan.dataset} {plan.split}, {protocol}, {stage if stage == 'as loaded' else stage + ' training'}"
            )
            page = prediction_page(title, results_table(records), pictures)
            page_file = output_dir / name.replace("rows_", "pictures_", 1).replace(".jsonl", ".html")
            write_text(page_file, page)
            sheet = contact_sheet(
                [labelled_overlay(read_image(row["image"]), found) for row, found in pictures[:SHOWN]]
            )
            with replacing(page_file.with_suffix(".png")) as temporary:
                sheet.save(temporary)
        done = [entry for entry in done if _key(entry) not in wanted] + records
        write_text(output_dir / RESULTS, json.dumps(done, indent=1))
        KeptRows(plan.rows_file).close()
        print(results_table(records), flush=True)
    if state.is_main_process and done:
        write_text(output_dir / "report.html", report_page([read_run(output_dir)]))


def train(processor, model, model_args, data_args, training_args):
    """Fine-tunes, resuming from the last complete checkpoint; returns the plain model and saves it in `output_dir`."""
    output_dir, state = Path(training_args.output_dir), PartialState()
    wording = ProcessorWording(processor) if data_args.wording == "processor" else Wording()
    dataset = training_data(data_args, training_args, wording)
    model = prepare_for_training(model, model_args)
    loaded_dtype = model.dtype
    if training_args.bf16 or training_args.fp16:
        cast_trained(model, torch.float32)  # steps smaller than half precision can hold; autocast does the rest
    if state.is_main_process:
        print(parts_table(model), flush=True)
    before = snapshot(model)
    # What is published is the finished model (`push`). Trainer would publish checkpoints, and leave their adapters in the
    # output folder, where from_pretrained puts them on top of the merged weights.
    trainer_args = copy.copy(training_args)
    trainer_args.push_to_hub = False
    trainer = GsvaTrainer(
        model=model,
        args=trainer_args,
        train_dataset=dataset,
        data_collator=GsvaCollator(processor, data_args.max_length),
        processing_class=processor,
        evaluation=_plan(
            data_args, training_args, data_args.protocols[0], limit=data_args.max_eval_samples_in_training
        )
        if training_args.do_eval
        else None,
        eval_dataset=[] if training_args.eval_strategy != "no" else None,
    )
    if trainer.features is not None and state.is_main_process:
        print(trainer.features.announce(pictures_in(dataset)), flush=True)
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint is None and training_args.resume:
        checkpoint = last_complete_checkpoint(output_dir)
    with cpu_threads(training_threads(training_args)):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    sharded = shares_weights(training_args)
    model = gathered(trainer, model_args) if sharded else trainer.accelerator.unwrap_model(trainer.model)
    if trainer.state.global_step and state.is_main_process:
        print(moved_table(model, before), flush=True)
        if still := unmoved(model, before):
            logger.warning("%d trained parameters did not move: %s", len(still), ", ".join(still[:8]))
    if state.is_main_process and isinstance(model, PeftModel):
        save_adapter(model, output_dir)
    if model_args.quantization:
        # Rounded weights are no good base: the adapter is merged into the original ones. What was trained stays in use.
        if state.is_main_process:
            save(processor, merge_into_base(model_args, output_dir / ADAPTER), output_dir)
        cast_trained(model, loaded_dtype)
    elif model is not None:
        model = merged(model).to(loaded_dtype)
        if state.is_main_process:
            save(processor, model, output_dir)
    if state.is_main_process:
        facts = {"pictures": pictures_in(dataset), "seconds": result.metrics["train_runtime"]}
        write_text(output_dir / TRAINING, json.dumps(facts))
        write_text(output_dir / "log_history.json", json.dumps(trainer.state.log_history, indent=1))
        training_curves(trainer.state.log_history, output_dir / "curves.png")
        print(f"trained {trainer.state.global_step} steps in {result.metrics['train_runtime']:.0f} s", flush=True)
    state.wait_for_everyone()
    if sharded and (training_args.do_eval or training_args.do_predict):
        trainer.accelerator.free_memory()
        del trainer, model  # the shards make room for the whole
        gc.collect()
        _, model = load_model(replace(model_args, model=str(output_dir), base_model=None))
    return model


def gathered(trainer: GsvaTrainer, args: ModelArguments) -> torch.nn.Module | None:
    """
    On the main process, in the processor's memory: the model as it was prepared for training, with the weights that all
    processes have trained and hold a share of. None on the others, which must call this, too.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return with_trained(load_model(args, "cpu")[1], args, weights) if PartialState().is_main_process else None


def with_trained(model: torch.nn.Module, args: ModelArguments, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """
    The plain model, prepared for training, with trained weights in it. They are named as parameters are or as in an adapter's
    file; frozen ones may be missing.

    Raises:
        ValueError: trained weights are missing, or some belong to another model.
    """
    model = prepare_for_training(model, args)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_adapter = {name.replace(".modules_to_save", "").replace(".default", ""): name for name in model.state_dict()}
    weights = {in_adapter.get(name, name): tensor for name, tensor in weights.items()}
    for name in trained.keys() & weights.keys():
        trained[name].data = trained[name].data.to(weights[name].dtype)  # float32 where the frozen rest is not
    keys = model.load_state_dict(weights, strict=False)
    if wrong := sorted(trained.keys() & set(keys.missing_keys)) + sorted(keys.unexpected_keys):
        raise ValueError(
            f"{len(wrong)} trained weights are missing or not this model's, among them {', '.join(wrong[:4])}; "
            "give --model, --train_language_model and --lora_r as they were in training."
        )
    return model


def consolidate(source: Path, model_args: ModelArguments, output_dir: Path) -> tuple[GsvaProcessor, torch.nn.Module]:
    """
    Processor and model with the trained weights of a file, or a folder of them, that accelerate's or DeepSpeed's tool has
    made of a checkpoint. They are saved in `output_dir` as at the end of training.

    Raises:
        ValueError: they are not there, or do not fit.
    """
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors")) or sorted(source.glob("*.bin"))
    if not files:
        raise ValueError(
            f"consolidated={str(source)!r} is no file, and no folder with .safetensors or .bin files in it."
        )
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        weights |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    processor, model = load_model(model_args, "cpu")
    dtype = model.dtype
    model = with_trained(model, model_args, weights)
    if PartialState().is_main_process and isinstance(model, PeftModel):
        save_adapter(model, output_dir)
    model = merged(model).to(dtype)
    if PartialState().is_main_process:
        save(processor, model, output_dir)
        print(f"saved {output_dir}", flush=True)
    return processor, model.to(PartialState().device)


def merge_into_base(args: ModelArguments, adapter: Path) -> GsvaForConditionalGeneration:
    """The unquantized base with the adapter merged into it, in the memory of the processor."""
    return merge(load_model(replace(args, quantization=None), "cpu")[1], adapter)


def save(processor, model, output_dir: Path) -> None:
    """Model and processor as a directory that the Auto classes load; written aside and moved file by file."""
    aside = output_dir / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    for file in aside.iterdir():
        file.replace(output_dir / file.name)
    aside.rmdir()


def predict(processor, model, data_args: DataArguments, training_args: GsvaTrainingArguments) -> None:
    """
    Looks for every expression in every picture file; writes overlays and `predictions.json`. Without picture files it
    predicts on the evaluation split and writes a page of pictures instead of overlays.
    """
    if not data_args.image:
        return predict_rows(processor, model, data_args, training_args)
    if not data_args.expressions:
        raise ValueError("--do_predict got pictures but no --expressions; say what to look for.")
    plan = _plan(data_args, training_args, data_args.protocols[0], rows=[])
    if plan.protocol == "teacher_forced":
        raise ValueError(
            "protocols=teacher_forced needs gold answers, which picture files have not; choose slots or generate."
        )
    for path in data_args.image:  # before the first is predicted
        if not Path(path).is_file():
            raise FileNotFoundError(f"--image {path} does not exist; give the path of a picture file.")
    if not PartialState().is_main_process:
        return
    output_dir, predictions = Path(training_args.output_dir), []
    for number, path in enumerate(data_args.image):
        image = read_image({"path": path, "bytes": None})
        with cpu_threads(plan.threads):
            (results,) = answer(model.eval(), processor, [image], [data_args.expressions], plan)
        overlay_file = f"{number:03d}_{Path(path).stem}.png"
        with replacing(output_dir / overlay_file) as temporary:
            labelled_overlay(image, results).save(temporary)
        predictions.append(
            {
                "image": path,
                "height": image.height,
                "width": image.width,
                "overlay": overlay_file,
                "protocol": plan.protocol,
                "protocol_note": PROTOCOL_NOTES[plan.protocol],
                "expressions": [_entry(result) for result in results],
            }
        )
        for result in results:
            said = "rejected" if result["is_rejected"] else f"{int(result['mask'].sum())} pixels"
            print(f"{path}: {result['text']}: {said} (score {result['score']:+.2f})")
    write_text(output_dir / "predictions.json", json.dumps(predictions, indent=1))


def _entry(result: dict[str, Any]) -> dict[str, Any]:
    """A result as `predictions.json` holds it: the mask as COCO RLE, the score null where the answer has no slot."""
    return {
        "text": result["text"],
        "is_rejected": result["is_rejected"],
        "score": None if math.isnan(result["score"]) else result["score"],
        "area": int(result["mask"].sum()),
        "mask": encode_mask(result["mask"]),
    }


def predict_rows(processor, model, data_args: DataArguments, training_args: GsvaTrainingArguments) -> None:
    """Predicts on the pictures of the evaluation split: `predictions.json` and a page of pictures."""
    output_dir = Path(training_args.output_dir)
    plan = _plan(data_args, training_args, data_args.protocols[0])
    found: list[tuple] = []

    def keep(index, row, results):
        entries = [_entry(result) for result in results]
        said = {"protocol": plan.protocol, "protocol_note": PROTOCOL_NOTES[plan.protocol]}
        prediction = {"image_id": row["image_id"], **said, "expressions": entries}
        found.append((index, prediction, (row, results) if index < data_args.num_pictures else None))

    evaluate_rows(model, processor, plan, keep)
    found = _in_order(found)
    if not PartialState().is_main_process:
        return
    write_text(output_dir / "predictions.json", json.dumps([prediction for _, prediction, _ in found], indent=1))
    note = f"{plan.protocol}: {PROTOCOL_NOTES[plan.protocol]}"
    shown = [pair for *_, pair in found if pair is not None]
    page = prediction_page(f"{plan.dataset} {plan.split}, {plan.protocol}", note, shown)
    write_text(output_dir / "predictions.html", page)


def describe(model_args: ModelArguments, data_args: DataArguments, training_args: GsvaTrainingArguments) -> None:
    """The model card of the run, `README.md` in the output directory."""
    if PartialState().is_main_process:
        write_card(model_args, data_args, training_args)


def push(args: GsvaTrainingArguments) -> None:
    """
    Uploads what lies in output_dir, each repository in one commit: the model with processor, card and pictures to
    `hub_model_id` (by default the name of output_dir), and the adapter alone to `hub_adapter_id`, if it is named.

    Raises:
        FileNotFoundError: there is no trained model, or no adapter, in output_dir.
    """
    if not PartialState().is_main_process:
        return
    output_dir, hub = Path(args.output_dir), HfApi(token=args.hub_token)
    uploads: dict[str, tuple[Path, list[str] | None, list[str] | None]]
    uploads = {args.hub_model_id or output_dir.name: (output_dir, list(PUBLISHED), list(UNPUBLISHED))}
    if args.hub_adapter_id:
        uploads[args.hub_adapter_id] = (output_dir / ADAPTER, None, None)
    for folder, sign in zip((folder for folder, *_ in uploads.values()), ("config.json", "adapter_config.json")):
        if not (folder / sign).is_file():
            raise FileNotFoundError(
                f"There is nothing to push: {folder} has no {sign}; give --do_train, and LoRA for an adapter."
            )
    for name, (folder, wanted, unwanted) in uploads.items():
        repository = hub.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=wanted, ignore_patterns=unwanted)
        print(f"pushed {folder} to {repository}", flush=True)


_COLUMNS = ("gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9", "malformed")


def results_table(records: list[dict[str, Any]]) -> str:
    """Records as a table of plain text; `-` where a metric is not defined, and below it why."""
    names = ("dataset", "split", "stage", "protocol", "prompts", "threshold", "convention")
    table = [[*names, "pictures", *_COLUMNS]]
    for entry in records:
        facts = [
            Path(entry["dataset"]).name,
            *(str(entry.get(name, "-")) for name in names[1:]),
            str(entry["samples"]),
        ]
        values = (entry["metrics"].get(name) for name in _COLUMNS)
        table.append(facts + ["-" if value is None else format(value, ".4f") for value in values])
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [
        "  ".join(
            f"{cell:{'<' if n < len(names) else '>'}{width}}" for n, (cell, width) in enumerate(zip(line, widths))
        )
        for line in table
    ]
    lines += undefined_in(records)
    if any(entry["protocol"] == "teacher_forced" for entry in records):
        lines.append(f"teacher_forced: {PROTOCOL_NOTES['teacher_forced']}")
    return "\n".join(lines)


def summary(args: GsvaTrainingArguments) -> None:
    """Prints what the run came to and where its pictures are."""
    if not PartialState().is_main_process:
        return
    output_dir = Path(args.output_dir)
    if records := read_results(output_dir):
        print(f"\n{results_table(records)}")
    pictures = sorted([*output_dir.glob("*.html"), *output_dir.glob("*.png"), *output_dir.glob("validation")])
    if pictures:
        print("\npictures:\n" + "\n".join(f"  {path}" for path in pictures))
