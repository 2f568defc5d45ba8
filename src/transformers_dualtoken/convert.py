"""The authors' tokenizer checkpoints in this project's format.

A folder in their format holds `config.json` (with the keys `rqvaesiglip`, `ddconfig`, `vq_sem`, `vq_pix`), one
training checkpoint `*.pt` with a `state_dict`, and the configuration of the SigLIP model it was built on, at the path
`pretrained_model`.

The checkpoint that ASVR (arXiv 2506.09040) made public in 2025 is of an older layout: no `vq_sem` and `vq_pix`, their
keys stand in `rqvaesiglip`, once for both quantisers; pixel projections are residual blocks, semantic ones there are
none. The layers stand in its code: 22 and 2 from the end, of 27 layers 6 and 26.
"""

import re
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from transformers import PreTrainedConfig, SiglipConfig, SiglipVisionConfig
from transformers.utils import cached_file, logging

from .checkpoints import check_model_type, checkpoint_errors, damage_errors, read_json_object
from .configuration_dualtoken import (
    CODE_KINDS,
    COUNT,
    SIDE,
    SIZE,
    DualTokenQuantizerConfig,
    DualTokenVisionTokenizerConfig,
    as_config,
)
from .field_rules import list_of, shown
from .modeling_vision_tokenizer import DualTokenVisionTokenizer


logger = logging.get_logger(__name__)

# The authors' keys and the fields of this project's configs that take their values.
_MODEL_KEYS = {"layer_recon": "pixel_layer", "layer_sem": "semantic_layer"}
_OPTIONAL_KEYS = {"layer_shortcut": "shortcut_layer", "weight_shortcut": "shortcut_weight"}
_DECODER_KEYS = {"num_res_blocks": "decoder_num_res_blocks", "decoder_in_channels": "decoder_in_channels"}
_QUANTIZER_KEYS = {
    **{"bottleneck_type": "update_rule", "n_embed": "codebook_size", "embed_dim": "code_dim", "decay": "ema_decay"},
    **{"restart_unused_codes": "restart_unused_codes", "shared_codebook": "shared_codebook"},
}


def _rules(config_class, keys: dict) -> dict:
    return {key: config_class._rules[field] for key, field in keys.items()}


# What is read of the authors' configuration, and what it may be; null is as good as missing.
_MODEL_RULES = _rules(DualTokenVisionTokenizerConfig, _MODEL_KEYS)
_OPTIONAL_RULES = {
    **_rules(DualTokenVisionTokenizerConfig, _OPTIONAL_KEYS),
    "decoder_latent_shape": list_of(SIDE, 2, 2),
}
_QUANTIZER_RULES = {**_rules(DualTokenQuantizerConfig, _QUANTIZER_KEYS), "code_shape": list_of(COUNT, 3, 3)}
_DECODER_RULES = {
    **_rules(DualTokenVisionTokenizerConfig, _DECODER_KEYS),
    **{"resolution": SIDE, "attn_resolutions": list_of(SIDE, 0, 1024), "ch": SIZE, "ch_mult": list_of(SIZE, 1, 16)},
}
_PARTS = {"ddconfig": _DECODER_RULES, "vq_sem": _QUANTIZER_RULES, "vq_pix": _QUANTIZER_RULES}
# The layout of 2025.
_RULES_OF_2025 = {
    **{key: rule for key, rule in _QUANTIZER_RULES.items() if key != "bottleneck_type"},
    **{"hidden_size": SIZE, "latent_shape": list_of(SIZE, 3, 3), "ddconfig": None},
}
_DEFAULTS_OF_2025 = {"decay": 0.99, "shared_codebook": False, "restart_unused_codes": False}
_PIXEL_LAYER_FROM_END, _SEMANTIC_LAYER_FROM_END = 22, 2
_PARTS_OF_2025 = ("siglip_model.", "prequant_", "postquant_", "quantizer", "post_quant_conv.", "decoder.")
_RENAMES_OF_2025 = [
    (r"quant_pix\.", "quant_visual."),
    (r"^quantizer_pix\.", "quantizer."),
    (r"^quantizer_sem\.", "quantizer_semantic."),
]
# What can be wrong with another value only, in the authors' names.
_KEYS_OF_FIELDS = {
    **{field: key for key, field in (_MODEL_KEYS | _OPTIONAL_KEYS).items()},
    "pixel_quantizer_config.code_dim": "vq_pix.embed_dim",
    "semantic_quantizer_config.code_dim": "vq_sem.embed_dim",
    "decoder_latent_size": "decoder_latent_shape",
    "decoder_block_out_channels": "ddconfig.ch * ddconfig.ch_mult",
}

# From this project's names to the authors', applied in order.
_RENAMES = [
    (r"^siglip\.", "siglip_model."),
    (r"^(post_quantizer_block|\w+_proj)\.shortcut\.", r"\1.nin_shortcut."),
    (r"(_proj\.attn)\.out_proj\.", r"\1.proj."),
    (r"(_proj\.mlp)\.gate_proj\.", r"\1.w0."),
    (r"(_proj\.mlp)\.up_proj\.", r"\1.w1."),
    (r"(_proj\.mlp)\.down_proj\.", r"\1.w2."),
    (r"^pixel_down_proj\.", "prequant_pix."),
    (r"^semantic_down_proj\.", "prequant_sem."),
    (r"^shortcut_down_proj\.", "prequant_shortcut."),
    (r"^pixel_up_proj\.", "postquant_pix."),
    (r"^semantic_up_proj\.", "postquant_sem."),
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


@contextmanager
def _errors_of(where):
    """Errors of values begin with where the values are from."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def official_key(key: str, num_levels: int, of_2025: bool = False) -> str:
    """
    The authors' name of a parameter of [`DualTokenVisionTokenizer`], codebooks excepted: theirs of
    `pixel_down_proj.attn.qkv.weight` is `prequant_pix.attn.qkv.weight`. They count the decoder's levels from the other
    end. `of_2025`: in the older layout.
    """
    level = re.match(r"^decoder\.up_blocks\.(\d+)\.", key)
    if level:
        key = f"decoder.up.{num_levels - 1 - int(level[1])}." + key[level.end() :]
    for pattern, replacement in _RENAMES + (_RENAMES_OF_2025 if of_2025 else []):
        key = re.sub(pattern, replacement, key)
    return key


def official_view(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter in their shape: linear layers `(out, in)` of the decoder's attention are convolutions `(out, in, 1, 1)`."""
    return tensor[..., None, None] if re.search(r"\.(to_[qkv]|to_out\.0)\.weight$", key) else tensor


def is_official_folder(path: str | Path) -> bool:
    """
    Whether a path is a folder in the authors' format, rather than one of this project's or a Hub id; a `ValueError` if
    its `config.json` is no JSON object.
    """
    config_path = Path(path) / "config.json"
    return config_path.is_file() and "rqvaesiglip" in read_json_object(config_path)


def official_siglip_path(folder: str | Path) -> str:
    """
    Folder or Hub id of the SigLIP checkpoint that a folder in the authors' format was built on. Their
    `pretrained_model` may be relative to the folder, an absolute path of another machine, or a Hub id.
    """
    return _siglip_path(Path(folder), _official_fields(Path(folder)))


def convert_official_config(folder: str | Path) -> DualTokenVisionTokenizerConfig:
    """
    The configuration of a folder in the authors' format.

    Raises:
        FileNotFoundError: if there is no such folder, no `config.json` in it, or no SigLIP configuration.
        ValueError: for a value that cannot be, or that is missing: names the file, the key, and what is accepted.
    """
    folder = Path(folder)
    config_path = folder / "config.json"
    config = _official_fields(folder)
    siglip_path, towers = _siglip_towers(_siglip_path(folder, config), config_path)
    projections = {}
    if _is_of_2025(config):
        projections = {"projection_type": "resnet", "semantic_projection": False}
        config = _as_later_layout(config, towers["vision_config"], config_path)
    decoder = config["ddconfig"]
    levels = len(decoder["ch_mult"])
    sides = [decoder["resolution"] // 2 ** (levels - 1) * 2 ** (levels - 1 - level) for level in range(levels)]
    grid = towers["vision_config"].image_size // towers["vision_config"].patch_size
    latent_shape = config.get("decoder_latent_shape") or [grid, grid]
    if latent_shape[0] != latent_shape[1]:
        raise ValueError(f"{config_path}: 'decoder_latent_shape' must be square, got {latent_shape}.")
    keys = {**_MODEL_KEYS, **_OPTIONAL_KEYS}
    given = {field: config[key] for key, field in keys.items() if config.get(key) is not None}
    try:
        return DualTokenVisionTokenizerConfig(
            **{"shortcut_layer": None, **towers, **given, **projections},
            **{field: decoder[key] for key, field in _DECODER_KEYS.items()},
            pixel_quantizer_config=_quantizer_config(config["vq_pix"]),
            semantic_quantizer_config=_quantizer_config(config["vq_sem"]),
            decoder_latent_size=latent_shape[0],
            decoder_block_out_channels=[decoder["ch"] * multiplier for multiplier in decoder["ch_mult"]],
            decoder_attention_levels=[level for level in range(levels) if sides[level] in decoder["attn_resolutions"]],
        )
    except (TypeError, ValueError) as error:
        text = str(error)
        for field, key in _KEYS_OF_FIELDS.items():
            text = re.sub(rf"\b{field}\b", key, text)
        raise ValueError(f"{config_path}, with {siglip_path}: {text}") from error


def _official_fields(folder: Path) -> dict:
    """`rqvaesiglip` of a folder in the authors' format, every key that is read of the right kind."""
    config_path = folder / "config.json"
    with checkpoint_errors(folder):
        if not config_path.is_file():
            raise FileNotFoundError(f"{folder} holds no config.json in the authors' format.")
        outer = read_json_object(config_path)
    if "rqvaesiglip" not in outer:
        raise ValueError(f"{config_path} is not in the authors' format: it has no key 'rqvaesiglip'.")
    config = outer["rqvaesiglip"]
    with _errors_of(config_path):
        of_2025 = _is_of_2025(config)
        if of_2025:  # with what its code takes for what is not given
            config = {**_DEFAULTS_OF_2025, **{key: value for key, value in config.items() if value is not None}}
        rules = _RULES_OF_2025 if of_2025 else {**_MODEL_RULES, **dict.fromkeys(_PARTS)}
        _check("rqvaesiglip", config, rules, _OPTIONAL_RULES)
        for name in ("ddconfig",) if of_2025 else _PARTS:
            _check(name, config[name], _PARTS[name])
        path = config.get("pretrained_model")
        if path is not None and not (isinstance(path, str) and path.isprintable() and len(path) <= 4096):
            raise ValueError(f"`rqvaesiglip.pretrained_model` must be a folder or Hub id, got {shown(path)}.")
    return config


def _is_of_2025(config: dict) -> bool:
    """Whether `rqvaesiglip` holds a quantiser's keys itself, and none that came with quantisers of their own."""
    keys = set(config) if isinstance(config, dict) else set()
    own, later = {"embed_dim", "n_embed", "latent_shape", "code_shape"}, {*_MODEL_KEYS, "vq_sem", "vq_pix"}
    return bool(keys & own) and not keys & later


def _as_later_layout(config: dict, vision_config: SiglipVisionConfig, config_path: Path) -> dict:
    """`rqvaesiglip` of the layout of 2025 under the later layout's keys."""
    width, layers = vision_config.hidden_size, vision_config.num_hidden_layers
    if layers < _PIXEL_LAYER_FROM_END:
        raise ValueError(
            f"{config_path}: a checkpoint of 2025 takes its pixel codes from layer {_PIXEL_LAYER_FROM_END} from the end, "
            f"but its SigLIP has {layers} layers."
        )
    sizes = {"hidden_size": width, "embed_dim": width, "latent_shape": [*config["code_shape"][:2], width]}
    for key, expected in sizes.items():
        if config[key] != expected:
            raise ValueError(
                f"{config_path}: `rqvaesiglip.{key}` must be {expected} by `code_shape` and the width of its SigLIP, which "
                f"semantic codes keep in a checkpoint of 2025, got {shown(config[key])}."
            )
    quantizer = {**config, "bottleneck_type": "rq"}
    return {
        **config,
        "layer_recon": layers - _PIXEL_LAYER_FROM_END + 1,
        "layer_sem": layers - _SEMANTIC_LAYER_FROM_END + 1,
        "vq_pix": quantizer,
        "vq_sem": quantizer,
    }


def _check(name: str, part, rules: dict, optional: dict | None = None) -> None:
    """Check a part of the configuration; a list of the same value for every depth becomes that value."""
    if not isinstance(part, dict):
        raise ValueError(f"'{name}' must be an object, got {shown(part)}.")
    missing = [key for key in rules if part.get(key) is None]
    if missing:
        raise ValueError(f"'{name}' lacks {', '.join(missing)}.")
    for key, rule in {**rules, **(optional or {})}.items():
        value = part.get(key)
        if key in ("n_embed", "decay") and isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise ValueError(f"`{name}.{key}` must be the same at every depth, got {shown(value)}.")
            value = part[key] = value[0]
        if rule is not None and value is not None:
            rule.check(f"{name}.{key}", value)


def _siglip_path(folder: Path, config: dict) -> str:
    name = config.get("pretrained_model")
    for candidate in (name, "siglip"):
        if candidate and (folder / candidate / "config.json").is_file():
            return str(folder / candidate)
    if not name:
        raise ValueError(
            f"{folder / 'config.json'} has no 'pretrained_model', and {folder / 'siglip'} does not exist."
        )
    return name


def _siglip_towers(name: str, config_path: Path) -> tuple[str, dict]:
    """The file of a SigLIP configuration, and its two towers' as the vision tokenizer takes them."""
    where = f"{config_path}: the SigLIP checkpoint, `rqvaesiglip.pretrained_model`, cannot be read"
    try:
        with checkpoint_errors(name):
            path = cached_file(name, "config.json")
            if path is None:
                raise FileNotFoundError(f"{name} holds no config.json.")
    except OSError as error:
        raise FileNotFoundError(f"{where}. {error}") from error
    with _errors_of(f"{where}: {path}"):
        fields = read_json_object(path)
        check_model_type(SiglipConfig, fields)
        # What is left out has SigLIP's defaults, not the paper's.
        towers = {name: _architecture(fields.get(name) or {}) for name in ("vision_config", "text_config")}
        towers["vision_config"] = as_config(towers["vision_config"], SiglipVisionConfig, "vision_config")
        for side in ("image_size", "patch_size"):
            SIDE.check(f"vision_config.{side}", getattr(towers["vision_config"], side))
    return path, towers


def _architecture(fields):
    """A tower's fields without those that any config has (labels, dtype, plans of parallelism), which no weight needs."""
    if not isinstance(fields, dict):
        return fields
    general = {*PreTrainedConfig.__dataclass_fields__, *dir(PreTrainedConfig), "quantization_config"} - {"model_type"}
    return {name: value for name, value in fields.items() if name not in general}


def _quantizer_config(config: dict) -> DualTokenQuantizerConfig:
    fields = {field: config[key] for key, field in _QUANTIZER_KEYS.items()}
    # In the authors' code all depths alias one residual, the final one.
    ema_vectors = "final" if fields["update_rule"] == "rq_ema" else "own"
    return DualTokenQuantizerConfig(**fields, num_depths=config["code_shape"][-1], ema_vectors=ema_vectors)


def convert_official_state_dict(official: dict, model: DualTokenVisionTokenizer) -> dict[str, torch.Tensor]:
    """
    The authors' `state_dict` under the names, and in the shapes, of `model`. A `ValueError` names every missing,
    unexpected or misshapen key, what is no dense tensor of finite real numbers, the copy of a shared codebook that
    differs, and a `zero_k_bias` that is not zero.
    """
    num_levels, of_2025 = len(model.config.decoder_block_out_channels), model.config.projection_type == "resnet"
    converted, problems = {}, [f"the key {shown(name)} is not a string" for name in official if type(name) is not str]
    remaining = {name: tensor for name, tensor in official.items() if type(name) is str}
    for key, tensor in model.state_dict().items():
        if ".codebook." in key:
            continue
        name = official_key(key, num_levels, of_2025)
        given = _take(remaining, name, official_view(key, tensor).shape, problems)
        if given is not None:
            converted[key] = given.view_as(tensor)
    for kind in CODE_KINDS:
        converted.update(_convert_codebooks(kind, remaining, model.quantizer(kind).config, problems, of_2025))
    for name in list(remaining):
        if re.match(r"^(pre|post)quant_(pix|sem|shortcut)\.attn\.zero_k_bias$", name):
            tensor = _take(remaining, name, None, problems)
            if tensor is not None and tensor.any():
                problems.append(f"'{name}' is not zero, but the projections' keys have no bias")
    if of_2025:
        # As in its code, which passes over what it does not know; but not over parts that would change the result.
        foreign = [name for name in remaining if not name.startswith(_PARTS_OF_2025)]
        if foreign:
            logger.warning(f"Left out, since the vision tokenizer has no such parts: {shown(sorted(foreign))}.")
        remaining = {name: tensor for name, tensor in remaining.items() if name.startswith(_PARTS_OF_2025)}
    problems += [f"unexpected '{name}'" for name in remaining]
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError(f"The checkpoint does not fit its configuration: {'; '.join(problems[:20] + more)}.")
    return converted


def _take(remaining: dict, name: str, shape: tuple | None, problems: list[str]) -> torch.Tensor | None:
    """Remove a tensor of `shape` (`None`: any) from `remaining`, in float32; or note what is wrong with it: `None`."""
    if name not in remaining:
        problems.append(f"missing '{name}'")
        return None
    tensor = remaining.pop(name)
    fault = _fault(tensor)
    if not fault and shape is not None and tensor.shape != shape:
        fault = f"has shape {tuple(tensor.shape)} instead of {tuple(shape)}"
    if fault:
        problems.append(f"'{name}' {fault}")
    return None if fault else tensor.float()


def _fault(tensor) -> str | None:
    """What keeps a value of a checkpoint from being a weight, as the end of a sentence."""
    if not isinstance(tensor, torch.Tensor):
        return f"is of type {type(tensor).__name__}, not a tensor"
    is_dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    if not is_dense or not tensor.is_floating_point():
        return f"must be a dense tensor of real numbers, got {tensor.dtype}, {tensor.layout}"
    # A shape may promise more than the file holds: strides of 0, or no storage at all.
    if tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"has shape {tuple(tensor.shape)}, but fewer values in the file"
    if not torch.isfinite(tensor.float()).all():
        return "has values that are not finite"
    return None


def _convert_codebooks(
    kind: str, remaining: dict, config: DualTokenQuantizerConfig, problems: list[str], of_2025: bool
) -> dict:
    """The three `(books, K, ...)` buffers of a codebook."""
    converted = {}
    names = {"embeddings": "weight", "cluster_size": "cluster_size_ema", "embedding_sum": "embed_ema"}
    prefix = official_key(f"quantizer_{kind[:3]}.", 0, of_2025)
    if of_2025 and not any(name.startswith(prefix) and name.endswith("_ema") for name in remaining):
        names = {"embeddings": "weight"}
    for our_name, name in names.items():
        # The authors' tables end in a padding row.
        rows = config.codebook_size + (name == "weight")
        shape = (rows,) if name == "cluster_size_ema" else (rows, config.code_dim)
        keys = [f"{prefix}codebooks.{depth}.{name}" for depth in range(config.num_depths)]
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
        converted[f"{kind}_quantizer.codebook.{our_name}"] = torch.stack(depths)[:, : config.codebook_size]
    if len(names) == 1 and converted:
        # Without statistics: codes that stay for -ln(1 - decay) / (1 - decay) steps of further training before they restart.
        (embeddings,) = converted.values()
        sizes = torch.full(embeddings.shape[:2], 1 / (1 - config.ema_decay))
        converted[f"{kind}_quantizer.codebook.cluster_size"] = sizes
        converted[f"{kind}_quantizer.codebook.embedding_sum"] = embeddings * sizes[..., None]
    return converted


def load_official_tokenizer(folder: str | Path) -> DualTokenVisionTokenizer:
    """
    Load a tokenizer that was trained with the authors' code, from a folder with `config.json`, exactly one `*.pt` and
    the SigLIP configuration; in eval mode, float32.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the configuration, or any key, shape or value of the checkpoint, does not fit (the message names
            it), or the checkpoint is damaged or holds more than tensors and plain values.
    """
    folder = Path(folder)
    config = convert_official_config(folder)
    checkpoints = sorted(folder.glob("*.pt"))
    if len(checkpoints) != 1:
        found = ", ".join(path.name for path in checkpoints) or "none"
        raise FileNotFoundError(f"{folder} must hold exactly one checkpoint *.pt, found {found}.")
    official = _read_state_dict(checkpoints[0])
    # Sizes out of all proportion to the file would fill the memory.
    try:
        with torch.device("meta"):
            layout = DualTokenVisionTokenizer(config)
    except RuntimeError as error:  # more bytes than 64 bits count
        raise ValueError(f"{folder / 'config.json'}: no model can have these sizes ({error}).") from error
    with _errors_of(checkpoints[0]):
        converted = convert_official_state_dict(official, layout)
    model = DualTokenVisionTokenizer(config)
    model.load_state_dict(converted)
    return model.eval()


def _read_state_dict(path: Path) -> dict:
    """`state_dict` of a training checkpoint, its keys without the prefix of distributed training."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    with damage_errors(f"{path}, which must be a whole torch checkpoint of tensors and plain values,"):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            # Not the whole text, which advises to run what the file asks for.
            found = re.search(r"\bGLOBAL (\S+)", str(error))
            reason = f"it asks for {found[1]}, and such objects may run code" if found else "other objects"
            raise UnpicklingError(reason) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} has no 'state_dict'.")
    official = checkpoint["state_dict"]
    if not isinstance(official, dict):
        raise ValueError(f"{path}: 'state_dict' must be a dict of tensors, got {type(official).__name__}.")
    if all(type(key) is str and key.startswith("module.") for key in official):
        official = {key.removeprefix("module."): tensor for key, tensor in official.items()}
    return official


def load_vision_tokenizer(path: str | Path, dtype: torch.dtype = torch.float32) -> DualTokenVisionTokenizer:
    """
    The vision tokenizer of a folder or repository of its own, of a unified model, whose language model is not loaded, or
    of a folder in the authors' format. Errors are those of [`DualTokenVisionTokenizer.from_pretrained`].
    """
    if is_official_folder(path):
        return load_official_tokenizer(path).to(dtype)
    return DualTokenVisionTokenizer.from_pretrained(path, dtype=dtype)
