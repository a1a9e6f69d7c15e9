"""Save and publish a trained model."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import HfApi
from peft import PeftModel

from conversion.writing import without_progress_bar
from data_scripts.files import adding_files, render, replacing_folder, write_text
from evaluation.predict_dataset import SHARDS
from evaluation.records import RESULTS

from .arguments import GsvaTrainingArguments
from .output_folder import ADAPTER, CARD, CURVES, RUN, TRAINING

PREDICTIONS_CARD = Path(__file__).parent / "templates" / "predictions_card.md.jinja"
# Files that a run publishes. Nothing in them names folders of this machine, and files that others put beside them stay.
PUBLISHED = ("*.safetensors", "*.json", "*.jinja", "*.py", CARD, CURVES, "pictures_*")
# Not published although PUBLISHED matches them. "*/*": all subfolders, such as checkpoints.
UNPUBLISHED = ("*/*", ".*", "rows_*", "predictions*", RESULTS, TRAINING, RUN)


def save(processor, model, output_dir: Path) -> None:
    """Save model and processor as a directory that the Auto classes load. Files are moved in when all are written."""
    with adding_files(output_dir) as folder:
        with without_progress_bar():
            model.save_pretrained(folder)
        processor.save_pretrained(folder)


def save_adapter(model: PeftModel, output_dir: Path) -> Path:
    """Save LoRA and the fully trained parts, without the base, in `OUTPUT_DIR/adapter`, and return that path."""
    with replacing_folder(output_dir / ADAPTER) as folder:
        # The embedding layers are among the fully trained parts already (modules_to_save).
        model.save_pretrained(folder, save_embedding_layers=False)
    return output_dir / ADAPTER


def push(args: GsvaTrainingArguments) -> None:
    """
    Upload the results in `output_dir`, each repository in one commit.

    The model with processor, card and pictures goes to `hub_model_id` (by default the name of `output_dir`), and the adapter
    alone to `hub_adapter_id` if it is given.

    Raises:
        FileNotFoundError: There is no trained model, or no adapter, in `output_dir`.
        ValueError: An upload failed. The message says how to repeat it.
    """
    if not PartialState().is_main_process:
        return
    output_dir, hub = Path(args.output_dir), HfApi(token=args.hub_token)
    uploads: dict[str, tuple[Path, list[str] | None, list[str] | None]]
    uploads = {args.hub_model_id or output_dir.name: (output_dir, list(PUBLISHED), list(UNPUBLISHED))}
    if args.hub_adapter_id:
        uploads[args.hub_adapter_id] = (output_dir / ADAPTER, None, None)
    for folder, required in zip((folder for folder, *_ in uploads.values()), ("config.json", "adapter_config.json")):
        if not (folder / required).is_file():
            raise FileNotFoundError(
                f"There is nothing to push: {folder} has no {required}; give --do_train, and LoRA for an adapter."
            )
    for name, (folder, allowed, ignored) in uploads.items():
        _upload(hub, name, folder, args, allow_patterns=allowed, ignore_patterns=ignored)


def push_predictions(args: GsvaTrainingArguments, facts: dict[str, Any]) -> None:
    """
    Upload the shards of predictions in `output_dir`, with a card, as the data set `hub_model_id` (by default the name of
    `output_dir`), which `load_dataset` opens.

    Args:
        facts: What the card says of the predictions.

    Raises:
        ValueError: The upload failed. The message says how to repeat it.
    """
    if not PartialState().is_main_process:
        return
    output_dir = Path(args.output_dir)
    write_text(output_dir / CARD, render(PREDICTIONS_CARD, facts=facts))
    name = args.hub_model_id or output_dir.name
    _upload(HfApi(token=args.hub_token), name, output_dir, args, "dataset", allow_patterns=[SHARDS, CARD])


def _upload(
    hub: HfApi, name: str, folder: Path, args: GsvaTrainingArguments, kind: str = "model", **patterns: Any
) -> None:
    """Upload a folder in one commit to a repository, which is made if it does not exist."""
    again = f"hf upload {name} {folder}" + (f" --repo-type {kind}" if kind != "model" else "")
    try:
        repository = hub.create_repo(name, private=args.hub_private_repo, exist_ok=True, repo_type=kind).repo_id
        hub.upload_folder(repo_id=repository, folder_path=folder, repo_type=kind, **patterns)
    except OSError as error:  # errors of the Hub are among them
        raise ValueError(
            f"{folder} could not be pushed to {name} ({error}). It is complete: run the same command again, which repeats "
            f"nothing else, or `{again}`."
        ) from error
    print(f"pushed {folder} to {repository}", flush=True)
