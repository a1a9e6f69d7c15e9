"""Names of the files and folders that a run leaves in its output folder."""

from pathlib import Path

ADAPTER = "adapter"  # LoRA and the parts trained in full, without the base
CARD = "README.md"
CURVES = "curves.png"
DIVERGENCE = "divergence"  # batches at which training went wrong
EARLIER = "earlier"  # with a number: an earlier run that --resume false has moved away
LOCK = ".lock"  # held while a run writes to the folder
LOG_HISTORY = "log_history.json"
PREDICTIONS_RUN = "predictions_run.json"  # what made the shards of predictions beside it
RUN = "run.json"  # there and in each checkpoint: digests and arguments that made the weights
SKIPPED = "skipped_images.txt"  # images that --on_bad_image skip has left out
TENSORBOARD = "runs"
TRAINING = "training.json"  # number of training images and seconds, for the model card
VALIDATION = "validation"  # pictures of the evaluations during training


def where_to_look(output_dir: Path) -> str:
    """Return the last line of a run: its newest page of pictures and what tells about all of it. Empty where there is none."""
    pages = sorted(output_dir.glob("pictures_*.html"), key=lambda path: path.stat().st_mtime_ns)
    others = (output_dir / name for name in ("report.html", "predictions.html", CURVES, VALIDATION))
    paths = [*pages[-1:], *(path for path in others if path.exists())]
    return f"\nlook at {', '.join(map(str, paths))}\n" if paths else ""
