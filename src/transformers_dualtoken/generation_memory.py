"""How much memory a generation will take, said before it begins rather than when it has failed."""

import torch


# For what the count leaves out: workspaces of libraries, fragments between blocks.
_MARGIN = 256 * 2**20


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; `None` where that is not known (a CPU can swap)."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds in reserve is free to us.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bytes_per_image(model, num_columns: int, prompt_length: int, guided: bool, dtype: torch.dtype) -> int:
    """
    Bytes that one drawn image takes: keys and values, the prompt's activations, and a step's buffers in the heads.

    Args:
        model ([`DualTokenForCausalLM`]).
        num_columns (`int`): length of the cache: prompt and image.
        prompt_length (`int`).
        guided (`bool`): with an unconditional row for every image.
        dtype (`torch.dtype`): the language model's.
    """
    config, heads = model.config.text_config, model.config.depth_head_config
    sides, size = 2 if guided else 1, dtype.itemsize
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * kv_heads * head_dim * size
    # The prompt's keys and values lie in a cache of their own until they are copied.
    cache = token * (sides * num_columns + prompt_length)
    activations = prompt_length * (3 * config.intermediate_size + 8 * config.hidden_size) * size
    attention = 2 * heads.num_hidden_layers * 2 * sides * model.config.num_depths * heads.hidden_size * size
    # Logits of both heads, and in float32 what sampling makes of them.
    logits = 2 * model.config.codebook_size * (size + 3 * 4)
    return cache + activations + attention + logits


def check_memory(model, rows: int, num_columns: int, prompt_length: int, guided: bool) -> None:
    """
    Raise a `ValueError` that names the largest batch that fits, unless `rows` images do.

    Where the free memory is not known nothing is checked.
    """
    weight = model.get_input_embeddings().weight
    available = free_memory(weight.device)
    if available is None:
        return
    each = bytes_per_image(model, num_columns, prompt_length, guided, weight.dtype)
    if rows * each + _MARGIN <= available:
        return
    largest = max(0, available - _MARGIN) // each
    advice = f"the largest batch that fits is {largest}" if largest else "not even one image fits"
    raise ValueError(
        f"Drawing {rows} image(s) at once after prompts of {prompt_length} tokens takes about {rows * each / 1e9:.1f} GB, "
        f"{each / 1e9:.2f} GB each, but {max(0, available - _MARGIN) / 1e9:.1f} GB are free on {weight.device}: {advice} "
        "(prompts times `num_return_sequences`)."
    )


__all__ = ["bytes_per_image", "check_memory", "free_memory"]
