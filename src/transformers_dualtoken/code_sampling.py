"""Drawing codes from the depth heads' logits."""

from dataclasses import dataclass

import torch


_SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 900, "top_p": 0.96}


@dataclass
class DualTokenCodeSampler:
    """
    Draws codes from logits: temperature, then top-k, then top-p, then one draw. Pairs are (pixel, semantic).

    The draw adds Gumbel noise and takes the maximum: no host synchronisation, and no sort of the whole codebook
    unless top-k is off.

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
                f"Image temperatures must be positive, got {self.temperature}; `image_do_sample=False` is greedy."
            )
        if min(self.top_k) < 0 or any(k != int(k) for k in self.top_k):
            raise ValueError(f"Image top-k must be a whole number, 0 to keep all codes, got {self.top_k}.")
        if not all(0 < p <= 1 for p in self.top_p):
            raise ValueError(f"Image top-p must lie in (0, 1], got {self.top_p}.")
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

    def __call__(self, logits: torch.Tensor) -> torch.LongTensor:
        """`(2, B, K)` -> `(2, B)`."""
        if not self.do_sample:
            return logits.argmax(-1)
        logits = logits.float()
        scores = logits / logits.new_tensor(self.temperature).view(2, 1, 1)
        num_codes = logits.shape[-1]
        top_k = [min(k, num_codes) or num_codes for k in self.top_k]
        indices = None
        if min(top_k) < num_codes or min(self.top_p) < 1:
            scores, indices = scores.topk(max(top_k), dim=-1)
            ranks = torch.arange(scores.shape[-1], device=scores.device)
            removed = ranks >= torch.tensor(top_k, device=scores.device).view(2, 1, 1)
            scores = scores.masked_fill(removed, float("-inf"))
            probabilities = scores.softmax(-1)
            # A code stays while those before it hold less than top-p; the first always stays.
            before = probabilities.cumsum(-1) - probabilities
            scores = scores.masked_fill(before >= logits.new_tensor(self.top_p).view(2, 1, 1), float("-inf"))
        device = self.generator.device if self.generator is not None else scores.device
        noise = torch.empty(scores.shape, device=device).exponential_(generator=self.generator).to(scores.device)
        chosen = (scores - noise.log()).argmax(-1)
        return chosen if indices is None else indices.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


__all__ = ["DualTokenCodeSampler"]
