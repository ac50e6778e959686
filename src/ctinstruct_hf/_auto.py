"""Importing this module makes the Auto classes of Transformers know ours."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoProcessor,
)

from .modeling.configuration_ctinstruct import CTInstructConfig, CTInstructSegmentationConfig, CTInstructVisionConfig
from .modeling.modeling_ctinstruct import CTInstructForConditionalGeneration, CTInstructModel
from .modeling.pretraining_ctinstruct import CTInstructForPretraining
from .modeling.segmentation_ctinstruct import CTInstructSegmentationDecoder
from .modeling.vision_ctinstruct import CTInstructVisionModel
from .processing.image_processing_ctinstruct import CTInstructImageProcessor
from .processing.processing_ctinstruct import CTInstructProcessor

for _config in (CTInstructConfig, CTInstructVisionConfig, CTInstructSegmentationConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModel.register(CTInstructConfig, CTInstructModel, exist_ok=True)
AutoModel.register(CTInstructVisionConfig, CTInstructVisionModel, exist_ok=True)
AutoModel.register(CTInstructSegmentationConfig, CTInstructSegmentationDecoder, exist_ok=True)
AutoModelForImageTextToText.register(CTInstructConfig, CTInstructForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(CTInstructConfig, CTInstructForConditionalGeneration, exist_ok=True)
AutoModelForPreTraining.register(CTInstructConfig, CTInstructForPretraining, exist_ok=True)
AutoImageProcessor.register(CTInstructConfig, slow_image_processor_class=CTInstructImageProcessor, exist_ok=True)
AutoProcessor.register(CTInstructConfig, CTInstructProcessor, exist_ok=True)
