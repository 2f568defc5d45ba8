"""
Images and conversations to train and evaluate on: files, formats, mixtures, precomputed codes. Needs the extra `train`.

`text_answers` (for TRL) is imported by name.
"""

from ..optional_libraries import needed_libraries


with needed_libraries("`transformers_dualtoken.data`"):
    from .chat_collator import DualTokenDataCollator
    from .chat_data import DualTokenChatDataset
    from .chat_encoding import ChatEncoder
    from .chat_source import BadSampleError, ChatSource
    from .chat_sources import load_chat_sources
    from .chat_stream import DualTokenChatStream
    from .image_codes import load_code_source, precompute_codes
    from .image_data import DualTokenImageDataset, collate_images
    from .image_sources import load_image_dataset
    from .image_stream import DualTokenImageStream
    from .sample_stream import SampleStream, StreamProgress
    from .tokenizer_fingerprint import tokenizer_fingerprint


__all__ = [
    "BadSampleError",
    "ChatEncoder",
    "ChatSource",
    "DualTokenChatDataset",
    "DualTokenChatStream",
    "DualTokenDataCollator",
    "DualTokenImageDataset",
    "DualTokenImageStream",
    "SampleStream",
    "StreamProgress",
    "collate_images",
    "load_chat_sources",
    "load_code_source",
    "load_image_dataset",
    "precompute_codes",
    "tokenizer_fingerprint",
]
