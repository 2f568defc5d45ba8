"""Pictures of an evaluation: reconstructions beside their originals, and how the codebooks are used."""

import math

import numpy as np
import torch
from PIL import Image

from ..image_processing_pil_dualtoken import post_process_images
from .codebook_statistics import CodebookUsage
from .optional_libraries import require


def reconstruction_grid(
    images: torch.Tensor, reconstructions: torch.Tensor, images_per_row: int = 8, side: int = 96
) -> Image.Image:
    """
    Originals and, below each, its reconstruction; small ones are enlarged.

    Args:
        images, reconstructions (`torch.Tensor` of shape `(B, 3, H, W)`): in [-1, 1]; what lies beyond is clamped.
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
        used, unused = counts[counts > 0], int((counts == 0).sum())
        edges = np.geomspace(1, used.max() + 1, 31)
        upper.hist(used, bins=np.unique(np.floor(edges)) if used.max() > 1 else [1, 2], color="tab:blue")
        upper.axvline(counts.sum() / counts.size, color="black", linestyle=":", label="all codes alike")
        upper.set_xscale("log")
        upper.set_xlabel("occurrences of a code")
        upper.set_ylabel("codes")
        upper.set_title(
            f"{kind} codebook: {100 * overall['usage']:.1f} % of the codes used, {unused} never\n"
            f"perplexity {overall['perplexity']:.0f} of {usage.codebook_size}"
        )
        upper.legend()
        depths = np.arange(1, usage.num_depths + 1)
        lower.bar(depths - 0.2, per_depth["usage"], 0.4, label="share of codes used")
        shares = np.array(per_depth["perplexity"]) / usage.codebook_size
        lower.bar(depths + 0.2, shares, 0.4, label="perplexity / number of codes")
        lower.set_xticks(depths)
        lower.set_xlabel("depth")
        lower.set_ylim(0, 1)
        lower.legend(loc="upper right")
    return figure


__all__ = ["reconstruction_grid", "usage_figure"]
