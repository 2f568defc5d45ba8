"""One image of a data set as `pixel_values`, augmented, and what is said of the ones passed over."""

import math
import random

import torch
from PIL import Image
from transformers.utils import logging

from ..image_reading import UnreadableImageError, read_image


logger = logging.get_logger(__name__)

# More unreadable images than this in a row are a broken data set, not a few broken files.
MAX_SKIPPED_IN_A_ROW = 1000
# So many of them are named in a process's log; all are counted.
MAX_NAMED = 20


def report_skipped(name: str, reason: UnreadableImageError) -> None:
    """Log, once in this process, that an image was passed over."""
    logger.warning_once(f"The image {name} is skipped: {reason}.")


class ImagePreparation:
    """
    From an entry of a column of images to `pixel_values`, with the paper's augmentation: a random crop of 90 to 100 %
    of the area, resized (code, stage 1; no flip).

    Args:
        image_processor: makes `pixel_values` `(1, 3, S, S)` of a PIL image.
        crop_scale (`tuple[float, float]`, defaults to `(0.9, 1.0)`): range of the crop's share of the area; `(1, 1)`
            switches the augmentation off.
        reducing_gap (`float`, *optional*, defaults to 2.0): see [`read_image`]; large images are then also averaged
            over whole pixels before they are resized (`PIL.Image.Image.resize`). The difference cannot be seen, and a
            photograph takes a fraction of the time. `None` decodes and resizes at full size, as the image processor
            does by itself.

    Raises:
        ValueError: for a `crop_scale` outside (0, 1] and a `reducing_gap` below 1.
    """

    def __init__(self, image_processor, crop_scale=(0.9, 1.0), reducing_gap: float | None = 2.0):
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"`crop_scale` must be a range within (0, 1], got {crop_scale}.")
        if reducing_gap is not None and reducing_gap < 1:
            raise ValueError(f"`reducing_gap` must be at least 1, or None for none, got {reducing_gap}.")
        self.image_processor, self.crop_scale, self.reducing_gap = image_processor, crop_scale, reducing_gap
        self.size = None
        if image_processor.do_resize:
            self.size = (image_processor.size["width"], image_processor.size["height"])

    def __call__(self, value, seed: str) -> torch.Tensor:
        """`pixel_values` `(3, S, S)`; what is drawn depends on `seed` only. Raises [`UnreadableImageError`]."""
        # The crop takes away from the sides, by the share and by its aspect ratio.
        min_size = self.size and math.ceil(max(self.size) / math.sqrt(self.crop_scale[0] * 3 / 4))
        image = read_image(value, min_size, self.reducing_gap)
        box = (0, 0, *image.size)
        if self.crop_scale[0] < 1:
            box = self.random_box(image.size, random.Random(seed))
        image = self._crop(image, box)
        return self.image_processor(images=image, return_tensors="pt").pixel_values[0]

    def random_box(self, size: tuple[int, int], rng: random.Random) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a crop of an image of `size` (width, height), in fractions of pixels."""
        width, height = size
        area = width * height * rng.uniform(*self.crop_scale)
        # Aspect ratios between 3:4 and 4:3, as usual for this augmentation.
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_height = min(height, area / min(width, math.sqrt(area * ratio)))
        # Where the ratio does not fit, the area is kept and not the ratio.
        crop_width = min(width, area / crop_height)
        left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
        return (left, top, min(width, left + crop_width), min(height, top + crop_height))

    def _crop(self, image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        """What the box holds, at the model's size where the image processor would do no more than resize."""
        # A fractional box: a small picture would otherwise move by whole pixels only.
        if self.size is not None and self.image_processor.resize_mode == "squash":
            resample = Image.Resampling(self.image_processor.resample)
            return image.resize(self.size, resample, box=box, reducing_gap=self.reducing_gap)
        if box == (0, 0, *image.size):
            return image
        # The image processor goes on from here: it gets the shape of the whole picture, and no more pixels than help.
        scale = 1.0
        if self.size is not None and self.reducing_gap is not None:
            scale = min(1.0, self.reducing_gap * max(self.size) / min(image.size))
        size = tuple(math.ceil(scale * side) for side in image.size)
        return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=self.reducing_gap)
