"""PSNR, SSIM, LPIPS and rFID of reconstructions, on tensors: no file format lies between the decoder and a metric."""

import math

import torch
from torch import nn

from .processes import summed


RECONSTRUCTION_METRICS = ("psnr", "ssim", "lpips", "rfid")
# Gaussian window of sigma 1.5: 11 x 11.
_SSIM_BORDER = 5


def psnr_per_image(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """
    PSNR in dB, `(B,)`, of images `(B, 3, H, W)` in [0, 1], over all pixels and channels of an image, infinite where it
    is reproduced exactly. Equals scikit-image's `peak_signal_noise_ratio(data_range=1)`.
    """
    return -10 * (reconstruction - images).square().flatten(1).mean(1).log10()


def ssim_per_image(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """
    SSIM, `(B,)`, of images `(B, 3, H, W)` in [0, 1]: Gaussian window of sigma 1.5 (11 x 11), mean over channels and
    over the positions whose window lies within the image. Equals scikit-image's `structural_similarity(data_range=1,
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.
    """
    if min(images.shape[-2:]) <= 2 * _SSIM_BORDER:
        raise ValueError(
            f"SSIM needs images of at least {2 * _SSIM_BORDER + 1} pixels a side, got "
            f"{images.shape[-2]} x {images.shape[-1]}."
        )
    # Float64: in a flat region the variance is a difference of nearly equal numbers.
    made, given = reconstruction.double(), images.double()
    means = torch.stack([made, given, made * made, given * given, made * given])
    offsets = torch.arange(-_SSIM_BORDER, _SSIM_BORDER + 1, dtype=means.dtype, device=means.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    for axis in (-2, -1):
        means = means.unfold(axis, len(window), 1) @ (window / window.sum())
    mean_made, mean_given, square_made, square_given, product = means
    squares = mean_made.square() + mean_given.square()
    covariance = product - mean_made * mean_given
    luminance = (2 * mean_made * mean_given + 0.01**2) / (squares + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (square_made + square_given - squares + 0.03**2)
    return (luminance * structure).flatten(1).mean(1)


class ReconstructionMetrics:
    """
    Running PSNR, SSIM, LPIPS and rFID of one pass over any number of images. The sums are kept on the images' device
    in float64 and add up over the processes of `torch.distributed`; nothing grows with the number of images.

    Args:
        names (`tuple[str]`): of `RECONSTRUCTION_METRICS`.
        lpips (`nn.Module`, *optional*): with `"lpips"`: two batches in [-1, 1] -> `(B, ...)`, from [`load_lpips`].
        fid (`nn.Module`, *optional*): with `"rfid"`: from [`fid_metric`].
    """

    def __init__(self, names=("psnr", "ssim"), lpips: nn.Module | None = None, fid: nn.Module | None = None):
        networks = {"lpips": lpips, "rfid": fid}
        for name in names:
            if name not in RECONSTRUCTION_METRICS:
                raise ValueError(f"Unknown metric {name!r}; there are {', '.join(RECONSTRUCTION_METRICS)}.")
            if name in networks and networks[name] is None:
                raise ValueError(f"The metric {name!r} needs its network, and none was given.")
        self.names = tuple(names)
        self.lpips = lpips.eval() if "lpips" in names else None
        self.fid = fid if "rfid" in names else None
        # Of each metric over the images so far: sum and number of values.
        summed_names = [*(name for name in names if name != "rfid"), "exact_images"]
        self.totals = {name: torch.zeros(2, dtype=torch.float64) for name in summed_names}

    def to(self, device) -> "ReconstructionMetrics":
        self.totals = {name: total.to(device) for name, total in self.totals.items()}
        for network in (self.fid, self.lpips):
            if network is not None:
                network.to(device)
        return self

    @torch.no_grad()
    def update(self, reconstruction: torch.Tensor, images: torch.Tensor) -> None:
        """Add images and their reconstructions, `(B, 3, H, W)` in [-1, 1]; what lies beyond is clamped."""
        if reconstruction.shape != images.shape:
            raise ValueError(
                f"Images {tuple(images.shape)} and reconstructions {tuple(reconstruction.shape)} must have one shape."
            )
        if reconstruction.isnan().any():
            raise ValueError("A reconstruction holds NaN: the model's weights or its dtype are at fault.")
        made, given = (tensor.float().clamp(-1, 1).add(1).div(2) for tensor in (reconstruction, images))
        if "psnr" in self.names:
            psnr = psnr_per_image(made, given)
            self._add("exact_images", psnr.isinf())
            self._add("psnr", psnr[~psnr.isinf()])
        if "ssim" in self.names:
            self._add("ssim", ssim_per_image(made, given))
        if self.lpips is not None:
            self._add("lpips", self.lpips(made * 2 - 1, given * 2 - 1).double().flatten(1).mean(1))
        if self.fid is not None:
            if not self.fid.used_custom_model:
                # torch-fidelity's Inception takes 8-bit images. torchmetrics would cut instead of rounding, which
                # shifts the reconstructions by half a level but not the originals.
                made, given = (tensor.mul(255).round().to(torch.uint8) for tensor in (made, given))
            self.fid.update(given, real=True)
            self.fid.update(made, real=False)

    def _add(self, name: str, values: torch.Tensor) -> None:
        """Values of images `(n,)` of one metric."""
        if values.isnan().any():
            raise ValueError(f"The metric {name!r} is NaN for some image.")
        total = self.totals[name]
        total += torch.stack([values.double().sum(), values.new_tensor(len(values)).double()]).to(total.device)

    def compute(self) -> dict[str, float]:
        """
        The metrics by name, over all processes, each of which must call it; with `psnr` also `exact_images`, the
        number of images that were reproduced exactly and are left out of the mean PSNR. rFID needs two images.
        """
        totals = dict(zip(self.totals, summed(torch.stack(list(self.totals.values()))).tolist()))
        exact_images, _ = totals.pop("exact_images")
        values = {name: total / number if number else math.nan for name, (total, number) in totals.items()}
        if "psnr" in self.names:
            values["exact_images"] = int(exact_images)
        if self.fid is not None:
            try:
                values["rfid"] = float(self.fid.compute())
            except RuntimeError as error:
                raise ValueError(f"rFID cannot be computed: {error}") from error
        return values
