"""Rows of local files for unified training: kept as they stand in the file, parsed one by one when they are used."""

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
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
import fsspec
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers.utils import logging

from .chat_source import BadSampleError
from .image_sources import IMAGE_EXTENSIONS, read_member, split_key, split_of, walk


logger = logging.get_logger(__name__)

_KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "txt"}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# What `datasets` and the Hub lay beside the data.
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Keys of a webdataset sample that are text; others than these, JSON and images are not read.
_TEXT_KEYS = ("txt", "text", "caption")

# A line of a file, or what stands for it: JSON text.
LINE_FEATURES = datasets.Features(
    {"line": datasets.Value("large_binary"), "file": datasets.Value("string"), "number": datasets.Value("int64")}
)
# A sample of a webdataset shard.
TAR_FEATURES = datasets.Features(
    {
        "key": datasets.Value("string"),
        "file": datasets.Value("string"),
        "members": datasets.List({"name": datasets.Value("string"), "bytes": datasets.Value("large_binary")}),
    }
)


def kind_of(path: str) -> str | None:
    """`"json"` (lines or one array), `"csv"`, `"txt"`, `"parquet"`, `"tar"` or `None`, by the file's ending."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] in (["." + kind] for kind in ("parquet", "tar")):
        return suffixes[-1][1:]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return _KINDS.get(suffixes[-1]) if suffixes else None


def find_files(source: str, split: str) -> tuple[str, list[str]]:
    """
    The kind of files at a path or pattern, and those of the split, sorted. A pattern and a file are taken whole; in a
    folder the subfolders and the words of the file names say what belongs to a split, as in `load_image_dataset`.
    Where a folder holds `metadata.jsonl`, `.csv` or `.parquet`, these are its rows. Text files count where there are
    no others.

    Raises:
        ValueError: if there are no files of data, files of several kinds, or none of the split.
    """
    is_folder = os.path.isdir(source)
    if is_folder:
        paths = sorted(walk(source))
    else:
        paths = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else []
        paths = paths or ([source] if os.path.exists(source) else [])
    by_kind: dict[str, list[str]] = {}
    num_images = 0
    for path in paths:
        relative = Path(os.path.relpath(path, source)) if is_folder else Path(Path(path).name)
        if any(part.startswith(".") for part in relative.parts) or relative.name in _NO_DATA:
            continue
        kind = kind_of(path)
        num_images += Path(path).suffix.lower()[1:] in IMAGE_EXTENSIONS
        if kind is not None:
            by_kind.setdefault(kind, []).append(path)
    metadata = {
        kind: [path for path in files if Path(path).name.split(".")[0] == "metadata"]
        for kind, files in by_kind.items()
        if is_folder and kind in ("json", "csv", "parquet")
    }
    by_kind = {kind: files for kind, files in metadata.items() if files} or by_kind
    if len(by_kind) > 1:
        by_kind.pop("txt", None)
    if not by_kind or (list(by_kind) == ["txt"] and num_images):
        endings = sorted({Path(path).suffix or "no ending" for path in paths})
        raise ValueError(
            f"There is no data of conversations, captions or text at {source!r}: JSON lines, JSON, parquet, CSV, "
            "webdataset shards (.tar), text (.txt) without images, or images with a metadata.jsonl; "
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


def load_rows(kind: str, files: list[str], streaming: bool, sample_by: str = "document"):
    """
    The rows of JSON, CSV, text or webdataset files as a `datasets` data set of `LINE_FEATURES` or `TAR_FEATURES`:
    memory-mapped from the cache of `datasets`, or with `streaming` one shard for each file.

    Raises:
        ValueError: for a file that cannot be read, which it names; in a stream where it is read.
    """
    arguments = {
        "generator": iterate_rows,
        "features": TAR_FEATURES if kind == "tar" else LINE_FEATURES,
        "gen_kwargs": {"files": files, "kind": kind, "sample_by": sample_by},
    }
    if streaming:
        return datasets.IterableDataset.from_generator(**arguments)
    stats = [os.stat(path) for path in files]
    identity = [kind, sample_by, [(stat.st_size, stat.st_mtime_ns) for stat in stats]]
    fingerprint = Hasher.hash([*identity, [os.path.abspath(path) for path in files], files])
    try:
        return datasets.Dataset.from_generator(**arguments, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from error
        raise


def iterate_rows(files: list[str], kind: str, sample_by: str = "document") -> Iterator[dict]:
    """The rows of files of one kind, in order."""
    for path in files:
        try:
            if kind == "tar":
                yield from _iterate_tar(path)
                continue
            for number, line in _iterate_lines(path, kind, sample_by):
                yield {"line": line, "file": path, "number": number}
        except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, csv.Error) as error:
            raise ValueError(f"The file {path!r} cannot be read, it is truncated or damaged ({error}).") from error


def _iterate_lines(path: str, kind: str, sample_by: str) -> Iterator[tuple[int, bytes]]:
    """Number and JSON text of the lines, or of what stands for them, from 1."""
    if kind == "json" and not _is_array(path):
        # By bytes: U+2028 and its like, which JSON allows within a string, end no line.
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip(b"\r\n")
                if line.strip():
                    yield number, line
        return
    # Bytes that are no UTF-8 pass through, and make a bad sample of one row instead of ending the run.
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        if kind == "json":
            rows = _iterate_array(text, path)
        elif kind == "csv":
            delimiter = "\t" if ".tsv" in Path(path).name.lower() else ","
            rows = (json.dumps(row, ensure_ascii=False) for row in csv.DictReader(text, delimiter=delimiter))
        elif sample_by == "document":
            rows = (json.dumps({"text": text.read()}, ensure_ascii=False) for _ in range(1))
        else:
            lines = (line.rstrip("\r\n") for line in text)
            rows = (json.dumps({"text": line}, ensure_ascii=False) if line.strip() else "" for line in lines)
        for number, row in enumerate(rows, 1):
            if row:
                yield number, row.encode("utf-8", "surrogateescape")


def _open(path: str):
    return fsspec.open(path, "rb", compression="infer")


def _is_array(path: str) -> bool:
    """Whether a JSON file is one array. Lines may be arrays too, but are then no rows."""
    if ".json" not in [suffix.lower() for suffix in Path(path).suffixes]:
        return False
    with _open(path) as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _iterate_array(file: io.TextIOBase, path: str) -> Iterator[str]:
    """The items of one JSON array as text, without ever holding all of it."""
    decoder, between, chunk_size = json.JSONDecoder(), re.compile(r"[\s,]*"), 2**16
    buffer, ended = file.read(chunk_size), False
    position = buffer.index("[") + 1
    number = 1
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
                raise ValueError(
                    f"The JSON array in {path!r} is truncated or damaged at item {number:,} ({error.msg})."
                ) from error
        # As much again as is left, lest a large item be parsed over and over.
        buffer = buffer[position:]
        more = file.read(max(chunk_size, len(buffer)))
        buffer, position, ended = buffer + more, 0, not more


def _iterate_tar(path: str) -> Iterator[dict]:
    with tarfile.open(path, "r:") as tar:
        members = (member for member in tar if member.isfile() or member.islnk())
        files = (member for member in members if not os.path.basename(member.name).startswith("."))
        for sample, group in itertools.groupby(files, key=lambda member: split_key(member.name)[0]):
            kept = []
            for member in group:
                name = split_key(member.name)[1]
                if name.rpartition(".")[2].lower() in (*IMAGE_EXTENSIONS, *_TEXT_KEYS, "json"):
                    kept.append({"name": name, "bytes": read_member(tar, member, f"{path}/{member.name}")})
            yield {"key": sample, "file": path, "members": kept}
        # `tarfile` also stops at a damaged header, and where a file was cut off between two members.
        tar.fileobj.seek(tar.offset)
        end = tar.fileobj.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise tarfile.ReadError(f"no header and no end of the archive at byte {tar.offset:,}")


def parse_line(row: Mapping) -> dict:
    """The record of a row of `LINE_FEATURES`. Raises [`BadSampleError`]."""
    return _parse_json(row["line"], "the row")


def parse_tar_sample(row: Mapping) -> dict:
    """
    The record of a row of `TAR_FEATURES`: the fields of its `json`, and a column for each other file, by what stands
    before the ending: `input_image.jpg` is `input_image`, a bare `jpg` is `image`, `txt` is `txt`. A file goes before
    a field. Raises [`BadSampleError`].
    """
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
