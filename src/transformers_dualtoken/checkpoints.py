"""Checkpoints are read and written whole or not at all; what is missing, damaged or of another kind is said in a sentence."""

import errno
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.integrations import is_fsdp_enabled
from transformers.utils.loading_report import LoadStateDictInfo

from .optional_libraries import require
from .transformers_compat import is_older_than


# By the model type of a checkpoint of another kind.
_ADVICE = {
    "dualtoken_vision_tokenizer": "load it with DualTokenVisionTokenizer, or join it with a language model: "
    "DualTokenForCausalLM.from_pretrained_parts(vision_tokenizer, language_model)",
    "dualtoken": "load it with DualTokenForCausalLM",
    "siglip": "a new vision tokenizer starts from it: DualTokenVisionTokenizer.from_siglip_pretrained",
}
_OF_LANGUAGE_MODELS = (
    "a causal language model is joined with a vision tokenizer by DualTokenForCausalLM.from_pretrained_parts"
)


@contextmanager
def checkpoint_errors(name: str | os.PathLike):
    """
    While a checkpoint, a folder or a Hub id, is looked for and read: a `FileNotFoundError` if it is nowhere, a
    `ValueError` if a safetensors file is damaged, or its tensors have other shapes than the model.
    """
    text = os.fspath(name)
    is_there = os.path.exists(text)
    may_be_hub_id = isinstance(name, str) and re.fullmatch(r"[^./~\\][^/\\]*(/[^/\\]+)?", name)
    if not is_there and not may_be_hub_id:
        raise FileNotFoundError(f"There is no folder {text!r} (working directory: {Path.cwd()}).")
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"The checkpoint {text!r} is damaged: {error}.") from error
    except RuntimeError as error:
        if "the above report" not in str(error):
            raise
        raise ValueError(
            f"The checkpoint {text!r} has weights of other shapes than its configuration says; the report above lists "
            "them."
        ) from error
    except OSError as error:
        if is_there:
            raise
        raise FileNotFoundError(
            f"There is no folder {text!r} in the working directory {Path.cwd()}, and the Hub gave no such checkpoint: "
            f"{error}"
        ) from error


@contextmanager
def damage_errors(what: str):
    """
    Around a library's parser of files that may be anything: a `ValueError` for any error but those of the file system,
    of memory, and of a library that is missing. `what` is read, as the subject of a sentence.
    """
    try:
        yield
    except (ImportError, MemoryError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # The first sentence, of texts that may go on for pages.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".split(". ")[0][:500].rstrip(":. ")
        raise ValueError(f"{what} cannot be read ({reason}).") from error


def read_json_object(path: str | os.PathLike) -> dict:
    """The settings of a JSON file; a `ValueError` if it is not JSON in UTF-8, or anything but an object."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}.")
    return fields


def check_model_type(config_class: type, config_dict: dict) -> None:
    """Raise a `ValueError` that names what to use if the config is of another type than `config_class`."""
    model_type = config_dict.get("model_type")
    if "rqvaesiglip" in config_dict:
        raise ValueError(
            "This checkpoint is in the format of the authors' tokenizer training: load it with "
            "transformers_dualtoken.load_official_tokenizer, or convert it: dualtoken convert FOLDER OUTPUT."
        )
    if model_type is not None and model_type != config_class.model_type:
        raise ValueError(
            f"{config_class.__name__} reads checkpoints of type {config_class.model_type!r}, and this one is of type "
            f"{model_type!r}: {_ADVICE.get(model_type, _OF_LANGUAGE_MODELS)}."
        )


_DOWNLOAD_KEYS = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in str(record.msg)


class StrictLoadingMixin:
    """`from_pretrained` that leaves no weights at random and takes a part out of the checkpoint of a whole."""

    # Prefixes of this model's tensors in the checkpoint of a model that holds it, as a regular expression.
    _prefix_in_whole: str | None = None
    # Tensors of the whole that this model has no place for, as a regular expression. Not transformers'
    # `_keys_to_ignore_on_load_unexpected`: a model that holds this one would inherit that, and drop its own.
    _left_in_whole: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """
        As in transformers, but for what would leave weights at random.

        Raises:
            FileNotFoundError: if there is no such checkpoint, or a folder without one.
            ValueError: if the checkpoint is of another type, lacks weights, or holds code vectors that are not finite.
                With `output_loading_info` the caller is told what is missing instead.
        """
        name = pretrained_model_name_or_path
        if name is None:
            return super().from_pretrained(name, *model_args, output_loading_info=output_loading_info, **kwargs)
        folder = Path(name, kwargs.get("subfolder") or "")
        if folder.is_dir() and kwargs.get("config") is None:
            # Without, transformers would build the default model: of gigabytes.
            if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
                raise FileNotFoundError(f"The folder {str(folder)!r} holds no checkpoint: it has no config.json.")
        with checkpoint_errors(name):
            is_part = cls._prefix_in_whole is not None and cls._is_whole(name, kwargs)
            if is_part:
                kwargs.setdefault("key_mapping", {cls._prefix_in_whole: ""})
            model, info = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
        if is_part:
            # Or the model would be saved under the names of the whole.
            model._weight_conversions = None
        if output_loading_info:
            return model, info
        # Under FSDP the first rank reads the checkpoint for the others.
        if not (is_fsdp_enabled() and int(os.environ.get("LOCAL_RANK", 0)) > 0):
            _check_loaded(model, os.fspath(name), info)
        return model

    def _adjust_missing_and_unexpected_keys(self, loading_info: LoadStateDictInfo) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if self._left_in_whole is not None:
            keys = loading_info.unexpected_keys
            loading_info.unexpected_keys = {key for key in keys if not re.search(self._left_in_whole, key)}

    def load_adapter(self, peft_model_id=None, adapter_name=None, *args, load_config=None, **kwargs):
        """
        As in transformers. Up to 5.17 it leaves `modules_to_save` and trained tokens as the base model has them, and
        reports them missing: PEFT loads the file again. Up to 5.11 it returns no report, which it asks for itself.
        """
        if not is_older_than("5.18") or kwargs.get("adapter_state_dict") is not None:
            return super().load_adapter(peft_model_id, adapter_name, *args, load_config=load_config, **kwargs)
        log = logging.getLogger("transformers.integrations.peft")
        log.addFilter(_is_no_report)
        try:
            super().load_adapter(peft_model_id, adapter_name, *args, load_config=load_config, **kwargs)
        finally:
            log.removeFilter(_is_no_report)
        given = {**getattr(load_config, "download_kwargs", {}), **(kwargs.get("adapter_kwargs") or {})}
        download = {key: given[key] for key in _DOWNLOAD_KEYS if given.get(key) is not None}
        peft = require("peft", "An adapter")
        name = peft_model_id or load_config.pretrained_model_name_or_path
        weights = peft.utils.load_peft_weights(name, device="cpu", **download)
        weights = {key.removeprefix("base_model.model."): tensor for key, tensor in weights.items()}
        peft.set_peft_model_state_dict(self, weights, adapter_name or "default")
        return LoadStateDictInfo(set(), set(), set(), [], {})

    @classmethod
    def _is_whole(cls, name, kwargs: dict) -> bool:
        """Whether the checkpoint is not one of this class itself: a whole that holds it, or nothing of the kind."""
        download = {key: kwargs[key] for key in _DOWNLOAD_KEYS if key in kwargs}
        try:
            config_dict, _ = PreTrainedConfig.get_config_dict(name, **download)
        except OSError:
            if kwargs.get("config") is None:
                raise
            return False
        return config_dict.get("model_type") not in (None, cls.config_class.model_type)


def _check_loaded(model, name: str, info: dict) -> None:
    """Raise a `ValueError` for weights that are missing, and code vectors that are not finite."""
    # Of an adapter's folder these are the adapter's own, and PEFT sees to them.
    missing = [] if getattr(model, "_hf_peft_config_loaded", False) else sorted(info["missing_keys"])
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"The checkpoint {name!r} lacks {len(missing)} of the weights of {type(model).__name__}, which would be "
            f"random: {listed}. With `output_loading_info=True` it is loaded all the same."
        )
    for key, buffer in model.named_buffers():
        if key.endswith("codebook.embeddings") and not buffer.is_meta and not torch.isfinite(buffer).all():
            raise ValueError(f"The checkpoint {name!r} is damaged: {key} holds values that are not finite.")


@contextmanager
def new_folder(output: str | os.PathLike, *inputs: str | os.PathLike) -> Iterator[Path]:
    """
    A folder to write to, which becomes `output`, new or empty, once everything is written; after an error or an
    interruption nothing of it is left. Enter it before the work: a `ValueError` says that `output` is a file, holds
    anything, or lies in one of `inputs`; an `OSError` that it cannot be made, or that the disk is full.
    """
    given, output = os.fspath(output) or os.curdir, Path(os.path.realpath(output))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "is not empty" if output.is_dir() else "is a file"
        raise ValueError(f"{given} {what}; a checkpoint is written to a new or empty folder only.")
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
            except (SafetensorError, OSError) as error:
                full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                if isinstance(error, OSError) and error.errno not in full:
                    raise
                raise OSError(f"{given} cannot be written: {error}.") from error
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
