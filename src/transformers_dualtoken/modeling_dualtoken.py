# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
# License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
# applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
# governing permissions and limitations under the License.
"""The unified model: a causal language model that reads and writes text and the codes of images (paper, section 3.2).

An image is N positions `<image_start> v_1 ... v_N <image_end>` of a sequence. A position's embedding is made from its
pixel and semantic codes together; the hidden state before a position predicts both, by the two depth heads.

Legend of dimension letters, in all modules: B rows, L tokens, N positions of an image, `h, w` its grid, D depths (codes
of a kind at a position), C code width, K codes of a codebook, M = 2 kinds of codes (pixel, semantic), H hidden width of
the language model, R rows of a cache (B, or 2 B with guidance: the conditional ones first), S pixels of an image's side.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import can_return_tuple

from .checkpoints import StrictLoadingMixin, checkpoint_errors
from .configuration_dualtoken import CODE_KINDS, DualTokenConfig, config_fields
from .depth_heads import DualTokenDepthHeads, DualTokenStackedLinear, DualTokenStackedRMSNorm
from .generation_dualtoken import DualTokenGenerationMixin
from .linear_cross_entropy import is_autocast_on
from .modeling_vision_tokenizer import DualTokenVisionTokenizer
from .sharding import any_rank, copy_weights, gathered, is_sharded
from .transformers_compat import CACHE_NAME, given_cache
from .unified_loss import DualTokenTextHead, text_logits, unified_losses


# What quantisers leave alone, in the patterns by which transformers' match names: all but the language model's blocks.
_KEPT_WHOLE = (r"(.*\.)?vision_tokenizer", r"(.*\.)?visual_projector", "depth_heads", "lm_head")


def _keep_parts_whole(config):
    """A copy of a `quantization_config` (or `dict`) that quantises the language model's blocks alone."""
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
    # bitsandbytes' field, of 4 bits as well as 8, and everybody else's.
    for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(config, field):
            setattr(config, field, [*_KEPT_WHOLE, *(getattr(config, field) or ())])
    return config


@dataclass
class DualTokenModelOutputWithPast(BaseModelOutputWithPast):
    """transformers' output, and the codes `(images, h, w, D)` of both kinds, where images were given."""

    pixel_codes: torch.LongTensor | None = None
    semantic_codes: torch.LongTensor | None = None


@dataclass
class DualTokenCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    transformers' output, and:

    Args:
        loss (`torch.Tensor`, scalar, with `labels`): weighted sum of the three losses below.
        text_loss (`torch.Tensor`, scalar): cross-entropy per text target.
        pixel_loss, semantic_loss (`torch.Tensor`, scalars): cross-entropy per visual target, over the depths summed or
            averaged (`config.depth_reduction`).
        logits (`torch.Tensor` of shape `(B, L, vocab_size)`): of the text head; not made in training with `labels`.
        last_hidden_state (`torch.Tensor` of shape `(B, L, H)`): input of the text head and the depth heads.
        pixel_codes, semantic_codes (`torch.LongTensor` of shape `(images, h, w, D)`): where images were given.
        text_loss_sum (`torch.Tensor`, scalar), depth_loss_sums (`torch.Tensor` of shape `(M, D)`): cross-entropies of
            the text targets, and of the codes of every depth of the visual targets, summed, in nats.
        num_text_correct (`torch.LongTensor`, scalar), num_depth_correct (`torch.LongTensor` of shape `(M, D)`): how many
            of these targets are the most probable.
        num_text_targets, num_visual_targets (`int`).
    """

    text_loss: torch.Tensor | None = None
    pixel_loss: torch.Tensor | None = None
    semantic_loss: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pixel_codes: torch.LongTensor | None = None
    semantic_codes: torch.LongTensor | None = None
    text_loss_sum: torch.Tensor | None = None
    num_text_correct: torch.LongTensor | None = None
    num_text_targets: int | None = None
    depth_loss_sums: torch.Tensor | None = None
    num_depth_correct: torch.LongTensor | None = None
    num_visual_targets: int | None = None


class DualTokenVisualProjector(nn.Module):
    """Embedding of an image position in the language model's width: W_2 GELU(W_1 x)."""

    def __init__(self, in_features: int, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., M C)` -> `(..., H)`."""
        return self.linear_2(F.gelu(self.linear_1(features)))


class DualTokenPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """Initialisation of the unified model's own modules; its tokenizer and language model initialise themselves."""

    config: DualTokenConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # Those of the tokenizer and the language model come on top. Of the heads all together: their classifier's weight is
    # used outside its own forward.
    _no_split_modules = ["DualTokenDepthLayer", "DualTokenDepthHeads", "DualTokenVisualProjector"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["codebook"]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in [`StrictLoadingMixin`]; the vision tokenizer comes back frozen."""
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _keep_parts_whole(kwargs["quantization_config"])
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading makes new parameters, which all require a gradient.
        model.base_model._freeze_vision_tokenizer()
        if is_deepspeed_zero3_enabled():
            # There transformers notes all renamings it knows, used or not, and would save the weights by other names.
            model._weight_conversions = None
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, DualTokenStackedLinear):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, DualTokenStackedRMSNorm):
            init.ones_(module.weight)
        else:
            super()._init_weights(module)


class DualTokenModel(DualTokenPreTrainedModel):
    """Vision tokenizer, visual projector and language model, without heads."""

    # In the checkpoint of a whole model, `AutoModel` leaves the heads aside. vLLM builds this class and brings the text
    # head itself: what is named here it does not load.
    _left_in_whole = r"^lm_head\."
    _keys_to_ignore_on_load_unexpected = [r"^depth_heads\."]

    def __init__(self, config: DualTokenConfig):
        super().__init__(config)
        self.vision_tokenizer = DualTokenVisionTokenizer._from_config(config.vision_tokenizer_config)
        self.visual_projector = DualTokenVisualProjector(
            len(CODE_KINDS) * config.code_dim, config.text_config.hidden_size
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()
        self._freeze_vision_tokenizer()

    def _freeze_vision_tokenizer(self) -> None:
        self.vision_tokenizer.requires_grad_(False)
        self.vision_tokenizer.eval()

    def train(self, mode: bool = True):
        """The vision tokenizer stays in eval mode: its codebooks must not move here."""
        super().train(mode)
        self.vision_tokenizer.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @torch.no_grad()
    def get_image_codes(self, pixel_values: torch.Tensor) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Pixel and semantic codes `(images, h, w, D)` of images `(images, 3, S, S)` in [-1, 1]."""
        encoded = self.vision_tokenizer.encode(pixel_values, features=False)
        return encoded.pixel_codes, encoded.semantic_codes

    def check_image_codes(self, pixel_codes: torch.Tensor | None, semantic_codes: torch.Tensor | None) -> None:
        """Raise a `ValueError` unless codes `(images, h, w, D)` of both kinds are of the same images and fit."""
        if pixel_codes is None or semantic_codes is None:
            missing = "pixel_codes" if pixel_codes is None else "semantic_codes"
            raise ValueError(f"`pixel_codes` and `semantic_codes` go together, but `{missing}` is missing.")
        self.vision_tokenizer.check_codes("pixel", pixel_codes)
        self.vision_tokenizer.check_codes("semantic", semantic_codes)
        if len(pixel_codes) != len(semantic_codes):
            raise ValueError(
                f"`pixel_codes` and `semantic_codes` must describe the same images, got {len(pixel_codes)} and "
                f"{len(semantic_codes)}."
            )

    def code_embeds(self, pixel_codes: torch.LongTensor, semantic_codes: torch.LongTensor) -> torch.Tensor:
        """Code vectors `(M, ..., D, C)` of codes `(..., D)`, in float32."""
        codes = zip(CODE_KINDS, (pixel_codes, semantic_codes))
        return torch.stack(
            [self.vision_tokenizer.quantizer(kind).embed_codes_with_depth(part) for kind, part in codes]
        )

    def codebooks(self) -> torch.Tensor:
        """Code vectors `(M, books, K, C)`, with 1 or D books; a shared one is repeated if the other kind's is not."""
        books = [self.vision_tokenizer.quantizer(kind).codebook.embeddings for kind in CODE_KINDS]
        return torch.stack([book.expand(max(map(len, books)), -1, -1) for book in books])

    def embed_image_codes(self, pixel_codes: torch.LongTensor, semantic_codes: torch.LongTensor) -> torch.Tensor:
        """Embeddings `(..., H)` of positions from their codes `(..., D)`: both sums of code vectors, projected."""
        features = torch.cat(list(self.code_embeds(pixel_codes, semantic_codes).sum(-2)), dim=-1)
        return self.visual_projector(features.to(self.visual_projector.linear_1.weight.dtype))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_codes: torch.LongTensor | None = None,
        semantic_codes: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Embeddings of whole images `(images, N, H)`, in the language model's space, as `pooler_output`; from their pixels
        `(images, 3, S, S)` or their codes `(images, h, w, D)`.
        """
        if pixel_values is not None:
            pixel_codes, semantic_codes = self.get_image_codes(pixel_values)
        else:
            self.check_image_codes(pixel_codes, semantic_codes)
        embeds = self.embed_image_codes(pixel_codes.flatten(1, 2), semantic_codes.flatten(1, 2))
        return BaseModelOutputWithPooling(last_hidden_state=embeds, pooler_output=embeds)

    def image_mask(self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None) -> torch.BoolTensor:
        """Where a sequence holds image placeholders, `(B, L)`; from embeddings `(B, L, H)` where there are no ids."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        # Filled on the device: a number of the host's would be copied there at every call.
        token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_codes: torch.LongTensor | None = None,
        semantic_codes: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        image_mask: torch.BoolTensor | None = None,
        **kwargs,
    ) -> DualTokenModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): an image is N times `image_token_id`.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 0 for padding and for dropped prompts.
            position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*): by default positions count what
                `attention_mask` keeps, so that a masked prefix shifts nothing. Given without a mask and without
                `past_key_values`, every position that does not follow its predecessor begins another sample, and no
                sample sees another one: so short samples are packed into one row.
            past_key_values, or cache (`Cache`, *optional*): transformers gives it the second name since 5.24.
            inputs_embeds (`torch.Tensor` of shape `(B, L, H)`, *optional*): instead of `input_ids`.
            pixel_values (`torch.Tensor` of shape `(images, 3, S, S)`, *optional*): the batch's images in reading
                order, in [-1, 1]; or
            pixel_codes, semantic_codes (`torch.LongTensor` of shape `(images, h, w, D)`, *optional*): their codes.
            image_mask (`torch.BoolTensor` of shape `(B, L)`, *optional*): what the method of this name returns for these
                inputs, where the caller needs it too.

        Raises:
            ValueError: if the number of placeholders does not fit the images, or codes do not fit the tokenizer.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        if pixel_values is not None and (pixel_codes is not None or semantic_codes is not None):
            raise ValueError("Images come either as `pixel_values` or as codes, not as both.")
        past_key_values = given_cache(past_key_values, cache)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        # 1. The codes of the batch's images, and their embeddings in the place of the placeholders.
        codes = self._codes_of_batch(pixel_values, (pixel_codes, semantic_codes), past_key_values, inputs_embeds)
        pixel_codes, semantic_codes = codes
        if pixel_codes is not None or semantic_codes is not None:
            embeds = self.get_image_features(None, *codes, return_dict=True).pooler_output
            image_mask = self.image_mask(input_ids, inputs_embeds) if image_mask is None else image_mask
            self.check_placeholders(image_mask, len(pixel_codes))
            inputs_embeds = inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), embeds.to(inputs_embeds))
        elif input_ids is not None and _begins(input_ids, past_key_values):
            # Only at the start of a sequence: image placeholders are never generated without their codes.
            self.check_placeholders(input_ids == self.config.image_token_id, 0)

        # 2. Positions.
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]

        # 3. The language model.
        inputs_embeds = self.for_backbone(inputs_embeds)
        shape = inputs_embeds.shape
        if self._packs_rows(attention_mask, position_ids, past_key_values):
            inputs_embeds, position_ids = inputs_embeds.flatten(0, 1)[None], position_ids.flatten()[None]
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            # The paged one of continuous batching has had this name from the start, and goes to attention alone.
            **{"cache" if _is_paged(past_key_values) else CACHE_NAME: past_key_values},
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        return DualTokenModelOutputWithPast(
            # No view where none is needed, of which FSDP2 would warn.
            last_hidden_state=hidden_states if hidden_states.shape == shape else hidden_states.view(shape),
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            pixel_codes=pixel_codes,
            semantic_codes=semantic_codes,
        )

    def _codes_of_batch(self, pixel_values, codes: tuple, cache: Cache | None, inputs_embeds: torch.Tensor) -> tuple:
        """
        Codes `(images, h, w, D)` of both kinds; `None` twice where nothing goes the way of images.

        In training, and with sharded weights at the start of a sequence, no images go that way too: every rank must run
        the same modules (DDP, ZeRO-3, FSDP2), whoever has some, and gets a zero gradient.
        """
        # In this order: the length of a static cache is a tensor, and to compare it waits for the device.
        sharded = is_sharded(self) and _begins(None, cache)
        if sharded and any_rank(pixel_values is not None, inputs_embeds.device) and pixel_values is None:
            # The ranks gather the encoder's weights layer by layer: those without pixels encode a blank.
            vision = self.config.vision_tokenizer_config
            shape = (1, vision.vision_config.num_channels, vision.image_size, vision.image_size)
            self.get_image_codes(inputs_embeds.new_zeros(shape))
        if pixel_values is not None:
            return self.get_image_codes(pixel_values)
        if codes == (None, None) and (self.training or sharded):
            grid = self.config.vision_tokenizer_config.grid_size
            shape = (0, grid, grid, self.config.num_depths)
            return (torch.zeros(shape, dtype=torch.long, device=inputs_embeds.device),) * 2
        return codes

    def for_backbone(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """`(B, L, H)` in the language model's dtype: an adapter's projector and embeddings may be float32 beside it."""
        norm = getattr(self.language_model, "norm", None)
        if norm is None or is_autocast_on(inputs_embeds.device.type):
            return inputs_embeds
        return inputs_embeds.to(norm.weight.dtype)

    def _packs_rows(self, attention_mask, position_ids, past_key_values) -> bool:
        """Whether rows go one after the other: flash attention looks for packed samples in a single row only."""
        # CODEPATH: no checkpoint's own, but what `attn_implementation` asks for.
        if "flash" not in (self.config.text_config._attn_implementation or "") or position_ids is None:
            return False
        return attention_mask is None and past_key_values is None and position_ids.ndim == 2

    def check_placeholders(self, image_mask: torch.BoolTensor, num_images: int) -> None:
        """
        Raise a `ValueError` unless placeholders `(B, L)` are as many as the images take.

        To count them waits for the device once; it is left out under `torch.compile`, whose graph it would end.
        """
        if torch.compiler.is_compiling():
            return
        per_row, per_image = image_mask.sum(-1).tolist(), self.config.num_positions
        if sum(per_row) != num_images * per_image:
            raise ValueError(
                f"{num_images} image(s) were given, which take {num_images * per_image} placeholders "
                f"({per_image} times the token {self.config.image_token_id} each), but `input_ids` hold {sum(per_row)}."
            )
        parted = {row: count for row, count in enumerate(per_row) if count % per_image}
        if parted:
            raise ValueError(
                f"Every row must hold whole images, {per_image} placeholders each; rows {[*parted]} hold "
                f"{[*parted.values()]}."
            )


def _is_paged(cache) -> bool:
    """Whether it is the cache of continuous batching, whose packed requests `generate_batch` has looked at."""
    return cache is not None and not hasattr(cache, "get_seq_length")


def _begins(input_ids: torch.LongTensor | None, cache: Cache | None) -> bool:
    """Whether ids `(B, L)` may begin their sequences; no host sync where one token follows another."""
    if cache is None or _is_paged(cache):
        return cache is None
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor) and input_ids is not None:
        if input_ids.shape[1] == 1 or torch.compiler.is_compiling():
            return False
    return bool(length == 0)


# trf-ignore: TRF007 its constructor corrects what `post_init` sets
class DualTokenForCausalLM(DualTokenPreTrainedModel, DualTokenGenerationMixin):
    """
    The unified model with its text head and its two depth heads.

    ```python
    text = model.generate(**inputs, max_new_tokens=64)
    images = model.decode_images(model.generate(**inputs, generation_mode="image"))  # (images, 3, S', S')
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DualTokenConfig):
        super().__init__(config)
        self.model = DualTokenModel(config)
        self.lm_head = DualTokenTextHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.depth_heads = DualTokenDepthHeads(
            config.depth_head_config,
            config.text_config.hidden_size,
            config.num_depths,
            config.codebook_size,
            config.code_dim,
        )
        self.post_init()
        # Which `post_init` took from a part; the whole has what the part leaves aside.
        self._keys_to_ignore_on_load_unexpected = None
        self.model._freeze_vision_tokenizer()

    @classmethod
    def from_pretrained_parts(
        cls,
        vision_tokenizer,
        language_model,
        *,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        **config_overrides,
    ):
        """
        Assemble a model from a trained vision tokenizer and a causal language model; projector and heads are new.

        The projector is scaled so that image positions enter the language model as large as its text embeddings.

        Args:
            vision_tokenizer ([`DualTokenVisionTokenizer`], `str` or `os.PathLike`).
            language_model (`PreTrainedModel`, `str` or `os.PathLike`): for instance a Qwen2.5 checkpoint.
            dtype (`torch.dtype`, *optional*), attn_implementation (`str`, *optional*): those of the language model by
                default. The tokenizer keeps its own attention.
            config_overrides: fields of [`DualTokenConfig`], for instance the ids of the image tokens.

        Raises:
            ValueError: if an override is no field of the config, the image token ids lie outside the vocabulary, or the
                language model is quantised.
        """
        unknown = sorted(set(config_overrides) - set(DualTokenConfig.__dataclass_fields__))
        if unknown:
            raise ValueError(f"No such fields of DualTokenConfig: {', '.join(unknown)}.")
        if not isinstance(vision_tokenizer, PreTrainedModel):
            vision_tokenizer = DualTokenVisionTokenizer.from_pretrained(vision_tokenizer, dtype=torch.float32)
        if not isinstance(vision_tokenizer, DualTokenVisionTokenizer):
            raise TypeError(
                f"`vision_tokenizer` must be a DualTokenVisionTokenizer, got {type(vision_tokenizer).__name__}."
            )
        if not isinstance(language_model, PreTrainedModel):
            with checkpoint_errors(language_model):
                language_model = AutoModelForCausalLM.from_pretrained(
                    language_model, dtype=dtype or "auto", attn_implementation=attn_implementation
                )
        if getattr(language_model, "is_quantized", False):
            raise ValueError(
                "The language model is quantised, and its weights cannot be copied: assemble the model from a whole one, "
                "save it, and load it with a `quantization_config`."
            )
        config = DualTokenConfig(
            text_config=config_fields(language_model.config),
            vision_tokenizer_config=config_fields(vision_tokenizer.config),
            **config_overrides,
        )
        # Of configs only the fields are taken, and how attention is computed is none.
        attention = {
            "text_config": attn_implementation or language_model.config._attn_implementation,
            "vision_tokenizer_config": vision_tokenizer.config._attn_implementation,
        }
        model = cls._from_config(config, dtype=dtype or language_model.dtype, attn_implementation=attention)
        copy_weights(vision_tokenizer, model.vision_tokenizer)
        copy_weights(language_model.base_model, model.model.language_model)
        if not config.tie_word_embeddings:
            copy_weights(language_model.get_output_embeddings(), model.lm_head)
        model.generation_config = copy.deepcopy(language_model.generation_config)
        model.generation_config = model._complete_generation_config()
        scaled = [*model.model.visual_projector.parameters(), *model.get_input_embeddings().parameters()]
        with gathered(scaled, written=True):
            model._scale_visual_projector()
        return model.eval()

    def _complete_generation_config(self) -> GenerationConfig:
        """A copy of the generation config with what a checkpoint's must say."""
        config = copy.deepcopy(self.generation_config)
        # For other engines, which return text alone and know no more than the config says. Some (vLLM) read only what
        # ends an answer: there it ends where an image would begin, instead of beginning it for ever.
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), *self.config.special_image_token_ids})
        if config.eos_token_id is not None:
            config.eos_token_id = self._ends_and_image_start(config)
        # Transformers saves this mark of a config that it made itself, and drops image settings where it reads it.
        config._from_model_config = None
        return config

    def save_pretrained(self, *args, **kwargs):
        own, self.generation_config = self.generation_config, self._complete_generation_config()
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.generation_config = own

    @torch.no_grad()
    def _scale_visual_projector(self) -> None:
        """Make the projector's inputs of unit variance, and its outputs as large as the text embeddings."""
        projector = self.model.visual_projector
        for linear in (projector.linear_1, projector.linear_2):
            linear.weight.normal_(std=linear.in_features**-0.5)
        # Codes as often as they are used; of a tokenizer without statistics, all alike.
        num_depths, num_positions = self.config.num_depths, self.config.num_positions
        codes = []
        for kind in CODE_KINDS:
            weights = self.vision_tokenizer.quantizer(kind).codebook.cluster_size + 1e-6
            drawn = torch.multinomial(weights.expand(num_depths, -1), 4 * num_positions, replacement=True)
            codes.append(drawn.t().unflatten(0, (4, num_positions)))
        scales = [kind.float().square().mean().sqrt() for kind in self.model.code_embeds(*codes).sum(-2)]
        columns = torch.stack(scales).clamp(min=1e-6).repeat_interleave(self.config.code_dim)
        projector.linear_1.weight.div_(columns.to(projector.linear_1.weight))
        text_rms = self.get_input_embeddings().weight.float().square().mean().sqrt()
        # E[GELU(x)^2] of a standard normal x is 0.43.
        projector.linear_2.weight.mul_((text_rms / 0.43**0.5).to(projector.linear_2.weight))

    def train(self, mode: bool = True):
        """In training the memory is needed for other things than what drawing keeps."""
        if mode:
            self.release_generation_graphs()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        # Of `to`, `cuda`, `half` and so on: a captured step knows the weights by their addresses.
        self.release_generation_graphs()
        return super()._apply(*args, **kwargs)

    @property
    def vision_tokenizer(self) -> DualTokenVisionTokenizer:
        return self.model.vision_tokenizer

    def set_output_embeddings(self, value: nn.Module):
        if type(value) is nn.Linear:
            # What `resize_token_embeddings` makes.
            value.__class__ = DualTokenTextHead
        self.lm_head = value

    def get_image_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`DualTokenModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    @torch.no_grad()
    def decode_images(
        self, output=None, *, pixel_codes: torch.LongTensor | None = None, slice_size: int | None = None
    ) -> torch.Tensor:
        """
        Images `(images, 3, S', S')`, nominally in [-1, 1], of a generation's new images or of pixel codes.

        Args:
            output ([`DualTokenGenerateOutput`], *optional*): what `generate` returned; or
            pixel_codes (`torch.LongTensor` of shape `(images, h, w, D)`, *optional*).
            slice_size (`int`, *optional*): how many images are decoded at a time, to save memory; all by default.
        """
        if (output is None) == (pixel_codes is None):
            raise ValueError("`decode_images` takes what `generate` returned, or `pixel_codes`.")
        if output is not None and getattr(output, "pixel_codes", None) is None:
            raise ValueError(
                "`decode_images` takes what `generate` returned with generation_mode 'image' or 'interleaved', got "
                f"{type(output).__name__}; text mode returns ids and no images."
            )
        pixel_codes = output.pixel_codes if pixel_codes is None else pixel_codes
        if len(pixel_codes) == 0:
            size = self.config.vision_tokenizer_config.reconstruction_size
            return torch.empty(0, 3, size, size, device=self.device, dtype=self.vision_tokenizer.dtype)
        return self.vision_tokenizer.decode(pixel_codes=pixel_codes, slice_size=slice_size).reconstruction

    def decode_image_tokens(self, image_tokens: torch.LongTensor) -> torch.Tensor:
        """`decode_images` of pixel codes `(images, h, w, D)`, by the name that transformers' pipelines call."""
        return self.decode_images(pixel_codes=image_tokens)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_codes: torch.LongTensor | None = None,
        semantic_codes: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | Sequence | int | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> DualTokenCausalLMOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*): aligned with `input_ids`, shifted inside.
                `image_token_id`: the position's codes are visual targets; -100: no target; any other id, `<image_start>`
                and `<image_end>` included: a text target. An image is labelled wholly or not at all.
            logits_to_keep (`int` or `torch.Tensor`): as in transformers.
            num_items_in_batch (*optional*): what the sums of the losses are divided by. A pair: the numbers of text
                and of visual targets of the whole global batch. One number: divides all three sums. `None`: each
                loss is a mean over its own targets in this batch.

        The other arguments are those of [`DualTokenModel.forward`].

        Raises:
            ValueError: if labels have another shape than the ids, or label an image in part; for `shift_labels`, which
                transformers' Trainer gives in place of `labels` when it splits sequences over devices.
        """
        if kwargs.pop("shift_labels", None) is not None:
            raise ValueError(
                "`shift_labels` are not supported: images must not be split over devices (context or sequence parallelism)."
            )
        image_mask = None
        if labels is not None:
            # A loss needs no cache, and with one transformers does not keep packed samples apart.
            use_cache = bool(use_cache)
            has_inputs = input_ids is not None or inputs_embeds is not None
            image_mask = self.model.image_mask(input_ids, inputs_embeds) if has_inputs else None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=given_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_codes=pixel_codes,
            semantic_codes=semantic_codes,
            use_cache=use_cache,
            image_mask=image_mask,
            return_dict=True,
            **kwargs,
        )
        losses = {} if labels is None else unified_losses(self, outputs, image_mask, labels, num_items_in_batch)
        logits = None
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = text_logits(self.lm_head, outputs.last_hidden_state[:, kept])
        return DualTokenCausalLMOutputWithPast(**losses, logits=logits, **outputs)


__all__ = [
    "DualTokenCausalLMOutputWithPast",
    "DualTokenForCausalLM",
    "DualTokenModel",
    "DualTokenModelOutputWithPast",
    "DualTokenPreTrainedModel",
]
