"""Strict loading: weights that are missing, unexpected, mis-shaped or unreadable are an error with their names."""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

# Modules that are not quantized by default; only the language model's layers are. CLIP and SAM lose masks in 4 bit, and the
# rest is small or trained in full. Parts of a vision-language model are listed by the names that transformers' families use,
# with and without the prefixes that they have in `GsvaForConditionalGeneration` and `GsvaModel`.
_VISION = (
    "vision_tower",
    "vision_model",
    "visual",
    "multi_modal_projector",
    "connector",
    "language_model.embed_tokens",
    "text_model.embed_tokens",
)
NOT_QUANTIZED = (
    *(f"{prefix}{name}" for prefix in ("", "model.", "vlm.model.") for name in _VISION),
    "lm_head",
    "vlm.lm_head",
    "sam",
    "mask_projector",
)
# The options of transformers' quantization configurations that name such modules.
SKIP_OPTIONS = ("llm_int8_skip_modules", "modules_to_not_convert")
MAX_NAMES = 12  # how many weights of a kind an error names


class GsvaWeightsError(ValueError, RuntimeError):
    """A checkpoint does not hold the weights of the model; `wrong` has all their names by kind."""

    def __init__(self, model_class: type, source, wrong: dict[str, list[str]]):
        self.wrong = wrong
        faults = [
            f"{len(names)} {kind}: {', '.join(names[:MAX_NAMES])}{', ...' if len(names) > MAX_NAMES else ''}"
            for kind, names in wrong.items()
            if names
        ]
        super().__init__(
            f"The weights of {str(source)!r} are not those of {model_class.__name__}. {'; '.join(faults)}. Save the model again "
            "with save_pretrained, convert an original checkpoint with convert_checkpoint.py, or check that config.json belongs "
            "to these weights. To load all the same and initialize at random what does not fit: strict=False, for shapes "
            "ignore_mismatched_sizes=True."
        )


def with_default_skips(quantization_config):
    """Return a copy that does not quantize NOT_QUANTIZED, unless it names modules itself or has no such option."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = deepcopy(quantization_config)
    for option in SKIP_OPTIONS:
        if getattr(quantization_config, option, ()) is None:
            setattr(quantization_config, option, list(NOT_QUANTIZED))
    return quantization_config


_Base: Any = PreTrainedModel if TYPE_CHECKING else object  # a mixin, whose parent's methods type checkers would miss


class StrictLoadingMixin(_Base):
    """Strict `from_pretrained`; stands before [`PreTrainedModel`] among the bases of a model's class."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        Return False so that transformers initializes missing weights as it does for built-in models; for custom code it
        skips CLIP's initialization.
        """
        return False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        strict: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        quantization_config=None,
        **kwargs,
    ):
        """
        Load like [`PreTrainedModel.from_pretrained`], but raise where weights are missing, unexpected or mis-shaped.

        Args:
            strict: False loads what fits, initializes the rest at random and leaves it at transformers' warning. By
                default True, unless `output_loading_info` hands the report to the caller or `state_dict` is empty.
            ignore_mismatched_sizes: allows mis-shaped weights, which are then initialized at random.
            quantization_config: only the language model's layers are quantized, unless it names itself the modules to
                leave out.

        Raises:
            GsvaWeightsError: a `ValueError` with the names (and a `RuntimeError`, as transformers' for shapes).
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = with_default_skips(quantization_config)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            ignore_mismatched_sizes=True,  # checked below, with names
            output_loading_info=True,
            **kwargs,
        )
        # Where an adapter was loaded on top, `info` is its report; those of the base are in `_load_reports`.
        reports = [info, *(report.to_dict() for report in vars(model).pop("_load_reports", ()))]
        if strict is None:
            strict = not output_loading_info and kwargs.get("state_dict") != {}
        shapes = {
            name: f"{name} (saved {tuple(saved)}, model {tuple(expected)})"
            for report in reports
            for name, saved, expected in report["mismatched_keys"]
        }
        missing = {name for report in reports for name in report["missing_keys"]} - shapes.keys()
        unexpected = {name for report in reports for name in report["unexpected_keys"]}
        shapes = {
            model.saved_name(name): text.replace(name, model.saved_name(name), 1) for name, text in shapes.items()
        }
        missing, unexpected = ({model.saved_name(name) for name in names} for names in (missing, unexpected))
        wrong = {
            "missing": sorted(missing) if strict else [],
            "unexpected": sorted(unexpected) if strict else [],
            "mis-shaped": [] if ignore_mismatched_sizes else [shapes[name] for name in sorted(shapes)],
        }
        if any(wrong.values()):
            raise GsvaWeightsError(cls, pretrained_model_name_or_path, wrong)
        return (model, info) if output_loading_info else model

    def saved_name(self, name: str) -> str:
        """Return the name that a weight of the model has in saved directories, for errors."""
        return name

    def mark_tied_weights_as_initialized(self, loading_info) -> None:
        """
        Keep the loading report, then do as the parent. transformers calls this first with each loading report. Keep them
        all: `from_pretrained` is only handed the last one.
        """
        self.__dict__.setdefault("_load_reports", []).append(loading_info)
        if loading_info.conversion_errors:  # a quantized weight that lacks a piece: later steps would fail on it
            unreadable = [
                f"{self.saved_name(name)} ({why.splitlines()[-1]})"
                for name, why in loading_info.conversion_errors.items()
            ]
            loading_info.conversion_errors.clear()
            raise GsvaWeightsError(type(self), self.name_or_path, {"unreadable": sorted(unreadable)})
        super().mark_tied_weights_as_initialized(loading_info)


__all__ = ["GsvaWeightsError", "StrictLoadingMixin"]
