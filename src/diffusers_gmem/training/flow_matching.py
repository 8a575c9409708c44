# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The training objective: flow matching, by default on the linear path x_t = t * data + (1 - t) * noise."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..schedulers.probability_paths import PREDICTION_TYPES, ProbabilityPath, check_choice, time_interval


def sample_timesteps(
    n: int,
    generator: torch.Generator | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    device: torch.device | str | None = None,
    path_type: str = "linear",
    prediction_type: str = "flow_prediction",
    eps: float = 1e-3,
) -> torch.Tensor:
    """
    Logit-normal times, t = sigmoid(mean + std * z) with z standard normal (Stable Diffusion 3, arXiv 2403.03206,
    section 3.1; the published GMem uses mean 0, std 1). Where path or prediction are singular at an end of [0, 1] (see
    [`flow_matching_loss`] for both), the times are mapped linearly to [eps, 1 - eps] (noise and score predictions) or
    [0, 1 - eps] (any prediction on `"vp"`).

    Returns:
        `torch.Tensor` of shape `(n,)`, float32, in (0, 1): 0 is noise, 1 is data.

    Raises:
        ValueError: if `path_type` or `prediction_type` is unknown, or `eps` is not between 0 and 0.5.
    """
    start, end = time_interval(path_type, prediction_type, eps)
    t = torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=device))
    return t * (end - start) + start


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
    path_type: str = "linear",
    prediction_type: str = "flow_prediction",
    loss_weighting: str | None = None,
) -> dict[str, torch.Tensor]:
    r"""
    The loss of GMem (arXiv 2412.08781) and LightningDiT (arXiv 2501.01423):
    `velocity + cosine_weight * cosine + alignment_weight * alignment`. With v = latents - noise the true velocity and
    v' the transformer's,

    - velocity: mean of (v' - v)^2 over channels and positions;
    - cosine: mean over positions of 1 - cos(v', v), the cosine over the channels;
    - alignment (REPA, arXiv 2410.06940): mean over samples and tokens of -cos(features, projected tokens).

    On a path x_t = alpha(t) * latents + sigma(t) * noise other than the linear one, v = alpha' * latents + sigma' *
    noise. SiT (arXiv 2401.08740) also trains networks that predict, instead of the velocity,

    - noise: mean of w * (m - noise)^2, m being the transformer's output;
    - score: mean of w * (sigma * m + noise)^2, as the true score is -noise / sigma.

    Their weight w is 1, or that of `loss_weighting`, with lambda = alpha' / alpha * sigma^2 - sigma * sigma'. There is
    no cosine term for them.

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
            0 leaves the cosine term out. It is a term of the velocity only.
        alignment_weight (`float`, defaults to 0.5):
            The paper's weight of the alignment term.
        memory_dropout_mask (`torch.Tensor` of shape `(batch_size, memory_dim)`, *optional*):
            See [`GMemTransformer2DModel.forward`].
        path_type (`str`, defaults to `"linear"`):
            `"linear"`, `"gvp"` or `"vp"`, see [`ProbabilityPath.at`].
        prediction_type (`str`, defaults to `"flow_prediction"`):
            What the transformer's output is trained to be: `"flow_prediction"`, the velocity; `"epsilon"`, the noise;
            `"score"`.
        loss_weighting (`str`, *optional*):
            Of noise and score predictions: `"velocity"`, w = (lambda / sigma)^2; `"likelihood"`, w = lambda / sigma^2.

    Returns:
        `dict[str, torch.Tensor]`: float32; the scalar `"loss"` to minimise, and its terms `"velocity"` (or `"noise"`,
        `"score"`) and `"cosine"` of shape `(batch_size,)` and the scalar `"alignment"`, as far as they take part,
        without `cosine_weight` and `alignment_weight`.

    Raises:
        ValueError: if `path_type`, `prediction_type` or `loss_weighting` is none of the above, `loss_weighting` is
            given for the velocity, or the features' shape is not that of the projected tokens.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    weightings = (None,) if prediction_type == "flow_prediction" else (None, "velocity", "likelihood")
    check_choice("loss_weighting", loss_weighting, weightings)
    time = timestep.view(-1, 1, 1, 1)
    path = ProbabilityPath.at(path_type, time, 1 - time)

    outputs = transformer(
        hidden_states=path.mix(latents, noise),
        timestep=timestep,
        memory=memory,
        return_alignment=alignment_features is not None,
        memory_dropout_mask=memory_dropout_mask,
        return_dict=False,
    )
    prediction = outputs[0].float()

    if prediction_type == "flow_prediction":
        velocity = path.velocity(latents, noise).float()
        name, error = "velocity", prediction - velocity
    elif prediction_type == "epsilon":
        name, error = "noise", prediction - noise.float()
    else:
        name, error = "score", path.sigma * prediction + noise.float()
    weight = 1.0
    if loss_weighting == "velocity":
        weight = (path.drift_variance / path.sigma) ** 2
    elif loss_weighting == "likelihood":
        weight = path.drift_variance / path.sigma**2

    terms = {name: (weight * error.square()).mean(dim=(1, 2, 3))}
    loss = terms[name].mean()
    if cosine_weight != 0 and prediction_type == "flow_prediction":
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
