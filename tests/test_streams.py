"""Streams of images that go on where they were."""

import io
import json
import random

import datasets
import numpy as np
import pytest
import torch
from data_helpers import encoded, first_epoch, flat, numbers, table, write_tar
from PIL import Image
from torch.utils.data import DataLoader
from training_helpers import noise

from transformers_dualtoken.data import (
    DualTokenImageStream,
    StreamProgress,
    collate_images,
    load_image_dataset,
)
from transformers_dualtoken.data.images import ImagePreparation, undecoded


pytestmark = pytest.mark.usefixtures("own_cache")


def sources(tmp_path, num_images=23) -> dict[str, datasets.IterableDataset]:
    """Streams of the pictures 0, 1, ... with 1, 3, 5 and 12 shards, read by both ways that `datasets` has."""
    images = [flat(number) for number in range(num_images)]
    per_part = -(-num_images // 5)
    for part in range(5):
        files = {f"{n:03}.png": images[n] for n in range(num_images) if n // per_part == part}
        write_tar(tmp_path / "five" / f"{part}.tar", files)
    write_tar(tmp_path / "one" / "0.tar", {f"{n:03}.png": image for n, image in enumerate(images)})
    rows = datasets.Dataset.from_dict({"image": images})
    return {
        "one tar": load_image_dataset(tmp_path / "one", streaming=True),
        "five tars": load_image_dataset(tmp_path / "five", streaming=True),
        "three arrow shards": rows.to_iterable_dataset(num_shards=3),
        "twelve arrow shards": rows.to_iterable_dataset(num_shards=12),
    }


def stream_of(dataset, image_processor, **options) -> DualTokenImageStream:
    return DualTokenImageStream(dataset, image_processor, **{"shuffle_buffer_size": 4, **options})


def without_state(position: dict) -> dict:
    return {**position, "sources": [{**place, "state": None} for place in position["sources"]]}


def batches(stream, num_workers, count, batch_size=3):
    loader = DataLoader(
        stream,
        batch_size,
        collate_fn=collate_images,
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
    )
    return [batch for batch, _ in zip(loader, range(count))]


@pytest.mark.parametrize("source", ["one tar", "five tars", "three arrow shards", "twelve arrow shards"])
def test_an_epoch_is_covered_once_by_ranks_and_workers(tmp_path, image_processor, source):
    dataset = sources(tmp_path)[source]
    for world_size, num_workers in ((1, 0), (3, 0), (2, 2)):
        parts = []
        for rank in range(world_size):
            stream = stream_of(dataset, image_processor, rank=rank, world_size=world_size)
            loader = DataLoader(stream, batch_size=None, num_workers=num_workers)
            parts.append([numbers(sample["pixel_values"][None])[0] for sample in first_epoch(loader, 46)])
        assert sorted(sum(parts, [])) == list(range(23)), (world_size, num_workers)
        assert all(parts)


def test_epochs_differ_in_order_and_crop(tmp_path, image_processor):
    def values(seed, count):
        dataset = datasets.Dataset.from_dict({"image": [encoded(noise(n)) for n in range(12)]}).to_iterable_dataset(6)
        stream = iter(stream_of(dataset, image_processor, seed=seed))
        return [next(stream) for _ in range(count)]

    samples = values(0, 24)
    assert [sample["stream_position"]["sources"][0]["epoch"] for sample in samples] == [0] * 12 + [1] * 12
    pixels = [sample["pixel_values"] for sample in samples]
    other = [sample["pixel_values"] for sample in values(1, 12)]
    assert len({tensor.numpy().tobytes() for tensor in pixels + other}) == 36

    def order(tensors):
        clean = [ImagePreparation(image_processor, (1, 1))(noise(n), "") for n in range(12)]
        return [int(torch.stack([(tensor - image).abs().mean() for image in clean]).argmin()) for tensor in tensors]

    orders = [order(pixels[:12]), order(pixels[12:]), order(other)]
    assert all(sorted(numbers) == list(range(12)) for numbers in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def shards_of(images, num_shards) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"image": images}).to_iterable_dataset(num_shards=num_shards)


def test_epochs_differ_in_the_order_of_shards(image_processor):
    """Without the shuffling within blocks; by the seed, too."""
    orders = []
    for seed in (0, 1):
        dataset = shards_of([flat(n) for n in range(16)], 8)
        stream = iter(stream_of(dataset, image_processor, seed=seed, shuffle_buffer_size=1))
        shown = numbers(torch.stack([next(stream)["pixel_values"] for _ in range(48)]))
        for start in (0, 16, 32):
            pairs = list(zip(shown[start : start + 16 : 2], shown[start + 1 : start + 16 : 2]))
            assert sorted(pairs) == [(n, n + 1) for n in range(0, 16, 2)]  # shards are read as they are
            orders.append(tuple(pairs))
    assert len(set(orders)) == 6


@pytest.mark.parametrize("num_shards", [1, 3, 9])
def test_reader_gets_other_images_in_the_next_epoch(image_processor, num_shards):
    dataset = shards_of([flat(n) for n in range(18)], num_shards)
    parts = {}
    for rank in range(2):
        options = {"rank": rank, "world_size": 2}
        for sample in stream_of(dataset, image_processor, **options):
            epoch = sample["stream_position"]["sources"][0]["epoch"]
            if epoch == 2:
                break
            parts.setdefault((rank, epoch), []).extend(numbers(sample["pixel_values"][None]))
    for epoch in range(2):
        assert sorted(parts[0, epoch] + parts[1, epoch]) == list(range(18))
    for rank in range(2):
        assert set(parts[rank, 0]) != set(parts[rank, 1])


def test_stream_leaves_the_global_generators_alone(tmp_path, image_processor):
    stream = iter(stream_of(sources(tmp_path)["five tars"], image_processor))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for _ in range(6):
        next(stream)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


@pytest.mark.parametrize(
    ("source", "num_workers"),
    [("one tar", 0), ("five tars", 0), ("three arrow shards", 0), ("twelve arrow shards", 0)]
    + [("five tars", 2), ("twelve arrow shards", 2)],
)
def test_resumed_stream_equals_the_uninterrupted_one(tmp_path, image_processor, source, num_workers):
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "seed": 3}
        dataset = sources(tmp_path)[source]
        expected = batches(stream_of(dataset, image_processor, **options), num_workers, 14)
        state = None
        # Stopped twice; every second of a stream, of a block, after an epoch (11 or 12 images of a rank).
        for start, stop in ((0, 1), (1, 4), (4, 14)) if num_workers else zip(range(13), range(1, 14)):
            stream, progress = stream_of(sources(tmp_path)[source], image_processor, **options), StreamProgress()
            if state is not None:
                stream.load_state_dict(state)
                progress.load_state_dict(state)
            for batch, reference in zip(batches(stream, num_workers, stop - start), expected[start:stop]):
                assert torch.equal(batch["pixel_values"], reference["pixel_values"]), (rank, start)
                # How `datasets` writes down its state depends on where it was resumed.
                assert without_state(batch["stream_position"]) == without_state(reference["stream_position"])
                progress.update(batch["stream_position"])
            state = json.loads(json.dumps(progress.state_dict()))
            assert state == progress.state_dict()
        assert expected[-1]["stream_position"]["sources"][0]["epoch"] >= 2


def test_resume_reads_one_block_again(tmp_path, image_processor, monkeypatch):
    """Not the images of all blocks before it."""
    dataset = datasets.Dataset.from_dict({"image": [flat(n) for n in range(40)]}).to_iterable_dataset(num_shards=10)
    stream = stream_of(dataset, image_processor)
    progress = StreamProgress()
    for batch in batches(stream, 0, 11):
        progress.update(batch["stream_position"])
    prepared = []
    prepare = ImagePreparation.__call__
    monkeypatch.setattr(
        ImagePreparation, "__call__", lambda self, value, seed: prepared.append(seed) or prepare(self, value, seed)
    )
    resumed = stream_of(dataset, image_processor)
    resumed.load_state_dict(progress.state_dict())
    next(iter(resumed))
    assert len(prepared) == 1
    assert progress.state_dict()["positions"]["0"]["sources"][0]["block"] == 8


def test_stream_with_unreadable_images_counts_and_resumes(tmp_path, image_processor):
    images = [flat(n) if n % 3 else b"text" for n in range(24)]
    dataset = datasets.Dataset.from_dict({"image": images}).to_iterable_dataset(num_shards=2)
    expected = batches(stream_of(dataset, image_processor), 0, 12, batch_size=4)
    assert sorted(numbers(torch.cat([batch["pixel_values"] for batch in expected[:4]]))) == [
        n for n in range(24) if n % 3
    ]
    # Those before the first readable image of the next epoch count there.
    assert 12 <= sum(int(batch["num_skipped"]) for batch in expected) <= 24
    stream, progress = stream_of(dataset, image_processor), StreamProgress()
    progress.update(expected[4]["stream_position"])
    stream.load_state_dict(progress.state_dict())
    for batch, reference in zip(batches(stream, 0, 7, batch_size=4), expected[5:]):
        assert torch.equal(batch["pixel_values"], reference["pixel_values"])
        assert torch.equal(batch["num_skipped"], reference["num_skipped"])


def test_stream_that_can_give_nothing(tmp_path, image_processor, monkeypatch):
    monkeypatch.setattr("transformers_dualtoken.data.streams.MAX_SKIPPED_IN_A_ROW", 20)
    broken = datasets.Dataset.from_dict({"image": [b"text"] * 3}).to_iterable_dataset()
    with pytest.raises(ValueError, match="20 images of the stream in a row cannot be read. The last is"):
        next(iter(stream_of(broken, image_processor)))
    single = datasets.Dataset.from_dict({"image": [flat(1)]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="no image for worker 0 of 1 on rank 1 of 2: it holds fewer images"):
        next(iter(stream_of(single, image_processor, rank=1, world_size=2)))


def test_broken_shard_names_itself_in_a_worker(tmp_path, image_processor):
    sources(tmp_path)
    path = tmp_path / "five" / "3.tar"
    path.write_bytes(path.read_bytes()[:700])
    stream = stream_of(load_image_dataset(tmp_path / "five", streaming=True), image_processor)
    iterator = iter(DataLoader(stream, 3, collate_fn=collate_images, num_workers=2))
    with pytest.raises(ValueError, match=f"The file '{path}' cannot be read"):
        list(iterator)
    iterator._shutdown_workers()  # which takes ten seconds if the garbage collector does it


def test_position_of_another_stream_is_refused(tmp_path, image_processor):
    dataset = sources(tmp_path)["five tars"]
    progress = StreamProgress()
    progress.update(batches(stream_of(dataset, image_processor), 0, 1)[0]["stream_position"])
    state = progress.state_dict()
    stream = stream_of(dataset, image_processor)
    stream.load_state_dict({**state, "positions": {"0": {**state["positions"]["0"], "num_workers": 2}}})
    with pytest.raises(ValueError, match="saved with num_workers = 2 and cannot go on with num_workers = 1"):
        next(iter(stream))
    for name, value in (("seed", 1), ("shuffle_buffer_size", 5), ("world_size", 2)):
        with pytest.raises(ValueError, match=f"saved with {name} = . and cannot go on with {name} = {value}"):
            stream_of(dataset, image_processor, **{name: value}).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"saved with num_shards = \[5\] and .* = \[3\]. Resume .*, and with the same data"
    ):
        stream_of(sources(tmp_path)["three arrow shards"], image_processor).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with rank = 0 and cannot go on with rank = 1"):
        stream = stream_of(dataset, image_processor, rank=1, world_size=2)
        stream.load_state_dict({**state, "positions": {"0": {**state["positions"]["0"], "world_size": 2}}})


@pytest.mark.parametrize("options", [{"shuffle_buffer_size": 0}, {"rank": 1}, {"rank": -1}])
def test_settings_of_a_stream_are_checked(image_processor, options):
    dataset = table(noise(0)).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"`{list(options)[0]}` must be"):
        stream_of(dataset, image_processor, **options)


def test_missing_column_of_a_stream_is_named(image_processor):
    with pytest.raises(ValueError, match=r"no column 'picture'; it has \['image'\]"):
        stream_of(table(noise(0)).to_iterable_dataset(), image_processor, image_column="picture")
    mapped = table(noise(0)).to_iterable_dataset().map(lambda row: {**row, "more": 1})
    with pytest.raises(ValueError, match=r"no column 'picture'; it has \['image', 'more'\]"):
        stream_of(mapped, image_processor, image_column="picture")


def test_mapped_stream_without_features(image_processor):
    """`datasets` does not know what a function returns; here decoded images."""
    dataset = table(*[Image.open(io.BytesIO(flat(n))) for n in range(8)]).to_iterable_dataset(num_shards=2)
    mapped = dataset.map(lambda row: {**row, "more": 1})
    assert mapped.features is None
    stream = stream_of(mapped, image_processor)
    assert sorted(numbers(torch.stack([sample["pixel_values"] for sample in first_epoch(stream, 9)]))) == list(
        range(8)
    )
    (row, *_) = undecoded(mapped, "image", ["more"])
    assert set(row) == {"image", "more"}
