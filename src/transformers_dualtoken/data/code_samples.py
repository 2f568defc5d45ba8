"""Samples on their way to codes: rows of sources, read and decoded by worker processes, in their order."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader, Dataset

from ..chat_dualtoken import image_parts, without_image_data
from ..image_reading import UnreadableImageError, image_name, read_image
from ..modeling_vision_tokenizer import CODE_KINDS
from .chat_source import BadSampleError
from .code_folder import code_dtype


@dataclass
class CodeSample:
    """
    A row, read.

    Args:
        shard (`int`), source (`int`): numbers of the shard and of the source it belongs to.
        name (`str`): for messages.
        id (`str`, *optional*): the example's.
        example (`str`): as JSON, without what the images hold.
        images (`list`): of every image the key of its `pixel_values`, or its codes, one array for each kind.
        pixel_values (`dict`): key -> `(3, S, S)`; equal images have one key.
        error (`str`, *optional*): why it cannot be used; then it has no images.
    """

    shard: int
    source: int
    name: str
    id: str | None = None
    example: str = ""
    images: list[bytes | list[np.ndarray]] = field(default_factory=list)
    pixel_values: dict[bytes, torch.Tensor] = field(default_factory=dict)
    error: str | None = None


def all_image_parts(example: dict) -> list[dict]:
    """The image parts of an example, a chat or a document, in reading order."""
    return image_parts(example["messages"] if "messages" in example else [example])


def without_images(example: dict) -> dict:
    """A copy with `{"type": "image"}` in the place of images."""
    if "messages" in example:
        return {**example, "messages": [without_image_data(message) for message in example["messages"]]}
    return without_image_data(example)


def describe_source(source, max_samples: int | None) -> dict:
    """What tells a `ChatSource` from another, fit for JSON: name, length (`None` of a stream), first and last row."""
    if isinstance(source.dataset, datasets.IterableDataset):
        return {"name": source.name, "num_rows": None, "digest": Hasher.hash(list(source.dataset.take(1)))}
    num_rows = _num_rows(source, max_samples)
    ends = [source.dataset[0], source.dataset[num_rows - 1]] if num_rows else []
    return {"name": source.name, "num_rows": num_rows, "digest": Hasher.hash(ends)}


def _num_rows(source, max_samples: int | None) -> int:
    return len(source.dataset) if max_samples is None else min(len(source.dataset), max_samples)


class ShardRows:
    """
    The rows of the shards that are wanted, one source after the other; `count` counts all rows, once iterated.

    It is the sampler of a `DataLoader`, so the worker processes read and decode images, while a stream is read here,
    once and in order. Yielded are (shard, source, number of the row, row); the row is `None` where it can be asked for
    by its number.

    Args:
        sources (`list[ChatSource]`).
        samples_per_shard (`int`), max_samples (`int`, *optional*): as in [`precompute_codes`].
        is_wanted (`Callable`): of the number of a shard.
    """

    def __init__(self, sources: list, samples_per_shard: int, max_samples: int | None, is_wanted: Callable):
        self.sources, self.samples_per_shard, self.max_samples = sources, samples_per_shard, max_samples
        self.is_wanted, self.count = is_wanted, 0

    def __iter__(self) -> Iterator[tuple[int, int, int, dict | None]]:
        self.count = 0
        for number, source in enumerate(self.sources):
            if isinstance(source.dataset, datasets.IterableDataset):
                rows = source.dataset if self.max_samples is None else source.dataset.take(self.max_samples)
            else:
                rows = (None for _ in range(_num_rows(source, self.max_samples)))
            for index, row in enumerate(rows):
                shard = self.count // self.samples_per_shard
                self.count += 1
                if self.is_wanted(shard):
                    yield shard, number, index, row


class SampleReader(Dataset):
    """
    From rows to [`CodeSample`]s.

    Args:
        sources (`list[ChatSource]`).
        image_processor: makes `pixel_values` of images, as at inference: there is no crop.
        settings (`dict`): `grid`, and `num_depths` and `codebook_size` of each kind.
    """

    def __init__(self, sources: list, image_processor, settings: dict):
        self.sources, self.image_processor, self.settings = sources, image_processor, settings

    def load(self, rows: ShardRows, num_workers: int) -> DataLoader:
        """The samples in the order of the rows."""
        return DataLoader(self, sampler=rows, batch_size=None, collate_fn=_unchanged, num_workers=num_workers)

    def __getitem__(self, task: tuple[int, int, int, dict | None]) -> CodeSample:
        """
        Raises:
            RuntimeError: for anything that is no fault of the sample's, such as one of the network; names the sample.
        """
        shard, number, index, row = task
        source = self.sources[number]
        sample = CodeSample(shard, number, f"{index} of {source.name}")
        try:
            example = source.to_example(source.dataset[index] if row is None else row)
            sample.id = example.get("id")
            sample.example = json.dumps(without_images(example))
            for position, part in enumerate(all_image_parts(example), start=1):
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
            raise BadSampleError(
                f"its image {image_name(part['image']) or position} cannot be used: {error}"
            ) from error
        image = self.image_processor(images=image, return_tensors="pt").pixel_values[0]
        key = hashlib.blake2b(image.numpy(), digest_size=16).digest()
        pixel_values[key] = image
        return key

    def _check_codes(self, part: dict, kind: str, position: int) -> np.ndarray:
        codes = np.asarray(part[f"{kind}_codes"])
        shape = (*self.settings["grid"], self.settings["num_depths"][kind])
        codebook_size = self.settings["codebook_size"][kind]
        if codes.shape != shape or codes.dtype.kind not in "iu" or not 0 <= codes.min() <= codes.max() < codebook_size:
            raise BadSampleError(
                f"the {kind} codes of its image {position} do not fit the tokenizer: they must be integers of shape "
                f"{shape} from 0 to {codebook_size - 1}, and are {codes.dtype} of shape {codes.shape}"
            )
        return codes.astype(code_dtype(codebook_size)).ravel()


def _unchanged(sample: CodeSample) -> CodeSample:
    return sample
