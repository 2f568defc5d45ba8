"""What `generate` is given, looked at before anything runs: what is no number, no callable, or not of this mode."""

import difflib
import math
import numbers

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)


_SAMPLING = [f"{kind}_{name}" for kind in ("image", "pixel", "semantic") for name in ("temperature", "top_k", "top_p")]
_WHOLE = ("num_return_sequences", "max_new_tokens")
# What only generation with images takes.
_OF_IMAGES = [*_SAMPLING, "image_do_sample", "generator", "on_image", "progress_bar"]
_OF_NEGATIVE_PROMPTS = ("negative_prompt_ids", "negative_prompt_attention_mask")
# Settings of text that image mode passes over, and what is meant instead.
_OF_TEXT = {name: f"`image_{name}`" for name in ("do_sample", "temperature", "top_k", "top_p")} | dict.fromkeys(
    ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "min_length", "bad_words_ids", "output_scores")
)


def check_prompt(inputs) -> None:
    """Raise unless the prompt is ids `(B, L)`; `None` is left to transformers."""
    if inputs is None:
        return
    if not isinstance(inputs, torch.Tensor):
        raise TypeError(
            f"The prompt must be a tensor of ids, got {type(inputs).__name__}: pass what the processor returns as "
            "`**inputs`."
        )
    if inputs.ndim != 2 or inputs.shape[1] == 0:
        raise ValueError(f"The prompt must be ids of shape (B, L) with at least one token, got {tuple(inputs.shape)}.")


def check_guidance_scale(scale) -> None:
    is_number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
    if not is_number or not math.isfinite(scale) or scale < 0:
        raise ValueError(f"`guidance_scale` must be a number from 0 (1.0: no guidance), got {scale!r}.")


def check_image_arguments(mode: str, kwargs: dict) -> None:
    """
    For image and interleaved mode: raise a `TypeError` for arguments of the wrong kind, which would fail later in
    other words, and warn of those that image mode passes over.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    for name in (*_SAMPLING, *_WHOLE):
        kind, what = (numbers.Integral, "a whole number") if name in _WHOLE else (numbers.Real, "a number")
        value = given.get(name, 1)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"`{name}` must be {what}, got {value!r}.")
    if not isinstance(given.get("generator", torch.default_generator), torch.Generator):
        raise TypeError(
            f"`generator` must be a torch.Generator, such as torch.Generator().manual_seed(0), got "
            f"{given['generator']!r}."
        )
    if "on_image" in given and not callable(given["on_image"]):
        raise TypeError(f"`on_image` must be callable as on_image(codes, owner), got {given['on_image']!r}.")
    for name in _OF_NEGATIVE_PROMPTS:
        if name in given and not isinstance(given[name], torch.Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(given[name]).__name__}.")
    if mode == "interleaved":
        streamer = given.get("streamer")
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TypeError(f"`streamer` must have the methods `put` and `end`, got {streamer!r}.")
    else:
        for name in sorted(_OF_TEXT.keys() & given.keys()):
            instead = f": it is {_OF_TEXT[name]} for images" if _OF_TEXT[name] else ""
            logger.warning(f"`generation_mode='image'` writes no text and passes over `{name}`{instead}.")


def check_text_arguments(kwargs: dict) -> None:
    """Raise a `ValueError` for what text mode does not take but the other modes do; drop what is off."""
    for name in (*_OF_IMAGES, *_OF_NEGATIVE_PROMPTS):
        value = kwargs.pop(name, None)
        if value is not None and value is not False:
            raise ValueError(
                f"`{name}` belongs to image and interleaved generation, and this is text: pass "
                "`generation_mode='image'` or `'interleaved'`."
            )


def check_nothing_is_left(mode: str, given: dict, known: set[str]) -> None:
    """Raise a `ValueError` for arguments that the mode does not take, with the names that are most like theirs."""
    unknown = sorted(name for name, value in given.items() if value is not None)
    if not unknown:
        return
    hints = []
    for name in unknown:
        nearest = difflib.get_close_matches(
            name, {*known, *_OF_IMAGES, *_OF_NEGATIVE_PROMPTS} - {name}, n=1, cutoff=0.8
        )
        hints += [f" Is `{nearest[0]}` meant?"] if nearest else []
    if "seed" in unknown:
        hints.append(" A seed is passed as `generator=torch.Generator().manual_seed(seed)`.")
    raise ValueError(f"`generation_mode={mode!r}` does not take {', '.join(unknown)}.{''.join(hints)}")


__all__ = [
    "check_guidance_scale",
    "check_image_arguments",
    "check_nothing_is_left",
    "check_prompt",
    "check_text_arguments",
]
