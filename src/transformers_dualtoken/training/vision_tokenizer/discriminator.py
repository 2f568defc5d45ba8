"""The patch discriminator of tokenizer training (code, stage 1)."""

import torch
import torch.nn.functional as F
from torch import nn


class DiscriminatorBlock(nn.Module):
    """GroupNorm, leaky ReLU, 3x3 convolution; the skip is resized to the output, then a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.conv1(F.leaky_relu(self.norm1(hidden_states), 0.2))
        if output.shape[-2:] != hidden_states.shape[-2:]:
            hidden_states = F.interpolate(hidden_states, output.shape[-2:], mode="bilinear", align_corners=False)
        return output + self.nin_shortcut(hidden_states)


class PatchDiscriminator(nn.Module):
    """
    Tells images from reconstructions, patch by patch: three strided steps, then one logit per patch.

    Parameters carry the authors' names. Convolution weights are drawn from N(0, 0.02).

    Args:
        channels (`int`, defaults to 64): width after the first convolution, doubled by each of three blocks; a
            multiple of 32, the number of groups of the normalisation.
        in_channels (`int`, defaults to 3): of the images.
    """

    def __init__(self, channels: int = 64, in_channels: int = 3):
        super().__init__()
        if channels < 32 or channels % 32:
            raise ValueError(f"`channels` of the discriminator must be a multiple of 32, got {channels}.")
        self.main = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            DiscriminatorBlock(channels, 2 * channels, stride=2),
            DiscriminatorBlock(2 * channels, 4 * channels, stride=2),
            DiscriminatorBlock(4 * channels, 8 * channels, stride=1),
            nn.Conv2d(8 * channels, 1, 3, padding=1),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, S, S)` in [-1, 1] to logits `(B, 1, s, s)`, s = ceil(S / 8); high means real."""
        return self.main(images)


# Slope of the "leaky_hinge" loss beyond its margin: the authors' code takes leaky_relu where a hinge has relu.
DISCRIMINATOR_LOSSES = {"leaky_hinge": 0.01, "hinge": 0.0}


def discriminator_loss(
    real_logits: torch.Tensor, fake_logits: torch.Tensor, kind: str = "leaky_hinge"
) -> torch.Tensor:
    """0.5 [f(1 - real) + f(1 + fake)], each the mean over all logits; f is a leaky ReLU of the slope of the kind."""
    slope = DISCRIMINATOR_LOSSES[kind]
    real = F.leaky_relu(1 - real_logits.float(), slope).mean()
    fake = F.leaky_relu(1 + fake_logits.float(), slope).mean()
    return 0.5 * (real + fake)
