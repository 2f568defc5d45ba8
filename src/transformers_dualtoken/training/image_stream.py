"""Images for tokenizer training from a stream, which goes on exactly where a stopped run was."""

import itertools
import random

from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils.versions import require_version

from .image_reading import (
    MAX_SKIPPED_IN_A_ROW,
    ImagePreparation,
    UnreadableImageError,
    image_name,
    report_skipped,
)
from .image_sources import undecoded


# A reader gets whole shards if there are so many for each that their numbers differ by a quarter at most.
_MIN_SHARDS_PER_READER = 4


class DualTokenImageStream(IterableDataset):
    """
    Images of a streamed `datasets` data set as `pixel_values`, with the augmentation of [`DualTokenImageDataset`].

    The images are divided over the readers: the workers of the `DataLoader` on all ranks. A reader gets shards of its
    own where there are enough (a multiple of the readers, or at least four each), and else every n-th image of all
    shards; then each reader reads everything, but decodes its own share only. In every epoch the shards come in
    another order, and each reader shuffles the undecoded images of one block of `shuffle_buffer_size` after the other.
    All of this depends on the seed, the epoch, the rank and the worker only, and so does what is drawn for an image.

    Every sample carries its `"stream_position"`. A run that is resumed by `load_state_dict`, with what
    [`StreamProgress`] made of the positions, gets bit for bit the samples an uninterrupted one would have got, from
    the same data, and with the same numbers of ranks and workers. Only the block at hand is read again (and, without
    decoding, what `datasets` has to read of its shard to get there).

    A block of undecoded images is held in memory by every worker.

    Args:
        dataset (`datasets.IterableDataset`): with a column of images.
        image_processor: makes `pixel_values` `(1, 3, S, S)` of a PIL image.
        image_column (`str`, defaults to `"image"`).
        crop_scale (`tuple[float, float]`, defaults to `(0.9, 1.0)`): see [`DualTokenImageDataset`].
        seed (`int`, defaults to 0).
        reducing_gap (`float`, *optional*, defaults to 2.0): see [`ImagePreparation`].
        shuffle_buffer_size (`int`, defaults to 1000): images of a block.
        rank (`int`, defaults to 0), world_size (`int`, defaults to 1): of this process, among those that train.
        repeat (`bool`, defaults to `True`): begin another epoch after the last image; `False` ends there.

    Yields:
        `{"pixel_values": (3, S, S) float32, "num_skipped": int, "stream_position": dict}`: the image, how many
        unreadable ones were passed over before it, and where the stream is after it.

    Raises:
        ValueError: for settings out of range, a column that is missing, a reader without images, more unreadable
            images in a row than [`MAX_SKIPPED_IN_A_ROW`], and a position of a stream with other settings.
    """

    def __init__(
        self,
        dataset,
        image_processor,
        image_column: str = "image",
        crop_scale=(0.9, 1.0),
        seed: int = 0,
        reducing_gap: float | None = 2.0,
        shuffle_buffer_size: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = True,
    ):
        if shuffle_buffer_size < 1:
            raise ValueError(f"`shuffle_buffer_size` must be at least 1 (no shuffling), got {shuffle_buffer_size}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be from 0 to `world_size` - 1, got {rank} of {world_size}.")
        self.dataset = undecoded(dataset, image_column)
        self.prepare = ImagePreparation(image_processor, crop_scale, reducing_gap)
        self.image_column, self.repeat = image_column, repeat
        # With another one of these a position would mean something else.
        self.settings = {
            "seed": seed,
            "shuffle_buffer_size": shuffle_buffer_size,
            "rank": rank,
            "world_size": world_size,
            "num_shards": self.dataset.num_shards,
        }
        self._resumed = {"positions": {}, "next_worker": 0}

    def load_state_dict(self, state: dict) -> None:
        """Go on where the state of a [`StreamProgress`] says. To be called before the `DataLoader` is iterated."""
        require_version("datasets>=5.1", "In older versions a stream does not go on exactly where it was.")
        for position in state["positions"].values():
            self._check(position, self.settings)
        # JSON makes strings of the keys.
        positions = {int(worker): position for worker, position in state["positions"].items()}
        self._resumed = {"positions": positions, "next_worker": state["next_worker"]}

    @staticmethod
    def _check(position: dict, settings: dict) -> None:
        for name, value in settings.items():
            if position[name] != value:
                raise ValueError(
                    f"The stream was saved with {name} = {position[name]} and cannot go on with {name} = {value}. "
                    "Resume with the settings, ranks and `dataloader_num_workers` of the first run, and with the same "
                    "data."
                )

    def __iter__(self):
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        settings = {**self.settings, "num_workers": num_workers}
        for position in self._resumed["positions"].values():
            self._check(position, settings)
        # A `DataLoader` begins with worker 0; this one takes the place of the worker whose turn it was.
        worker = (worker + self._resumed["next_worker"]) % num_workers
        position = self._resumed["positions"].get(worker, {"epoch": 0, "block": 0, "index": 0, "state": None})
        position = {**position, **settings, "worker": worker}

        num_skipped = 0
        for epoch in itertools.count(position["epoch"]) if self.repeat else (position["epoch"],):
            key = f"{settings['seed']}/{epoch}/{settings['rank']}/{worker}"
            has_images = False
            for values, start in self._blocks(position):
                has_images = True
                order = list(range(len(values)))
                random.Random(f"{key}/block {start['block']}").shuffle(order)
                for index in range(start["index"], len(order)):
                    # Its place is freed at once: the next block is read while this one is still there.
                    value, values[order[index]] = values[order[index]], None
                    number = start["block"] * settings["shuffle_buffer_size"] + order[index]
                    try:
                        pixel_values = self.prepare(value, f"{key}/{number}")
                    except UnreadableImageError as error:
                        num_skipped += 1
                        name = image_name(value) or f"number {number} of worker {worker} on rank {settings['rank']}"
                        report_skipped(name, error)
                        if num_skipped == MAX_SKIPPED_IN_A_ROW:
                            raise ValueError(
                                f"{num_skipped:,} images of the stream in a row cannot be read. The last is {name}: "
                                f"{error}."
                            ) from error
                        continue
                    yield {
                        "pixel_values": pixel_values,
                        "num_skipped": num_skipped,
                        "stream_position": {**start, "index": index + 1},
                    }
                    num_skipped = 0
            if self.repeat and not has_images:
                raise ValueError(
                    f"The stream has no image for worker {worker} of {num_workers} on rank {settings['rank']} of "
                    f"{settings['world_size']}: it holds fewer images than there are workers on all ranks."
                )
            position = {**position, "epoch": epoch + 1, "block": 0, "index": 0, "state": None}

    def _blocks(self, position: dict):
        """The undecoded images of block after block of one epoch, each with the position of its beginning."""
        reader = position["rank"] * position["num_workers"] + position["worker"]
        num_readers = position["world_size"] * position["num_workers"]
        # By turns: some have a shard more than others, and with few shards a reader would see the same images always.
        turn = (reader + position["epoch"]) % num_readers
        # A new data set every time, since the epoch of `self.dataset` is in memory that all workers share.
        if position["num_shards"] >= _MIN_SHARDS_PER_READER * num_readers:
            stream = self.dataset.shard(num_readers, turn, contiguous=False)
        else:
            stream = split_dataset_by_node(self.dataset, rank=turn, world_size=num_readers)
        # What `datasets` calls the epoch is the seed of the order of the shards; 0 would be their own.
        stream.set_epoch(random.Random(f"{position['seed']}/{position['epoch']}/shards").randrange(1, 2**62))
        if position["state"] is not None:
            stream.load_state_dict(position["state"])
        # By `iter`, which leaves the workers to us: `__iter__` would give those beyond the shards nothing.
        for block in stream.iter(batch_size=position["shuffle_buffer_size"]):
            yield block[self.image_column], position
            # Where the next block begins; the positions within a block share this object.
            position = {**position, "block": position["block"] + 1, "index": 0, "state": stream.state_dict()}


class StreamProgress:
    """How far the batches that were trained on go in a [`DualTokenImageStream`], on this rank."""

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
