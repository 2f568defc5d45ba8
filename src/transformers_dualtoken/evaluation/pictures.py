"""Pictures of an evaluation: reconstructions beside their originals, and how the codebooks are used."""

import math

import numpy as np
import torch
from PIL import Image

from ..image_processing_pil_dualtoken import post_process_images
from ..optional_libraries import require
from .codebook_statistics import CodebookUsage


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


def usage_figure(usages: dict[str, CodebookUsage]):
    """
    A matplotlib figure with a column per codebook: how many codes occur how often, and the share of codes used and
    the perplexity of every depth.
    """
    figure_module = require("matplotlib.figure", "The picture of codebook usage")
    figure = figure_module.Figure(figsize=(5.5 * len(usages), 6), layout="constrained")
    axes = figure.subplots(2, len(usages), squeeze=False)
    for (kind, usage), (upper, lower) in zip(usages.items(), axes.T):
        overall, per_depth = usage.compute(), usage.compute_per_depth()
        counts = (usage.counts.sum(0) if usage.shared_codebook else usage.counts.flatten()).cpu().numpy()
        used = counts[counts > 0]
        edges = np.unique(np.floor(np.geomspace(1, used.max() + 1, 31)))
        upper.hist(used, bins=edges if used.max() > 1 else [1, 2])
        upper.axvline(counts.mean(), color="black", linestyle=":", label="all codes alike")
        upper.set(xscale="log", xlabel="occurrences of a code", ylabel="codes")
        upper.set_title(
            f"{kind} codebook: {100 * overall['usage']:.1f} % of the codes used, {len(counts) - len(used)} never\n"
            f"perplexity {overall['perplexity']:.0f} of {usage.codebook_size}"
        )
        depths = np.arange(1, usage.num_depths + 1)
        shares = np.array(per_depth["perplexity"]) / usage.codebook_size
        lower.bar(depths - 0.2, per_depth["usage"], 0.4, label="share of codes used")
        lower.bar(depths + 0.2, shares, 0.4, label="perplexity / number of codes")
        lower.set(xlabel="depth", xticks=depths, ylim=(0, 1))
        for part in (upper, lower):
            part.legend(loc="upper right")
    return figure


__all__ = ["reconstruction_grid", "usage_figure"]
