"""Training on `transformers.Trainer`. Needs the extra `train`; not imported with the package."""

from .chat_data import DualTokenChatDataset, DualTokenDataCollator, encode_images
from .image_data import DualTokenImageDataset, collate_images
from .resume import find_checkpoint
from .unified_trainer import DualTokenTrainer, set_trainable
from .vision_tokenizer_trainer import DEFAULT_LOSS_WEIGHTS, DualTokenVisionTokenizerTrainer


__all__ = [
    "DEFAULT_LOSS_WEIGHTS",
    "DualTokenChatDataset",
    "DualTokenDataCollator",
    "DualTokenImageDataset",
    "DualTokenTrainer",
    "DualTokenVisionTokenizerTrainer",
    "collate_images",
    "encode_images",
    "find_checkpoint",
    "set_trainable",
]
