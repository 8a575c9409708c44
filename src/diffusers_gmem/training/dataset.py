# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import PIL.Image
import torch

from ..data.images import ImageSource, center_crop, image_to_tensor
from ..models.memory_bank import GMemMemoryBank
from .flow_matching import sample_timesteps
from .sampling_order import sample_generator


class GMemTrainingDataset(torch.utils.data.Dataset):
    """
    Training samples by (epoch, index), as [`TrainingBatchSampler`] names them: an image, its own snippet, and
    everything random about it, which is a function of (seed, epoch, index) alone.

    Args:
        source ([`ImageSource`]): the images.
        memory_bank ([`GMemMemoryBank`]): row k is the snippet of image k.
        resolution (`int`): side of the square images.
        latent_shape (`tuple[int, int, int]`): shape of what the transformer sees of one image.
        seed (`int`): seed of all draws.
        memory_dropout (`float`): probability with which an entry of a snippet is dropped.
        memory_drop_prob (`float`): probability with which a snippet becomes the null memory.
        timestep_mean (`float`), timestep_std (`float`): of the logit-normal times.
        flipped_memory_bank ([`GMemMemoryBank`], *optional*):
            The snippets of the mirrored images. With it, every second image, at random, is mirrored and has its
            snippet from there.
        cache_images (`bool`, defaults to `False`):
            Keep every cropped image in memory, one byte per value, from its first use on.

    Each sample is a dict of `pixel_values` `(3, resolution, resolution)` in [-1, 1], `memory` `(memory_dim,)`,
    `memory_dropout_mask` `(memory_dim,)`, `timestep` `()`, and `noise` and `posterior_noise` of `latent_shape`.
    """

    def __init__(
        self,
        source: ImageSource,
        memory_bank: GMemMemoryBank,
        resolution: int,
        latent_shape: tuple[int, int, int],
        seed: int,
        memory_dropout: float,
        memory_drop_prob: float = 0.0,
        timestep_mean: float = 0.0,
        timestep_std: float = 1.0,
        flipped_memory_bank: GMemMemoryBank | None = None,
        cache_images: bool = False,
    ):
        if len(source) != len(memory_bank):
            raise ValueError(f"The bank must have a row for each of the {len(source)} images, got {len(memory_bank)}.")
        self.source = source
        self.memory_bank = memory_bank
        self.resolution = resolution
        self.latent_shape = latent_shape
        self.seed = seed
        self.memory_dropout = memory_dropout
        self.memory_drop_prob = memory_drop_prob
        self.timestep_mean = timestep_mean
        self.timestep_std = timestep_std
        self.flipped_memory_bank = flipped_memory_bank
        self.cache: dict[int, PIL.Image.Image] | None = {} if cache_images else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = epoch_and_index
        generator = sample_generator(self.seed, epoch, index)
        # In a fixed order, whether used or not, so that one setting does not move the draws of another
        flip, drop_memory = torch.rand(2, generator=generator)
        timestep = sample_timesteps(1, generator, self.timestep_mean, self.timestep_std)[0]
        noise = torch.randn(self.latent_shape, generator=generator)
        posterior_noise = torch.randn(self.latent_shape, generator=generator)
        memory_dropout_mask = torch.rand(self.memory_bank.dim, generator=generator) >= self.memory_dropout

        flip = self.flipped_memory_bank is not None and flip < 0.5
        pixel_values = image_to_tensor(self._cropped_image(index))
        memory = (self.flipped_memory_bank if flip else self.memory_bank)[index].float()
        return {
            "pixel_values": pixel_values.flip(-1) if flip else pixel_values,
            "memory": torch.zeros_like(memory) if drop_memory < self.memory_drop_prob else memory,
            "memory_dropout_mask": memory_dropout_mask,
            "timestep": timestep,
            "noise": noise,
            "posterior_noise": posterior_noise,
        }

    def _cropped_image(self, index: int) -> PIL.Image.Image:
        if self.cache is None:
            return center_crop(self.source[index], self.resolution)
        if index not in self.cache:
            self.cache[index] = center_crop(self.source[index], self.resolution)
        return self.cache[index]
