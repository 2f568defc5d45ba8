"""Training on `transformers.Trainer`. Needs the extra `train`; not imported with the package."""

from .chat_data import DualTokenChatDataset, DualTokenDataCollator, encode_images
from .discriminator import PatchDiscriminator
from .image_data import DualTokenImageDataset, collate_images
from .image_sources import load_image_dataset
from .image_stream import DualTokenImageStream
from .perceptual import load_lpips
from .recipe import STAGE_LOSS_WEIGHTS, DualTokenVisionTokenizerRecipe
from .reference_step import reference_step
from .resume import find_checkpoint
from .training_arguments import DualTokenVisionTokenizerTrainingArguments
from .unified_trainer import DualTokenTrainer, set_trainable
from .vision_tokenizer_trainer import DualTokenVisionTokenizerTrainer


__all__ = [
    "STAGE_LOSS_WEIGHTS",
    "DualTokenChatDataset",
    "DualTokenDataCollator",
    "DualTokenImageDataset",
    "DualTokenImageStream",
    "DualTokenTrainer",
    "DualTokenVisionTokenizerRecipe",
    "DualTokenVisionTokenizerTrainer",
    "DualTokenVisionTokenizerTrainingArguments",
    "PatchDiscriminator",
    "collate_images",
    "encode_images",
    "find_checkpoint",
    "load_image_dataset",
    "load_lpips",
    "reference_step",
    "set_trainable",
]
