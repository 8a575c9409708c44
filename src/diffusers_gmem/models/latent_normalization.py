# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
What a latent diffusion model sees of a VAE's latents, and the way back. The statistics belong to the checkpoint: they
are read from the VAE's config (`latents_mean`, `latents_std`, `scaling_factor`, `shift_factor`) and nowhere else.
"""

import torch
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


def _statistics(latents: torch.Tensor, vae_config: FrozenDict) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    mean, std = vae_config.get("latents_mean"), vae_config.get("latents_std")
    if (mean is None) != (std is None):
        raise ValueError("The VAE's config must have both `latents_mean` and `latents_std`, or neither.")
    if mean is None:
        return vae_config.get("shift_factor") or 0.0, 1.0
    return latents.new_tensor(mean).view(1, -1, 1, 1), latents.new_tensor(std).view(1, -1, 1, 1)
