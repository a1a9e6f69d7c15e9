"""The GSVA model the Hugging Face way: configuration, processing and modelling; ships to the Hub as remote code."""

from .configuration_gsva import GsvaConfig
from .image_processing_gsva import GsvaImageProcessor
from .modeling_gsva import GsvaForConditionalGeneration, GsvaModel, GsvaPreTrainedModel
from .processing_gsva import GsvaProcessor

# Saved directories carry this code with them, so that they load where the project is not installed.
GsvaConfig.register_for_auto_class()
GsvaImageProcessor.register_for_auto_class("AutoImageProcessor")
GsvaProcessor.register_for_auto_class("AutoProcessor")
GsvaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = [
    "GsvaConfig",
    "GsvaForConditionalGeneration",
    "GsvaImageProcessor",
    "GsvaModel",
    "GsvaPreTrainedModel",
    "GsvaProcessor",
]
