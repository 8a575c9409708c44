# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""Any image autoencoder of diffusers as a tokenizer."""

import torch
from diffusers import AutoencoderRAE, AutoModel, ModelMixin


def load_autoencoder(
    name_or_path: str,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> ModelMixin:
    """
    Loads an autoencoder of diffusers; its class is the one that its configuration names.

    Args:
        name_or_path (`str`): name on the Hub, or folder.
        subfolder (`str`, *optional*): folder in it, such as `"vae"` in a pipeline's.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        cache_dir (`str`, *optional*): the Hub's cache.
        dtype (`torch.dtype`, defaults to float32): of the weights.

    Returns:
        `ModelMixin`: in eval mode, without gradients.

    Raises:
        ValueError: if the model has no `encode`.
    """
    autoencoder = AutoModel.from_pretrained(
        name_or_path, subfolder=subfolder, revision=revision, cache_dir=cache_dir, torch_dtype=dtype
    )
    if not hasattr(autoencoder, "encode"):
        raise ValueError(f"{name_or_path} must be an autoencoder, got a {type(autoencoder).__name__}.")
    return autoencoder.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(autoencoder: ModelMixin, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The latents of images as the autoencoder gives them, not normalised: mean and log-variance of the posterior, or the
    latents and `None` where the autoencoder is deterministic.

    Args:
        autoencoder (`ModelMixin`): an AutoencoderKL, AutoencoderDC, AutoencoderRAE or another one for images.
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): in [-1, 1].

    Raises:
        ValueError: if the latents are not of shape `(batch_size, channels, height, width)`.
    """
    if isinstance(autoencoder, AutoencoderRAE):
        images = images * 0.5 + 0.5
    output = autoencoder.encode(images.to(autoencoder.device, autoencoder.dtype))
    if hasattr(output, "latent_dist"):
        latents, logvar = output.latent_dist.mean, output.latent_dist.logvar
    else:
        latents, logvar = output[0], None
    if latents.ndim != 4:
        raise ValueError(
            f"{type(autoencoder).__name__} makes latents of shape {tuple(latents.shape)}: only autoencoders of images, "
            "with latents of shape (batch_size, channels, height, width), can be used."
        )
    return latents, logvar
