"""Loading the unified model with a language model of 4 or 8 bits, for inference and for training an adapter on it."""

import os

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from ...modeling_dualtoken import DualTokenForCausalLM
from ...optional_libraries import MissingLibraryError


def low_bit_config(bits: int = 4, library: str = "bitsandbytes", dtype: torch.dtype = torch.bfloat16):
    """
    A `quantization_config` for `from_pretrained`: of `"bitsandbytes"` with 4 bits (NF4 with quantised scales, as in
    QLoRA, computing in `dtype`) or 8, or of `"torchao"` with 8 (int8 weights, one scale per output).

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
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


def load_quantized(
    path: str | os.PathLike, *, bits: int = 4, library: str = "bitsandbytes", dtype=torch.bfloat16, **kwargs
) -> DualTokenForCausalLM:
    """
    `from_pretrained` of a unified model whose language model has 4 or 8 bits a weight, frozen; the rest has `dtype`, the
    codebooks float32. [`add_lora`] adds what can be trained.
    """
    config = low_bit_config(bits, library, dtype)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config, **kwargs)
