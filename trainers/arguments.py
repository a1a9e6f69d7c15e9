"""Everything `run_gres.py` can be told, as dataclasses read from a yaml preset and the command line."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from evaluation.config import IGNORE_REGIONS, PROTOCOLS, TASKS, check_choice
from metrics.gres import CONVENTIONS

TRAIN_LANGUAGE_MODEL = ("lora", "full", "frozen")
QUANTIZATIONS = ("4bit", "8bit")
ARCHITECTURES = ("7b", "13b")


def _json_object(name: str, text: str | None) -> dict | None:
    try:
        return dict(json.loads(text)) if text else None
    except (TypeError, ValueError):
        raise ValueError(f"{name}={text!r} is no JSON object; write '{{\"name\": ...}}'.") from None


@dataclass
class ModelArguments:
    """Which model, and which of its parts learn."""

    model: str = field(default="assets/tiny_gsva", metadata={"help": "Directory or Hub id of a GSVA model."})
    base_model: str | None = field(
        default=None, metadata={"help": "Where `model` is an adapter: its base, if not where it was trained."}
    )
    dtype: str = field(default="float32", metadata={"help": "Type of the loaded weights: float32, bfloat16, auto ..."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or flash_attention_2."})
    train_language_model: str = field(
        default="lora", metadata={"help": f"How the language model learns: {', '.join(TRAIN_LANGUAGE_MODEL)}."}
    )
    # The original's: rank 8 for the 7B model, alpha 16, dropout 0.05, on the language model's q and v projections.
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA, divided by the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of LoRA."})
    quantization: str | None = field(
        default=None,
        metadata={
            "help": f"QLoRA: the language model's frozen layers in {' or '.join(QUANTIZATIONS)} (bitsandbytes)."
        },
    )
    architecture: str | None = field(
        default=None, metadata={"help": f"--plan: {' or '.join(ARCHITECTURES)}, where `model` is not on this machine."}
    )

    def __post_init__(self):
        check_choice("train_language_model", self.train_language_model, TRAIN_LANGUAGE_MODEL)
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
            if self.train_language_model != "lora":
                raise ValueError(
                    f"quantization={self.quantization!r} is for training with adapters (QLoRA), not for "
                    f"train_language_model={self.train_language_model!r}; choose 'lora'."
                )
        if self.architecture is not None:
            check_choice("architecture", self.architecture, ARCHITECTURES)


@dataclass
class DataArguments:
    """Which data, how examples are worded, and how answers are evaluated."""

    dataset: str = field(
        default="shapes",
        metadata={"help": "A name that data_scripts.load knows, or 'mixture' of several to train on."},
    )
    mixture: str | None = field(
        default=None,
        metadata={"help": "dataset=mixture: family -> names of its data sets, as JSON; by default the original's."},
    )
    mixture_rates: str | None = field(
        default=None,
        metadata={"help": "dataset=mixture: family -> rate, as JSON; by default the original's 9, 3, 3, 1."},
    )
    steps_per_epoch: int = field(
        default=500, metadata={"help": "dataset=mixture: optimizer steps that make an epoch (original: 500)."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Evaluate on this one; by default on `dataset`."})
    data_dir: str | None = field(default=None, metadata={"help": "Root of the data set's files."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Split to evaluate on."})
    dataset_options: str | None = field(default=None, metadata={"help": "More options of the data set, as JSON."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many pictures."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many pictures."})
    max_eval_samples_in_training: int = field(
        default=200, metadata={"help": "Evaluations in the middle of training take the first so many pictures."}
    )
    num_expressions: int = field(default=3, metadata={"help": "Expressions per training picture (original: 3)."})
    wording: str = field(
        default="gsva",
        metadata={"help": "Training prompts: 'gsva', the original's templates, or 'processor', those of evaluation."},
    )
    all_absent: bool = field(
        default=False, metadata={"help": "Also train on pictures of which nothing asked is there."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest conversation in tokens, the image included."}
    )
    protocols: list[str] = field(default_factory=lambda: ["slots"], metadata={"help": f"Of {', '.join(PROTOCOLS)}."})
    conventions: list[str] = field(
        default_factory=lambda: ["rela"], metadata={"help": f"Of {', '.join(CONVENTIONS)}."}
    )
    threshold: float = field(default=0.0, metadata={"help": "Reject a slot below these log-odds (protocol slots)."})
    one_prompt_per_expression: bool = field(default=False, metadata={"help": "Ask for each expression by itself."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer of the protocol generate."})
    ignore_region: str = field(
        default="foreground",
        metadata={
            "help": f"Pixels that do not count (ReasonSeg): {' or '.join(IGNORE_REGIONS)}. Original: foreground."
        },
    )
    eval_task: str | None = field(
        default=None,
        metadata={
            "help": "'referring', or 'reasoning' (ReasonSeg's prompts, first text only); default: by the data set."
        },
    )
    resume_eval: bool = field(default=False, metadata={"help": "Continue a killed evaluation from its finished rows."})
    save_masks: bool = field(default=False, metadata={"help": "Rows also hold the predicted mask as COCO RLE."})
    eval_before_training: bool = field(default=True, metadata={"help": "Also evaluate before training."})
    num_pictures: int = field(default=24, metadata={"help": "Pictures on the page of predictions."})
    image: list[str] = field(default_factory=list, metadata={"help": "--do_predict: picture files."})
    expressions: list[str] = field(default_factory=list, metadata={"help": "--do_predict: what to look for in each."})

    def __post_init__(self):
        for protocol in self.protocols:
            check_choice("protocols", protocol, PROTOCOLS)
        for convention in self.conventions:
            check_choice("conventions", convention, CONVENTIONS)
        check_choice("ignore_region", self.ignore_region, IGNORE_REGIONS)
        if self.eval_task is not None:
            check_choice("eval_task", self.eval_task, TASKS)
        check_choice("wording", self.wording, ("gsva", "processor"))
        if not math.isfinite(self.threshold):
            raise ValueError(
                f"threshold={self.threshold} is no number that scores can be compared with; give say 0 or -1.5."
            )
        for name in ("max_train_samples", "max_eval_samples", "max_eval_samples_in_training"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} leaves no pictures; give 1 or more, or leave it out.")
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
        """The data set that is evaluated on."""
        if (name := self.eval_dataset or self.dataset) == "mixture":
            raise ValueError("A mixture is trained on, not evaluated on: name an eval_dataset, say grefcoco.")
        return name


@dataclass
class GsvaTrainingArguments(TrainingArguments):
    """[`TrainingArguments`] with this project's defaults."""

    output_dir: str = field(default="runs/gsva", metadata={"help": "Where everything is written."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept False: examples are no model inputs."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    report_to: list[str] = field(  # transformers' own type lets the command line name only one
        default_factory=lambda: ["none"],
        metadata={"help": "Of tensorboard, wandb and transformers' other reporters, or none."},
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads per process; by default all cores to train, one to evaluate."}
    )
    consolidated: str | None = field(
        default=None,
        metadata={
            "help": "Instead of training: weights made whole from a sharded checkpoint, to save as training does."
        },
    )
    resume: bool = field(default=True, metadata={"help": "Go on from the last complete checkpoint in output_dir."})
    divergence: str = field(
        default="stop",
        metadata={"help": "NaN, loss spikes and collapse to [REJ]: 'stop' at NaN and say the others, 'warn', 'off'."},
    )
    validation_pictures: int = field(
        default=4,
        metadata={"help": "Pictures that each evaluation in training draws to output_dir/validation; 0: none."},
    )
    hub_adapter_id: str | None = field(
        default=None, metadata={"help": "--push_to_hub: also the adapter alone, to this repository."}
    )
    feature_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps what the frozen towers see, so that they look once."}
    )
    feature_cache_dtype: str = field(
        default="float16", metadata={"help": "Type it is kept in; float32 loses nothing."}
    )
    plan: bool = field(
        default=False, metadata={"help": "Only count the memory that training takes, before anything is loaded."}
    )
    plan_strategy: str | None = field(
        default=None,
        metadata={"help": "--plan: an accelerate config, say configs/accelerate/zero2.yaml; default: all."},
    )
    plan_processes: int | None = field(default=None, metadata={"help": "--plan: processes, other than the config's."})
    plan_memory: float | None = field(
        default=None, metadata={"help": "--plan: GiB of your card, to say whether it fits."}
    )

    def __post_init__(self):
        if self.consolidated:
            self.do_train = False
        if self.plan:
            self.use_cpu = True  # counting needs no card, whatever precision is planned for one
        check_choice("feature_cache_dtype", self.feature_cache_dtype, ("float16", "bfloat16", "float32"))
        check_choice("divergence", self.divergence, ("stop", "warn", "off"))
        super().__post_init__()


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


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, GsvaTrainingArguments]:
    """
    `[preset.yaml] [--name value ...]` → the three dataclasses. The command line overrides the preset.

    Raises:
        ValueError: a preset that is missing or no mapping, or a name that no dataclass has.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    words: list[str] = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        path = Path(argv.pop(0))
        if not path.is_file():
            raise ValueError(f"The preset {path} does not exist; the presets are in configs/.")
        try:
            preset = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"The preset {path} is no YAML ({error}).") from None
        if not isinstance(preset, dict):
            raise ValueError(f"The preset {path} holds {type(preset).__name__}; write a mapping of name: value.")
        words = _as_words(preset)
    parser = HfArgumentParser((ModelArguments, DataArguments, GsvaTrainingArguments), allow_abbrev=False)
    model, data, training, unknown = parser.parse_args_into_dataclasses(words + argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"{unknown} is not understood; `python run_gres.py --help` lists every name.")
    return model, data, training
