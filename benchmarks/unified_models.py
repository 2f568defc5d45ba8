"""Unified models for benchmarks: the paper's 3B-384 and a small one, with random weights; also where extras are missing.

Import this before `transformers_dualtoken`.
"""

import importlib.util
import sys
import types

from torch import nn


class _NoDecoder(nn.Module):
    """In the place of diffusers' image decoder, which no training of the unified model runs."""

    def __init__(self, **kwargs):
        super().__init__()


def _stand_in_for_extras():
    """
    Make the package importable on a machine with torch and transformers alone, as lent GPU machines often are.

    Without diffusers the tokenizer has no image decoder (and cannot decode); without datasets the modules of
    `transformers_dualtoken.data` and `.training` can only be imported one by one.
    """
    if importlib.util.find_spec("diffusers") is None:
        names = "diffusers.models.autoencoders.vae".split(".")
        for end in range(1, len(names) + 1):
            module = types.ModuleType(".".join(names[:end]))
            module.__path__ = []
            # transformers asks for it when it looks whether a library is installed.
            module.__spec__ = importlib.util.spec_from_loader(module.__name__, loader=None)
            sys.modules[module.__name__] = module
        module.Decoder = _NoDecoder
    if importlib.util.find_spec("datasets") is None:
        package = importlib.util.find_spec("transformers_dualtoken").submodule_search_locations[0]
        for name in ("data", "training"):
            module = types.ModuleType(f"transformers_dualtoken.{name}")
            module.__path__ = [f"{package}/{name}"]
            sys.modules[module.__name__] = module


_stand_in_for_extras()

from transformers_dualtoken.configuration_dualtoken import (  # noqa: E402
    DualTokenConfig,
    DualTokenVisionTokenizerConfig,
)


# Qwen2.5-3B.
QWEN_3B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def full_size_config() -> DualTokenConfig:
    """The paper's 3B-384: Qwen2.5-3B, SigLIP So400m at 384 px (729 positions), 8 depths of 16384 codes, two heads."""
    return DualTokenConfig(text_config=QWEN_3B, vision_tokenizer_config=DualTokenVisionTokenizerConfig())


def small_config(
    width: int = 256,
    layers: int = 4,
    vocabulary: int = 4096,
    image_size: int = 64,
    encoder_width: int = 128,
    encoder_layers: int = 9,
    head_width: int = 128,
    codes: int = 256,
    depths: int = 4,
) -> DualTokenConfig:
    """
    A miniature of it for a CPU. An image takes (`image_size` / 8)² positions; the image tokens are the last three ids.

    Args:
        width, layers, vocabulary: of the language model.
        image_size, encoder_width, encoder_layers: of the tokenizer's encoder.
        head_width, codes, depths: of the depth heads and the quantisers.
    """
    tower = {
        "hidden_size": encoder_width,
        "intermediate_size": 4 * encoder_width,
        "num_attention_heads": max(1, encoder_width // 32),
    }
    quantizer = {"codebook_size": codes, "code_dim": 16, "num_depths": depths}
    tokenizer = DualTokenVisionTokenizerConfig(
        vision_config={**tower, "num_hidden_layers": encoder_layers, "image_size": image_size, "patch_size": 8},
        text_config={
            **tower,
            "num_hidden_layers": 1,
            "vocab_size": 64,
            "projection_size": encoder_width,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        **DualTokenVisionTokenizerConfig.layers_for(encoder_layers),
        pixel_quantizer_config=quantizer,
        semantic_quantizer_config=quantizer,
        decoder_block_out_channels=[32, 32],
        decoder_in_channels=32,
    )
    return DualTokenConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": 11008 * width // 2048,
            "num_hidden_layers": layers,
            "num_attention_heads": max(2, width // 64),
            "num_key_value_heads": max(1, width // 256),
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
        vision_tokenizer_config=tokenizer,
        depth_head_config={
            "hidden_size": head_width,
            "head_dim": head_width // 4,
            "intermediate_size": 2 * head_width,
            "input_hidden_size": width,
        },
        image_start_token_id=vocabulary - 3,
        image_token_id=vocabulary - 2,
        image_end_token_id=vocabulary - 1,
    )
