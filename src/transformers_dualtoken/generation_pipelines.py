"""transformers' pipelines and server call `generate` as anybody does, but differ in what they can take back."""

import sys


def _calling_module(package: str) -> str | None:
    """
    The nearest caller's module in a package of transformers, `None` without one.

    Neither a pipeline nor the server passes anything to tell it by, so the callers' modules are looked at.
    """
    frame = sys._getframe(1)
    while frame is not None:
        parent, _, module = frame.f_globals.get("__name__", "").rpartition(".")
        if parent == package and module != "base":
            return module
        frame = frame.f_back
    return None


def is_served() -> bool:
    """Whether `transformers serve` calls, which returns text alone."""
    return _calling_module("transformers.cli.serving") is not None


def wants_plain_codes(mode: str) -> bool:
    """
    Whether image mode is to return a tensor of pixel codes `(B, h, w, D)`, as the any-to-any pipeline needs it.

    Raises:
        ValueError: if a pipeline calls that cannot take back what `mode` returns.
    """
    task = (_calling_module("transformers.pipelines") or "").replace("_", "-") or None
    if task is None or (task, mode) == ("any-to-any", "image"):
        return task is not None
    returned = "text or an image" if task == "any-to-any" else "text"
    instead = "" if mode != "image" else "`pipeline('any-to-any', ...)` with `generation_mode='image'`, or "
    raise ValueError(
        f"`pipeline('{task}')` returns {returned}, not what `generation_mode={mode!r}` makes: take {instead}"
        f"`model.generate(..., generation_mode={mode!r})` and `model.decode_images`."
    )


__all__ = ["is_served", "wants_plain_codes"]
