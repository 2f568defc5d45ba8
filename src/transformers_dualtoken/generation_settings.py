"""
The image arguments of `generate`, each declared once with its default, check and meaning.

Settings may stand in a generation config, and so in a checkpoint's `generation_config.json`. Inputs belong to one call.
What transformers' own settings mean where images are drawn is said here too.
"""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.generation import GenerationConfig, WatermarkingConfig
from transformers.utils import logging

from .field_rules import FLAG, WHOLE_FROM_0, WHOLE_FROM_1, Rule, is_a, is_list_of, is_number, is_whole, one_of


logger = logging.get_logger(__name__)

GENERATION_MODES = ("text", "image", "interleaved")


_is_tensor = is_a(torch.Tensor)


def _is_integers(value) -> bool:
    return _is_tensor(value) and value.dtype != torch.bool and not (value.is_floating_point() or value.is_complex())


def _is_id(value) -> bool:
    return is_whole(value) or (_is_integers(value) and value.numel() == 1)


def _is_ids(value) -> bool:
    return is_whole(value) or _is_integers(value) or is_list_of(is_whole)(value)


def _is_generators(value) -> bool:
    return isinstance(value, torch.Generator) or (is_list_of(is_a(torch.Generator))(value) and len(value) > 0)


def _are_apart(value) -> bool:
    """Whether generators are different ones of one device."""
    values = [value] if isinstance(value, torch.Generator) else value
    return len(set(map(id, values))) == len(values) and len({generator.device for generator in values}) == 1


def _is_watermark(value) -> bool:
    """Of the kinds that transformers' `WatermarkingConfig` compares and computes with; other classes look themselves."""
    if not isinstance(value, (WatermarkingConfig, dict)):
        return hasattr(value, "validate")
    kinds = {"greenlist_ratio": is_number, "bias": is_number, "hashing_key": is_whole, "context_width": is_whole}
    kinds["seeding_scheme"] = is_a(str)
    fields = value if isinstance(value, dict) else value.to_dict()
    return all(name in kinds and kinds[name](part) for name, part in fields.items())


def _is_sequence_bias(value) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and all(map(is_list_of(is_a(object, bool), 2), value)))


# By comparison: a whole number may be too large for a float.
_FINITE = Rule("a finite number", is_number, lambda value: abs(value) < math.inf)
_POSITIVE = Rule("a finite number above 0", is_number, lambda value: 0 < value < math.inf)
_TOP_K = Rule("a whole number from 0 (0 keeps all codes)", is_number, lambda value: value >= 0 and value % 1 == 0)
_TOP_P = Rule("a number above 0 and up to 1 (1 keeps all codes)", is_number, lambda value: 0 < value <= 1)
_SCALE = Rule("a number from 0 (1.0: no guidance)", is_number, lambda value: 0 <= value < math.inf)
_TENSOR, _CODES = Rule("a tensor", _is_tensor), Rule("a tensor of whole numbers", _is_integers)
_GENERATORS = Rule(
    "a torch.Generator, such as torch.Generator().manual_seed(0), or a list with one for every image, which must be "
    "different ones of one device",
    _is_generators,
    _are_apart,
)


def _argument(default, rule: Rule):
    return dataclasses.field(default=default, metadata={"rule": rule})


class _Checked:
    """A dataclass whose fields are checked when it is made; `None` is not given."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            field.metadata["rule"].check_given(**{field.name: getattr(self, field.name)})

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]


@dataclass
class DualTokenImageGenerationConfig(_Checked):
    """
    How images are drawn: arguments of `generate`, which may also stand in a generation config.

    A keyword of the call counts before the generation config that is given, this before the model's own
    (`generation_config.json` of its checkpoint), and this before the default. At one place a setting of one head counts
    before that of both, which counts before one head's at a later place.

    Args:
        generation_mode (`str`, defaults to `"text"`): `"text"`: everything transformers' `generate` does, without
            images. `"image"`: one image per row. `"interleaved"`: text and images, until the end-of-sequence id or
            `max_new_tokens`; no image is started that could not be finished.
        guidance_scale (`float`, defaults to 3.0): logits = uncond + s (cond - uncond), in both heads at every depth;
            from 0, 1.0 is no guidance. Not used in text mode.
        image_do_sample (`bool`, defaults to `True`): `False` takes the most probable code at every depth.
        image_temperature (`float`, defaults to 1.0): above 0.
        image_top_k (`int`, defaults to 900): how many of the most probable codes are kept; 0 keeps all.
        image_top_p (`float`, defaults to 0.96): in (0, 1], the share of the probability that is kept; 1 keeps all.
        pixel_temperature, pixel_top_k, pixel_top_p, semantic_temperature, semantic_top_k, semantic_top_p (*optional*):
            the same for one head.
    """

    generation_mode: str = _argument("text", one_of(*GENERATION_MODES))
    guidance_scale: float = _argument(3.0, _SCALE)
    image_do_sample: bool = _argument(True, FLAG)
    image_temperature: float = _argument(1.0, _POSITIVE)
    image_top_k: int = _argument(900, _TOP_K)
    image_top_p: float = _argument(0.96, _TOP_P)
    pixel_temperature: float | None = _argument(None, _POSITIVE)
    pixel_top_k: int | None = _argument(None, _TOP_K)
    pixel_top_p: float | None = _argument(None, _TOP_P)
    semantic_temperature: float | None = _argument(None, _POSITIVE)
    semantic_top_k: int | None = _argument(None, _TOP_K)
    semantic_top_p: float | None = _argument(None, _TOP_P)

    @classmethod
    def resolve(cls, *places: dict) -> "DualTokenImageGenerationConfig":
        """Settings from several places, the one that counts most first; others than these are passed over."""
        values = {}
        for place in reversed(places):
            given = {name: place[name] for name in cls.names() if place.get(name) is not None}
            of_both = [name.removeprefix("image_") for name in given if name.startswith("image_")]
            for name, kind in itertools.product(of_both, ("pixel", "semantic")):
                values.pop(f"{kind}_{name}", None)
            values |= given
        return cls(**values)

    def of_heads(self, name: str) -> tuple:
        """`"temperature"`, `"top_k"` or `"top_p"` of the pixel and of the semantic head."""
        pair = (getattr(self, f"{kind}_{name}") for kind in ("pixel", "semantic"))
        return tuple(getattr(self, f"image_{name}") if value is None else value for value in pair)


@dataclass
class DualTokenImageGenerationInputs(_Checked):
    """
    What one call of `generate` with images takes besides its prompts and settings.

    Args:
        generator (`torch.Generator` or a list of them, *optional*): source of all randomness. With a list, one for every
            row of the result, a row depends on its own alone, and in float32 comes out the same in any batch.
        on_image (callable, *optional*): called as `on_image((pixel_codes, semantic_codes), owner)` with codes
            `(h, w, D)` and the row of `sequences`, as soon as an image is finished.
        progress_bar (`bool`, defaults to `False`): show one, over the positions of image mode and over the tokens of
            interleaved mode. A GPU is waited for a few positions behind.
        negative_prompt_ids (`torch.LongTensor` of shape `(1 or B, L')`, *optional*): the unconditional context, a
            rendered prompt that ends in `<image_start>`; by default `<image_start>` alone. With
            `negative_prompt_attention_mask`, and its images as `negative_pixel_values`, or as `negative_pixel_codes`
            and `negative_semantic_codes`. The processor makes all of them from `negative_prompt="..."`.
    """

    generator: torch.Generator | list | None = _argument(None, _GENERATORS)
    on_image: Callable | None = _argument(None, Rule("callable as on_image(codes, owner)", callable))
    progress_bar: bool = _argument(False, FLAG)
    negative_prompt_ids: torch.LongTensor | None = _argument(None, Rule("a tensor of ids", _is_integers))
    negative_prompt_attention_mask: torch.Tensor | None = _argument(None, _TENSOR)
    negative_pixel_values: torch.Tensor | None = _argument(None, _TENSOR)
    negative_pixel_codes: torch.LongTensor | None = _argument(None, _CODES)
    negative_semantic_codes: torch.LongTensor | None = _argument(None, _CODES)


# Inputs, and settings of transformers, whose wrong kinds or ranges would end in other words, late, or not at all.
_NAMES_BY_RULE = {
    WHOLE_FROM_1: """max_new_tokens max_length
            num_return_sequences num_beams prefill_chunk_size num_assistant_tokens""",
    WHOLE_FROM_0: """min_new_tokens min_length top_k
            no_repeat_ngram_size encoder_no_repeat_ngram_size prompt_lookup_num_tokens max_matching_ngram_size
            assistant_lookbehind target_lookbehind""",
    _FINITE: """temperature top_p min_p top_h typical_p repetition_penalty encoder_repetition_penalty length_penalty
            epsilon_cutoff eta_cutoff penalty_alpha diversity_penalty max_time assistant_confidence_threshold
            assistant_ensemble_weight""",
    FLAG: """do_sample renormalize_logits remove_invalid_values use_cache disable_compile return_dict_in_generate
            synced_gpus output_scores output_logits output_attentions output_hidden_states token_healing is_assistant
            low_memory use_mtp""",
    Rule("an id or a list of ids", _is_ids): "eos_token_id forced_eos_token_id decoder_start_token_id",
    Rule("an id", _is_id): "pad_token_id bos_token_id forced_bos_token_id",
    Rule("a list of ids", lambda v: _is_ids(v) and not is_whole(v)): "suppress_tokens begin_suppress_tokens",
    _TENSOR: "attention_mask pixel_values inputs_embeds position_ids",
    _CODES: "pixel_codes semantic_codes",
    Rule("a cache", lambda value: hasattr(value, "get_seq_length")): "past_key_values cache",
    Rule("the name of a kind of cache", is_a(str)): "cache_implementation",
    Rule("True, False or 'never'", is_a(bool, str)): "early_stopping",
    Rule("callable as prefix_allowed_tokens_fn(batch_id, input_ids)", callable): "prefix_allowed_tokens_fn",
    Rule(
        "a watermarking config, or a dict of its `greenlist_ratio`, `bias`, `hashing_key`, `seeding_scheme` and "
        "`context_width`",
        _is_watermark,
    ): "watermarking_config",
    Rule("a dict of tuples of ids and numbers, or a list of such pairs", _is_sequence_bias): "sequence_bias",
    Rule("a pair of a number of tokens and a factor", is_list_of(is_number, 2)): "exponential_decay_length_penalty",
    Rule("a list of stopping criteria", is_list_of(callable)): "stopping_criteria",
    Rule("a list of logits processors", is_list_of(callable)): "logits_processor",
    Rule("an object with the methods `put` and `end`", lambda v: hasattr(v, "put") and hasattr(v, "end")): "streamer",
}
_RULES = {name: rule for rule, names in _NAMES_BY_RULE.items() for name in names.split()}

# What transformers' settings do where images are drawn; all others are refused where they are on. Those of the text of
# an interleaved answer are passed over in image mode, which writes none, with a warning that names what is meant instead.
_OF_TEXT = set(
    """do_sample temperature top_k top_p max_length max_new_tokens min_length min_new_tokens min_p top_h typical_p
    epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty no_repeat_ngram_size suppress_tokens
    encoder_no_repeat_ngram_size bad_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id sequence_bias
    remove_invalid_values exponential_decay_length_penalty begin_suppress_tokens watermarking_config""".split()
)
# Honoured in both modes, or the same whatever they are; and passed over with a warning: how, not what.
_OF_BOTH = set(
    """num_return_sequences cache_implementation compile_config disable_compile return_dict_in_generate pad_token_id
    bos_token_id eos_token_id decoder_start_token_id transformers_version is_assistant chat_template""".split()
)
_WITHOUT_EFFECT = set("use_cache cache_config max_cache_len low_memory prefill_chunk_size".split())
_WITHOUT_EFFECT |= {"continuous_batching_config", "use_model_defaults"}


class GenerationArguments:
    """
    What a call of `generate` was given, taken apart and checked before anything runs: the image `settings` and `inputs`,
    and the `generation_config` and `kwargs` that are left for transformers.

    Args:
        own (`GenerationConfig`): the model's.
        generation_config (`GenerationConfig` or `dict`, *optional*), kwargs (`dict`): of the call.
    """

    def __init__(self, own: GenerationConfig, generation_config: GenerationConfig | dict | None, kwargs: dict):
        if generation_config is not None and not isinstance(generation_config, (GenerationConfig, dict)):
            raise TypeError(
                f"`generation_config` must be a GenerationConfig or a dict, got {type(generation_config).__name__}."
            )
        given, self._own, kwargs = _fields(generation_config), _fields(own), dict(kwargs)
        of_images = _pop(kwargs, DualTokenImageGenerationConfig.names())
        self._places = (_fields(kwargs), given, self._own)
        self.settings = DualTokenImageGenerationConfig.resolve(of_images, given, self._own)
        self.mode = self.settings.generation_mode
        _pop(given, DualTokenImageGenerationConfig.names())
        self._given = {**given, **kwargs}
        for name, value in self._given.items():
            if name in _RULES and value is not None:
                _RULES[name].check(name, value)
        inputs = _pop(kwargs, DualTokenImageGenerationInputs.names())
        self.inputs = DualTokenImageGenerationInputs(**inputs)
        if isinstance(generation_config, dict):
            # Keywords that count less than the others.
            generation_config, kwargs = None, {**given, **kwargs}
        if isinstance(kwargs.get("watermarking_config"), dict):
            # Older transformers take a dict in a config only.
            kwargs["watermarking_config"] = WatermarkingConfig(**kwargs["watermarking_config"])
        self.generation_config, self.kwargs = generation_config, kwargs
        if self.mode == "text":
            self._check_text({**of_images, **inputs})
        else:
            self._check_other_settings(config_fields=given)

    def value(self, name: str, default=None):
        """One of transformers' settings as it was given, or else the model's own."""
        # `None` of a keyword unsets what the model's own says.
        value = self._given[name] if name in self._given else self._own.get(name)
        return default if value is None else value

    def new_tokens(self, prompt_length: int, default: int) -> int:
        """By `max_new_tokens`, or by `max_length` less the prompt, at the place that counts most; there by the first."""
        for place in self._places:
            for name in ("max_new_tokens", "max_length"):
                if name in place and self.value(name) is not None:
                    left = place[name] - (prompt_length if name == "max_length" else 0)
                    if left <= 0:
                        raise ValueError(
                            f"`max_length` counts the prompt, whose {prompt_length} tokens leave no room below "
                            f"{place[name]}: pass `max_new_tokens`."
                        )
                    return left
        return default

    def _check_text(self, given: dict) -> None:
        """What text mode does not do, of this model's and of transformers' arguments."""
        if self.value("assistant_early_exit") is not None:
            raise ValueError(
                "`assistant_early_exit` drafts with the first layers of the model, which this one cannot do: pass an "
                "`assistant_model`, or `prompt_lookup_num_tokens`."
            )
        # Guidance is of images, but may be said once for all modes.
        off = {"generation_mode", "guidance_scale"} | (set() if self.inputs.progress_bar else {"progress_bar"})
        for name in given.keys() - off:
            raise ValueError(
                f"`{name}` belongs to image and interleaved generation, and this is text: pass "
                "`generation_mode='image'` or `'interleaved'`."
            )

    def _check_other_settings(self, config_fields: dict) -> None:
        """What the mode does not do: refused, or named in a warning where it changes nothing in the images."""
        ours = set(DualTokenImageGenerationConfig.names())
        known = {*GenerationConfig().to_dict(), "synced_gpus", "trust_remote_code", *_WITHOUT_EFFECT, *config_fields}
        known -= ours | _OF_BOTH | (_OF_TEXT if self.mode == "interleaved" else set())
        # The model's own settings are those of its text.
        settings = self._given if self.mode == "image" else {**self._own, **self._given}
        settings = {name: value for name, value in settings.items() if name in known and value is not None}
        for name in filter(_OF_TEXT.__contains__, settings):
            if name in self.kwargs or settings[name] != self._own.get(name):
                instead = f": it is `image_{name}` for images" if f"image_{name}" in ours else ""
                logger.warning_once(f"`generation_mode='image'` writes no text and passes over `{name}`{instead}.")
        on = [name for name, value in settings.items() if name not in _OF_TEXT and not _is_off(name, value)]
        if without_effect := _WITHOUT_EFFECT.intersection(on):
            logger.warning_once(
                f"`generation_mode={self.mode!r}` passes over {', '.join(sorted(without_effect))}: the result is the same."
            )
        self.refuse(set(on) - _WITHOUT_EFFECT)

    def refuse(self, names) -> None:
        """Raise a `ValueError` for arguments that the mode does not take, with the names that are most like theirs."""
        known = {*GenerationConfig().to_dict(), *DualTokenImageGenerationConfig.names()}
        known |= {*DualTokenImageGenerationInputs.names()}
        hints = ""
        for name in sorted(set(names) - known):
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            hints += f" Is `{nearest[0]}` meant?" if nearest else ""
        if "seed" in names:
            hints += " A seed is passed as `generator=torch.Generator().manual_seed(seed)`."
        if names:
            raise ValueError(f"`generation_mode={self.mode!r}` does not take {', '.join(sorted(names))}.{hints}")


def _pop(kwargs: dict, names: list[str]) -> dict:
    """Take those of the names out that are given."""
    taken = {name: kwargs.pop(name, None) for name in names}
    return {name: value for name, value in taken.items() if value is not None}


def _fields(config: GenerationConfig | dict | None) -> dict:
    """What is set in a generation config."""
    fields = vars(config) if isinstance(config, GenerationConfig) else config or {}
    return {name: value for name, value in fields.items() if value is not None and not str(name).startswith("_")}


def _is_off(name: str, value) -> bool:
    """Whether one of transformers' settings asks for nothing; 1 return sequence or beam, for instance."""
    off = GenerationConfig._get_default_generation_params().get(name)
    return type(value) in (bool, int, float, str) and value == (False if off is None else off)
