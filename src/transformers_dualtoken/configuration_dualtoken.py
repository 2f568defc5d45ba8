# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
# License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""Configurations of the vision tokenizer, its quantisers, the depth heads and the unified model.

Every default is the paper's 384 px layout (DualToken, arXiv 2503.14324): SigLIP2-So400m/14-384, pixel codes from
encoder layer 6 with a shortcut from layer 4, semantic codes from layer 26, two codebooks of 16384 x 32 and eight
residual codes of each kind at every one of the 27 x 27 positions. What a field may be stands in its annotation.
"""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Iterator
from typing import Annotated, get_origin

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, Qwen2Config, SiglipConfig
from transformers.activations import ACT2FN
from transformers.models.auto import modeling_auto

from .checkpoints import check_model_type
from .field_rules import FLAG, list_of, one_of, shown, within
from .remote_code import copy_code


CODE_KINDS = ("pixel", "semantic")

# The towers of google/siglip2-so400m-patch14-384.
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_SO400M_384 = {
    "vision_config": {**_SO400M, "image_size": 384, "patch_size": 14},
    "text_config": {**_SO400M, "vocab_size": 256000, "max_position_embeddings": 64, "projection_size": 1152},
}
# Gemma's vocabulary, which SigLIP 2's texts are made of, and its padding.
_GEMMA_VOCAB_SIZE, _GEMMA_PAD_TOKEN_ID = 256000, 0


SIZE, SIDE, COUNT = within(int, 1, 2**31 - 1), within(int, 1, 2**16), within(int, 1, 1024)
TOKEN_ID = within(int, 0, 2**31 - 1)
EPSILON, FRACTION = within(float, 1e-30, 1), within(float, 0, 1)
WEIGHT, STD = within(float, 0, 1e6), within(float, 0, 100)
ACTIVATION = one_of(*ACT2FN)
# Fields of other projects' configs that sizes here are computed from, or whose odd values would go unnoticed.
_TRANSFORMER_RULES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), SIZE),
    "num_hidden_layers": COUNT,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "projection_size", "sliding_window"), SIZE),
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps"), EPSILON),
    "attention_dropout": FRACTION,
    "hidden_act": ACTIVATION,
    "initializer_range": STD,
}
_VISION_RULES = {**_TRANSFORMER_RULES, "image_size": SIDE, "patch_size": SIDE, "num_channels": within(int, 3, 3)}


def _plain_error(error: Exception, what: str) -> Exception:
    """What transformers raises of a field, as a `TypeError` or `ValueError` of one sentence that begins with `what`."""
    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{what}: {' '.join(str(error).split())}")


def _refused_field(error: Exception, config_class, fields: dict, where: str = "") -> str | None:
    """The field that on its own gives the same error, and its value, as the beginning of a sentence."""
    for name, value in fields.items():
        try:
            config_class(**{name: value})
        except Exception as own_error:
            if (type(own_error), str(own_error)) == (type(error), str(error)):
                return f"`{where}{name}` cannot be {shown(value)}"
    return None


def _check_names(config_class, names, where: str) -> None:
    """Refuse a misspelt field. Other unknown ones are kept: a later version may know them."""
    fields = config_class.__dataclass_fields__
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{where}: names of fields must be strings, got {shown(name)}.")
        if name not in fields and not hasattr(config_class, name):
            close = difflib.get_close_matches(name, fields, 1, cutoff=0.9)
            if close:
                raise ValueError(f"{where} has no field `{name}`; did you mean `{close[0]}`?")


def _check_transformer(name: str, config: dict | PreTrainedConfig, rules: dict) -> None:
    """The fields of a transformer of another project, by `rules`."""
    if isinstance(config, PreTrainedConfig):
        config = {field: getattr(config, field) for field in (*rules, "head_dim") if hasattr(config, field)}
    for field, rule in rules.items():
        if field in config and (config[field] is not None or field in ("hidden_size", "vocab_size")):
            rule.check(f"{name}.{field}", config[field])
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if width and heads and config.get("head_dim") is None and width % heads:
        raise ValueError(f"`{name}.hidden_size` ({width}) must be a multiple of its num_attention_heads ({heads}).")


def as_config(value, config_class, name: str, defaults: dict | None = None):
    """Build a sub-config from `None` (the defaults), a dict or a ready config."""
    if isinstance(value, config_class):
        return value
    value = (defaults or {}) if value is None else value
    if not isinstance(value, dict):
        kind = config_class.__name__
        raise TypeError(f"`{name}` must be a {kind} or a dict of its fields, got {type(value).__name__}.")
    model_type = value.get("model_type", config_class.model_type)
    if model_type != config_class.model_type:
        raise ValueError(f"`{name}` must be of type {config_class.model_type!r}, got {shown(model_type)}.")
    _check_names(config_class, value, f"`{name}`")
    fields = {key: item for key, item in value.items() if key != "model_type"}
    ours = issubclass(config_class, _CheckedConfig)  # those name the field themselves
    if not ours:  # before transformers builds lists of so many layers
        _check_transformer(name, fields, _TRANSFORMER_RULES)
    try:
        return config_class(**fields)
    except Exception as error:
        what = None if ours else _refused_field(error, config_class, fields, f"{name}.")
        raise _plain_error(error, what or f"`{name}`") from error


def config_fields(config: PreTrainedConfig) -> dict:
    """A config as the fields of a part of another model, without where it and its code were loaded from."""
    return {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "auto_map")}


# trf-ignore: TRF010 annotations check what @strict would, and more, in a `ValueError` or `TypeError` instead of its own kind.
class _CheckedConfig(PreTrainedConfig):
    """
    A config whose fields are checked: each when it is set, by the rule in its annotation, and together by `_faults`. The
    text in the annotation is the field's documentation.
    """

    _rules = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        hints = {name: hint for name, hint in cls.__annotations__.items() if get_origin(hint) is Annotated}
        cls._rules = {name: hint.__metadata__[1] for name, hint in hints.items() if len(hint.__metadata__) > 1}
        lines = []
        for name, hint in hints.items():
            kind = getattr(hint.__origin__, "__name__", str(hint.__origin__)).replace(
                f"{PreTrainedConfig.__module__}.", ""
            )
            lines.append(f"    {name} (`{kind}`, defaults to `{getattr(cls, name)!r}`): {hint.__metadata__[0]}.")
        if lines:
            cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Args:", *lines])

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
        """Once all fields are there, and before they are saved; a `ValueError` for those that do not go together."""
        for name, config_class in self.sub_configs.items():
            config_class = PreTrainedConfig if config_class is AutoConfig else config_class
            if not isinstance(getattr(self, name), config_class):
                raise TypeError(f"`{name}` must be a {config_class.__name__}, got {shown(getattr(self, name))}.")
        for fault in self._faults():
            raise ValueError(fault)

    def _faults(self) -> Iterator[str]:
        """What is wrong with several fields together."""
        return iter(())

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers. Where `auto_map` names this package's classes, their code is written as well."""
        self.check_together()
        super().save_pretrained(save_directory, **kwargs)
        # Of classes that were remote code themselves, transformers writes it.
        if getattr(self, "auto_map", None) and self._auto_class is None:
            copy_code(save_directory, self.model_type)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Of its own type only; transformers warns and goes on with other fields."""
        check_model_type(cls, config_dict)
        return super().from_dict(config_dict, **kwargs)


class DualTokenQuantizerConfig(_CheckedConfig):
    """One residual quantiser and its EMA codebook."""

    model_type = "dualtoken_quantizer"

    codebook_size: Annotated[int, "number of codes K", SIZE] = 16384
    code_dim: Annotated[int, "width C of a code vector", SIZE] = 32
    num_depths: Annotated[int, "residual codes D per position", COUNT] = 8
    shared_codebook: Annotated[bool, "one codebook for all depths, or one per depth", FLAG] = True
    update_rule: Annotated[
        str,
        '"rq" moves the codebook after every depth, within the forward; "rq_ema" once per forward',
        one_of("rq", "rq_ema"),
    ] = "rq"
    ema_vectors: Annotated[
        str,
        'which vector a depth\'s code is averaged with under "rq_ema": "own" the residual that was looked up, "final" what is '
        "left after all depths, as the authors' published code does; their checkpoints are converted with it",
        one_of("own", "final"),
    ] = "own"
    ema_decay: Annotated[float | int, "of the counts and sums", within(float, 0, 1, below=True)] = 0.99
    ema_eps: Annotated[float, "additive smoothing of the counts", EPSILON] = 1e-5
    restart_unused_codes: Annotated[
        bool, "codes whose EMA count falls below 1 restart at a random vector of the batch", FLAG
    ] = True

    def _faults(self):
        if self.update_rule == "rq" and self.ema_vectors == "final":
            yield "`ema_vectors='final'` needs `update_rule='rq_ema'`: 'rq' moves the codebook before there is a final one."


class DualTokenVisionTokenizerConfig(_CheckedConfig):
    """
    The vision tokenizer: a SigLIP or SigLIP 2 encoder of fixed resolution, two quantisers and an image decoder.

    Layers are counted from 1: layer i is the output of the i-th encoder layer.
    """

    model_type = "dualtoken_vision_tokenizer"
    # By class, not by string: Hub remote code resolves names within one flat folder.
    sub_configs = {
        "vision_config": SiglipConfig.sub_configs["vision_config"],
        "text_config": SiglipConfig.sub_configs["text_config"],
        "pixel_quantizer_config": DualTokenQuantizerConfig,
        "semantic_quantizer_config": DualTokenQuantizerConfig,
    }

    vision_config: Annotated[dict | PreTrainedConfig | None, "SigLIP's vision tower; by default SO400M at 384 px"] = (
        None
    )
    text_config: Annotated[dict | PreTrainedConfig | None, "SigLIP's text tower, by default SO400M's"] = None
    pixel_layer: Annotated[int, "that the pixel codes are made from", COUNT] = 6
    semantic_layer: Annotated[int, "that the semantic codes are made from", COUNT] = 26
    shortcut_layer: Annotated[int | None, "shallower layer added to the pixel branch; None: none", COUNT.or_none()] = 4
    shortcut_weight: Annotated[float | int, "of that layer", within(float, -1000, 1000)] = 0.6
    pixel_quantizer_config: Annotated[dict | PreTrainedConfig | None, "a `DualTokenQuantizerConfig`"] = None
    semantic_quantizer_config: Annotated[dict | PreTrainedConfig | None, "a `DualTokenQuantizerConfig`"] = None
    projection_type: Annotated[
        str,
        'of the projections between the encoder and the codes: "attention" is the paper\'s, "resnet" a residual block of '
        "convolutions, as in the authors' checkpoint of 2025",
        one_of("attention", "resnet"),
    ] = "attention"
    semantic_projection: Annotated[
        bool, "whether semantic codes have projections; without, they are as wide as the encoder", FLAG
    ] = True
    decoder_latent_size: Annotated[
        int | None,
        "side of the decoder's latent, to which a grid of another side is resized bilinearly; by default the image's side "
        "divided by the decoder's upsampling factor",
        SIDE.or_none(),
    ] = None
    decoder_in_channels: Annotated[int, "between the residual block and the decoder", SIZE] = 1024
    decoder_block_out_channels: Annotated[
        list[int] | tuple[int, ...],
        "of the decoder's levels, from the image's resolution down to the latent's; all but the last double the side",
        list_of(SIZE, 1, 16),
    ] = (128, 128, 512, 512, 1024)
    decoder_attention_levels: Annotated[
        list[int] | None,
        "indices into `decoder_block_out_channels` of the levels with attention; by default the last, the lowest resolution",
        list_of(within(int, 0, 15), 0, 16).or_none(),
    ] = None
    decoder_num_res_blocks: Annotated[int, "a level has one more", within(int, 0, 1024)] = 2
    decoder_norm_num_groups: Annotated[int, "groups of all group norms, the decoder's and the projections'", SIZE] = 32
    initializer_range: Annotated[float, "standard deviation of new projections and codebooks", STD] = 0.02

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            setattr(self, name, as_config(getattr(self, name), config_class, name, _SO400M_384.get(name)))
        self._check_towers()
        if self.text_config.vocab_size == _GEMMA_VOCAB_SIZE and self.text_config.pad_token_id == 1:
            # SigLIP 2's folders say nothing and get SigLIP's default, which is the end of a text there.
            self.text_config.pad_token_id = _GEMMA_PAD_TOKEN_ID
        self.decoder_block_out_channels = list(self.decoder_block_out_channels)
        if self.decoder_attention_levels is None:
            self.decoder_attention_levels = [len(self.decoder_block_out_channels) - 1]
        self.decoder_attention_levels = sorted(self.decoder_attention_levels)
        if self.decoder_latent_size is None:
            if self.image_size < self.decoder_upsampling:
                raise ValueError(
                    f"`decoder_block_out_channels` enlarges the side {self.decoder_upsampling} times, more than "
                    f"image_size={self.image_size}."
                )
            self.decoder_latent_size = self.image_size // self.decoder_upsampling
        super().__post_init__(**kwargs)

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

    def _check_towers(self) -> None:
        size, patch_size = self.vision_config.image_size, self.vision_config.patch_size
        if isinstance(size, (list, tuple)) or isinstance(patch_size, (list, tuple)):
            raise ValueError(f"The encoder must have one square resolution, got {size} in patches of {patch_size}.")
        _check_transformer("vision_config", self.vision_config, _VISION_RULES)
        _check_transformer("text_config", self.text_config, _TRANSFORMER_RULES)

    def _faults(self):
        self._check_towers()
        vision, groups, levels = self.vision_config, self.decoder_norm_num_groups, len(self.decoder_block_out_channels)
        if vision.patch_size > vision.image_size:
            yield f"patch_size={vision.patch_size} is larger than image_size={vision.image_size}."
        SIDE.check("reconstruction_size (latent size and channels of the decoder)", self.reconstruction_size)
        for name in ("pixel_quantizer_config", "semantic_quantizer_config"):
            code_dim = getattr(self, name).code_dim
            if name == "semantic_quantizer_config" and not self.semantic_projection:
                if code_dim != vision.hidden_size:
                    yield f"Without `semantic_projection`, {name}.code_dim must be {vision.hidden_size}, got {code_dim}."
            elif self.projection_type == "resnet":
                if code_dim % groups:
                    yield f"`decoder_norm_num_groups` ({groups}) must divide {name}.code_dim ({code_dim})."
            elif vision.hidden_size % code_dim:
                yield (
                    f"The encoder's hidden size ({vision.hidden_size}) must be a multiple of {name}.code_dim ({code_dim}): "
                    "the projections have hidden_size / code_dim heads."
                )
        wrong = [level for level in self.decoder_attention_levels if level >= levels]
        if wrong:
            yield f"`decoder_attention_levels` must lie between 0 and {levels - 1}, got {wrong}."
        widths = [vision.hidden_size, self.decoder_in_channels, *self.decoder_block_out_channels]
        if any(width % groups for width in widths):
            yield f"`decoder_norm_num_groups` ({groups}) must divide the encoder's and the decoder's widths, got {widths}."
        layers = {name: getattr(self, name) for name in ("pixel_layer", "shortcut_layer", "semantic_layer")}
        for name, layer in layers.items():
            if (layer or 1) > vision.num_hidden_layers:
                yield (
                    f"`{name}` must lie between 1 and {vision.num_hidden_layers}, the number of layers of the vision "
                    f"encoder, got {layer}."
                )
        if max(self.pixel_layer, self.shortcut_layer or 1) > self.semantic_layer:
            yield (
                "The pixel and shortcut layers must not lie above the semantic layer, whose output is replaced by the "
                f"quantised features: got {', '.join(f'{name}={layer}' for name, layer in layers.items())}."
            )

    @classmethod
    def layers_for(cls, num_hidden_layers: int) -> dict[str, int]:
        """The paper's layers carried over to an encoder of another depth: 6 / 4 / 26 of 27, 6 / 4 / 23 of 24."""
        return {
            "pixel_layer": math.ceil(6 * num_hidden_layers / 27),
            "shortcut_layer": math.ceil(4 * num_hidden_layers / 27),
            "semantic_layer": max(1, num_hidden_layers - 1),
        }


class DualTokenDepthHeadConfig(_CheckedConfig):
    """
    The two depth transformers, one per kind of codes. At the defaults and a language model of width 2048 each head has
    258 M parameters.
    """

    model_type = "dualtoken_depth_head"

    hidden_size: Annotated[int, "width of the transformer", SIZE] = 1024
    num_hidden_layers: Annotated[int, "its layers", COUNT] = 3
    head_dim: Annotated[int, "width of an attention head", SIZE] = 128
    intermediate_size: Annotated[int, "width of the feed-forwards, of which every depth has its own", SIZE] = 2048
    input_hidden_size: Annotated[
        int, "width of the perceptron of two layers between the language model and the head", SIZE
    ] = 2048
    hidden_act: Annotated[str, "activation of the perceptron and the feed-forwards", ACTIVATION] = "gelu"
    rms_norm_eps: Annotated[float, "of the norms", EPSILON] = 1e-6
    bias: Annotated[bool, "in all linear layers, the classifiers included", FLAG] = False
    initializer_range: Annotated[float, "standard deviation of new weights", STD] = 0.02

    @property
    def num_attention_heads(self) -> int:
        return self.hidden_size // self.head_dim

    def _faults(self):
        if self.hidden_size % self.head_dim:
            yield f"`hidden_size` ({self.hidden_size}) must be a multiple of `head_dim` ({self.head_dim})."


class DualTokenConfig(_CheckedConfig):
    """The unified model: a vision tokenizer, a causal language model and a depth head for each kind of codes."""

    model_type = "dualtoken"
    sub_configs = {
        "text_config": AutoConfig,
        "vision_tokenizer_config": DualTokenVisionTokenizerConfig,
        "depth_head_config": DualTokenDepthHeadConfig,
    }
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    text_config: Annotated[dict | PreTrainedConfig | None, "the language model; Qwen2 by default"] = None
    vision_tokenizer_config: Annotated[dict | PreTrainedConfig | None, "a `DualTokenVisionTokenizerConfig`"] = None
    depth_head_config: Annotated[dict | PreTrainedConfig | None, "a `DualTokenDepthHeadConfig`, of both heads"] = None
    image_start_token_id: Annotated[int, "Qwen2.5's own <|vision_start|>", TOKEN_ID] = 151652
    image_token_id: Annotated[int, "Qwen2.5's own <|image_pad|>", TOKEN_ID] = 151655
    image_end_token_id: Annotated[int, "Qwen2.5's own <|vision_end|>", TOKEN_ID] = 151653
    depth_reduction: Annotated[
        str,
        "how a position's cross-entropies over the depths are joined; the paper's is \"sum\"",
        one_of("sum", "mean"),
    ] = "sum"
    text_loss_weight: Annotated[float | int, "of the text's cross-entropy in the loss", WEIGHT] = 1.0
    pixel_loss_weight: Annotated[float | int, "of the pixel codes' cross-entropy", WEIGHT] = 1.0
    semantic_loss_weight: Annotated[float | int, "of the semantic codes' cross-entropy", WEIGHT] = 1.0
    tie_word_embeddings: Annotated[
        bool | None,
        "whether text head and input embeddings are one; by default what the language model does",
        one_of(True, False, None),
    ] = None
    initializer_range: Annotated[float, "standard deviation of new weights", STD] = 0.02

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            model_type = fields.pop("model_type", "qwen2")
            if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
                raise (ValueError if isinstance(model_type, str) else TypeError)(
                    f"`text_config.model_type` must be a model type of transformers, got {shown(model_type)}."
                )
            self.text_config = as_config(fields, CONFIG_MAPPING[model_type], "text_config")
        self.text_config = Qwen2Config() if self.text_config is None else self.text_config
        for name in ("vision_tokenizer_config", "depth_head_config"):
            setattr(self, name, as_config(getattr(self, name), self.sub_configs[name], name))
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if (features := kwargs.pop("visual_features", "codes")) != "codes":
            raise ValueError(f"`visual_features` must be 'codes', the only kind there is, got {shown(features)}.")
        # TRL reads it of every model it does not know, also where there is no remote code.
        self.auto_map = kwargs.pop("auto_map", None) or {}
        super().__post_init__(**kwargs)

    def _faults(self):
        language_model, tokenizer, ids = self.text_config, self.vision_tokenizer_config, self.special_image_token_ids
        for name in ("hidden_size", "vocab_size"):
            if not hasattr(language_model, name):
                kind = type(language_model).__name__
                yield f"`text_config` must be of a causal language model: {kind} has no {name}."
        _check_transformer("text_config", language_model, _TRANSFORMER_RULES)
        if len(set(ids)) != 3:
            yield f"The three image token ids must differ, got {ids}."
        if max(ids) >= language_model.vocab_size:
            yield (
                f"The image token ids must lie in the language model's vocabulary of {language_model.vocab_size}, "
                f"got image_start_token_id, image_token_id, image_end_token_id = {ids}."
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(language_model, name, None)
            for token_id in value if isinstance(value, list) else [value]:
                within(int, 0, language_model.vocab_size - 1).or_none().check(f"text_config.{name}", token_id)
        for name in ("codebook_size", "code_dim", "num_depths"):
            pixel, semantic = (getattr(getattr(tokenizer, f"{kind}_quantizer_config"), name) for kind in CODE_KINDS)
            if pixel != semantic:
                yield (
                    f"The unified model needs both quantisers to have the same `{name}` (its two depth heads are one "
                    f"batched transformer), got pixel {pixel} and semantic {semantic}."
                )

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


# Pipelines and `transformers serve` look classes up by name, in tables that the Auto classes' `register` leaves alone.
# Here rather than in the package's `__init__`, which is no part of what the Hub copies as remote code.
for _task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
    getattr(modeling_auto, f"MODEL_FOR_{_task}_MAPPING_NAMES")[DualTokenConfig.model_type] = "DualTokenForCausalLM"
modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[DualTokenVisionTokenizerConfig.model_type] = (
    "DualTokenVisionTokenizer"
)
del _task


__all__ = ["DualTokenConfig", "DualTokenDepthHeadConfig", "DualTokenQuantizerConfig", "DualTokenVisionTokenizerConfig"]
