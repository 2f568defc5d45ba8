"""Drawing codes from the depth heads' logits."""

import math
from collections import deque
from dataclasses import dataclass

import torch


# Of which a probability of 1 is made: finer than float32, and sums of all codes fit into int64.
_PROBABILITY_UNITS = 2**40
_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 900, "top_p": 0.96}


def _of_heads(pair: tuple) -> str:
    return f"{pair[0]} for pixel and {pair[1]} for semantic codes"


@dataclass
class DualTokenCodeSampler:
    """
    Draws codes from logits: temperature, then top-k, then top-p, then one draw. Pairs are (pixel, semantic).

    The draw adds Gumbel noise and takes the maximum: the host waits for nothing, and the whole codebook is sorted only
    where top-k is off.

    Args:
        temperature (pair of `float`): > 0.
        top_k (pair of `int`): 0 keeps all codes.
        top_p (pair of `float`): in (0, 1]; 1 keeps all codes.
        do_sample (`bool`): `False` takes the most probable code and ignores the rest.
        generator (`torch.Generator`, *optional*): source of the noise; may live on the CPU.
    """

    temperature: tuple[float, float] = (1.0, 1.0)
    top_k: tuple[int, int] = (900, 900)
    top_p: tuple[float, float] = (0.96, 0.96)
    do_sample: bool = True
    generator: torch.Generator | None = None

    def __post_init__(self):
        if not all(temperature > 0 for temperature in self.temperature):
            raise ValueError(
                f"Image temperatures must be positive, got {_of_heads(self.temperature)}; `image_do_sample=False` is "
                "greedy."
            )
        if min(self.top_k) < 0 or any(k != int(k) for k in self.top_k):
            raise ValueError(f"Image top-k must be a whole number, 0 to keep all codes, got {_of_heads(self.top_k)}.")
        if not all(0 < p <= 1 for p in self.top_p):
            raise ValueError(f"Image top-p must lie in (0, 1], got {_of_heads(self.top_p)}.")
        self.top_k = tuple(int(k) for k in self.top_k)

    @classmethod
    def from_kwargs(cls, kwargs: dict) -> "DualTokenCodeSampler":
        """Take `image_*` (both heads), `pixel_*`, `semantic_*` (one head) and `generator` out of `kwargs`."""
        settings = {}
        for name, default in _SAMPLING_DEFAULTS.items():
            both = kwargs.pop(f"image_{name}", None)
            default = default if both is None else both
            pair = [kwargs.pop(f"{kind}_{name}", None) for kind in ("pixel", "semantic")]
            pair = [default if value is None else value for value in pair]
            settings[name] = tuple(0 if name == "top_k" and value is None else value for value in pair)
        do_sample = kwargs.pop("image_do_sample", None)
        settings["do_sample"] = True if do_sample is None else bool(do_sample)
        return cls(generator=kwargs.pop("generator", None), **settings)

    def num_candidates(self, num_codes: int) -> int:
        """How many of the most probable codes the draw is among: what top-k leaves in either head."""
        top_k = [min(k, num_codes) or num_codes for k in self.top_k]
        return max(top_k) if self._is_ranked(num_codes) else num_codes

    def _is_ranked(self, num_codes: int) -> bool:
        return min(min(k, num_codes) or num_codes for k in self.top_k) < num_codes or min(self.top_p) < 1

    def new_noise(self, num_depths: int, rows: int, num_codes: int, device: torch.device) -> "CodeNoise | None":
        """The noise of all depths of one position; `None` where none is needed."""
        if not self.do_sample:
            return None
        return CodeNoise((num_depths, 2, rows, self.num_candidates(num_codes)), device, self.generator)

    def __call__(self, logits: torch.Tensor, noise: torch.Tensor | None = None) -> torch.LongTensor:
        """
        `(2, B, K)` -> `(2, B)`, without a wait for the device.

        `noise` `(2, B, candidates)` is that of one depth, from [`CodeNoise`]; by default it is drawn here.
        """
        if not self.do_sample:
            return logits.argmax(-1)
        num_codes = logits.shape[-1]
        if noise is None:
            noise = self.new_noise(1, logits.shape[1], num_codes, logits.device).draw()[0]
        scores = logits.float()
        if self.temperature != (1.0, 1.0):
            scores = scores / _per_head(self.temperature, scores)
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
        chosen = (scores + noise).argmax(-1, keepdim=True)
        return (chosen if indices is None else indices.gather(-1, chosen)).squeeze(-1)


class CodeNoise:
    """
    Gumbel noise `(D, 2, B, candidates)` for one position after the other, in a tensor that stays where it is.

    With a generator of the CPU's a GPU draws what the CPU would. It comes through pinned memory, so that the host waits
    only where it is a few positions ahead; to draw it takes the host longer than the GPU itself would.
    """

    # Positions the host may be ahead of a GPU.
    SLOTS = 4

    def __init__(self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None):
        self.values, self.generator = torch.empty(shape, device=device), generator
        self._on_host = generator is not None and generator.device.type != device.type
        self._slots = deque()
        if self._on_host and device.type == "cuda":
            for _ in range(self.SLOTS):
                self._slots.append((torch.empty(shape, pin_memory=True), torch.cuda.Event()))

    def draw(self) -> torch.Tensor:
        """New noise, in the same tensor."""
        if not self._on_host:
            return self._draw_into(self.values)
        if not self._slots:
            return self.values.copy_(self._draw_into(torch.empty_like(self.values, device=self.generator.device)))
        slot, copied = self._slots.popleft()
        copied.synchronize()
        self.values.copy_(self._draw_into(slot), non_blocking=True)
        copied.record(torch.cuda.current_stream(self.values.device))
        self._slots.append((slot, copied))
        return self.values

    def _draw_into(self, values: torch.Tensor) -> torch.Tensor:
        return values.exponential_(generator=self.generator).log_().neg_()


def _per_head(pair: tuple[float, float], like: torch.Tensor) -> float | torch.Tensor:
    """A setting of both heads as what broadcasts against `(2, B, K)`; filled on the device, since a copy would wait."""
    if pair[0] == pair[1]:
        return pair[0]
    return torch.cat([like.new_full((1, 1, 1), value) for value in pair])


__all__ = ["CodeNoise", "DualTokenCodeSampler"]
