"""DualToken for Hugging Face Transformers. Importing this package registers its classes with the Auto classes."""

# First: another version of transformers may lack what is imported next.
from . import transformers_compat  # noqa: F401


# isort: split
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    Qwen2Tokenizer,
)

# Up to 5.17 the short path asks for torchvision, which is optional here.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_dualtoken import (
    DualTokenConfig,
    DualTokenDepthHeadConfig,
    DualTokenQuantizerConfig,
    DualTokenVisionTokenizerConfig,
)
from .convert import load_official_tokenizer
from .generation_dualtoken import DualTokenGenerateOutput
from .image_processing_dualtoken import DualTokenImageProcessor
from .image_processing_pil_dualtoken import DualTokenImageProcessorPil
from .lora_targets import register_lora_targets
from .modeling_dualtoken import DualTokenForCausalLM, DualTokenModel, DualTokenPreTrainedModel
from .modeling_vision_tokenizer import DualTokenEncoderOutput, DualTokenVisionTokenizer
from .processing_dualtoken import DualTokenProcessor, DualTokenVisionTokenizerProcessor
from .remote_code import save_remote_code


__version__ = "0.1.0"  # the only place: pyproject.toml reads it here

for _config in (DualTokenVisionTokenizerConfig, DualTokenConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoImageProcessor.register(
        _config,
        image_processor_classes={"pil": DualTokenImageProcessorPil, "torchvision": DualTokenImageProcessor},
        exist_ok=True,
    )
for _auto_class in (AutoModel, AutoModelForZeroShotImageClassification):
    _auto_class.register(DualTokenVisionTokenizerConfig, DualTokenVisionTokenizer, exist_ok=True)
AutoProcessor.register(DualTokenVisionTokenizerConfig, DualTokenVisionTokenizerProcessor, exist_ok=True)
AutoModel.register(DualTokenConfig, DualTokenModel, exist_ok=True)
AutoProcessor.register(DualTokenConfig, DualTokenProcessor, exist_ok=True)
AutoTokenizer.register(DualTokenConfig, tokenizer_class=Qwen2Tokenizer, exist_ok=True)
for _auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(DualTokenConfig, DualTokenForCausalLM, exist_ok=True)
del _config, _auto_class
register_lora_targets()

__all__ = [
    "DualTokenConfig",
    "DualTokenDepthHeadConfig",
    "DualTokenEncoderOutput",
    "DualTokenForCausalLM",
    "DualTokenGenerateOutput",
    "DualTokenImageProcessor",
    "DualTokenImageProcessorPil",
    "DualTokenModel",
    "DualTokenPreTrainedModel",
    "DualTokenProcessor",
    "DualTokenQuantizerConfig",
    "DualTokenVisionTokenizer",
    "DualTokenVisionTokenizerConfig",
    "DualTokenVisionTokenizerProcessor",
    "load_official_tokenizer",
    "save_remote_code",
]
