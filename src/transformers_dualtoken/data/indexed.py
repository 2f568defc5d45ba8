"""Training sets of known length, whose samples are asked for by their index."""

import functools
import zlib
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import torch
import transformers
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset
from transformers.utils import logging

from ..image_reading import UnreadableImageError, image_name
from .encoding import ChatEncoder, EncodedExample
from .images import ImagePreparation, undecoded
from .samples import MAX_NAMED, MAX_SKIPPED_IN_A_ROW, BadSampleError, ChatSource, check_sources, refusal


logger = logging.get_logger(__name__)

# Skipped samples that are named in the log, and cached faults that are looked at again.
_NAMED_SAMPLES, _RECHECKED = 5, 20
# To be raised whenever the ids of an example change: it keeps those of an older version out of use.
_ENCODING_VERSION = 2
_INT, _BOOL, _STRING = (datasets.Value(dtype) for dtype in ("int32", "bool", "string"))
_ENCODED_FEATURES = datasets.Features(
    {"input_ids": datasets.List(_INT), "is_target": datasets.List(_BOOL)}
    | {"length": _INT, "cut": _BOOL, "name": _STRING, "fault": _STRING}
)


class _EpochDataset(Dataset):
    """
    Samples by index, which depend on the seed and the epoch, too, and on nothing else: a resumed run sees what an
    uninterrupted one would have seen. In the place of one that cannot be used stands the next that can.
    """

    noun = "sample"
    # Errors of `_sample` after which another one stands in.
    passed_over: tuple[type[Exception], ...] = ()

    def __init__(self, seed: int):
        self.seed, self._unusable = seed, {}
        # Shared, so that workers which live on from epoch to epoch (`persistent_workers`) see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """A sample, with `"num_skipped"` (`int`): 1 if it stands in for another one, else 0."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no {self.noun} {index} among {len(self)}.")
        tries = min(len(self), MAX_SKIPPED_IN_A_ROW)
        for step in range(tries):
            item = self._item((index + step) % len(self))
            # Known ones are not read again, for many in a row would slow down everyone who falls among them.
            reason = self._unusable.get(item)
            if reason is None:
                try:
                    # Those in between count where they are asked for.
                    return {**self._sample(item, f"{self.seed}/{self.epoch}/{index}"), "num_skipped": int(step > 0)}
                except self.passed_over as error:
                    self._unusable[item] = reason = f"The {self.noun} {self._name(item)} is skipped: {error}."
                    if len(self._unusable) <= MAX_NAMED:
                        logger.warning(reason)
        raise ValueError(f"None of the {tries:,} {self.noun}s from number {index} on can be read. The last: {reason}")


class DualTokenImageDataset(_EpochDataset):
    """
    Images of a `datasets` table as `pixel_values` `(3, S, S)`, float32, augmented as by [`ImagePreparation`], and
    captions as `input_ids` `(L,)`.

    Args:
        dataset (`datasets.Dataset`): with a column of images, decoded or not.
        image_processor, crop_scale, reducing_gap: see [`ImagePreparation`]; for evaluation `(1, 1)` and `None`.
        image_column (`str`, defaults to `"image"`).
        seed (`int`, defaults to 0).
        caption_column (`str`, *optional*): column of texts, or of lists of texts, one of which is drawn.
        tokenize (`Callable`, *optional*): texts -> ids `(T, L)`; with `caption_column`.

    Raises:
        ValueError: for a data set without rows, a column that is missing and settings out of range; by `[]`, if none
            of the next `MAX_SKIPPED_IN_A_ROW` images can be read.
    """

    noun = "image"
    passed_over = (UnreadableImageError, BadSampleError)

    def __init__(
        self,
        dataset,
        image_processor,
        image_column="image",
        crop_scale=(0.9, 1.0),
        seed=0,
        reducing_gap=2.0,
        caption_column=None,
        tokenize=None,
    ):
        super().__init__(seed)
        if not len(dataset):
            raise ValueError("The data set holds no images.")
        self.dataset = undecoded(dataset, image_column, filter(None, [caption_column]))
        self.prepare = ImagePreparation(image_processor, crop_scale, reducing_gap)
        self.image_column, self.captions = image_column, (caption_column, tokenize)

    def __len__(self) -> int:
        return len(self.dataset)

    def _item(self, place: int) -> int:
        return place

    def _sample(self, item: int, key: str) -> dict[str, torch.Tensor]:
        return self.prepare.sample(self.dataset[item], self.image_column, key, *self.captions)

    def _name(self, item: int) -> str:
        return image_name(self.dataset[item][self.image_column]) or f"number {item} of the data set"


class _EncodedSource:
    """The samples of one source that can be trained on, as ids in the cache of `datasets`, which ranks and workers share."""

    def __init__(self, source: ChatSource, encoder: ChatEncoder, on_bad_sample: str, num_workers: int):
        self.source, self.encoder = source, encoder
        encode = functools.partial(_encode_row, source=source, encoder=encoder, on_bad_sample=on_bad_sample)
        tokens = _encode_rows(encode, num_workers)
        faults = _faulty_rows(tokens)
        # A sample of them: what is mended, such as a folder of images, seldom is one row.
        if any(encode(source.dataset[int(index)], int(index))["fault"] is None for index in faults[:_RECHECKED]):
            tokens = _encode_rows(encode, num_workers, use_cache=False)
            faults = _faulty_rows(tokens)
        self.faults = [(row["name"], row["fault"]) for row in tokens.select(faults)]
        columns = tokens.with_format("numpy")
        self.rows = np.setdiff1d(np.arange(len(tokens)), faults)
        self.lengths = np.asarray(columns["length"][:], dtype=np.int64)[self.rows]
        self.num_cut = int(np.asarray(columns["cut"][:]).sum())
        self.tokens = columns.select_columns(["input_ids", "is_target"])
        if not len(self.rows):
            reason = f", the first because {self.faults[0][1]}" if self.faults else ""
            skipped = f"{len(self.faults)} were skipped{reason}"
            raise ValueError(f"The source {source.name} has no sample that can be trained on; {skipped}.")

    def name(self, index: int) -> str:
        row = int(self.rows[index])
        return self.source.sample_name(row, self.source.dataset[row])

    def sample(self, index: int, key: str) -> dict[str, torch.Tensor]:
        row = int(self.rows[index])
        tokens = self.tokens[row]
        encoded = EncodedExample(tokens["input_ids"], tokens["is_target"])
        num_images = len(self.encoder.image_starts(encoded.input_ids))
        if num_images:
            example = self.source.to_example(self.source.dataset[row])
            encoded.images = self.encoder.images(example)[:num_images]
        return self.encoder.sample(encoded, key)


def _encode_row(row: dict, index: int, source: ChatSource, encoder: ChatEncoder, on_bad_sample: str) -> dict:
    """A raw row as ids, or as what is wrong with it."""
    name = fault = None
    try:
        encoded = encoder.encode(source.to_example(row))
    except BadSampleError as error:
        name, fault = source.sample_name(index, row), str(error)
        if on_bad_sample == "error":
            raise refusal(name, error) from error
        encoded = EncodedExample(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool))
    ids = {"input_ids": encoded.input_ids, "is_target": encoded.is_target}
    return {**ids, "length": len(encoded.input_ids), "cut": encoded.cut, "name": name, "fault": fault}


def _encode_rows(encode: functools.partial, num_workers: int, use_cache: bool = True) -> datasets.Dataset:
    source, encoder = encode.keywords["source"], encode.keywords["encoder"]
    rows = source.dataset
    if not isinstance(rows, datasets.Dataset) or not len(rows):  # of none, `map` would make no columns
        encoded = [encode(row, index) for index, row in enumerate(rows)]
        columns = {name: [row[name] for row in encoded] for name in _ENCODED_FEATURES}
        return datasets.Dataset.from_dict(columns, features=_ENCODED_FEATURES)
    versions = [_ENCODING_VERSION, transformers.__version__]
    state = [versions, rows._fingerprint, source.to_example, encoder.settings, encode.keywords["on_bad_sample"]]
    return rows.with_format(None).map(
        encode,
        with_indices=True,
        remove_columns=rows.column_names,
        features=_ENCODED_FEATURES,
        num_proc=num_workers or None,
        load_from_cache_file=use_cache,
        new_fingerprint=Hasher.hash(state),
        desc=f"Tokenising {source.name}",
    )


def _faulty_rows(tokens: datasets.Dataset) -> np.ndarray:
    column = tokens.with_format("arrow")["fault"][:]
    return np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False)) if len(tokens) else np.zeros(0, dtype=int)


class DualTokenChatDataset(_EpochDataset):
    """
    Samples of one or several sources, as [`ChatEncoder`] makes them.

    All samples are tokenised at first (the ids are kept in the cache of `datasets`), and what is wrong with one is
    found then: a missing image file, a placeholder without an image, nothing to learn. Images are read when their
    sample is asked for.

    Without weights every sample comes once in an epoch. With weights an epoch has as many samples as all sources
    together, divided by weight; a source goes on in the next epoch where it stopped, and in another order whenever it
    begins anew.

    Args:
        sources (`list[ChatSource]` or `list[dict]`): of [`load_chat_sources`], or examples themselves.
        encoder ([`ChatEncoder`]).
        seed (`int`, defaults to 0).
        on_bad_sample (`str`, defaults to `"error"`): `"error"` refuses the data set and names the sample; `"skip"`
            passes such samples over and counts them; for one whose image turns out to be broken stands the next.
        num_workers (`int`, defaults to 0): processes that tokenise.

    Attributes:
        num_skipped, num_cut (`int`): samples that were passed over, and cut to `max_length`, at the beginning.

    Raises:
        ValueError: for a bad sample, which it names; for sources without a usable sample.
    """

    def __init__(
        self,
        sources: Sequence[ChatSource] | Sequence[dict],
        encoder: ChatEncoder,
        seed: int = 0,
        on_bad_sample: str = "error",
        num_workers: int = 0,
    ):
        super().__init__(seed)
        check_sources(sources, on_bad_sample)
        kinds = {isinstance(source, ChatSource) for source in sources}
        if len(kinds) > 1 or not all(isinstance(source, (ChatSource, Mapping)) for source in sources):
            found = ", ".join(sorted({type(source).__name__ for source in sources}))
            raise ValueError(f"`sources` must be ChatSources, or all of them examples (dicts), got {found}.")
        if kinds == {False}:
            sources = [ChatSource("the examples", list(sources), dict)]
        weights = [source.weight for source in sources]
        self.encoder, self.is_weighted = encoder, weights[0] is not None
        self.sources = [_EncodedSource(source, encoder, on_bad_sample, num_workers) for source in sources]
        faults = [fault for source in self.sources for fault in source.faults]
        self.num_skipped, self.num_cut = len(faults), sum(source.num_cut for source in self.sources)
        if faults:
            named = "; ".join(f"{name}: {reason}" for name, reason in faults[:_NAMED_SAMPLES])
            logger.warning(f"{len(faults)} samples are skipped, such as {named}.")
        if self.num_cut:
            logger.warning(f"{self.num_cut} samples are cut to `max_length` = {encoder.max_length} tokens.")
        self.counts = [len(source.rows) for source in self.sources]  # of an epoch
        if self.is_weighted:
            self.counts = [max(1, round(sum(self.counts) * weight / sum(weights))) for weight in weights]
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._drawn = (None, [])
        self.passed_over = (BadSampleError,) if on_bad_sample == "skip" else ()

    @property
    def digest(self) -> int:
        """A checksum of which samples these are and how long, by which ranks find out whether theirs are the same."""
        value = 0
        for source in self.sources:
            value = zlib.crc32(source.lengths.tobytes(), zlib.crc32(source.rows.tobytes(), value))
        return value

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample of this epoch, prompts included, `(len(self),)`."""
        return np.concatenate([source.lengths[items] for source, items in zip(self.sources, self._items)])

    @property
    def _items(self) -> list[np.ndarray]:
        """Of every source, which items are this epoch's, in their order, `(counts[number],)`."""
        if self._drawn[0] != self.epoch:
            self._drawn = (self.epoch, [self._choose_items(number) for number in range(len(self.sources))])
        return self._drawn[1]

    def _choose_items(self, number: int) -> np.ndarray:
        count, length = self.counts[number], len(self.sources[number].rows)
        if not self.is_weighted:
            return np.arange(count)
        cycles, items = np.divmod(self.epoch * count + np.arange(count), length)
        for cycle in np.unique(cycles):
            in_cycle = cycles == cycle
            items[in_cycle] = np.random.default_rng([self.seed, number, cycle]).permutation(length)[items[in_cycle]]
        return items

    def _item(self, place: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return number, int(self._items[number][place - int(self._starts[number])])

    def _sample(self, item: tuple[int, int], key: str) -> dict[str, torch.Tensor]:
        try:
            return self.sources[item[0]].sample(item[1], key)
        except BadSampleError as error:
            if self.passed_over:
                raise
            raise refusal(self._name(item), error) from error

    def _name(self, item: tuple[int, int]) -> str:
        return self.sources[item[0]].name(item[1])
