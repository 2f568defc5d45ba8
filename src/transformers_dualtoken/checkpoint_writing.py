"""Where a command writes a checkpoint: a new folder, whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(output: str | os.PathLike, *inputs: str | os.PathLike) -> Iterator[Path]:
    """
    A folder to write to, which becomes `output` once everything is written; after an error or an interruption nothing
    of it is left. Enter it before the work, so that what is wrong with `output` is said first.

    Args:
        output (`str` or `os.PathLike`): a folder that does not exist, whose parents are made, or an empty one.
        inputs (`str` or `os.PathLike`): folders or Hub ids that are read.

    Yields:
        `Path`: an empty folder on the same disk.

    Raises:
        ValueError: if `output` is a file, holds anything, or lies in one of `inputs`.
        OSError: if it cannot be made, or the disk is full.
    """
    given, output = os.fspath(output) or os.curdir, Path(os.path.realpath(output))
    if output.exists() and not output.is_dir():
        raise ValueError(f"{given} is a file; a checkpoint is written to a new or empty folder only.")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{given} is not empty; a checkpoint is written to a new or empty folder only.")
    for folder in inputs:
        if os.path.isdir(folder) and output.is_relative_to(os.path.realpath(folder)):
            raise ValueError(
                f"{given} lies in {folder}, which is read; a checkpoint is written to a folder of its own."
            )
    # An empty folder stays where it is: it may be the working directory, or where a disk is mounted.
    place = output if output.is_dir() else output.parent
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        try:
            place.mkdir(parents=True, exist_ok=True)
            holder = TemporaryDirectory(prefix=f".{output.name[:100]}-", dir=place)
        except OSError as error:
            raise OSError(f"{given} cannot be written: {error}.") from error
        with holder as name:
            # Within, for the usual permissions: the temporary folder itself has its owner's only.
            written = Path(name, "checkpoint")
            written.mkdir()
            try:
                yield written
            except SafetensorError as error:
                raise OSError(f"{given} cannot be written: {error}.") from error
            except OSError as error:
                if error.errno in _FULL:
                    raise OSError(f"{given} cannot be written: {error}.") from error
                raise
            if place == output:
                for path in written.iterdir():
                    path.rename(output / path.name)
            else:
                written.rename(output)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise


__all__ = ["new_folder"]
