# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Reading images: from a folder or a data set to RGB pictures, and from those to square tensors."""

import io
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch

from ..models.image_encoder import to_rgb


class ImageSource(torch.utils.data.Dataset):
    """
    The images of a folder or a Hub or local `datasets` data set, as RGB pictures, by number.

    A folder may have one sub-folder per class, or a `metadata.csv` or `metadata.jsonl`: it is read by `datasets`'
    "imagefolder", whose order is that of the sorted file names.

    Args:
        train_data_dir (`str`, *optional*): folder of images.
        dataset_name (`str`, *optional*): name on the Hub or local path for `datasets.load_dataset`.
        dataset_config_name (`str`, *optional*): its configuration.
        split (`str`, defaults to `"train"`): its split.
        image_column (`str`, defaults to `"image"`): column of the images.
        label_column (`str`, defaults to `"label"`): column of the class labels, or of integers; need not exist.
        cache_dir (`str`, *optional*): where `datasets` keeps its files.

    Raises:
        ValueError: if not exactly one of the folder and the name is given, or there is no such column, no image, or
            labels of another kind.
    """

    def __init__(
        self,
        train_data_dir: str | None = None,
        dataset_name: str | None = None,
        dataset_config_name: str | None = None,
        split: str = "train",
        image_column: str = "image",
        label_column: str = "label",
        cache_dir: str | None = None,
    ):
        if (train_data_dir is None) == (dataset_name is None):
            raise ValueError(
                f"Give either a folder of images or a data set's name, got {train_data_dir!r} and {dataset_name!r}."
            )
        if train_data_dir is not None:
            if not Path(train_data_dir).is_dir():
                raise ValueError(f"There is no folder {train_data_dir!r}.")
            self.name = Path(train_data_dir).resolve().name
            # Folders named like splits ("train", "test") would otherwise be taken for splits, and left out
            data_files = {"train": str(Path(train_data_dir).resolve() / "**")}
            try:
                dataset = datasets.load_dataset(
                    "imagefolder", data_files=data_files, split="train", cache_dir=cache_dir
                )
            except ValueError as error:
                raise ValueError(f"`datasets` finds no images in the folder {train_data_dir!r}: {error}") from error
        else:
            self.name = dataset_name
            dataset = datasets.load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)

        if image_column not in dataset.column_names:
            raise ValueError(f"There is no column {image_column!r} in {self.name}: it has {dataset.column_names}.")
        self.image_column = image_column
        # Decoded here and not by `datasets`, so that a broken image can be named
        self.dataset = dataset.cast_column(image_column, datasets.Image(decode=False))

        self.labels: list[int] | None = None
        self.id2label: dict[int, str] | None = None
        feature = dataset.features.get(label_column)
        if isinstance(feature, datasets.ClassLabel):
            self.labels = list(dataset[label_column])
            self.id2label = dict(enumerate(feature.names))
        elif isinstance(feature, datasets.Value) and "int" in feature.dtype:
            self.labels = list(dataset[label_column])
        elif feature is not None:
            raise ValueError(
                f"The label column {label_column!r} must hold class labels or integers, got {feature}: convert it, for "
                "instance with `Dataset.class_encode_column`, or name another column."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def image_name(self, index: int) -> str:
        """File name of an image (class folder included), or its number where the data set does not tell."""
        path = self.dataset[index][self.image_column]["path"]
        if path is None:
            return str(index)
        return "/".join(Path(path).parts[-2:]) if self.labels is not None else Path(path).name

    def __getitem__(self, index: int) -> PIL.Image.Image:
        """The image in RGB, at its own size; transparency is laid on white."""
        record = self.dataset[index][self.image_column]
        try:
            image = PIL.Image.open(io.BytesIO(record["bytes"]) if record["bytes"] is not None else record["path"])
            return to_rgb(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"Image {index} ({record['path'] or 'no file name'}) cannot be read: {error}") from error


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


def image_to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """An RGB image as a float32 tensor of shape `(3, height, width)` in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
