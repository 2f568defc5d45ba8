"""The code of a checkpoint beside its weights, for `trust_remote_code=True` where this package is not installed."""

import json
import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files


_UNIFIED = "modeling_dualtoken.DualTokenForCausalLM"
_TOKENIZER = "modeling_vision_tokenizer.DualTokenVisionTokenizer"
# What `auto_map` says, by model type. `AutoImageProcessor` reads it in the image processor's own settings.
_AUTO_MAPS = {
    "dualtoken": {
        "AutoConfig": "configuration_dualtoken.DualTokenConfig",
        "AutoModel": "modeling_dualtoken.DualTokenModel",
        "AutoModelForCausalLM": _UNIFIED,
        "AutoModelForImageTextToText": _UNIFIED,
        "AutoModelForMultimodalLM": _UNIFIED,
        "AutoProcessor": "processing_dualtoken.DualTokenProcessor",
    },
    "dualtoken_vision_tokenizer": {
        "AutoConfig": "configuration_dualtoken.DualTokenVisionTokenizerConfig",
        "AutoModel": _TOKENIZER,
        "AutoModelForZeroShotImageClassification": _TOKENIZER,
        "AutoProcessor": "processing_dualtoken.DualTokenVisionTokenizerProcessor",
    },
}
_IMAGE_PROCESSOR = "image_processing_pil_dualtoken.DualTokenImageProcessorPil"


def carry_code(model, processor) -> None:
    """From now on `save_pretrained` and `push_to_hub` of a model and its processor write `auto_map` and the code."""
    model.config.auto_map = dict(_AUTO_MAPS[model.config.model_type])
    processor.auto_map = {"AutoProcessor": model.config.auto_map["AutoProcessor"]}
    processor.image_processor.auto_map = {"AutoImageProcessor": _IMAGE_PROCESSOR}


def save_remote_code(folder: str | os.PathLike) -> list[str]:
    """
    Make a saved checkpoint one that loads with `trust_remote_code=True` where this package is not installed: write
    `auto_map` into its configs, and the files of this package that its classes need beside them.

    Args:
        folder (`str` or `os.PathLike`): what `save_pretrained` of a model, and of its processor, has written.

    Returns:
        `list[str]`: the names of the files of code, sorted.

    Raises:
        FileNotFoundError: if the folder has no config.json.
        ValueError: if that is not of one of this package's models.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The folder {str(folder)!r} holds no saved checkpoint: it has no config.json (working directory: {Path.cwd()})."
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto_map = _AUTO_MAPS.get(config.get("model_type"))
    if auto_map is None:
        raise ValueError(
            f"{folder / 'config.json'} is of model type {config.get('model_type')!r}, not one of "
            f"{', '.join(map(repr, _AUTO_MAPS))}."
        )
    _write(folder / "config.json", {**config, "auto_map": auto_map})
    if (folder / "processor_config.json").exists():
        processor = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        processor["auto_map"] = {"AutoProcessor": auto_map["AutoProcessor"]}
        if isinstance(processor.get("image_processor"), dict):
            processor["image_processor"]["auto_map"] = {"AutoImageProcessor": _IMAGE_PROCESSOR}
        _write(folder / "processor_config.json", processor)
    return copy_code(folder, config["model_type"])


def _write(path: Path, settings: dict) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_code(folder: str | os.PathLike, model_type: str) -> list[str]:
    """Write the files of this package that the classes of a model type need; returns their names, sorted."""
    package = Path(__file__).parent
    named = {f"{name.partition('.')[0]}.py" for name in (*_AUTO_MAPS[model_type].values(), _IMAGE_PROCESSOR)}
    files = set(named)
    for name in named:
        needed = {Path(file).name for file in get_relative_import_files(package / name)}
        files |= needed
        # transformers 5.6 takes from a folder only what these files import themselves, told from their text.
        code = (package / name).read_text(encoding="utf-8")
        lines = [f"    from .{file.removesuffix('.py')} import *  # noqa: F403\n" for file in sorted(needed)]
        if lines:
            code += "\n\nif False:  # the list of files needed, for transformers 5.6\n" + "".join(lines)
        Path(folder, name).write_text(code, encoding="utf-8")
    for name in files - named:
        shutil.copyfile(package / name, Path(folder, name))
    return sorted(files)
