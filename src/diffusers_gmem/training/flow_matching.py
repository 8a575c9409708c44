# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The training objective: flow matching on the linear path, x_t = t * data + (1 - t) * noise."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def sample_timesteps(
    n: int,
    generator: torch.Generator | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """
    Logit-normal times, t = sigmoid(mean + std * z) with z standard normal (Stable Diffusion 3, arXiv 2403.03206,
    section 3.1; the published GMem uses mean 0, std 1).

    Returns:
        `torch.Tensor` of shape `(n,)`, float32, in (0, 1): 0 is noise, 1 is data.
    """
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=device))


def flow_matching_loss(
    transformer: Callable,
    latents: torch.Tensor,
    memory: torch.Tensor,
    noise: torch.Tensor,
    timestep: torch.Tensor,
    alignment_features: torch.Tensor | None = None,
    cosine_weight: float = 1.0,
    alignment_weight: float = 0.5,
    memory_dropout_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    r"""
    The loss of GMem (arXiv 2412.08781) and LightningDiT (arXiv 2501.01423):
    `velocity + cosine_weight * cosine + alignment_weight * alignment`. With v = latents - noise the true velocity and
    v' the transformer's,

    - velocity: mean of (v' - v)^2 over channels and positions;
    - cosine: mean over positions of 1 - cos(v', v), the cosine over the channels;
    - alignment (REPA, arXiv 2410.06940): mean over samples and tokens of -cos(features, projected tokens).

    Args:
        transformer (`Callable`):
            A [`GMemTransformer2DModel`], wrapped or not.
        latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Data: normalised latents, or pixels in [-1, 1].
        memory (`torch.Tensor` of shape `(batch_size, memory_dim)`):
            Each sample's own snippet.
        noise (`torch.Tensor` of the shape of `latents`):
            Standard normal noise.
        timestep (`torch.Tensor` of shape `(batch_size,)`):
            Times in [0, 1], see [`sample_timesteps`].
        alignment_features (`torch.Tensor` of shape `(batch_size, num_tokens, alignment_dim)`, *optional*):
            Target features of the alignment projector. `None`: the term is absent and the projector is not computed.
        cosine_weight (`float`, defaults to 1.0):
            0 leaves the cosine term out.
        alignment_weight (`float`, defaults to 0.5):
            The paper's weight of the alignment term.
        memory_dropout_mask (`torch.Tensor` of shape `(batch_size, memory_dim)`, *optional*):
            See [`GMemTransformer2DModel.forward`].

    Returns:
        `dict[str, torch.Tensor]`: float32; the scalar `"loss"` to minimise, and its unweighted terms `"velocity"` and
        `"cosine"` of shape `(batch_size,)` and the scalar `"alignment"`, as far as they take part.

    Raises:
        ValueError: if the features' shape is not that of the projected tokens.
    """
    time = timestep.view(-1, 1, 1, 1)
    noisy_latents = time * latents + (1 - time) * noise
    velocity = (latents - noise).float()

    outputs = transformer(
        hidden_states=noisy_latents,
        timestep=timestep,
        memory=memory,
        return_alignment=alignment_features is not None,
        memory_dropout_mask=memory_dropout_mask,
        return_dict=False,
    )
    prediction = outputs[0].float()

    terms = {"velocity": (prediction - velocity).square().mean(dim=(1, 2, 3))}
    loss = terms["velocity"].mean()
    if cosine_weight != 0:
        terms["cosine"] = (1 - F.cosine_similarity(prediction, velocity, dim=1)).mean(dim=(1, 2))
        loss = loss + cosine_weight * terms["cosine"].mean()
    if alignment_features is not None:
        projected = outputs[1].float()
        if projected.shape != alignment_features.shape:
            raise ValueError(
                f"`alignment_features` must have the shape of the projected tokens, {tuple(projected.shape)}, got "
                f"{tuple(alignment_features.shape)}."
            )
        targets = F.normalize(alignment_features.float(), dim=-1)
        terms["alignment"] = -(targets * F.normalize(projected, dim=-1)).sum(dim=-1).mean()
        loss = loss + alignment_weight * terms["alignment"]
    return {"loss": loss, **terms}
