"""
Training on `transformers.Trainer`. Needs the extra `train`; not imported with the package.

`data` reads images and conversations, `vision_tokenizer` and `unified` train the two models. `unified.adapters` (LoRA, by
peft), `unified.low_bit` (quantised loading) and `data.text_answers` (for TRL) are imported by name.
"""

from ..optional_libraries import needed_libraries


with needed_libraries("`transformers_dualtoken.training`"):
    from ..data.chat_collator import DualTokenDataCollator
    from ..data.chat_data import DualTokenChatDataset
    from ..data.chat_encoding import ChatEncoder
    from ..data.chat_source import BadSampleError, ChatSource
    from ..data.chat_sources import load_chat_sources
    from ..data.chat_stream import DualTokenChatStream
    from ..data.image_codes import load_code_source, precompute_codes
    from ..data.image_data import DualTokenImageDataset, collate_images
    from ..data.image_sources import load_image_dataset
    from ..data.image_stream import DualTokenImageStream
    from ..data.sample_stream import SampleStream, StreamProgress
    from ..data.tokenizer_fingerprint import tokenizer_fingerprint
    from ..evaluation.perceptual import load_lpips
    from .preemption import TrainingStopped
    from .resume import find_checkpoint
    from .training_arguments import (
        DualTokenTrainingArguments,
        DualTokenVisionTokenizerTrainingArguments,
        use_cpu_threads,
    )
    from .unified.sample_generation import SampleGenerationCallback, read_prompts
    from .unified.throughput import ThroughputMeter, TrainingFlops
    from .unified.trainer import DualTokenTrainer, set_trainable
    from .vision_tokenizer.discriminator import PatchDiscriminator
    from .vision_tokenizer.recipe import STAGE_LOSS_WEIGHTS, DualTokenVisionTokenizerRecipe
    from .vision_tokenizer.trainer import DualTokenVisionTokenizerTrainer


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
    "TrainingStopped",
    "TrainingFlops",
    "collate_images",
    "find_checkpoint",
    "load_chat_sources",
    "load_code_source",
    "load_image_dataset",
    "load_lpips",
    "precompute_codes",
    "read_prompts",
    "set_trainable",
    "tokenizer_fingerprint",
    "use_cpu_threads",
]
