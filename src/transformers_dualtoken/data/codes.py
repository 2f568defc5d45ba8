"""
Codes of the images of any data set, made once: training on them needs neither the images nor the encoder.

A folder of codes holds parquet shards and, once all are there, one file of JSON that describes them. Every shard also
carries, in its footer, the settings it was made with and what it counts: it is whole or absent, and several processes
need no word with each other.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
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
_TOKENIZER_SETTINGS = ("tokenizer_fingerprint", "bfloat16_fingerprint", "grid", "num_depths", "codebook_size")


@dataclass
class PrecomputeSummary:
    """
    What one process did, and the folder's description once it is finished.

    Args:
        num_samples, num_images, num_skipped (`int`): written, and passed over, by this process in this run.
        num_encoded (`int`): images that went through the encoder; equal ones of a shard do once.
        seconds (`float`): of this run.
        description (`dict`, *optional*): contents of `dualtoken_codes.json`; `None` as long as other processes have
            shards to write.
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
    Write the samples of `sources` with their images as codes; [`load_code_source`] reads them.

    The folder holds `shard-00000.parquet`, ..., of `samples_per_shard` rows of the sources each (the sources one after
    the other), and at last `dualtoken_codes.json`. Columns: `id`, `source`, `example` (JSON, images as `{"type":
    "image"}`), `pixel_codes` and `semantic_codes` (lists of h * w * D codes, one for an image; int16, or int32 where
    the codebook has more than 32768 codes), `num_images`.

    Killed at any moment and started again with the same arguments, it goes on after the last whole shard of every
    process, and the result is the same, as it is with any number of processes. Every process reads all rows of a
    stream, undecoded, and keeps those of its shards.

    Args:
        vision_tokenizer ([`DualTokenVisionTokenizer`]): on the device, and in the dtype, that it is to run in.
        image_processor ([`DualTokenImageProcessor`] or [`DualTokenImageProcessorPil`]): the tokenizer's.
        sources (`list[ChatSource]`): in an order of rows that is always the same. Images that come as codes are kept;
            they must be this tokenizer's. The folder becomes one source, without weights.
        output_dir (`str` or `os.PathLike`): a new folder, or one that the same arguments began.
        batch_size (`int`, defaults to 64): images that are encoded at once.
        samples_per_shard (`int`, defaults to 2048): rows of a shard; what a killed process loses at most.
        max_samples (`int`, *optional*): take only the first so many rows of every source.
        bf16 (`bool`, defaults to `False`): encode under bfloat16 autocast, as training with `bf16` does.
        on_bad_sample (`str`, defaults to `"error"`): `"skip"` passes over samples that are faulty, or have an image
            that cannot be read, and counts them.
        num_workers (`int`, defaults to 0): processes that read images.
        rank (`int`), world_size (`int`): which of how many processes this is; shard i is written by process
            i % world_size.
        show_progress (`bool`, defaults to `False`): a bar of images.

    Raises:
        ValueError: for a sample that cannot be used, which is named, with `on_bad_sample="error"`, and for 1000 such in
            a row in any case; for a folder that was begun with other settings; for sources without a row, and arguments
            out of range.
        RuntimeError: for a sample that fails otherwise, by a fault of the network for instance.
    """
    check_bad_sample_rule(on_bad_sample)
    for name, value in (("batch_size", batch_size), ("samples_per_shard", samples_per_shard)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` must be at least 1, or None for all, got {max_samples}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must lie between 0 and {world_size - 1}, one less than `world_size`, got {rank}.")
    if len(sources) > 1 and any(source.weight is not None for source in sources):
        logger.warning(
            f"The weights of the sources are not kept: {str(output_dir)!r} becomes one source. Give each a folder of its "
            "own to weigh them."
        )
    start, folder = time.perf_counter(), Path(output_dir)
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
    folder.mkdir(parents=True, exist_ok=True)
    done = _find_shards(folder)
    for shard in done.values():
        _check_settings(folder, _read_footer(shard)["settings"], settings)
    if (folder / DESCRIPTION_FILE).is_file():
        return PrecomputeSummary(description=read_description(folder))

    rows = _Rows(sources, settings, [index % world_size == rank for index in range(world_size)], set(done))
    samples = DataLoader(
        _Samples(sources, image_processor, settings),
        sampler=rows,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers,
    )
    summary, was_training = PrecomputeSummary(), vision_tokenizer.training
    encode = functools.partial(_encode, vision_tokenizer, bf16)
    vision_tokenizer.eval()  # in training mode the codebooks would move
    try:
        samples = tqdm(_counting_bad_ones(samples), unit=" samples", disable=not show_progress)
        for shard, group in itertools.groupby(samples, key=lambda sample: sample.shard):
            usable = _refusing_bad_ones(group, on_bad_sample)
            counts, num_encoded = _write_shard(folder, shard, usable, settings, encode, batch_size)
            for name in _COUNTS:
                setattr(summary, name, getattr(summary, name) + sum(part[name] for part in counts))
            summary.num_encoded += num_encoded
    finally:
        vision_tokenizer.train(was_training)
    if rows.count == 0:
        raise ValueError(f"The sources {[source.name for source in sources]} hold no rows, so there is nothing to do.")
    summary.description = _finish(folder, settings, rows.count)
    summary.seconds = time.perf_counter() - start
    return summary


# From rows to shards


class _Rows:
    """
    The rows of the shards that are wanted, as (shard, source, number of the row, row), one source after the other;
    `count` counts all rows, once iterated. The row is `None` where it can be asked for by its number.

    It is the sampler of a `DataLoader`: the workers read and decode images, while a stream is read here, once.
    """

    def __init__(self, sources: list[ChatSource], settings: dict, is_mine: list[bool], done: set[int]):
        self.sources, self.settings, self.is_mine, self.done, self.count = sources, settings, is_mine, done, 0

    def __iter__(self) -> Iterator[tuple[int, int, int, dict | None]]:
        self.count, limit = 0, self.settings["max_samples"]
        for number, source in enumerate(self.sources):
            is_stream = isinstance(source.dataset, datasets.IterableDataset)
            rows = source.dataset if is_stream else itertools.repeat(None, len(source.dataset))
            for index, row in enumerate(itertools.islice(rows, limit)):
                shard = self.count // self.settings["samples_per_shard"]
                self.count += 1
                if self.is_mine[shard % len(self.is_mine)] and shard not in self.done:
                    yield shard, number, index, row


@dataclass
class _Sample:
    """A row, read: `images` holds of every image the key of its `pixel_values` (3, S, S), or its codes of each kind."""

    shard: int
    source: int
    name: str
    id: str | None = None
    example: str = ""
    images: list[bytes | list[np.ndarray]] = field(default_factory=list)
    pixel_values: dict[bytes, torch.Tensor] = field(default_factory=dict)
    error: str | None = None
    num_bad_in_a_row: int = 0


class _Samples(Dataset):
    """From what `_Rows` gives to samples, in the workers."""

    def __init__(self, sources: list[ChatSource], image_processor, settings: dict):
        self.sources, self.image_processor, self.settings = sources, image_processor, settings

    def __getitem__(self, task: tuple[int, int, int, dict | None]) -> _Sample:
        shard, number, index, row = task
        source = self.sources[number]
        sample = _Sample(shard, number, f"{index} of {source.name}")
        try:
            example = source.to_example(source.dataset[index] if row is None else row)
            sample.id = example.get("id")
            if "messages" in example:
                plain = {**example, "messages": [without_image_data(message) for message in example["messages"]]}
            else:
                plain = without_image_data(example)
            sample.example = json.dumps(plain)
            for position, part in enumerate(_image_parts(example), start=1):
                sample.images.append(self._read(part, position, sample.pixel_values))
        except BadSampleError as error:
            sample.error, sample.images, sample.pixel_values = str(error), [], {}
            sample.id = sample.id or error.sample_id
        except Exception as error:
            raise RuntimeError(
                f"The sample {sample.name} cannot be read ({type(error).__name__}: {error})."
            ) from error
        if sample.id is not None:
            sample.name += f" (id {sample.id})"
        return sample

    def _read(self, part: dict, position: int, pixel_values: dict[bytes, torch.Tensor]) -> bytes | list[np.ndarray]:
        if part.get("pixel_codes") is not None:
            return [self._check_codes(part, kind, position) for kind in CODE_KINDS]
        try:
            image = read_image(part["image"])
        except (TypeError, UnreadableImageError) as error:
            name = image_name(part["image"]) or position
            raise BadSampleError(f"its image {name} cannot be used: {error}") from error
        image = self.image_processor(images=image, return_tensors="pt").pixel_values[0]
        key = hashlib.blake2b(image.numpy(), digest_size=16).digest()
        pixel_values[key] = image
        return key

    def _check_codes(self, part: dict, kind: str, position: int) -> np.ndarray:
        codes, codebook_size = np.asarray(part[f"{kind}_codes"]), self.settings["codebook_size"][kind]
        shape = (*self.settings["grid"], self.settings["num_depths"][kind])
        if codes.shape != shape or codes.dtype.kind not in "iu" or not 0 <= codes.min() <= codes.max() < codebook_size:
            raise BadSampleError(
                f"the {kind} codes of its image {position} do not fit the tokenizer: they must be integers of shape "
                f"{shape} from 0 to {codebook_size - 1}, and are {codes.dtype} of shape {codes.shape}"
            )
        return codes.ravel()


def _unchanged(sample: _Sample) -> _Sample:
    return sample


def _image_parts(example: dict) -> list[dict]:
    return image_parts(example["messages"] if "messages" in example else [example])


def _counting_bad_ones(samples: Iterable[_Sample]) -> Iterator[_Sample]:
    num_bad_in_a_row = 0
    for sample in samples:
        sample.num_bad_in_a_row = num_bad_in_a_row = 0 if sample.error is None else num_bad_in_a_row + 1
        yield sample


def _refusing_bad_ones(samples: Iterable[_Sample], on_bad_sample: str) -> Iterator[_Sample]:
    """The samples, as long as bad ones may be passed over."""
    for sample in samples:
        if sample.num_bad_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise ValueError(
                f"{MAX_SKIPPED_IN_A_ROW:,} samples in a row cannot be used. The last is {sample.name}: {sample.error}."
            )
        if sample.error is not None and on_bad_sample == "error":
            raise ValueError(
                f"The sample {sample.name} cannot be used: {sample.error}. Mend it and start again (what is written "
                "stays), or pass such samples over and have them counted with `on_bad_sample` = 'skip'."
            )
        yield sample


@torch.no_grad()
def _encode(vision_tokenizer: DualTokenVisionTokenizer, bf16: bool, images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Codes `(B, h * w * D)` of each kind, which stay on the device: to fetch them at once would wait for it."""
    pixel_values = torch.stack(images).to(vision_tokenizer.device)
    with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=bf16):
        encoded = vision_tokenizer.encode(pixel_values, features=False)
    return [encoded[f"{kind}_codes"].flatten(1).to(torch.int32) for kind in CODE_KINDS]


def _write_shard(folder: Path, index: int, samples: Iterable[_Sample], settings: dict, encode, batch_size: int):
    """Encode and write the samples of a shard; returns the counts of each source, and how many images were encoded."""
    names = [source["name"] for source in settings["sources"]]
    counts, skipped = [dict.fromkeys(_COUNTS, 0) for _ in names], []
    columns, images = {"id": [], "source": [], "example": []}, []
    numbers, waiting, encoded = {}, [], []  # equal images are encoded once
    for sample in samples:
        count = counts[sample.source]
        if sample.error is not None:
            count["num_skipped"] += 1
            skipped.append({"sample": sample.name, "reason": sample.error})
            continue
        count["num_samples"] += 1
        count["num_images"] += len(sample.images)
        for name, value in zip(columns, (sample.id, names[sample.source], sample.example)):
            columns[name].append(value)
        for key in sample.images:
            if isinstance(key, bytes) and key not in numbers:
                numbers[key] = len(numbers)
                waiting.append(sample.pixel_values[key])
                if len(waiting) == batch_size:
                    encoded.append(encode(waiting))
                    waiting = []
        images.append([numbers[image] if isinstance(image, bytes) else image for image in sample.images])
    if waiting:
        encoded.append(encode(waiting))
    arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    for position, kind in enumerate(CODE_KINDS):
        made = torch.cat([codes[position] for codes in encoded]).cpu().numpy() if encoded else None
        listed = [[made[image] if isinstance(image, int) else image[position] for image in row] for row in images]
        width = settings["grid"][0] * settings["grid"][1] * settings["num_depths"][kind]
        arrays[f"{kind}_codes"] = _nested_lists(listed, width, _code_dtype(settings["codebook_size"][kind]))
    arrays["num_images"] = pa.array(list(map(len, images)), pa.int32())
    footer = {"settings": settings, "counts": counts, "skipped": skipped[:_MAX_SKIPPED_NAMED]}
    table = pa.table(arrays).replace_schema_metadata({_FOOTER_KEY: json.dumps(footer)})
    _write_atomically(_shard_path(folder, index), lambda file: _write_table(table, file))
    return counts, len(numbers)


def _nested_lists(samples: list[list[np.ndarray]], width: int, dtype: np.dtype) -> pa.Array:
    """Codes `(width,)` of every image of every sample as a column of lists of lists."""
    codes = [image for images in samples for image in images]
    flat = np.concatenate(codes).astype(dtype, copy=False) if codes else np.zeros(0, dtype)
    images = pa.ListArray.from_arrays(pa.array(np.arange(len(codes) + 1) * width, pa.int32()), pa.array(flat))
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *map(len, samples)]), pa.int32()), images)


def _code_dtype(codebook_size: int) -> np.dtype:
    return np.dtype(np.int16 if codebook_size <= 2**15 else np.int32)


# The folder


def _describe(source: ChatSource, max_samples: int | None) -> dict:
    """What tells a source from another, fit for JSON: name, length (`None` of a stream), first and last row."""
    if isinstance(source.dataset, datasets.IterableDataset):
        return {"name": source.name, "num_rows": None, "digest": Hasher.hash(list(source.dataset.take(1)))}
    num_rows = len(source.dataset) if max_samples is None else min(len(source.dataset), max_samples)
    ends = [source.dataset[0], source.dataset[num_rows - 1]] if num_rows else []
    return {"name": source.name, "num_rows": num_rows, "digest": Hasher.hash(ends)}


def _check_settings(folder: Path, found: dict, settings: dict) -> None:
    different = [key for key in {**settings, **found} if found.get(key) != settings.get(key)]
    if different:
        listed = "; ".join(f"{key} was {found.get(key)} and is now {settings.get(key)}" for key in different)
        raise ValueError(
            f"The folder {str(folder)!r} was begun with other settings: {listed}. Give the same arguments as then, or "
            "another output folder."
        )


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
    for stale in path.parent.glob(f"{path.name}.*.tmp"):  # what a killed process left
        stale.unlink(missing_ok=True)


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
                f"{str(shards[index])!r} holds {found} rows of the sources, which now have {expected} there: the sources "
                "have changed since this folder was begun. Give another output folder."
            )
    by_source = zip(*(footer["counts"] for footer in footers.values()))
    counts = [{name: sum(part[name] for part in parts) for name in _COUNTS} for parts in by_source]
    skipped = [sample for footer in footers.values() for sample in footer["skipped"]]
    description = {
        **settings,
        "sources": [{**source, **part} for source, part in zip(settings["sources"], counts)],
        "num_shards": num_shards,
        **{name: sum(part[name] for part in counts) for name in _COUNTS},
        "skipped": skipped[:_MAX_SKIPPED_NAMED],
    }
    text = json.dumps(description, indent=2) + "\n"
    _write_atomically(folder / DESCRIPTION_FILE, lambda file: file.write(text.encode()))
    return description


def is_code_folder(path) -> bool:
    """Whether a folder holds precomputed codes, also where it is not finished."""
    folder = Path(path)
    if (folder / DESCRIPTION_FILE).is_file():
        return True
    return folder.is_dir() and any(_has_footer(shard) for shard in _find_shards(folder).values())


def _has_footer(shard: Path) -> bool:
    try:
        return bool(_read_footer(shard))
    except ValueError:  # another shard, or who reads this one, says what is wrong
        return False


def read_description(path) -> dict:
    """
    The contents of `dualtoken_codes.json` of a folder whose shards are all there.

    Raises:
        ValueError: if the folder is not there, holds no codes, is not finished, lacks a shard, or is of a later format.
    """
    folder, file = Path(path), Path(path) / DESCRIPTION_FILE
    if not folder.is_dir():
        raise ValueError(f"There is no folder of precomputed codes at {str(path)!r}.")
    if not is_code_folder(folder):
        raise ValueError(f"{str(path)!r} holds no precomputed codes: it has no {DESCRIPTION_FILE}.")
    if not file.is_file():
        raise ValueError(
            f"The precomputed codes in {str(path)!r} are not finished: {len(_find_shards(folder))} shards are there and "
            f"{DESCRIPTION_FILE}, which is written last, is not. Start precompute_codes again with the same arguments; "
            "it goes on where it was stopped."
        )
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        lacking = sorted({"format_version", "num_shards", *_TOKENIZER_SETTINGS} - set(description))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}). Delete it and start precompute_codes again.") from error
    if lacking:
        raise ValueError(f"{str(file)!r} is damaged: it lacks {', '.join(lacking)}. Start precompute_codes again.")
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"The precomputed codes in {str(path)!r} are of format {description['format_version']}; this version of "
            f"transformers-dualtoken reads format {FORMAT_VERSION}."
        )
    missing = sorted(set(range(description["num_shards"])) - set(_find_shards(folder)))
    if missing:
        raise ValueError(
            f"Of the {description['num_shards']} shards of precomputed codes in {str(path)!r}, {len(missing)} are "
            f"missing; the first is {_shard_path(folder, missing[0]).name}. Copy the folder again, or delete "
            f"{DESCRIPTION_FILE} and start precompute_codes again with the same arguments."
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
        streaming (`bool`, defaults to `False`): read while training, a shard per file; else the rows are copied to the
            cache of `datasets` once and mapped into memory.
        fingerprint (`str`, *optional*): [`tokenizer_fingerprint`] of the tokenizer that is trained with: the one that
            made the codes, or the same one rounded to bfloat16.

    Raises:
        ValueError: if the codes are another tokenizer's, the folder is not finished, or holds no codes.
    """
    description = read_description(path)
    found = description["tokenizer_fingerprint"]
    if fingerprint not in (None, found, description["bfloat16_fingerprint"]):
        raise ValueError(
            f"The precomputed codes in {str(path)!r} are of another tokenizer: they were made by {found}, and the "
            f"model's tokenizer is {fingerprint}. Make them again with this tokenizer, its image processor and its "
            "dtype (examples/precompute_codes.py), or train with the tokenizer that made them."
        )
    features = {name: datasets.Value("string") for name in ("id", "source", "example")}
    for kind, codebook_size in description["codebook_size"].items():
        features[f"{kind}_codes"] = datasets.List(datasets.List(datasets.Value(_code_dtype(codebook_size).name)))
    features["num_images"] = datasets.Value("int32")
    dataset = datasets.load_dataset(
        "parquet",
        data_files=[str(_shard_path(path, index)) for index in range(description["num_shards"])],
        split="train",
        streaming=streaming,
        features=datasets.Features(features),
    )
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


# The tokenizer


def tokenizer_fingerprint(
    vision_tokenizer: DualTokenVisionTokenizer, image_processor, dtype: torch.dtype | None = None
) -> str:
    """
    SHA-256 of everything that decides the codes of an image, as 64 hexadecimal digits.

    That is: the encoder up to the semantic layer, the down-projections, the vectors of both codebooks, the layers and
    sizes of the config, and how the image processor makes pixels of an image (its two backends count as one; they
    differ by one level of 255 at a few pixels). It stays the same within a unified model and after saving; rounded to
    bfloat16 a tokenizer has another one, since rounded weights make other codes.

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
