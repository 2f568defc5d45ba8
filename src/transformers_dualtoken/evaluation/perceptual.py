"""The perceptual distance LPIPS, from the package `lpips` (extra `perceptual`)."""

import warnings
from pathlib import Path

import torch
from torch import nn

from ..optional_libraries import require


NETWORKS = ("vgg", "alex")


def load_lpips(net: str = "vgg", weights: str | Path | None = None) -> nn.Module:
    """
    LPIPS between images in [-1, 1], frozen: called with two batches `(B, 3, S, S)` it returns `(B, 1, 1, 1)`.

    Args:
        net (`str`, defaults to `"vgg"`): the network whose features are compared, `"vgg"` (code) or `"alex"`.
        weights (`str` or `Path`, *optional*): a file with that network's ImageNet weights under torchvision's names
            (`features.0.weight`, ...), as torchvision offers them for download. By default torchvision's own cache is
            used, and filled by a download if it is empty. The weights of LPIPS' linear layers come with its package.

    Raises:
        ImportError: if `lpips` or torchvision cannot be imported.
        ValueError: for another network, or weights that do not fit it.
        FileNotFoundError: if `weights` is no file.
    """
    if net not in NETWORKS:
        raise ValueError(f"LPIPS compares features of one of {', '.join(NETWORKS)}, got {net!r}.")
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"There is no file of LPIPS network weights at {str(weights)!r}.")
    # Needs torchvision, which not every installation of torch has: never imported with the package.
    lpips = require("lpips", "LPIPS (to train without it, set the weight of the perceptual term to 0)")
    with warnings.catch_warnings():
        # It calls torchvision by a name that torchvision has given up.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        module = lpips.LPIPS(net=net, pnet_rand=weights is not None, verbose=False)
    if weights is not None:
        _load_features(module.net, net, Path(weights))
    return module.requires_grad_(False).eval()


def _load_features(network: nn.Module, net: str, path: Path) -> None:
    """torchvision calls a layer `features.5`, lpips `slice2.5`."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        given = load_file(path)
    else:
        given = torch.load(path, map_location="cpu", weights_only=True)
    names = {name: f"features.{name.split('.', 1)[1]}" for name in network.state_dict()}
    missing = sorted(set(names.values()) - set(given))
    if missing:
        raise ValueError(f"{str(path)!r} is no state dict of torchvision's {net}: it lacks {', '.join(missing)}.")
    try:
        network.load_state_dict({name: given[theirs] for name, theirs in names.items()})
    except RuntimeError as error:
        raise ValueError(f"The weights at {str(path)!r} do not fit LPIPS' {net}: {error}") from error
