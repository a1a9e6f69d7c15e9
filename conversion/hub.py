"""Bring models from the Hugging Face Hub, and converted ones to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.utils import httpx

# The files of a base in a Hub repository that are read.
BASE_FILES = ("*.json", "*.bin", "*.safetensors", "*.model")
HUB_ERRORS = (OSError, ValueError, httpx.HTTPError)


def is_hub_id(path: str) -> bool:
    """Return True if a path looks like the name of a repository and is no local path."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path)) and not Path(path).exists() and not Path(path).parent.exists()


def local_directory(path: str, option: str, files: Sequence[str] = BASE_FILES, without: Sequence[str] = ()) -> Path:
    """Return the directory of a base: a local one as it is, that of a Hub repository after downloading it.

    Args:
        files, without: Patterns of the names of the files that are downloaded, and of those that are not.

    Raises:
        FileNotFoundError: `path` neither exists nor is the name of a repository.
        NotADirectoryError: It is a file.
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists():
        raise NotADirectoryError(f"{option} {path} is a file: pass the directory with its config.json.")
    if is_hub_id(path):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(path, allow_patterns=list(files), ignore_patterns=list(without)))
        except HUB_ERRORS as error:
            raise FileNotFoundError(
                f"{option} {path} is no local path, and cannot be downloaded from the Hub ({error}). Check the name, log in with "
                "`hf auth login` if it is not public, or download it and pass its directory."
            ) from error
    raise FileNotFoundError(f"{option} {path} does not exist.")


def create_repository(repository: str) -> None:
    """Create a repository on the Hub unless it exists.

    Raises:
        ValueError: It cannot be reached or written.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
    except HUB_ERRORS as error:
        raise ValueError(
            f"--push_to_hub {repository} cannot be written, so nothing was converted ({error}). Log in with `hf auth login`, "
            "or leave --push_to_hub out and upload the result later."
        ) from error


def push(repository: str, folder: Path) -> None:
    """Upload a converted directory to the Hub.

    Raises:
        ValueError: The upload failed or was interrupted. The message has the command that repeats it.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    except (Exception, KeyboardInterrupt) as error:
        raise ValueError(
            f"{folder} is written and whole, but its upload to {repository} failed ({str(error) or type(error).__name__}). "
            f"Repeat the upload with: hf upload {repository} {folder}"
        ) from error
