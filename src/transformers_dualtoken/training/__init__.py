"""
Training on `transformers.Trainer`. Needs the extra `train`; not imported with the package.

`vision_tokenizer` and `unified` train the two models, on what `transformers_dualtoken.data` reads, whose names are found
here too. `unified.adapters` (LoRA, by peft) and `unified.low_bit` (quantised loading) are imported by name.
"""

from ..optional_libraries import needed_libraries


with needed_libraries("`transformers_dualtoken.training`"):
    from .. import data
    from ..data import *  # noqa: F403
    from ..evaluation.perceptual import load_lpips
    from .arguments import DualTokenTrainingArguments, DualTokenVisionTokenizerTrainingArguments, use_cpu_threads
    from .checkpoints import TrainingStopped, find_checkpoint
    from .unified.sample_generation import SampleGenerationCallback, read_prompts
    from .unified.throughput import ThroughputMeter, TrainingFlops
    from .unified.trainer import DualTokenTrainer, set_trainable
    from .vision_tokenizer.discriminator import PatchDiscriminator
    from .vision_tokenizer.recipe import STAGE_LOSS_WEIGHTS, DualTokenVisionTokenizerRecipe
    from .vision_tokenizer.trainer import DualTokenVisionTokenizerTrainer


__all__ = [
    *data.__all__,
    "STAGE_LOSS_WEIGHTS",
    "DualTokenTrainer",
    "DualTokenTrainingArguments",
    "DualTokenVisionTokenizerRecipe",
    "DualTokenVisionTokenizerTrainer",
    "DualTokenVisionTokenizerTrainingArguments",
    "PatchDiscriminator",
    "SampleGenerationCallback",
    "ThroughputMeter",
    "TrainingFlops",
    "TrainingStopped",
    "find_checkpoint",
    "load_lpips",
    "read_prompts",
    "set_trainable",
    "use_cpu_threads",
]
