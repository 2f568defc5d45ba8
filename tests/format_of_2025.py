"""A small checkpoint in the layout of 2025, the same on every machine, and the numbers recorded for it."""

import zlib
from pathlib import Path

import numpy as np
import torch
from official_format import decoder_fields, siglip_fields, write_folder

from transformers_dualtoken import DualTokenVisionTokenizer
from transformers_dualtoken.convert import convert_official_config, official_key, official_view


# With this seed every nearest code is nearer than the second by 0.05 % or more: no tie on any machine.
SEED = 381
NUMBERS = Path(__file__).parent / "fixtures" / "tokenizer_of_2025.safetensors"


def fields_of_2025(**overrides):
    """`rqvaesiglip` of a 32 px tokenizer with 4 x 4 positions; fields given as `...` are left out."""
    fields = {
        **{"embed_dim": 64, "hidden_size": 64, "n_embed": 24, "latent_shape": [4, 4, 64], "code_shape": [4, 4, 8]},
        **{"shared_codebook": False, "restart_unused_codes": True, "decay": 0.99, "latent_loss_weight": 0.25},
        "ddconfig": decoder_fields(decoder_in_channels=96, attn_resolutions=[]),
        "decoder_latent_shape": [3, 3],
        "pretrained_model": "siglip",
        **overrides,
    }
    return {key: value for key, value in fields.items() if value is not ...}


def siglip_fields_of_2025(num_layers=27):
    """Of as many layers as SO400M, from whose end that code counts."""
    fields = siglip_fields(num_layers)
    fields["vision_config"] |= {"hidden_size": 64, "intermediate_size": 96, "image_size": 32}
    fields["text_config"] |= {"hidden_size": 64, "intermediate_size": 96, "projection_size": 64}
    return fields


def tensor_of_name(name: str, shape) -> torch.Tensor:
    """Random values of variance 1 that depend on the name and `SEED` alone: float64 and one rounding, so the same everywhere."""
    values = np.random.RandomState(zlib.crc32(f"{SEED} {name}".encode())).random_sample(tuple(shape))
    return torch.from_numpy(np.sqrt(3) * (2 * values - 1))


def weights_of_2025(model: DualTokenVisionTokenizer) -> dict[str, torch.Tensor]:
    """Weights under that layout's names, of sizes that keep every part alive, in the shapes of `model`."""
    shapes = {}
    for name, tensor in model.state_dict().items():
        if ".codebook." not in name:
            levels = len(model.config.decoder_block_out_channels)
            shapes[official_key(name, levels, of_2025=True)] = official_view(name, tensor).shape
    for kind, part in (("pixel", "quantizer"), ("semantic", "quantizer_semantic")):
        config = model.quantizer(kind).config
        for depth in range(config.num_depths):
            shapes[f"{part}.codebooks.{depth}.weight"] = (config.codebook_size + 1, config.code_dim)
    weights = {}
    for name, shape in shapes.items():
        is_shared = ".codebooks." in name and model.config.pixel_quantizer_config.shared_codebook
        tensor = tensor_of_name(name.split(".codebooks.")[0] if is_shared else name, shape)
        if ".codebooks." in name:
            tensor[-1] = 0  # the padding row
        elif len(shape) > 1:
            # Positions that differ much: group norms of nearly constant maps would amplify rounding errors.
            tensor *= (3 if "_embedding." in name else 1) * tensor[0].numel() ** -0.5
        else:
            tensor = 0.1 * tensor + ("norm" in name and name.endswith("weight"))
        weights[name] = tensor.float()
    return weights


def write_folder_of_2025(folder: Path, change=None, num_layers=27, **overrides) -> Path:
    """That checkpoint in its folder; `change` takes its weights and returns others."""
    fields, siglip = fields_of_2025(**overrides), siglip_fields_of_2025(num_layers)
    write_folder(folder, fields, None, siglip)
    with torch.device("meta"):
        weights = weights_of_2025(DualTokenVisionTokenizer(convert_official_config(folder)))
    return write_folder(folder, fields, change(weights) if change else weights, siglip)


def inputs_of_2025() -> dict[str, torch.Tensor]:
    """Two images in [-1, 1] and two texts."""
    pixel_values = tensor_of_name("pixel_values", (2, 3, 32, 32)) / np.sqrt(3)
    input_ids = 33 + 30 * tensor_of_name("input_ids", (2, 8)) / np.sqrt(3)
    return {"pixel_values": pixel_values.float(), "input_ids": input_ids.long()}
