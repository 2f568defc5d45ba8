"""Batches for an evaluation from a `datasets` table or stream: every image once, whatever the number of processes."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..image_reading import UnreadableImageError, image_name
from ..optional_libraries import needed_libraries


class _Samples(IterableDataset):
    """One process's (and one loader worker's) share of a data set, read and resized; what cannot be read is `None`."""

    def __init__(self, batches: "ImageBatches"):
        self.batches = batches

    def __iter__(self) -> Iterator[dict | None]:
        for row in self._rows():
            yield self.batches.prepare(row)

    def _rows(self) -> Iterator[dict]:
        batches, worker = self.batches, get_worker_info()
        if not batches.is_stream:
            workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
            first, step = batches.rank * workers + number, batches.num_processes * workers
            for index in range(first, batches.length, step):
                yield batches.dataset[index]
        elif batches.num_samples is None:
            # Whole shards for each process where they come out even, else every n-th row; `datasets` shares a
            # process's part among the workers by itself.
            from datasets.distributed import split_dataset_by_node

            yield from split_dataset_by_node(batches.dataset, batches.rank, batches.num_processes)
        else:
            # The first rows of the stream, whatever its shards: every process reads them all and keeps its own.
            for index, row in enumerate(batches.dataset.take(batches.num_samples)):
                if index % batches.num_processes == batches.rank:
                    yield row


class ImageBatches:
    """
    Iterates over a data set once and gives the arguments of `TokenizerEvaluator.update`: dicts of `pixel_values`
    `(B, 3, S, S)`, and `labels`, `input_ids`, `captions_per_image` where their columns are named.

    No image comes twice and none is left out, whatever the number of processes; the last batches may be smaller, and
    a process may get none. Images that cannot be read are skipped, logged once and counted in `num_skipped`.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): its images decoded or not, or bytes or paths of files.
        image_processor: makes `pixel_values` of a PIL image.
        batch_size (`int`, defaults to 32)
        image_column (`str`, defaults to `"image"`)
        label_column (`str`, *optional*): column of class indices.
        caption_column (`str`, *optional*): column of texts, or of lists of texts.
        tokenize (`Callable`, *optional*): texts -> ids `(T, L)`; with `caption_column`.
        num_samples (`int`, *optional*): only the first rows, as they lie or come; by default all.
        num_workers (`int`, defaults to 0): processes that read and resize images; a cut stream is read without.
        rank, num_processes (`int`, *optional*): which share of the data set this process takes; by default what
            `torch.distributed` says.

    Raises:
        ValueError: if a column is missing, `image_column` holds no images, or `num_samples` is below 1; while
            iterating for a row without caption.
    """

    def __init__(
        self,
        dataset,
        image_processor,
        batch_size: int = 32,
        image_column: str = "image",
        label_column: str | None = None,
        caption_column: str | None = None,
        tokenize=None,
        num_samples: int | None = None,
        num_workers: int = 0,
        rank: int | None = None,
        num_processes: int | None = None,
    ):
        # With libraries that the core does not need.
        with needed_libraries("`ImageBatches`"):
            import datasets

            from ..data.image_reading import ImagePreparation
            from ..data.image_sources import undecoded

        if num_samples is not None and num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
        if caption_column is not None and tokenize is None:
            raise ValueError("`caption_column` needs `tokenize`, and none was given.")
        self.is_stream = isinstance(dataset, datasets.IterableDataset)
        # Undecoded: a damaged image is then one row's matter, and other columns of images nobody's.
        others = [column for column in (label_column, caption_column) if column is not None]
        self.dataset, self.batch_size = undecoded(dataset, image_column, keep=others), batch_size
        self.prepare_image = ImagePreparation(image_processor, crop_scale=(1, 1), reducing_gap=None)
        self.image_column, self.label_column, self.caption_column = image_column, label_column, caption_column
        self.tokenize, self.num_samples = tokenize, num_samples
        is_distributed = dist.is_available() and dist.is_initialized()
        # Not from accelerate: on a CPU it may say one process while the group has several.
        self.rank = rank if rank is not None else dist.get_rank() if is_distributed else 0
        self.num_processes = num_processes or (dist.get_world_size() if is_distributed else 1)
        self.num_workers = 0 if self.is_stream and num_samples is not None else num_workers
        if not self.is_stream:
            self.length = len(dataset) if num_samples is None else min(num_samples, len(dataset))
        self.num_skipped = 0

    def prepare(self, row: dict) -> dict | None:
        """A row of the data set as tensors and texts; `None` if its image cannot be read."""
        from ..data.image_reading import report_skipped

        value = row[self.image_column]
        name = image_name(value) or "(without a name)"
        try:
            sample = {"pixel_values": self.prepare_image(value, seed="")}
        except UnreadableImageError as error:
            report_skipped(name, error)
            return None
        if self.label_column is not None:
            sample["label"] = row[self.label_column]
            if not isinstance(sample["label"], int):
                raise ValueError(
                    f"Labels must be integers, the indices of the class names; column {self.label_column!r} holds "
                    f"{sample['label']!r}."
                )
        if self.caption_column is not None:
            captions = row[self.caption_column]
            captions = [captions] if isinstance(captions, str) else list(captions or ())
            if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
                raise ValueError(
                    f"Every image needs at least one caption, and no empty one; column {self.caption_column!r} holds "
                    f"{row[self.caption_column]!r} for the image {name}."
                )
            sample["captions"] = captions
        return sample

    def collate(self, samples: list[dict | None]) -> dict:
        kept = [sample for sample in samples if sample is not None]
        batch = {"num_skipped": len(samples) - len(kept)}
        if not kept:
            return batch
        batch["pixel_values"] = torch.stack([sample["pixel_values"] for sample in kept])
        if self.label_column is not None:
            batch["labels"] = torch.tensor([sample["label"] for sample in kept])
        if self.caption_column is not None:
            batch["captions_per_image"] = [len(sample["captions"]) for sample in kept]
            batch["input_ids"] = self.tokenize([text for sample in kept for text in sample["captions"]])
        return batch

    def __iter__(self) -> Iterator[dict]:
        loader = DataLoader(
            _Samples(self), batch_size=self.batch_size, collate_fn=self.collate, num_workers=self.num_workers
        )
        self.num_skipped = 0
        for batch in loader:
            self.num_skipped += batch.pop("num_skipped")
            if batch:
                yield batch


__all__ = ["ImageBatches"]
