"""Loading the unified model with a language model of 4 or 8 bits, for inference and for training an adapter on it."""

import os

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from ...modeling_dualtoken import DualTokenForCausalLM
from ...optional_libraries import MissingLibraryError


def low_bit_config(
    bits: int = 4, library: str = "bitsandbytes", dtype: torch.dtype = torch.bfloat16
) -> BitsAndBytesConfig | TorchAoConfig:
    """
    A `quantization_config` for `from_pretrained` in the recommended settings.

    Args:
        bits (`int`, defaults to 4): 4 (NF4 with quantised scales, as in QLoRA) or 8.
        library (`str`, defaults to `"bitsandbytes"`): or `"torchao"`, with 8 bits: int8 weights, one scale per output.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): in which 4-bit layers compute.

    Raises:
        ValueError: for another number of bits or another library.
        ImportError: if the library is not installed.
    """
    if (library, bits) not in {("bitsandbytes", 4), ("bitsandbytes", 8), ("torchao", 8)}:
        raise ValueError(
            f"Quantised loading takes 4 or 8 bits of bitsandbytes, or 8 of torchao, got {bits} of {library!r}."
        )
    if not (is_torchao_available() if library == "torchao" else is_bitsandbytes_available()):
        raise MissingLibraryError(f"Loading with {bits} bits", library)
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_quantized(
    path: str | os.PathLike,
    *,
    bits: int = 4,
    library: str = "bitsandbytes",
    dtype: torch.dtype = torch.bfloat16,
    **kwargs,
) -> DualTokenForCausalLM:
    """
    Load a unified model whose language model has 4 or 8 bits a weight; the rest has `dtype`, the codebooks float32.

    The blocks' weights are frozen; [`add_lora`] adds what can be trained. `kwargs` are those of `from_pretrained`.
    """
    config = low_bit_config(bits, library, dtype)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config, **kwargs)
