"""Imports of what only some metrics need, with a sentence where it is missing."""

import importlib
from types import ModuleType


class MetricUnavailableError(RuntimeError):
    """A metric cannot be computed here: a library or its pretrained weights are missing. The message says which."""


def require(module: str, purpose: str, extra: str = "eval") -> ModuleType:
    """
    Import `module`, for example `"torchmetrics.image.fid"`.

    Args:
        module (`str`): dotted name.
        purpose (`str`): what needs it, for the message: `"rFID"`.
        extra (`str`, defaults to `"eval"`): the extra of this package that installs it.

    Raises:
        MetricUnavailableError: if it cannot be imported, with the reason and the extra to install.
    """
    try:
        return importlib.import_module(module)
    # A torchvision that was not built for the installed torch fails with RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise MetricUnavailableError(
            f"{purpose} needs {module.partition('.')[0]!r}, which cannot be imported ({error}). Install it with "
            f"`pip install 'transformers-dualtoken[{extra}]'`, with a torchvision that belongs to the installed torch."
        ) from error


__all__ = ["MetricUnavailableError", "require"]
