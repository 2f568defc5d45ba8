"""The pretrained networks that compare images: of LPIPS (extra `perceptual`) and of rFID (extra `eval`)."""

import hashlib
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..checkpoints import damage_errors
from ..optional_libraries import require


NETWORKS = ("vgg", "alex")


class MetricUnavailableError(RuntimeError):
    """The pretrained weights of a metric are neither in the usual cache nor can they be downloaded."""


@contextmanager
def _download_errors(what: str, argument: str):
    try:
        yield
    except OSError as error:
        raise MetricUnavailableError(
            f"{what} are not in the usual cache, and the download failed: {error}. Give the path of a file as "
            f"`{argument}`."
        ) from error


def _check_file(weights: str | os.PathLike | None, what: str) -> None:
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"There is no file of {what} at {str(weights)!r}.")


def load_lpips(net: str = "vgg", weights: str | os.PathLike | None = None) -> nn.Module:
    """
    LPIPS between images in [-1, 1], frozen: called with two batches `(B, 3, H, W)` it returns `(B, 1, 1, 1)`.

    Args:
        net (`str`, defaults to `"vgg"`): the network whose features are compared, `"vgg"` (code) or `"alex"`.
        weights (`str` or `Path`, *optional*): a file with that network's ImageNet weights under torchvision's names
            (`features.0.weight`, ...). By default torchvision's cache, filled by a download if it is empty. The
            weights of LPIPS' linear layers come with its package.

    Raises:
        MissingLibraryError, MetricUnavailableError: if a library is missing, or the download fails.
        FileNotFoundError, ValueError: if `weights` is no file, or not of this network.
    """
    if net not in NETWORKS:
        raise ValueError(f"LPIPS compares features of one of {', '.join(NETWORKS)}, got {net!r}.")
    _check_file(weights, "LPIPS network weights")
    lpips = require("lpips", "LPIPS (to train without it, set the weight of the perceptual term to 0)")
    with warnings.catch_warnings(), _download_errors(f"torchvision's {net} weights for LPIPS", "lpips_weights"):
        # It calls torchvision by a name that torchvision has given up.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        module = lpips.LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
    if weights is not None:
        with damage_errors(f"The file {str(weights)!r} of torchvision's {net} weights"):
            is_safe = Path(weights).suffix == ".safetensors"
            given = load_file(weights) if is_safe else torch.load(weights, map_location="cpu", weights_only=True)
            # torchvision calls a layer `features.5`, lpips `slice2.5`.
            names = {name: f"features.{name.split('.', 1)[1]}" for name in module.net.state_dict()}
            module.net.load_state_dict({name: given[theirs] for name, theirs in names.items()})
    return module.requires_grad_(False).eval()


def fid_metric(feature: nn.Module | None = None, weights: str | os.PathLike | None = None) -> nn.Module:
    """
    torchmetrics' `FrechetInceptionDistance` that agrees with torch-fidelity. Of equal sets its value is 0 up to
    rounding, and may be slightly negative: it is the difference of nearly equal sums, and not cut off at 0.

    Args:
        feature (`nn.Module`, *optional*): another feature network, images `(B, 3, H, W)` in [0, 1] -> `(B, F)`. By
            default torch-fidelity's Inception, with its resizing (torchmetrics' default is another); the metric's
            `weights_sha256` then says with which weights.
        weights (`str` or `Path`, *optional*): file with these, in torch-fidelity's format. By default torch hub's
            cache, filled by a download if it is empty.

    Raises:
        MissingLibraryError, MetricUnavailableError: if a library is missing, or the download fails.
        FileNotFoundError, ValueError: if `weights` is no file, or not of this network.
    """
    _check_file(weights, "Inception weights (`inception_weights`)")
    metric_class = require("torchmetrics.image.fid", "rFID").FrechetInceptionDistance
    if feature is not None:
        metric = metric_class(feature=feature, normalize=True)
    else:
        url = require("torch_fidelity.feature_extractor_inceptionv3", "rFID").URL_INCEPTION_V3
        path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]))
        if not path.is_file():
            with _download_errors(f"The Inception weights for rFID ({url})", "inception_weights"):
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), progress=False)
        with damage_errors(f"The file {str(path)!r} of torch-fidelity's Inception weights ({url})"):
            # torch-fidelity unpickles whatever the file holds, so look first, in PyTorch's safe mode.
            torch.load(path, map_location="cpu", weights_only=True)
            metric = metric_class(feature=2048, feature_extractor_weights_path=str(path), antialias=False)
        metric.weights_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    # Otherwise known only after an update, and a process may get no image.
    metric.orig_dtype = torch.float32
    return metric
