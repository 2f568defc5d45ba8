"""Image processor of the PIL backend, and everything both backends share.

The torchvision backend (`image_processing_dualtoken.py`) takes its conversions, its geometry and its checks from here,
so the two differ in nothing but the resampling routine.
"""

import contextlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .image_reading import (
    MAX_DECODED_PIXELS,
    MAX_RECONSTRUCTION,
    ImageBounds,
    UnreadableImageError,
    array_to_rgb,
    as_channels_first,
    as_numpy,
    check_rescaled,
    decode_image,
    flatten_images,
    image_name,
    is_array,
    open_image,
    pil_to_rgb,
    to_8_bit,
)


RESIZE_MODES = ("squash", "center_crop", "pad")
_WRONG_SIZE = "`size` must be a number of pixels or give 'height' and 'width', whole numbers from 1 on"
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
    image_sources (`str` or `list[str]`, *optional*, defaults to `("data", "local", "url")`):
        What images are read from, besides those in memory: `"data"` (bytes, base64 text, `data:` URLs), `"local"`
        (paths and `file://` URLs), `"url"` (http and https), `"fsspec"` (other URLs). Where strangers write the
        messages, `("data",)`: a path would show them files of this machine, a URL calls into its network.
    max_image_pixels (`int`, *optional*, defaults to 67,108,864):
        Pixels of an image that is decoded, told by its header. `None` leaves only Pillow's own limit.
    max_image_bytes (`int`, *optional*, defaults to 67,108,864):
        Bytes of an image that is downloaded. `None` lifts the limit.
    """

    resize_mode: str | None
    fill_color: int | list[int] | tuple[int, ...] | None
    image_sources: str | list[str] | tuple[str, ...] | None
    max_image_pixels: int | None
    max_image_bytes: int | None


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


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@contextlib.contextmanager
def _named(image):
    """Errors of reading an image, those of the network too, become sentences that name it."""
    try:
        yield
    except (UnreadableImageError, OSError) as error:
        name = image_name(image)
        raise UnreadableImageError(f"The image {repr(name) if name else 'given'} cannot be used: {error}.") from error


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
    if not is_array(reconstruction):
        raise ValueError(f"`reconstruction` must be a tensor or an array, got {type(reconstruction).__name__}.")
    shape = tuple(reconstruction.shape)
    if len(shape) not in (3, 4) or shape[-3] != 3 or 0 in shape[-2:]:
        raise ValueError(f"`reconstruction` must have shape (B, 3, height, width) or (3, height, width), got {shape}.")
    if "float" not in str(reconstruction.dtype):
        raise ValueError(
            f"`reconstruction` must be a floating-point tensor with values in [-1, 1], got {reconstruction.dtype}."
        )
    array = as_numpy(reconstruction).astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("`reconstruction` contains NaN or infinite values; images have values in [-1, 1].")
    if array.size and np.abs(array).max() > MAX_RECONSTRUCTION:
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
    image_sources = ImageBounds.sources
    max_image_pixels = ImageBounds.max_pixels
    max_image_bytes = ImageBounds.max_bytes

    def __init__(self, **kwargs):
        # To transformers `None` is the default; to these two it is no limit.
        limits = {name: kwargs[name] for name in ("max_image_pixels", "max_image_bytes") if name in kwargs}
        super().__init__(**kwargs)
        vars(self).update(limits)
        self._validate_preprocess_kwargs(**{name: getattr(self, name, None) for name in self._valid_kwargs_names})

    def _standardize_kwargs(self, fill_color=None, **kwargs) -> dict:
        if type(fill_color) is int:
            fill_color = (fill_color,) * 3
        for name in ("image_mean", "image_std"):
            if isinstance(kwargs.get(name), (int, float)):
                kwargs[name] = (kwargs[name],) * 3
        try:
            kwargs = super()._standardize_kwargs(**kwargs)
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{_WRONG_SIZE}, got {kwargs.get('size')!r}.") from error
        kwargs["fill_color"] = tuple(fill_color) if isinstance(fill_color, list) else fill_color
        return kwargs

    def _validate_preprocess_kwargs(
        self,
        size=None,
        resize_mode=None,
        fill_color=None,
        image_mean=None,
        image_std=None,
        rescale_factor=None,
        resample=None,
        **kwargs,
    ):
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_center_crop", "do_pad"):
            if not isinstance(kwargs.get(name), (bool, type(None))):
                raise ValueError(f"`{name}` must be True or False, got {kwargs[name]!r}.")
        for name, mode in (("do_center_crop", "center_crop"), ("do_pad", "pad")):
            if kwargs.get(name):
                raise ValueError(f"`{name}` is no setting of this image processor; use `resize_mode={mode!r}`.")
        if kwargs.get("do_resize"):
            if resize_mode not in RESIZE_MODES:
                accepted = ", ".join(map(repr, RESIZE_MODES))
                raise ValueError(f"`resize_mode` must be one of {accepted}, got {resize_mode!r}.")
            sides = (size.height, size.width) if size is not None else ()
            if not sides or not all(isinstance(side, int) and side is not True and side > 0 for side in sides):
                raise ValueError(f"{_WRONG_SIZE}, got {size and dict(size)}.")
            if math.prod(sides) > MAX_DECODED_PIXELS:
                raise ValueError(f"`size` must have at most {MAX_DECODED_PIXELS:,} pixels, got {dict(size)}.")
            if resample not in list(PILImageResampling):
                raise ValueError(
                    f"`resample` must be one of {', '.join(map(str, PILImageResampling))}, got {resample!r}."
                )
        is_level = isinstance(fill_color, tuple) and all(
            type(value) is int and 0 <= value <= 255 for value in fill_color
        )
        if not is_level or len(fill_color) != 3:
            raise ValueError(f"`fill_color` must be one or three integers from 0 to 255, got {fill_color!r}.")
        if kwargs.get("do_rescale") and not (_is_number(rescale_factor) and rescale_factor != 0):
            raise ValueError(f"`rescale_factor` must be a finite number other than 0, got {rescale_factor!r}.")
        if kwargs.get("do_normalize"):
            for name, values in (("image_mean", image_mean), ("image_std", image_std)):
                is_tuple = isinstance(values, tuple) and len(values) in (1, 3, 4) and all(map(_is_number, values))
                if not is_tuple or (name == "image_std" and min(values) <= 0):
                    what = "positive numbers" if name == "image_std" else "finite numbers"
                    raise ValueError(f"`{name}` must be one number or three {what}, got {values!r}.")
        self._bounds(**kwargs)

    @staticmethod
    def _bounds(image_sources, max_image_pixels, max_image_bytes, **kwargs) -> ImageBounds:
        return ImageBounds(image_sources, max_image_pixels, max_image_bytes)

    def fetch_images(self, image_url_or_urls):
        """Open what holds images (see [`locate_image`]); those in memory pass through, lists keep their nesting."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        with _named(image_url_or_urls):
            return open_image(image_url_or_urls, self._bounds(**vars(self)))

    def _prepare_image_like_inputs(self, images, *args, expected_ndims: int = 3, **kwargs) -> list:
        """Every image as `process_image` makes it, one after the other: files are open and decoded one at a time."""
        images = flatten_images(images)
        if not images:
            raise ValueError("There must be at least one image, got an empty list.")
        bounds, processed = self._bounds(**kwargs), []
        for image in images:
            with _named(image):
                processed.append(self.process_image(open_image(image, bounds), *args, **kwargs))
        return processed

    def process_image(
        self,
        image,
        do_convert_rgb=None,
        input_data_format=None,
        do_rescale=None,
        rescale_factor=None,
        do_normalize=None,
        image_mean=(),
        resize_mode=None,
        **kwargs,
    ) -> np.ndarray:
        """
        One PIL image, array or tensor as an array (3, H, W): `uint8`, or what it was where `rescale_factor` is not
        1/255 or nothing is rescaled.
        """
        is_pil = isinstance(image, Image.Image)
        if is_pil:
            image = decode_image(image, ImageBounds(max_pixels=None))
            image = pil_to_rgb(image) if do_convert_rgb else np.array(image)
            input_data_format = ChannelDimension.LAST
        array = as_channels_first(image, input_data_format)
        if is_pil and array.dtype == np.uint8:
            pass  # and nobody else's memory: a copy would be 200 MB of a large image
        elif do_rescale and math.isclose(rescale_factor, 1 / 255):
            array = to_8_bit(array)
        elif array.dtype.kind == "f":
            array = array.astype(np.float32)
            if not np.isfinite(array).all():
                raise ValueError("The image array contains NaN or infinite values.")
        else:
            array = to_8_bit(array)
        if not do_rescale and do_normalize:
            check_rescaled(array)
            array = array.clip(0, 1)
        if do_convert_rgb:
            array = array_to_rgb(array)
        elif (
            do_normalize
            and len(image_mean) not in (1, len(array))
            or resize_mode == "pad"
            and len(array) not in (1, 3)
        ):
            raise ValueError(
                f"Without `do_convert_rgb` an image needs the channels that `image_mean` has ({len(image_mean)}), got "
                f"{len(array)}."
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
    def _fill_values(image, fill_color, do_rescale: bool) -> tuple[float, ...]:
        """The padding's colour on the scale of the image at hand: 0..255, unless it comes already rescaled."""
        is_level = do_rescale or "uint8" in str(image.dtype)
        return fill_color if is_level else tuple(value / 255 for value in fill_color)

    def post_process_images(self, reconstruction) -> list[Image.Image]:
        """Decoded images, floating point (B, 3, S', S') or (3, S', S') in [-1, 1], as PIL images."""
        return post_process_images(reconstruction)


class DualTokenImageProcessorPil(DualTokenImageProcessingMixin, PilBackend):
    r"""
    Images to `pixel_values`, `float32` (B, 3, height, width) in [-1, 1], with PIL and NumPy.

    Accepts PIL images of any mode, paths, URLs, bytes, file objects, base64 text, `{"bytes": ..., "path": ...}`, NumPy
    arrays and torch tensors: one, a list, or a batch. Everything becomes RGB: transparent pixels are composited on
    white, 16-bit grey is scaled to 8 bit, the EXIF orientation is applied, of an animation the current frame is taken.
    Integer arrays hold 0..255 (`uint16`: 0..65535); floating-point ones 0..255 or [0, 1], which give what the rounded
    `uint8` gives. With `do_rescale=False` an array is not rounded, and must lie in [0, 1] if it is normalised.

    Args:
        size (`int` or `dict`, defaults to 384): side, or `{"height": ..., "width": ...}`, in pixels.
        resize_mode (`str`, defaults to `"squash"`): `"squash"`, `"center_crop"` or `"pad"`; see
            [`DualTokenImageProcessorKwargs`]. Without `do_resize` images are neither resized, cropped nor padded.
        fill_color (`int` or `list[int]`, defaults to `(127, 127, 127)`): colour of the padding.
        **kwargs: the other settings of transformers' image processors (`resample`, `do_normalize`, ...).

    Raises:
        ValueError: for settings of another form or range, and for arrays of another shape or range.
        UnreadableImageError (a `ValueError`): for an image that is missing, truncated, damaged, empty, too large, from
            a source that is not allowed, or of an undefined range.
        TypeError: for what holds no image.
    """

    def resize(self, image: np.ndarray, size: SizeDict, resample=None, **kwargs) -> np.ndarray:
        # Of `uint8` what transformers gives, in less memory; floats go through 8 bit there, and an image of nothing but
        # 0.0 and 1.0 is taken for one of 0..255.
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
        processed = []
        for image in images:
            if do_resize:
                fill = self._fill_values(image, fill_color, do_rescale)
                image = self._fit(image, size, resample, resize_mode, fill)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            processed.append(image)
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)


__all__ = ["DualTokenImageProcessorPil"]
