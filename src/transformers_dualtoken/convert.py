"""The authors' tokenizer checkpoints in this project's format.

A folder in their format holds `config.json` (with the keys `rqvaesiglip`, `ddconfig`, `vq_sem`, `vq_pix`), one
training checkpoint `*.pt` with a `state_dict`, and the configuration of the SigLIP model it was built on, at the path
`pretrained_model`.
"""

import json
import re
from pathlib import Path

import torch
from transformers import SiglipConfig

from .configuration_dualtoken import DualTokenQuantizerConfig, DualTokenVisionTokenizerConfig, config_fields
from .modeling_vision_tokenizer import CODE_KINDS, DualTokenVisionTokenizer


_KIND_IN_KEYS = {"pixel": "pix", "semantic": "sem"}
_MODEL_KEYS = ("layer_recon", "layer_sem", "ddconfig", "vq_sem", "vq_pix")
_DECODER_KEYS = ("resolution", "attn_resolutions", "ch", "ch_mult", "num_res_blocks", "decoder_in_channels")
_QUANTIZER_KEYS = (
    "bottleneck_type",
    "code_shape",
    "decay",
    "embed_dim",
    "n_embed",
    "restart_unused_codes",
    "shared_codebook",
)
_CODEBOOK_TENSORS = {"embeddings": "weight", "cluster_size": "cluster_size_ema", "embedding_sum": "embed_ema"}

# From this project's names to the authors', applied in order.
_RENAMES = [
    (r"^siglip\.", "siglip_model."),
    (r"(_proj\.attn)\.out_proj\.", r"\1.proj."),
    (r"(_proj\.mlp)\.gate_proj\.", r"\1.w0."),
    (r"(_proj\.mlp)\.up_proj\.", r"\1.w1."),
    (r"(_proj\.mlp)\.down_proj\.", r"\1.w2."),
    (r"^pixel_down_proj\.", "prequant_pix."),
    (r"^semantic_down_proj\.", "prequant_sem."),
    (r"^shortcut_down_proj\.", "prequant_shortcut."),
    (r"^pixel_up_proj\.", "postquant_pix."),
    (r"^semantic_up_proj\.", "postquant_sem."),
    (r"^post_quantizer_block\.shortcut\.", "post_quant_conv.nin_shortcut."),
    (r"^post_quantizer_block\.", "post_quant_conv."),
    (r"^decoder\.conv_norm_out\.", "decoder.norm_out."),
    (r"^decoder\.mid_block\.resnets\.0\.", "decoder.mid.block_1."),
    (r"^decoder\.mid_block\.resnets\.1\.", "decoder.mid.block_2."),
    (r"^decoder\.mid_block\.attentions\.0\.", "decoder.mid.attn_1."),
    (r"^(decoder\.up\.\d+)\.resnets\.", r"\1.block."),
    (r"^(decoder\.up\.\d+)\.attentions\.", r"\1.attn."),
    (r"^(decoder\.up\.\d+)\.upsamplers\.0\.", r"\1.upsample."),
    (r"^(decoder\..*)\.conv_shortcut\.", r"\1.nin_shortcut."),
    (r"^(decoder\..*)\.group_norm\.", r"\1.norm."),
    (r"^(decoder\..*)\.to_([qkv])\.", r"\1.\2."),
    (r"^(decoder\..*)\.to_out\.0\.", r"\1.proj_out."),
]


def official_key(key: str, num_levels: int) -> str:
    """
    The authors' name of a parameter of [`DualTokenVisionTokenizer`]. Codebooks have no one-to-one name.

    Args:
        key (`str`): for example `pixel_down_proj.attn.qkv.weight`, theirs is `prequant_pix.attn.qkv.weight`.
        num_levels (`int`): levels of the decoder; the two sides count them from opposite ends.
    """
    level = re.match(r"^decoder\.up_blocks\.(\d+)\.", key)
    if level:
        key = f"decoder.up.{num_levels - 1 - int(level[1])}." + key[level.end() :]
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def official_view(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter in the shape it has there: the decoder's attention is made of 1 x 1 convolutions, not linear layers."""
    return tensor[..., None, None] if re.search(r"\.(to_[qkv]|to_out\.0)\.weight$", key) else tensor


def convert_official_config(folder: str | Path) -> DualTokenVisionTokenizerConfig:
    """The configuration of a folder in the authors' format."""
    folder = Path(folder)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json in the authors' format.")
    outer = json.loads(config_path.read_text())
    if "rqvaesiglip" not in outer:
        raise ValueError(f"{config_path} is not in the authors' format: it has no key 'rqvaesiglip'.")
    config = outer["rqvaesiglip"]
    _require(config, _MODEL_KEYS, f"{config_path}: 'rqvaesiglip'")
    _require(config["ddconfig"], _DECODER_KEYS, f"{config_path}: 'ddconfig'")
    for name in ("vq_pix", "vq_sem"):
        _require(config[name], _QUANTIZER_KEYS, f"{config_path}: '{name}'")

    siglip_config = SiglipConfig.from_pretrained(_siglip_path(folder, config))
    decoder = config["ddconfig"]
    levels = len(decoder["ch_mult"])
    lowest_resolution = decoder["resolution"] // 2 ** (levels - 1)
    attention_levels = [
        level
        for level in range(levels)
        if lowest_resolution * 2 ** (levels - 1 - level) in decoder["attn_resolutions"]
    ]
    grid = siglip_config.vision_config.image_size // siglip_config.vision_config.patch_size
    latent_shape = config.get("decoder_latent_shape") or [grid, grid]
    if latent_shape[0] != latent_shape[1]:
        raise ValueError(f"{config_path}: 'decoder_latent_shape' must be square, got {latent_shape}.")
    return DualTokenVisionTokenizerConfig(
        vision_config=config_fields(siglip_config.vision_config),
        text_config=config_fields(siglip_config.text_config),
        pixel_layer=config["layer_recon"],
        semantic_layer=config["layer_sem"],
        shortcut_layer=config.get("layer_shortcut"),
        shortcut_weight=0.6 if config.get("weight_shortcut") is None else config["weight_shortcut"],
        pixel_quantizer_config=_quantizer_config(config["vq_pix"], "vq_pix"),
        semantic_quantizer_config=_quantizer_config(config["vq_sem"], "vq_sem"),
        decoder_latent_size=latent_shape[0],
        decoder_in_channels=decoder["decoder_in_channels"],
        decoder_block_out_channels=[decoder["ch"] * multiplier for multiplier in decoder["ch_mult"]],
        decoder_attention_levels=attention_levels,
        decoder_num_res_blocks=decoder["num_res_blocks"],
    )


def _require(config: dict, keys: tuple[str, ...], where: str) -> None:
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")


def is_official_folder(path: str | Path) -> bool:
    """Whether a path is a folder in the authors' format, rather than one of this project's or a Hub id."""
    config_path = Path(path) / "config.json"
    return config_path.is_file() and "rqvaesiglip" in json.loads(config_path.read_text())


def official_siglip_path(folder: str | Path) -> str:
    """Folder or Hub id of the SigLIP checkpoint that a folder in the authors' format was built on."""
    folder = Path(folder)
    return _siglip_path(folder, json.loads((folder / "config.json").read_text())["rqvaesiglip"])


def _siglip_path(folder: Path, config: dict) -> str:
    """`pretrained_model` may be relative to the folder, an absolute path of another machine, or a Hub id."""
    name = config.get("pretrained_model")
    for candidate in (folder / str(name), folder / "siglip"):
        if (candidate / "config.json").is_file():
            return str(candidate)
    if not name:
        raise ValueError(
            f"{folder / 'config.json'} has no 'pretrained_model', and {folder / 'siglip'} does not exist."
        )
    return str(name)


def _quantizer_config(config: dict, name: str) -> DualTokenQuantizerConfig:
    for key in ("n_embed", "decay"):
        if isinstance(config[key], list):
            if len(set(config[key])) != 1:
                raise ValueError(f"{name}: '{key}' must be the same at every depth, got {config[key]}.")
            config = {**config, key: config[key][0]}
    update_rule = config["bottleneck_type"]
    return DualTokenQuantizerConfig(
        codebook_size=config["n_embed"],
        code_dim=config["embed_dim"],
        num_depths=config["code_shape"][-1],
        shared_codebook=config["shared_codebook"],
        update_rule=update_rule,
        # In the authors' code all depths alias one residual, the final one.
        ema_vectors="final" if update_rule == "rq_ema" else "own",
        ema_decay=config["decay"],
        restart_unused_codes=config["restart_unused_codes"],
    )


def convert_official_state_dict(
    official: dict[str, torch.Tensor], model: DualTokenVisionTokenizer
) -> dict[str, torch.Tensor]:
    """
    The authors' `state_dict` under the names, and in the shapes, of `model`.

    Raises:
        ValueError: naming every missing, unexpected or misshapen key, the copy of a shared codebook that differs, or
            a `zero_k_bias` that is not zero.
    """
    num_levels = len(model.config.decoder_block_out_channels)
    remaining, converted, problems = dict(official), {}, []
    for key, tensor in model.state_dict().items():
        if ".codebook." in key:
            continue
        name = official_key(key, num_levels)
        shape = tuple(official_view(key, tensor).shape)
        given = _take(remaining, name, shape, problems)
        if given is not None:
            converted[key] = given.view_as(tensor)
    for kind in CODE_KINDS:
        converted.update(_convert_codebooks(kind, remaining, model.quantizer(kind).config, problems))
    for name in list(remaining):
        if re.match(r"^(pre|post)quant_(pix|sem|shortcut)\.attn\.zero_k_bias$", name):
            if remaining.pop(name).any():
                problems.append(f"'{name}' is not zero, but the projections' keys have no bias")
    problems += [f"unexpected '{name}'" for name in remaining]
    if problems:
        raise ValueError(f"The checkpoint does not fit its configuration: {'; '.join(problems)}.")
    return converted


def _take(remaining: dict, name: str, shape: tuple, problems: list[str]) -> torch.Tensor | None:
    """Remove a tensor from `remaining`; note a problem and return `None` if it is missing or misshapen."""
    tensor = remaining.pop(name, None)
    if tensor is None:
        problems.append(f"missing '{name}'")
    elif tuple(tensor.shape) != shape:
        problems.append(f"'{name}' has shape {tuple(tensor.shape)} instead of {shape}")
    else:
        return tensor
    return None


def _convert_codebooks(
    kind: str, remaining: dict, config: DualTokenQuantizerConfig, problems: list[str]
) -> dict[str, torch.Tensor]:
    converted = {}
    for our_name, name in _CODEBOOK_TENSORS.items():
        # The authors' tables end in a padding row.
        rows = config.codebook_size + (name == "weight")
        shape = (rows,) if name == "cluster_size_ema" else (rows, config.code_dim)
        keys = [f"quantizer_{_KIND_IN_KEYS[kind]}.codebooks.{depth}.{name}" for depth in range(config.num_depths)]
        depths = [_take(remaining, key, shape, problems) for key in keys]
        if any(tensor is None for tensor in depths):
            continue
        if config.shared_codebook:
            # A shared codebook is stored once per depth.
            problems += [
                f"'{key}' differs from '{keys[0]}' although the codebook is shared by all depths"
                for key, tensor in zip(keys, depths)
                if not torch.equal(tensor, depths[0])
            ]
            depths = depths[:1]
        converted[f"{kind}_quantizer.codebook.{our_name}"] = torch.stack(depths)[:, : config.codebook_size].float()
    return converted


def load_official_tokenizer(folder: str | Path) -> DualTokenVisionTokenizer:
    """
    Load a tokenizer that was trained with the authors' code.

    Args:
        folder (`str` or `Path`): holds `config.json`, exactly one `*.pt`, and the SigLIP configuration.

    Returns:
        [`DualTokenVisionTokenizer`] in eval mode, float32.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the configuration, or any key or shape of the checkpoint, does not fit; the message names it.
    """
    folder = Path(folder)
    config = convert_official_config(folder)
    checkpoints = sorted(folder.glob("*.pt"))
    if len(checkpoints) != 1:
        found = ", ".join(path.name for path in checkpoints) or "none"
        raise FileNotFoundError(f"{folder} must hold exactly one checkpoint *.pt, found {found}.")
    checkpoint = torch.load(checkpoints[0], map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{checkpoints[0]} has no 'state_dict'.")
    # A checkpoint of distributed training carries the wrapper's prefix on every key.
    official = checkpoint["state_dict"]
    if official and all(key.startswith("module.") for key in official):
        official = {key.removeprefix("module."): tensor for key, tensor in official.items()}
    model = DualTokenVisionTokenizer(config)
    model.load_state_dict(convert_official_state_dict(official, model))
    return model.eval()


def load_vision_tokenizer(path: str | Path, dtype: torch.dtype = torch.float32) -> DualTokenVisionTokenizer:
    """
    The vision tokenizer of a folder or repository of its own, of a unified model, whose language model is not loaded, or
    of a folder in the authors' format.

    Raises:
        FileNotFoundError, ValueError: as [`DualTokenVisionTokenizer.from_pretrained`].
    """
    if is_official_folder(path):
        return load_official_tokenizer(path).to(dtype)
    return DualTokenVisionTokenizer.from_pretrained(path, dtype=dtype)


__all__ = [
    "convert_official_config",
    "convert_official_state_dict",
    "is_official_folder",
    "load_official_tokenizer",
    "load_vision_tokenizer",
    "official_key",
    "official_siglip_path",
    "official_view",
]
