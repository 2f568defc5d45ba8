"""Image processor of the torchvision backend. Importable without torchvision; only its construction needs it."""

import math

import numpy as np
import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import SizeDict
from transformers.utils import requires_backends

from .image_processing_pil_dualtoken import DualTokenImageProcessingMixin
from .image_reading import channels_first, float_scale


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class DualTokenImageProcessor(DualTokenImageProcessingMixin, TorchvisionBackend):
    r"""
    Images to `pixel_values`, `float32` (B, 3, height, width) in [-1, 1], with torchvision: images of one shape are
    processed together, on `device` if that is given, and tensors stay on their device.

    Settings, accepted images, conversions and errors are those of [`DualTokenImageProcessorPil`]; only the resampling
    differs, by one level of 255 at a few pixels.
    """

    def __init__(self, **kwargs):
        requires_backends(self, ["torch", "torchvision"])
        super().__init__(**kwargs)

    def process_image(self, image, device=None, do_rescale=None, rescale_factor=None, do_convert_rgb=None, **kwargs):
        is_tensor = isinstance(image, torch.Tensor)
        if is_tensor and do_rescale and do_convert_rgb and math.isclose(rescale_factor, 1 / 255):
            # Stays on its device.
            if image.layout == torch.strided and (image.dtype == torch.uint8 or image.dtype in _FLOATS):
                tensor = channels_first(image.detach(), kwargs.get("input_data_format"))
                if tensor.shape[0] == 3:
                    if tensor.dtype != torch.uint8:
                        tensor = tensor.float()
                        tensor = (tensor * float_scale(tensor)).round().clamp(0, 255).to(torch.uint8)
                    return tensor.contiguous() if device is None else tensor.contiguous().to(device)
        settings = {"do_rescale": do_rescale, "rescale_factor": rescale_factor, "do_convert_rgb": do_convert_rgb}
        array = super().process_image(image, **settings, **kwargs)
        tensor = torch.from_numpy(array if array.flags.writeable else np.array(array))
        if device is None and is_tensor:
            device = image.device
        return tensor if device is None else tensor.to(device)

    def _preprocess(
        self,
        images: list[torch.Tensor],
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
        disable_grouping: bool | None = None,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        grouped, index = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, stacked in grouped.items():
            if do_resize:
                fill = self._fill_values(stacked, fill_color, do_rescale)
                stacked = self._fit(stacked, size, resample, resize_mode, fill)
            grouped[shape] = self.rescale_and_normalize(
                stacked, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
        return BatchFeature(data={"pixel_values": reorder_images(grouped, index)}, tensor_type=return_tensors)


__all__ = ["DualTokenImageProcessor"]
