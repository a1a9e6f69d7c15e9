"""All arguments of `run_gres.py`, as dataclasses that are read from a YAML preset and the command line."""

import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from data_scripts.negatives import LIKE as NEGATIVES_LIKE
from data_scripts.negatives import check_negatives
from evaluation.config import IGNORE_REGIONS, PROTOCOLS, TASKS, check_choice
from evaluation.prediction_rows import MASKS
from evaluation.requests import check_expressions
from metrics.gres import CONVENTIONS

from .guard import GUARDS, check_best_metric, check_guard
from .inherited_arguments import refuse_unsupported
from .threads import usable_cores

TRAIN_LANGUAGE_MODEL = ("lora", "full", "frozen")
TRAIN_TOKENS = ("all", "new")
QUANTIZATIONS = ("4bit", "8bit")
# Files of configs/architectures: the paper's two models, and bases of today.
ARCHITECTURES = ("7b", "13b", "llava15_sam2", "qwen3vl_4b_sam2", "smolvlm_500m_sam2")


def _json_object(name: str, text: str | None) -> dict | None:
    try:
        return dict(json.loads(text)) if text else None
    except (TypeError, ValueError):
        raise ValueError(f"{name}={text!r} is no JSON object; write '{{\"name\": ...}}'.") from None


@dataclass
class ModelArguments:
    """Model to use, and how its parts are trained."""

    model: str = field(default="assets/tiny_gsva", metadata={"help": "Directory or Hub id of a GSVA model."})
    base_model: str | None = field(
        default=None, metadata={"help": "Base of an adapter that `model` names; by default the one it was trained on."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Type of the loaded weights: float32, bfloat16, float16 or auto."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or flash_attention_2."})
    train_language_model: str = field(
        default="lora", metadata={"help": f"Training of the language model: {', '.join(TRAIN_LANGUAGE_MODEL)}."}
    )
    # The original's: rank 8 for the 7B model, alpha 16, dropout 0.05, on the language model's q and v projections.
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA, divided by the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before LoRA."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Last names of the language model's layers that get LoRA; default: its projections to queries and values."
        },
    )
    train_tokens: str = field(
        default="all",
        metadata={
            "help": "With LoRA: train 'all' rows of the embedding and the language head, or only the 'new' ones of [SEG] and [REJ]."
        },
    )
    quantization: str | None = field(
        default=None,
        metadata={
            "help": f"QLoRA: load the language model's frozen layers in {' or '.join(QUANTIZATIONS)} (bitsandbytes)."
        },
    )
    object_score_loss_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the loss of SAM 2's object score, a second sign of absence. Default: the model's, 0 for new ones."
        },
    )
    architecture: str | None = field(
        default=None,
        metadata={"help": f"--plan: size of `model` if it is not on this machine: {', '.join(ARCHITECTURES)}."},
    )

    def __post_init__(self):
        check_choice("train_language_model", self.train_language_model, TRAIN_LANGUAGE_MODEL)
        check_choice("train_tokens", self.train_tokens, TRAIN_TOKENS)
        if self.train_tokens == "new" and self.train_language_model != "lora":
            raise ValueError(
                f"train_tokens='new' is for training with LoRA, not for train_language_model={self.train_language_model!r}; "
                "leave one of them out."
            )
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
            if self.train_language_model != "lora":
                raise ValueError(
                    f"quantization={self.quantization!r} needs training with adapters (QLoRA), not "
                    f"train_language_model={self.train_language_model!r}; choose 'lora'."
                )
        if self.architecture is not None:
            check_choice("architecture", self.architecture, ARCHITECTURES)


@dataclass
class DataArguments:
    """Data to use, wording of the examples, and how answers are evaluated."""

    dataset: str = field(
        default="shapes",
        metadata={
            "help": "Data set to train on: a name of data_scripts.names(), or 'mixture' for several. --do_predict also takes a "
            "folder of images, parquet, arrow or webdataset files, or a Hub id."
        },
    )
    mixture: str | None = field(
        default=None,
        metadata={"help": "dataset=mixture: names of the data sets of each family, as JSON; default: the original's."},
    )
    mixture_rates: str | None = field(
        default=None,
        metadata={"help": "dataset=mixture: rate of each family, as JSON; default: the original's 9, 3, 3, 1."},
    )
    steps_per_epoch: int = field(
        default=500, metadata={"help": "dataset=mixture: optimizer steps per epoch (original: 500)."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Data set to evaluate on; default: `dataset`."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data set's files."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    dataset_options: str | None = field(default=None, metadata={"help": "Further options of the data set, as JSON."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first N images only."})
    max_eval_samples_in_training: int = field(
        default=200, metadata={"help": "Evaluations during training use the first N images only."}
    )
    num_expressions: int = field(default=3, metadata={"help": "Expressions per training image (original: 3)."})
    wording: str = field(
        default="gsva",
        metadata={"help": "Training prompts: the original's templates ('gsva') or those of evaluation ('processor')."},
    )
    all_absent: bool = field(
        default=False, metadata={"help": "Also train on images in which no expression has a target."}
    )
    negatives: float = field(
        default=0.0,
        metadata={
            "help": "Part of the expressions asked about a training image that is drawn from other images' texts and absent "
            "from this one, say 0.3."
        },
    )
    negatives_like: str = field(
        default="noun",
        metadata={
            "help": "Drawn texts have another head noun than the image's ('noun'), or rather the same noun and another "
            "attribute ('attribute')."
        },
    )
    drop_no_targets: bool = field(
        default=False,
        metadata={"help": "Train without the data's own expressions that have no target. Evaluation keeps them."},
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest conversation in tokens, including the image."}
    )
    protocols: list[str] = field(
        default_factory=lambda: ["slots"], metadata={"help": f"Evaluation protocols: {', '.join(PROTOCOLS)}."}
    )
    conventions: list[str] = field(
        default_factory=lambda: ["rela"], metadata={"help": f"Metric conventions: {', '.join(CONVENTIONS)}."}
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "Reject an expression whose log-odds of [SEG] are lower (slots). Default: the calibrated threshold of the model, or 0."
        },
    )
    one_prompt_per_expression: bool = field(
        default=False, metadata={"help": "Ask for each expression in a prompt by itself."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer in tokens (generate)."})
    ignore_region: str = field(
        default="foreground",
        metadata={
            "help": f"Pixels that ReasonSeg marks as ignored are {' or '.join(IGNORE_REGIONS)}. Original: foreground."
        },
    )
    eval_task: str | None = field(
        default=None,
        metadata={
            "help": "'referring', or 'reasoning' (prompts of ReasonSeg, first text only); default: by data set."
        },
    )
    resume_eval: bool = field(
        default=False, metadata={"help": "Continue a killed evaluation after its last finished rows."}
    )
    save_masks: bool = field(
        default=False, metadata={"help": "Also save the predicted masks in the rows file, as COCO RLE."}
    )
    eval_before_training: bool = field(
        default=True, metadata={"help": "With --do_train and --do_eval: also evaluate before training."}
    )
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "An image that cannot be read is an 'error', or is left out and listed at the end ('skip')."
        },
    )
    num_pictures: int = field(default=24, metadata={"help": "Images on the page of predictions."})
    image: list[str] = field(default_factory=list, metadata={"help": "--do_predict: image files."})
    expressions: list[str] = field(
        default_factory=list, metadata={"help": "--do_predict: expressions to segment in each image."}
    )
    expressions_column: str | None = field(
        default=None,
        metadata={"help": "--do_predict on files or a Hub id: the column that holds each image's expressions."},
    )
    question_column: str | None = field(
        default=None, metadata={"help": "--do_predict on files or a Hub id: the column of a free question per image."}
    )
    image_column: str = field(
        default="image", metadata={"help": "--do_predict on files or a Hub id: the column of the images."}
    )
    id_column: str | None = field(
        default=None,
        metadata={
            "help": "--do_predict on files or a Hub id: the column of the images' names; default: image_id, id, __key__, or "
            "else the file or the number of the row."
        },
    )
    masks: str = field(
        default="rle",
        metadata={"help": f"--do_predict on files or a Hub id: how masks are kept, {', '.join(MASKS)}."},
    )
    shard_size: int = field(
        default=256,
        metadata={
            "help": "--do_predict on files or a Hub id: images of an output file, which a killed run loses at most."
        },
    )

    def __post_init__(self):
        for protocol in self.protocols:
            check_choice("protocols", protocol, PROTOCOLS)
        for convention in self.conventions:
            check_choice("conventions", convention, CONVENTIONS)
        check_choice("ignore_region", self.ignore_region, IGNORE_REGIONS)
        check_choice("masks", self.masks, MASKS)
        check_expressions(self.expressions)
        if self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size} holds no images; give 1 or more.")
        if self.eval_task is not None:
            check_choice("eval_task", self.eval_task, TASKS)
        check_choice("on_bad_image", self.on_bad_image, ("error", "skip"))
        check_choice("wording", self.wording, ("gsva", "processor"))
        check_choice("negatives_like", self.negatives_like, NEGATIVES_LIKE)
        check_negatives(self.negatives, self.num_expressions, self.all_absent)
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(
                f"threshold={self.threshold} is not a finite number, so no score can be compared with it; give say 0 or -1.5."
            )
        for name in ("max_train_samples", "max_eval_samples", "max_eval_samples_in_training"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} leaves no images; give 1 or more, or leave it out.")
        try:
            self.options = dict(json.loads(self.dataset_options or "{}"))
        except (TypeError, ValueError):
            raise ValueError(
                f"dataset_options={self.dataset_options!r} is no JSON object; write '{{\"size\": 100}}'."
            ) from None
        self.mixture_families = _json_object("mixture", self.mixture)
        self.mixture_family_rates = _json_object("mixture_rates", self.mixture_rates)
        if self.dataset != "mixture" and (self.mixture or self.mixture_rates):
            raise ValueError(f"mixture and mixture_rates are for dataset='mixture', not for {self.dataset!r}.")
        if self.steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch={self.steps_per_epoch} must be at least 1.")

    @property
    def evaluated(self) -> str:
        """Return the name of the data set to evaluate on."""
        if (name := self.eval_dataset or self.dataset) == "mixture":
            raise ValueError("A mixture can only be trained on; name an eval_dataset to evaluate on, say grefcoco.")
        return name


@dataclass
class GsvaTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with this project's defaults."""

    output_dir: str = field(default="runs/gsva", metadata={"help": "Folder for all results."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Always false: examples become model inputs in the collator."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    report_to: list[str] = field(  # with transformers' type the command line can name only one
        default_factory=lambda: ["none"],
        metadata={"help": "tensorboard, wandb and other reporters of transformers, or none."},
    )
    threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads per process. Default: in training the free cores, shared by the processes, and after a "
            "resume as many as before; in evaluation 1."
        },
    )
    consolidated: str | None = field(
        default=None,
        metadata={
            "help": "Instead of training: save the consolidated weights of a sharded checkpoint as training does."
        },
    )
    resume: bool = field(default=True, metadata={"help": "Continue at the last complete checkpoint in output_dir."})
    divergence: str = field(
        default="stop",
        metadata={
            "help": "NaN losses, loss spikes and collapse to [REJ]: 'stop' at NaN and warn of the others, 'warn', 'off'."
        },
    )
    guard_T_acc: float | None = field(
        default=None,
        metadata={
            "help": "Bound for the T-acc of evaluations during training, say 0.95. The last checkpoint that is not below it "
            "is never deleted."
        },
    )
    guard: str = field(
        default="warn", metadata={"help": f"guard_T_acc: below the bound, {' or '.join(GUARDS)} training."}
    )
    validation_pictures: int = field(
        default=4,
        metadata={"help": "Images whose predictions each evaluation during training draws in output_dir/validation."},
    )
    hub_adapter_id: str | None = field(
        default=None, metadata={"help": "--push_to_hub: also push the adapter alone to this repository."}
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for the frozen towers' outputs, so that each image is encoded only once."},
    )
    feature_cache_dtype: str = field(
        default="float16", metadata={"help": "Type of the stored features; only float32 is exact."}
    )
    plan: bool = field(
        default=False, metadata={"help": "Only print the memory that training would take; load nothing."}
    )
    plan_strategy: str | None = field(
        default=None,
        metadata={"help": "--plan: an accelerate config, say configs/accelerate/zero2.yaml; default: each of them."},
    )
    plan_processes: int | None = field(
        default=None, metadata={"help": "--plan: number of processes; default: that of the config."}
    )
    plan_memory: float | None = field(
        default=None, metadata={"help": "--plan: memory of your card in GiB, to see whether training fits."}
    )

    def __post_init__(self):
        refuse_unsupported(vars(self))
        if self.consolidated:
            self.do_train = False
        check_best_metric(self)
        check_guard(self)
        if self.plan:
            self.use_cpu = True  # so that no card is needed, whatever the precision
        check_choice("feature_cache_dtype", self.feature_cache_dtype, ("float16", "bfloat16", "float32"))
        check_choice("divergence", self.divergence, ("stop", "warn", "off"))
        if self.threads is not None and not 1 <= self.threads <= usable_cores():
            raise ValueError(
                f"threads={self.threads} is not possible: this process may use {usable_cores()} CPU cores; give 1 to "
                f"{usable_cores()}, or leave it out."
            )
        super().__post_init__()
        self.dataloader_pin_memory &= torch.accelerator.is_available()  # PyTorch warns of it otherwise
        self.accelerator_config.non_blocking = self.dataloader_pin_memory  # pinned batches move while the host goes on


def _as_words(values: dict) -> list[str]:
    words = []
    for name, value in values.items():
        if value is None or value == []:
            continue
        words.append(f"--{name}")
        if isinstance(value, list):
            words += [str(entry) for entry in value]
        else:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


def _ends_evaluation(words: list[str]) -> bool:
    """Return whether the last word on `--do_eval` is a no."""
    values = ["true"]
    for word, following in zip(words, [*words[1:], ""]):
        if re.fullmatch(r"--do[-_]eval(=.*)?", word):
            values.append(word.partition("=")[2] or following)
    return values[-1].lower() in ("false", "no", "f", "n", "0")


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, GsvaTrainingArguments]:
    """
    Return the arguments of `[preset.yaml] [--name value ...]`. The command line overrides the preset.

    Raises:
        ValueError: The preset is missing or not a mapping, or a name or value is not understood.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    words: list[str] = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        path = Path(argv.pop(0))
        if not path.is_file():
            raise ValueError(f"The preset {path} does not exist; the presets are in configs/.")
        try:
            preset = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"The preset {path} is no YAML ({error}).") from None
        if not isinstance(preset, dict):
            raise ValueError(f"The preset {path} holds {type(preset).__name__}; write a mapping of name: value.")
        words = _as_words(preset)
    words += argv
    if _ends_evaluation(words):
        words += ["--eval_strategy", "no"]  # transformers would set do_eval again because of eval_strategy
    parser = HfArgumentParser((ModelArguments, DataArguments, GsvaTrainingArguments), allow_abbrev=False)
    model, data, training, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"{unknown} is not understood; `python run_gres.py --help` lists every name.")
    return model, data, training
