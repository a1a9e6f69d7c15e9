"""Save and publish what a run has trained."""

import shutil
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import HfApi
from peft import PeftModel

from .arguments import GsvaTrainingArguments
from .card import CARD, TRAINING
from .loading import ADAPTER

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


def save(processor, model, output_dir: Path) -> None:
    """Model and processor as a directory that the Auto classes load; written aside and moved file by file."""
    aside = output_dir / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.save_pretrained(aside)
    for file in aside.iterdir():
        file.replace(output_dir / file.name)
    aside.rmdir()


def save_adapter(model: PeftModel, output_dir: Path) -> Path:
    """`OUTPUT_DIR/adapter`: LoRA and the parts trained in full, without the base; written aside and moved."""
    folder, aside = output_dir / ADAPTER, output_dir / f".{ADAPTER}"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, save_embedding_layers=False)  # they are in it already, as modules_to_save
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return folder


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
