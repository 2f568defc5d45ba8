"""Image processor of the PIL backend, and everything both backends share.

The torchvision backend (`image_processing_dualtoken.py`) takes its conversions, its geometry and its checks from here,
so the two differ in nothing but the resampling routine.
"""

import base64
import binascii
import os
import struct
import urllib.request
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    is_valid_image,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging


logger = logging.get_logger(__name__)

RESIZE_MODES = ("squash", "center_crop", "pad")
# What decoders raise on a damaged file; PIL raises SyntaxError for a broken PNG.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)
# A reconstruction may overshoot [-1, 1], an untrained decoder's by much; pixel values of 0..255 lie beyond this.
_MAX_RECONSTRUCTION = 16.0
# A longer image loses its ends before `center_crop` resizes it: they are cropped anyway, and would fill the memory.
_MAX_ASPECT_RATIO = 4


class DualTokenImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    resize_mode (`str`, *optional*, defaults to `"squash"`):
        How an image of another shape becomes `size`: `"squash"` changes its aspect ratio (as SigLIP does),
        `"center_crop"` resizes the short side and crops the long one, `"pad"` resizes the long side and pads the short
        one on both sides.
    fill_color (`int` or `list[int]`, *optional*, defaults to `(127, 127, 127)`):
        Colour of the padding under `resize_mode="pad"`: red, green and blue in 0..255, or one number for a grey.
    """

    resize_mode: str | None
    fill_color: int | list[int] | tuple[int, ...] | None


def open_image(source) -> Image.Image:
    """Open a path, a URL or base64 data (with or without a `data:image/...;base64,` head), mode and EXIF untouched."""
    shown = str(source) if len(str(source)) <= 200 else f"{str(source)[:200]}..."
    try:
        if isinstance(source, os.PathLike) or (len(source) < 4096 and os.path.isfile(source)):
            return Image.open(source)
        if source.startswith(("http://", "https://")):
            # Some servers refuse Python's own name.
            request = urllib.request.Request(source, headers={"User-Agent": "transformers-dualtoken"})
            with urllib.request.urlopen(request, timeout=60) as response:
                return Image.open(BytesIO(response.read()))
        data = source.split(",", 1)[1] if source.startswith("data:image/") else source
        return Image.open(BytesIO(base64.b64decode(data, validate=True)))
    except FileNotFoundError as error:
        raise ValueError(f"There is no image file at {shown!r}.") from error
    except (binascii.Error, IndexError) as error:
        raise ValueError(
            f"An image given as text must be the path of a file, an http(s) URL or base64 data, got {shown!r}."
        ) from error
    except _DECODE_ERRORS as error:
        raise ValueError(f"{shown!r} cannot be opened as an image: {error}") from error


def decode_image(image: Image.Image) -> Image.Image:
    """Read the pixels (PIL opens files lazily) and turn them upright by the EXIF orientation."""
    if image.format == "EPS":
        # Whatever the file is called; PIL would run Ghostscript on it.
        raise ValueError("An EPS file is a program and no image; convert it to PNG or JPEG first.")
    try:
        image.load()
    except _DECODE_ERRORS as error:
        name = repr(getattr(image, "filename", None) or "given")
        raise ValueError(
            f"The image {name} cannot be decoded, it is truncated or damaged ({error}). Give a complete image file."
        ) from error
    if 0 in image.size:
        raise ValueError(f"An image must have at least one pixel, got a size of {image.size[0]} x {image.size[1]}.")
    try:
        return ImageOps.exif_transpose(image)
    except (*_DECODE_ERRORS, KeyError, TypeError):
        # Unreadable EXIF data says nothing about the orientation; the pixels are fine.
        return image


def _to_8_bit(array: np.ndarray) -> np.ndarray:
    """0..65535 -> 0..255, rounded to nearest."""
    return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def pil_to_rgb(image: Image.Image) -> np.ndarray:
    """
    A decoded PIL image of any mode as `uint8` (H, W, 3). Transparent pixels are composited on white; 16-bit grey is
    scaled to 8 bit; mode `"I"` counts as 16 bit, since it is what 16-bit files open as.
    """
    if image.mode.startswith("I"):
        array = np.asarray(image)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(
                f"An integer image must hold 16-bit values (0 to 65535), got {array.min()} to {array.max()}."
            )
        return np.repeat(_to_8_bit(array)[..., None], 3, axis=-1)
    if image.mode == "F":
        raise ValueError(
            "A floating-point image (PIL mode 'F') has no defined range. Convert it to 8 bit first, or give an array."
        )
    bands = image.getbands()
    if "A" in bands or "a" in bands or (image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info):
        if image.mode in ("La", "PA"):
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def array_to_rgb(array: np.ndarray) -> np.ndarray:
    """
    An array (C, H, W) with 1 (grey), 3 or 4 (RGBA, composited on white) channels as (3, H, W). Integers become `uint8`
    (`uint16` is scaled from 16 bit), booleans 0 and 255; floating-point values keep their scale.
    """
    channels = array.shape[0]
    if channels not in (1, 3, 4):
        raise ValueError(f"An image array must have 1, 3 or 4 channels, got shape {array.shape} (channels first).")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = _to_8_bit(array)
    elif np.issubdtype(array.dtype, np.integer):
        if array.size and (array.min() < 0 or array.max() > 255):
            raise ValueError(
                f"An integer image array must hold values from 0 to 255 (or be uint16: 0 to 65535), got {array.dtype} "
                f"values from {array.min()} to {array.max()}."
            )
        array = array.astype(np.uint8)
    else:
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError("The image array contains NaN or infinite values.")
    if channels == 1:
        return np.repeat(array, 3, axis=0)
    if channels == 3:
        return array
    white = 255.0 if array.dtype == np.uint8 else 1.0
    if array.min() < 0 or array.max() > white:
        raise ValueError(
            f"A floating-point RGBA image must lie in [0, 1], got values from {array.min()} to {array.max()}."
        )
    alpha = array[3:] / white
    composite = alpha * array[:3] + (1 - alpha) * white
    return (np.round(composite) if white == 255.0 else composite).astype(array.dtype)


def channels_first(image, input_data_format=None):
    """(H, W), (H, W, C) or (C, H, W), NumPy or torch, as (C, H, W); without a format it is inferred from the shape."""
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise ValueError(f"An image array must have 2 or 3 dimensions, got shape {tuple(image.shape)}.")
    if input_data_format is None:
        input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    if ChannelDimension(input_data_format) == ChannelDimension.FIRST:
        return image
    return image.permute(2, 0, 1) if hasattr(image, "permute") else np.moveaxis(image, -1, 0)


@dataclass(frozen=True)
class ResizePlan:
    """Sizes and offsets of the steps of a resize, as (vertical, horizontal) in pixels."""

    trimmed: tuple[int, int]  # cut out of the middle of the input
    resized: tuple[int, int]
    crop_offset: tuple[int, int]
    pad_offset: tuple[int, int]


def plan_resize(image_size: tuple[int, int], size: tuple[int, int], resize_mode: str) -> ResizePlan:
    """Geometry of a resize from `image_size` to `size`, both (height, width)."""
    if resize_mode == "squash":
        return ResizePlan(image_size, size, (0, 0), (0, 0))
    trimmed = image_size
    if resize_mode == "center_crop":
        height, width = image_size
        trimmed = (min(height, _MAX_ASPECT_RATIO * width), min(width, _MAX_ASPECT_RATIO * height))
        scale = max(new / old for new, old in zip(size, trimmed))
        resized = tuple(max(new, round(old * scale)) for new, old in zip(size, trimmed))
        return ResizePlan(trimmed, resized, tuple((old - new) // 2 for new, old in zip(size, resized)), (0, 0))
    scale = min(new / old for new, old in zip(size, image_size))
    resized = tuple(min(new, max(1, round(old * scale))) for new, old in zip(size, image_size))
    return ResizePlan(trimmed, resized, (0, 0), tuple((new - old) // 2 for new, old in zip(size, resized)))


def _cut(image, offset: tuple[int, int], size: tuple[int, int]):
    return image[..., offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]


def _extrema(image):
    """Smallest and largest value of what an image (..., 3, H, W) may hold: of its type, or else of the image."""
    if "uint8" in str(image.dtype):
        return 0, 255
    if hasattr(image, "amin"):
        return image.amin((-3, -2, -1), keepdim=True), image.amax((-3, -2, -1), keepdim=True)
    return image.min(), image.max()


def post_process_images(reconstruction) -> list[Image.Image]:
    """
    Turn decoded images into PIL images.

    Args:
        reconstruction (`torch.Tensor` or `np.ndarray`):
            Floating point, (B, 3, S', S') or (3, S', S'), in [-1, 1]. A decoder may overshoot: values are clamped.

    Returns:
        `list[PIL.Image.Image]`: B RGB images.

    Raises:
        ValueError: for another rank or number of channels, for integers, NaN, or values far outside [-1, 1].
    """
    is_torch = hasattr(reconstruction, "detach")
    if not is_torch and not isinstance(reconstruction, np.ndarray):
        raise ValueError(f"`reconstruction` must be a tensor or an array, got {type(reconstruction).__name__}.")
    shape = tuple(reconstruction.shape)
    if len(shape) not in (3, 4) or shape[-3] != 3:
        raise ValueError(f"`reconstruction` must have shape (B, 3, height, width) or (3, height, width), got {shape}.")
    dtype = reconstruction.dtype
    if not (dtype.is_floating_point if is_torch else np.issubdtype(dtype, np.floating)):
        raise ValueError(f"`reconstruction` must be a floating-point tensor with values in [-1, 1], got {dtype}.")
    array = reconstruction.detach().float().cpu().numpy() if is_torch else reconstruction.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("`reconstruction` contains NaN or infinite values; images have values in [-1, 1].")
    if array.size and np.abs(array).max() > _MAX_RECONSTRUCTION:
        raise ValueError(
            f"`reconstruction` must have values in [-1, 1], got values from {array.min():g} to {array.max():g}."
        )
    array = array.reshape(-1, *shape[-3:]).clip(-1, 1)
    pixels = np.round((array + 1) * 127.5).astype(np.uint8)
    return [Image.fromarray(image) for image in np.moveaxis(pixels, 1, -1)]


class DualTokenImageProcessingMixin:
    """Settings, checks, conversions and geometry of both backends; the backend brings `resize` and `_preprocess`."""

    valid_kwargs = DualTokenImageProcessorKwargs
    model_input_names = ["pixel_values"]

    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"height": 384, "width": 384}
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    resize_mode = "squash"
    fill_color = (127, 127, 127)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._validate_resize(self.size, self.resize_mode)

    @staticmethod
    def _validate_resize(size, resize_mode):
        if resize_mode not in RESIZE_MODES:
            accepted = ", ".join(map(repr, RESIZE_MODES))
            raise ValueError(f"`resize_mode` must be one of {accepted}, got {resize_mode!r}.")
        if size is None or not (size.height and size.width):
            raise ValueError(f"`size` must be a number of pixels or give 'height' and 'width', got {size}.")

    def _standardize_kwargs(self, fill_color=None, **kwargs) -> dict:
        if isinstance(fill_color, int):
            fill_color = (fill_color,) * 3
        if fill_color is not None and (
            len(fill_color) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in fill_color)
        ):
            raise ValueError(f"`fill_color` must be one or three integers from 0 to 255, got {fill_color}.")
        kwargs = super()._standardize_kwargs(**kwargs)
        kwargs["fill_color"] = None if fill_color is None else tuple(fill_color)
        return kwargs

    def _validate_preprocess_kwargs(self, size=None, resize_mode=None, **kwargs):
        if kwargs.get("do_resize"):
            self._validate_resize(size, resize_mode)
        super()._validate_preprocess_kwargs(size=size, **kwargs)

    def fetch_images(self, image_url_or_urls):
        """Open paths, URLs and base64 strings with PIL; images and arrays pass through, lists keep their nesting."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return open_image(image_url_or_urls)
        if is_valid_image(image_url_or_urls):
            # transformers counts dimensions to tell an image from a batch; grey ones may come without a channel.
            is_grey = not isinstance(image_url_or_urls, Image.Image) and image_url_or_urls.ndim == 2
            return image_url_or_urls[None] if is_grey else image_url_or_urls
        raise TypeError(
            "An image must be a PIL image, an array, a tensor, a path, a URL or base64 data, got "
            f"{type(image_url_or_urls).__name__}."
        )

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, do_rescale=None, **kwargs):
        """One PIL image, array or tensor as an RGB array (3, H, W)."""
        if isinstance(image, Image.Image):
            image = decode_image(image)
            array = pil_to_rgb(image) if do_convert_rgb else np.array(image)
            return np.ascontiguousarray(channels_first(array, ChannelDimension.LAST))
        if hasattr(image, "detach"):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        array = channels_first(np.asarray(image), input_data_format)
        if 0 in array.shape:
            raise ValueError(f"An image must have at least one pixel, got an array of shape {array.shape}.")
        array = array_to_rgb(array) if do_convert_rgb else array
        if do_rescale and np.issubdtype(array.dtype, np.floating) and 0 <= array.min() and array.max() <= 1:
            logger.warning_once(
                "A floating-point image with values in [0, 1] is divided by 255 again: pass `do_rescale=False`, or "
                "give values from 0 to 255."
            )
        return np.ascontiguousarray(array)

    def _fit(self, image, size: SizeDict, resample, resize_mode: str, fill: tuple[float, ...]):
        """Bring images (..., 3, H, W) of one shape to `size`."""
        target = (size.height, size.width)
        plan = plan_resize(tuple(image.shape[-2:]), target, resize_mode)
        middle = tuple((old - new) // 2 for old, new in zip(image.shape[-2:], plan.trimmed))
        image = _cut(image, middle, plan.trimmed)
        low, high = _extrema(image)
        image = self.resize(image, size=SizeDict(height=plan.resized[0], width=plan.resized[1]), resample=resample)
        # Bicubic resampling overshoots at edges. For 8-bit images both libraries clamp, for others neither does.
        image = _cut(image, plan.crop_offset, target).clip(low, high)
        if tuple(image.shape[-2:]) == target:
            return image
        shape = (*image.shape[:-2], *target)
        canvas = image.new_empty(shape) if hasattr(image, "new_empty") else np.empty(shape, image.dtype)
        for channel in range(shape[-3]):
            canvas[..., channel, :, :] = fill[channel]
        _cut(canvas, plan.pad_offset, plan.resized)[...] = image
        return canvas

    @staticmethod
    def _fill_values(fill_color, do_rescale: bool, rescale_factor: float) -> tuple[float, ...]:
        """The padding's colour on the scale of the images at hand: 0..255, unless they come already rescaled."""
        return fill_color if do_rescale else tuple(value * rescale_factor for value in fill_color)

    def post_process_images(self, reconstruction) -> list[Image.Image]:
        """Decoded images, floating point (B, 3, S', S') or (3, S', S') in [-1, 1], as PIL images."""
        return post_process_images(reconstruction)


class DualTokenImageProcessorPil(DualTokenImageProcessingMixin, PilBackend):
    r"""
    Images to `pixel_values`, `float32` (B, 3, height, width) in [-1, 1], with PIL and NumPy.

    Accepts PIL images of any mode, paths, URLs, base64 strings, NumPy arrays and torch tensors: one, a list, or a
    batch. Everything becomes RGB: transparent pixels are composited on white, 16-bit grey is scaled to 8 bit, the EXIF
    orientation is applied, of an animation the current frame is taken. Arrays hold 0..255 unless `do_rescale=False`.

    Args:
        size (`int` or `dict`, defaults to 384): side, or `{"height": ..., "width": ...}`, in pixels.
        resize_mode (`str`, defaults to `"squash"`): `"squash"`, `"center_crop"` or `"pad"`; see
            [`DualTokenImageProcessorKwargs`]. Without `do_resize` images are neither resized, cropped nor padded.
        fill_color (`int` or `list[int]`, defaults to `(127, 127, 127)`): colour of the padding.
        **kwargs: the other settings of transformers' image processors (`resample`, `do_normalize`, ...).

    Raises:
        ValueError: for an unknown `resize_mode`, a `size` or `fill_color` of another form, and for an image that is
            truncated, damaged, empty or of an undefined range.
    """

    def resize(self, image: np.ndarray, size: SizeDict, resample=None, **kwargs) -> np.ndarray:
        if image.dtype != np.float32:
            return super().resize(image, size, resample=resample, **kwargs)
        # transformers goes through 8 bit here, and takes an image of nothing but 0.0 and 1.0 for one of 0..255.
        planes = [Image.fromarray(plane).resize((size.width, size.height), resample=resample) for plane in image]
        return np.stack([np.asarray(plane) for plane in planes])

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        resize_mode: str,
        fill_color: tuple[int, ...],
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        fill = self._fill_values(fill_color, do_rescale, rescale_factor)
        processed = []
        for image in images:
            if do_resize:
                image = self._fit(image, size, resample, resize_mode, fill)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            processed.append(image)
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)


__all__ = ["DualTokenImageProcessorPil"]
