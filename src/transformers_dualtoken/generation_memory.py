"""How much memory a generation will take, said before it begins rather than when it has failed."""

import os
from dataclasses import dataclass

import torch


# For what the count leaves out: workspaces of libraries, fragments between blocks.
_MARGIN = 256 * 2**20


@dataclass
class GenerationSize:
    """
    What decides how much memory a generation takes.

    Args:
        rows (`int`): images drawn at once.
        num_prompts (`int`): prompts that are fed before; each belongs to as many rows.
        prompt_length (`int`): of these, padding included.
        num_columns (`int`): length of the cache: the longer of the prompts and the negative prompts, and what is new.
        num_candidates (`int`): codes that sampling chooses from, at every depth.
        guided (`bool`): with an unconditional row for every row.
    """

    rows: int
    num_prompts: int
    prompt_length: int
    num_columns: int
    num_candidates: int
    guided: bool


def free_memory(device: torch.device) -> int | None:
    """
    Bytes that can still be allocated on a device; `None` where that is not known.

    For a CPU it is all the memory there is: what others hold may be swapped, and what is beyond it never fits.
    """
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds in reserve is free to us.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bytes_needed(model, size: GenerationSize, rows: int) -> int:
    """
    Bytes that `rows` rows take at their peak: while the prompts are fed, or afterwards, with the prompts' own cache
    still there.
    """
    config, heads = model.config.text_config, model.config.depth_head_config
    width = model.get_input_embeddings().weight.dtype.itemsize
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * kv_heads * head_dim * width
    sides, num_depths = 2 if size.guided else 1, model.config.num_depths
    num_prompts = -(-rows * size.num_prompts // size.rows)
    prompt_cache = num_prompts * size.prompt_length * token
    feeding = num_prompts * size.prompt_length * (3 * config.intermediate_size + 8 * config.hidden_size) * width
    depth_cache = 2 * heads.num_hidden_layers * 2 * sides * num_depths * heads.hidden_size * width
    # Logits of both heads, what sampling makes of them in float32, and its noise.
    sampling = 2 * model.config.codebook_size * (width + 8) + 2 * (num_depths + 4) * size.num_candidates * 4
    return prompt_cache + max(feeding, rows * (sides * size.num_columns * token + depth_cache + sampling))


def check_memory(model, size: GenerationSize) -> None:
    """
    Raise a `ValueError` that names the largest batch that fits, unless `size.rows` images do.

    Nothing is checked where the free memory is not known, or the model lies on several devices.
    """
    device = model.get_input_embeddings().weight.device
    is_spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    available = None if is_spread else free_memory(device)
    if available is None:
        return
    available = max(0, available - _MARGIN)
    needed = bytes_needed(model, size, size.rows)
    if needed <= available:
        return
    # The largest number of rows, by halving the doubt.
    largest, too_many = 0, size.rows
    while too_many - largest > 1:
        middle = (largest + too_many) // 2
        if bytes_needed(model, size, middle) <= available:
            largest = middle
        else:
            too_many = middle
    advice = f"the largest batch that fits is {largest}" if largest else "not even one image fits"
    raise ValueError(
        f"Drawing {size.rows} image(s) at once, with up to {size.num_columns} tokens each, takes about "
        f"{_in_words(needed)}, but {_in_words(available)} are free on {device}: {advice} (prompts times "
        "`num_return_sequences`)."
    )


def _in_words(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


__all__ = ["GenerationSize", "bytes_needed", "check_memory", "free_memory"]
