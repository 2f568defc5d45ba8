"""
Training on `transformers.Trainer`. Needs the extra `train`; not imported with the package.

`vision_tokenizer` and `unified` train the two models, on what `transformers_dualtoken.data` reads, whose names are found
here too. `unified.adapters` (LoRA, by peft) and `unified.low_bit` (quantised loading) are imported by name.
"""

from ..optional_libraries import needed_libraries


with needed_libraries("`transformers_dualtoken.training`"):
    from ..data import (
        BadSampleError,
        ChatEncoder,
        ChatSource,
        DualTokenChatDataset,
        DualTokenChatStream,
        DualTokenDataCollator,
        DualTokenImageDataset,
        DualTokenImageStream,
        SampleStream,
        StreamProgress,
        collate_images,
        load_chat_sources,
        load_code_source,
        load_image_dataset,
        precompute_codes,
        tokenizer_fingerprint,
    )
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
