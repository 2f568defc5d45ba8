"""Beside the steps of tokenizer training: a moving average of the weights, and pictures of reconstructions."""

import contextlib
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from ...evaluation.pictures import reconstruction_grid
from ..checkpoints import checkpoint_file
from ..trackers import send_to_trackers


_AVERAGE_NAME = "weight_average.pt"


class WeightAverage(TrainerCallback):
    """
    torch's `AveragedModel` of the parameters that are trained, from the first step on, which it lends to the model.

    Codebooks are moving averages already and stay what they are. A step keeps the share `decay` of the average.
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
        torch.save(self.average.state_dict(), Path(folder, _AVERAGE_NAME))

    def load(self, folder: str | Path) -> None:
        path = checkpoint_file(folder, _AVERAGE_NAME, "without `weight_average_decay`")
        self.average.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


class ReconstructionGridCallback(TrainerCallback):
    """Writes `grids/step-00000100.png` every `recipe.grid_steps` steps, and sends it to the trackers."""

    def __init__(self, trainer):
        self.trainer, self.pixel_values = trainer, None

    def choose_images(self, batch: torch.Tensor) -> None:
        """Once: the first of the evaluation or else of the training set, or of the `batch` `(B, 3, S, S)` of a stream."""
        if self.pixel_values is not None:
            return
        trainer, count = self.trainer, self.trainer.recipe.grid_images
        eval_dataset = trainer.eval_dataset
        if isinstance(eval_dataset, dict):
            eval_dataset = next(iter(eval_dataset.values()))
        dataset = next((each for each in (eval_dataset, trainer.train_dataset) if hasattr(each, "__len__")), None)
        self.pixel_values = batch[:count].clone()
        if dataset is not None:
            samples = [dataset[index] for index in range(min(count, len(dataset)))]
            self.pixel_values = trainer.data_collator(samples)["pixel_values"]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.trainer.recipe.grid_steps or not args.should_save:
            return
        model, pixel_values = self.trainer.model, self.pixel_values.to(args.device)
        was_training = model.training
        # In eval mode nothing moves: neither codebooks nor the random state.
        model.eval()
        with torch.no_grad(), self.trainer.accelerator.autocast():
            codes = model.encode(pixel_values, codes=("pixel",)).pixel_quantized
            reconstruction = model.decode(pixel_quantized=codes).reconstruction
        model.train(was_training)
        picture = reconstruction_grid(self.trainer.target_images(pixel_values), reconstruction)
        folder = Path(args.output_dir, "grids")
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"step-{state.global_step:08d}.png")
        send_to_trackers(self.trainer.callback_handler.callbacks, "reconstructions", picture, state.global_step)
