"""The GSVA model the Hugging Face way: configuration, processing and modelling; ships to the Hub as remote code."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_gsva import GsvaConfig
from .image_processing_gsva import GsvaImageProcessor
from .llava_v1_gsva import GsvaModel
from .modeling_gsva import GsvaForConditionalGeneration, GsvaPreTrainedModel
from .pipeline_gsva import GsvaPipeline
from .processing_gsva import GsvaProcessor

# Saved directories carry this code with them, so that they load where the project is not installed.
GsvaConfig.register_for_auto_class()
GsvaImageProcessor.register_for_auto_class("AutoImageProcessor")
GsvaProcessor.register_for_auto_class("AutoProcessor")
GsvaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
# Where the project is installed, the Auto classes take its own code, whatever a directory brings along.
AutoConfig.register("gsva", GsvaConfig)
AutoImageProcessor.register(GsvaConfig, image_processor_classes={"pil": GsvaImageProcessor})
AutoProcessor.register(GsvaConfig, GsvaProcessor)
AutoModel.register(GsvaConfig, GsvaForConditionalGeneration)
AutoModelForImageTextToText.register(GsvaConfig, GsvaForConditionalGeneration)

__all__ = [
    "GsvaConfig",
    "GsvaForConditionalGeneration",
    "GsvaImageProcessor",
    "GsvaModel",
    "GsvaPipeline",
    "GsvaPreTrainedModel",
    "GsvaProcessor",
]
