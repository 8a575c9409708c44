# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import PIL.Image
import torch

from ..data.images import ImageSource, center_crop, image_to_tensor
from ..data.latent_cache import LatentCache
from ..models.memory_bank import GMemMemoryBank
from .flow_matching import sample_timesteps
from .sampling_order import sample_generator


class SampleDraws(NamedTuple):
    """Everything random about a sample of an epoch."""

    flip: bool
    memory_flip: bool
    alignment_flip: bool
    drop_memory: bool
    timestep: torch.Tensor
    noise: torch.Tensor
    posterior_noise: torch.Tensor
    memory_dropout_mask: torch.Tensor
    dropout_seed: torch.Tensor


class _Draws:
    """Draws everything random about a sample, as a function of (seed, epoch, index) alone."""

    def __init__(
        self,
        seed: int,
        latent_shape: tuple[int, int, int],
        memory_dim: int,
        memory_dropout: float,
        memory_drop_prob: float,
        timestep_mean: float,
        timestep_std: float,
        random_flip: bool,
        independent_flips: bool,
    ):
        self.seed = seed
        self.latent_shape = latent_shape
        self.memory_dim = memory_dim
        self.memory_dropout = memory_dropout
        self.memory_drop_prob = memory_drop_prob
        self.timestep_mean = timestep_mean
        self.timestep_std = timestep_std
        self.random_flip = random_flip
        self.independent_flips = independent_flips

    def __call__(self, epoch: int, index: int) -> SampleDraws:
        generator = sample_generator(self.seed, epoch, index)
        # In a fixed order, whether used or not, so that one setting does not move the draws of another
        flip, drop_memory = torch.rand(2, generator=generator)
        timestep = sample_timesteps(1, generator, self.timestep_mean, self.timestep_std)[0]
        noise = torch.randn(self.latent_shape, generator=generator)
        posterior_noise = torch.randn(self.latent_shape, generator=generator)
        memory_dropout_mask = torch.rand(self.memory_dim, generator=generator) >= self.memory_dropout
        dropout_seed = torch.randint(2**32, (), generator=generator)
        memory_flip, alignment_flip = torch.rand(2, generator=generator) if self.independent_flips else (flip, flip)
        return SampleDraws(
            *(self.random_flip and bool(value < 0.5) for value in (flip, memory_flip, alignment_flip)),
            bool(drop_memory < self.memory_drop_prob),
            timestep,
            noise,
            posterior_noise,
            memory_dropout_mask,
            dropout_seed,
        )


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
        independent_flips (`bool`, defaults to `False`):
            Draw for the image and for its snippet separately whether it is mirrored, as the public reference does.

    Each sample is a dict of `pixel_values` `(3, resolution, resolution)` in [-1, 1], `memory` `(memory_dim,)`,
    `memory_dropout_mask` `(memory_dim,)`, `dropout_seed` `()` for [`SampleDropout`], `timestep` `()`, and `noise` and
    `posterior_noise` of `latent_shape`.
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
        independent_flips: bool = False,
    ):
        if len(source) != len(memory_bank):
            raise ValueError(f"The bank must have a row for each of the {len(source)} images, got {len(memory_bank)}.")
        self.source = source
        self.memory_bank = memory_bank
        self.resolution = resolution
        self.flipped_memory_bank = flipped_memory_bank
        self.cache: dict[int, PIL.Image.Image] | None = {} if cache_images else None
        self.draws = _Draws(
            seed,
            latent_shape,
            memory_bank.dim,
            memory_dropout,
            memory_drop_prob,
            timestep_mean,
            timestep_std,
            flipped_memory_bank is not None,
            independent_flips,
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = epoch_and_index
        draws = self.draws(epoch, index)
        pixel_values = image_to_tensor(self._cropped_image(index))
        memory = (self.flipped_memory_bank if draws.memory_flip else self.memory_bank)[index].float()
        return {
            "pixel_values": pixel_values.flip(-1) if draws.flip else pixel_values,
            "memory": torch.zeros_like(memory) if draws.drop_memory else memory,
            "memory_dropout_mask": draws.memory_dropout_mask,
            "dropout_seed": draws.dropout_seed,
            "timestep": draws.timestep,
            "noise": draws.noise,
            "posterior_noise": draws.posterior_noise,
        }

    def _cropped_image(self, index: int) -> PIL.Image.Image:
        if self.cache is None:
            return center_crop(self.source[index], self.resolution)
        if index not in self.cache:
            self.cache[index] = center_crop(self.source[index], self.resolution)
        return self.cache[index]


class GMemLatentTrainingDataset(torch.utils.data.Dataset):
    """
    The same from a [`~diffusers_gmem.data.LatentCache`], without images: batches of training samples by (epoch, index).

    A batch is read as a whole (`torch.utils.data.DataLoader` asks for it so; give it `collate_fn=dataset.collate`),
    fastest if [`TrainingBatchSampler`] has a `block_size`.

    Args:
        cache ([`~diffusers_gmem.data.LatentCache`]): what to train on.
        seed (`int`): seed of all draws.
        memory_dropout (`float`): probability with which an entry of a snippet is dropped.
        memory_drop_prob (`float`): probability with which a snippet becomes the null memory.
        timestep_mean (`float`), timestep_std (`float`): of the logit-normal times.
        random_flip (`bool`, defaults to `False`): take every second image, at random, mirrored.
        independent_flips (`bool`, defaults to `False`):
            Draw for latents, snippet and alignment features separately whether they are mirrored, as the public reference
            does.
        alignment (`bool`, defaults to `False`): also read the alignment features.

    A batch is a dict of `latents` `(n, *latent_shape)`, float32, sampled from the posterior and not normalised (see
    `diffusers_gmem.models.latent_normalization`), `memory` `(n, memory_dim)`, `memory_dropout_mask` `(n, memory_dim)`,
    `dropout_seed` `(n,)` for [`SampleDropout`], `timestep` `(n,)`, `noise` like `latents` and, where asked for,
    `alignment_features` `(n, num_patches, dim)`.

    Raises:
        ValueError: if the cache has no alignment features and they are asked for.
    """

    def __init__(
        self,
        cache: LatentCache,
        seed: int,
        memory_dropout: float,
        memory_drop_prob: float = 0.0,
        timestep_mean: float = 0.0,
        timestep_std: float = 1.0,
        random_flip: bool = False,
        independent_flips: bool = False,
        alignment: bool = False,
    ):
        if alignment and "alignment_features" not in cache.tensor_names:
            raise ValueError(
                f"The latent cache in {cache.folder} has no alignment features: it has {cache.tensor_names}."
            )
        self.cache = cache
        self.alignment = alignment
        self.draws = _Draws(
            seed,
            cache.shape("latents_mean"),
            *cache.shape("snippets"),
            memory_dropout,
            memory_drop_prob,
            timestep_mean,
            timestep_std,
            random_flip,
            independent_flips,
        )

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {name: tensor[0] for name, tensor in self.__getitems__([epoch_and_index]).items()}

    def __getitems__(self, batch: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        draws = SampleDraws(*zip(*(self.draws(epoch, index) for epoch, index in batch), strict=True))
        indices = torch.tensor([index for _, index in batch])
        flip, memory_flip, alignment_flip, drop_memory = (torch.tensor(values) for values in draws[:4])
        latents = self.cache.read("latents_mean", indices, flip).float()
        if "latents_logvar" in self.cache.tensor_names:
            std = self.cache.read("latents_logvar", indices, flip).float().mul_(0.5).exp_()
            latents += std * torch.stack(draws.posterior_noise)
        memory = self.cache.read("snippets", indices, memory_flip).float()
        memory[drop_memory] = 0.0
        samples = {
            "latents": latents,
            "memory": memory,
            "memory_dropout_mask": torch.stack(draws.memory_dropout_mask),
            "dropout_seed": torch.stack(draws.dropout_seed),
            "timestep": torch.stack(draws.timestep),
            "noise": torch.stack(draws.noise),
        }
        if self.alignment:
            samples["alignment_features"] = self.cache.read("alignment_features", indices, alignment_flip)
        return samples

    @staticmethod
    def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch is one already."""
        return batch
