"""The GSVA model the Hugging Face way: configuration, processing and modelling; ships to the Hub as remote code."""

from .configuration_gsva import GsvaConfig
from .image_processing_gsva import GsvaImageProcessor
from .modeling_gsva import GsvaForConditionalGeneration, GsvaModel, GsvaPreTrainedModel
from .processing_gsva import GsvaProcessor

__all__ = [
    "GsvaConfig",
    "GsvaForConditionalGeneration",
    "GsvaImageProcessor",
    "GsvaModel",
    "GsvaPreTrainedModel",
    "GsvaProcessor",
]
