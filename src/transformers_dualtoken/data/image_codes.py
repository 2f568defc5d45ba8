"""Codes of the images of any data set, made once: training on them needs neither the images nor the encoder."""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..modeling_vision_tokenizer import CODE_KINDS, DualTokenVisionTokenizer
from .chat_source import BadSampleError, ChatSource, check_bad_sample_rule
from .code_folder import FORMAT_VERSION, CodeFolder, code_dtype, read_description, shard_path
from .code_samples import CodeSample, SampleReader, ShardRows, all_image_parts, describe_source
from .image_reading import MAX_SKIPPED_IN_A_ROW
from .tokenizer_fingerprint import tokenizer_fingerprint


logger = logging.get_logger(__name__)


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

    The folder holds `shard-00000.parquet`, `shard-00001.parquet`, ..., of `samples_per_shard` rows of the sources each
    (the sources one after the other), and at last `dualtoken_codes.json`. Columns: `id`, `source`, `example` (JSON,
    images as `{"type": "image"}`), `pixel_codes` and `semantic_codes` (lists of h * w * D codes, one for an image;
    int16, or int32 where the codebook has more than 32768 codes), `num_images`.

    Killed at any moment and started again with the same arguments, it goes on after the last whole shard of every
    process, and the result is the same. The rows and their order do not depend on the number of processes either.
    Every process reads all rows of a stream, undecoded, and keeps those of its shards.

    Args:
        vision_tokenizer ([`DualTokenVisionTokenizer`]): on the device, and in the dtype, that it is to run in.
        image_processor ([`DualTokenImageProcessor`] or [`DualTokenImageProcessorPil`]): the tokenizer's.
        sources (`list[ChatSource]`): in an order of rows that is always the same. Images that come as codes are kept;
            they must be this tokenizer's. The folder becomes one source: weights are not kept, so sources that are to
            be weighed need a folder each.
        output_dir (`str` or `os.PathLike`): a new folder, or one that the same arguments began.
        batch_size (`int`, defaults to 64): images that are encoded at once.
        samples_per_shard (`int`, defaults to 2048): rows of a shard; what a killed process loses at most.
        max_samples (`int`, *optional*): take only the first so many rows of every source.
        bf16 (`bool`, defaults to `False`): encode under bfloat16 autocast, as training with `bf16` does.
        on_bad_sample (`str`, defaults to `"error"`): `"skip"` passes over samples that are faulty, or have an image that
            cannot be read, and counts them.
        num_workers (`int`, defaults to 0): processes that read images.
        rank (`int`), world_size (`int`): which of how many processes this is; shard i is written by process
            i % world_size. The processes need no connection.
        show_progress (`bool`, defaults to `False`): a bar of images.

    Raises:
        ValueError: for a faulty sample or an image that cannot be read (the sample is named), with
            `on_bad_sample="error"`; for 1000 such in a row in any case; for a folder that was begun with another
            tokenizer, other sources or other settings; for sources without a row, and arguments out of range.
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
    start = time.perf_counter()
    config = vision_tokenizer.config
    settings = {
        "format_version": FORMAT_VERSION,
        "tokenizer_fingerprint": tokenizer_fingerprint(vision_tokenizer, image_processor),
        # Training often holds frozen weights so, and codes made in float32 are the better ones.
        "bfloat16_fingerprint": tokenizer_fingerprint(vision_tokenizer, image_processor, torch.bfloat16),
        "autocast": "bfloat16" if bf16 else None,
        "grid": [config.grid_size] * 2,
        "num_depths": {kind: vision_tokenizer.quantizer(kind).config.num_depths for kind in CODE_KINDS},
        "codebook_size": {kind: vision_tokenizer.quantizer(kind).config.codebook_size for kind in CODE_KINDS},
        "samples_per_shard": samples_per_shard,
        "max_samples": max_samples,
        "sources": [describe_source(source, max_samples) for source in sources],
    }
    folder = CodeFolder(output_dir, settings)
    summary = PrecomputeSummary(description=folder.read_finished())
    if summary.description is not None:
        return summary

    done = folder.whole_shards()
    rows = ShardRows(
        sources, samples_per_shard, max_samples, lambda index: index % world_size == rank and index not in done
    )
    samples = SampleReader(sources, image_processor, settings).load(rows, num_workers)
    shard, num_bad_in_a_row = None, 0
    was_training = vision_tokenizer.training
    vision_tokenizer.eval()  # in training mode the codebooks would move
    try:
        with tqdm(unit=" images", disable=not show_progress) as progress:
            for sample in samples:
                if shard is not None and shard.index != sample.shard:
                    shard.write(folder, summary)
                    shard = None
                if shard is None:
                    encoder = _ImageEncoder(vision_tokenizer, batch_size, bf16)
                    shard = _Shard(sample.shard, [source.name for source in sources], encoder)
                num_bad_in_a_row = 0 if sample.error is None else num_bad_in_a_row + 1
                if sample.error is not None and (on_bad_sample == "error" or num_bad_in_a_row == MAX_SKIPPED_IN_A_ROW):
                    raise ValueError(_refusal(sample, num_bad_in_a_row))
                progress.update(len(sample.images))
                shard.add(sample)
            if shard is not None:
                shard.write(folder, summary)
    finally:
        vision_tokenizer.train(was_training)
    if rows.count == 0:
        raise ValueError(f"The sources {[source.name for source in sources]} hold no rows, so there is nothing to do.")
    summary.description = folder.finish(rows.count)
    summary.seconds = time.perf_counter() - start
    return summary


def _refusal(sample: CodeSample, num_in_a_row: int) -> str:
    if num_in_a_row == MAX_SKIPPED_IN_A_ROW:
        return f"{num_in_a_row:,} samples in a row cannot be used. The last is {sample.name}: {sample.error}."
    return (
        f"The sample {sample.name} cannot be used: {sample.error}. Mend it and start again (what is written stays), or "
        "pass such samples over and have them counted with `on_bad_sample` = 'skip'."
    )


class _ImageEncoder:
    """Codes of the images of a shard, in batches; equal images are encoded once."""

    def __init__(self, vision_tokenizer: DualTokenVisionTokenizer, batch_size: int, bf16: bool):
        self.vision_tokenizer, self.batch_size, self.bf16 = vision_tokenizer, batch_size, bf16
        self.numbers: dict[bytes, int] = {}
        self.waiting: list[torch.Tensor] = []
        # They stay on the device until the shard is written: to fetch them would wait for it.
        self.codes: dict[str, list[torch.Tensor]] = {kind: [] for kind in CODE_KINDS}

    def number_of(self, key: bytes, pixel_values: torch.Tensor) -> int:
        """Where in the result of `finish` the codes of an image will be."""
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers)
            self.waiting.append(pixel_values)
            if len(self.waiting) == self.batch_size:
                self._encode()
        return self.numbers[key]

    def finish(self) -> dict[str, np.ndarray]:
        """Codes `(images, h * w * D)` of each kind; no kind if there was no image."""
        if self.waiting:
            self._encode()
        return {kind: torch.cat(codes).cpu().numpy() for kind, codes in self.codes.items() if codes}

    @torch.no_grad()
    def _encode(self) -> None:
        device = self.vision_tokenizer.device
        pixel_values = torch.stack(self.waiting).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            encoded = self.vision_tokenizer.encode(pixel_values, features=False)
        for kind in CODE_KINDS:
            dtype = code_dtype(self.vision_tokenizer.quantizer(kind).config.codebook_size)
            self.codes[kind].append(encoded[f"{kind}_codes"].flatten(1).to(getattr(torch, dtype.name)))
        self.waiting = []


class _Shard:
    """The samples of a shard until it is written."""

    def __init__(self, index: int, names: list[str], encoder: _ImageEncoder):
        self.index, self.names, self.encoder = index, names, encoder
        self.columns: dict[str, list] = {name: [] for name in ("id", "source", "example", "images")}
        self.counts = [{"num_samples": 0, "num_images": 0, "num_skipped": 0} for _ in names]
        self.skipped: list[dict] = []

    def add(self, sample: CodeSample) -> None:
        counts = self.counts[sample.source]
        if sample.error is not None:
            counts["num_skipped"] += 1
            self.skipped.append({"sample": sample.name, "reason": sample.error})
            return
        counts["num_samples"] += 1
        counts["num_images"] += len(sample.images)
        self.columns["id"].append(sample.id)
        self.columns["source"].append(self.names[sample.source])
        self.columns["example"].append(sample.example)
        self.columns["images"].append(
            [
                self.encoder.number_of(image, sample.pixel_values[image]) if isinstance(image, bytes) else image
                for image in sample.images
            ]
        )

    def write(self, folder: CodeFolder, summary: PrecomputeSummary) -> None:
        encoded = self.encoder.finish()
        samples = self.columns.pop("images")
        for position, kind in enumerate(CODE_KINDS):
            self.columns[f"{kind}_codes"] = [
                [encoded[kind][image] if isinstance(image, int) else image[position] for image in images]
                for images in samples
            ]
        folder.write_shard(self.index, self.columns, self.counts, self.skipped)
        for counts in self.counts:
            summary.num_samples += counts["num_samples"]
            summary.num_images += counts["num_images"]
            summary.num_skipped += counts["num_skipped"]
        summary.num_encoded += len(self.encoder.numbers)


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
        features[f"{kind}_codes"] = datasets.List(datasets.List(datasets.Value(code_dtype(codebook_size).name)))
    features["num_images"] = datasets.Value("int32")
    dataset = datasets.load_dataset(
        "parquet",
        data_files=[str(shard_path(path, index)) for index in range(description["num_shards"])],
        split="train",
        streaming=streaming,
        features=datasets.Features(features),
    )
    shapes = {kind: (*description["grid"], depths) for kind, depths in description["num_depths"].items()}
    dtypes = {kind: code_dtype(size) for kind, size in description["codebook_size"].items()}
    to_example = partial(_with_codes, shapes=shapes, dtypes=dtypes, sizes=description["codebook_size"])
    return ChatSource(name=Path(path).resolve().name, dataset=dataset, to_example=to_example, weight=weight)


def _with_codes(row: dict, shapes: dict[str, tuple], dtypes: dict[str, np.dtype], sizes: dict[str, int]) -> dict:
    """An example from a row of a shard. Raises [`BadSampleError`] for codes that do not fit it."""
    try:
        example = json.loads(row["example"])
        parts = all_image_parts(example)
        codes = {
            kind: np.asarray(row[f"{kind}_codes"], np.int64).reshape(len(parts), *shape)
            for kind, shape in shapes.items()
        }
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise BadSampleError(f"its row of codes is damaged ({error})") from error
    for kind, found in codes.items():
        if found.size and not 0 <= found.min() <= found.max() < sizes[kind]:
            raise BadSampleError(f"its {kind} codes go from {found.min()} to {found.max()}, of {sizes[kind]}")
    for index, part in enumerate(parts):
        part |= {f"{kind}_codes": codes[kind][index].astype(dtypes[kind]) for kind in CODE_KINDS}
    return example


__all__ = ["PrecomputeSummary", "load_code_source", "precompute_codes"]
