"""Configurations of the vision tokenizer, its quantisers, the depth heads and the unified model.

Every default is the paper's 384 px layout (DualToken, arXiv 2503.14324): SigLIP2-So400m/14-384, pixel codes from
encoder layer 6 with a shortcut from layer 4, semantic codes from layer 26, two codebooks of 16384 x 32 and eight
residual codes of each kind at every one of the 27 x 27 positions.
"""

import dataclasses
import difflib
import math
from typing import NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, Qwen2Config, SiglipConfig
from transformers.activations import ACT2FN
from transformers.models.auto import modeling_auto

from .checkpoint_loading import StrictConfigMixin


# The towers of google/siglip2-so400m-patch14-384.
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_SO400M_384 = {
    "vision_config": {**_SO400M, "image_size": 384, "patch_size": 14},
    "text_config": {**_SO400M, "vocab_size": 256000, "max_position_embeddings": 64, "projection_size": 1152},
}
# Gemma's vocabulary, which SigLIP 2's texts are made of, and its padding.
_GEMMA_VOCAB_SIZE, _GEMMA_PAD_TOKEN_ID = 256000, 0


class Within(NamedTuple):
    """What a number may be: an integer or any finite number, `low` included, `high` as well unless it is a bound."""

    kind: type
    low: float
    high: float
    optional: bool = False
    below: bool = False

    def check(self, name: str, value) -> None:
        if self.optional and value is None:
            return
        kinds, what = ((int,), "an integer") if self.kind is int else ((int, float), "a number")
        range_text = (
            f"of at least {self.low} and below {self.high}" if self.below else f"from {self.low} to {self.high}"
        )
        wanted = f"`{name}` must be {what} {range_text}{' or None' if self.optional else ''}"
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{wanted}, got {shown(value)}.")
        if not self.low <= value <= self.high or self.below and value == self.high:
            raise ValueError(f"{wanted}, got {shown(value)}.")


class OneOf(NamedTuple):
    """What a choice may be."""

    choices: tuple

    def check(self, name: str, value) -> None:
        # By type too: 1 is no `True`.
        if not any(type(value) is type(choice) and value == choice for choice in self.choices):
            *others, last = map(repr, self.choices)
            known_type = any(type(value) is type(choice) for choice in self.choices)
            raise (ValueError if known_type else TypeError)(
                f"`{name}` must be {', '.join(others)} or {last}, got {shown(value)}."
            )


class Numbers(NamedTuple):
    """What a list of numbers may be."""

    item: Within
    shortest: int
    longest: int
    optional: bool = False

    def check(self, name: str, value) -> None:
        if self.optional and value is None:
            return
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"`{name}` must be a list of integers, got {shown(value)}.")
        if not self.shortest <= len(value) <= self.longest:
            raise ValueError(f"`{name}` must have {self.shortest} to {self.longest} items, got {len(value)}.")
        for index, item in enumerate(value):
            self.item.check(f"{name}[{index}]", item)


_SIZE, _SIDE, _COUNT = Within(int, 1, 2**31 - 1), Within(int, 1, 2**16), Within(int, 1, 1024)
_TOKEN_ID = Within(int, 0, 2**31 - 1)
_EPSILON, _FRACTION, _WEIGHT = Within(float, 1e-30, 1), Within(float, 0, 1), Within(float, 0, 1e6)
_BOOL = OneOf((True, False))
# Fields of other projects' configs that sizes here are computed from, or whose odd values would go unnoticed.
_TRANSFORMER_FIELDS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), _SIZE),
    "num_hidden_layers": _COUNT,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "projection_size", "sliding_window"), _SIZE),
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps"), _EPSILON),
    "attention_dropout": _FRACTION,
    "hidden_act": OneOf(tuple(ACT2FN)),
    "initializer_range": Within(float, 0, 100),
}
_VISION_FIELDS = {"image_size": _SIDE, "patch_size": _SIDE, "num_channels": Within(int, 3, 3)}


def shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _plain_error(error: Exception, what: str) -> Exception:
    """
    What transformers raises of a field, in one sentence that begins with `what`: `@strict` wraps it in an error of its
    own, and unchecked fields end in whatever their first use raises.
    """
    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    kind = TypeError if isinstance(error, TypeError) else ValueError
    return kind(f"{what}: {' '.join(str(error).split())}")


def _refused_field(error: Exception, config_class, fields: dict, where: str = "") -> str | None:
    """The field that on its own gives the same error, and its value, as the beginning of a sentence."""
    for name, value in fields.items():
        try:
            config_class(**{name: value})
        except Exception as own_error:
            if type(own_error) is type(error) and str(own_error) == str(error):
                return f"`{where}{name}` cannot be {shown(value)}"
    return None


def _check_names(config_class, names, where: str) -> None:
    """Raise a `ValueError` for a misspelt field. Other unknown ones are kept: a later version may know them."""
    fields = config_class.__dataclass_fields__
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{where}: names of fields must be strings, got {shown(name)}.")
        if name not in fields and not hasattr(config_class, name):
            close = difflib.get_close_matches(name, fields, 1, cutoff=0.9)
            if close:
                raise ValueError(f"{where} has no field `{name}`; did you mean `{close[0]}`?")


def as_config(value, config_class, name: str, defaults: dict | None = None):
    """Build a sub-config from `None` (the defaults), a dict or a ready config."""
    if isinstance(value, config_class):
        return value
    if value is None:
        value = defaults or {}
    if not isinstance(value, dict):
        raise TypeError(
            f"`{name}` must be a {config_class.__name__} or a dict of its fields, got {type(value).__name__}."
        )
    model_type = value.get("model_type", config_class.model_type)
    if model_type != config_class.model_type:
        raise ValueError(f"`{name}` must be of type {config_class.model_type!r}, got {shown(model_type)}.")
    _check_names(config_class, value, f"`{name}`")
    fields = {key: item for key, item in value.items() if key != "model_type"}
    known = issubclass(config_class, _CheckedConfig)
    if not known:  # before transformers builds lists of so many layers
        _check_fields(name, fields, _TRANSFORMER_FIELDS)
    try:
        return config_class(**fields)
    except Exception as error:
        # Configs of this package name the field themselves.
        what = None if known else _refused_field(error, config_class, fields, f"{name}.")
        raise _plain_error(error, what or f"`{name}`") from error


def _check_fields(name: str, fields: dict, rules: dict) -> None:
    for field, rule in rules.items():
        if field in fields and (fields[field] is not None or field in ("hidden_size", "vocab_size")):
            rule.check(f"{name}.{field}", fields[field])


def _check_transformer(config, name: str, rules: dict) -> None:
    """The sizes of a transformer whose config is of transformers."""
    _check_fields(name, {field: getattr(config, field) for field in rules if hasattr(config, field)}, rules)
    heads = getattr(config, "num_attention_heads", None)
    if heads and getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise ValueError(
            f"`{name}.hidden_size` ({config.hidden_size}) must be a multiple of its num_attention_heads ({heads})."
        )


class _CheckedConfig(StrictConfigMixin):
    """
    A config whose fields are checked in one place: each by `_rules` when it is set, and all together by
    `check_together` once they are there and before they are saved. What is raised is a `ValueError` or a `TypeError`
    (`@strict` of huggingface_hub would wrap it in an error of its own, which is neither).
    """

    _rules = {}

    def __setattr__(self, name, value):
        if name in self._rules:
            self._rules[name].check(name, value)
        if name in self.sub_configs and not isinstance(value, (dict, PreTrainedConfig, type(None))):
            raise TypeError(f"`{name}` must be a config or a dict of its fields, got {shown(value)}.")
        try:
            super().__setattr__(name, value)
        except StrictDataclassError as error:  # a field of PreTrainedConfig
            raise _plain_error(error, f"`{name}` cannot be {shown(value)}") from error

    def __post_init__(self, **kwargs):
        _check_names(type(self), kwargs, type(self).__name__)
        try:
            super().__post_init__(**kwargs)
        except Exception as error:
            given = {field.name: getattr(self, field.name) for field in dataclasses.fields(PreTrainedConfig)}
            what = _refused_field(error, PreTrainedConfig, {**given, **kwargs})
            raise _plain_error(error, what or f"`{type(self).__name__}`") from error
        self.check_together()

    def check_together(self) -> None:
        """Raise a `ValueError` for fields that do not go together."""
        for name, config_class in self.sub_configs.items():
            config_class = PreTrainedConfig if config_class is AutoConfig else config_class
            if not isinstance(getattr(self, name), config_class):
                raise TypeError(f"`{name}` must be a {config_class.__name__}, got {shown(getattr(self, name))}.")

    def save_pretrained(self, save_directory, **kwargs):
        self.check_together()
        super().save_pretrained(save_directory, **kwargs)


def config_fields(config: PreTrainedConfig) -> dict:
    """A config as the fields of a part of another model, without the path it was loaded from."""
    fields = config.to_dict()
    fields.pop("_name_or_path", None)
    return fields


class DualTokenQuantizerConfig(_CheckedConfig, PreTrainedConfig):
    r"""
    One residual quantiser and its EMA codebook.

    Args:
        codebook_size (`int`, defaults to 16384): number of codes K.
        code_dim (`int`, defaults to 32): width C of a code vector.
        num_depths (`int`, defaults to 8): residual codes D per position.
        shared_codebook (`bool`, defaults to `True`): one codebook for all depths, or one per depth.
        update_rule (`str`, defaults to `"rq"`): `"rq"` moves the codebook after every depth, within the forward;
            `"rq_ema"` moves it once per forward.
        ema_vectors (`str`, defaults to `"own"`): which vector a depth's code is averaged with under `"rq_ema"`:
            `"own"` the residual that was looked up, `"final"` what is left after all depths. The latter is what the
            authors' published code does; their checkpoints are converted with it.
        ema_decay (`float`, defaults to 0.99): EMA factor of the counts and sums.
        ema_eps (`float`, defaults to 1e-5): additive smoothing of the counts.
        restart_unused_codes (`bool`, defaults to `True`): codes whose EMA count falls below 1 restart at a random
            vector of the batch.
    """

    model_type = "dualtoken_quantizer"

    codebook_size: int = 16384
    code_dim: int = 32
    num_depths: int = 8
    shared_codebook: bool = True
    update_rule: str = "rq"
    ema_vectors: str = "own"
    ema_decay: float | int = 0.99
    ema_eps: float = 1e-5
    restart_unused_codes: bool = True

    _rules = {
        "codebook_size": _SIZE,
        "code_dim": _SIZE,
        "num_depths": _COUNT,
        "shared_codebook": _BOOL,
        "update_rule": OneOf(("rq", "rq_ema")),
        "ema_vectors": OneOf(("own", "final")),
        "ema_decay": Within(float, 0, 1, below=True),
        "ema_eps": _EPSILON,
        "restart_unused_codes": _BOOL,
    }

    def check_together(self):
        if self.update_rule == "rq" and self.ema_vectors == "final":
            raise ValueError(
                "`ema_vectors='final'` needs `update_rule='rq_ema'`: with 'rq' the codebook moves before the final "
                "residual is known."
            )


class DualTokenVisionTokenizerConfig(_CheckedConfig, PreTrainedConfig):
    r"""
    The vision tokenizer: a SigLIP or SigLIP 2 encoder of fixed resolution, two quantisers and an image decoder.

    Layers are counted from 1: layer i is the output of the i-th encoder layer.

    Args:
        vision_config, text_config (`SiglipVisionConfig`, `SiglipTextConfig` or `dict`): the two towers.
        pixel_layer (`int`, defaults to 6): encoder layer the pixel codes are made from.
        semantic_layer (`int`, defaults to 26): encoder layer the semantic codes are made from.
        shortcut_layer (`int`, *optional*, defaults to 4): shallower layer added to the pixel branch; `None`: no
            shortcut.
        shortcut_weight (`float`, defaults to 0.6): its weight.
        pixel_quantizer_config, semantic_quantizer_config ([`DualTokenQuantizerConfig`] or `dict`).
        decoder_latent_size (`int`, *optional*): side of the decoder's latent. Defaults to the image's side divided
            by the decoder's upsampling factor. A grid of another side is resized to it bilinearly.
        decoder_in_channels (`int`, defaults to 1024): channels between the residual block and the decoder.
        decoder_block_out_channels (`list[int]`, defaults to `[128, 128, 512, 512, 1024]`): channels of the decoder's
            levels, from the image's resolution down to the latent's. Every level but the last doubles the side.
        decoder_attention_levels (`list[int]`, *optional*): indices into `decoder_block_out_channels` of the levels
            with attention. Defaults to the last, the lowest resolution.
        decoder_num_res_blocks (`int`, defaults to 2): a level has one residual block more than this.
        decoder_norm_num_groups (`int`, defaults to 32): groups of the decoder's group normalisations.
        initializer_range (`float`, defaults to 0.02): standard deviation of new projections and codebooks.
    """

    model_type = "dualtoken_vision_tokenizer"
    # By class, not by string: Hub remote code resolves names within one flat folder.
    sub_configs = {
        "vision_config": SiglipConfig.sub_configs["vision_config"],
        "text_config": SiglipConfig.sub_configs["text_config"],
        "pixel_quantizer_config": DualTokenQuantizerConfig,
        "semantic_quantizer_config": DualTokenQuantizerConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    pixel_layer: int = 6
    semantic_layer: int = 26
    shortcut_layer: int | None = 4
    shortcut_weight: float | int = 0.6
    pixel_quantizer_config: dict | PreTrainedConfig | None = None
    semantic_quantizer_config: dict | PreTrainedConfig | None = None
    decoder_latent_size: int | None = None
    decoder_in_channels: int = 1024
    decoder_block_out_channels: list[int] | tuple[int, ...] = (128, 128, 512, 512, 1024)
    decoder_attention_levels: list[int] | tuple[int, ...] | None = None
    decoder_num_res_blocks: int = 2
    decoder_norm_num_groups: int = 32
    initializer_range: float = 0.02

    _rules = {
        "pixel_layer": _COUNT,
        "semantic_layer": _COUNT,
        "shortcut_layer": _COUNT._replace(optional=True),
        "shortcut_weight": Within(float, -1000, 1000),
        "decoder_latent_size": _SIDE._replace(optional=True),
        "decoder_in_channels": _SIZE,
        "decoder_block_out_channels": Numbers(_SIZE, 1, 16),
        "decoder_attention_levels": Numbers(Within(int, 0, 15), 0, 16, optional=True),
        "decoder_num_res_blocks": Within(int, 0, 1024),
        "decoder_norm_num_groups": _SIZE,
        "initializer_range": Within(float, 0, 100),
    }

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            defaults = _SO400M_384.get(name)
            setattr(self, name, as_config(getattr(self, name), config_class, name, defaults))
        self.check_towers()
        if self.text_config.vocab_size == _GEMMA_VOCAB_SIZE and self.text_config.pad_token_id == 1:
            # SigLIP 2's folders say nothing and get SigLIP's default, which is the end of a text there.
            self.text_config.pad_token_id = _GEMMA_PAD_TOKEN_ID
        self.decoder_block_out_channels = list(self.decoder_block_out_channels)
        if self.decoder_attention_levels is None:
            self.decoder_attention_levels = [len(self.decoder_block_out_channels) - 1]
        self.decoder_attention_levels = sorted(self.decoder_attention_levels)
        if self.decoder_latent_size is None:
            if self.vision_config.image_size < self.decoder_upsampling:
                raise ValueError(
                    f"`decoder_block_out_channels` doubles the side {len(self.decoder_block_out_channels) - 1} times, "
                    f"which is more than image_size={self.vision_config.image_size} allows."
                )
            self.decoder_latent_size = self.vision_config.image_size // self.decoder_upsampling
        super().__post_init__(**kwargs)

    def check_together(self):
        super().check_together()
        self.check_towers()
        self.check_sizes()
        self.check_layers()

    @property
    def image_size(self) -> int:
        """Side of the input image in pixels."""
        return self.vision_config.image_size

    @property
    def grid_size(self) -> int:
        """Positions along one side of the code grid."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_positions(self) -> int:
        """Positions N = H * W an image takes in a sequence."""
        return self.grid_size**2

    @property
    def decoder_upsampling(self) -> int:
        return 2 ** (len(self.decoder_block_out_channels) - 1)

    @property
    def reconstruction_size(self) -> int:
        """Side of the decoded image in pixels; may differ from `image_size`."""
        return self.decoder_latent_size * self.decoder_upsampling

    def check_layers(self):
        num_layers = self.vision_config.num_hidden_layers
        for name in ("pixel_layer", "semantic_layer", "shortcut_layer"):
            layer = getattr(self, name)
            if layer is not None and not 1 <= layer <= num_layers:
                raise ValueError(
                    f"`{name}` must lie between 1 and {num_layers}, the number of layers of the vision encoder, "
                    f"got {layer}."
                )
        if max(self.pixel_layer, self.shortcut_layer or 1) > self.semantic_layer:
            raise ValueError(
                "The pixel and shortcut layers must not lie above the semantic layer, whose output is replaced by the "
                f"quantised features: got pixel_layer={self.pixel_layer}, shortcut_layer={self.shortcut_layer}, "
                f"semantic_layer={self.semantic_layer}."
            )

    def check_towers(self):
        image_size, patch_size = self.vision_config.image_size, self.vision_config.patch_size
        if isinstance(image_size, (list, tuple)) or isinstance(patch_size, (list, tuple)):
            raise ValueError(
                f"The encoder must have one square resolution, got image_size={image_size}, patch_size={patch_size}."
            )
        _check_transformer(self.vision_config, "vision_config", {**_TRANSFORMER_FIELDS, **_VISION_FIELDS})
        _check_transformer(self.text_config, "text_config", _TRANSFORMER_FIELDS)

    def check_sizes(self):
        image_size, patch_size = self.vision_config.image_size, self.vision_config.patch_size
        if patch_size > image_size:
            raise ValueError(f"patch_size={patch_size} is larger than image_size={image_size}.")
        _SIDE.check(
            "reconstruction_size (decoder_latent_size and decoder_block_out_channels)", self.reconstruction_size
        )
        for name in ("pixel_quantizer_config", "semantic_quantizer_config"):
            code_dim = getattr(self, name).code_dim
            if self.vision_config.hidden_size % code_dim:
                raise ValueError(
                    f"The encoder's hidden size ({self.vision_config.hidden_size}) must be a multiple of "
                    f"{name}.code_dim ({code_dim}): the projections have hidden_size / code_dim heads."
                )
        levels = len(self.decoder_block_out_channels)
        wrong = [level for level in self.decoder_attention_levels if not 0 <= level < levels]
        if wrong:
            raise ValueError(f"`decoder_attention_levels` must lie between 0 and {levels - 1}, got {wrong}.")
        groups = self.decoder_norm_num_groups
        widths = [self.vision_config.hidden_size, self.decoder_in_channels, *self.decoder_block_out_channels]
        if any(width % groups for width in widths):
            raise ValueError(
                f"`decoder_norm_num_groups` ({groups}) must divide the encoder's hidden size and all channels of the "
                f"decoder, got {widths}."
            )

    @classmethod
    def layers_for(cls, num_hidden_layers: int) -> dict[str, int]:
        """The paper's layers carried over to an encoder of another depth: 6 / 4 / 26 of 27, 6 / 4 / 23 of 24."""
        return {
            "pixel_layer": math.ceil(6 * num_hidden_layers / 27),
            "shortcut_layer": math.ceil(4 * num_hidden_layers / 27),
            "semantic_layer": max(1, num_hidden_layers - 1),
        }


class DualTokenDepthHeadConfig(_CheckedConfig, PreTrainedConfig):
    r"""
    The two depth transformers, one per kind of codes. At the defaults and a language model of width 2048 each head
    has 258 M parameters.

    Args:
        hidden_size (`int`, defaults to 1024): width of the depth transformer.
        num_hidden_layers (`int`, defaults to 3): its layers.
        head_dim (`int`, defaults to 128): width of an attention head.
        intermediate_size (`int`, defaults to 2048): width of the feed-forwards; every depth has its own.
        input_hidden_size (`int`, defaults to 2048): width of the two-layer perceptron between the language model and
            the head.
        hidden_act (`str`, defaults to `"gelu"`): activation of the perceptron and the feed-forwards.
        rms_norm_eps (`float`, defaults to 1e-6).
        bias (`bool`, defaults to `False`): biases in the attention, the feed-forwards, the input perceptron and
            projections, and the classifiers.
        initializer_range (`float`, defaults to 0.02).
    """

    model_type = "dualtoken_depth_head"

    hidden_size: int = 1024
    num_hidden_layers: int = 3
    head_dim: int = 128
    intermediate_size: int = 2048
    input_hidden_size: int = 2048
    hidden_act: str = "gelu"
    rms_norm_eps: float = 1e-6
    bias: bool = False
    initializer_range: float = 0.02

    _rules = {
        "hidden_size": _SIZE,
        "num_hidden_layers": _COUNT,
        "head_dim": _SIZE,
        "intermediate_size": _SIZE,
        "input_hidden_size": _SIZE,
        "hidden_act": OneOf(tuple(ACT2FN)),
        "rms_norm_eps": _EPSILON,
        "bias": _BOOL,
        "initializer_range": Within(float, 0, 100),
    }

    @property
    def num_attention_heads(self) -> int:
        return self.hidden_size // self.head_dim

    def check_together(self):
        if self.hidden_size % self.head_dim:
            raise ValueError(f"`hidden_size` ({self.hidden_size}) must be a multiple of `head_dim` ({self.head_dim}).")


class DualTokenConfig(_CheckedConfig, PreTrainedConfig):
    r"""
    The unified model: a vision tokenizer, a causal language model and a depth head for each kind of codes.

    Args:
        text_config (`PreTrainedConfig` or `dict`): the language model; Qwen2 by default.
        vision_tokenizer_config ([`DualTokenVisionTokenizerConfig`] or `dict`).
        depth_head_config ([`DualTokenDepthHeadConfig`] or `dict`): shared by both heads.
        image_start_token_id, image_token_id, image_end_token_id (`int`): default to the ids of Qwen2.5's
            `<|vision_start|>`, `<|image_pad|>` and `<|vision_end|>`.
        depth_reduction (`str`, defaults to `"sum"`): how a position's cross-entropies over the depths are joined:
            `"sum"` (paper) or `"mean"`.
        text_loss_weight, pixel_loss_weight, semantic_loss_weight (`float`, default to 1.0).
        tie_word_embeddings (`bool`, *optional*): tie the text head to the input embeddings. Defaults to what the
            language model does.
        initializer_range (`float`, defaults to 0.02).
    """

    model_type = "dualtoken"
    sub_configs = {
        "text_config": AutoConfig,
        "vision_tokenizer_config": DualTokenVisionTokenizerConfig,
        "depth_head_config": DualTokenDepthHeadConfig,
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    vision_tokenizer_config: dict | PreTrainedConfig | None = None
    depth_head_config: dict | PreTrainedConfig | None = None
    image_start_token_id: int = 151652
    image_token_id: int = 151655
    image_end_token_id: int = 151653
    depth_reduction: str = "sum"
    text_loss_weight: float | int = 1.0
    pixel_loss_weight: float | int = 1.0
    semantic_loss_weight: float | int = 1.0
    tie_word_embeddings: bool | None = None
    initializer_range: float = 0.02

    _rules = {
        **dict.fromkeys(("image_start_token_id", "image_token_id", "image_end_token_id"), _TOKEN_ID),
        "depth_reduction": OneOf(("sum", "mean")),
        **dict.fromkeys(("text_loss_weight", "pixel_loss_weight", "semantic_loss_weight"), _WEIGHT),
        "tie_word_embeddings": OneOf((True, False, None)),
        "initializer_range": Within(float, 0, 100),
    }

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            model_type = fields.pop("model_type", "qwen2")
            if not isinstance(model_type, str):
                raise TypeError(f"`text_config.model_type` must be a string, got {shown(model_type)}.")
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"`text_config.model_type` must be a model type of transformers, got {shown(model_type)}."
                )
            self.text_config = as_config(fields, CONFIG_MAPPING[model_type], "text_config")
        self.text_config = Qwen2Config() if self.text_config is None else self.text_config
        if not isinstance(self.text_config, PreTrainedConfig):
            raise TypeError(
                f"`text_config` must be a PreTrainedConfig or a dict of its fields, got {shown(self.text_config)}."
            )
        for name in ("vision_tokenizer_config", "depth_head_config"):
            setattr(self, name, as_config(getattr(self, name), self.sub_configs[name], name))
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        features = kwargs.pop("visual_features", "codes")
        if features != "codes":
            raise ValueError(f"`visual_features` must be 'codes', the only kind there is, got {shown(features)}.")
        # TRL reads it of every model it does not know, also where there is no remote code.
        self.auto_map = kwargs.pop("auto_map", None) or {}
        super().__post_init__(**kwargs)

    def check_together(self):
        super().check_together()
        for name in ("hidden_size", "vocab_size"):
            if not hasattr(self.text_config, name):
                raise ValueError(
                    f"`text_config` must be of a causal language model: {type(self.text_config).__name__} has no {name}."
                )
        _check_transformer(self.text_config, "text_config", _TRANSFORMER_FIELDS)
        self.check_token_ids()
        self.check_quantizers_agree()

    def to_dict(self) -> dict:
        fields = super().to_dict()
        if not fields["auto_map"]:
            del fields["auto_map"]
        return fields

    @property
    def num_depths(self) -> int:
        return self.vision_tokenizer_config.pixel_quantizer_config.num_depths

    @property
    def codebook_size(self) -> int:
        return self.vision_tokenizer_config.pixel_quantizer_config.codebook_size

    @property
    def code_dim(self) -> int:
        return self.vision_tokenizer_config.pixel_quantizer_config.code_dim

    @property
    def num_positions(self) -> int:
        """Positions N an image takes between `<image_start>` and `<image_end>`."""
        return self.vision_tokenizer_config.num_positions

    @property
    def special_image_token_ids(self) -> tuple[int, int, int]:
        return self.image_start_token_id, self.image_token_id, self.image_end_token_id

    def check_token_ids(self):
        ids = self.special_image_token_ids
        if len(set(ids)) != 3:
            raise ValueError(f"The three image token ids must differ, got {ids}.")
        vocab_size = self.text_config.vocab_size
        if not all(0 <= token_id < vocab_size for token_id in ids):
            raise ValueError(
                f"The image token ids must lie in the language model's vocabulary of {vocab_size}, "
                f"got image_start_token_id, image_token_id, image_end_token_id = {ids}."
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self.text_config, name, None)
            for token_id in value if isinstance(value, list) else [value]:
                Within(int, 0, vocab_size - 1, optional=True).check(f"text_config.{name}", token_id)

    def check_quantizers_agree(self):
        tokenizer = self.vision_tokenizer_config
        for name in ("codebook_size", "code_dim", "num_depths"):
            pixel, semantic = (
                getattr(quantizer, name)
                for quantizer in (tokenizer.pixel_quantizer_config, tokenizer.semantic_quantizer_config)
            )
            if pixel != semantic:
                raise ValueError(
                    f"The unified model needs both quantisers to have the same `{name}` (its two depth heads are one "
                    f"batched transformer), got pixel {pixel} and semantic {semantic}."
                )


# Pipelines and `transformers serve` look classes up by name, in tables that the Auto classes' `register` leaves alone.
# Here rather than in the package's `__init__`, which is no part of what the Hub copies as remote code.
for _task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
    getattr(modeling_auto, f"MODEL_FOR_{_task}_MAPPING_NAMES")[DualTokenConfig.model_type] = "DualTokenForCausalLM"
modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[DualTokenVisionTokenizerConfig.model_type] = (
    "DualTokenVisionTokenizer"
)
del _task


__all__ = [
    "DualTokenConfig",
    "DualTokenDepthHeadConfig",
    "DualTokenQuantizerConfig",
    "DualTokenVisionTokenizerConfig",
]
