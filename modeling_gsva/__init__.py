"""The GSVA model for Hugging Face: configuration, processing and modelling, which go to the Hub as remote code."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .cache_gsva import ConversationCache
from .configuration_gsva import GsvaConfig
from .image_processing_gsva import GsvaImageProcessor, GsvaSamImageProcessor
from .llava_v1_gsva import GsvaModel
from .modeling_gsva import GsvaForConditionalGeneration, GsvaPreTrainedModel
from .pipeline_gsva import GsvaPipeline
from .processing_gsva import GsvaProcessor

# Saved directories carry this code with them, so that they load where the project is not installed.
GsvaConfig.register_for_auto_class()
GsvaSamImageProcessor.register_for_auto_class("AutoImageProcessor")
GsvaImageProcessor.register_for_auto_class("AutoImageProcessor")
GsvaProcessor.register_for_auto_class("AutoProcessor")
GsvaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
# If the project is installed, the Auto classes use its code and not the copy in a saved directory.
AutoConfig.register("gsva", GsvaConfig)
AutoImageProcessor.register(GsvaConfig, image_processor_classes={"pil": GsvaImageProcessor})
AutoProcessor.register(GsvaConfig, GsvaProcessor)
AutoModel.register(GsvaConfig, GsvaForConditionalGeneration)
AutoModelForImageTextToText.register(GsvaConfig, GsvaForConditionalGeneration)

__all__ = [
    "ConversationCache",
    "GsvaConfig",
    "GsvaForConditionalGeneration",
    "GsvaImageProcessor",
    "GsvaModel",
    "GsvaPipeline",
    "GsvaPreTrainedModel",
    "GsvaProcessor",
    "GsvaSamImageProcessor",
]
