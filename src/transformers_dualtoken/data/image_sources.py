"""Images for tokenizer training: any source as a `datasets` data set with a column of undecoded images."""

import contextlib
import glob
import itertools
import os
import random
import re
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from transformers.utils import logging

from .image_reading import MAX_SKIPPED_IN_A_ROW


logger = logging.get_logger(__name__)

# Files of a folder, and keys of a webdataset sample, that are images.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "avif", "bmp", "gif", "tif", "tiff", "jp2", "j2k"),
    *("ppm", "pgm", "pbm", "pnm", "tga", "ico"),
)
_KINDS = {f".{extension}": "image" for extension in IMAGE_EXTENSIONS} | {".parquet": "parquet", ".tar": "tar"}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_UNDECODED = datasets.Image(decode=False)
# A stream of image files has this many shards, or one for every file.
_MAX_FOLDER_SHARDS = 1024
# Keys of a webdataset sample that are integers, by its convention.
_INTEGER_KEYS = ("cls", "cls2", "index", "inx")
# A larger file in a webdataset shard (256 MiB) is not read: no image that can be decoded needs so many bytes.
MAX_FILE_BYTES = 2**28
# The first rows say what columns there are: one alone may be incomplete.
ROWS_LOOKED_AT = 100


def load_image_dataset(
    source,
    *,
    name: str | None = None,
    data_files=None,
    split: str = "train",
    streaming: bool = False,
    image_column: str = "image",
    keep_columns=(),
):
    """
    Any source of images as a `datasets` data set with one column, of undecoded images, and others if asked for.

    Args:
        source (`str` or `os.PathLike`): one of

            - a folder of images, with or without subfolders (endings: `IMAGE_EXTENSIONS`);
            - a folder of `.parquet` files, or of webdataset shards (`.tar`);
            - a file, or a pattern such as `shards/*.tar`, of any of these kinds; it is taken whole;
            - a folder written by `save_to_disk`;
            - the name of a data set on the Hub.

            In a folder the subfolders and, for shards, the words of the file names say what belongs to a split
            (`train`, `val`, `test` and their like); what names no split belongs to `"train"`. How many files are left
            out is logged.
        name (`str`, *optional*), data_files (*optional*): of a data set on the Hub, as in `datasets.load_dataset`.
        split (`str`, defaults to `"train"`).
        streaming (`bool`, defaults to `False`): read while training instead of at once (shards are else copied to the
            cache of `datasets`).
        image_column (`str`, defaults to `"image"`): where a parquet file or a data set holds the images; the column
            of the result. In a webdataset any key that is an image's ending counts, unless the samples have this key.
        keep_columns (`Iterable[str]`, *optional*): columns to leave beside the images, such as labels and captions.
            With any, local files too are read by `datasets.load_dataset`, by its own rules: a folder of images has
            the column `"label"` of its subfolders or those of its `metadata.jsonl`. A webdataset has its keys: integers
            where they are called `cls` or `index`, else text, and `None` where a sample lacks one.

    Returns:
        `datasets.Dataset`, or with `streaming` `datasets.IterableDataset`, with the column `image_column` of
        `datasets.Image(decode=False)`: `{"bytes": ..., "path": ...}`, of which one may be `None`; and `keep_columns`.

    Raises:
        ValueError: if there is nothing at `source`, no image in it, no such split or column, or if a shard is
            truncated or damaged, which it names; in a stream that is raised where the shard is read.
    """
    source = os.path.expanduser(os.fspath(source))
    is_local = os.path.exists(source) or glob.has_magic(source)
    if is_local and (name is not None or data_files is not None):
        raise ValueError(
            f"`name` and `data_files` are for data sets on the Hub, and {source!r} is a local path. Give a folder, a "
            "file, or a pattern such as 'shards/*.tar'."
        )
    keep_columns = list(keep_columns)
    if not is_local:
        is_file_name = Path(source).suffix.lower() in _KINDS
        dataset = load_from_hub(source, split, streaming, is_file_name, name=name, data_files=data_files)
        dataset = _with_image_column(dataset, source, image_column)
    elif os.path.isfile(os.path.join(source, "state.json")) or os.path.isfile(
        os.path.join(source, "dataset_dict.json")
    ):
        dataset = load_saved(source, split, streaming)
    elif keep_columns:
        dataset = _load_by_datasets(source, split, streaming, image_column, keep_columns)
    else:
        kind, files = _find_files(source, split)
        dataset = _load_files(kind, files, streaming, image_column)
    return undecoded(dataset, image_column, keep_columns)


def undecoded(dataset, image_column: str, keep=()):
    """
    The column of images of a data set as `datasets.Image(decode=False)`, and the columns `keep`; all others are
    dropped before anything of them is decoded. Of a stream without features, and of a data set with a transform, the
    images stay as they are.

    Raises:
        ValueError: for a column that is missing, and an image column of another type.
    """
    wanted = list(dict.fromkeys((image_column, *keep)))
    columns = dataset.column_names
    if columns is None:  # a stream that was mapped
        columns = list(dict.fromkeys(column for row in dataset.take(ROWS_LOOKED_AT) for column in row))
    for column in wanted:
        if column not in columns:
            raise ValueError(f"The data set has no column {column!r}; it has {columns}.")
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        return dataset  # a transform decides by itself what the column gives
    dataset = dataset.with_format(None)
    if columns != wanted:
        dataset = dataset.select_columns(wanted)
    if dataset.features is None:  # also of a mapped stream
        return dataset
    feature = dataset.features[image_column]
    if feature == _UNDECODED:
        return dataset
    if not _holds_images(feature):
        raise ValueError(
            f"The column {image_column!r} must hold images (or the bytes or paths of image files), got {feature}."
        )
    return dataset.cast_column(image_column, _UNDECODED)


def _holds_images(feature) -> bool:
    """Whether a column of this type can be cast to undecoded images: images, their bytes, their paths, or both."""
    if isinstance(feature, dict):
        parts = [feature[name] for name in ("bytes", "path") if name in feature]
        return bool(parts) and all(not isinstance(part, dict) and _holds_images(part) for part in parts)
    types = ("string", "large_string", "binary", "large_binary", "null")
    return isinstance(feature, datasets.Image) or (isinstance(feature, datasets.Value) and feature.dtype in types)


class MissingDataError(FileNotFoundError, ValueError):
    """There is no data set of this path or name."""


def load_from_hub(source: str, split: str, streaming: bool, is_file_name: bool, *, name=None, data_files=None):
    """A data set of the Hub. `is_file_name`: `source` can be no name of one, for it has the ending of a file of data."""
    nowhere = f"There is no file or folder at {source!r} (the working directory is {os.getcwd()!r})"
    if not HUB_NAME.fullmatch(source) or is_file_name:
        raise MissingDataError(f"{nowhere}, and it is not the name of a data set on the Hub.")
    if source in _PACKAGED_DATASETS_MODULES and data_files is None:
        raise MissingDataError(
            f"{nowhere}. {source!r} is no data set of the Hub but a reader of `datasets`, which would read the files of "
            "the working directory: give the path of the data."
        )
    try:
        return datasets.load_dataset(source, name, data_files=data_files, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        raise MissingDataError(f"{nowhere}, and no data set of this name can be had from the Hub: {error}") from error


def _load_by_datasets(source: str, split: str, streaming: bool, image_column: str, keep_columns: list[str]):
    """Local files with all columns that `datasets` makes of them, but webdataset shards by our own reader."""
    paths = walk(source) if os.path.isdir(source) else glob.glob(source) or [source]
    if any(path.lower().endswith(".tar") for path in paths):
        return _load_files(*_find_files(source, split), streaming, image_column, keep_columns)
    if os.path.isdir(source):
        arguments = {"path": source, "split": split}
    else:
        kind, files = _find_files(source, split)
        builder = {"image": "imagefolder", "parquet": "parquet", "tar": "webdataset"}[kind]
        arguments = {"path": builder, "data_files": files, "split": "train"}
    try:
        dataset = datasets.load_dataset(**arguments, streaming=streaming)
    except FileNotFoundError as error:
        raise ValueError(f"There is nothing at {source!r} that `datasets` can read: {error}") from error
    return _with_image_column(dataset, source, image_column)


def _with_image_column(dataset, source: str, image_column: str):
    """A webdataset as `datasets` reads it, with a column of every key, has the images of any ending in one."""
    columns = dataset.column_names or []
    if image_column not in columns and "__key__" in columns:
        keys = [column for column in columns if column.lower() in IMAGE_EXTENSIONS]
        if len(keys) != 1:
            raise ValueError(
                f"The webdataset {source!r} has {len(keys)} columns of images, of {columns}. Say which by "
                "`image_column`."
            )
        dataset = dataset.rename_column(keys[0], image_column)
    return dataset


def load_saved(folder: str, split: str, streaming: bool):
    try:
        dataset = datasets.load_from_disk(folder)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"The saved data set {folder!r} cannot be read: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"The saved data set {folder!r} has no split {split!r}; it has {list(dataset)}.")
        dataset = dataset[split]
    if streaming:
        dataset = dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), _MAX_FOLDER_SHARDS)))
    return dataset


def _find_files(source: str, split: str) -> tuple[str, list[str]]:
    """The kind of files at a path or pattern, and those of the split, sorted."""
    is_folder = os.path.isdir(source)
    if is_folder:
        paths = list(walk(source))
    else:
        paths = glob.glob(source, recursive=True) if glob.has_magic(source) else []
        paths = paths or ([source] if os.path.exists(source) else [])
    by_kind: dict[str, list[str]] = {}
    for path in sorted(paths):
        kind = _KINDS.get(Path(path).suffix.lower())
        # "._photo.jpg" and "metadata.parquet" lie beside images and are none.
        is_hidden = any(part.startswith(".") for part in Path(os.path.relpath(path, source)).parts if part != "..")
        if kind is not None and not is_hidden and Path(path).name != "metadata.parquet":
            by_kind.setdefault(kind, []).append(path)
    if not by_kind:
        endings = sorted({Path(path).suffix or "no ending" for path in paths})
        raise ValueError(
            f"There are no images, parquet files or webdataset shards at {source!r}; "
            + (f"its {len(paths)} files have the endings {endings[:10]}." if paths else "it holds no files.")
        )
    if len(by_kind) > 1:
        found = ", ".join(f"{len(files)} {kind} files" for kind, files in sorted(by_kind.items()))
        raise ValueError(
            f"{source!r} holds {found}. Give a pattern that selects one kind, such as 'folder/*.parquet'."
        )
    ((kind, files),) = by_kind.items()
    if is_folder:
        by_split: dict[str, list[str]] = {}
        for path in files:
            by_split.setdefault(split_of(os.path.relpath(path, source), kind, split), []).append(path)
        if split not in by_split:
            raise ValueError(f"{source!r} has no split {split!r}; its files belong to {sorted(by_split)}.")
        files = by_split.pop(split)
        if by_split:
            left_out = ", ".join(f"{len(paths)} of the split {name!r}" for name, paths in sorted(by_split.items()))
            logger.warning(f"{len(files)} files of {source!r} are taken as the split {split!r}; left out: {left_out}.")
    return kind, files


def walk(folder: str):
    """The files of a folder and its subfolders, each real folder once: links may lead in circles."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        identity = os.path.realpath(place)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        # A folder is known by its own name rather than by that of a link.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        yield from (os.path.join(place, file) for file in files)


def split_of(path: str, kind: str, split: str) -> str:
    """The split that a path within the source belongs to; `split` is the one asked for, by any name."""
    *folders, file = Path(path).parts
    # A photograph may be called "test 3.jpg", and a class of pictures "train"; shards are named after their split.
    words = folders[:1] if kind == "image" else [*folders, *re.split(r"[^a-zA-Z]+", Path(file).stem)]
    for word in words:
        if word == split:
            return split
        if word.lower() in _SPLITS:
            canonical = _SPLITS[word.lower()]
            return split if _SPLITS.get(split) == canonical else canonical
    return "train"


def _load_files(kind: str, files: list[str], streaming: bool, image_column: str, keep_columns=()):
    if kind == "image":
        # A stream shuffles within blocks only, and folders are sorted by class: it starts from another order.
        if streaming:
            random.Random(0).shuffle(files)
        dataset = datasets.Dataset.from_dict({image_column: files}).cast_column(image_column, _UNDECODED)
        return dataset.to_iterable_dataset(min(len(files), _MAX_FOLDER_SHARDS)) if streaming else dataset

    if kind == "parquet":
        # A row group is what can be read at once. This also finds files that were cut off.
        shards = [(path, group) for path in files for group in range(_num_row_groups(path, image_column))]
    else:
        _check_tars(files, image_column)
        shards = [(path, None) for path in files]
    others = {name: datasets.Value("int64" if name in _INTEGER_KEYS else "string") for name in keep_columns}
    arguments = {
        "generator": _iterate_shards,
        "features": datasets.Features({image_column: _UNDECODED, **others}),
        "gen_kwargs": {"shards": shards, "image_column": image_column, "keep_columns": tuple(keep_columns)},
    }
    if streaming:
        return datasets.IterableDataset.from_generator(**arguments)
    stats = [os.stat(path) for path in files]
    fingerprint = Hasher.hash(
        [shards, image_column, list(keep_columns), [(stat.st_size, stat.st_mtime_ns) for stat in stats]]
    )
    try:
        return datasets.Dataset.from_generator(**arguments, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from error
        raise


def _iterate_shards(shards: list[tuple[str, int | None]], image_column: str, keep_columns: tuple[str, ...]):
    """The images of shards, as samples of one column; a shard that cannot be read is named."""
    for path, row_group in shards:
        samples = (
            _iterate_tar(path, image_column, keep_columns)
            if row_group is None
            else ({image_column: image} for image in _iterate_parquet(path, row_group, image_column))
        )
        with naming_shard(path):
            yield from samples


@contextlib.contextmanager
def naming_shard(path: str):
    try:
        yield
    except (OSError, EOFError, tarfile.TarError, pa.ArrowException) as error:
        raise ValueError(f"The shard {path!r} cannot be read, it is truncated or damaged ({error}).") from error


def _check_tars(files: list[str], image_column: str) -> None:
    """
    Raise if the first samples show that all are not as they should be: none has an image, or most have several. A
    single one that is not is passed over when it is read.
    """
    keys, several, num_whole, num_samples = set(), [], 0, 0
    for path, sample, members in _first_samples(files):
        names = _image_keys(members, image_column)
        num_whole += len(names) == 1
        if len(names) > 1:
            several.append((path, sample, sorted(names)))
        keys.update(members)
        num_samples += 1
        if num_samples >= ROWS_LOOKED_AT and num_whole + len(several) > 0:
            break
    if several and len(several) >= num_whole:
        path, sample, names = several[0]
        raise ValueError(
            f"The sample {sample!r} of the webdataset shard {path!r} has {len(names)} images, with the keys {names}. Say "
            "which by `image_column`."
        )
    if not num_whole:
        raise ValueError(
            f"The webdataset shard {files[0]!r} holds no images"
            + (f", nor do those after it, {len(files)} in all" if len(files) > 1 else "")
            + f": its samples have the keys {sorted(keys)}, of which none is {image_column!r} or the ending of an image, "
            "such as 'jpg', 'png' or 'webp'."
        )


def _first_samples(files: list[str]):
    """Shard, name and files of at most `MAX_SKIPPED_IN_A_ROW` samples; up to a damaged shard, but for a first one."""
    count = 0
    for path in files:
        try:
            with naming_shard(path), tarfile.open(path, "r:") as tar:
                for sample, members in _samples_of(tar):
                    yield path, sample, members
                    count += 1
                    if count == MAX_SKIPPED_IN_A_ROW:
                        return
        except ValueError:  # which is said again where it is read
            if not count:
                raise
            return


def _samples_of(tar: tarfile.TarFile):
    """Name and files, by their keys, of every sample of a shard."""
    members = (member for member in tar if member.isfile() or member.islnk())
    files = (member for member in members if not os.path.basename(member.name).startswith("."))
    for sample, group in itertools.groupby(files, key=lambda member: split_key(member.name)[0]):
        yield sample, {split_key(member.name)[1]: member for member in group}


def _image_keys(members: dict, image_column: str) -> list[str]:
    return [image_column] if image_column in members else [key for key in members if key.lower() in IMAGE_EXTENSIONS]


def _iterate_tar(path: str, image_column: str, keep_columns: tuple[str, ...]):
    with tarfile.open(path, "r:") as tar:
        for sample, members in _samples_of(tar):
            keys = _image_keys(members, image_column)
            # What has no image, or several, is counted as an image that cannot be read.
            image = {"bytes": b"", "path": f"{path}/{sample}"}
            if len(keys) == 1:
                shown = f"{path}/{members[keys[0]].name}"
                image = {"bytes": read_member(tar, members[keys[0]], shown), "path": shown}
            elif keys:
                logger.warning_once(f"{path}/{sample} has the images {sorted(keys)}; `image_column` may say which.")
            others = {}
            for key in keep_columns:
                shown = f"{path}/{sample}.{key}"
                text = read_member(tar, members[key], shown).decode("utf-8", "replace") if key in members else None
                if text is not None and key in _INTEGER_KEYS:
                    try:
                        text = int(text)
                    except ValueError as error:
                        raise ValueError(f"{shown} must hold an integer, got {text!r:.100}.") from error
                others[key] = text
            yield {image_column: image, **others}
        # `tarfile` also stops at a damaged header, and where a file was cut off between two members.
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise tarfile.ReadError(f"no header and no end of the archive at byte {tar.offset:,}")


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, shown: str) -> bytes:
    """The bytes of a file of a shard; none, which counts as an image that cannot be read, if it is a tar bomb."""
    try:
        file = tar.extractfile(member)
    except KeyError as error:
        raise tarfile.ReadError(f"{member.name!r} is a link to {member.linkname!r}, which is not in it") from error
    if file is None:
        raise tarfile.ReadError(f"{member.name!r} is a link to {member.linkname!r}, which is no file")
    with file:
        size = file.seek(0, os.SEEK_END)
        if member.issparse() or size > MAX_FILE_BYTES:
            kind = "sparse file" if member.issparse() else "file"
            logger.warning_once(
                f"{shown} is a {kind} of {size:,} bytes and counts as an empty one: an image of a shard must not be "
                f"sparse, and have {MAX_FILE_BYTES:,} bytes at most."
            )
            return b""
        file.seek(0)
        return file.read()


def split_key(name: str) -> tuple[str, str]:
    """A webdataset file's sample and key: what stands before and after the first dot of its name."""
    folder, file = os.path.split(name)
    sample, _, key = file.partition(".")
    return os.path.join(folder, sample), key


def _num_row_groups(path: str, image_column: str) -> int:
    try:
        with pq.ParquetFile(path) as file:
            schema, num_row_groups = file.schema_arrow, file.num_row_groups
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"The shard {path!r} cannot be read, it is truncated or damaged ({error}).") from error
    if image_column not in schema.names:
        raise ValueError(f"The parquet file {path!r} has no column {image_column!r}; it has {schema.names}.")
    column = pa.schema([schema.field(image_column)], schema.metadata)
    feature = datasets.Features.from_arrow_schema(column)[image_column]
    if not _holds_images(feature):
        raise ValueError(
            f"The column {image_column!r} of the parquet file {path!r} must hold images (or the bytes or paths of "
            f"image files), got {feature}."
        )
    return num_row_groups


def _iterate_parquet(path: str, row_group: int, image_column: str):
    with pq.ParquetFile(path) as file:
        before = sum(file.metadata.row_group(group).num_rows for group in range(row_group))
        batches = file.iter_batches(batch_size=64, row_groups=[row_group], columns=[image_column])
        values = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for row, value in enumerate(values, before):
            if isinstance(value, bytes):
                value = {"bytes": value}
            if isinstance(value, dict) and value.get("bytes") is not None:
                # Not its own name, which `datasets` would take for a file's if there is one.
                value = {"bytes": value["bytes"], "path": f"{path}/{value.get('path') or f'row {row}'}"}
            elif isinstance(value, dict) and value.get("path") is None:
                value = None
            yield value
