"""Conversations and documents for unified training, from data sets of known length."""

import zlib
from collections.abc import Mapping, Sequence

import datasets
import numpy as np
import torch
import transformers
from datasets.fingerprint import Hasher
from torch.utils.data import Dataset
from transformers.utils import logging

from .chat_encoding import ChatEncoder, EncodedExample
from .chat_source import BadSampleError, ChatSource, check_bad_sample_rule, check_weights, refusal, sample_name
from .image_reading import MAX_NAMED, MAX_SKIPPED_IN_A_ROW


logger = logging.get_logger(__name__)

# So many skipped samples are named in the log; the others are counted.
_NAMED_SAMPLES = 5
# So many cached faults are looked at again.
_RECHECKED = 20
# To be raised whenever the ids of an example change: it keeps those of an older version out of use.
_ENCODING_VERSION = 2


class _EncodedSource:
    """
    The samples of one source that can be trained on, as ids; what its images hold stays where it is.

    The ids lie beside the source in the cache of `datasets`, mapped into memory: ranks and workers share them, and a run
    that is started again finds them there.
    """

    def __init__(self, source: ChatSource, encoder: ChatEncoder, on_bad_sample: str, num_workers: int):
        self.source, self.encoder = source, encoder
        encode = _EncodeRow(source, encoder, on_bad_sample)
        tokens = encode.all_rows(num_workers)
        faults = _faulty_rows(tokens)
        # A sample of them: what is mended, such as a folder of images, seldom is one row.
        if any(encode(source.dataset[int(index)], int(index))["fault"] is None for index in faults[:_RECHECKED]):
            tokens = encode.all_rows(num_workers, use_cache=False)
            faults = _faulty_rows(tokens)
        self.faults = [(row["name"], row["fault"]) for row in tokens.select(faults)]
        columns = tokens.with_format("numpy")
        self.rows = np.setdiff1d(np.arange(len(tokens)), faults)
        self.lengths = np.asarray(columns["length"][:], dtype=np.int64)[self.rows]
        self.num_cut = int(np.asarray(columns["cut"][:]).sum())
        self.tokens = columns.select_columns(["input_ids", "is_target"])

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        row = int(self.rows[index])
        return sample_name(self.source, row, self.source.dataset[row])

    def sample(self, index: int, key: str) -> dict[str, torch.Tensor]:
        row = int(self.rows[index])
        tokens = self.tokens[row]
        encoded = EncodedExample(tokens["input_ids"], tokens["is_target"])
        num_images = len(self.encoder.image_starts(encoded.input_ids))
        if num_images:
            example = self.source.to_example(self.source.dataset[row])
            encoded.images = self.encoder.images(example)[:num_images]
        return self.encoder.sample(encoded, key)


def _faulty_rows(tokens: datasets.Dataset) -> np.ndarray:
    column = tokens.with_format("arrow")["fault"][:]
    return np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False)) if len(tokens) else np.zeros(0, dtype=int)


class _EncodeRow:
    """A raw row of a source as a row of ids, or of what is wrong with it."""

    FEATURES = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "is_target": datasets.List(datasets.Value("bool")),
            "length": datasets.Value("int32"),
            "cut": datasets.Value("bool"),
            "name": datasets.Value("string"),
            "fault": datasets.Value("string"),
        }
    )

    def __init__(self, source: ChatSource, encoder: ChatEncoder, on_bad_sample: str):
        self.source, self.encoder, self.on_bad_sample = source, encoder, on_bad_sample

    def __call__(self, raw: dict, index: int) -> dict:
        name = fault = None
        try:
            encoded = self.encoder.encode(self.source.to_example(raw))
        except BadSampleError as error:
            name, fault = sample_name(self.source, index, raw), str(error)
            if self.on_bad_sample == "error":
                raise refusal(name, error) from error
            encoded = EncodedExample(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool))
        return {
            "input_ids": encoded.input_ids,
            "is_target": encoded.is_target,
            "length": len(encoded.input_ids),
            "cut": encoded.cut,
            "name": name,
            "fault": fault,
        }

    def all_rows(self, num_workers: int, use_cache: bool = True) -> datasets.Dataset:
        rows = self.source.dataset
        if not isinstance(rows, datasets.Dataset) or not len(rows):  # of none, `map` would make no columns
            encoded = [self(raw, i) for i, raw in enumerate(rows)]
            columns = {name: [row[name] for row in encoded] for name in self.FEATURES}
            return datasets.Dataset.from_dict(columns, features=self.FEATURES)
        versions = [_ENCODING_VERSION, transformers.__version__]
        state = [versions, rows._fingerprint, self.source.to_example, self.encoder.settings, self.on_bad_sample]
        return rows.with_format(None).map(
            self,
            with_indices=True,
            remove_columns=rows.column_names,
            features=self.FEATURES,
            num_proc=num_workers or None,
            load_from_cache_file=use_cache,
            new_fingerprint=Hasher.hash(state),
            desc=f"Tokenising {self.source.name}",
        )


class DualTokenChatDataset(Dataset):
    """
    Samples of one or several sources, as [`ChatEncoder`] makes them.

    All samples are tokenised when the data set is first made (the ids are kept in the cache of `datasets`), and whatever is wrong with one is found then: an image
    file that is missing, a placeholder without an image, an image that `max_length` would cut, a sample without
    anything to learn. Images are read when their sample is asked for.

    Without weights every sample comes once in an epoch. With weights an epoch has as many samples as all sources
    together, divided by weight; a source goes on in the next epoch where it stopped, and in another order whenever it
    begins anew. What is drawn for a sample depends on the seed, the epoch and the sample's index only, so that a resumed
    run goes on as it would have. The Trainer calls `set_epoch`.

    Args:
        sources (`list[ChatSource]` or `list[dict]`): of [`load_chat_sources`], or examples themselves.
        encoder ([`ChatEncoder`]).
        seed (`int`, defaults to 0).
        on_bad_sample (`str`, defaults to `"error"`): `"error"` refuses the data set and names the sample; `"skip"`
            passes such samples over, counts them and names the first ones. An image that turns out to be broken when it
            is read is treated likewise; in the place of its sample stands the next one.
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
        check_bad_sample_rule(on_bad_sample)
        if not sources:
            raise ValueError("There are no sources to train on.")
        kinds = {isinstance(source, ChatSource) for source in sources}
        if len(kinds) > 1 or not all(isinstance(source, (ChatSource, Mapping)) for source in sources):
            raise ValueError(
                "`sources` must be ChatSources, as of load_chat_sources, or all of them examples (dicts), got "
                f"{', '.join(sorted({type(source).__name__ for source in sources}))}."
            )
        if kinds == {False}:
            sources = [ChatSource("the examples", list(sources), dict, None)]
        check_weights({f"{source.name} ({number})": source.weight for number, source in enumerate(sources, 1)})
        self.encoder, self.seed, self.on_bad_sample = encoder, seed, on_bad_sample
        self.sources = [_EncodedSource(source, encoder, on_bad_sample, num_workers) for source in sources]
        for source in self.sources:
            if not len(source):
                raise ValueError(
                    f"The source {source.source.name} has no sample that can be trained on; {len(source.faults)} were "
                    f"skipped{f', the first because {source.faults[0][1]}' if source.faults else ''}."
                )
        faults = [fault for source in self.sources for fault in source.faults]
        self.num_skipped, self.num_cut = len(faults), sum(source.num_cut for source in self.sources)
        if faults:
            named = "; ".join(f"{name}: {reason}" for name, reason in faults[:_NAMED_SAMPLES])
            logger.warning(f"{len(faults)} samples are skipped, such as {named}.")
        if self.num_cut:
            logger.warning(f"{self.num_cut} samples are cut to `max_length` = {encoder.max_length} tokens.")
        self.counts = self._samples_per_epoch([source.weight for source in sources])
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._num_named = 0
        self._items_of: dict[tuple[int, int], np.ndarray] = {}
        # Shared, so that workers which live on from epoch to epoch (`persistent_workers`) see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def _samples_per_epoch(self, weights: list[float | None]) -> list[int]:
        lengths = [len(source) for source in self.sources]
        self.is_weighted = any(weight is not None for weight in weights)
        if not self.is_weighted:
            return lengths
        return [max(1, round(sum(lengths) * weight / sum(weights))) for weight in weights]

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

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
        return np.concatenate([source.lengths[self._items(number)] for number, source in enumerate(self.sources)])

    def _items(self, number: int) -> np.ndarray:
        """Which items of a source are this epoch's, in their order, `(counts[number],)`."""
        key = (number, self.epoch)
        if key not in self._items_of:
            # Those of the epoch before are no longer asked for.
            self._items_of.pop((number, self.epoch - 1), None)
            self._items_of[key] = self._choose_items(number)
        return self._items_of[key]

    def _choose_items(self, number: int) -> np.ndarray:
        count, length = self.counts[number], len(self.sources[number])
        if not self.is_weighted:
            return np.arange(count)
        cycles, items = np.divmod(self.epoch * count + np.arange(count), length)
        for cycle in np.unique(cycles):
            in_cycle = cycles == cycle
            items[in_cycle] = np.random.default_rng([self.seed, number, cycle]).permutation(length)[items[in_cycle]]
        return items

    def _place(self, index: int) -> tuple[int, int]:
        """The source and the item in it that stand at an index in this epoch."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, int(self._items(number)[index - int(self._starts[number])])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """What [`ChatEncoder.sample`] makes, and `"num_skipped"`: 1 if it stands in for a sample that cannot be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"There is no sample {index} among {len(self)}.")
        key, num_skipped = f"{self.seed}/{self.epoch}/{index}", 0
        while True:
            number, item = self._place((index + num_skipped) % len(self))
            source = self.sources[number]
            try:
                return {**source.sample(item, key), "num_skipped": int(num_skipped > 0)}
            except BadSampleError as error:
                if self.on_bad_sample == "error":
                    raise refusal(source.name(item), error) from error
                num_skipped += 1
                self._num_named += 1
                if self._num_named <= MAX_NAMED:
                    logger.warning(f"The sample {source.name(item)} is skipped: {error}.")
                if num_skipped == min(len(self), MAX_SKIPPED_IN_A_ROW):
                    raise ValueError(
                        f"{num_skipped:,} samples in a row cannot be read. The last is {source.name(item)}: {error}."
                    ) from error
