"""Training on `transformers.Trainer`. Needs the extra `train`; not imported with the package.

`adapters` (LoRA, by peft) and `low_bit` (quantised loading) are imported by name.
"""

from .chat_collator import DualTokenDataCollator
from .chat_data import DualTokenChatDataset
from .chat_encoding import ChatEncoder
from .chat_sources import BadSampleError, ChatSource, load_chat_sources
from .chat_stream import DualTokenChatStream
from .discriminator import PatchDiscriminator
from .image_codes import load_code_source, precompute_codes
from .image_data import DualTokenImageDataset, collate_images
from .image_sources import load_image_dataset
from .image_stream import DualTokenImageStream
from .perceptual import load_lpips
from .recipe import STAGE_LOSS_WEIGHTS, DualTokenVisionTokenizerRecipe
from .reference_step import reference_step
from .resume import find_checkpoint
from .sample_generation import SampleGenerationCallback, read_prompts
from .sample_stream import SampleStream, StreamProgress
from .throughput import ThroughputMeter, TrainingFlops
from .tokenizer_fingerprint import tokenizer_fingerprint
from .training_arguments import DualTokenTrainingArguments, DualTokenVisionTokenizerTrainingArguments
from .unified_trainer import DualTokenTrainer, set_trainable
from .vision_tokenizer_trainer import DualTokenVisionTokenizerTrainer


__all__ = [
    "STAGE_LOSS_WEIGHTS",
    "BadSampleError",
    "ChatEncoder",
    "ChatSource",
    "DualTokenChatDataset",
    "DualTokenChatStream",
    "DualTokenDataCollator",
    "DualTokenImageDataset",
    "DualTokenImageStream",
    "DualTokenTrainer",
    "DualTokenTrainingArguments",
    "DualTokenVisionTokenizerRecipe",
    "DualTokenVisionTokenizerTrainer",
    "DualTokenVisionTokenizerTrainingArguments",
    "PatchDiscriminator",
    "SampleGenerationCallback",
    "SampleStream",
    "StreamProgress",
    "ThroughputMeter",
    "TrainingFlops",
    "collate_images",
    "find_checkpoint",
    "load_chat_sources",
    "load_code_source",
    "load_image_dataset",
    "load_lpips",
    "precompute_codes",
    "read_prompts",
    "reference_step",
    "set_trainable",
    "tokenizer_fingerprint",
]
