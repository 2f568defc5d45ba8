# Copyright 2026 The transformers-dualtoken authors. All rights reserved.
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Image processor of the torchvision backend. Importable without torchvision; only its construction needs it."""

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.processing_utils import Unpack
from transformers.utils import auto_docstring, requires_backends

from .image_processing_pil_dualtoken import DualTokenImageProcessingMixin, DualTokenImageProcessorKwargs


@auto_docstring(
    custom_intro=r"""
    Images to `pixel_values`, `float32` (B, 3, height, width) in [-1, 1], with torchvision: images of one shape are
    processed together, on `device` if that is given, and tensors stay on their device.

    Settings, accepted images, conversions and errors are those of [`DualTokenImageProcessorPil`]; only the resampling
    differs, by one level of 255 at a few pixels.
    """
)
class DualTokenImageProcessor(DualTokenImageProcessingMixin, TorchvisionBackend):
    def __init__(self, **kwargs: Unpack[DualTokenImageProcessorKwargs]):
        requires_backends(self, ["torch", "torchvision"])
        super().__init__(**kwargs)

    def process_image(self, image, device=None, **kwargs) -> torch.Tensor:
        tensor = self._to_tensor(image, **kwargs)
        if device is None and isinstance(image, torch.Tensor):
            device = image.device
        return tensor.to(device)

    def _preprocess(self, images, do_resize, disable_grouping, return_tensors, **kwargs) -> BatchFeature:
        # What values a floating-point image may have is told by the image.
        disable_grouping = disable_grouping if all(image.dtype == torch.uint8 for image in images) else True
        grouped, index = group_images_by_shape(images, disable_grouping=disable_grouping)
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        for shape, stacked in grouped.items():
            stacked = self._fit(stacked, **kwargs) if do_resize else stacked
            grouped[shape] = self.rescale_and_normalize(stacked, *(kwargs[name] for name in names))
        return BatchFeature(data={"pixel_values": reorder_images(grouped, index)}, tensor_type=return_tensors)


__all__ = ["DualTokenImageProcessor"]
