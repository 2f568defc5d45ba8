"""What every `from_pretrained` of a DualToken model sees to: that the checkpoint is there, of its kind, and whole."""

import json
import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.integrations import is_fsdp_enabled
from transformers.utils.loading_report import LoadStateDictInfo

from .optional_libraries import require
from .transformers_compat import is_older_than


_TOKENIZER, _UNIFIED = "dualtoken_vision_tokenizer", "dualtoken"
# What is right for a checkpoint of another kind.
_ADVICE = {
    _TOKENIZER: "load it with DualTokenVisionTokenizer, or join it with a language model: "
    "DualTokenForCausalLM.from_pretrained_parts(vision_tokenizer, language_model)",
    _UNIFIED: "load it with DualTokenForCausalLM",
    "siglip": "a new vision tokenizer starts from it: DualTokenVisionTokenizer.from_siglip_pretrained",
}
_OF_LANGUAGE_MODELS = (
    "a causal language model is joined with a vision tokenizer by DualTokenForCausalLM.from_pretrained_parts"
)


@contextmanager
def checkpoint_errors(name: str | os.PathLike):
    """
    While a checkpoint is looked for and read: says in one sentence that there is none, or that its weights are damaged.

    Args:
        name (`str` or `os.PathLike`): a folder or a Hub id.

    Raises:
        FileNotFoundError: if `name` is a path and there is nothing, or neither a folder nor to be had from the Hub.
        ValueError: if a safetensors file is cut or otherwise damaged, or its tensors have other shapes than the model.
    """
    text = os.fspath(name)
    is_there = os.path.exists(text)
    if not is_there and _is_path(name):
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
    Around a library's parser of files that may be anything: whatever it stumbles on is said in one sentence.

    Args:
        what (`str`): what is read, as the subject of a sentence.

    Raises:
        ValueError: for any error but those of the file system, of memory, and of a library that is missing.
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
    """
    The settings of a JSON file.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is not JSON in UTF-8, or anything but an object.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}.")
    return fields


def _is_path(name: str | os.PathLike) -> bool:
    """Whether a name can be a path only: a Hub id is `name` or `owner/name`."""
    if not isinstance(name, str):
        return True
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


def check_model_type(config_class: type, config_dict: dict) -> None:
    """Raise a `ValueError` that names what to use if the config is of another type than `config_class`."""
    model_type = config_dict.get("model_type")
    if "rqvaesiglip" in config_dict:
        raise ValueError(
            "This checkpoint is in the format of the authors' tokenizer training: load it with "
            "transformers_dualtoken.load_official_tokenizer, or convert it: dualtoken convert FOLDER OUTPUT."
        )
    if model_type is not None and model_type != config_class.model_type:
        advice = _ADVICE.get(model_type, _OF_LANGUAGE_MODELS)
        raise ValueError(
            f"{config_class.__name__} reads checkpoints of type {config_class.model_type!r}, and this one is of type "
            f"{model_type!r}: {advice}."
        )


class StrictConfigMixin:
    """A config that is read from files of its own type only; transformers warns and goes on with other fields."""

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        check_model_type(cls, config_dict)
        return super().from_dict(config_dict, **kwargs)


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
            cls._check_whole(model, name, info)
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
        given = {
            **({} if load_config is None else load_config.download_kwargs),
            **(kwargs.get("adapter_kwargs") or {}),
        }
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
        try:
            config_dict, _ = PreTrainedConfig.get_config_dict(
                name, **{key: kwargs[key] for key in _DOWNLOAD_KEYS if key in kwargs}
            )
        except OSError:
            if kwargs.get("config") is None:
                raise
            return False
        return config_dict.get("model_type") not in (None, cls.config_class.model_type)

    @staticmethod
    def _check_whole(model, name, info: dict) -> None:
        # Of an adapter's folder these are the adapter's own, and PEFT sees to them.
        missing = [] if getattr(model, "_hf_peft_config_loaded", False) else sorted(info["missing_keys"])
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ValueError(
                f"The checkpoint {os.fspath(name)!r} lacks {len(missing)} of the weights of "
                f"{type(model).__name__}, which would be random: {shown}. With `output_loading_info=True` it is loaded "
                "all the same."
            )
        for key, buffer in model.named_buffers():
            if key.endswith("codebook.embeddings") and not buffer.is_meta and not torch.isfinite(buffer).all():
                raise ValueError(
                    f"The checkpoint {os.fspath(name)!r} is damaged: {key} holds values that are not finite."
                )


__all__ = [
    "StrictConfigMixin",
    "StrictLoadingMixin",
    "check_model_type",
    "checkpoint_errors",
    "damage_errors",
    "read_json_object",
]
