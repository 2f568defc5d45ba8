# Copyright 2026 The transformers-dualtoken authors. All rights reserved.
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Image processor of the PIL backend, and all that both backends share: settings, conversions and geometry."""

import contextlib
import math
import operator

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import auto_docstring

from .field_rules import Rule, is_list_of
from .image_reading import (
    MAX_DECODED_PIXELS,
    MAX_RECONSTRUCTION,
    ImageBounds,
    UnreadableImageError,
    flatten_images,
    image_name,
    image_to_tensor,
    is_array,
    open_image,
)


RESIZE_MODES = ("squash", "center_crop", "pad")
_PIXELS = f"at most {MAX_DECODED_PIXELS:,} pixels in all"
_SIZE = f"a number of pixels or give 'height' and 'width', {_PIXELS} and whole numbers from 1 on"
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


def _is_finite(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e38  # as float32 holds


def _is_size(size) -> bool:
    sides = [(size or {}).get(side) for side in ("height", "width")]
    return all(type(side) is int and side > 0 for side in sides) and math.prod(sides) <= MAX_DECODED_PIXELS


# What settings must be, and those that count only where a step is done. Whatever is wrong is a `ValueError`.
_FLAG = Rule("True or False", in_range=lambda value: value is None or isinstance(value, bool))
_RULES = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), _FLAG),
    "do_center_crop": Rule("left out: use `resize_mode='center_crop'`", in_range=operator.not_),
    "do_pad": Rule("left out: use `resize_mode='pad'`", in_range=operator.not_),
    "resize_mode": Rule(f"one of {', '.join(map(repr, RESIZE_MODES))}", in_range=RESIZE_MODES.__contains__),
    "size": Rule(_SIZE, in_range=_is_size),
    "resample": Rule(f"one of {', '.join(map(str, PILImageResampling))}", in_range=[*PILImageResampling].__contains__),
    "fill_color": Rule(
        "one or three integers from 0 to 255", in_range=is_list_of(lambda n: type(n) is int and 0 <= n < 256, 3)
    ),
    "rescale_factor": Rule("a finite number other than 0", in_range=lambda n: _is_finite(n) and n != 0),
    "image_mean": Rule("one number or three finite numbers", in_range=is_list_of(_is_finite, 1, 3, 4)),
    "image_std": Rule(
        "one number or three positive numbers", in_range=is_list_of(lambda n: _is_finite(n) and n > 0, 1, 3, 4)
    ),
}
_OF_STEPS = {
    **dict.fromkeys(("resize_mode", "size", "resample"), "do_resize"),
    "rescale_factor": "do_rescale",
    **dict.fromkeys(("image_mean", "image_std"), "do_normalize"),
}


@contextlib.contextmanager
def _named(image):
    """Errors of reading an image, those of the network too, become sentences that name it."""
    try:
        yield
    except (UnreadableImageError, OSError) as error:
        name = image_name(image)
        raise UnreadableImageError(f"The image {repr(name) if name else 'given'} cannot be used: {error}.") from error


def plan_resize(image_size: tuple[int, int], size: tuple[int, int], resize_mode: str) -> tuple[tuple, tuple]:
    """
    Sizes (height, width) of the steps from `image_size` to `size`: of the middle of the image that is kept, and what
    that is resized to. Of more than `size` the middle is cropped, less is padded on both sides.
    """
    if resize_mode == "squash":
        return image_size, size
    if resize_mode == "pad":
        scale = min(new / old for new, old in zip(size, image_size))
        return image_size, tuple(min(new, max(1, round(old * scale))) for new, old in zip(size, image_size))
    height, width = image_size
    kept = (min(height, _MAX_ASPECT_RATIO * width), min(width, _MAX_ASPECT_RATIO * height))
    scale = max(new / old for new, old in zip(size, kept))
    return kept, tuple(max(new, round(old * scale)) for new, old in zip(size, kept))


def _middle(image, size: tuple[int, int]):
    """The middle (..., *size) of images (..., H, W), a view."""
    top, left = ((old - new) // 2 for old, new in zip(image.shape[-2:], size))
    return image[..., top : top + size[0], left : left + size[1]]


def _limits(image) -> tuple[float, float]:
    """What bicubic's overshoot at edges is clamped to, as both libraries do for `uint8`: 0..255, 0..1, or its own range."""
    if "uint8" in str(image.dtype):
        return 0, 255
    low, high = float(image.min()), float(image.max())
    return (low, high) if low < 0 else (0, next(limit for limit in (1, 255, high) if high <= limit))


def post_process_images(reconstruction) -> list[Image.Image]:
    """
    Decoded images, floating point (B, 3, S', S') or (3, S', S') in [-1, 1], as B PIL images. What overshoots a little
    is clamped; a `ValueError` for another shape or kind, NaN, and values far outside.
    """
    if not is_array(reconstruction):
        raise ValueError(f"`reconstruction` must be a tensor or an array, got {type(reconstruction).__name__}.")
    shape = tuple(reconstruction.shape)
    if len(shape) not in (3, 4) or shape[-3] != 3 or 0 in shape[-2:]:
        raise ValueError(f"`reconstruction` must have shape (B, 3, height, width) or (3, height, width), got {shape}.")
    if "float" not in str(reconstruction.dtype):
        raise ValueError(f"`reconstruction` must be a floating-point tensor in [-1, 1], got {reconstruction.dtype}.")
    images = torch.as_tensor(reconstruction).detach().cpu().float().reshape(-1, *shape[-3:])
    if not images.isfinite().all():
        raise ValueError("`reconstruction` contains NaN or infinite values; images have values in [-1, 1].")
    if images.numel() and images.abs().max() > MAX_RECONSTRUCTION:
        low, high = map(float, images.aminmax())
        raise ValueError(f"`reconstruction` must have values in [-1, 1], got values from {low:g} to {high:g}.")
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).contiguous().numpy()]


class DualTokenImageProcessingMixin:
    """Settings, checks, conversions and geometry of both backends; the backend brings `resize` and `_preprocess`."""

    valid_kwargs = DualTokenImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"height": 384, "width": 384}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    resize_mode = "squash"
    fill_color = (127, 127, 127)
    image_sources = ImageBounds.sources
    max_image_pixels = ImageBounds.max_pixels
    max_image_bytes = ImageBounds.max_bytes

    def __init__(self, **kwargs: Unpack[DualTokenImageProcessorKwargs]):
        # To transformers `None` is the default; to these two it is no limit.
        limits = {name: kwargs[name] for name in ("max_image_pixels", "max_image_bytes") if name in kwargs}
        super().__init__(**kwargs)
        vars(self).update(limits)
        self._validate_preprocess_kwargs(**{name: getattr(self, name, None) for name in self._valid_kwargs_names})

    def _standardize_kwargs(self, fill_color=None, **kwargs) -> dict:
        for name in ("image_mean", "image_std"):
            if isinstance(kwargs.get(name), (int, float)):
                kwargs[name] = (kwargs[name],) * 3
        try:
            kwargs = super()._standardize_kwargs(**kwargs)
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"`size` must be {_SIZE}, got {kwargs.get('size')!r}.") from error
        if type(fill_color) is int:
            fill_color = (fill_color,) * 3
        return {**kwargs, "fill_color": tuple(fill_color) if isinstance(fill_color, list) else fill_color}

    def _validate_preprocess_kwargs(self, **kwargs):
        size = kwargs["size"]
        settings = {**kwargs, "size": size if size is None else dict(size)}
        for name, rule in _RULES.items():
            if name not in _OF_STEPS or kwargs[_OF_STEPS[name]]:
                rule.check(name, settings[name])
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

    def _to_tensor(self, image, input_data_format=None, **settings) -> torch.Tensor:
        """A PIL image, array or tensor as a tensor (3, H, W): `uint8`, or `float32` where nothing is rescaled."""
        flags = {name: settings.get(name) for name in ("do_convert_rgb", "do_rescale", "do_normalize")}
        image = image_to_tensor(image, input_data_format, **flags)
        if not flags["do_convert_rgb"]:
            if flags["do_normalize"] and len(image) != (means := len(settings["image_mean"])):
                channels = f"the channels that `image_mean` has ({means}), got {len(image)}"
                raise ValueError(f"Without `do_convert_rgb` an image needs {channels}.")
            if settings.get("resize_mode") == "pad" and len(image) not in (1, 3):
                raise ValueError(f"An image to be padded needs 1 or 3 channels, got {len(image)}.")
        return image

    def _fit(self, image, size: SizeDict, resample, resize_mode: str, fill_color: tuple[int, ...], **kwargs):
        """Bring images (..., C, H, W) of one shape to `size`."""
        target = (size.height, size.width)
        kept, resized = plan_resize(tuple(image.shape[-2:]), target, resize_mode)
        image = _middle(image, kept)
        limits = _limits(image)
        image = self.resize(image, size=SizeDict(height=resized[0], width=resized[1]), resample=resample)
        if resize_mode != "pad":
            return _middle(image, target).clip(*limits)
        shape = (*image.shape[:-2], *target)
        canvas = image.new_empty(shape) if isinstance(image, torch.Tensor) else np.empty(shape, image.dtype)
        white = 255 if limits[1] == 255 else 1
        for channel, level in zip(range(shape[-3]), fill_color):
            canvas[..., channel, :, :] = level * white / 255
        _middle(canvas, resized)[...] = image.clip(*limits)
        return canvas

    post_process_images = staticmethod(post_process_images)


@auto_docstring(
    custom_intro=r"""
    Images to `pixel_values`, `float32` (B, 3, height, width) in [-1, 1], with PIL and NumPy.

    Accepts PIL images of any mode, paths, URLs, bytes, file objects, base64 text, `{"bytes": ..., "path": ...}`, NumPy
    arrays and torch tensors: one, a list, or a batch. Everything becomes RGB: transparent pixels are composited on
    white, 16-bit grey is scaled to 8 bit, the EXIF orientation is applied, of an animation the current frame is taken.
    Integer arrays hold 0..255 (`uint16`: 0..65535); floating-point ones 0..255 or [0, 1], which give what the rounded
    `uint8` gives. With `do_rescale=False` an array is not rounded, and must lie in [0, 1] if it is normalised.
    Settings out of range and what holds no readable image raise a `ValueError`, another type a `TypeError`.
    """
)
class DualTokenImageProcessorPil(DualTokenImageProcessingMixin, PilBackend):
    def process_image(self, image, **kwargs) -> np.ndarray:
        return self._to_tensor(image, **kwargs).cpu().numpy()

    def resize(self, image: np.ndarray, size: SizeDict, resample=None, **kwargs) -> np.ndarray:
        # Of `uint8` what transformers gives, in less memory; floats go through 8 bit there, and an image of nothing but
        # 0.0 and 1.0 is taken for one of 0..255.
        planes = [Image.fromarray(plane).resize((size.width, size.height), resample=resample) for plane in image]
        return np.stack([np.asarray(plane) for plane in planes])

    def _preprocess(
        self, images, do_resize, do_rescale, do_normalize, image_mean, image_std, return_tensors, **kwargs
    ) -> BatchFeature:
        processed = []
        for image in images:
            if do_resize:
                image = self._fit(image, **kwargs)
            if do_rescale:
                image = self.rescale(image, kwargs["rescale_factor"])
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            processed.append(image)
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)


__all__ = ["DualTokenImageProcessorPil"]
