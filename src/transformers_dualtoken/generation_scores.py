"""The scores of text tokens: image tokens are barred before anything chooses among the rest."""

import torch
from transformers.generation import LogitsProcessor


class ImageTokenBar(LogitsProcessor):
    """
    Bars tokens: before all other processors, so that top-k and top-p keep others, and after the caller's, which may
    have raised them again.

    Args:
        token_ids (`list[int]`): may be changed between two steps.
    """

    supports_continuous_batching = True

    def __init__(self, token_ids: list[int]):
        self.token_ids = token_ids
        self._mask, self._key = None, None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        key = (tuple(self.token_ids), scores.shape[-1], scores.device)
        if key != self._key:
            # Made once: indices from the host would be copied at every step.
            mask = torch.zeros(scores.shape[-1], dtype=torch.bool)
            mask[list(self.token_ids)] = True
            self._mask, self._key = mask.to(scores.device), key
        return scores.masked_fill(self._mask, float("-inf"))


class ScoreCheck(LogitsProcessor):
    """
    The last of all processors: what is left must hold something to choose.

    On a GPU the host does not wait: a row that holds nothing, where a draw would be a device assert, is made uniform,
    and [`raise_if_empty`] says so at the end.
    """

    def __init__(self):
        self._is_empty: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        # A token that was forced by infinity is certain.
        scores = scores.clamp(max=torch.finfo(scores.dtype).max)
        is_empty = ~scores.amax(-1, keepdim=True).isfinite()
        self._is_empty = is_empty.any() if self._is_empty is None else self._is_empty | is_empty.any()
        if scores.device.type == "cpu":
            self.raise_if_empty()
        return scores.masked_fill(is_empty, 0.0)

    def raise_if_empty(self) -> None:
        """Raise a `ValueError` if a row's scores held NaN, or every token was barred; waits for the device once."""
        if self._is_empty is not None and bool(self._is_empty):
            raise ValueError(
                "No token was left to choose: the scores hold NaN (weights that are not finite, or a dtype that "
                "overflows), or every token is barred by `suppress_tokens`, `bad_words_ids`, `sequence_bias`, "
                "`min_new_tokens`, `prefix_allowed_tokens_fn` or a logits processor, together with the image tokens "
                "that text cannot hold."
            )


__all__ = ["ImageTokenBar", "ScoreCheck"]
