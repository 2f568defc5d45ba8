"""Images for tokenizer training."""

import math
import random

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..image_processing_pil_dualtoken import decode_image, pil_to_rgb


class DualTokenImageDataset(Dataset):
    """
    Images of a `datasets` table as `pixel_values`, with the paper's augmentation: a random crop of 90 to 100 % of the
    area, resized (code, stage 1; no flip).

    What is drawn for a sample depends on the seed, the epoch and the sample's index only, so that a resumed run sees
    what an uninterrupted one would have seen. The Trainer calls `set_epoch`.

    Args:
        dataset (`datasets.Dataset`): with a column of images.
        image_processor: makes `pixel_values` `(1, 3, S, S)` of a PIL image.
        image_column (`str`, defaults to `"image"`).
        crop_scale (`tuple[float, float]`, defaults to `(0.9, 1.0)`): range of the crop's share of the area; `(1, 1)`
            switches the augmentation off.
        seed (`int`, defaults to 0).
    """

    def __init__(self, dataset, image_processor, image_column="image", crop_scale=(0.9, 1.0), seed: int = 0):
        if image_column not in dataset.column_names:
            raise ValueError(f"The data set has no column {image_column!r}; it has {dataset.column_names}.")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"`crop_scale` must be a range within (0, 1], got {crop_scale}.")
        self.dataset, self.image_processor, self.image_column = dataset, image_processor, image_column
        self.crop_scale, self.seed, self.epoch = crop_scale, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # Before the crop, which cannot resample every mode; as the image processor does it.
        image = Image.fromarray(pil_to_rgb(decode_image(self.dataset[index][self.image_column])))
        if self.crop_scale[0] < 1:
            image = self._random_crop(image, random.Random(f"{self.seed}/{self.epoch}/{index}"))
        pixel_values = self.image_processor(images=image, return_tensors="pt").pixel_values[0]
        return {"pixel_values": pixel_values}

    def _random_crop(self, image: Image.Image, rng: random.Random) -> Image.Image:
        width, height = image.size
        area = width * height * rng.uniform(*self.crop_scale)
        # Aspect ratios between 3:4 and 4:3, as usual for this augmentation.
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_height = min(height, area / min(width, math.sqrt(area * ratio)))
        # Where the ratio does not fit, the area is kept and not the ratio.
        crop_width = min(width, area / crop_height)
        left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        # Resampled within a fractional box: a small picture would otherwise move by whole pixels only.
        return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def collate_images(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack `pixel_values` to `(B, 3, S, S)`."""
    return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
