"""A moving average of the trained weights, beside the weights."""

import contextlib
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback


FILE_NAME = "weight_average.pt"


class WeightAverage(TrainerCallback):
    """
    Moves the average after every optimizer step, and lends it to the model.

    The average begins with the weights after the first step. It is torch's `AveragedModel`, over the trained parameters
    only; codebooks are moving averages already and stay what they are.

    Args:
        model (`nn.Module`): on the training device, and frozen already as the stage wants it.
        decay (`float`): share of the old average that a step keeps, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.parameters = nn.ParameterList(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.average = AveragedModel(self.parameters, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_step_end(self, args, state, control, **kwargs):
        self.average.update_parameters(self.parameters)

    @contextlib.contextmanager
    def in_model(self):
        """Within this context the model has the averaged weights, once there are any."""
        if not self.average.n_averaged:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self._copy_to_model(self.average.module)
        try:
            yield
        finally:
            self._copy_to_model(kept)

    @torch.no_grad()
    def _copy_to_model(self, values) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)

    def save(self, folder: str | Path) -> None:
        torch.save(self.average.state_dict(), Path(folder, FILE_NAME))

    def load(self, folder: str | Path) -> None:
        """
        Raises:
            FileNotFoundError: if the folder holds no average.
        """
        path = Path(folder, FILE_NAME)
        if not path.is_file():
            raise FileNotFoundError(
                f"The checkpoint {str(folder)!r} lacks {FILE_NAME}: it was saved without `weight_average_decay`, or "
                "with `save_only_model`."
            )
        self.average.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
