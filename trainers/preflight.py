"""Check the needs of a run before its long work begins."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from data_scripts.files import replacing
from evaluation.records import RESULTS

from .arguments import GsvaTrainingArguments
from .output_folder import (
    ADAPTER,
    CARD,
    DIVERGENCE,
    EARLIER,
    LOCK,
    LOG_HISTORY,
    RUN,
    SKIPPED,
    TENSORBOARD,
    TRAINING,
    VALIDATION,
)
from .processes import on_main_process

# Files and folders that a run writes into its output folder.
WRITTEN = (
    *(ADAPTER, CARD, DIVERGENCE, LOG_HISTORY, RUN, TENSORBOARD, TRAINING, VALIDATION, RESULTS),
    *("checkpoint-*", "rows_*", "pictures_*", "predictions*", "report*.html", "*.png", "*.safetensors", "*_gsva.py"),
    *("*config.json", "tokenizer*.json", "special_tokens_map.json", "*.index.json", "chat_template*", "*.jinja"),
)


def check_before_run(args: GsvaTrainingArguments) -> None:
    """
    Check on the main process that the run can save and report its results. Every process must call this.

    Raises:
        ValueError: A reporter is not installed, or the Hub cannot be reached or written.
        OSError: The output folder cannot be written.
    """
    on_main_process(lambda: _check(args))


def _check(args: GsvaTrainingArguments) -> None:
    check_reporters(args.report_to)
    output_dir = Path(args.output_dir)
    with replacing(output_dir / f"{LOCK}.written") as temporary:
        temporary.write_text("")
    (output_dir / f"{LOCK}.written").unlink()
    (output_dir / SKIPPED).unlink(missing_ok=True)  # of an earlier start
    if args.do_train and not args.resume and args.resume_from_checkpoint is None:
        set_earlier_run_aside(output_dir)
    if args.push_to_hub:
        check_hub(args)


def check_reporters(names: str | list[str] | None) -> None:
    """Raise ValueError if a reporter of `report_to` does not exist or is not installed."""
    available = get_available_reporting_integrations()
    for name in [names] if isinstance(names, str) else names or []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to={name} is not known; choose of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}.")
        if name not in available:
            raise ValueError(f"report_to={name} is not installed: pip install {name}, or leave it out.")


def check_hub(args: GsvaTrainingArguments) -> None:
    """Raise ValueError if the repositories of `push_to_hub` cannot be written with the user's token."""
    names = [args.hub_model_id or Path(args.output_dir).name, *filter(None, [args.hub_adapter_id])]
    if constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub needs the Hub, but HF_HUB_OFFLINE is set; unset it, or leave push_to_hub out.")
    try:
        user = HfApi(token=args.hub_token).whoami()
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"push_to_hub: the Hub cannot be reached or does not know the token ({' '.join(str(error).split())}); log in with "
            "`hf auth login`, or give --hub_token."
        ) from None
    token = user.get("auth", {}).get("accessToken", {})
    owners = {user["name"], *(organization["name"] for organization in user.get("orgs", []))}
    for name in names:
        owner = name.rpartition("/")[0]
        if owner and owner not in owners:
            raise ValueError(
                f"push_to_hub: {user['name']} cannot write to {name}; give a name below {', '.join(sorted(owners))}."
            )
    if token.get("role") == "read":
        raise ValueError("push_to_hub: the token may only read; make one that may write, and log in with it.")


def set_earlier_run_aside(output_dir: Path) -> None:
    """Move the files of an earlier run to a subfolder, so that a new run can begin. Nothing is deleted."""
    if not (output_dir / RUN).exists() and not any(output_dir.glob("checkpoint-*")):
        return
    number = 1 + sum(1 for _ in output_dir.glob(f"{EARLIER}-*"))
    target = output_dir / f"{EARLIER}-{number}"
    target.mkdir()
    for entry in sorted({entry for pattern in WRITTEN for entry in output_dir.glob(pattern)}):
        os.rename(entry, target / entry.name)
    print(f"The earlier run in {output_dir} is now in {target}.", flush=True)
