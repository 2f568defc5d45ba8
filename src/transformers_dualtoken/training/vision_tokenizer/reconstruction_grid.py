"""Pictures of how well the tokenizer reconstructs, during training: on disk and in the tracker."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from ...evaluation.pictures import reconstruction_grid


class ReconstructionGridCallback(TrainerCallback):
    """
    Writes `grids/step-00000100.png` into the output folder every `recipe.grid_steps` steps, and sends it to TensorBoard,
    Weights & Biases or trackio where the run reports to one of them.

    The images are the first of the evaluation set, or else of the training set, or of the first batch of a stream.
    """

    def __init__(self, trainer):
        self.trainer, self.images = trainer, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.trainer.recipe.grid_steps or not args.should_save:
            return
        model = self.trainer.model
        pixel_values = self.trainer.grid_pixel_values().to(args.device)
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


def send_to_trackers(callbacks: list[TrainerCallback], name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to the trackers among the Trainer's callbacks that can show one."""
    for callback in callbacks:
        kind = type(callback).__name__
        if kind == "TensorBoardCallback" and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        elif kind == "WandbCallback" and getattr(callback, "_wandb", None) is not None:
            callback._wandb.log({name: callback._wandb.Image(picture), "train/global_step": step})
        elif kind == "TrackioCallback" and getattr(callback, "_trackio", None) is not None:
            callback._trackio.log({name: callback._trackio.Image(picture)})
