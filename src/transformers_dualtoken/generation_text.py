"""The text of a generation: image tokens are barred before anything chooses among the rest; and who asks for text."""

import sys
from collections.abc import Iterator, Sequence

import torch
from transformers.generation import LogitsProcessor


class ImageTokenBar(LogitsProcessor):
    """
    Bars `token_ids`, which may change between two steps: before all other processors, so that top-k and top-p keep
    others, and after the caller's, which may have raised them again.
    """

    supports_continuous_batching = True

    def __init__(self, token_ids: list[int]):
        self.token_ids = token_ids
        self._mask, self._key = None, None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(B, vocab_size)` -> the same."""
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

    No host sync on a GPU: a row that holds nothing, where a draw would be a device assert, is made uniform, and
    [`raise_if_empty`] says so at the end. Rows whose last token is one of `ended_ids` (list of `torch.LongTensor`) choose
    nothing. Of the `num_beams` rows of a prompt some may die.
    """

    def __init__(self, ended_ids: Sequence[torch.LongTensor] = (), num_beams: int = 1):
        self.ended_ids, self.num_beams = ended_ids, num_beams
        self._is_empty: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor | None, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(B, vocab_size)` of the next tokens of ids `(B, L)` -> the same."""
        # A token that was forced by infinity is certain.
        scores = scores.clamp(max=torch.finfo(scores.dtype).max)
        largest = scores.amax(-1)
        is_empty = ~largest.isfinite()
        if self.num_beams > 1:
            counted = largest.isnan().any() | is_empty.view(-1, self.num_beams).all(-1).any()
        else:
            scores = scores.masked_fill(is_empty.unsqueeze(-1), 0.0)
            if self.ended_ids and input_ids.shape[1]:
                is_empty &= ~torch.isin(input_ids[:, -1], torch.cat(list(self.ended_ids)).to(input_ids.device))
            counted = is_empty.any()
        self._is_empty = counted if self._is_empty is None else self._is_empty | counted
        if scores.device.type == "cpu":
            self.raise_if_empty()
        return scores

    def raise_if_empty(self) -> None:
        """Raise a `ValueError` if a row's scores held NaN, or every token was barred; waits for the device once."""
        if self._is_empty is not None and bool(self._is_empty):
            raise ValueError(
                "No token was left to choose: the scores hold NaN (weights that are not finite, or a dtype that "
                "overflows), or every token is barred by `suppress_tokens`, `bad_words_ids`, `sequence_bias`, "
                "`min_new_tokens`, `prefix_allowed_tokens_fn` or a logits processor, together with the image tokens "
                "that text cannot hold."
            )


class TextSampler:
    """
    Chooses the tokens of interleaved generation, by processors with a `bar` among them, which is set at every step.

    `generator` (`torch.Generator` or a list with one for every row, *optional*) is the source of randomness.
    """

    def __init__(self, processors, bar: ImageTokenBar, generation_config, generator, vocab_size: int):
        self.processors, self.bar, self.generator, self.check = processors, bar, generator, ScoreCheck()
        self.do_sample, self.eos_ids = generation_config.do_sample, set(as_ids(generation_config.eos_token_id))
        pad = generation_config.pad_token_id
        self.pad_id = int(next(iter(as_ids(generation_config.eos_token_id)), 0) if pad is None else pad)
        if not 0 <= self.pad_id < vocab_size:
            raise ValueError(
                f"Rows that have ended are filled with `pad_token_id`, or else `eos_token_id`, which must be of the "
                f"vocabulary, got {self.pad_id}."
            )

    def choose(
        self, input_ids: torch.LongTensor, logits: torch.Tensor, rows: list[int], barred: list[int]
    ) -> list[int]:
        """The next tokens of some rows, from all rows' ids `(B, L)` and logits `(B, vocab_size)`."""
        self.bar.token_ids = barred
        scores = self.check(None, self.processors(input_ids, logits)[rows])
        if self.do_sample:
            several = isinstance(self.generator, (list, tuple))
            sources = [self.generator[row] for row in rows] if several else [self.generator]
            device = scores.device if sources[0] is None else sources[0].device
            parts = scores.softmax(-1).to(device).tensor_split(len(sources))
            chosen = torch.cat([torch.multinomial(part, 1, generator=source) for part, source in zip(parts, sources)])
        else:
            chosen = scores.argmax(-1)
        self.check.raise_if_empty()
        return chosen.flatten().tolist()


def as_ids(value) -> list[int]:
    """Ids of a generation config, which may be one id, several, a tensor of them, or `None`."""
    return [] if value is None else torch.as_tensor(value).flatten().tolist()


def _callers(package: str) -> Iterator[tuple[str, object]]:
    """
    The callers in a package of transformers, nearest first: the module's name, and the `self` of a method.

    Neither a pipeline nor the server passes anything to tell it by.
    """
    frame = sys._getframe(1)
    while frame is not None:
        parent, _, module = frame.f_globals.get("__name__", "").rpartition(".")
        if parent == package and module != "base":
            yield module, frame.f_locals.get("self")
        frame = frame.f_back


def is_served() -> bool:
    """Whether `transformers serve` calls, which returns text alone."""
    return any(True for _ in _callers("transformers.cli.serving"))


def wants_plain_codes(model, mode: str) -> bool:
    """
    Whether image mode is to return a tensor of pixel codes `(B, h, w, D)`, as the any-to-any pipeline needs it; a
    `ValueError` if a pipeline calls that cannot take back what `mode` returns.
    """
    task = None
    for module, pipeline in _callers("transformers.pipelines"):
        theirs = getattr(pipeline, "model", None)
        # Its model may be wrapped; pipelines further out take back their own.
        if isinstance(theirs, torch.nn.Module) and any(part is model for part in theirs.modules()):
            task = module.replace("_", "-")
            break
    if task is None or (task, mode) == ("any-to-any", "image"):
        return task is not None
    returned = "text or an image" if task == "any-to-any" else "text"
    instead = "" if mode != "image" else "`pipeline('any-to-any', ...)` with `generation_mode='image'`, or "
    raise ValueError(
        f"`pipeline('{task}')` returns {returned}, not what `generation_mode={mode!r}` makes: take {instead}"
        f"`model.generate(..., generation_mode={mode!r})` and `model.decode_images`."
    )
