"""Images for tokenizer training: a `datasets` table of images as `pixel_values`, and batches of them."""

import torch
from torch.utils.data import Dataset

from ..image_reading import UnreadableImageError, image_name
from .image_reading import (
    MAX_SKIPPED_IN_A_ROW,
    ImagePreparation,
    report_skipped,
)
from .image_sources import undecoded


class DualTokenImageDataset(Dataset):
    """
    Images of a `datasets` table as `pixel_values`, with the paper's augmentation: a random crop of 90 to 100 % of the
    area, resized (code, stage 1; no flip).

    What is drawn for a sample depends on the seed, the epoch and the sample's index only, so that a resumed run sees
    what an uninterrupted one would have seen. The Trainer calls `set_epoch`. In the place of an image that cannot be
    read (see [`read_image`]) stands the next one that can; each such file is logged once by every process.

    Args:
        dataset (`datasets.Dataset`): with a column of images, decoded or not.
        image_processor: makes `pixel_values` `(1, 3, S, S)` of a PIL image.
        image_column (`str`, defaults to `"image"`).
        crop_scale (`tuple[float, float]`, defaults to `(0.9, 1.0)`): range of the crop's share of the area; `(1, 1)`
            switches the augmentation off.
        seed (`int`, defaults to 0).
        reducing_gap (`float`, *optional*, defaults to 2.0): see [`ImagePreparation`]; `None` for evaluation.

    Raises:
        ValueError: for a data set without rows, a column that is missing and settings out of range; by `[]`, if all images that may stand in
            (at most [`MAX_SKIPPED_IN_A_ROW`]) cannot be read either.
    """

    def __init__(
        self,
        dataset,
        image_processor,
        image_column: str = "image",
        crop_scale=(0.9, 1.0),
        seed: int = 0,
        reducing_gap: float | None = 2.0,
    ):
        if not len(dataset):
            raise ValueError("The data set holds no images.")
        self.dataset = undecoded(dataset, image_column)
        self.prepare = ImagePreparation(image_processor, crop_scale, reducing_gap)
        self.image_column, self.seed = image_column, seed
        # Shared, so that workers which live on from epoch to epoch (`persistent_workers`) see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable = set()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """
        `{"pixel_values": (3, S, S) float32, "num_skipped": int}`: the image, and 1 if it stands in for the one at
        `index`, which cannot be read, else 0.
        """
        tries = min(len(self), MAX_SKIPPED_IN_A_ROW)
        for step in range(tries):
            place = (index + step) % len(self)
            # Known ones are not read again, for many in a row would slow down everyone who falls among them.
            if place in self._unreadable:
                continue
            value = self.dataset[place][self.image_column]
            try:
                pixel_values = self.prepare(value, f"{self.seed}/{self.epoch}/{index}")
            except UnreadableImageError as error:
                self._unreadable.add(place)
                report_skipped(image_name(value) or f"number {place} of the data set", error)
                continue
            # The others in between count where they are asked for.
            return {"pixel_values": pixel_values, "num_skipped": int(step > 0)}
        raise ValueError(
            f"None of the {tries:,} images from number {index} on can be read (the data set holds {len(self):,}); the "
            "log names them with the reasons."
        )


def collate_images(samples: list[dict]) -> dict:
    """
    A batch of samples: `pixel_values` `(B, 3, S, S)`, `num_skipped` `(1,)`, their sum, and of a stream
    `stream_position`, where it is after the last of them.
    """
    if not samples:
        raise ValueError("A batch must have at least one sample, got none.")
    batch = {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "num_skipped": torch.tensor([sum(sample["num_skipped"] for sample in samples)]),
    }
    if "stream_position" in samples[-1]:
        batch["stream_position"] = samples[-1]["stream_position"]
    return batch
