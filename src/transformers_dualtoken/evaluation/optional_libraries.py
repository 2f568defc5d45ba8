"""Imports of what only some metrics need."""

from types import ModuleType

from .. import optional_libraries


class MetricUnavailableError(RuntimeError):
    """A metric cannot be computed here: a library or its pretrained weights are missing. The message says which."""


def require(module: str, purpose: str) -> ModuleType:
    """
    As `transformers_dualtoken.optional_libraries.require`.

    Raises:
        MetricUnavailableError: if the module cannot be imported, with the reason and the extra to install.
    """
    try:
        return optional_libraries.require(module, purpose)
    except ImportError as error:
        raise MetricUnavailableError(str(error)) from error


__all__ = ["MetricUnavailableError", "require"]
