# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Sets of images of one size, as tensors: generated ones from PNG files or ADM's `.npz`, and real ones, cropped."""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from ..data.images import ImageSource, center_crop
from .frechet_distance import FeatureStatistics
from .inception import InceptionV3


class GeneratedImages(torch.utils.data.Dataset):
    """
    Images that `examples/sample_gmem.py` or another program wrote: a folder of PNG files, with or without sub-folders, in
    the order of their paths; or an `.npz` file as ADM's evaluator reads it, `arr_0` of uint8 and shape `(n, height, width,
    3)`, which is memory-mapped unless it is compressed.

    Item k is a uint8 tensor of shape `(3, height, width)`.

    Args:
        path (`str` or `os.PathLike`): the folder or file.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if it holds no images, or of another shape or dtype, or, as an item is read, of another size.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._array = self._files = None
        if self.path.is_dir():
            self._files = sorted(self.path.rglob("*.png"))
            if not self._files:
                raise ValueError(f"There are no PNG files in the folder {path}.")
            with PIL.Image.open(self._files[0]) as image:
                self.size = (image.height, image.width)
            return
        self._array = _open_array(self.path, "arr_0")
        if (
            self._array.dtype != np.uint8
            or self._array.ndim != 4
            or self._array.shape[3] != 3
            or len(self._array) == 0
        ):
            raise ValueError(
                f"The array arr_0 in {path} must be uint8 of shape (n, height, width, 3), got {self._array.dtype} of shape "
                f"{self._array.shape}."
            )
        self.size = self._array.shape[1:3]

    def __len__(self) -> int:
        return len(self._files if self._array is None else self._array)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._array is not None:
            pixels = np.array(self._array[index])
        else:
            with PIL.Image.open(self._files[index]) as image:
                pixels = np.array(image.convert("RGB"))
            if pixels.shape[:2] != tuple(self.size):
                raise ValueError(
                    f"{self._files[index]} has {pixels.shape[0]} x {pixels.shape[1]} pixels, {self._files[0]} has "
                    f"{self.size[0]} x {self.size[1]}: all images must have one size."
                )
        return torch.from_numpy(pixels).permute(2, 0, 1)


class CroppedImages(torch.utils.data.Dataset):
    """
    Real images as ADM prepares them for reference: see [`center_crop`]. Item k is a uint8 tensor of shape `(3, resolution,
    resolution)`.

    Args:
        images ([`ImageSource`]): the images.
        resolution (`int`): side of the squares, in pixels.
    """

    def __init__(self, images: ImageSource, resolution: int):
        self.images = images
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = np.array(center_crop(self.images[index], self.resolution))
        return torch.from_numpy(pixels).permute(2, 0, 1)


def read_published_statistics(path: str | os.PathLike) -> dict[str, FeatureStatistics]:
    """
    The statistics that an `.npz` file for ADM's evaluator holds, of more images than there are in it: `pool` of `mu` and
    `sigma`, and `spatial` of `mu_s` and `sigma_s`, each if it is there. How many images they are of is not published.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds statistics of other features.
    """
    statistics = {}
    with np.load(path, allow_pickle=False) as file:
        for name, dim, suffix in (("pool", InceptionV3.pool_dim, ""), ("spatial", InceptionV3.spatial_dim, "_s")):
            if f"mu{suffix}" not in file:
                continue
            mean, covariance = (torch.from_numpy(file[f"{kind}{suffix}"]) for kind in ("mu", "sigma"))
            if mean.shape != (dim,):
                raise ValueError(f"mu{suffix} in {path} must have the shape ({dim},), got {tuple(mean.shape)}.")
            # So many that the covariance may have any rank
            statistics[name] = FeatureStatistics.from_moments(mean, covariance, count=dim + 1)
    return statistics


def _open_array(path: Path, name: str) -> np.ndarray:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is neither a folder nor a readable .npz file: {error}.") from error
    with archive:
        if f"{name}.npy" not in archive.namelist():
            raise ValueError(f"There is no array {name} in {path}, which holds {archive.namelist()}.")
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return np.load(path, allow_pickle=False)[name]
        with archive.open(info) as member:
            major, _ = np.lib.format.read_magic(member)
            read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read_header(member)
            header_size = member.tell()
    # In front of the member lies its local header: 30 bytes, and a name and extra fields of the lengths that it ends with
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + header_size
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")
