"""Pictures and texts for TensorBoard, Weights & Biases and trackio."""

import numpy as np
from PIL import Image
from transformers import TrainerCallback


def send_to_trackers(callbacks: list[TrainerCallback], name: str, shown: Image.Image | str, step: int) -> None:
    """Send a picture, or a text in Markdown, to the trackers among the Trainer's callbacks."""
    is_text = isinstance(shown, str)
    for callback in callbacks:
        kind = type(callback).__name__
        if kind == "TensorBoardCallback" and callback.tb_writer is not None:
            if is_text:
                callback.tb_writer.add_text(name, shown, step)
            else:
                callback.tb_writer.add_image(name, np.asarray(shown), step, dataformats="HWC")
        elif kind == "WandbCallback" and getattr(callback, "_wandb", None) is not None:
            wandb = callback._wandb
            value = wandb.Table(columns=["text"], data=[[shown]]) if is_text else wandb.Image(shown)
            wandb.log({name: value, "train/global_step": step})
        elif kind == "TrackioCallback" and getattr(callback, "_trackio", None) is not None:
            trackio = callback._trackio
            trackio.log({name: trackio.Markdown(shown) if is_text else trackio.Image(shown)})
