# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""From images to snippets, with any vision model that has a `pooler_output`."""

from typing import Any

import PIL.ImageOps
import torch
from diffusers.utils import logging

from .images import ImageSource


tqdm = logging.tqdm


def load_image_encoder(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None
) -> tuple[torch.nn.Module, Any]:
    """
    Loads a vision model of transformers and its image processor (the Pillow one, which needs no torchvision).

    Args:
        name_or_path (`str`): name on the Hub, or folder.
        revision (`str`, *optional*): branch, tag or commit.
        cache_dir (`str`, *optional*): the Hub's cache.

    Returns:
        `tuple`: the encoder, in eval mode, and the processor.
    """
    from transformers import AutoImageProcessor, AutoModel

    encoder = AutoModel.from_pretrained(name_or_path, revision=revision, cache_dir=cache_dir)
    processor = AutoImageProcessor.from_pretrained(name_or_path, revision=revision, cache_dir=cache_dir, backend="pil")
    return encoder.eval(), processor


@torch.no_grad()
def compute_snippets(
    source: ImageSource,
    encoder: torch.nn.Module,
    processor,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    flip: bool = False,
) -> torch.Tensor:
    """
    One snippet per image: the encoder's `pooler_output` (DINOv2's: its normalised class token) on what the processor
    makes of the whole image.

    Args:
        source ([`ImageSource`]): the images.
        encoder (`torch.nn.Module`): a vision model of transformers, or [`GMemImageEncoder`]. It is moved to `device`.
        processor: its image processor.
        batch_size (`int`, defaults to 64): images at a time.
        device (`torch.device` or `str`, defaults to `"cpu"`): where to compute.
        flip (`bool`, defaults to `False`): mirror the images left to right first.

    Returns:
        `torch.Tensor` of shape `(len(source), dim)`, float32, on the CPU.
    """
    encoder = encoder.to(device).eval()
    snippets = []
    for start in tqdm(range(0, len(source), batch_size), desc="Flipped snippets" if flip else "Snippets"):
        images = [source[index] for index in range(start, min(start + batch_size, len(source)))]
        if flip:
            images = [PIL.ImageOps.mirror(image) for image in images]
        pixel_values = processor(images=images, return_tensors="pt").pixel_values.to(device, encoder.dtype)
        snippets.append(encoder(pixel_values).pooler_output.float().cpu())
    return torch.cat(snippets)
