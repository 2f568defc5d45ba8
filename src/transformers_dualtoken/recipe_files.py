"""Settings of a script from its command line, which may begin with a recipe: a JSON or YAML file of settings."""

import argparse
import contextlib
import dataclasses
import glob
import json
import math
import os
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from .optional_libraries import MissingLibraryError


# Fields that may name a file or folder to read. What is written (`output_dir`) belongs to whoever starts the script.
_PATHS = (
    *("model_name_or_path", "siglip_model_name_or_path", "vision_tokenizer_name_or_path"),
    *("language_model_name_or_path", "text_tokenizer_name_or_path", "processor_name_or_path"),
    *("train_dataset", "eval_dataset", "dataset", "dataset_options", "image_folder", "sample_prompts", "class_names"),
    *("config_overrides", "learning_rates", "perceptual_weights", "inception_weights", "lpips_weights"),
    *("deepspeed", "fsdp_config", "accelerator_config", "resume_from_checkpoint"),
)
_WRONG_VALUE = (TypeError, ValueError, OverflowError)


class SettingsError(ValueError):
    """Settings of the command line or of a recipe that are unknown, missing or not as they must be."""


def run_script(main: Callable) -> None:
    """`main()`; wrong settings and what is not there (a file, a library) are a sentence and exit status 1."""
    try:
        main()
    except (FileNotFoundError, MissingLibraryError, SettingsError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")


def parse_settings(dataclass_types: tuple, argv: list[str] | None = None) -> tuple:
    """
    Instances of the dataclasses, from the command line: options, or a recipe and then options that count before it.

    Relative paths that a recipe reads from are looked for beside the recipe, and then in the working directory; names
    of the Hub and what is in neither stay as they are.

    Raises:
        SettingsError: for a recipe that cannot be read or is no object, fields that are unknown, missing or of another
            type, numbers that are not finite, and explicit relative paths (`./`, `../`, `~`) to nothing.
        SystemExit: for options without or with another kind of value, as of `argparse`.
    """
    # Or a misspelt option that begins another is taken for it.
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False)
    argv = sys.argv[1:] if argv is None else argv
    recipe = argv[0] if argv and argv[0].endswith((".json", ".yaml", ".yml")) else None
    if recipe is None:
        *settings, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    else:
        # The options that are there, without the others' defaults.
        for action in parser._actions:
            action.default, action.required = argparse.SUPPRESS, False
        given, unknown = parser.parse_known_args(argv[1:])
    if unknown:
        raise SettingsError(f"The command line has options that do not exist: {' '.join(unknown)}.")
    if recipe is not None:
        settings = parser.parse_dict(_read_recipe(recipe, parser.dataclass_types, vars(given)))
    return tuple(settings)


def _unique(pairs: list[tuple]) -> dict:
    twice = [str(name) for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"it has {', '.join(twice)} more than once")
    return dict(pairs)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key stands once; PyYAML takes the last."""

    def construct_mapping(self, node, deep=False):
        # Before keys merged by "<<" join, which own ones may replace.
        _unique([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


def _read_recipe(path: str, dataclass_types, given: dict) -> dict:
    """The recipe's settings as their fields' types, those that are `given` in place of its own."""
    try:
        text, is_json = Path(path).read_text(encoding="utf-8"), path.endswith(".json")
        recipe = json.loads(text, object_pairs_hook=_unique) if is_json else yaml.load(text, _UniqueKeyLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SettingsError(
            f"The recipe {path!r} cannot be read ({error}); the working directory is {os.getcwd()!r}."
        ) from error
    if not isinstance(recipe, dict):
        raise SettingsError(f"The recipe {path!r} must be an object of settings, got {type(recipe).__name__}.")
    fields = {field.name: field for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    hints = {name: hint for kind in dataclass_types for name, hint in typing.get_type_hints(kind).items()}
    unknown = ", ".join(sorted(str(name) for name in recipe if name not in fields))
    if unknown:
        raise SettingsError(f"The recipe {path!r} has settings that do not exist: {unknown}.")
    needed = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = ", ".join(name for name in needed if name not in recipe and name not in given)
    if missing:
        raise SettingsError(f"The recipe {path!r} lacks {missing}.")
    settings = dict(given)
    for name, value in recipe.items():
        if name in given:
            continue
        try:
            settings[name] = _converted(value, hints[name])
        except _WRONG_VALUE:
            kind = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise SettingsError(f"`{name}` of the recipe {path!r} must be {kind}, got {value!r:.200}.") from None
        if name in _PATHS:
            settings[name] = _located(settings[name], path, name)
    return settings


def _converted(value, hint):
    """The value as the type says; a number may be written as text, as YAML takes 1e-3 for. Raises `_WRONG_VALUE`."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        # Text is text where it may be, and a whole number an integer.
        for each in sorted(arguments, key=lambda each: type(value) is not each):
            with contextlib.suppress(*_WRONG_VALUE):
                return _converted(value, each)
        raise TypeError
    if kind in (int, float):
        return _number(value, kind)
    if kind is bool and type(value) is int and value in (0, 1):
        return bool(value)
    if kind in (str, bool, dict, list, type(None)) and not isinstance(value, kind):
        raise TypeError
    if kind is list and arguments:
        return [_converted(item, arguments[0]) for item in value]
    # Also enumerations of transformers, which check their own values.
    return value


def _number(value, kind: type) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    if kind is int and not isinstance(value, float):
        with contextlib.suppress(ValueError):  # such as "1e3"
            return int(value)
    number = float(value)
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError
    return kind(number)


def _located(value, recipe: str, name: str):
    """A path, or those in a dict, as it is to be opened."""
    if isinstance(value, Mapping):
        return {key: _located(item, recipe, key) if key in _PATHS else item for key, item in value.items()}
    if not isinstance(value, str) or not value or "://" in value:
        return value
    path = os.path.expanduser(value)
    places = os.path.join(os.path.dirname(recipe), path), path
    for place in places:
        if os.path.exists(place) or glob.has_magic(place) and any(glob.iglob(place, recursive=True)):
            return place
    if value.startswith(("./", "../", "~")):
        nowhere = " nor at ".join(repr(os.path.abspath(place)) for place in places)
        raise SettingsError(f"`{name}` of the recipe {recipe!r} is {value!r}, and there is nothing at {nowhere}.")
    return value
