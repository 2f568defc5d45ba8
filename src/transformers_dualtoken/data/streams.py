"""Samples from streams, which go on exactly where a stopped run was."""

import itertools
import random

from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging

from ..field_rules import at_least
from ..image_reading import UnreadableImageError, image_name
from .encoding import ChatEncoder
from .images import ImagePreparation, undecoded
from .samples import MAX_NAMED, MAX_SKIPPED_IN_A_ROW, BadSampleError, ChatSource, check_sources, refusal


logger = logging.get_logger(__name__)

# A reader gets whole shards if there are so many for each that their numbers differ by a quarter at most.
_MIN_SHARDS_PER_READER = 4
_BEGINNING = {"epoch": 0, "block": 0, "index": 0, "state": None}


class SampleStream(IterableDataset):
    """
    Base of the streams that training reads: rows of one streamed data set, or of several mixed by weight.

    The rows are divided over the readers: the workers of the `DataLoader` on all ranks. A reader gets shards of its
    own where there are enough (at least four each), and else every n-th row of all shards; then each reader reads
    everything, but prepares its own share only. In every epoch of a data set its shards come in another order, and each
    reader shuffles the raw rows of one block of `shuffle_buffer_size` after the other, which it holds in memory. All of
    this, and what is drawn for a sample, depends on the seed, the epoch, the rank and the worker only.

    Every sample carries its `"stream_position"`. A run that is resumed by `load_state_dict`, with what
    [`StreamProgress`] made of the positions, gets bit for bit the samples an uninterrupted one would have got, from the
    same data and with the same numbers of ranks and workers. Only the blocks at hand are read again.

    Args:
        datasets (`list[datasets.IterableDataset]`): of raw rows.
        weights (`list[float]`, *optional*): of several: how often each is drawn from, relative to the others.
        seed (`int`, defaults to 0).
        shuffle_buffer_size (`int`, defaults to 1000): rows of a block.
        rank (`int`, defaults to 0), world_size (`int`, defaults to 1): of this process, among those that train.

    Yields, without end:
        what `prepare` makes of a row, with `"num_skipped"` (`int`), how many rows were passed over before it, and
        `"stream_position"` (`dict`), where the stream is after it.

    Raises:
        ValueError: for settings out of range, a reader without rows, `MAX_SKIPPED_IN_A_ROW` unusable rows in a row, and
            a position of a stream with other settings.
    """

    # What a sample of this stream is called in messages.
    noun = "sample"
    # Errors of `prepare` after which the row is passed over. All others end the stream.
    passed_over: tuple[type[Exception], ...] = ()

    def __init__(
        self,
        datasets: list,
        weights: list[float] | None = None,
        seed: int = 0,
        shuffle_buffer_size: int = 1000,
        rank: int = 0,
        world_size: int = 1,
    ):
        at_least(1).check("shuffle_buffer_size", shuffle_buffer_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be from 0 to `world_size` - 1, got {rank} of {world_size}.")
        if weights is None and len(datasets) > 1:
            raise ValueError(f"Streams have no length by which {len(datasets)} of them could be mixed: give weights.")
        self.datasets, self.weights = datasets, weights or [1.0]
        # With another one of these a position would mean something else.
        self.settings = {
            "seed": seed,
            "shuffle_buffer_size": shuffle_buffer_size,
            "rank": rank,
            "world_size": world_size,
            "num_shards": [dataset.num_shards for dataset in datasets],
            "weights": self.weights,
        }
        self._resumed = {"positions": {}, "next_worker": 0}

    def prepare(self, source: int, row: dict, key: str) -> dict:
        """A sample of a raw row of data set number `source`; what is drawn for it depends on `key` only."""
        raise NotImplementedError

    def row_name(self, source: int, row: dict) -> str | None:
        """What to call a row in a message, where it has a name of its own."""
        return None

    def load_state_dict(self, state: dict) -> None:
        """Go on where the state of a [`StreamProgress`] says. To be called before the `DataLoader` is iterated."""
        self._check(state["positions"], self.settings)
        # JSON makes strings of the keys.
        positions = {int(worker): position for worker, position in state["positions"].items()}
        self._resumed = {"positions": positions, "next_worker": state["next_worker"]}

    @staticmethod
    def _check(positions: dict, settings: dict) -> None:
        for position, (name, value) in itertools.product(positions.values(), settings.items()):
            if position[name] != value:
                raise ValueError(
                    f"The stream was saved with {name} = {position[name]} and cannot go on with {name} = {value}. "
                    "Resume with the first run's settings, ranks and workers, and with the same data."
                )

    def __iter__(self):
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        settings = {**self.settings, "num_workers": num_workers}
        self._check(self._resumed["positions"], settings)
        # A `DataLoader` begins with worker 0; this one takes the place of the worker whose turn it was.
        worker = (worker + self._resumed["next_worker"]) % num_workers
        position = self._resumed["positions"].get(worker, {"drawn": 0, "sources": [_BEGINNING] * len(self.datasets)})
        position = {**position, **settings, "worker": worker}

        places = list(position["sources"])
        rows = [
            self._rows(dataset, place, position, f"{position['seed']}/{source}")
            for source, (dataset, place) in enumerate(zip(self.datasets, places))
        ]
        num_skipped = num_named = 0
        for drawn in itertools.count(position["drawn"]):
            draw = random.Random(f"{position['seed']}/{position['rank']}/{worker}/draw {drawn}")
            source = draw.choices(range(len(rows)), self.weights)[0] if len(rows) > 1 else 0
            values, key, places[source] = next(rows[source])
            try:
                sample = self.prepare(source, values, key)
            except self.passed_over as error:
                num_skipped += 1
                name = self.row_name(source, values) or f"at {key}"
                if num_named < MAX_NAMED:
                    num_named += 1
                    logger.warning(f"The {self.noun} {name} is skipped: {error}.")
                if num_skipped == MAX_SKIPPED_IN_A_ROW:
                    message = f"{num_skipped:,} {self.noun}s of the stream in a row cannot be read. The last is {name}"
                    raise ValueError(f"{message}: {error}.") from error
                continue
            yield {
                **sample,
                "num_skipped": num_skipped,
                "stream_position": {**position, "drawn": drawn + 1, "sources": list(places)},
            }
            num_skipped = 0

    def _rows(self, dataset, place: dict, position: dict, seed: str):
        """The rows of one data set for one reader, each with the seed of what is drawn for it, and the place after it."""
        for epoch in itertools.count(place["epoch"]):
            has_rows = False
            key = f"{seed}/{epoch}/{position['rank']}/{position['worker']}"
            for rows, start in self._blocks(dataset, place, epoch, position, seed):
                has_rows = True
                order = list(range(len(rows)))
                random.Random(f"{key}/block {start['block']}").shuffle(order)
                for index in range(start["index"], len(order)):
                    # Its place is freed at once: the next block is read while this one is still there.
                    row, rows[order[index]] = rows[order[index]], None
                    number = start["block"] * position["shuffle_buffer_size"] + order[index]
                    yield row, f"{key}/{number}", {**start, "index": index + 1}
            if not has_rows:
                raise ValueError(
                    f"The stream has no {self.noun} for worker {position['worker']} of {position['num_workers']} on rank "
                    f"{position['rank']} of {position['world_size']}: it holds fewer {self.noun}s than there are workers."
                )
            place = {**_BEGINNING, "epoch": epoch + 1}

    def _blocks(self, dataset, place: dict, epoch: int, position: dict, seed: str):
        """The raw rows of block after block of one epoch, each with the place of its beginning."""
        # By turns: some have a shard more than others, and with few shards a reader would see the same rows always.
        num_readers = position["world_size"] * position["num_workers"]
        turn = (position["rank"] * position["num_workers"] + position["worker"] + epoch) % num_readers
        # A new data set every time, since the epoch of `dataset` is in memory that all workers share.
        if dataset.num_shards >= _MIN_SHARDS_PER_READER * num_readers:
            stream = dataset.shard(num_readers, turn, contiguous=False)
        else:
            stream = split_dataset_by_node(dataset, rank=turn, world_size=num_readers)
        # What `datasets` calls the epoch is the seed of the order of the shards; 0 would be their own.
        stream.set_epoch(random.Random(f"{seed}/{epoch}/shards").randrange(1, 2**62))
        if place["state"] is not None:
            stream.load_state_dict(place["state"])
        # By `iter`, which leaves the workers to us: `__iter__` would give those beyond the shards nothing.
        for block in stream.iter(batch_size=position["shuffle_buffer_size"]):
            columns = list(block)
            yield [dict(zip(columns, values)) for values in zip(*block.values())], place
            # Where the next block begins; the places within a block share this object.
            place = {**place, "block": place["block"] + 1, "index": 0, "state": stream.state_dict()}


class StreamProgress:
    """How far the batches that were trained on go in a [`SampleStream`], on this rank."""

    def __init__(self):
        self._positions, self._next_worker = {}, 0

    def update(self, stream_position: dict) -> None:
        """Note the `"stream_position"` of a batch. The batches must come in the `DataLoader`'s order."""
        self._positions[str(stream_position["worker"])] = stream_position
        self._next_worker = (stream_position["worker"] + 1) % stream_position["num_workers"]

    def state_dict(self) -> dict:
        """`{"positions": {worker: position}, "next_worker": int}`, fit for JSON; for both `load_state_dict`."""
        return {"positions": dict(self._positions), "next_worker": self._next_worker}

    def load_state_dict(self, state: dict) -> None:
        """Begin from a saved state: until they deliver a batch again, its workers' positions stay as they are."""
        self._positions = {str(worker): position for worker, position in state["positions"].items()}
        self._next_worker = state["next_worker"]


class DualTokenImageStream(SampleStream):
    """
    Images of a streamed `datasets` data set as `pixel_values` `(3, S, S)`, float32, augmented, and captions as `input_ids`.

    Args:
        dataset (`datasets.IterableDataset`): with a column of images.
        image_processor, image_column, crop_scale, reducing_gap, caption_column, tokenize: see
            [`DualTokenImageDataset`].
        kwargs: of [`SampleStream`].
    """

    noun = "image"
    passed_over = (UnreadableImageError, BadSampleError)

    def __init__(
        self,
        dataset,
        image_processor,
        image_column="image",
        crop_scale=(0.9, 1.0),
        reducing_gap=2.0,
        caption_column=None,
        tokenize=None,
        **kwargs,
    ):
        super().__init__([undecoded(dataset, image_column, filter(None, [caption_column]))], **kwargs)
        self.image_preparation = ImagePreparation(image_processor, crop_scale, reducing_gap)
        self.image_column, self.captions = image_column, (caption_column, tokenize)

    def prepare(self, source: int, row: dict, key: str) -> dict:
        return self.image_preparation.sample(row, self.image_column, key, *self.captions)

    def row_name(self, source: int, row: dict) -> str | None:
        return image_name(row[self.image_column])


class DualTokenChatStream(SampleStream):
    """
    Samples of streamed sources, as [`ChatEncoder`] makes them, with `"num_cut"` (`int`): whether one was cut.

    Args:
        sources (`list[ChatSource]`): of `load_chat_sources(..., streaming=True)`; several need weights.
        encoder ([`ChatEncoder`]).
        on_bad_sample (`str`, defaults to `"error"`): ends the stream at a sample that cannot be trained on, which it
            names; `"skip"` passes it over and counts it.
        kwargs: of [`SampleStream`].
    """

    def __init__(self, sources: list[ChatSource], encoder: ChatEncoder, on_bad_sample: str = "error", **kwargs):
        check_sources(sources, on_bad_sample)
        weights = [source.weight for source in sources]
        super().__init__([source.dataset for source in sources], None if None in weights else weights, **kwargs)
        self.sources, self.encoder = sources, encoder
        self.passed_over = (BadSampleError,) if on_bad_sample == "skip" else ()

    def prepare(self, source: int, row: dict, key: str) -> dict:
        try:
            encoded = self.encoder.encode(self.sources[source].to_example(row))
            return {**self.encoder.sample(encoded, key), "num_cut": int(encoded.cut)}
        except BadSampleError as error:
            if self.passed_over:
                raise
            raise refusal(self.row_name(source, row) or f"at {key} of {self.sources[source].name}", error) from error

    def row_name(self, source: int, row: dict) -> str | None:
        identity = self.sources[source].sample_id(row)
        return None if identity is None else f"{identity} of {self.sources[source].name}"
