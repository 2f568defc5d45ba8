"""PSNR, SSIM, LPIPS and rFID of reconstructions, on tensors; lpips, torchmetrics and torch-fidelity do the last two.

Images come in [-1, 1] and are clamped; no file format lies between the decoder and a metric.
"""

import hashlib
import os
import pickle
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import is_offline_mode
from torch import nn

from ..optional_libraries import needed_libraries
from .optional_libraries import MetricUnavailableError, require


RECONSTRUCTION_METRICS = ("psnr", "ssim", "lpips", "rfid")
# What a file of another kind ends in: it cannot be unpickled, or holds no tensors, or others.
_NO_WEIGHTS = (pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError, ValueError)
# Gaussian window of sigma 1.5: 11 x 11.
_SSIM_BORDER = 5


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as float32 in [0, 1]; a decoder's overshoot is clamped."""
    return images.float().clamp(-1, 1).add(1).div(2)


def psnr_per_image(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """
    PSNR in dB, `(B,)`, of images `(B, 3, H, W)` in [0, 1], over all pixels and channels of an image.

    Infinite where an image is reproduced exactly. Equals scikit-image's `peak_signal_noise_ratio(data_range=1)`.
    """
    return -10 * (reconstruction - images).square().flatten(1).mean(1).log10()


def ssim_per_image(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """
    SSIM, `(B,)`, of images `(B, 3, H, W)` in [0, 1]: Gaussian window of sigma 1.5 (11 x 11), mean over channels and
    over the positions whose window lies within the image.

    Equals scikit-image's `structural_similarity(data_range=1, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False)`.

    Raises:
        ValueError: if a side is shorter than the window.
    """
    if min(images.shape[-2:]) <= 2 * _SSIM_BORDER:
        raise ValueError(
            f"SSIM needs images of at least {2 * _SSIM_BORDER + 1} pixels a side, got "
            f"{images.shape[-2]} x {images.shape[-1]}."
        )
    # Float64: in a flat region the variance is a difference of nearly equal numbers.
    made, given = reconstruction.double(), images.double()
    mean_made, mean_given, square_made, square_given, product = _window_means(
        torch.stack([made, given, made * made, given * given, made * given])
    )
    variances = square_made - mean_made.square() + square_given - mean_given.square()
    covariance = product - mean_made * mean_given
    luminance = (2 * mean_made * mean_given + 0.01**2) / (mean_made.square() + mean_given.square() + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances + 0.03**2)
    return (luminance * structure).flatten(1).mean(1)


def _window_means(images: torch.Tensor) -> torch.Tensor:
    """Means over the Gaussian windows that lie within the last two axes, each 10 shorter then."""
    offsets = torch.arange(-_SSIM_BORDER, _SSIM_BORDER + 1, dtype=images.dtype, device=images.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()
    for axis in (-2, -1):
        images = images.unfold(axis, len(window), 1) @ window
    return images


def fid_metric(feature: nn.Module | None = None, weights: str | os.PathLike | None = None) -> nn.Module:
    """
    torchmetrics' `FrechetInceptionDistance` that agrees with torch-fidelity.

    Args:
        feature (`nn.Module`, *optional*): another feature network, images `(B, 3, H, W)` in [0, 1] -> `(B, F)`. By
            default the Inception network of torch-fidelity, with its resizing (torchmetrics' default is another).
        weights (`str`, *optional*): file with Inception's weights in torch-fidelity's format. By default torch hub's
            cache, where torch-fidelity puts them at the first use.

    Returns:
        The metric; with Inception its `weights_sha256` says which weights these are. Of equal sets its value is 0 up
        to rounding, and may be slightly negative, as torch-fidelity's: it is the difference of nearly equal sums. It
        is not cut off at 0, so that it can be seen how far it can be trusted.

    Raises:
        FileNotFoundError: if `weights` does not exist.
        ValueError: if `weights` are not those of this network.
        MetricUnavailableError: if a library is missing, or the weights can be had neither from the cache nor from the
            network. Random weights are never used.
    """
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(
            f"The Inception weights (`inception_weights`) must be a file, and there is none at {str(weights)!r}."
        )
    fid = require("torchmetrics.image.fid", "rFID")
    if feature is not None:
        metric = fid.FrechetInceptionDistance(feature=feature, normalize=True)
    else:
        metric = _inception_fid(fid, None if weights is None else Path(weights))
    # Otherwise known only after an update, and a process may get no image.
    metric.orig_dtype = torch.float32
    return metric


def _inception_fid(fid, path: Path | None) -> nn.Module:
    url = require("torch_fidelity.feature_extractor_inceptionv3", "rFID").URL_INCEPTION_V3
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        if not path.is_file():
            _download_inception(url, path)
    try:
        # torch-fidelity unpickles whatever the file holds, so look first, in PyTorch's safe mode.
        torch.load(path, map_location="cpu", weights_only=True)
        metric = fid.FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(path), antialias=False)
    except _NO_WEIGHTS as error:
        raise ValueError(
            f"{path} does not hold the weights of torch-fidelity's Inception network ({url}): {str(error)[:500]}"
        ) from error
    metric.weights_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return metric


def _download_inception(url: str, path: Path) -> None:
    reason = "HF_HUB_OFFLINE is set"
    if not is_offline_mode():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
            return
        except OSError as error:
            reason = f"the download failed: {error}"
    raise MetricUnavailableError(
        f"rFID needs the Inception weights, and there are none at {path} ({reason}). Download {url} and give its path "
        "as `inception_weights`."
    )


def lpips_metric(net: str = "vgg", weights: str | os.PathLike | None = None) -> nn.Module:
    """
    The LPIPS network of the tokenizer's training, see [`~transformers_dualtoken.evaluation.perceptual.load_lpips`].

    Raises:
        FileNotFoundError: if `weights` does not exist.
        MetricUnavailableError: if a library is missing, or the weights can be had neither from torchvision's cache
            nor from the network. Random weights are never used.
    """
    try:
        with needed_libraries("LPIPS"):
            from .perceptual import load_lpips

            return load_lpips(net, weights)
    except FileNotFoundError:
        raise
    except ImportError as error:
        raise MetricUnavailableError(str(error)) from error
    except OSError as error:
        raise MetricUnavailableError(
            f"LPIPS needs torchvision's ImageNet weights of {net!r}, which are not in its cache, and the download "
            f"failed: {error}. Give the path of a file as `lpips_weights`."
        ) from error


class ReconstructionMetrics:
    """
    Running PSNR, SSIM, LPIPS and rFID of one pass over any number of images. The sums are kept on the images' device
    in float64 and add up over the processes of `torch.distributed`; nothing grows with the number of images.

    Args:
        names (`tuple[str]`): of `RECONSTRUCTION_METRICS`.
        lpips (`nn.Module`, *optional*): with `"lpips"`: two batches in [-1, 1] -> `(B, ...)`, as the package's.
        fid (`nn.Module`, *optional*): with `"rfid"`: from [`fid_metric`].

    Raises:
        ValueError: for an unknown name, or one whose module is not given.
    """

    def __init__(self, names=("psnr", "ssim"), lpips: nn.Module | None = None, fid: nn.Module | None = None):
        for name in names:
            if name not in RECONSTRUCTION_METRICS:
                raise ValueError(f"Unknown metric {name!r}; there are {', '.join(RECONSTRUCTION_METRICS)}.")
        for name, module in (("lpips", lpips), ("rfid", fid)):
            if name in names and module is None:
                raise ValueError(f"The metric {name!r} needs its network, and none was given.")
        self.names = tuple(names)
        self.lpips = lpips.eval() if "lpips" in names else None
        self.fid = fid if "rfid" in names else None
        # Of each metric over the images so far: sum and number of values.
        self.totals = {name: torch.zeros(2, dtype=torch.float64) for name in names if name != "rfid"}
        if "psnr" in names:
            self.totals["exact_images"] = torch.zeros(2, dtype=torch.float64)

    def to(self, device) -> "ReconstructionMetrics":
        self.totals = {name: total.to(device) for name, total in self.totals.items()}
        for network in (self.fid, self.lpips):
            if network is not None:
                network.to(device)
        return self

    @torch.no_grad()
    def update(self, reconstruction: torch.Tensor, images: torch.Tensor) -> None:
        """
        Add images and their reconstructions, `(B, 3, H, W)` in [-1, 1].

        Raises:
            ValueError: if the shapes differ, or a reconstruction, an image or a value of LPIPS is NaN.
        """
        if reconstruction.shape != images.shape:
            raise ValueError(
                f"Images {tuple(images.shape)} and reconstructions {tuple(reconstruction.shape)} must have one shape."
            )
        if reconstruction.isnan().any():
            raise ValueError("A reconstruction holds NaN: the model's weights or its dtype are at fault.")
        made, given = to_unit_range(reconstruction), to_unit_range(images)
        if "psnr" in self.names:
            psnr = psnr_per_image(made, given)
            exact = psnr.isinf()
            self._add("exact_images", exact)
            self._add("psnr", psnr[~exact])
        if "ssim" in self.names:
            self._add("ssim", ssim_per_image(made, given))
        if "lpips" in self.names:
            self._add("lpips", self.lpips(made * 2 - 1, given * 2 - 1).double().flatten(1).mean(1))
        if self.fid is not None:
            for batch, real in ((given, True), (made, False)):
                # torch-fidelity's Inception takes 8-bit images. torchmetrics would cut instead of rounding, which
                # shifts the reconstructions by half a level but not the originals.
                self.fid.update(batch if self.fid.used_custom_model else _to_uint8(batch), real=real)

    def _add(self, name: str, values: torch.Tensor) -> None:
        """Values of images `(n,)` of one metric."""
        if values.isnan().any():
            raise ValueError(f"The metric {name!r} is NaN for some image.")
        self.totals[name] += torch.stack([values.double().sum(), values.new_tensor(len(values)).double()]).to(
            self.totals[name].device
        )

    def compute(self) -> dict[str, float]:
        """
        The metrics by name, over all processes, each of which must call it; with `psnr` also `exact_images`, the
        number of images that were reproduced exactly and are left out of the mean PSNR.

        Raises:
            ValueError: if rFID is asked of fewer than two images.
        """
        totals = self.totals
        if totals and dist.is_available() and dist.is_initialized():
            summed = torch.stack(list(totals.values()))
            dist.all_reduce(summed)
            totals = dict(zip(totals, summed))
        values = {name: float(total / number) for name, (total, number) in totals.items()}
        if "psnr" in self.names:
            values["exact_images"] = int(totals["exact_images"][0])
        if self.fid is not None:
            try:
                values["rfid"] = float(self.fid.compute())
            except RuntimeError as error:
                raise ValueError(f"rFID cannot be computed: {error}") from error
        return values


def _to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] at the nearest of 256 levels, as in a PNG."""
    return images.mul(255).round().to(torch.uint8)


__all__ = [
    "RECONSTRUCTION_METRICS",
    "ReconstructionMetrics",
    "fid_metric",
    "lpips_metric",
    "psnr_per_image",
    "ssim_per_image",
    "to_unit_range",
]
