"""Libraries that only a part of this package needs: the extra that brings each, and a sentence where it is missing."""

import importlib
from contextlib import contextmanager
from types import ModuleType


# By the name of the import. pyproject.toml says what an extra installs.
EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "peft"), "train"),
    **dict.fromkeys(("lpips", "torchvision"), "perceptual"),
    **dict.fromkeys(("evaluate", "open_clip", "torch_fidelity", "torchmetrics"), "eval"),
    **dict.fromkeys(("matplotlib", "scipy", "skimage", "sklearn"), "demo"),
    "triton": "kernels",
    **dict.fromkeys(("bitsandbytes", "torchao"), "quantization"),
    "deepspeed": "deepspeed",
    "trl": "trl",
}


class MissingLibraryError(ImportError):
    """A library that only a part of this package needs cannot be imported. The message names the extra to install."""

    def __init__(self, purpose: str, library: str, reason: object = None):
        self.reason = reason
        extra = EXTRAS[library]
        text = (
            f"{purpose} needs {library}: pip install 'transformers-dualtoken[{extra}]', or in a clone of the repository "
            f"pip install -c constraints.txt '.[{extra}]'"
        )
        if extra in ("eval", "perceptual"):
            text += ", with a torchvision that belongs to the installed torch"
        super().__init__(f"{text}." if reason is None else f"{text} ({reason}).", name=library)


def _library(error: BaseException) -> str:
    return (getattr(error, "name", None) or "").partition(".")[0]


@contextmanager
def needed_libraries(purpose: str):
    """
    Around imports: a `MissingLibraryError` for a library of `EXTRAS`, which `purpose`, the subject of a sentence, needs.
    """
    try:
        yield
    except ImportError as error:
        # transformers says of its own lazy imports only that they failed, and the library in the cause.
        cause = error
        while cause is not None and _library(cause) not in EXTRAS:
            cause = cause.__cause__
        if cause is None:
            raise
        raise MissingLibraryError(purpose, _library(cause), getattr(cause, "reason", cause)) from error


def require(module: str, purpose: str) -> ModuleType:
    """
    A module of a library of `EXTRAS`, by its dotted name, where it is used; a `MissingLibraryError` if it cannot be
    imported. `purpose` is what needs it, as the subject of a sentence.
    """
    with needed_libraries(purpose):
        try:
            return importlib.import_module(module)
        except RuntimeError as error:  # a torchvision that was not built for the installed torch
            raise MissingLibraryError(purpose, module.partition(".")[0], error) from error
