"""Reconstructions beside their originals."""

import math

import torch
from PIL import Image

from ..image_processing_pil_dualtoken import post_process_images


def reconstruction_grid(
    images: torch.Tensor, reconstructions: torch.Tensor, images_per_row: int = 8, side: int = 96
) -> Image.Image:
    """
    Originals and, below each, its reconstruction: both `(B, 3, H, W)` in [-1, 1], beyond which they are clamped.

    Args:
        images_per_row (`int`, defaults to 8)
        side (`int`, defaults to 96): smaller pictures are enlarged to about this, by a whole factor, unsmoothed.
    """
    columns = min(images_per_row, len(images))
    scale = max(1, side // images.shape[-1])
    height, width = (length * scale for length in images.shape[-2:])
    gap = max(2, width // 24)
    pair_height = 2 * height + 3 * gap
    grid = Image.new("RGB", (columns * (width + gap) + gap, math.ceil(len(images) / columns) * pair_height), "white")
    for row, pictures in enumerate((images, reconstructions)):
        for index, picture in enumerate(post_process_images(pictures.clamp(-1, 1))):
            left = gap + index % columns * (width + gap)
            top = gap + index // columns * pair_height + row * (height + gap)
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
    return grid
