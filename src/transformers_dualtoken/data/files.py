"""
Where data lies and what stands there: files of a split, webdataset shards, and lines of text.

Rows are kept as they stand in their file and parsed one by one when they are used, so that a broken line is one bad
sample.
"""

import contextlib
import csv
import glob
import io
import itertools
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from transformers.utils import logging

from .samples import BadSampleError


logger = logging.get_logger(__name__)

# Files of a folder, and keys of a webdataset sample, that are images.
IMAGE_EXTENSIONS = tuple(
    "jpg jpeg jpe jfif png apng webp avif bmp gif tif tiff jp2 j2k ppm pgm pbm pnm tga ico".split()
)
_KINDS = {
    **dict.fromkeys((f".{extension}" for extension in IMAGE_EXTENSIONS), "image"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **{".txt": "txt", ".parquet": "parquet", ".tar": "tar"},
}
_COMPRESSED_KINDS = ("json", "csv", "txt")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# What `datasets` and the Hub lay beside the data.
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
# A larger file in a webdataset shard (256 MiB) is not read: no image that can be decoded needs so many bytes.
MAX_FILE_BYTES = 2**28
# The first rows say what columns there are: one alone may be incomplete.
ROWS_LOOKED_AT = 100
# A stream of rows that lie in one table has this many shards, or one for every row.
MAX_SHARDS = 1024
# Keys of a webdataset sample that are text.
_TEXT_KEYS = ("txt", "text", "caption")

_STRING, _BYTES = datasets.Value("string"), datasets.Value("large_binary")
# A line of a file, or what stands for it: JSON text.
LINE_FEATURES = datasets.Features({"line": _BYTES, "file": _STRING, "number": datasets.Value("int64")})
# A sample of a webdataset shard.
_MEMBERS = datasets.List({"name": _STRING, "bytes": _BYTES})
TAR_FEATURES = datasets.Features({"key": _STRING, "file": _STRING, "members": _MEMBERS})


class MissingDataError(FileNotFoundError, ValueError):
    """There is no data set of this path or name."""


def is_local(source: str) -> bool:
    return os.path.exists(source) or glob.has_magic(source)


def kind_of(path: str) -> str | None:
    """`"image"`, `"json"` (lines or one array), `"csv"`, `"txt"`, `"parquet"`, `"tar"` or `None`, by the ending."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in _COMPRESSIONS:
        kind = _KINDS.get(os.path.splitext(stem)[1])
        return kind if kind in _COMPRESSED_KINDS else None
    return _KINDS.get(suffix)


def may_be_hub_name(path: str) -> bool:
    return _HUB_NAME.fullmatch(path) is not None and kind_of(path) is None


def load_ready(source: str, split: str, streaming: bool, name: str | None = None):
    """A data set of the Hub, or one of `save_to_disk`; `None` where `source` is other local files."""
    if is_local(source):
        if name is not None:
            raise ValueError(f"`name` is for data sets on the Hub, and {source!r} is a local path.")
        is_saved = any(os.path.isfile(os.path.join(source, file)) for file in ("state.json", "dataset_dict.json"))
        return _load_saved(source, split, streaming) if is_saved else None
    nowhere = f"There is no file or folder at {source!r} (the working directory is {os.getcwd()!r})"
    if not may_be_hub_name(source):
        raise MissingDataError(f"{nowhere}, and it is not the name of a data set on the Hub.")
    if source in _PACKAGED_DATASETS_MODULES:
        raise MissingDataError(f"{nowhere}. {source!r} is no data set of the Hub but a reader of `datasets`.")
    try:
        return datasets.load_dataset(source, name, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        raise MissingDataError(f"{nowhere}, and no data set of this name can be had from the Hub: {error}") from error


def _load_saved(folder: str, split: str, streaming: bool):
    try:
        dataset = datasets.load_from_disk(folder)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"The saved data set {folder!r} cannot be read: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"The saved data set {folder!r} has no split {split!r}; it has {list(dataset)}.")
        dataset = dataset[split]
    return dataset.to_iterable_dataset(max(1, min(len(dataset), MAX_SHARDS))) if streaming else dataset


def find_files(source: str) -> dict[str | None, list[str]]:
    """The files at a path or pattern by kind, each sorted, without hidden ones; `None` is the kind of all others."""
    is_folder = os.path.isdir(source)
    if is_folder:
        paths = list(_walk(source))
    else:
        paths = glob.glob(source, recursive=True) if glob.has_magic(source) else []
        paths = paths or ([source] if os.path.exists(source) else [])
    by_kind: dict[str | None, list[str]] = {}
    for path in sorted(paths):
        relative = Path(os.path.relpath(path, source) if is_folder else os.path.basename(path))
        if not any(part.startswith(".") for part in relative.parts):
            kind = None if relative.name in _NO_DATA else kind_of(path)
            by_kind.setdefault(kind, []).append(path)
    return by_kind


def _walk(folder: str) -> Iterator[str]:
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
        if word.lower() in SPLITS:
            canonical = SPLITS[word.lower()]
            return split if SPLITS.get(split) == canonical else canonical
    return "train"


def choose_files(source: str, found: Mapping, kinds: Iterable[str], split: str, wanted: str) -> tuple[str, list[str]]:
    """
    Of what [`find_files`] found: the one of `kinds` that is there, and its files of the split; a file and a pattern are
    taken whole. `wanted` is what these kinds are called in a message.
    """
    chosen = {kind: found[kind] for kind in sorted(kinds) if found.get(kind)}
    if not chosen:
        paths = [path for paths in found.values() for path in paths]
        endings = sorted({Path(path).suffix or "no ending" for path in paths})
        there = f"its {len(paths)} files have the endings {endings[:10]}" if paths else "it holds no files"
        raise ValueError(f"There {wanted} at {source!r}; {there}.")
    if len(chosen) > 1:
        listed = ", ".join(f"{len(files)} {kind} files" for kind, files in chosen.items())
        raise ValueError(f"{source!r} holds {listed}. Give a pattern of one kind, such as 'folder/*.parquet'.")
    ((kind, files),) = chosen.items()
    if not os.path.isdir(source):
        return kind, files
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


def dataset_of_shards(generator: Callable, shards: list, features: datasets.Features, streaming: bool, **arguments):
    """
    `generator(shards, **arguments)` as a `datasets` data set: memory-mapped from its cache until a file changes, or
    with `streaming` read when it is used. Shards are paths, or tuples that begin with one; no argument is a list, which
    `datasets` would take for shards.
    """
    gen_kwargs = {"shards": shards, **arguments}
    if streaming:
        return datasets.IterableDataset.from_generator(generator, features=features, gen_kwargs=gen_kwargs)
    paths = dict.fromkeys(shard if isinstance(shard, str) else shard[0] for shard in shards)
    stats = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    fingerprint = Hasher.hash([generator.__qualname__, gen_kwargs, features, stats])
    try:
        return datasets.Dataset.from_generator(
            generator, features=features, gen_kwargs=gen_kwargs, fingerprint=fingerprint
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from error
        raise


def load_parquet(paths: list[str], features: datasets.Features, streaming: bool):
    paths = [glob.escape(os.fspath(path)) for path in paths]  # `datasets` takes them for patterns
    return datasets.load_dataset("parquet", data_files=paths, split="train", streaming=streaming, features=features)


@contextlib.contextmanager
def naming_file(path: str):
    """Raise a `ValueError` with the file's name for one that is truncated or damaged."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, pa.ArrowException, csv.Error) as error:
        raise ValueError(f"The file {path!r} cannot be read, it is truncated or damaged ({error}).") from error


def read_tar(path: str, choose: Callable[[list[str]], Iterable[str]]) -> Iterator[tuple[str, list, list]]:
    """
    The samples of a webdataset shard: name, the keys of all files (what stands after the first dot of a name), and
    (key, bytes) of those whose keys are chosen. A shard that just stops between two files is damaged, too.
    """
    with naming_file(path), tarfile.open(path, "r:") as tar:
        members = (member for member in tar if member.isfile() or member.islnk())
        visible = (member for member in members if not os.path.basename(member.name).startswith("."))
        for sample, group in itertools.groupby(visible, key=lambda member: _sample_and_key(member.name)[0]):
            files = [(_sample_and_key(member.name)[1], member) for member in group]
            keys = list(dict.fromkeys(key for key, _ in files))  # a file that was appended anew stands twice
            chosen = set(choose(keys))
            yield sample, keys, [(key, _read_member(tar, member, path)) for key, member in files if key in chosen]
        # `tarfile` also stops at a damaged header, and where a file was cut off between two members.
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise tarfile.ReadError(f"no header and no end of the archive at byte {tar.offset:,}")


def _sample_and_key(name: str) -> tuple[str, str]:
    folder, file = os.path.split(name)
    sample, _, key = file.partition(".")
    return os.path.join(folder, sample), key


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> bytes:
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
            shown = f"{path}/{member.name} is a {kind} of {size:,} bytes"
            logger.warning_once(f"{shown} and counts as an empty one; at most {MAX_FILE_BYTES:,} are read.")
            return b""
        file.seek(0)
        return file.read()


def iterate_rows(shards: list[str], kind: str, sample_by: str = "document") -> Iterator[dict]:
    """The rows of JSON, CSV, text or webdataset files of one kind, of `LINE_FEATURES` or `TAR_FEATURES`."""
    for path in shards:
        if kind == "tar":
            for sample, _, files in read_tar(path, _readable_keys):
                yield {"key": sample, "file": path, "members": [{"name": n, "bytes": data} for n, data in files]}
            continue
        with naming_file(path):
            for number, line in _iterate_lines(path, kind, sample_by):
                yield {"line": line, "file": path, "number": number}


def _readable_keys(keys: list[str]) -> list[str]:
    return [key for key in keys if key.rpartition(".")[2].lower() in (*IMAGE_EXTENSIONS, *_TEXT_KEYS, "json")]


def _iterate_lines(path: str, kind: str, sample_by: str) -> Iterator[tuple[int, bytes]]:
    """Number from 1, and JSON text, of the lines or of what stands for them."""
    if kind == "json" and not _is_array(path):
        # By bytes: U+2028 and its like, which JSON allows within a string, end no line.
        with fsspec.open(path, compression="infer") as file:
            lines = (line.rstrip(b"\r\n") for line in file)
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        return
    # Bytes that are no UTF-8 pass through, and make a bad sample of one row instead of ending the run.
    with (
        fsspec.open(path, compression="infer") as file,
        io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        if kind == "json":
            rows = _iterate_array(text, path)
        elif kind == "csv":
            delimiter = "\t" if ".tsv" in Path(path).name.lower() else ","
            rows = (json.dumps(row, ensure_ascii=False) for row in csv.DictReader(text, delimiter=delimiter))
        else:
            texts = [text.read()] if sample_by == "document" else (line.rstrip("\r\n") for line in text)
            is_kept = sample_by == "document"  # an empty one too: it is a bad sample
            rows = (json.dumps({"text": t}, ensure_ascii=False) if is_kept or t.strip() else "" for t in texts)
        for number, row in enumerate(rows, 1):
            if row:
                yield number, row.encode("utf-8", "surrogateescape")


def _is_array(path: str) -> bool:
    """Whether a JSON file is one array. Lines may be arrays too, but are then no rows."""
    if ".json" not in [suffix.lower() for suffix in Path(path).suffixes]:
        return False
    with fsspec.open(path, compression="infer") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _iterate_array(file: io.TextIOBase, path: str) -> Iterator[str]:
    """The items of one JSON array as text, without ever holding all of it."""
    decoder, between, chunk_size = json.JSONDecoder(), re.compile(r"[\s,]*"), 2**16
    buffer, ended = file.read(chunk_size), False
    position, number = buffer.index("[") + 1, 1
    while True:
        position = between.match(buffer, position).end()
        if buffer.startswith("]", position):
            return
        try:
            _, end = decoder.raw_decode(buffer, position)
            if end < len(buffer) or ended:  # else a number may go on in the next chunk
                yield buffer[position:end]
                position, number = end, number + 1
                continue
        except json.JSONDecodeError as error:
            if ended:
                where = f"at item {number:,} ({error.msg})"
                raise ValueError(f"The JSON array in {path!r} is truncated or damaged {where}.") from error
        # As much again as is left, lest a large item be parsed over and over.
        buffer = buffer[position:]
        more = file.read(max(chunk_size, len(buffer)))
        buffer, position, ended = buffer + more, 0, not more


def parse_row(row: Mapping, kind: str) -> Mapping:
    """
    The record of a row. Raises [`BadSampleError`] for what cannot be parsed.

    Of a `"line"` what its JSON says; of a `"tar"` sample the fields of its `json`, and a column for each other file, by
    what stands before the ending (`input_image.jpg` is `input_image`, a bare `jpg` is `image`, `txt` is `txt`; a file
    goes before a field); of `"columns"` these.
    """
    if kind == "line":
        return _parse_json(row["line"], "the row")
    if kind == "columns":
        # The metadata of a webdataset on the Hub.
        return {**row["json"], **row} if isinstance(row.get("json"), Mapping) else row
    record, columns = {}, {"__key__": row["key"]}
    for member in row["members"]:
        name, data = member["name"], member["bytes"]
        column, _, ending = name.rpartition(".")
        ending = ending.lower()
        if ending == "json":
            value = _parse_json(data, f"its {name!r}")
            if not column:
                record = value
                continue
        elif ending in _TEXT_KEYS:
            column = column or ending
            try:
                value = data.decode()
            except UnicodeDecodeError as error:
                raise BadSampleError(f"its {name!r} is no UTF-8 text ({error})") from error
        else:
            column = column or "image"
            value = {"bytes": data, "path": f"{row['file']}/{row['key']}.{name}"}
        if column in columns:
            raise BadSampleError(f"it has two files for the column {column!r}")
        columns[column] = value
    return {**record, **columns}


def _parse_json(data: bytes, what: str) -> dict:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"{what} is not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise BadSampleError(f"{what} must be a JSON object, got {type(record).__name__}")
    return record
