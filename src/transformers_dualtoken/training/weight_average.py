"""A moving average of the trained weights, beside the weights."""

import contextlib
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import TrainerCallback


FILE_NAME = "weight_average.pt"


class WeightAverage(TrainerCallback):
    """
    Moves the average after every optimizer step, and lends it to the model.

    The average itself is diffusers' `EMAModel`, over the trained parameters only. Codebooks are moving averages
    already and stay what they are.

    Args:
        model (`nn.Module`): frozen already as the stage wants it.
        decay (`float`): share of the old average that a step keeps, in (0, 1); less during the first steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.average = EMAModel(self.parameters, decay=decay)

    def on_train_begin(self, args, state, control, **kwargs):
        self.average.to(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.average.step(self.parameters)

    @contextlib.contextmanager
    def in_model(self):
        """Within this context the model has the averaged weights."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def save(self, folder: str | Path) -> None:
        torch.save(self.average.state_dict(), Path(folder, FILE_NAME))

    def load(self, folder: str | Path, device: torch.device) -> None:
        """
        Raises:
            FileNotFoundError: if the folder holds no average.
        """
        path = Path(folder, FILE_NAME)
        if not path.is_file():
            raise FileNotFoundError(
                f"The checkpoint {str(folder)!r} lacks {FILE_NAME}: it was saved without `weight_average_decay`."
            )
        self.average.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        self.average.to(device)
