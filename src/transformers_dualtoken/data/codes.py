"""
Codes of the images of any data set, made once: training on them needs neither the images nor the encoder.

Every shard of a folder carries, in its footer, the settings it was made with and what it counts: it is whole or absent,
and several processes need no word with each other. Whoever finds the last one in place writes the folder's description.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..chat_dualtoken import image_parts, without_image_data
from ..image_reading import UnreadableImageError, image_name, read_image
from ..modeling_vision_tokenizer import CODE_KINDS, DualTokenVisionTokenizer
from ..sharding import gathered
from .files import load_parquet
from .samples import MAX_SKIPPED_IN_A_ROW, BadSampleError, ChatSource, check_bad_sample_rule


logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
DESCRIPTION_FILE = "dualtoken_codes.json"
_SHARD_NAME = re.compile(r"shard-(\d{5,})\.parquet")
_FOOTER_KEY = b"dualtoken_codes"
# What a stream reads at once: about 12 MB of codes at full size.
_ROWS_PER_GROUP = 512
# Skipped samples that are named, of a shard and of the folder.
_MAX_SKIPPED_NAMED = 10
_COUNTS = ("num_samples", "num_images", "num_skipped")
_NEEDED = ("tokenizer_fingerprint", "bfloat16_fingerprint", "grid", "num_depths", "codebook_size", "num_shards")


@dataclass
class PrecomputeSummary:
    """
    What one process did in this run, and `dualtoken_codes.json` once all have written their shards.

    `num_samples` and `num_images` were written, `num_skipped` samples passed over; `num_encoded` images went through
    the encoder, equal ones of a shard once.
    """

    num_samples: int = 0
    num_images: int = 0
    num_skipped: int = 0
    num_encoded: int = 0
    seconds: float = 0.0
    description: dict | None = None


def precompute_codes(
    vision_tokenizer: DualTokenVisionTokenizer,
    image_processor,
    sources: list[ChatSource],
    output_dir,
    *,
    batch_size: int = 64,
    samples_per_shard: int = 2048,
    max_samples: int | None = None,
    bf16: bool = False,
    on_bad_sample: str = "error",
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    show_progress: bool = False,
) -> PrecomputeSummary:
    """
    Write the samples of `sources`, one source after the other, with codes for images; [`load_code_source`] reads them.

    The folder holds `shard-00000.parquet`, ... and at last `dualtoken_codes.json`. Columns: `id`, `source`, `example`
    (JSON, images as `{"type": "image"}`), `pixel_codes` and `semantic_codes` (of every image h * w * D codes, int16, or
    int32 where the codebook has more than 32768), `num_images`. Killed at any moment and started again with the same
    arguments, it goes on after the last whole shard of every process; the result is the same, with any number of
    processes. Every process reads all rows of a stream, undecoded, and keeps those of its shards.

    Args:
        vision_tokenizer ([`DualTokenVisionTokenizer`]): on the device, and in the dtype, that it is to run in.
        image_processor ([`DualTokenImageProcessor`] or [`DualTokenImageProcessorPil`]): the tokenizer's.
        sources (`list[ChatSource]`): in an order of rows that is always the same. Images that come as codes, which must
            be this tokenizer's, are kept. The folder becomes one source, without weights.
        output_dir (`str` or `os.PathLike`): a new folder, or one that the same arguments began.
        batch_size (`int`, defaults to 64): images that are encoded at once.
        samples_per_shard (`int`, defaults to 2048): rows of a shard; what a killed process loses at most.
        max_samples (`int`, *optional*): take only the first so many rows of every source.
        bf16 (`bool`, defaults to `False`): encode under bfloat16 autocast, as training with `bf16` does.
        on_bad_sample (`str`, defaults to `"error"`): `"skip"` passes over and counts samples that cannot be used.
        num_workers (`int`, defaults to 0): processes that read images.
        rank (`int`), world_size (`int`): which of how many processes this is; it writes every `world_size`-th shard.
        show_progress (`bool`, defaults to `False`): a bar of samples.

    Raises:
        ValueError: for a sample that cannot be used, unless it is to be skipped, and for 1000 such in a row; for a
            folder begun with other settings; for sources without a row, and arguments out of range.
        RuntimeError: for a sample that fails otherwise, by a fault of the network for instance.
    """
    check_bad_sample_rule(on_bad_sample)
    at_least_1 = {"batch_size": batch_size, "samples_per_shard": samples_per_shard, "max_samples": max_samples}
    for name, value in at_least_1.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must lie between 0 and {world_size - 1}, one less than `world_size`, got {rank}.")
    if len(sources) > 1 and any(source.weight is not None for source in sources):
        logger.warning(
            f"{str(output_dir)!r} becomes one source, without weights. Give each source a folder of its own."
        )
    start, folder, summary = time.perf_counter(), Path(output_dir), PrecomputeSummary()
    quantizers = {kind: vision_tokenizer.quantizer(kind).config for kind in CODE_KINDS}
    settings = {
        "format_version": FORMAT_VERSION,
        "tokenizer_fingerprint": tokenizer_fingerprint(vision_tokenizer, image_processor),
        # Training often holds frozen weights so, and codes made in float32 are the better ones.
        "bfloat16_fingerprint": tokenizer_fingerprint(vision_tokenizer, image_processor, torch.bfloat16),
        "autocast": "bfloat16" if bf16 else None,
        "grid": [vision_tokenizer.config.grid_size] * 2,
        "num_depths": {kind: config.num_depths for kind, config in quantizers.items()},
        "codebook_size": {kind: config.codebook_size for kind, config in quantizers.items()},
        "samples_per_shard": samples_per_shard,
        "max_samples": max_samples,
        "sources": [_describe(source, max_samples) for source in sources],
    }
    done = _begin_or_resume(folder, settings)
    if (folder / DESCRIPTION_FILE).is_file():
        summary.description = read_description(folder)
        return summary

    rows = _Rows(sources, settings, lambda shard: shard % world_size == rank and shard not in done)
    reader = _SampleReader(sources, image_processor, settings)
    loader = DataLoader(reader, sampler=rows, batch_size=None, num_workers=num_workers)
    num_bad_in_a_row, was_training = 0, vision_tokenizer.training
    vision_tokenizer.eval()  # in training mode the codebooks would move
    try:
        progress = tqdm(loader, unit=" samples", disable=not show_progress)
        for shard, group in itertools.groupby(progress, key=lambda sample: sample.shard):
            images, samples = _ImageEncoder(vision_tokenizer, batch_size, bf16), []
            for sample in group:
                num_bad_in_a_row = 0 if sample.error is None else num_bad_in_a_row + 1
                if num_bad_in_a_row == MAX_SKIPPED_IN_A_ROW:
                    last = f"The last is {sample.name}: {sample.error}."
                    raise ValueError(f"{num_bad_in_a_row:,} samples in a row cannot be used. {last}")
                if sample.error is not None and on_bad_sample == "error":
                    advice = "Mend it and start again, or pass such samples over with `on_bad_sample` = 'skip'."
                    raise ValueError(f"The sample {sample.name} cannot be used: {sample.error}. {advice}")
                sample.images = [images.add(image) for image in sample.images]
                samples.append(sample)
            counts = _write_shard(folder, shard, samples, images.finish(), settings)
            for name in _COUNTS:
                setattr(summary, name, getattr(summary, name) + sum(part[name] for part in counts))
            summary.num_encoded += len(images.numbers)
    finally:
        vision_tokenizer.train(was_training)
    if rows.count == 0:
        raise ValueError(f"The sources {[source.name for source in sources]} hold no rows, so there is nothing to do.")
    summary.description = _finish(folder, settings, rows.count)
    summary.seconds = time.perf_counter() - start
    return summary


class _Rows:
    """
    The sampler of the loader: of the shards that are wanted (shard, source, number of the row, row of a stream, which
    is read here, once). `count` is the number of all rows, once iterated.
    """

    def __init__(self, sources: list[ChatSource], settings: dict, is_wanted: Callable[[int], bool]):
        self.sources, self.settings, self.is_wanted, self.count = sources, settings, is_wanted, 0

    def __iter__(self) -> Iterator[tuple[int, int, int, dict | None]]:
        self.count = 0
        for number, source in enumerate(self.sources):
            is_stream = isinstance(source.dataset, datasets.IterableDataset)
            rows = source.dataset if is_stream else itertools.repeat(None, len(source.dataset))
            for index, row in enumerate(itertools.islice(rows, self.settings["max_samples"])):
                shard = self.count // self.settings["samples_per_shard"]
                self.count += 1
                if self.is_wanted(shard):
                    yield shard, number, index, row


@dataclass
class _Sample:
    """A row, read: `images` holds of every image a key and `pixel_values` (3, S, S), or its codes of each kind."""

    shard: int
    source: int
    name: str
    id: str | None = None
    example: str = ""
    images: list = field(default_factory=list)
    error: str | None = None


class _SampleReader(Dataset):
    """From rows to samples, in the workers."""

    def __init__(self, sources: list[ChatSource], image_processor, settings: dict):
        self.sources, self.image_processor, self.settings = sources, image_processor, settings

    def __getitem__(self, task: tuple[int, int, int, dict | None]) -> _Sample:
        shard, number, index, row = task
        source = self.sources[number]
        sample = _Sample(shard, number, f"{index} of {source.name}")
        try:
            example = source.to_example(source.dataset[index] if row is None else row)
            sample.id = example.get("id")
            plain = {"messages": list(map(without_image_data, example["messages"]))} if "messages" in example else {}
            sample.example = json.dumps({**example, **plain} if plain else without_image_data(example))
            sample.images = [
                self._read(part, position) for position, part in enumerate(_image_parts(example), start=1)
            ]
        except BadSampleError as error:
            sample.error, sample.id = str(error), sample.id or error.sample_id
        except Exception as error:
            raise RuntimeError(f"The sample {sample.name} cannot be read ({error!r}).") from error
        if sample.id is not None:
            sample.name += f" (id {sample.id})"
        return sample

    def _read(self, part: dict, position: int) -> tuple[bytes, torch.Tensor] | list[np.ndarray]:
        if part.get("pixel_codes") is not None:
            return [self._check_codes(part, kind, position) for kind in CODE_KINDS]
        try:
            image = read_image(part["image"])
        except (TypeError, UnreadableImageError) as error:
            name = image_name(part["image"]) or position
            raise BadSampleError(f"its image {name} cannot be used: {error}") from error
        pixel_values = self.image_processor(images=image, return_tensors="pt").pixel_values[0]
        return hashlib.blake2b(pixel_values.numpy(), digest_size=16).digest(), pixel_values

    def _check_codes(self, part: dict, kind: str, position: int) -> np.ndarray:
        codes, size = np.asarray(part[f"{kind}_codes"]), self.settings["codebook_size"][kind]
        shape = (*self.settings["grid"], self.settings["num_depths"][kind])
        if codes.shape != shape or codes.dtype.kind not in "iu" or not 0 <= codes.min() <= codes.max() < size:
            raise BadSampleError(
                f"the {kind} codes of its image {position} do not fit the tokenizer: they must be integers of shape "
                f"{shape} from 0 to {size - 1}, and are {codes.dtype} of shape {codes.shape}"
            )
        return codes.ravel()


def _image_parts(example: dict) -> list[dict]:
    return image_parts(example["messages"] if "messages" in example else [example])


class _ImageEncoder:
    """Codes of the images of a shard, in batches; equal images are encoded once."""

    def __init__(self, vision_tokenizer: DualTokenVisionTokenizer, batch_size: int, bf16: bool):
        self.vision_tokenizer, self.batch_size, self.bf16 = vision_tokenizer, batch_size, bf16
        self.numbers: dict[bytes, int] = {}
        self.waiting: list[torch.Tensor] = []
        # They stay on the device until the shard is written: to fetch them would wait for it.
        self.codes: list[list[torch.Tensor]] = []

    def add(self, image: tuple[bytes, torch.Tensor] | list[np.ndarray]) -> int | list[np.ndarray]:
        """Where in the result of `finish` the codes of an image will be; codes are given back."""
        if isinstance(image, list):
            return image
        key, pixel_values = image
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers)
            self.waiting.append(pixel_values)
            if len(self.waiting) == self.batch_size:
                self._encode()
        return self.numbers[key]

    def finish(self) -> list[np.ndarray]:
        """Codes (images, h * w * D) of each kind; nothing if there was no image."""
        if self.waiting:
            self._encode()
        return [torch.cat(codes).cpu().numpy() for codes in zip(*self.codes)]

    @torch.no_grad()
    def _encode(self) -> None:
        pixel_values, self.waiting = torch.stack(self.waiting).to(self.vision_tokenizer.device), []
        with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=self.bf16):
            encoded = self.vision_tokenizer.encode(pixel_values, features=False)
        self.codes.append([encoded[f"{kind}_codes"].flatten(1).to(torch.int32) for kind in CODE_KINDS])


def _describe(source: ChatSource, max_samples: int | None) -> dict:
    """What tells a source from another, fit for JSON: name, length (`None` of a stream), first and last row."""
    if isinstance(source.dataset, datasets.IterableDataset):
        return {"name": source.name, "num_rows": None, "digest": Hasher.hash(list(source.dataset.take(1)))}
    num_rows = len(source.dataset) if max_samples is None else min(len(source.dataset), max_samples)
    ends = [source.dataset[0], source.dataset[num_rows - 1]] if num_rows else []
    return {"name": source.name, "num_rows": num_rows, "digest": Hasher.hash(ends)}


def _begin_or_resume(folder: Path, settings: dict) -> set[int]:
    """Numbers of the shards that are written already, with these settings."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = _find_shards(folder)
    for shard in shards.values():
        found = _read_footer(shard)["settings"]
        different = [key for key in {**settings, **found} if found.get(key) != settings.get(key)]
        if different:
            listed = "; ".join(f"{key} was {found.get(key)} and is now {settings.get(key)}" for key in different)
            raise ValueError(f"The folder {str(folder)!r} was begun with other settings: {listed}. Give another one.")
    return set(shards)


def _shard_path(folder, index: int) -> Path:
    return Path(folder) / f"shard-{index:05d}.parquet"


def _find_shards(folder: Path) -> dict[int, Path]:
    shards = {int(match[1]): folder / name for name in os.listdir(folder) if (match := _SHARD_NAME.fullmatch(name))}
    return dict(sorted(shards.items()))


def _read_footer(shard: Path) -> dict:
    try:
        metadata = pq.read_schema(shard).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"The shard {str(shard)!r} is damaged: {error}. Delete it and start again.") from error
    if _FOOTER_KEY not in metadata:
        raise ValueError(f"{str(shard)!r} is no shard of precomputed codes. Give an empty output folder.")
    return json.loads(metadata[_FOOTER_KEY])


def _features(settings: dict) -> datasets.Features:
    codes = {kind: datasets.Value(_code_dtype(size).name) for kind, size in settings["codebook_size"].items()}
    return datasets.Features(
        {
            **{name: datasets.Value("string") for name in ("id", "source", "example")},
            **{f"{kind}_codes": datasets.List(datasets.List(value)) for kind, value in codes.items()},
            "num_images": datasets.Value("int32"),
        }
    )


def _code_dtype(codebook_size: int) -> np.dtype:
    return np.dtype(np.int16 if codebook_size <= 2**15 else np.int32)


def _write_shard(folder: Path, index: int, samples: list[_Sample], encoded: list, settings: dict) -> list[dict]:
    """Write a shard; returns what it counts of each source."""
    names = [source["name"] for source in settings["sources"]]
    counts = [dict.fromkeys(_COUNTS, 0) for _ in names]
    columns, skipped = {name: [] for name in _features(settings)}, []
    for sample in samples:
        count = counts[sample.source]
        if sample.error is not None:
            count["num_skipped"] += 1
            skipped.append({"sample": sample.name, "reason": sample.error})
            continue
        count["num_samples"] += 1
        count["num_images"] += len(sample.images)
        codes = [
            [encoded[number][image] if isinstance(image, int) else image[number] for image in sample.images]
            for number in range(len(CODE_KINDS))
        ]
        row = (sample.id, names[sample.source], sample.example, *codes, len(sample.images))
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    for kind in CODE_KINDS:
        columns[f"{kind}_codes"] = _nested_lists(columns[f"{kind}_codes"], settings, kind)
    footer = json.dumps({"settings": settings, "counts": counts, "skipped": skipped[:_MAX_SKIPPED_NAMED]})
    table = pa.table(columns, schema=_features(settings).arrow_schema)
    table = table.replace_schema_metadata({_FOOTER_KEY: footer})
    path = _shard_path(folder, index)
    _write_atomically(path, lambda file: _write_table(table, file))
    for stale in folder.glob(f"{path.name}.*.tmp"):  # what a killed process left: a shard has one writer
        stale.unlink(missing_ok=True)
    return counts


def _nested_lists(samples: list[list[np.ndarray]], settings: dict, kind: str) -> pa.Array:
    """Codes (h * w * D,) of every image of every sample as a column of lists of lists."""
    codes, dtype = [image for images in samples for image in images], _code_dtype(settings["codebook_size"][kind])
    flat = np.concatenate(codes).astype(dtype, copy=False) if codes else np.zeros(0, dtype)
    width = settings["grid"][0] * settings["grid"][1] * settings["num_depths"][kind]
    images = pa.ListArray.from_arrays(pa.array(np.arange(len(codes) + 1) * width, pa.int32()), pa.array(flat))
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, samples)]), pa.int32()), images)


def _write_table(table: pa.Table, file) -> None:
    # Dictionaries, which parquet makes by itself, pack codes of 14 bits into 14 bits.
    with pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
        if len(table):  # `datasets` cannot read an empty row group
            writer.write_table(table, _ROWS_PER_GROUP)


def _write_atomically(path: Path, write) -> None:
    """Write by `write(file)` under another name; `path` appears when everything is on the disk."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _finish(folder: Path, settings: dict, num_rows: int) -> dict | None:
    """Write the description if the shards of all rows are there; any process may do it, and several at once."""
    size, shards = settings["samples_per_shard"], _find_shards(folder)
    num_shards = -(-num_rows // size)
    if set(range(num_shards)) - set(shards):
        return None
    footers = {index: _read_footer(shard) for index, shard in shards.items()}
    for index, footer in footers.items():
        found = sum(part["num_samples"] + part["num_skipped"] for part in footer["counts"])
        expected = min(size, max(0, num_rows - index * size))
        if found != expected:
            raise ValueError(
                f"{str(shards[index])!r} holds {found} rows of the sources, which now have {expected} there: they have "
                "changed since this folder was begun. Give another one."
            )
    by_source = zip(*(footer["counts"] for footer in footers.values()))
    counts = [{name: sum(part[name] for part in parts) for name in _COUNTS} for parts in by_source]
    description = {
        **settings,
        "sources": [{**source, **part} for source, part in zip(settings["sources"], counts)],
        "num_shards": num_shards,
        **{name: sum(part[name] for part in counts) for name in _COUNTS},
        "skipped": [sample for footer in footers.values() for sample in footer["skipped"]][:_MAX_SKIPPED_NAMED],
    }
    text = json.dumps(description, indent=2) + "\n"
    _write_atomically(folder / DESCRIPTION_FILE, lambda file: file.write(text.encode()))
    return description


def is_code_folder(path) -> bool:
    """Whether a folder holds precomputed codes, also where it is not finished."""
    folder = Path(path)
    if (folder / DESCRIPTION_FILE).is_file():
        return True
    for shard in _find_shards(folder).values() if folder.is_dir() else ():
        with contextlib.suppress(ValueError):  # another shard, or who reads this one, says what is wrong
            return bool(_read_footer(shard))
    return False


def read_description(path) -> dict:
    """`dualtoken_codes.json` of a folder that is finished, whole and of this format; else a `ValueError` says what it is."""
    folder, file = Path(path), Path(path) / DESCRIPTION_FILE
    if not folder.is_dir():
        raise ValueError(f"There is no folder of precomputed codes at {str(path)!r}.")
    if not is_code_folder(folder):
        raise ValueError(f"{str(path)!r} holds no precomputed codes: it has no {DESCRIPTION_FILE}.")
    shards = _find_shards(folder)
    if not file.is_file():
        raise ValueError(
            f"The precomputed codes in {str(path)!r} are not finished: {len(shards)} shards are there. Start "
            "precompute_codes again with the same arguments; it goes on where it was stopped."
        )
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        version, *_ = [description[name] for name in ("format_version", *_NEEDED)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error!r}). Delete it and start again.") from error
    if version != FORMAT_VERSION:
        readable = f"this version of transformers-dualtoken reads format {FORMAT_VERSION}"
        raise ValueError(f"The precomputed codes in {str(path)!r} are of format {version}; {readable}.")
    missing = sorted(set(range(description["num_shards"])) - set(shards))
    if missing:
        raise ValueError(
            f"Of the {description['num_shards']} shards of precomputed codes in {str(path)!r}, {len(missing)} are "
            f"missing; the first is {_shard_path(folder, missing[0]).name}. Copy or make them again."
        )
    return description


def load_code_source(
    path, *, weight: float | None = None, streaming: bool = False, fingerprint: str | None = None
) -> ChatSource:
    """
    The samples of a folder of [`precompute_codes`], their images as `pixel_codes` and `semantic_codes`, each
    `(h, w, D)` of int16 or int32.

    Args:
        path (`str` or `os.PathLike`): the folder; its name becomes the source's.
        weight (`float`, *optional*): in a mixture.
        streaming (`bool`, defaults to `False`): read while training, else mapped from the cache of `datasets`.
        fingerprint (`str`, *optional*): [`tokenizer_fingerprint`] of the tokenizer that is trained with. Codes of
            another one are a `ValueError`; the same one rounded to bfloat16 will do.
    """
    description = read_description(path)
    found = description["tokenizer_fingerprint"]
    if fingerprint not in (None, found, description["bfloat16_fingerprint"]):
        raise ValueError(
            f"The precomputed codes in {str(path)!r} are of another tokenizer: they were made by {found}, and the "
            f"model's tokenizer is {fingerprint}. Make them again with this tokenizer, its image processor and dtype."
        )
    shards = [_shard_path(path, index) for index in range(description["num_shards"])]
    dataset = load_parquet(shards, _features(description), streaming)
    shapes = {kind: (*description["grid"], depths) for kind, depths in description["num_depths"].items()}
    to_example = functools.partial(_with_codes, shapes=shapes, sizes=description["codebook_size"])
    return ChatSource(Path(path).resolve().name, dataset, to_example, weight)


def _with_codes(row: dict, shapes: dict[str, tuple], sizes: dict[str, int]) -> dict:
    """An example from a row of a shard. Raises [`BadSampleError`] for codes that do not fit it."""
    try:
        example = json.loads(row["example"])
        parts = _image_parts(example)
        codes = {
            kind: np.asarray(row[f"{kind}_codes"], np.int64).reshape(len(parts), *shape)
            for kind, shape in shapes.items()
        }
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise BadSampleError(f"its row of codes is damaged ({error})") from error
    for kind, found in codes.items():
        if found.size and not 0 <= found.min() <= found.max() < sizes[kind]:
            raise BadSampleError(f"its {kind} codes go from {found.min()} to {found.max()}, of {sizes[kind]}")
        for part, image in zip(parts, found):
            part[f"{kind}_codes"] = image.astype(_code_dtype(sizes[kind]))
    return example


def tokenizer_fingerprint(
    vision_tokenizer: DualTokenVisionTokenizer, image_processor, dtype: torch.dtype | None = None
) -> str:
    """
    SHA-256 of everything that decides the codes of an image, as 64 hexadecimal digits: the encoder up to the semantic
    layer, the down-projections, both codebooks, the layers and sizes of the config, and how the image processor makes
    pixels of an image (its two backends count as one). It is the same within a unified model and after saving; rounded
    to bfloat16 a tokenizer has another one, since rounded weights make other codes.

    Args:
        vision_tokenizer ([`DualTokenVisionTokenizer`]): under ZeRO-3 every rank must call, since parts are gathered.
        image_processor ([`DualTokenImageProcessor`] or [`DualTokenImageProcessorPil`]).
        dtype (`torch.dtype`, *optional*): the fingerprint that it has when its weights are loaded in this dtype.
    """
    settings = {"config": _config_settings(vision_tokenizer.config), "images": _image_settings(image_processor)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(_deciding_tensors(vision_tokenizer).items()):
        with gathered([tensor]):
            tensor = tensor.detach().cpu().clone()
        if dtype is not None and not name.endswith("_codebook"):  # which stays in float32
            tensor = tensor.to(dtype)
        # Weights that were rounded once are the same ones, whatever holds them now.
        rounded = tensor.to(torch.bfloat16)
        tensor = rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _deciding_tensors(vision_tokenizer: DualTokenVisionTokenizer) -> dict[str, torch.Tensor]:
    vision, config = vision_tokenizer.siglip.vision_model, vision_tokenizer.config
    modules = {"embeddings": vision.embeddings}
    modules |= {f"layers.{i}": vision.encoder.layers[i] for i in range(config.semantic_layer)}
    kinds = CODE_KINDS if config.shortcut_layer is None else (*CODE_KINDS, "shortcut")
    modules |= {f"{kind}_down_proj": getattr(vision_tokenizer, f"{kind}_down_proj") for kind in kinds}
    tensors = {
        f"{name}.{key}": parameter for name, module in modules.items() for key, parameter in module.named_parameters()
    }
    return tensors | {f"{kind}_codebook": vision_tokenizer.quantizer(kind).codebook.embeddings for kind in CODE_KINDS}


def _config_settings(config) -> dict:
    names = ("pixel_layer", "semantic_layer", "shortcut_layer")
    encoder_names = ("image_size", "patch_size", "num_attention_heads", "hidden_act")
    return {
        **{name: getattr(config, name) for name in names},
        # Without a shortcut its weight decides nothing.
        "shortcut_weight": None if config.shortcut_layer is None else float(config.shortcut_weight),
        **{name: getattr(config.vision_config, name) for name in encoder_names},
        "layer_norm_eps": float(config.vision_config.layer_norm_eps),
        "num_depths": {kind: getattr(config, f"{kind}_quantizer_config").num_depths for kind in CODE_KINDS},
    }


def _image_settings(image_processor) -> dict:
    """Settings that have an effect, in the form they have in JSON."""
    switches = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
    settings: dict = {name: bool(getattr(image_processor, name)) for name in switches}
    if settings["do_resize"]:
        settings["size"] = [image_processor.size["height"], image_processor.size["width"]]
        settings["resize_mode"] = image_processor.resize_mode
        settings["resample"] = int(image_processor.resample)
        if image_processor.resize_mode == "pad":
            settings["fill_color"] = list(image_processor.fill_color)
    if settings["do_rescale"]:
        settings["rescale_factor"] = float(image_processor.rescale_factor)
    if settings["do_normalize"]:
        for name in ("image_mean", "image_std"):
            settings[name] = [float(value) for value in getattr(image_processor, name)]
    return settings
