# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
# License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The vision tokenizer: a SigLIP encoder with two vocabularies and an image decoder (paper, section 3.1).

Pixel codes come from a shallow encoder layer and decode back to an image. Semantic codes come from a deep layer; their
features continue through the rest of the encoder, so that the image embedding stays aligned with SigLIP's text tower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from torch import nn
from transformers import PreTrainedModel, SiglipConfig, SiglipModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .checkpoints import StrictLoadingMixin, checkpoint_errors
from .configuration_dualtoken import CODE_KINDS, DualTokenVisionTokenizerConfig, config_fields
from .field_rules import at_least
from .vector_quantization import DualTokenCodebook, DualTokenResidualQuantizer


@dataclass
class DualTokenEncoderOutput(ModelOutput):
    """
    What `encode` returns; fields of a kind that was not asked for are `None`. B images, N = h x w positions, D depths,
    C code width, H hidden width.
    """

    # Of the last encoder layer, before the final norm, (B, N, H). First: pipelines that extract features take that.
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None  # SigLIP's image feature (B, H), not normalised
    pixel_codes: torch.LongTensor | None = None  # (B, h, w, D)
    semantic_codes: torch.LongTensor | None = None  # (B, h, w, D)
    # Sums of the code vectors, with a straight-through gradient, (B, N, C).
    pixel_quantized: torch.Tensor | None = None
    semantic_quantized: torch.Tensor | None = None
    semantic_features: torch.Tensor | None = None  # in place of the semantic layer's output, (B, N, H)
    pixel_commitment_loss: torch.Tensor | None = None  # scalar
    semantic_commitment_loss: torch.Tensor | None = None  # scalar
    # Outputs of the pixel and the semantic layer, before quantisation, (B, N, H).
    pixel_hidden_state: torch.Tensor | None = None
    semantic_hidden_state: torch.Tensor | None = None
    # If asked for: the embeddings and the output of every layer that was computed, (B, N, H); (B, heads, N, N).
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DualTokenDecoderOutput(ModelOutput):
    """What `decode` returns."""

    reconstruction: torch.Tensor | None = None  # images (B, 3, S', S'), nominally in [-1, 1], not clamped


@dataclass
class DualTokenVisionTokenizerOutput(DualTokenEncoderOutput):
    """What a call returns: every field of [`DualTokenEncoderOutput`], and of B images and T texts:"""

    reconstruction: torch.Tensor | None = None  # (B, 3, S', S'), nominally in [-1, 1], not clamped
    image_embeds: torch.Tensor | None = None  # pooled features of length 1, (B, H)
    text_embeds: torch.Tensor | None = None  # (T, H), of length 1
    logits_per_image: torch.Tensor | None = None  # SigLIP's scaled and shifted similarities, (B, T)
    logits_per_text: torch.Tensor | None = None  # (T, B)


class DualTokenProjectionAttention(nn.Module):
    """
    Attention that changes the width, with heads as wide as a code vector: averaged and bidirectional on the way down,
    concatenated and causal on the way up.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.is_down = in_features > out_features
        wide, self.head_dim = max(in_features, out_features), min(in_features, out_features)
        self.num_heads = wide // self.head_dim
        self.qkv = nn.Linear(in_features, 3 * wide, bias=False)
        # Queries and values have a bias, keys have none: it would cancel in the softmax.
        self.q_bias = nn.Parameter(torch.zeros(wide))
        self.v_bias = nn.Parameter(torch.zeros(wide))
        self.out_proj = nn.Linear(out_features, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, N, in_features)` -> `(B, N, out_features)`."""
        batch, length, _ = hidden_states.shape
        heads = (batch, length, self.num_heads, self.head_dim)
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        query = (query + self.q_bias).view(heads).transpose(1, 2)
        key = key.view(heads).transpose(1, 2)
        value = (value + self.v_bias).view(heads).transpose(1, 2)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=not self.is_down)
        return self.out_proj(context.mean(dim=1) if self.is_down else context.transpose(1, 2).flatten(2))


class DualTokenGatedMlp(nn.Module):
    """W_2 [tanh-GELU(W_0 n) * W_1 n], n = LN(x)."""

    def __init__(self, features: int, hidden_features: int):
        super().__init__()
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.gate_proj = nn.Linear(features, hidden_features)
        self.up_proj = nn.Linear(features, hidden_features)
        self.down_proj = nn.Linear(hidden_features, features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, N, features)` -> the same."""
        hidden_states = self.norm(hidden_states)
        gate = F.gelu(self.gate_proj(hidden_states), approximate="tanh")
        return self.down_proj(gate * self.up_proj(hidden_states))


class DualTokenAttentionProjection(nn.Module):
    """Projection between the encoder's width and the codes': y = W LN_3(x) + Attn(LN_1(x)); y + MLP(LN_2(y))."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(in_features, eps=1e-5)
        self.attn = DualTokenProjectionAttention(in_features, out_features)
        self.norm2 = nn.LayerNorm(out_features, eps=1e-5)
        self.mlp = DualTokenGatedMlp(out_features, 2 * out_features)
        self.norm3 = nn.LayerNorm(in_features, eps=1e-5)
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, N, in_features)` -> `(B, N, out_features)`."""
        hidden_states = self.proj(self.norm3(hidden_states)) + self.attn(self.norm1(hidden_states))
        return hidden_states + self.mlp(self.norm2(hidden_states))


class DualTokenPostQuantizerBlock(nn.Module):
    """Residual block between the pixel features and the decoder; its first convolution is 1 x 1."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, in_channels, h, w)` -> `(B, out_channels, h, w)`."""
        residual = self.shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        return residual + self.conv2(F.silu(self.norm2(hidden_states)))


class DualTokenResnetProjection(DualTokenPostQuantizerBlock):
    """That block as a projection between the encoder's width and the codes', over the map of all positions."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, N, in_channels)` -> `(B, N, out_channels)`."""
        side = math.isqrt(hidden_states.shape[1])
        return super().forward(hidden_states.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)


def _build_projection(
    config: DualTokenVisionTokenizerConfig, in_features: int, out_features: int, kind: str = "pixel"
) -> nn.Module:
    # CODEPATH: False in the authors' checkpoint of 2025, whose semantic codes are as wide as the encoder.
    if kind == "semantic" and not config.semantic_projection:
        return nn.Identity()
    # CODEPATH: "resnet" in that checkpoint, "attention" in those of the paper's code.
    if config.projection_type == "resnet":
        return DualTokenResnetProjection(in_features, out_features, config.decoder_norm_num_groups)
    return DualTokenAttentionProjection(in_features, out_features)


class DualTokenVisionTokenizerPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """Initialisation of the tokenizer's own modules; the SigLIP towers initialise themselves."""

    config: DualTokenVisionTokenizerConfig
    base_model_prefix = "dualtoken_vision_tokenizer"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # SiglipModel's come on top.
    _no_split_modules = ["DualTokenAttentionProjection", "DualTokenResidualQuantizer"]
    # What `encode` returns with `output_hidden_states` and `output_attentions`.
    _can_record_outputs = {"hidden_states": SiglipEncoderLayer, "attentions": SiglipAttention}
    # In the checkpoint of a unified model, or of one without heads.
    _prefix_in_whole = r"^(model\.)?vision_tokenizer\."
    _left_in_whole = r"^((model\.)?(language_model|visual_projector)|lm_head|depth_heads)\."
    # The codebooks' EMA needs float32 whatever dtype the checkpoint is loaded in.
    _keep_in_fp32_modules_strict = ["codebook"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for its attention interface in this file; it is the towers that use it.
        return True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but never in low-bit weights: codes and images depend on the exact ones."""
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "The vision tokenizer is not quantised to fewer bits: leave `quantization_config` out. In a unified model "
                "its weights stay as they are while those of the language model are quantised."
            )
        return super().from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        std = self.config.initializer_range
        if isinstance(module, DualTokenProjectionAttention):
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)
        elif isinstance(module, DualTokenCodebook):
            init.normal_(module.embeddings, std=std)
            if module.restart_unused_codes:
                # Empty statistics: the first batch chooses the codes.
                init.zeros_(module.cluster_size)
                init.zeros_(module.embedding_sum)
            else:
                init.ones_(module.cluster_size)
                init.copy_(module.embedding_sum, module.embeddings)
        elif isinstance(module, nn.Conv2d):
            # PyTorch's own initialisation, which the decoder's recipe was made with.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class DualTokenVisionTokenizer(DualTokenVisionTokenizerPreTrainedModel):
    """
    Images to pixel and semantic codes, pixel codes back to images, and SigLIP's zero-shot classification.
    ```python
    tok = AutoModel.from_pretrained(path)
    enc = tok.encode(pixel_values)                  # (B, 3, S, S) in [-1, 1]
    image = tok.decode(pixel_codes=enc.pixel_codes).reconstruction
    ```
    """

    def __init__(self, config: DualTokenVisionTokenizerConfig):
        super().__init__(config)
        hidden_size = config.vision_config.hidden_size
        towers = {"vision_config": config.vision_config, "text_config": config.text_config}
        # A new config sets the attention of its sub-configs, which are ours.
        attention = {name: tower._attn_implementation for name, tower in towers.items()}
        attention[""] = config._attn_implementation
        self.siglip = SiglipModel._from_config(SiglipConfig(**towers, attn_implementation=attention))
        pixel, semantic = config.pixel_quantizer_config, config.semantic_quantizer_config
        self.pixel_down_proj = _build_projection(config, hidden_size, pixel.code_dim)
        # CODEPATH: None in the authors' checkpoint of 2025 and in ablations without a shortcut.
        if config.shortcut_layer is not None:
            self.shortcut_down_proj = _build_projection(config, hidden_size, pixel.code_dim)
        self.semantic_down_proj = _build_projection(config, hidden_size, semantic.code_dim, "semantic")
        self.pixel_quantizer = DualTokenResidualQuantizer(pixel)
        self.semantic_quantizer = DualTokenResidualQuantizer(semantic)
        self.pixel_up_proj = _build_projection(config, pixel.code_dim, hidden_size)
        self.semantic_up_proj = _build_projection(config, semantic.code_dim, hidden_size, "semantic")
        self.post_quantizer_block = DualTokenPostQuantizerBlock(
            hidden_size, config.decoder_in_channels, config.decoder_norm_num_groups
        )
        has_attention = [i in config.decoder_attention_levels for i in range(len(config.decoder_block_out_channels))]
        self.decoder = Decoder(
            in_channels=config.decoder_in_channels,
            out_channels=config.vision_config.num_channels,
            up_block_types=tuple(f"{'Attn' * has}UpDecoderBlock2D" for has in reversed(has_attention)),
            block_out_channels=tuple(config.decoder_block_out_channels),
            layers_per_block=config.decoder_num_res_blocks,
            norm_num_groups=config.decoder_norm_num_groups,
        )
        # Those that are there: FSDP refuses the names of others.
        self._no_split_modules = [type(self.pixel_down_proj).__name__, "DualTokenResidualQuantizer"]
        self.post_init()

    @classmethod
    def from_siglip_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        **config_overrides,
    ):
        """
        Start of training: the towers of a SigLIP or SigLIP 2 checkpoint of fixed resolution, everything else new.

        By default the paper's layers are carried over to the encoder's depth (27 layers: 6, 4, 26; 24 layers: 6, 4,
        23), and a position holds 8 residual codes of each kind above 256 px, 4 at 256 px and below; weights are float32,
        in eval mode.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a Hub id of model type `siglip`; a
                `FileNotFoundError` if there is none, a `ValueError` for another type.
            config_overrides: fields of [`DualTokenVisionTokenizerConfig`]; a dict for a quantiser's config changes only
                the fields it names.
        """
        dtype = dtype or torch.float32
        with checkpoint_errors(pretrained_model_name_or_path):
            siglip_config = SiglipConfig.get_config_dict(pretrained_model_name_or_path)[0]
        if siglip_config.get("model_type") != "siglip":
            raise ValueError(
                f"`from_siglip_pretrained` takes a SigLIP or SigLIP 2 checkpoint of fixed resolution (model type "
                f"'siglip'); {pretrained_model_name_or_path!r} is of model type {siglip_config.get('model_type')!r}."
            )
        unknown = sorted(set(config_overrides) - set(DualTokenVisionTokenizerConfig.__dataclass_fields__))
        if unknown:
            raise ValueError(f"No such fields of DualTokenVisionTokenizerConfig: {', '.join(unknown)}.")
        siglip = SiglipModel.from_pretrained(pretrained_model_name_or_path, dtype=dtype)
        vision_config = siglip.config.vision_config
        fields = {
            "vision_config": config_fields(vision_config),
            "text_config": config_fields(siglip.config.text_config),
            **DualTokenVisionTokenizerConfig.layers_for(vision_config.num_hidden_layers),
        }
        num_depths = 8 if vision_config.image_size > 256 else 4
        for kind in CODE_KINDS:
            name = f"{kind}_quantizer_config"
            fields[name] = config_overrides.pop(name, None) or {}
            if isinstance(fields[name], dict):
                fields[name] = {"num_depths": num_depths, **fields[name]}
        config = DualTokenVisionTokenizerConfig(**{**fields, **config_overrides})
        model = cls._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        model.siglip.load_state_dict(siglip.state_dict())
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.siglip.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module):
        self.siglip.text_model.embeddings.token_embedding = value

    def quantizer(self, kind: str) -> DualTokenResidualQuantizer:
        """The quantiser of `"pixel"` or `"semantic"` codes."""
        return getattr(self, f"{kind}_quantizer")

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        """Raise an error for what are no images `(B, 3, S, S)` in [-1, 1]; one host sync."""
        size = self.config.image_size
        expected = f"`pixel_values` must be a float tensor of shape (B, 3, {size}, {size}) in [-1, 1]"
        if not isinstance(pixel_values, torch.Tensor):
            raise TypeError(f"{expected}, got {type(pixel_values).__name__}.")
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (self.config.vision_config.num_channels, size, size):
            raise ValueError(f"{expected}, got shape {tuple(pixel_values.shape)}.")
        if not pixel_values.is_floating_point():
            raise ValueError(f"{expected}, got {pixel_values.dtype}. The image processor rescales and normalises.")
        if not torch.compiler.is_compiling() and pixel_values.numel():
            # A margin for resampling overshoot and noise; 0..255 and other mistakes lie far outside.
            low, high = torch.stack(pixel_values.detach().aminmax()).tolist()
            if not (low >= -1.1 and high <= 1.1):
                raise ValueError(f"{expected}, got values from {low:.4g} to {high:.4g}.")

    def encode(
        self,
        pixel_values: torch.Tensor,
        codes: Sequence[str] = CODE_KINDS,
        features: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> DualTokenEncoderOutput:
        """
        Codes and features of images. In training mode this also moves the codebooks (EMA).

        One host sync, to check the range of `pixel_values`; `torch.compile(tok.encode)` is one graph without it.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, S, S)`): images in [-1, 1]; a `ValueError` for any others.
            codes (`Sequence[str]`): which kinds to make. With `("pixel",)` nothing deeper than the pixel and shortcut
                layers is computed.
            features (`bool`): also the semantic features, the last layers and the pooled image feature; `False` stops
                once the codes are known.
            output_hidden_states, output_attentions (`bool`, *optional*): also those of the encoder's layers; by default
                as the config says. Attentions need `attn_implementation="eager"`.
        """
        codes = (codes,) if isinstance(codes, str) else tuple(codes)
        if not codes or not set(codes) <= set(CODE_KINDS):
            raise ValueError(f"`codes` must name 'pixel', 'semantic' or both, got {codes}.")
        self._check_pixel_values(pixel_values)
        recorded = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        recorded = {name: value for name, value in recorded.items() if value is not None}
        return self._encode(pixel_values, codes, features, return_dict=True, **recorded)

    @capture_outputs(tie_last_hidden_states=False)
    def _encode(
        self, pixel_values: torch.Tensor, codes: tuple[str, ...], features: bool, **recorded
    ) -> DualTokenEncoderOutput:
        """`encode` of images `(B, 3, S, S)` that were checked."""
        config, vision_model = self.config, self.siglip.vision_model
        wants_pixel, wants_semantic = "pixel" in codes, "semantic" in codes
        # Layers whose output is needed; the loop ends at the deepest.
        pixel_layers = {config.pixel_layer, config.shortcut_layer} - {None} if wants_pixel else set()
        deepest = config.semantic_layer if wants_semantic else max(pixel_layers)

        hidden_states = vision_model.embeddings(pixel_values)
        tapped = {}
        for number, layer in enumerate(vision_model.encoder.layers[:deepest], start=1):
            hidden_states = layer(hidden_states, attention_mask=None)
            tapped[number] = hidden_states if number in pixel_layers else None

        fields, quantized = {}, {}
        if wants_pixel:
            fields["pixel_hidden_state"] = tapped[config.pixel_layer]
            latent = self.pixel_down_proj(tapped[config.pixel_layer])
            # CODEPATH: as in the constructor.
            if config.shortcut_layer is not None:
                latent = latent + config.shortcut_weight * self.shortcut_down_proj(tapped[config.shortcut_layer])
            quantized["pixel"] = self.pixel_quantizer(latent)
        if wants_semantic:
            fields["semantic_hidden_state"] = hidden_states
            quantized["semantic"] = self.semantic_quantizer(self.semantic_down_proj(hidden_states))
            if features:
                fields["semantic_features"] = hidden_states = self.semantic_up_proj(quantized["semantic"].quantized)
                for layer in vision_model.encoder.layers[deepest:]:
                    hidden_states = layer(hidden_states, attention_mask=None)
                fields["last_hidden_state"] = hidden_states
                fields["pooler_output"] = vision_model.head(vision_model.post_layernorm(hidden_states))
        for kind, output in quantized.items():
            fields[f"{kind}_codes"] = output.codes.unflatten(1, (config.grid_size, config.grid_size))
            fields[f"{kind}_quantized"] = output.quantized
            fields[f"{kind}_commitment_loss"] = output.commitment_loss
        # Constructed at once: filled one by one, a ModelOutput's keys would not come in the declared order.
        return DualTokenEncoderOutput(**fields)

    def decode(
        self,
        pixel_codes: torch.LongTensor | None = None,
        pixel_quantized: torch.Tensor | None = None,
        slice_size: int | None = None,
    ) -> DualTokenDecoderOutput:
        """
        Images from pixel codes `(B, h, w, D)`, or from their sums of code vectors `(B, N, C)`, which keep the gradient.

        One host sync, to check the range of `pixel_codes`, which a compiled call leaves out. The decoder's maps are
        channels-last from the start; `tok.to(memory_format=torch.channels_last)` brings its weights into that order.

        Args:
            slice_size (`int`, *optional*): how many images are decoded at a time; all by default. Without gradients the
                memory is that of one slice. The images stay the same, as they would not if decoded in tiles.

        Raises:
            ValueError: for both or neither, another grid or number of depths, or codes out of range.
        """
        at_least(1).check_given(slice_size=slice_size)
        if (pixel_codes is None) == (pixel_quantized is None):
            raise ValueError("`decode` takes exactly one of `pixel_codes` and `pixel_quantized`.")
        grid, code_dim = self.config.grid_size, self.config.pixel_quantizer_config.code_dim
        if pixel_codes is not None:
            self.check_codes("pixel", pixel_codes)
            pixel_quantized = self.pixel_quantizer.embed_codes(pixel_codes).flatten(1, 2)
        elif pixel_quantized.ndim != 3 or pixel_quantized.shape[1:] != (grid**2, code_dim):
            raise ValueError(
                f"`pixel_quantized` must have shape (B, {grid**2}, {code_dim}), got {tuple(pixel_quantized.shape)}."
            )
        if slice_size is None or slice_size >= len(pixel_quantized):
            return DualTokenDecoderOutput(reconstruction=self._decode_quantized(pixel_quantized))
        parts = [self._decode_quantized(part) for part in pixel_quantized.split(slice_size)]
        return DualTokenDecoderOutput(reconstruction=torch.cat(parts))

    def _decode_quantized(self, pixel_quantized: torch.Tensor) -> torch.Tensor:
        """`(B, N, C)` -> `(B, 3, S', S')`."""
        grid, latent_size = self.config.grid_size, self.config.decoder_latent_size
        features = self.pixel_up_proj(pixel_quantized.to(self.post_quantizer_block.conv1.weight.dtype))
        latent = features.transpose(1, 2).unflatten(2, (grid, grid))
        if grid != latent_size:
            latent = F.interpolate(latent, size=(latent_size, latent_size), mode="bilinear", align_corners=False)
        return self.decoder(self.post_quantizer_block(latent))

    def check_codes(self, kind: str, codes: torch.Tensor) -> None:
        """Raise a `ValueError` unless `codes` `(B, h, w, D)` fit the grid, the depths and the codebook of a kind."""
        grid = self.config.grid_size
        self.quantizer(kind).check_codes(codes, f"{kind}_codes")
        if codes.ndim != 4 or codes.shape[1:3] != (grid, grid):
            raise ValueError(
                f"`{kind}_codes` must have shape (B, {grid}, {grid}, {codes.shape[-1]}), got {tuple(codes.shape)}."
            )

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        SigLIP's features of images `(B, 3, S, S)` through the semantic codes: `last_hidden_state` `(B, N, H)` after the
        final norm, and `pooler_output` `(B, H)`, not normalised.
        """
        encoded = self.encode(pixel_values, codes=("semantic",), **_recording(kwargs))
        return BaseModelOutputWithPooling(
            last_hidden_state=self.siglip.vision_model.post_layernorm(encoded.last_hidden_state),
            pooler_output=encoded.pooler_output,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        SigLIP's features of texts `(T, L)`: `pooler_output` `(T, H)`, not normalised.

        SigLIP was trained on texts padded on the right to the text tower's full length, the padding attended. So an
        `attention_mask` says only where the texts end, and they are padded as in training; without one, they are taken
        as they are.
        """
        if attention_mask is not None:
            input_ids = self._padded_as_in_training(input_ids, attention_mask)
        return self.siglip.text_model(input_ids=input_ids, **kwargs)

    def _padded_as_in_training(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor) -> torch.LongTensor:
        """Texts `(T, L)`, padded on either side or not at all, as `(T, full length)`, padded on the right."""
        config = self.config.text_config
        is_padding = attention_mask == 0
        order = is_padding.to(torch.uint8).argsort(dim=-1, stable=True)
        texts = input_ids.masked_fill(is_padding, config.pad_token_id).gather(1, order)
        return F.pad(texts, (0, max(0, config.max_position_embeddings - texts.shape[1])), value=config.pad_token_id)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        codes: Sequence[str] = CODE_KINDS,
        **kwargs,
    ) -> DualTokenVisionTokenizerOutput:
        """
        Everything at once: codes, reconstruction, image embedding and, with `input_ids`, the similarities to texts.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, S, S)`): images in [-1, 1].
            input_ids, attention_mask (`torch.LongTensor` of shape `(T, L)`, *optional*): as in `get_text_features`.
            codes (`Sequence[str]`): as in `encode`. Without pixel codes there is no reconstruction, without semantic
                ones neither image embedding nor similarities.
            kwargs: `output_hidden_states`, `output_attentions` and `return_dict`.
        """
        encoded = self.encode(pixel_values, codes=codes, **_recording(kwargs))
        fields = dict(encoded)
        if encoded.pixel_quantized is not None:
            fields["reconstruction"] = self.decode(pixel_quantized=encoded.pixel_quantized).reconstruction
        if encoded.pooler_output is not None:
            fields["image_embeds"] = F.normalize(encoded.pooler_output, dim=-1)
        if input_ids is not None:
            if encoded.pooler_output is None:
                raise ValueError(
                    f"Similarities to `input_ids` need semantic codes, but `codes` asks for {codes} only."
                )
            text = self.get_text_features(input_ids, attention_mask=attention_mask, return_dict=True)
            fields["text_embeds"] = F.normalize(text.pooler_output, dim=-1)
            similarity = fields["text_embeds"] @ fields["image_embeds"].t()
            fields["logits_per_text"] = similarity * self.siglip.logit_scale.exp() + self.siglip.logit_bias
            fields["logits_per_image"] = fields["logits_per_text"].t()
        return DualTokenVisionTokenizerOutput(**fields)


def _recording(kwargs: dict) -> dict:
    return {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}


__all__ = ["DualTokenEncoderOutput", "DualTokenVisionTokenizer", "DualTokenVisionTokenizerOutput"]
