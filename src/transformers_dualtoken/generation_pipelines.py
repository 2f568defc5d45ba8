"""transformers' pipelines call `generate` as anybody does, but differ in what they can take back."""

import sys


def calling_pipeline() -> str | None:
    """
    The task of the pipeline that calls, by its file's name; `None` for anybody else.

    A pipeline passes nothing to tell it by, so the callers' modules are looked at.
    """
    frame = sys._getframe(1)
    while frame is not None:
        package, _, module = frame.f_globals.get("__name__", "").rpartition(".")
        if package == "transformers.pipelines" and module != "base":
            return module.replace("_", "-")
        frame = frame.f_back
    return None


def wants_plain_codes(mode: str) -> bool:
    """
    Whether image mode is to return a tensor of pixel codes `(B, h, w, D)`, as the any-to-any pipeline needs it.

    Raises:
        ValueError: if a pipeline calls that cannot take back what `mode` returns.
    """
    task = calling_pipeline()
    if task is None or (task, mode) == ("any-to-any", "image"):
        return task is not None
    returned = "text or an image" if task == "any-to-any" else "text"
    instead = "" if mode != "image" else "`pipeline('any-to-any', ...)` with `generation_mode='image'`, or "
    raise ValueError(
        f"`pipeline('{task}')` returns {returned}, not what `generation_mode={mode!r}` makes: take {instead}"
        f"`model.generate(..., generation_mode={mode!r})` and `model.decode_images`."
    )


__all__ = ["calling_pipeline", "wants_plain_codes"]
