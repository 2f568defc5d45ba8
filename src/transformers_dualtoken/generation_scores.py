"""The scores of text tokens: image tokens are barred before anything chooses among the rest."""

from collections.abc import Sequence

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
    and [`raise_if_empty`] says so at the end. A row that has ended chooses nothing. Beams may die as long as one of
    their prompt lives.

    Args:
        ended_ids (`Sequence[torch.LongTensor]`): what the last token of a row that has ended may be.
        num_beams (`int`): rows of a prompt.
    """

    def __init__(self, ended_ids: Sequence[torch.LongTensor] = (), num_beams: int = 1):
        self.ended_ids, self.num_beams = ended_ids, num_beams
        self._is_empty: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        # A token that was forced by infinity is certain.
        scores = scores.clamp(max=torch.finfo(scores.dtype).max)
        largest = scores.amax(-1)
        is_empty = ~largest.isfinite()
        if self.num_beams > 1:
            counted = largest.isnan().any() | is_empty.view(-1, self.num_beams).all(-1).any()
        else:
            counted = (
                (is_empty & ~self._has_ended(input_ids)).any()
                if self.ended_ids and input_ids.shape[1]
                else is_empty.any()
            )
            scores = scores.masked_fill(is_empty.unsqueeze(-1), 0.0)
        self._is_empty = counted if self._is_empty is None else self._is_empty | counted
        if scores.device.type == "cpu":
            self.raise_if_empty()
        return scores

    def _has_ended(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        return torch.isin(input_ids[:, -1], torch.cat(list(self.ended_ids)).to(input_ids.device))

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
