"""Names of the files and folders that a run leaves in its output folder."""

ADAPTER = "adapter"  # LoRA and the parts trained in full, without the base
CARD = "README.md"
CURVES = "curves.png"
DIVERGENCE = "divergence"  # batches at which training went wrong
LOG_HISTORY = "log_history.json"
RUN = "run.json"  # in each checkpoint: the settings that a resumed run has to keep
TENSORBOARD = "runs"
TRAINING = "training.json"  # number of training images and seconds, for the model card
VALIDATION = "validation"  # pictures of the evaluations during training
