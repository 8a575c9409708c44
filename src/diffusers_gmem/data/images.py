# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Reading images: from a folder or a data set to RGB pictures, and from those to square tensors."""

import copy
import io
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import PIL.Image
import pyarrow
import torch
from diffusers.utils import logging

from ..models.image_encoder import to_rgb


tqdm = logging.tqdm


class BrokenImageError(ValueError):
    """An image cannot be read. The message says which, and why."""


class NamedImage(NamedTuple):
    """An RGB image with its file name (or number, where there is none) and its label, if it has one."""

    image: PIL.Image.Image
    name: str
    label: int | None


class _Images:
    streaming: bool

    def __init__(
        self,
        train_data_dir: str | None = None,
        dataset_name: str | None = None,
        dataset_config_name: str | None = None,
        split: str = "train",
        image_column: str = "image",
        label_column: str = "label",
        cache_dir: str | None = None,
        webdataset: str | list[str] | None = None,
    ):
        if sum(source is not None for source in (train_data_dir, dataset_name, webdataset)) != 1:
            raise ValueError(
                "Give either a folder of images or a data set's name or WebDataset files, got "
                f"{train_data_dir!r}, {dataset_name!r} and {webdataset!r}."
            )
        options = {"cache_dir": cache_dir, "streaming": self.streaming}
        if train_data_dir is not None:
            if not Path(train_data_dir).is_dir():
                raise ValueError(f"There is no folder {train_data_dir!r}.")
            self.name = Path(train_data_dir).resolve().name
            # Folders named like splits ("train", "test") would otherwise be taken for splits, and left out
            data_files = {"train": str(Path(train_data_dir).resolve() / "**")}
            try:
                dataset = datasets.load_dataset("imagefolder", data_files=data_files, split="train", **options)
            except ValueError as error:
                raise ValueError(f"`datasets` finds no images in the folder {train_data_dir!r}: {error}") from error
        elif webdataset is not None:
            self.name = str(webdataset)
            dataset = datasets.load_dataset("webdataset", data_files={"train": webdataset}, split="train", **options)
        else:
            self.name = dataset_name
            dataset = datasets.load_dataset(dataset_name, dataset_config_name, split=split, **options)

        if image_column not in (dataset.column_names or []):
            raise ValueError(f"There is no column {image_column!r} in {self.name}: it has {dataset.column_names}.")
        self.image_column = image_column
        # Decoded here and not by `datasets`, so that a broken image can be named
        self.dataset = dataset.cast_column(image_column, datasets.Image(decode=False))

        self.label_column: str | None = None
        self.id2label: dict[int, str] | None = None
        feature = dataset.features.get(label_column)
        if isinstance(feature, datasets.ClassLabel):
            self.label_column = label_column
            self.id2label = dict(enumerate(feature.names))
        elif isinstance(feature, datasets.Value) and "int" in feature.dtype:
            self.label_column = label_column
        elif feature is not None:
            raise ValueError(
                f"The label column {label_column!r} must hold class labels or integers, got {feature}: convert it, for "
                "instance with `Dataset.class_encode_column`, or name another column."
            )

    def _name(self, record: dict[str, Any], number: int | str) -> str:
        path = (record[self.image_column] or {}).get("path")
        if path is None:
            return str(number)
        return "/".join(Path(path).parts[-2:]) if self.label_column is not None else Path(path).name

    def _read(self, record: dict[str, Any], number: int | str) -> NamedImage:
        image = record[self.image_column] or {"bytes": None, "path": None}
        try:
            picture = PIL.Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
            picture = to_rgb(picture)
        except Exception as error:  # a broken file makes Pillow's plugins raise almost anything
            raise BrokenImageError(
                f"Image {number} ({image['path'] or 'no file name'}) cannot be read: {error}"
            ) from error
        label = None if self.label_column is None else record[self.label_column]
        return NamedImage(picture, self._name(record, number), label)


class ImageSource(_Images, torch.utils.data.Dataset):
    """
    The images of a folder, a Hub or local `datasets` data set, or WebDataset tar files, as RGB pictures, by number.

    A folder may have one sub-folder per class, or a `metadata.csv` or `metadata.jsonl`: it is read by `datasets`'
    "imagefolder", whose order is that of the sorted file names. Other sources than a folder are first brought into the
    `datasets` cache, from where they are memory-mapped; [`ImageStream`] does without.

    Args:
        train_data_dir (`str`, *optional*): folder of images.
        dataset_name (`str`, *optional*): name on the Hub or local path for `datasets.load_dataset`.
        dataset_config_name (`str`, *optional*): its configuration.
        split (`str`, defaults to `"train"`): its split.
        image_column (`str`, defaults to `"image"`): column of the images.
        label_column (`str`, defaults to `"label"`): column of the class labels, or of integers; need not exist.
        cache_dir (`str`, *optional*): where `datasets` keeps its files.
        webdataset (`str` or `list[str]`, *optional*):
            WebDataset tar files: paths, URLs, or patterns such as `"data/*.tar"`. Their columns are the extensions of
            the files in them, such as `"jpg"` for the images and `"cls"` for the labels.

    Raises:
        ValueError: if not exactly one of the folder, the name and the tar files is given, or there is no such column,
            no image, or labels of another kind.
    """

    streaming = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.numbers: Sequence[int] = range(len(self.dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def labels(self) -> list[int] | None:
        """The labels of all images, if they have labels."""
        return None if self.label_column is None else list(self.dataset[self.label_column])

    def image_name(self, index: int) -> str:
        """File name of an image (class folder included), or its number where the data set does not tell."""
        return self._name(self.dataset[index], self.numbers[index])

    def __getitem__(self, index: int) -> PIL.Image.Image:
        """The image in RGB, at its own size; transparency is laid on white."""
        return self.read(index).image

    def read(self, index: int) -> NamedImage:
        """
        The image with its name and label.

        Raises:
            BrokenImageError: if the image cannot be read.
        """
        return self._read(self.dataset[index], self.numbers[index])

    def find_broken(self) -> dict[int, str]:
        """Which images cannot be read, by number, and why. Reads all of them."""
        broken = {}
        for index in tqdm(range(len(self)), desc="Checking the images"):
            try:
                self.read(index)
            except BrokenImageError as error:
                broken[index] = str(error)
        return broken

    def select(self, indices: list[int]) -> "ImageSource":
        """Some of the images, in the order that is given. Images without a file name keep their number as the name."""
        selected = copy.copy(self)
        selected.numbers = [self.numbers[index] for index in indices]
        selected.dataset = self.dataset.select(indices)
        vars(selected).pop("labels", None)
        return selected


class ImageStream(_Images):
    """
    The images of a data set that is not kept on this machine, file by file, each in the order of the file.

    Args:
        kwargs: the arguments of [`ImageSource`], `train_data_dir` excepted.
    """

    streaming = True

    def __init__(self, **kwargs):
        if kwargs.get("train_data_dir") is not None:
            raise ValueError(f"A folder of images cannot be streamed, got {kwargs['train_data_dir']!r}.")
        super().__init__(**kwargs)

    @property
    def num_files(self) -> int:
        """How many files (parquet, tar, ...) the data set has."""
        return self.dataset.num_shards

    @property
    def num_images(self) -> int | None:
        """How many images there are, if the data set says so."""
        splits = self.dataset.info.splits or {}
        return splits[str(self.dataset.split)].num_examples if str(self.dataset.split) in splits else None

    def records(self, file: int) -> Iterator[tuple[dict[str, Any], str]]:
        """The undecoded images of one file, for [`~ImageStream.read`]."""
        for number, record in enumerate(self.dataset.shard(self.num_files, file)):
            yield record, f"{file}/{number}"

    def read(self, record_and_number: tuple[dict[str, Any], str]) -> NamedImage:
        """
        The image with its name and label.

        Raises:
            BrokenImageError: if the image cannot be read.
        """
        return self._read(*record_and_number)


def center_crop(image: PIL.Image.Image, resolution: int) -> PIL.Image.Image:
    """
    The central square of an image at `resolution` pixels, as ADM's data pipeline makes it (arXiv 2105.05233): halved
    with a box filter while the shorter side is at least twice the resolution, then bicubic.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    if size != image.size:
        image = image.resize(size, PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def thumbnail_column(images: Iterable[PIL.Image.Image]) -> pyarrow.Array:
    """PNG files of images, for the column `thumbnail` of a bank's metadata. The same images give the same bytes."""
    files = []
    for image in images:
        file = io.BytesIO()
        image.save(file, format="PNG")
        files.append(file.getvalue())
    return pyarrow.array(files, pyarrow.large_binary())  # not limited to 2 GB


def image_to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """An RGB image as a float32 tensor of shape `(3, height, width)` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
