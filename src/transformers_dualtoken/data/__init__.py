"""Images and conversations to train and evaluate on: files, formats, mixtures, precomputed codes. Needs the extra `train`."""

from ..optional_libraries import needed_libraries


with needed_libraries("`transformers_dualtoken.data`"):
    from .codes import load_code_source, precompute_codes, tokenizer_fingerprint
    from .collators import DualTokenDataCollator, collate_images
    from .encoding import ChatEncoder
    from .images import load_image_dataset
    from .indexed import DualTokenChatDataset, DualTokenImageDataset
    from .samples import BadSampleError, ChatSource
    from .sources import load_chat_sources
    from .streams import DualTokenChatStream, DualTokenImageStream, SampleStream, StreamProgress


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
