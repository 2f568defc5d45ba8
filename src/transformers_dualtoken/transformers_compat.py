"""What differs between the versions of transformers that are supported, in one place."""

import inspect
import re
import warnings

import transformers
from transformers import Qwen2Model


# The oldest and the newest version that the tests run with; constraints.txt and pyproject.toml name the same.
OLDEST_TRANSFORMERS = "5.6"
NEWEST_TRANSFORMERS = "5.24.0"


def _series(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups()))


def check_transformers_version(installed: str = transformers.__version__) -> None:
    """Raise an `ImportError` for a version that is too old; warn of a series newer than the newest that was tested."""
    if _series(installed) < _series(OLDEST_TRANSFORMERS):
        raise ImportError(
            f"transformers_dualtoken needs transformers {OLDEST_TRANSFORMERS} or later, but {installed} is installed: "
            f"pip install 'transformers>={OLDEST_TRANSFORMERS}'."
        )
    if _series(installed) > _series(NEWEST_TRANSFORMERS):
        warnings.warn(
            f"transformers {installed} is installed, and transformers_dualtoken is tested up to {NEWEST_TRANSFORMERS}: "
            f"if something fails, try 'transformers=={NEWEST_TRANSFORMERS}'."
        )


check_transformers_version()


def is_older_than(version: str) -> bool:
    """Whether the installed transformers is of a series older than `version`."""
    return _series(transformers.__version__) < _series(version)


def require_transformers(version: str, what: str) -> None:
    """Raise a `NotImplementedError` if the installed transformers is of a series older than `version`."""
    if is_older_than(version):
        raise NotImplementedError(
            f"{what} needs transformers {version} or later, but {transformers.__version__} is installed."
        )


# Since 5.24 models take and return their keys and values as `cache`.
CACHE_NAME = "cache" if "cache" in inspect.signature(Qwen2Model.forward).parameters else "past_key_values"


def given_cache(past_key_values, cache):
    """The KV cache, by whichever of its two names it was given; a `ValueError` if by both."""
    if past_key_values is not None and cache is not None:
        raise ValueError("`past_key_values` and `cache` are two names of one argument: pass one of them.")
    return cache if past_key_values is None else past_key_values
