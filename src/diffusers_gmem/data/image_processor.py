# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin

from .images import center_crop, image_to_tensor


class GMemImageProcessor(ImageProcessingMixin):
    """
    Prepares images for DINOv2 as the paper does (arXiv 2412.08781, public code): ADM's center crop to `crop_size`
    pixels, mean and standard deviation, then a bicubic resize without antialiasing to `size` pixels. 256 -> 224 gives
    DINOv2 with patches of 14 pixels a grid of 16 x 16 tokens, that of the latents of a 256 pixel image at factor 16.

    Args:
        crop_size (`int`, defaults to 256): side of the crop.
        size (`int`, defaults to 224): side of the result.
        image_mean (`list[float]`, defaults to ImageNet's): mean per channel, of values in [0, 1].
        image_std (`list[float]`, defaults to ImageNet's): standard deviation per channel.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        crop_size: int = 256,
        size: int = 224,
        image_mean: list[float] = [0.485, 0.456, 0.406],  # noqa: B006 (saved as they are)
        image_std: list[float] = [0.229, 0.224, 0.225],  # noqa: B006
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.crop_size = crop_size
        self.size = size
        self.image_mean = image_mean
        self.image_std = image_std

    def __call__(
        self,
        images: PIL.Image.Image | np.ndarray | torch.Tensor | list,
        return_tensors: str = "pt",
        do_rescale: bool = True,
    ) -> BatchFeature:
        """
        Args:
            images:
                RGB images, arrays of shape `(height, width, 3)` in 0..255, or tensors of shape
                `(3, crop_size, crop_size)`; one or a list.
            return_tensors (`str`, defaults to `"pt"`): the only choice.
            do_rescale (`bool`, defaults to `True`): tensors have values in 0..255, else in [0, 1].

        Returns:
            `BatchFeature` with `pixel_values` of shape `(batch_size, 3, size, size)`, float32.

        Raises:
            ValueError: if a tensor is not of the crop's shape, or other than PyTorch tensors are asked for.
        """
        if return_tensors != "pt":
            raise ValueError(f"`return_tensors` must be 'pt', got {return_tensors!r}.")
        images = images if isinstance(images, (list, tuple)) else [images]
        pixels = torch.stack([self._to_unit_range(image, do_rescale) for image in images])
        mean, std = (pixels.new_tensor(value).view(1, 3, 1, 1) for value in (self.image_mean, self.image_std))
        pixels = F.interpolate((pixels - mean) / std, size=(self.size, self.size), mode="bicubic")
        return BatchFeature({"pixel_values": pixels})

    def _to_unit_range(self, image: PIL.Image.Image | np.ndarray | torch.Tensor, do_rescale: bool) -> torch.Tensor:
        if isinstance(image, np.ndarray):
            image = PIL.Image.fromarray(image)
        if isinstance(image, PIL.Image.Image):
            return image_to_tensor(center_crop(image.convert("RGB"), self.crop_size)) * 0.5 + 0.5
        if image.shape != (3, self.crop_size, self.crop_size):
            raise ValueError(
                f"`images` must be RGB images or tensors of shape {(3, self.crop_size, self.crop_size)}, got "
                f"{tuple(image.shape)}."
            )
        return image.float() / 255 if do_rescale else image.float()


# As which a saved pipeline records it, see the package's `__init__`
GMemImageProcessor.__module__ = "diffusers_gmem"
