"""
Codes of the images of any data set, made once: training on them needs neither the images nor the encoder.

A shard is a range of the rows of all sources, whole or absent. The description is written before any shard: processes
need no word with each other.
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
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..chat_dualtoken import image_parts, part_image, without_image_data
from ..field_rules import at_least, within
from ..modeling_vision_tokenizer import CODE_KINDS, DualTokenVisionTokenizer
from ..sharding import gathered
from .encoding import read_pixel_values
from .files import load_parquet, naming_file
from .samples import MAX_NAMED, MAX_SKIPPED_IN_A_ROW, ON_BAD_SAMPLE, BadSampleError, ChatSource, refusal


logger = logging.get_logger(__name__)

FORMAT_VERSION = 2
DESCRIPTION_FILE = "dualtoken_codes.json"
_ROWS_PER_GROUP = 512  # What a stream reads at once: about 12 MB of codes at full size.
_NEEDED = ("format_version", "num_shards", "tokenizer_fingerprint", "bfloat16_fingerprint")
_NEEDED += ("grid", "num_depths", "codebook_size", "code_dtype")
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
    goes on after the shards that are there; the result is the same, with any number of processes.

    Args:
        vision_tokenizer ([`DualTokenVisionTokenizer`]): on the device, and in the dtype, that it is to run in.
        image_processor ([`DualTokenImageProcessor`] or [`DualTokenImageProcessorPil`]): the tokenizer's.
        sources (`list[ChatSource]`): no streams and no codes. The folder becomes one source, without weights.
        output_dir (`str` or `os.PathLike`): a new folder, or one that the same arguments began.
        batch_size (`int`): images that are encoded at once.
        samples_per_shard (`int`): what a killed process loses at most.
        bf16 (`bool`): encode under bfloat16 autocast, as training with `bf16` does.
        on_bad_sample (`str`): `"error"`, or `"skip"`, which counts samples that cannot be used and logs the first ones.
        num_workers (`int`): processes that read images.
        rank (`int`), world_size (`int`): which of how many processes this is; it writes every `world_size`-th shard.
        show_progress (`bool`): a bar of samples.

    Returns what `dualtoken_codes.json` says and `num_samples`, `num_images` and `num_skipped`, or `None` while other
    processes have shards to write. Raises a `ValueError` for a sample that cannot be used, unless it is to be skipped,
    and for 1000 such in a row; for a folder begun with other settings, sources without a row and arguments out of
    range. A sample that fails otherwise, by a fault of the network for instance, is a `RuntimeError`.
    """
    ON_BAD_SAMPLE.check("on_bad_sample", on_bad_sample)
    at_least(1).check_given(batch_size=batch_size, samples_per_shard=samples_per_shard)
    within(int, 0, world_size - 1).check("rank", rank)
    if any(isinstance(source.dataset, datasets.IterableDataset) for source in sources):
        raise ValueError("Codes are made of data sets and not of streams: load the sources without `streaming`.")
    if len(sources) > 1 and any(source.weight is not None for source in sources):
        logger.warning(f"{str(output_dir)!r} is one source, without weights. Give each source a folder of its own.")
    samples = [_Samples(source, image_processor) for source in sources]
    num_rows = sum(map(len, samples))
    columns = {"example", "num_images"}  # of a folder that this function wrote
    has_codes = [source.name for source in sources if columns <= set(source.dataset.column_names or ())]
    if has_codes:
        raise ValueError(f"The sources {has_codes} hold codes already: give the images they were made of.")
    if not num_rows:
        raise ValueError(f"The sources {[source.name for source in sources]} hold no rows, so there is nothing to do.")
    folder, quantizers = Path(output_dir), {kind: vision_tokenizer.quantizer(kind).config for kind in CODE_KINDS}
    starts = range(0, num_rows, samples_per_shard)
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
        "sources": [part.describe() for part in samples],
        "num_shards": len(starts),
    }
    shards = _shard_paths(folder, len(starts))
    # Shards are looked for before the description, which another process writes before them.
    done = [shard.is_file() for shard in shards]
    _begin_or_resume(folder, settings, any(done))
    wanted = [number for number in range(rank, len(shards), world_size) if not done[number]]
    rows = [range(starts[number], min(starts[number] + samples_per_shard, num_rows)) for number in wanted]
    options = {"sampler": itertools.chain.from_iterable(rows), "num_workers": num_workers, "collate_fn": tuple}
    loader = DataLoader(ConcatDataset(samples), batch_size=None, **options)
    # Of an iterator, for tqdm iterates twice.
    bar = tqdm(iter(loader), unit=" samples", total=sum(map(len, rows)), disable=not show_progress)
    usable, schema = _usable(bar, on_bad_sample), _features(settings).arrow_schema
    was_training = vision_tokenizer.training
    vision_tokenizer.eval()  # in training mode the codebooks would move
    try:
        for number, of_shard in zip(wanted, rows):
            encoded = _encode(itertools.islice(usable, len(of_shard)), vision_tokenizer, batch_size, bf16)
            # Dictionaries, which parquet makes by itself, pack codes of 14 bits into 14 bits.
            with _atomically(shards[number]) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
                if encoded:  # `datasets` cannot read an empty row group
                    writer.write_table(pa.Table.from_pylist(encoded, schema), _ROWS_PER_GROUP)
    finally:
        vision_tokenizer.train(was_training)
    if not all(shard.is_file() for shard in shards):
        return None
    for stale in folder.glob("shard-*.tmp"):  # what a killed process left
        stale.unlink(missing_ok=True)
    with naming_file(str(folder)):
        images = pq.read_table(shards, columns=["num_images"])["num_images"].to_pylist()
    counts = {"num_samples": len(images), "num_images": sum(images), "num_skipped": num_rows - len(images)}
    return {**settings, **counts}


class _Samples(Dataset):
    """Of every row of a source its columns, with `pixel_values` (images, 3, S, S), and why it cannot be used, or `None`."""

    def __init__(self, source: ChatSource, image_processor):
        self.source, self.image_processor = source, image_processor

    def __len__(self) -> int:
        return len(self.source.dataset)

    def describe(self) -> dict:
        """What tells a source from another, fit for JSON: name, length, first and last row."""
        ends = [self.source.dataset[0], self.source.dataset[len(self) - 1]] if len(self) else []
        return {"name": self.source.name, "num_rows": len(self), "digest": Hasher.hash(ends)}

    def __getitem__(self, index: int) -> tuple[dict | None, ValueError | None]:
        try:
            row = self.source.dataset[index]
            example = self.source.to_example(row)
            images = map(part_image, _image_parts(example))
            pixel_values = [read_pixel_values(image, self.image_processor) for image in images]
        except BadSampleError as error:
            return None, refusal(self.source.sample_name(index, row), error)
        except Exception as error:
            raise RuntimeError(f"The sample {index} of {self.source.name} cannot be read ({error!r}).") from error
        plain = [without_image_data(message) for message in example.get("messages", [example])]
        plain = {**example, "messages": plain} if "messages" in example else plain[0]
        columns = {"id": example.get("id"), "source": self.source.name, "example": json.dumps(plain)}
        return {**columns, "num_images": len(pixel_values), "pixel_values": pixel_values}, None


def _usable(samples: Iterable, on_bad_sample: str) -> Iterator[dict | None]:
    """Samples, `None` for those that are skipped; raises for one that is refused and for too many in a row."""
    num_bad = num_in_a_row = 0
    for sample, reason in samples:
        if reason is None:
            num_in_a_row = 0
        elif on_bad_sample == "error":
            raise reason
        else:
            num_bad, num_in_a_row = num_bad + 1, num_in_a_row + 1
            if num_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise ValueError(f"{MAX_SKIPPED_IN_A_ROW:,} samples in a row cannot be used. The last: {reason}")
            if num_bad <= MAX_NAMED:
                logger.warning(f"Skipped: {reason}")
        yield sample


def _image_parts(example: dict) -> list[dict]:
    return image_parts(example.get("messages", [example]))


@torch.no_grad()
def _encode(samples: Iterable[dict | None], vision_tokenizer, batch_size: int, bf16: bool) -> list[dict]:
    """The rows of a shard, with codes (h * w * D,) of all images."""
    rows, batches = [], {kind: [] for kind in CODE_KINDS}

    def read_pixels() -> Iterator[torch.Tensor]:
        for row in filter(None, samples):
            rows.append(row)
            yield from row.pop("pixel_values")

    images = read_pixels()
    while batch := list(itertools.islice(images, batch_size)):
        pixel_values = torch.stack(batch).to(vision_tokenizer.device)
        with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=bf16):
            encoded = vision_tokenizer.encode(pixel_values, features=False)
        # They stay on the device until all are there: to fetch those of a batch would wait for it.
        for kind, of_kind in batches.items():
            of_kind.append(encoded[f"{kind}_codes"].flatten(1).to(torch.int32))
    for kind, of_kind in batches.items():
        codes = itertools.chain.from_iterable(batch.cpu().numpy() for batch in of_kind)
        for row in rows:
            row[f"{kind}_codes"] = list(itertools.islice(codes, row["num_images"]))
    return rows


def _shard_paths(folder, count: int) -> list[Path]:
    return [Path(folder, f"shard-{number:05d}.parquet") for number in range(count)]


def _features(settings: dict) -> datasets.Features:
    texts = {name: datasets.Value("string") for name in ("id", "source", "example")}
    dtypes = {kind: datasets.Value(dtype) for kind, dtype in settings["code_dtype"].items()}
    codes = {f"{kind}_codes": datasets.List(datasets.List(dtype)) for kind, dtype in dtypes.items()}
    return datasets.Features({**texts, **codes, "num_images": datasets.Value("int32")})


@contextlib.contextmanager
def _atomically(path: Path):
    """A file to write to; `path` appears when everything is on the disk."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _begin_or_resume(folder: Path, settings: dict, is_begun: bool) -> None:
    """Write the description, or raise for a folder that was begun with other settings."""
    if not is_begun:
        folder.mkdir(parents=True, exist_ok=True)
        with _atomically(folder / DESCRIPTION_FILE) as file:
            file.write((json.dumps(settings, indent=2) + "\n").encode())
        return
    found = _read_description(folder)
    different = [key for key in settings if found.get(key) != settings[key]]
    if different:
        listed = "; ".join(f"{key} was {found.get(key)} and is now {settings[key]}" for key in different)
        raise ValueError(f"The folder {str(folder)!r} was begun with other settings: {listed}. Give another one.")


def is_code_folder(path) -> bool:
    """Whether a folder holds precomputed codes, also where it is not finished."""
    return Path(path, DESCRIPTION_FILE).is_file()


def _read_description(path) -> dict:
    if not is_code_folder(path):
        raise ValueError(f"{str(path)!r} is no folder of precomputed codes: it has no {DESCRIPTION_FILE}.")
    try:
        description = json.loads(Path(path, DESCRIPTION_FILE).read_text(encoding="utf-8"))
        version, *_ = [description[name] for name in _NEEDED]
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
    shards = _shard_paths(path, description["num_shards"] or 0)
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        state = f"of {len(shards)} shards are missing {missing[:3]}"
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
    """An example from a row of a shard, with codes (h, w, D). Raises [`BadSampleError`] for codes that do not fit it."""
    try:
        example = json.loads(row["example"])
        for kind in CODE_KINDS:
            shape, size = (*settings["grid"], settings["num_depths"][kind]), settings["codebook_size"][kind]
            for part, codes in zip(_image_parts(example), row[f"{kind}_codes"], strict=True):
                codes = np.asarray(codes).reshape(shape)
                if not 0 <= codes.min() <= codes.max() < size:
                    values = f"from 0 to {size - 1}, got {codes.min()} to {codes.max()}"
                    raise ValueError(f"its {kind} codes must be {values}")
                part[f"{kind}_codes"] = codes.astype(settings["code_dtype"][kind])
    except (ValueError, TypeError, KeyError) as error:
        raise BadSampleError(f"its row of codes is damaged ({error})") from error
    return example


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
    settings += [config.decoder_norm_num_groups] if config.projection_type == "resnet" else []
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
