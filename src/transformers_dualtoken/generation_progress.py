"""What is told while images are drawn: a progress bar, and a callback for every image that is finished."""

from collections import deque
from collections.abc import Callable

import torch
from transformers.utils import logging


# How far the host may be ahead of a progress bar.
_STEPS_AHEAD = 8


class GenerationProgress:
    """
    Args:
        on_image (callable, *optional*): called with the codes `(h, w, D)` of both kinds, and the row they belong to.
        show_bar (`bool`, defaults to `False`).
    """

    def __init__(self, on_image: Callable | None = None, show_bar: bool = False):
        self.on_image, self.show_bar = on_image, show_bar

    def bar(self, total: int, unit: str):
        """A progress bar, to be used in a `with` statement; it shows nothing where none is wanted."""
        return logging.tqdm(total=total, unit=unit, disable=not self.show_bar)

    def pace(self, bar, device: torch.device) -> Callable | None:
        """What is to be called after every position; `None` where nobody looks."""
        if not self.show_bar:
            return None
        if device.type != "cuda":
            return bar.update
        events = deque()

        def update():
            # The host runs ahead of a GPU. The bar waits for what was done a few steps before, so the GPU never idles.
            events.append(torch.cuda.Event())
            events[-1].record(torch.cuda.current_stream(device))
            if len(events) > _STEPS_AHEAD:
                events.popleft().synchronize()
            bar.update()

        return update

    def tell(self, codes: tuple[torch.LongTensor, torch.LongTensor], owner: int) -> None:
        if self.on_image is not None:
            self.on_image(codes, owner)


__all__ = ["GenerationProgress"]
