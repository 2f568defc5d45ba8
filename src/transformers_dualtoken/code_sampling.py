"""Drawing codes from the depth heads' logits."""

import math
from collections import deque
from dataclasses import dataclass, fields

import torch


# Of which a probability of 1 is made: finer than float32, and sums of all codes fit into int64.
_PROBABILITY_UNITS = 2**40
# Temperatures below are as good as greedy, and would divide to infinity.
_MIN_TEMPERATURE = 1e-6


@dataclass
class DualTokenCodeSampler:
    """
    Draws codes from logits: temperature, then top-k, then top-p, then one draw. Pairs are (pixel, semantic), as
    [`DualTokenImageGenerationConfig`] has checked them.

    The draw adds Gumbel noise and takes the maximum: no host sync, and the whole codebook is sorted only where top-k is
    off. The noise comes from `generator` (`torch.Generator`, of the CPU too, or a list with one for every row).
    """

    temperature: tuple[float, float] = (1.0, 1.0)
    top_k: tuple[int, int] = (900, 900)
    top_p: tuple[float, float] = (0.96, 0.96)
    do_sample: bool = True
    generator: torch.Generator | list[torch.Generator] | None = None

    def __post_init__(self):
        # Sums of the scores drawn so far, (M, B): where one of them was not finite, neither is the sum.
        self.score_sums: torch.Tensor | None = None

    @property
    def constants(self) -> tuple:
        """All that a captured step takes for constant: a graph of other values is another one."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "generator")

    @classmethod
    def from_settings(cls, settings, generator=None) -> "DualTokenCodeSampler":
        """From a [`DualTokenImageGenerationConfig`]: a pair from `of_heads`, another field from `image_<name>`."""
        values = {"generator": generator}
        for field in fields(cls):
            if isinstance(field.default, tuple):
                values[field.name] = tuple(map(type(field.default[0]), settings.of_heads(field.name)))
            elif field.name != "generator":
                values[field.name] = getattr(settings, f"image_{field.name}")
        return cls(**values)

    def num_candidates(self, num_codes: int) -> int:
        """How many of the most probable codes the draw is among: what top-k leaves in either head."""
        top_k = [min(k, num_codes) or num_codes for k in self.top_k]
        return max(top_k) if self._is_ranked(num_codes) else num_codes

    def _is_ranked(self, num_codes: int) -> bool:
        return min(min(k, num_codes) or num_codes for k in self.top_k) < num_codes or min(self.top_p) < 1

    def new_noise(self, num_depths: int, rows: int, num_codes: int, device: torch.device) -> "CodeNoise | None":
        """Noise `(D, M, B, candidates)` of one position; `None` where none is needed. From here on scores are watched."""
        self.score_sums = torch.zeros(2, rows, device=device)
        if not self.do_sample:
            return None
        return CodeNoise((num_depths, 2, rows, self.num_candidates(num_codes)), device, self.generator)

    def __call__(self, logits: torch.Tensor, noise: torch.Tensor | None = None) -> torch.LongTensor:
        """Logits `(M, B, K)` -> codes `(M, B)`; `noise` `(M, B, candidates)` of one depth is drawn here by default."""
        if not self.do_sample:
            best, chosen = logits.max(-1)
            self._watch(best)
            return chosen
        num_codes = logits.shape[-1]
        if noise is None:
            shape = (1, 2, logits.shape[1], self.num_candidates(num_codes))
            noise = CodeNoise(shape, logits.device, self.generator).draw()[0]
        scores = logits.float()
        if self.temperature != (1.0, 1.0):
            temperature = tuple(max(value, _MIN_TEMPERATURE) for value in self.temperature)
            scores = scores / _per_head(temperature, scores)
        indices = None
        if self._is_ranked(num_codes):
            scores, indices = scores.topk(noise.shape[-1], dim=-1)
            for head, k in enumerate(self.top_k):
                if 0 < k < scores.shape[-1]:
                    scores[head, :, k:] = float("-inf")
            if min(self.top_p) < 1:
                # A code stays while those before it hold less than top-p; the first always stays.
                # Added up in whole numbers: a GPU adds no fractions in a fixed order, and refuses to under
                # deterministic algorithms.
                held = (scores.softmax(-1) * _PROBABILITY_UNITS).long().cumsum(-1)
                # Beyond every sum where all codes stay.
                top_p = tuple(math.ceil((p if p < 1 else 2) * _PROBABILITY_UNITS) for p in self.top_p)
                scores[..., 1:].masked_fill_(held[..., :-1] >= _per_head(top_p, held), float("-inf"))
        best, chosen = (scores + noise).max(-1, keepdim=True)
        self._watch(best.squeeze(-1))
        return (chosen if indices is None else indices.gather(-1, chosen)).squeeze(-1)

    def _watch(self, best: torch.Tensor) -> None:
        """Add up the scores `(M, B)` of drawn codes."""
        # In place and added up: one small kernel a depth, no host sync, and a CUDA graph takes it.
        if self.score_sums is not None:
            self.score_sums += best

    def check_scores(self, rows: slice | int = slice(None)) -> None:
        """Raise a `ValueError` if rows were drawn from scores that are not finite; waits for the device once."""
        if self.score_sums is not None and not bool(self.score_sums[:, rows].isfinite().all()):
            raise ValueError(
                "The depth heads' scores hold NaN or infinity, so that no code could be drawn: weights that are not "
                "finite, a dtype that overflows (float16), or a huge `guidance_scale`."
            )


class CodeNoise:
    """
    Gumbel noise `(D, M, B, candidates)` for one position after the other, in a tensor that stays where it is.

    With a generator of the CPU's a GPU draws what the CPU would. It comes through pinned memory, so that the host waits
    only where it is a few positions ahead. Of a list of generators each draws its row's part, whatever other rows there
    are.
    """

    # Positions the host may be ahead of a GPU.
    SLOTS = 4

    def __init__(self, shape: tuple[int, ...], device: torch.device, generator=None):
        # A step that is tried before the first noise must find numbers.
        self.values, self.generator = torch.zeros(shape, device=device), generator
        first = generator[0] if isinstance(generator, (list, tuple)) else generator
        self._source = device if first is None else first.device
        self._on_host = self._source.type != device.type
        self._slots = deque()
        if self._on_host and device.type == "cuda":
            for _ in range(self.SLOTS):
                self._slots.append((torch.zeros(shape, pin_memory=True), torch.cuda.Event()))

    def draw(self, rows: list[int] | None = None) -> torch.Tensor:
        """New noise `(D, M, B, candidates)` of the `rows` that are drawn; of a list, the others' generators rest."""
        if not self._on_host:
            return self._draw_into(self.values, rows)
        if not self._slots:
            return self.values.copy_(self._draw_into(torch.zeros_like(self.values, device=self._source), rows))
        slot, copied = self._slots.popleft()
        copied.synchronize()
        self.values.copy_(self._draw_into(slot, rows), non_blocking=True)
        copied.record(torch.cuda.current_stream(self.values.device))
        self._slots.append((slot, copied))
        return self.values

    def _draw_into(self, values: torch.Tensor, rows: list[int] | None) -> torch.Tensor:
        if not isinstance(self.generator, (list, tuple)):
            return _gumbel_(values, self.generator)
        for row in range(values.shape[2]) if rows is None else rows:
            # In memory of its own: what is drawn into a part of a tensor depends on the whole.
            part = torch.empty_like(values[:, :, row], memory_format=torch.contiguous_format)
            values[:, :, row] = _gumbel_(part, self.generator[row])
        return values


def _gumbel_(values: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    # A 0 would become infinite noise, which draws a code that top-k has taken out.
    return values.exponential_(generator=generator).clamp_(min=torch.finfo(values.dtype).tiny).log_().neg_()


def _per_head(pair: tuple[float, float], like: torch.Tensor) -> float | torch.Tensor:
    """A setting of both heads as what broadcasts against `(M, B, K)`; filled on the device: a copy would wait."""
    if pair[0] == pair[1]:
        return pair[0]
    return torch.cat([like.new_full((1, 1, 1), value) for value in pair])
