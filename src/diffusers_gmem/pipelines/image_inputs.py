# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import io
import re
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import requests
import torch

from ..models.image_encoder import to_rgb


ImageInput = str | Path | PIL.Image.Image | np.ndarray | torch.Tensor

REQUEST_TIMEOUT = 30  # seconds, for a connection and for each wait for data
MAX_DOWNLOAD_BYTES = 50 * 2**20


def is_one_image(image: ImageInput | list[ImageInput]) -> bool:
    """Whether it stands for a single image: it is neither a list nor a batch."""
    return not isinstance(image, (list, tuple)) and getattr(image, "ndim", 3) != 4


def open_image_inputs(image: ImageInput | list[ImageInput]) -> tuple[list[PIL.Image.Image], list[str | None]]:
    """
    Opens images of all kinds that [`GMemPipeline.encode_image`] takes.

    Returns:
        `tuple`: RGB pictures, and for each the last part of its path or URL, or `None` where it has none.
    """
    pictures, names = [], []
    items = image if isinstance(image, (list, tuple)) else [image]
    for item in items or [items]:
        name = getattr(item, "filename", "")
        if isinstance(item, (str, Path)):
            name = item
            item = _fetch(item) if "://" in str(item) else _read(item, f"The image {str(item)!r}")
        if isinstance(item, PIL.Image.Image):
            opened = [item]
        elif isinstance(item, (np.ndarray, torch.Tensor)):
            opened = _from_pixels(item)
        else:
            raise ValueError(
                "`image` must be a PIL image, a path, an http(s) URL, an array or a tensor, or a list of these, got "
                f"{item!r}."
            )
        pictures += [to_rgb(picture) for picture in opened]
        path = urlsplit(str(name)).path if "://" in str(name) else name
        names += [Path(path).name or None] * len(opened)
    return pictures, names


def _fetch(url: str) -> PIL.Image.Image:
    if not re.match(r"https?://", url, re.IGNORECASE):
        raise ValueError(f"The image {url!r} cannot be fetched: only http and https can.")
    content = io.BytesIO()
    try:
        with requests.get(url, stream=True, timeout=REQUEST_TIMEOUT) as response:
            response.raise_for_status()
            for chunk in response.iter_content(2**16):
                content.write(chunk)
                if content.tell() > MAX_DOWNLOAD_BYTES:
                    raise ValueError(
                        f"The image {url!r} is larger than {MAX_DOWNLOAD_BYTES >> 20} MB: download it first."
                    )
    except requests.RequestException as error:
        raise ConnectionError(f"The image {url!r} could not be fetched: {error}") from error
    content.seek(0)
    return _read(content, f"What {url!r} sent")


def _read(file: str | Path | io.BytesIO, description: str) -> PIL.Image.Image:
    try:
        with PIL.Image.open(file) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise FileNotFoundError(f"{description} does not exist.") from None
    except Exception as error:  # a broken file makes Pillow's plugins raise almost anything
        raise ValueError(f"{description} is not an image that can be read: {error}") from error


def _from_pixels(pixels: np.ndarray | torch.Tensor) -> list[PIL.Image.Image]:
    """Pictures of an array `(height, width, channels)` or a tensor `(channels, height, width)`, or of a batch of them."""
    given_shape = tuple(pixels.shape)
    if isinstance(pixels, torch.Tensor):
        pixels = pixels.detach().cpu()
        if pixels.is_floating_point():
            pixels = pixels.float()  # NumPy has no bfloat16
        pixels = (pixels.movedim(-3, -1) if pixels.ndim > 2 else pixels).numpy()
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    batch = pixels if pixels.ndim == 4 else pixels[None]
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4) or 0 in batch.shape:
        raise ValueError(
            "An `image` must be an array of shape ([n,] height, width, channels) or a tensor of shape ([n,] channels, "
            f"height, width) with 1, 3 or 4 channels, got shape {given_shape}."
        )
    if np.issubdtype(batch.dtype, np.floating):
        if not (batch.min() >= 0 and batch.max() <= 1):
            raise ValueError(
                f"An `image` of floating-point numbers must hold values in [0, 1], got {batch.min()} to {batch.max()}; "
                "values in 0..255 must be uint8."
            )
        batch = (batch * 255).round().astype(np.uint8)
    if batch.dtype != np.uint8:
        raise ValueError(f"An `image` must hold uint8 or floating-point numbers, got {batch.dtype}.")
    return [PIL.Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in batch]
