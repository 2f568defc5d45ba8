"""Configurations of tiny models: seconds on a CPU, no downloads, every optional part present."""

import torch

from transformers_dualtoken.configuration_dualtoken import DualTokenConfig, DualTokenVisionTokenizerConfig
from transformers_dualtoken.modeling_dualtoken import DualTokenForCausalLM


def tiny_quantizer_fields(**overrides) -> dict:
    """Fields of a `DualTokenQuantizerConfig`: 24 codes of width 8, three residual codes per position."""
    return {"codebook_size": 24, "code_dim": 8, "num_depths": 3, **overrides}


def tiny_tokenizer_config(**overrides) -> DualTokenVisionTokenizerConfig:
    """24 px, patches of 8 (3 x 3 positions), 4 layers, a shortcut, and a latent that is resized to 12 x 12."""
    fields = {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 24,
            "patch_size": 8,
        },
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "vocab_size": 64,
            "max_position_embeddings": 8,
            "projection_size": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "pixel_layer": 2,
        "semantic_layer": 3,
        "shortcut_layer": 1,
        "pixel_quantizer_config": tiny_quantizer_fields(),
        "semantic_quantizer_config": tiny_quantizer_fields(),
        "decoder_block_out_channels": [8, 16],
        "decoder_in_channels": 16,
        "decoder_norm_num_groups": 8,
        "decoder_latent_size": 12,
    }
    return DualTokenVisionTokenizerConfig(**{**fields, **overrides})


def layout_of_2025(**quantizer) -> dict:
    """Overrides of `tiny_tokenizer_config`: the layout of the authors' checkpoint of 2025, all codes 32 wide."""
    quantizer = tiny_quantizer_fields(code_dim=32, shared_codebook=False, **quantizer)
    return {
        "projection_type": "resnet",
        "semantic_projection": False,
        "shortcut_layer": None,
        **{f"{kind}_quantizer_config": quantizer for kind in ("pixel", "semantic")},
    }


def tiny_unified_config(**overrides) -> DualTokenConfig:
    """`tiny_tokenizer_config()` with a two-layer Qwen2 of 60 tokens; image tokens 50 (start), 51 and 52 (end)."""
    fields = {
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "vision_tokenizer_config": tiny_tokenizer_config().to_dict(),
        "depth_head_config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "intermediate_size": 32,
            "input_hidden_size": 24,
        },
        "image_start_token_id": 50,
        "image_token_id": 51,
        "image_end_token_id": 52,
    }
    return DualTokenConfig(**{**fields, **overrides})


@torch.no_grad()
def lively_unified_model(seed: int = 0, **overrides) -> DualTokenForCausalLM:
    """
    `tiny_unified_config()` with weights large enough that contexts, codes and depths really change what comes out.

    At the usual initialisation the most probable code hardly depends on anything, and tests would pass for nothing.
    """
    torch.manual_seed(seed)
    model = DualTokenForCausalLM(tiny_unified_config(**overrides))
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("depth_heads", "visual_projector", "language_model")) and parameter.ndim > 1:
            parameter.mul_(8)
        elif "vision_tokenizer" in name and "_proj." in name and parameter.ndim == 2:
            parameter.normal_(std=0.3)
    for kind in ("pixel", "semantic"):
        model.vision_tokenizer.quantizer(kind).codebook.embeddings.normal_()
    return model.eval()


def depth_logits(heads, hidden_states: torch.Tensor, code_embeds: torch.Tensor) -> torch.Tensor:
    """Logits `(M, T, D, K)` of every depth given the true codes before it, of `(T, H)` and `(M, T, D, C)`."""
    return heads.classifier(heads._features(hidden_states, code_embeds)).transpose(1, 2)
