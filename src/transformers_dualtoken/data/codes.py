"""
Codes of the images of any data set, made once: training on them needs neither the images nor the encoder.

A shard is a range of the rows of all sources, whole or absent. The description of a folder is written first, with the
settings, and again, with counts, by whoever finds all shards in place: processes need no word with each other.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Iterable, Iterator
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
from ..field_rules import at_least
from ..image_reading import UnreadableImageError, image_name, read_image
from ..modeling_vision_tokenizer import CODE_KINDS, DualTokenVisionTokenizer
from ..sharding import gathered
from .files import load_parquet, naming_file
from .samples import MAX_NAMED, MAX_SKIPPED_IN_A_ROW, ON_BAD_SAMPLE, BadSampleError, ChatSource, refusal


logger = logging.get_logger(__name__)

FORMAT_VERSION = 2
DESCRIPTION_FILE = "dualtoken_codes.json"
_ROWS_PER_GROUP = 512  # What a stream reads at once: about 12 MB of codes at full size.
_NEEDED = ("tokenizer_fingerprint", "bfloat16_fingerprint", "grid", "num_depths", "codebook_size", "num_shards")
# Settings that decide codes, of the tokenizer, its encoder and the image processor.
_TOKENIZER_SETTINGS = ("pixel_layer", "semantic_layer", "shortcut_layer", "shortcut_weight")
_ENCODER_SETTINGS = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
_IMAGE_SETTINGS = ("do_convert_rgb", "do_resize", "size", "resize_mode", "resample", "do_rescale", "rescale_factor")
_IMAGE_SETTINGS += ("do_normalize", "image_mean", "image_std")


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
) -> dict | None:
    """
    Write the samples of `sources`, one source after the other, with codes for images; [`load_code_source`] reads them.

    The folder holds `dualtoken_codes.json` and `shard-00000.parquet`, ... with the columns `id`, `source`, `example`
    (JSON, images as `{"type": "image"}`), `pixel_codes` and `semantic_codes` (of every image h * w * D codes, int16, or
    int32 where the codebook has more than 32768), `num_images`. Killed and started again with the same arguments, it
    goes on after the shards that are there; the result is the same, with any number of processes. Every process reads
    all rows of a stream, undecoded, and keeps those of its shards.

    Args:
        vision_tokenizer ([`DualTokenVisionTokenizer`]): on the device, and in the dtype, that it is to run in.
        image_processor ([`DualTokenImageProcessor`] or [`DualTokenImageProcessorPil`]): the tokenizer's.
        sources (`list[ChatSource]`): in an order of rows that is always the same. Images that come as codes, which must
            be this tokenizer's, are kept. The folder becomes one source, without weights.
        output_dir (`str` or `os.PathLike`): a new folder, or one that the same arguments began.
        batch_size (`int`): images that are encoded at once.
        samples_per_shard (`int`): rows of a shard; what a killed process loses at most.
        max_samples (`int`, *optional*): take only the first so many rows of every source.
        bf16 (`bool`): encode under bfloat16 autocast, as training with `bf16` does.
        on_bad_sample (`str`): `"error"`, or `"skip"`, which counts samples that cannot be used and logs the first ones.
        num_workers (`int`): processes that read images.
        rank (`int`), world_size (`int`): which of how many processes this is; it writes every `world_size`-th shard.
        show_progress (`bool`): a bar of samples.

    Returns what `dualtoken_codes.json` says, with `num_samples`, `num_images` and `num_skipped`, or `None` while other
    processes have shards to write. Raises a `ValueError` for a sample that cannot be used, unless it is to be skipped,
    and for 1000 such in a row; for a folder begun with other settings, sources without a row and arguments out of
    range. A sample that fails otherwise, by a fault of the network for instance, is a `RuntimeError`.
    """
    ON_BAD_SAMPLE.check("on_bad_sample", on_bad_sample)
    at_least(1).check_given(batch_size=batch_size, samples_per_shard=samples_per_shard, max_samples=max_samples)
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must lie between 0 and {world_size - 1}, one less than `world_size`, got {rank}.")
    if len(sources) > 1 and any(source.weight is not None for source in sources):
        logger.warning(f"{str(output_dir)!r} is one source, without weights. Give each source a folder of its own.")
    folder, quantizers = Path(output_dir), {kind: vision_tokenizer.quantizer(kind).config for kind in CODE_KINDS}
    settings = {
        "format_version": FORMAT_VERSION,
        "tokenizer_fingerprint": tokenizer_fingerprint(vision_tokenizer, image_processor),
        # Training often holds frozen weights so, and codes made in float32 are the better ones.
        "bfloat16_fingerprint": tokenizer_fingerprint(vision_tokenizer, image_processor, torch.bfloat16),
        "autocast": "bfloat16" if bf16 else None,
        "grid": [vision_tokenizer.config.grid_size] * 2,
        "num_depths": {kind: q.num_depths for kind, q in quantizers.items()},
        "codebook_size": {kind: q.codebook_size for kind, q in quantizers.items()},
        "code_dtype": {kind: "int16" if q.codebook_size <= 2**15 else "int32" for kind, q in quantizers.items()},
        "samples_per_shard": samples_per_shard,
        "max_samples": max_samples,
        "sources": [_describe(source, max_samples) for source in sources],
    }
    # Shards are looked for before the description, which another process writes before them.
    done = _find_shards(folder)
    description = _begin_or_resume(folder, settings, done)
    if done and len(done) == description["num_shards"]:
        return description
    reader = _Reader(sources, image_processor, settings)
    rows = reader.rows(lambda shard: shard % world_size == rank and _shard_path(folder, shard) not in done)
    loader = DataLoader(reader, sampler=rows, batch_size=None, num_workers=num_workers, collate_fn=tuple)
    # Of an iterator, for tqdm iterates twice.
    samples = tqdm(iter(loader), unit=" samples", disable=not show_progress)
    schema, was_training = _features(settings).arrow_schema, vision_tokenizer.training
    vision_tokenizer.eval()  # in training mode the codebooks would move
    try:
        for shard, group in itertools.groupby(samples, key=lambda sample: sample[0]):
            encoded = _encode(reader.usable(group, on_bad_sample), vision_tokenizer, batch_size, bf16)
            with _atomically(_shard_path(folder, shard)) as file:
                _write_table(file, encoded, schema)
    finally:
        vision_tokenizer.train(was_training)
    if not reader.num_rows:
        raise ValueError(f"The sources {[source.name for source in sources]} hold no rows, so there is nothing to do.")
    return _finish(folder, settings, reader.num_rows)


class _Reader(Dataset):
    """Rows are listed in the main process, and made samples in the workers."""

    def __init__(self, sources: list[ChatSource], image_processor, settings: dict):
        self.sources, self.image_processor, self.settings = sources, image_processor, settings
        self.num_rows = self.num_bad = self.num_bad_in_a_row = 0

    def rows(self, is_wanted) -> Iterator[tuple[int, int, int, dict | None]]:
        """Shard, number of the source, of the row in it, and the row of a stream, which is read here, once."""
        for number, source in enumerate(self.sources):
            is_stream = isinstance(source.dataset, datasets.IterableDataset)
            rows = source.dataset if is_stream else itertools.repeat(None, len(source.dataset))
            for index, row in enumerate(itertools.islice(rows, self.settings["max_samples"])):
                shard = self.num_rows // self.settings["samples_per_shard"]
                self.num_rows += 1
                if is_wanted(shard):
                    yield shard, number, index, row

    def __getitem__(self, task: tuple[int, int, int, dict | None]) -> tuple[int, dict | ValueError]:
        """The shard, and a sample's columns with `codes` of every image or `None`, or why it cannot be used."""
        shard, number, index, row = task
        source = self.sources[number]
        try:
            row = source.dataset[index] if row is None else row
            example = source.to_example(row)
            images = [self._read(part, position) for position, part in enumerate(_image_parts(example), start=1)]
        except BadSampleError as error:
            return shard, refusal(source.sample_name(index, row), error)
        except Exception as error:
            raise RuntimeError(f"The sample {index} of {source.name} cannot be read ({error!r}).") from error
        plain = {"messages": [without_image_data(message) for message in example.get("messages", ())]}
        plain = {**example, **plain} if "messages" in example else without_image_data(example)
        columns = {"id": example.get("id"), "source": source.name, "example": json.dumps(plain)}
        columns["codes"] = [None if torch.is_tensor(image) else image for image in images]
        return shard, {**columns, "pixel_values": list(filter(torch.is_tensor, images))}

    def _read(self, part: dict, position: int) -> torch.Tensor | list[np.ndarray]:
        """Pixel values (3, S, S) of an image, or the codes of each kind that it comes as."""
        if part.get("pixel_codes") is not None:
            return [_as_codes(part[f"{kind}_codes"], kind, self.settings).ravel() for kind in CODE_KINDS]
        try:
            image = read_image(part["image"])
        except (TypeError, UnreadableImageError) as error:
            name = image_name(part["image"]) or position
            raise BadSampleError(f"its image {name} cannot be used: {error}") from error
        return self.image_processor(images=image, return_tensors="pt").pixel_values[0]

    def usable(self, samples: Iterable, on_bad_sample: str) -> Iterator[dict]:
        """The samples that can be used; raises for one that is refused and for too many in a row."""
        for _, sample in samples:
            if not isinstance(sample, ValueError):
                self.num_bad_in_a_row = 0
                yield sample
                continue
            if on_bad_sample == "error":
                raise sample
            self.num_bad, self.num_bad_in_a_row = self.num_bad + 1, self.num_bad_in_a_row + 1
            if self.num_bad_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise ValueError(f"{MAX_SKIPPED_IN_A_ROW:,} samples in a row cannot be used. The last: {sample}")
            if self.num_bad <= MAX_NAMED:
                logger.warning(f"Skipped: {sample}")


def _image_parts(example: dict) -> list[dict]:
    return image_parts(example["messages"] if "messages" in example else [example])


@torch.no_grad()
def _encode(samples: Iterable[dict], vision_tokenizer, batch_size: int, bf16: bool) -> list[dict]:
    """The rows of a shard, with codes (h * w * D,) of all images."""
    rows, batches = [], []

    def read_pixels() -> Iterator[torch.Tensor]:
        for row in samples:
            rows.append(row)
            yield from row.pop("pixel_values")

    images = read_pixels()
    while batch := list(itertools.islice(images, batch_size)):
        pixel_values = torch.stack(batch).to(vision_tokenizer.device)
        with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=bf16):
            encoded = vision_tokenizer.encode(pixel_values, features=False)
        # They stay on the device until all are there: to fetch those of a batch would wait for it.
        batches.append([encoded[f"{kind}_codes"].flatten(1).to(torch.int32) for kind in CODE_KINDS])
    encoded = zip(*(torch.cat(codes).cpu().numpy() for codes in zip(*batches)))
    for row in rows:
        codes = [given or next(encoded) for given in row.pop("codes")]
        row |= {f"{kind}_codes": [image[number] for image in codes] for number, kind in enumerate(CODE_KINDS)}
        row["num_images"] = len(codes)
    return rows


def _describe(source: ChatSource, max_samples: int | None) -> dict:
    """What tells a source from another, fit for JSON: name, length (`None` of a stream), first and last row."""
    if isinstance(source.dataset, datasets.IterableDataset):
        return {"name": source.name, "num_rows": None, "digest": Hasher.hash(list(source.dataset.take(1)))}
    num_rows = min(len(source.dataset), max_samples or len(source.dataset))
    ends = [source.dataset[0], source.dataset[num_rows - 1]] if num_rows else []
    return {"name": source.name, "num_rows": num_rows, "digest": Hasher.hash(ends)}


def _begin_or_resume(folder: Path, settings: dict, shards: set[Path]) -> dict:
    """The description, which is there before any shard."""
    if not shards:
        folder.mkdir(parents=True, exist_ok=True)
        return _write_description(folder, {**settings, "num_shards": None})
    found = _read_description(folder)
    different = [key for key in settings if found.get(key) != settings[key]]
    if different:
        listed = "; ".join(f"{key} was {found.get(key)} and is now {settings[key]}" for key in different)
        raise ValueError(f"The folder {str(folder)!r} was begun with other settings: {listed}. Give another one.")
    return found


def _shard_path(folder, index: int) -> Path:
    return Path(folder, f"shard-{index:05d}.parquet")


def _find_shards(folder) -> set[Path]:
    return set(Path(folder).glob("shard-*.parquet"))


def _features(settings: dict) -> datasets.Features:
    texts = {name: datasets.Value("string") for name in ("id", "source", "example")}
    dtypes = {kind: datasets.Value(dtype) for kind, dtype in settings["code_dtype"].items()}
    codes = {f"{kind}_codes": datasets.List(datasets.List(dtype)) for kind, dtype in dtypes.items()}
    return datasets.Features({**texts, **codes, "num_images": datasets.Value("int32")})


def _write_table(file, rows: list[dict], schema: pa.Schema) -> None:
    # Dictionaries, which parquet makes by itself, pack codes of 14 bits into 14 bits.
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        if rows:  # `datasets` cannot read an empty row group
            writer.write_table(pa.Table.from_pylist(rows, schema), _ROWS_PER_GROUP)


@contextlib.contextmanager
def _atomically(path: Path):
    """A file to write to; `path` appears when everything is on the disk."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_description(folder: Path, description: dict) -> dict:
    with _atomically(folder / DESCRIPTION_FILE) as file:
        file.write((json.dumps(description, indent=2) + "\n").encode())
    return description


def _finish(folder: Path, settings: dict, num_rows: int) -> dict | None:
    """Write the counts if the shards of all rows are there; any process may do it, and several at once."""
    shards = [_shard_path(folder, index) for index in range(-(-num_rows // settings["samples_per_shard"]))]
    others = _find_shards(folder).difference(shards)
    if others:
        raise ValueError(f"{str(max(others))!r} has no rows in the sources, which have changed. Give another folder.")
    if not all(shard.is_file() for shard in shards):
        return None
    for stale in folder.glob("shard-*.tmp"):  # what a killed process left
        stale.unlink(missing_ok=True)
    with naming_file(str(folder)):
        images = pq.read_table(shards, columns=["num_images"])["num_images"]
    counts = {"num_samples": len(images), "num_images": sum(images.to_pylist()), "num_skipped": num_rows - len(images)}
    return _write_description(folder, {**settings, "num_shards": len(shards), **counts})


def is_code_folder(path) -> bool:
    """Whether a folder holds precomputed codes, also where it is not finished."""
    return Path(path, DESCRIPTION_FILE).is_file()


def _read_description(path) -> dict:
    if not is_code_folder(path):
        raise ValueError(f"{str(path)!r} is no folder of precomputed codes: it has no {DESCRIPTION_FILE}.")
    try:
        description = json.loads(Path(path, DESCRIPTION_FILE).read_text(encoding="utf-8"))
        version, *_ = [description[name] for name in ("format_version", *_NEEDED)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{DESCRIPTION_FILE} in {str(path)!r} is damaged ({error!r}). Make it again.") from error
    if version != FORMAT_VERSION:
        readable = f"this version of transformers-dualtoken reads format {FORMAT_VERSION}"
        raise ValueError(f"The precomputed codes in {str(path)!r} are of format {version}; {readable}.")
    return description


def load_code_source(
    path, *, weight: float | None = None, streaming: bool = False, fingerprint: str | None = None
) -> ChatSource:
    """
    The samples of a folder of [`precompute_codes`], their images as `pixel_codes` and `semantic_codes`, each
    `(h, w, D)` of int16 or int32. The source has the folder's name, and `weight` in a mixture. With `streaming` it is
    read while training, else mapped from the cache of `datasets`. Codes of another tokenizer than the one of
    `fingerprint` ([`tokenizer_fingerprint`]) are a `ValueError`; the same one rounded to bfloat16 will do.
    """
    description = _read_description(path)
    shards = [_shard_path(path, index) for index in range(description["num_shards"] or 0)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        state = f"{missing[0]} is missing" if missing else f"{len(_find_shards(path))} shards are there"
        advice = "Start precompute_codes again with the same arguments; it goes on where it was stopped."
        raise ValueError(f"The precomputed codes in {str(path)!r} are not finished: {state}. {advice}")
    found = description["tokenizer_fingerprint"]
    if fingerprint not in (None, found, description["bfloat16_fingerprint"]):
        raise ValueError(
            f"The precomputed codes in {str(path)!r} are of another tokenizer: they were made by {found}, and the "
            f"model's tokenizer is {fingerprint}. Make them again with this tokenizer, its image processor and dtype."
        )
    dataset = load_parquet(shards, _features(description), streaming)
    return ChatSource(Path(path).resolve().name, dataset, functools.partial(_with_codes, settings=description), weight)


def _with_codes(row: dict, settings: dict) -> dict:
    """An example from a row of a shard. Raises [`BadSampleError`] for codes that do not fit it."""
    try:
        example = json.loads(row["example"])
        for kind in CODE_KINDS:
            for part, codes in zip(_image_parts(example), row[f"{kind}_codes"], strict=True):
                part[f"{kind}_codes"] = _as_codes(codes, kind, settings)
    except (ValueError, TypeError, KeyError) as error:
        raise BadSampleError(f"its row of codes is damaged ({error})") from error
    return example


def _as_codes(codes, kind: str, settings: dict) -> np.ndarray:
    """Codes (h, w, D) of an image, from such or from (h * w * D,), which must fit the tokenizer."""
    codes, size = np.asarray(codes), settings["codebook_size"][kind]
    shape = (*settings["grid"], settings["num_depths"][kind])
    is_shape = codes.shape in (shape, (np.prod(shape),)) and codes.dtype.kind in "iu"
    if not is_shape or not 0 <= codes.min() <= codes.max() < size:
        found = f"{codes.dtype} of shape {codes.shape}" + (f", {codes.min()} to {codes.max()}" if is_shape else "")
        raise BadSampleError(f"its {kind} codes must be integers of shape {shape} from 0 to {size - 1}, got {found}")
    return codes.reshape(shape).astype(settings["code_dtype"][kind])


def tokenizer_fingerprint(
    vision_tokenizer: DualTokenVisionTokenizer, image_processor, dtype: torch.dtype | None = None
) -> str:
    """
    SHA-256, in hexadecimal digits, of what decides the codes of an image: the encoder up to the semantic layer, the
    down-projections, both codebooks, the layers and sizes of the config, and the settings of the image processor (its
    two backends count as one). It is kept by saving and within a unified model; rounded to bfloat16 a tokenizer has
    another one. `dtype`: the one that it has when its weights are loaded so. Under ZeRO-3 every rank must call, since
    parts are gathered.
    """
    config, encoder = vision_tokenizer.config, "siglip.vision_model."
    settings = [vision_tokenizer.quantizer(kind).config.num_depths for kind in CODE_KINDS]
    settings += [getattr(config, name) for name in _TOKENIZER_SETTINGS]
    settings += [getattr(config.vision_config, name) for name in _ENCODER_SETTINGS]
    settings += [getattr(image_processor, name) for name in _IMAGE_SETTINGS]
    settings += [image_processor.fill_color] if image_processor.resize_mode == "pad" else []
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=dict).encode())  # `size` is no plain dict

    deciding = [f"{encoder}embeddings.", *(f"{kind}_down_proj." for kind in (*CODE_KINDS, "shortcut"))]
    deciding += [f"{encoder}encoder.layers.{index}." for index in range(config.semantic_layer)]
    tensors = {name: value for name, value in vision_tokenizer.named_parameters() if name.startswith(tuple(deciding))}
    tensors |= {f"{kind}_codebook": vision_tokenizer.quantizer(kind).codebook.embeddings for kind in CODE_KINDS}
    for name, tensor in sorted(tensors.items()):
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
