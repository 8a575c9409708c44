# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The latent shards that the public reference implementation trains on."""

import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open

from ..models.memory_bank import GMemMemoryBank
from .memory_bank import convert_memory_bank


_TENSORS = (
    "latents",
    "latents_flip",
    "representations",
    "representations_flip",
    "cls_tokens",
    "cls_tokens_flip",
    "labels",
)


class OriginalLatents(torch.utils.data.Dataset):
    """
    A folder of latent shards (`latents_rank00_shard000.safetensors`, ...) of the public reference implementation, in the
    order of their names; memory-mapped.

    Item i is a dict of image i as it was stored: its latents `latents` of shape `(C, H, W)`, which are not normalized,
    its patch features `representations` of shape `(tokens, D)` and its snippet `cls_tokens` of shape `(D,)`, the same
    three of the mirrored image with `_flip` in the name, and `labels` of shape `()`. (The reference draws the three
    mirrorings of a training item independently, which mixes an image with its mirror image.)

    Args:
        folder (`str` or `os.PathLike`): The folder; other files in it are ignored.

    Raises:
        `FileNotFoundError`: There is no shard in the folder.
        `ValueError`: A shard lacks a tensor, or its tensors have different numbers of rows.
    """

    def __init__(self, folder: str | os.PathLike):
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"There are no latent shards (*.safetensors) in {folder}.")
        self._shards = [safe_open(path, framework="pt") for path in paths]
        counts = []
        for path, shard in zip(paths, self._shards, strict=True):
            missing = [name for name in _TENSORS if name not in shard.keys()]
            if missing:
                raise ValueError(f"{path} is not a latent shard: it has no {', '.join(missing)}.")
            rows = {name: shard.get_slice(name).get_shape()[0] for name in _TENSORS}
            if len(set(rows.values())) != 1:
                raise ValueError(f"{path} has different numbers of rows: {rows}.")
            counts.append(rows["labels"])
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in 0..{len(self) - 1}, got {index}.")
        number = bisect_right(self._ends, index)
        shard, row = self._shards[number], index - (self._ends[number - 1] if number else 0)
        return {name: shard.get_slice(name)[row : row + 1].squeeze(0) for name in _TENSORS}

    def memory_bank(self, **record) -> GMemMemoryBank:
        """The snippets of the images (not mirrored) with their labels. `record` as in [`convert_memory_bank`]."""
        snippets = torch.cat([shard.get_tensor("cls_tokens") for shard in self._shards])
        labels = torch.cat([shard.get_tensor("labels") for shard in self._shards])
        return convert_memory_bank(snippets, labels=labels, **record)
