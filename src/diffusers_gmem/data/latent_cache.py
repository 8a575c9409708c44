# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderRAE, ModelMixin
from safetensors import safe_open

from ..models.memory_bank import GMemMemoryBank
from .autoencoders import load_autoencoder
from .image_processor import GMemImageProcessor
from .shards import CONFIG_NAME, Shard
from .snippets import load_image_encoder


BANK_SUBFOLDER = "bank"
FORMAT_VERSION = 1


class LatentCache:
    """
    What `examples/cache_latents.py` made of N images, by number: latents, snippets and, where they were asked for,
    alignment features, each of the image as it is and of its mirror image.

    The files are memory-mapped: opening is instant, and a read copies the rows that are asked for and nothing else. Rows
    that lie side by side are read fastest. The images are in a random order, so neighbours have nothing in common; those
    of a stream are in the order of its files.

    A folder holds `config.json` and the shards that it lists. A shard is a safetensors file of n rows (v = 2 views):

    - `latents_mean` `(n, v, C, H, W)`: as the autoencoder gives them, not normalised; and `latents_logvar`, the
      log-variance of the posterior, unless the autoencoder is deterministic;
    - `snippets` `(n, v, D)`, as the image encoder gives them, not normalised;
    - `alignment_features` `(n, v, T, E)`: the features of the T patches;
    - `labels` `(n,)`, where the images have labels;
    - `latent_moments` `(v, 2, C)`: sums of the latents and of their squares over the shard.

    Use [`~LatentCache.from_pretrained`] to open one.
    """

    def __init__(self, folder: Path, config: dict[str, Any], shards: list[dict[str, torch.Tensor]]):
        self.folder = folder
        self.config = config
        self.starts = torch.tensor([0] + [shard.rows for shard in map(Shard._make, config["shards"])]).cumsum(0)
        self._shards = shards

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "LatentCache":
        """
        Opens a cache. Checked are the presence, size and number of rows of every shard.

        Raises:
            FileNotFoundError: there is no cache, or a shard is missing.
            ValueError: the cache is not complete, or a shard is damaged.
        """
        folder = Path(folder)
        path = folder / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"There is no latent cache in {folder}: looked for the file {path}.")
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("_class_name") != cls.__name__ or config.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path} does not describe a {cls.__name__} of format version {FORMAT_VERSION}.")
        if "shards" not in config:
            raise ValueError(f"The latent cache in {folder} is not complete: run the script that makes it to the end.")
        shards = []
        for shard in map(Shard._make, config["shards"]):
            path = folder / shard.file
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, though {CONFIG_NAME} lists it.")
            if path.stat().st_size != shard.bytes:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, but {CONFIG_NAME} says {shard.bytes}.")
            with safe_open(path, framework="pt") as file:
                shards.append({name: file.get_tensor(name) for name in file.keys()})
            if len(shards[-1]["snippets"]) != shard.rows:
                raise ValueError(
                    f"{path} has {len(shards[-1]['snippets'])} rows, but {CONFIG_NAME} says {shard.rows}."
                )
        return cls(folder, config, shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def in_random_order(self) -> bool:
        """Whether neighbours have nothing in common, which is not so if the cache was made from a stream."""
        return self.config["num_files"] is None

    @property
    def tensor_names(self) -> list[str]:
        """What [`~LatentCache.read`] can read."""
        return [name for name in self._shards[0] if name not in ("labels", "latent_moments")]

    def shape(self, name: str) -> tuple[int, ...]:
        """
        The shape of a tensor of one image.

        Raises:
            ValueError: if the cache has no such tensor.
        """
        if name not in self.tensor_names:
            raise ValueError(f"The latent cache in {self.folder} has no {name}: it has {self.tensor_names}.")
        return tuple(self._shards[0][name].shape[2:])

    def read(self, name: str, indices: torch.Tensor, flipped: torch.Tensor) -> torch.Tensor:
        """
        Rows of a tensor.

        Args:
            name (`str`): one of `tensor_names`.
            indices (`torch.Tensor` of shape `(n,)`): numbers of images, int64, in 0..N - 1.
            flipped (`torch.Tensor` of shape `(n,)`): boolean, which of them are mirrored.

        Returns:
            `torch.Tensor`: a copy, of shape `(n, *shape)`, in the stored dtype.
        """
        rows = torch.empty(len(indices), *self.shape(name), dtype=self._shards[0][name].dtype)
        row_bytes = _bytes_of_rows(rows)
        shard_of_row = torch.bucketize(indices, self.starts[1:], right=True)
        for k in shard_of_row.unique().tolist():
            here = (shard_of_row == k).nonzero().flatten()
            views = (indices[here] - self.starts[k]) * 2 + flipped[here]
            row_bytes[here.numpy()] = _bytes_of_rows(self._shards[k][name].flatten(0, 1))[views.numpy()]
        return rows

    @property
    def labels(self) -> torch.Tensor | None:
        """The labels of all images, int64 of shape `(N,)`, or `None`."""
        if "labels" not in self._shards[0]:
            return None
        return torch.cat([shard["labels"] for shard in self._shards])

    def load_memory_bank(self) -> GMemMemoryBank:
        """The bank of the plain images' snippets, in the order of the cache."""
        return GMemMemoryBank.from_pretrained(self.folder, subfolder=BANK_SUBFOLDER)

    def load_autoencoder(self, cache_dir: str | None = None) -> ModelMixin:
        """
        The autoencoder that made the latents, with the statistics of this cache (of the plain view) in its
        configuration, from where training and pipeline take them. One that has statistics of its own keeps them.
        """
        autoencoder = load_autoencoder(**self.config["autoencoder"], cache_dir=cache_dir)
        # AutoencoderRAE normalises in `encode` and `decode`
        if not isinstance(autoencoder, AutoencoderRAE) and autoencoder.config.get("latents_mean") is None:
            autoencoder.register_to_config(**self.config["statistics"]["plain"], scaling_factor=1.0)
        return autoencoder

    def load_image_encoder(self, cache_dir: str | None = None) -> tuple[torch.nn.Module, Any]:
        """The image encoder that made the snippets, and its image processor, by the names in the configuration."""
        config = self.config["image_encoder"]
        encoder, processor = load_image_encoder(config["encoder"], config["encoder_revision"], cache_dir)
        if config["preprocessing"]["image_processor_type"] == GMemImageProcessor.__name__:
            processor = GMemImageProcessor.from_dict(config["preprocessing"])
        return encoder, processor


def _bytes_of_rows(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor, row by row. NumPy copies rows in one thread: torch would start its own for each small piece."""
    return tensor.flatten(1).view(torch.uint8).numpy()
