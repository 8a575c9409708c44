# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
The mathematics that sampling and training share: the paths from noise to data of SiT
([arXiv 2401.08740](https://huggingface.co/papers/2401.08740), section 2), on which GMem
([arXiv 2412.08781](https://huggingface.co/papers/2412.08781)) builds. Time t runs from 0 (noise) to 1 (data).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


PATH_TYPES = ("linear", "gvp", "vp")
PREDICTION_TYPES = ("flow_prediction", "epsilon", "score")
DIFFUSION_FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")

# The VP-SDE of arXiv 2011.13456: beta(t) = VP_BETA_MIN + (1 - t) * (VP_BETA_MAX - VP_BETA_MIN)
VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0


def check_choice(name: str, value, accepted: Sequence) -> None:
    if value not in accepted:
        raise ValueError(f"`{name}` must be one of {tuple(accepted)}, got {value!r}.")


class ProbabilityPath(NamedTuple):
    """
    The path `x_t = alpha(t) * data + sigma(t) * noise` at given times: its two coefficients and their derivatives, as
    numbers or as tensors that broadcast over the samples.

    With the true velocity `v = alpha' * data + sigma' * noise`, a sample and its velocity determine data and noise, so
    a prediction of one is a prediction of the others; that of the score is `-noise / sigma`.
    """

    alpha: float | torch.Tensor
    sigma: float | torch.Tensor
    d_alpha: float | torch.Tensor
    d_sigma: float | torch.Tensor

    @classmethod
    def at(cls, path_type: str, t: torch.Tensor, s: torch.Tensor) -> "ProbabilityPath":
        """
        Args:
            path_type (`str`):
                `"linear"`: alpha = t, sigma = 1 - t. `"gvp"`: alpha = sin(pi t / 2), sigma = cos(pi t / 2). `"vp"`:
                alpha = exp(-((1 - t)^2 (20 - 0.1) / 4 + (1 - t) 0.1 / 2)), sigma = sqrt(1 - alpha^2).
            t (`torch.Tensor`):
                Times in [0, 1]. On `"vp"`, sigma' is infinite at 1.
            s (`torch.Tensor`, shape of `t`):
                `1 - t`. Given beside `t`, so that neither end of the path loses digits.

        Raises:
            ValueError: If `path_type` is none of these.
        """
        check_choice("path_type", path_type, PATH_TYPES)
        if path_type == "linear":
            return cls(t, s, 1.0, -1.0)
        if path_type == "gvp":
            alpha, sigma = torch.sin(math.pi / 2 * t), torch.sin(math.pi / 2 * s)
            return cls(alpha, sigma, math.pi / 2 * sigma, -math.pi / 2 * alpha)
        log_alpha = -(s**2) * (VP_BETA_MAX - VP_BETA_MIN) / 4 - s * VP_BETA_MIN / 2
        half_beta = s * (VP_BETA_MAX - VP_BETA_MIN) / 2 + VP_BETA_MIN / 2
        alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
        return cls(alpha, sigma, alpha * half_beta, -(alpha**2) * half_beta / sigma)

    @property
    def wronskian(self) -> float | torch.Tensor:
        """`alpha' sigma - alpha sigma'`: 1 on the linear path, pi / 2 on GVP. Never 0."""
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma

    @property
    def drift_variance(self) -> float | torch.Tensor:
        """What weighs the score in `v = (alpha' / alpha) x + drift_variance * score`; on VP, beta / 2."""
        return self.sigma * self.wronskian / self.alpha

    def mix(self, data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.alpha * data + self.sigma * noise

    def velocity(self, data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.d_alpha * data + self.d_sigma * noise

    def noise_from_velocity(self, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return (self.d_alpha / self.wronskian) * sample - (self.alpha / self.wronskian) * velocity

    def velocity_from_noise(self, noise: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        # Near alpha = 0 the two products cancel: divide their difference, not each of them
        return (self.d_alpha * sample - self.wronskian * noise) / self.alpha


def time_interval(path_type: str, prediction_type: str, eps: float) -> tuple[float, float]:
    """
    The times at which a model is trained, and between which the ODE is solved. A noise or score prediction makes no
    velocity where alpha is 0, and the velocity of VP is infinite where sigma is 0; `eps` keeps away from both.

    Returns:
        `tuple[float, float]`: (0, 1) for velocities on the linear path and GVP, (eps, 1 - eps) for the other
        predictions there, (0, 1 - eps) on VP.

    Raises:
        ValueError: If `path_type` or `prediction_type` is unknown, or `eps` not between 0 and 0.5.
    """
    check_choice("path_type", path_type, PATH_TYPES)
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if not 0 < eps < 0.5:
        raise ValueError(f"`eps` must lie between 0 and 0.5, both excluded, got {eps!r}.")
    if path_type == "vp":
        return 0.0, 1.0 - eps
    if prediction_type == "flow_prediction":
        return 0.0, 1.0
    return eps, 1.0 - eps


def diffusion_coefficient(form: str, norm: float, path: ProbabilityPath, s: float) -> float:
    """
    Diffusion coefficient D of the SDE (SiT, section 2) at `s = 1 - t`, where `path` is a path of numbers. With the
    norm k it is, by form: `"constant"` k, `"sbdm"` k * drift_variance, `"sigma"` k * sigma(t), `"linear"` k * (1 - t),
    `"decreasing"` (k * cos(pi t) + 1)^2 / 4, `"increasing-decreasing"` k * sin(pi t)^2.
    """
    if form == "constant":
        return norm
    if form == "sbdm":
        return norm * path.drift_variance
    if form == "sigma":
        return norm * path.sigma
    if form == "linear":
        return norm * s
    # cos(pi t) = -cos(pi s) and sin(pi t) = sin(pi s), exactly 0 at s = 0 where they should be
    if form == "decreasing":
        return (1 - norm * math.cos(math.pi * s)) ** 2 / 4
    return norm * math.sin(math.pi * s) ** 2
