"""One image of a data set, whatever its file is like, as `pixel_values`; what cannot be read says why."""

import math
import os
import random
import urllib.error
import urllib.request
import warnings
from io import BytesIO

import fsspec
import torch
from PIL import Image, UnidentifiedImageError
from transformers.utils import logging

from ...image_processing_pil_dualtoken import decode_image, pil_to_rgb


logger = logging.get_logger(__name__)

# An image is decoded to at most this many pixels (200 MB as RGB). A larger JPEG is decoded at reduced size, a larger
# file of another format is skipped. What PIL takes for a decompression bomb (179 million pixels) is always skipped.
MAX_DECODED_PIXELS = 2**26
# More unreadable images than this in a row are a broken data set, not a few broken files.
MAX_SKIPPED_IN_A_ROW = 1000
# So many of them are named in a process's log; all are counted.
MAX_NAMED = 20


class UnreadableImageError(ValueError):
    """An image that training passes over; the message is the reason."""


def image_name(value) -> str | None:
    """What to call an image in a message: where it lies, as far as that is known."""
    if isinstance(value, dict):
        return value.get("path")
    if isinstance(value, (str, os.PathLike)):
        return str(value)
    return getattr(value, "filename", None) or None


def report_skipped(name: str, reason: UnreadableImageError) -> None:
    """Log, once in this process, that an image was passed over."""
    logger.warning_once(f"The image {name} is skipped: {reason}.")


def read_image(value, min_size: int | None = None, reducing_gap: float | None = None) -> Image.Image:
    """
    An entry of a column of images as an upright RGB image.

    Modes are converted as the image processor does it: transparent pixels are composited on white, 16-bit grey is
    scaled to 8 bit, CMYK (inverted by Adobe or not) and palettes become RGB.

    Args:
        value (`dict`, `str` or `PIL.Image.Image`): `{"bytes": ..., "path": ...}` as of `datasets.Image(decode=False)`
            (of the two one may be `None`), the path or URL of a file, or an image.
        min_size (`int`, *optional*): pixels that either side needs at least. With it a JPEG is decoded at 1/2, 1/4 or
            1/8 of its size where it has more than [`MAX_DECODED_PIXELS`], or where `reducing_gap` asks for it.
        reducing_gap (`float`, *optional*): a JPEG is decoded at the smallest size with sides of at least
            `reducing_gap * min_size`, as in `PIL.Image.Image.thumbnail`. `None` decodes at full size.

    Raises:
        UnreadableImageError: for an entry without an image, a file that is missing, empty, truncated, damaged or no
            image, an image with too many pixels, of floating-point values (they have no defined range), or PostScript.
        TypeError: for another kind of entry.
        OSError (`urllib.error.URLError`), or another error of `fsspec`: where a URL fails for another reason than that
            nothing is there; no image is passed over because of the network.
    """
    # A damaged file is reported once, by its error; PIL would also warn of odd tags, and of large images.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = value if isinstance(value, Image.Image) else _open(_read_bytes(value), min_size, reducing_gap)
        if image.format == "EPS":  # PIL goes by the content and not by the name, and would start Ghostscript
            raise UnreadableImageError("it is PostScript, a program and no image")
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # PIL's decoders raise errors of many kinds on damaged data
            raise UnreadableImageError(f"it is truncated or damaged ({error})") from error
        try:
            image = decode_image(image)
            if image.mode == "RGB" and "transparency" not in image.info:
                return image
            return Image.fromarray(pil_to_rgb(image))
        except ValueError as error:
            raise UnreadableImageError(str(error)) from error


def _read_bytes(value) -> bytes:
    path, data = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
    if data is None:
        if path is None:
            raise UnreadableImageError("the entry holds no image")
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(
                "An image of a data set must be {'bytes': ..., 'path': ...}, a path or a PIL image, got "
                f"{type(value).__name__}."
            )
        data = _read_url(str(path)) if _is_url(path) else _read_file(path)
    if not data:
        raise UnreadableImageError("the file is empty (0 bytes)")
    return data


def _is_url(path) -> bool:
    """Streams name the files of the Hub so, and those within an archive: `zip://a.jpg::photos.zip`."""
    return "://" in str(path) and not os.path.exists(path)


def _read_file(path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise UnreadableImageError(f"the file cannot be read ({error})") from error


def _read_url(url: str) -> bytes:
    if url.startswith(("http://", "https://")):
        # Some servers refuse Python's own name.
        request = urllib.request.Request(url, headers={"User-Agent": "transformers-dualtoken"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            if error.code not in (404, 410):
                raise
            raise UnreadableImageError(f"there is no file at this URL ({url}: {error})") from error
    # `open` would first ask for the size, and call every fault of the network a missing file.
    filesystem, path = fsspec.url_to_fs(url)
    try:
        return filesystem.cat_file(path)
    except FileNotFoundError as error:
        raise UnreadableImageError(f"there is no file at this URL ({error})") from error


def _open(data: bytes, min_size: int | None, reducing_gap: float | None) -> Image.Image:
    try:
        image = Image.open(BytesIO(data))
        width, height = image.size
        is_large = width * height > MAX_DECODED_PIXELS
        if min_size is not None and (is_large or reducing_gap is not None):
            # Does nothing for other formats than JPEG.
            side = min_size if is_large else math.ceil(min_size * reducing_gap)
            image.draft(None, (side, side))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError("it is no image, or damaged, or of an unknown format") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"it has too many pixels ({error})") from error
    except Exception as error:  # as above: readers of headers are no better
        raise UnreadableImageError(f"it is damaged ({error})") from error
    if image.width * image.height > MAX_DECODED_PIXELS:
        raise UnreadableImageError(
            f"it has too many pixels: {width} x {height}, where {MAX_DECODED_PIXELS:,} can be decoded"
        )
    return image


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
