"""Data of any kind for unified training: a `datasets` data set of raw rows, and how a row becomes an example."""

import collections
import glob
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets.exceptions import DatasetGenerationError

from . import files
from .codes import is_code_folder, load_code_source
from .formats import FORMATS, TASKS, detect_format
from .samples import BadSampleError, ChatSource, check_weights


_SPEC_KEYS = ("path", "format", "weight", "split", "name", "image_folder")
# A larger JSON file (1 MiB) is data and no mixture.
_MAX_MIXTURE_BYTES = 2**20
# Of so many files rows are looked at for the columns.
_FILES_LOOKED_AT = 10


@dataclass(frozen=True)
class RowToExample:
    """
    Makes a raw row of a kind (`"line"` of a file, `"tar"` sample, or `"columns"`) an example, by a format of `FORMATS`
    and its options. `folder` is that of relative image paths, `None` that of the row's file.
    """

    format: str
    kind: str
    folder: str | None = None
    options: dict = field(default_factory=dict)

    def __call__(self, row: Mapping) -> dict:
        name, folder = "", self.folder
        if self.kind != "columns":
            name = row["key"] if self.kind == "tar" else f"{os.path.basename(row['file'])}:{row['number']}"
            folder = os.path.dirname(row["file"]) if folder is None else folder
        try:
            record = files.parse_row(row, self.kind)
            own = [record[key] for key in ("id", "__key__") if isinstance(record.get(key), (str, int))]
            name = str(own[0]) if own else name
            example = FORMATS[self.format].convert(record, folder, **self.options)
        except BadSampleError as error:
            error.sample_id = name or None
            raise
        return {**example, "id": name} if name else example


def load_chat_sources(
    spec, *, split: str = "train", streaming: bool = False, fingerprint: str | None = None
) -> list[ChatSource]:
    """
    Data for unified training from files, folders, saved data sets or the Hub, one source or a mixture.

    Args:
        spec: one source, a list of sources, or the path of a JSON or YAML file with such a list (bare, or as
            `sources`; relative paths in it are relative to the file). A source is a path, a pattern such as
            `shards/*.tar`, the name of a data set on the Hub, or a dict:

            - `path` (`str`);
            - `format` (`str`, *optional*): told from the columns if not given. One of

              - `"messages"`: `messages` of `{"role", "content"}`, content a string or parts `{"type": "text", "text"}`
                and `{"type": "image", "image"}` (or OpenAI's `image_url`), or `prompt` and `completion`, two such lists.
                Image parts without an image get those of the column `images` or `image`, in reading order;
              - `"llava"`: `conversations` of `{"from", "value"}`, `<image>` in the values for those of `image`;
              - `"caption"`: options `task` (`"draw"` the caption, the default, `"describe"` the image, or `"both"`, two
                sources that share the weight), `image_column`, `caption_column`, `draw_prompt`, `describe_prompt`;
              - `"edit"`: options `input_column`, `instruction_column`, `edited_column`;
              - `"text"`: options `text_column`, `sample_by` of `.txt` files (`"document"`, the default, or `"line"`);
              - `"interleaved"`: documents as `content`, a list of parts, or as `images` and `texts` with `None` where
                the other one stands;
              - `"codes"`: a folder of `precompute_codes`;
            - `weight` (`float`, *optional*): above 0; of all sources of a mixture or of none;
            - `split` (`str`, *optional*), `name` (`str`, *optional*): the configuration of a data set on the Hub;
            - `image_folder` (`str`, *optional*): folder or URL of relative image paths; by default that of their file.

            Files are JSON lines, JSON (one array), CSV, `.txt` (these also compressed), parquet, or webdataset shards.
            A folder of images with `metadata.jsonl` (or `.csv`, `.parquet`) is read by that file. A webdataset sample
            has the fields of its `json`, `txt`, and `image` (or, of several, `input_image.jpg` as `input_image`).
        split (`str`, defaults to `"train"`): of the sources that do not name one. Files and patterns are taken whole.
        streaming (`bool`, defaults to `False`): read while training, else mapped from the cache of `datasets`.
        fingerprint (`str`, *optional*): of the vision tokenizer, which precomputed codes must have.

    An image may be a URL, of any protocol that `fsspec` knows, and is fetched while training: take data from people you
    trust.

    Raises:
        ValueError: for a source that cannot be read, unknown keys, a format that cannot be told, columns that are
            missing and weights that are not above 0, or not given for all sources.
    """
    specs = _read_specs(spec)
    for source in specs:
        _check_spec(source)
    check_weights([source["path"] for source in specs], [source.get("weight") for source in specs])
    sources = []
    for source in specs:
        sources += _load_source({"split": split, **source}, streaming, fingerprint)
    names: dict[str, int] = {}
    for source in sources:
        names[source.name] = names.get(source.name, 0) + 1
        if names[source.name] > 1:
            source.name += f" #{names[source.name]}"
    return sources


def _read_specs(spec) -> list[dict]:
    """The sources of a mixture as dicts, their paths as they are to be opened."""
    folder = None
    if isinstance(spec, (str, os.PathLike)):
        path = os.path.expanduser(os.fspath(spec))
        mixture = _read_mixture(path)
        if mixture is not None:
            spec, folder = mixture, os.path.dirname(path)
    if isinstance(spec, Mapping) and "sources" in spec:
        if len(spec) > 1:
            others = [key for key in spec if key != "sources"]
            raise ValueError(f"A mixture is a list `sources` and nothing else; it has also {others}.")
        spec = spec["sources"]
    specs = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    if not specs:
        raise ValueError("A mixture must have at least one source.")
    for index, source in enumerate(specs):
        source = {"path": source} if isinstance(source, (str, os.PathLike)) else source
        if not isinstance(source, Mapping) or not isinstance(source.get("path"), (str, os.PathLike)):
            raise ValueError(f"A source of data is a path, or a dict with a 'path', got {source!r:.200}.")
        specs[index] = source = {key: value for key, value in source.items() if value is not None}
        source["path"] = path = os.path.expanduser(os.fspath(source["path"]))
        # Of a mixture file; but what is not there may be the name of a data set on the Hub, which looks like a path.
        joined = os.path.join(folder or "", path)
        source["path"] = path if files.may_be_hub_name(path) and not os.path.exists(joined) else joined
        if isinstance(source.get("image_folder"), (str, os.PathLike)):
            place = os.path.expanduser(os.fspath(source["image_folder"]))
            source["image_folder"] = place if "://" in place else os.path.join(folder or "", place)
    return specs


def _read_mixture(path: str):
    """What a JSON or YAML file says if it is a mixture; `None` if it is something else, such as data."""
    is_json = path.lower().endswith(".json")
    if not path.lower().endswith((".json", ".yaml", ".yml")) or not os.path.isfile(path):
        return None
    if is_json and os.path.getsize(path) > _MAX_MIXTURE_BYTES:
        return None
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file) if is_json else yaml.safe_load(file)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            if is_json:  # JSON lines may have this ending; otherwise their reader says what is wrong
                return None
            raise ValueError(f"The mixture {path!r} cannot be read: {error}") from error
    if isinstance(content, dict) and "sources" in content:
        return content
    is_list = isinstance(content, list) and content
    if is_list and all(isinstance(item, str) or (isinstance(item, dict) and "path" in item) for item in content):
        return content
    if is_json:
        return None
    raise ValueError(
        f"The mixture {path!r} must be a list of sources, paths or dicts with a 'path', or have `sources`."
    )


def _check_spec(source: Mapping) -> None:
    """Raise for what is wrong with a source whatever its data is."""
    path, name = source["path"], source.get("format")
    if not all(isinstance(key, str) for key in source):
        raise ValueError(f"The keys of a source must be strings, got {list(source)!r:.200}.")
    formats = {**{name: [*known.roles, *known.options] for name, known in FORMATS.items()}, "codes": []}
    if name is not None and name not in list(formats):  # which compares, where the name may be anything
        raise ValueError(f"The format of {path!r} must be one of {', '.join(formats)}, got {name!r}.")
    keys = [*_SPEC_KEYS, *(formats[name] if name is not None else itertools.chain.from_iterable(formats.values()))]
    unknown = sorted(set(source) - set(keys))
    if unknown:
        of_format = f" of the format {name!r}" if name is not None else ""
        known = f"the keys{of_format} are {', '.join(keys)}"
        raise ValueError(f"The source {path!r} has the unknown keys {', '.join(unknown)}; {known}.")
    for key, value in source.items():
        if key not in ("path", "weight") and not isinstance(value, str):
            raise ValueError(f"`{key}` of {path!r} must be a string, got {value!r:.100}.")
    for option, values in (("task", TASKS), ("sample_by", ("document", "line"))):
        if source.get(option, values[0]) not in values:
            raise ValueError(f"`{option}` of {path!r} must be one of {', '.join(values)}, got {source[option]!r}.")
    if "{caption}" not in source.get("draw_prompt", "{caption}"):
        raise ValueError(f"`draw_prompt` must have '{{caption}}' in it, got {source['draw_prompt']!r}.")
    folder = source.get("image_folder")
    if folder is not None and "://" not in folder and not os.path.isdir(folder):
        raise ValueError(f"The `image_folder` {folder!r} of {path!r} is not a folder.")


def _load_source(spec: dict, streaming: bool, fingerprint: str | None) -> list[ChatSource]:
    path, weight = spec["path"], spec.get("weight")
    is_codes = is_code_folder(path)
    if spec.get("format", "codes") == "codes" and (is_codes or "format" in spec):
        return [load_code_source(path, weight=weight, streaming=streaming, fingerprint=fingerprint)]
    if is_codes:
        raise ValueError(f"{path!r} holds precomputed codes: its format is 'codes', not {spec['format']!r}.")
    dataset, kind, folder, rows = _open_rows(path, spec, streaming)
    columns = set().union(*rows)
    name = spec.get("format") or detect_format(columns)
    if name is None:
        known = ", ".join(FORMATS)
        raise ValueError(
            f"The format of {path!r} cannot be told from its columns {sorted(columns)}: give one of {known}."
        )
    _check_spec({**spec, "format": name})
    known = FORMATS[name]
    # The column of each role, as most rows have them; of incomplete rows alone, as all of them together do.
    found = collections.Counter(
        tuple(roles.items()) for row in rows if (roles := known.find_columns(row, spec)) is not None
    )
    roles = dict(found.most_common(1)[0][0]) if found else known.find_columns(columns, spec)
    if roles is None or not (known.roles or columns.intersection(known.columns)):
        names = {role: spec[role] if role in spec else " or ".join(names) for role, names in known.roles.items()}
        wanted = "; ".join(f"{role}: {name}" for role, name in names.items()) or f"one of {', '.join(known.columns)}"
        found = f"it has {sorted(columns)}, and needs {wanted}"
        raise ValueError(f"The data {path!r} of format {name!r} lacks a column; {found}.")
    if kind == "columns":
        dataset = _undecoded(dataset, [*known.columns, *roles.values(), "id", "__key__", "json"])
    options = {**known.options, **{option: spec[option] for option in known.options if option in spec}, **roles}
    folder, short_name = spec.get("image_folder", folder), _short_name(path)
    if options.get("task") != "both":
        return [ChatSource(short_name, dataset, RowToExample(name, kind, folder, options), weight)]
    weight = 1.0 if weight is None and streaming else weight  # of a single source: its two tasks are mixed evenly
    return [
        ChatSource(
            f"{short_name} ({task})",
            dataset,
            RowToExample(name, kind, folder, {**options, "task": task}),
            weight and weight / 2,
        )
        for task in ("draw", "describe")
    ]


def _short_name(path: str) -> str:
    if not files.is_local(path):
        return path  # on the Hub
    path = Path(os.path.abspath(path))
    return os.path.join(path.parent.name, path.name) if glob.has_magic(path.name) else path.name


def _open_rows(path: str, spec: Mapping, streaming: bool):
    """A source's data set, the kind of its rows, the folder of its relative image paths, and the columns of some rows."""
    dataset = files.load_ready(path, spec["split"], streaming, name=spec.get("name"))
    if dataset is not None:
        return dataset, "columns", path if files.is_local(path) else None, _columns_of(dataset, path)
    kind, paths = _find_data(path, spec["split"])
    if kind == "parquet":
        dataset = _load_parquet(paths, streaming)
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in paths])
        return dataset, "columns", folder, _columns_of(dataset, path)
    row_kind, features = ("tar", files.TAR_FEATURES) if kind == "tar" else ("line", files.LINE_FEATURES)
    options = {"kind": kind, "sample_by": spec.get("sample_by", "document")}
    # The first rows of the first file and of some others.
    chosen = paths[:: -(-len(paths) // _FILES_LOOKED_AT)]
    count = -(-files.ROWS_LOOKED_AT // len(chosen))
    rows = itertools.chain.from_iterable(
        itertools.islice(files.iterate_rows([file], **options), count) for file in chosen
    )
    columns = _columns_of_rows(rows, row_kind, path)
    return files.dataset_of_shards(files.iterate_rows, paths, features, streaming, **options), row_kind, None, columns


def _find_data(path: str, split: str) -> tuple[str, list[str]]:
    """The kind of files at a path or pattern, and those of the split."""
    found = files.find_files(path)
    metadata = {
        kind: [file for file in found.get(kind, ()) if Path(file).name.split(".")[0] == "metadata"]
        for kind in ("json", "csv", "parquet")
    }
    has_images = bool(found.get("image"))
    kinds = [kind for kind in ("json", "csv", "parquet", "tar") if kind in found]
    if os.path.isdir(path) and any(metadata.values()):
        found = metadata
    elif not kinds and not has_images:  # text counts where there is nothing else
        kinds = ["txt"]
    wanted = "are no JSON lines, JSON, CSV, parquet, .tar, text without images, or images with a metadata.jsonl"
    return files.choose_files(path, found, kinds, split, wanted)


def _columns_of(dataset, path: str) -> list[set[str]]:
    if dataset.features is None:  # a stream of files without a schema
        return _columns_of_rows(dataset.take(files.ROWS_LOOKED_AT), "columns", path)
    fields = dataset.features.get("json")
    return [{*dataset.features, *(fields if isinstance(fields, dict) else ())}]


def _columns_of_rows(rows: Iterable, kind: str, path: str) -> list[set[str]]:
    """The columns of every row that can be parsed."""
    columns, error, count = [], None, 0
    try:
        for row in rows:
            count += 1
            try:
                columns.append(set(files.parse_row(row, kind)))
            except BadSampleError as failure:
                error = failure
    except ValueError:  # a file is damaged, which is named again where it is read
        if not columns:
            raise
    if count == 0:
        raise ValueError(f"There are no rows at {path!r}.")
    if not columns:
        raise ValueError(f"None of the first {count} rows of {path!r} can be parsed. The last: {error}.") from error
    return columns


def _load_parquet(paths: list[str], streaming: bool):
    try:
        # Of all files: one may lack a column, or hold nothing in it.
        schema = pa.unify_schemas([pq.read_schema(path) for path in paths], promote_options="permissive")
        features = _undecoded_feature(dict(datasets.Features.from_arrow_schema(schema)))
        return files.load_parquet(paths, datasets.Features(features), streaming)
    except (OSError, pa.ArrowException, DatasetGenerationError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"The {len(paths)} parquet files from {paths[0]!r} on cannot be read: {reason}") from error


def _undecoded(dataset, columns: list[str]):
    """The columns that are wanted, of those there are, with no image decoded, wherever in a row it stands."""
    if dataset.features is None:
        return dataset  # nothing is decoded without features
    dataset = dataset.with_format(None).select_columns([name for name in dataset.features if name in columns])
    features = datasets.Features(_undecoded_feature(dict(dataset.features)))
    if features == dataset.features:
        return dataset
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.cast(features)
    # The same table by other features: `cast` would write a copy where images stand in lists.
    info = dataset.info.copy()
    info.features = features
    return datasets.Dataset(dataset.data, info=info, split=dataset.split)


def _undecoded_feature(feature):
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded_feature(part) for name, part in feature.items()}
    if isinstance(feature, datasets.LargeList):
        return datasets.LargeList(_undecoded_feature(feature.feature))
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded_feature(feature.feature), length=feature.length)
    return feature
