# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
What a latent diffusion model sees of a VAE's latents, and the way back. The statistics belong to the checkpoint: they
are read from the VAE's config (`latents_mean`, `latents_std`, `scaling_factor`, `shift_factor`) and nowhere else.
"""

import torch
from diffusers import AutoencoderRAE, ModelMixin
from diffusers.configuration_utils import FrozenDict


def normalize_latents(latents: torch.Tensor, vae_config: FrozenDict) -> torch.Tensor:
    """
    `(latents - mean) / std * scaling_factor`, per channel.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`): as the VAE encodes them.
        vae_config (`FrozenDict`):
            Config of the VAE. Without `latents_mean` and `latents_std`, the mean is `shift_factor` (or 0), and the
            standard deviation is 1.
    """
    mean, std = _statistics(latents, vae_config)
    return (latents - mean) / std * vae_config.scaling_factor


def denormalize_latents(latents: torch.Tensor, vae_config: FrozenDict) -> torch.Tensor:
    """`latents * std / scaling_factor + mean`: the inverse of [`normalize_latents`]."""
    mean, std = _statistics(latents, vae_config)
    return latents * std / vae_config.scaling_factor + mean


def normalization_config(vae: ModelMixin) -> FrozenDict:
    """What `normalize_latents` takes for a VAE: its config, or that of no change for AutoencoderRAE, which normalises itself."""
    return FrozenDict(scaling_factor=1.0) if isinstance(vae, AutoencoderRAE) else vae.config


def spatial_compression_ratio(vae: ModelMixin) -> int:
    """How many pixels of the decoded image one latent stands for, in each direction."""
    if isinstance(vae, AutoencoderRAE):
        return vae.config.patch_size
    channels = vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels
    return 2 ** (len(channels) - 1)


def decode_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """
    Images of normalised latents.

    Args:
        vae (`ModelMixin`): an autoencoder of diffusers for images.
        latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`): what [`normalize_latents`] returns.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, ratio * height, ratio * width)`: in about [-1, 1], float32.
    """
    latents = denormalize_latents(latents, normalization_config(vae))
    images = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
    return 2 * images - 1 if isinstance(vae, AutoencoderRAE) else images


def _statistics(latents: torch.Tensor, vae_config: FrozenDict) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    mean, std = vae_config.get("latents_mean"), vae_config.get("latents_std")
    if (mean is None) != (std is None):
        raise ValueError("The VAE's config must have both `latents_mean` and `latents_std`, or neither.")
    if mean is None:
        return vae_config.get("shift_factor") or 0.0, 1.0
    return latents.new_tensor(mean).view(1, -1, 1, 1), latents.new_tensor(std).view(1, -1, 1, 1)
