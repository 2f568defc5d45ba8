"""transformers' pipelines and server call `generate` as anybody does, but differ in what they can take back."""

import sys
from collections.abc import Iterator

import torch


def _callers(package: str) -> Iterator[tuple[str, object]]:
    """
    The callers in a package of transformers, nearest first: the module's name, and the `self` of the method if it is one.

    Neither a pipeline nor the server passes anything to tell it by, so the callers' modules are looked at.
    """
    frame = sys._getframe(1)
    while frame is not None:
        parent, _, module = frame.f_globals.get("__name__", "").rpartition(".")
        if parent == package and module != "base":
            yield module, frame.f_locals.get("self")
        frame = frame.f_back


def _calling_task(model) -> str | None:
    """The task of the nearest pipeline whose model this is, maybe wrapped; others further out take back their own."""
    for module, pipeline in _callers("transformers.pipelines"):
        theirs = getattr(pipeline, "model", None)
        if isinstance(theirs, torch.nn.Module) and any(part is model for part in theirs.modules()):
            return module.replace("_", "-")
    return None


def is_served() -> bool:
    """Whether `transformers serve` calls, which returns text alone."""
    return any(True for _ in _callers("transformers.cli.serving"))


def wants_plain_codes(model, mode: str) -> bool:
    """
    Whether image mode is to return a tensor of pixel codes `(B, h, w, D)`, as the any-to-any pipeline needs it.

    Raises:
        ValueError: if a pipeline calls that cannot take back what `mode` returns.
    """
    task = _calling_task(model)
    if task is None or (task, mode) == ("any-to-any", "image"):
        return task is not None
    returned = "text or an image" if task == "any-to-any" else "text"
    instead = "" if mode != "image" else "`pipeline('any-to-any', ...)` with `generation_mode='image'`, or "
    raise ValueError(
        f"`pipeline('{task}')` returns {returned}, not what `generation_mode={mode!r}` makes: take {instead}"
        f"`model.generate(..., generation_mode={mode!r})` and `model.decode_images`."
    )


__all__ = ["is_served", "wants_plain_codes"]
