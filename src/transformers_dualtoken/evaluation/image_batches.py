"""Batches for an evaluation from a `datasets` table or stream: every image once, whatever the number of processes."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Subset
from transformers.utils import logging

from ..field_rules import at_least
from ..image_reading import UnreadableImageError, image_name
from ..optional_libraries import needed_libraries
from .processes import rank_and_number


logger = logging.get_logger(__name__)


class ImageBatches:
    """
    Iterates over a data set once and gives the arguments of `TokenizerEvaluator.update`: dicts of `pixel_values`
    `(B, 3, S, S)`, and `labels`, `input_ids`, `captions_per_image` where their columns are named.

    No image comes twice and none is left out, whatever the number of processes; the last batches may be smaller, and
    a process may get none. Images that cannot be read are skipped, logged once and counted in `num_skipped`.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): its images decoded or not, or bytes or paths of files.
        label_column (`str`, *optional*): column of class indices.
        caption_column (`str`, *optional*): column of texts, or of lists of texts.
        tokenize (`Callable`, *optional*): texts -> ids `(T, L)`; with `caption_column`.
        num_samples (`int`, *optional*): only the first rows, as they lie or come; by default all.
        num_workers (`int`, defaults to 0): processes that read and resize images; a cut stream is read without.
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
    ):
        # With libraries that the core does not need.
        with needed_libraries("`ImageBatches`"):
            from ..data.images import ImagePreparation, undecoded

        at_least(1).check_given(num_samples=num_samples)
        if caption_column is not None and tokenize is None:
            raise ValueError("`caption_column` needs `tokenize`, and none was given.")
        # Undecoded: a damaged image is then one row's matter, and other columns of images nobody's.
        others = [column for column in (label_column, caption_column) if column is not None]
        self.dataset, self.batch_size = undecoded(dataset, image_column, keep=others), batch_size
        self.prepare_image = ImagePreparation(image_processor, crop_scale=(1, 1), reducing_gap=None)
        self.image_column, self.label_column, self.caption_column = image_column, label_column, caption_column
        self.tokenize, self.num_samples, self.num_workers = tokenize, num_samples, num_workers
        self.num_skipped = 0

    def _loader(self) -> DataLoader:
        """Of this process's share; images are read and resized where rows are collated, in the loader's workers."""
        import datasets
        from datasets.distributed import split_dataset_by_node

        (rank, num_processes), rows, num_workers = rank_and_number(), self.dataset, self.num_workers
        if isinstance(rows, datasets.Dataset):
            rows = Subset(rows, range(rank, min(self.num_samples or len(rows), len(rows)), num_processes))
        elif self.num_samples is None:
            # Whole shards for each process where they come out even, else every n-th row.
            rows = split_dataset_by_node(rows, rank, num_processes)
        else:
            # The first rows of the stream, whatever its shards: every process reads them all and keeps its own.
            rows = rows.take(self.num_samples).filter(lambda _, i: i % num_processes == rank, with_indices=True)
            num_workers = 0
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self.collate, num_workers=num_workers)

    def __iter__(self) -> Iterator[dict]:
        self.num_skipped = 0
        for batch in self._loader():
            self.num_skipped += batch.pop("num_skipped")
            if batch:
                yield batch

    def collate(self, rows: list[dict]) -> dict:
        """The arguments for `update` made of rows of the data set, and how many images could not be read."""
        samples = [sample for row in rows if (sample := self.prepare(row)) is not None]
        batch = {"num_skipped": len(rows) - len(samples)}
        if not samples:
            return batch
        pixel_values, labels, captions = zip(*samples)
        batch["pixel_values"] = torch.stack(pixel_values)
        if self.label_column is not None:
            batch["labels"] = torch.tensor(labels)
        if self.caption_column is not None:
            batch["captions_per_image"] = [len(texts) for texts in captions]
            batch["input_ids"] = self.tokenize([text for texts in captions for text in texts])
        return batch

    def prepare(self, row: dict) -> tuple[torch.Tensor, int | None, list[str]] | None:
        """Image `(3, S, S)`, label and captions of a row of the data set; `None` if its image cannot be read."""
        value = row[self.image_column]
        name, label, captions = image_name(value) or "(without a name)", None, []
        try:
            pixel_values = self.prepare_image(value, seed="")
        except UnreadableImageError as error:
            logger.warning_once(f"The image {name} is skipped: {error}.")
            return None
        if self.label_column is not None:
            label, column = row[self.label_column], self.label_column
            if not isinstance(label, int):
                raise ValueError(f"Labels must be integers, the indices of class names; {column!r} holds {label!r}.")
        if self.caption_column is not None:
            given = row[self.caption_column]
            captions = [given] if isinstance(given, str) else list(given or ())
            if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
                raise ValueError(
                    f"Every image needs at least one caption, and no empty one; column {self.caption_column!r} holds "
                    f"{given!r} for the image {name}."
                )
        return pixel_values, label, captions
