"""The model and its processor, registered with transformers' Auto classes on import."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

# Older transformers hand out a placeholder at the top where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_cogvlm import CogVLMConfig, CogVLMVisionConfig
from .image_processing_cogvlm import CogVLMImageProcessor
from .modeling_cogvlm import CogVLMForCausalLM, CogVLMModel
from .processing_cogvlm import CogVLMProcessor

AutoConfig.register(CogVLMConfig.model_type, CogVLMConfig, exist_ok=True)
AutoModel.register(CogVLMConfig, CogVLMModel, exist_ok=True)
AutoModelForCausalLM.register(CogVLMConfig, CogVLMForCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(CogVLMConfig, CogVLMForCausalLM, exist_ok=True)
AutoImageProcessor.register(
    CogVLMConfig, slow_image_processor_class=CogVLMImageProcessor, exist_ok=True
)
AutoProcessor.register(CogVLMConfig, CogVLMProcessor, exist_ok=True)

__all__ = [
    "CogVLMConfig",
    "CogVLMForCausalLM",
    "CogVLMImageProcessor",
    "CogVLMModel",
    "CogVLMProcessor",
    "CogVLMVisionConfig",
]
