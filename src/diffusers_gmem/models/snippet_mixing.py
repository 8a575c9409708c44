# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import math

import torch


INTERPOLATION_METHODS = ("linear", "slerp", "concat", "mask")
# Sums shorter than this, relative to what was summed, are what rounding leaves of zero.
_CANCELLED = 1e-6


def unit_sum(snippets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Weighted sums of n snippets, of unit length.

    Args:
        snippets (`torch.Tensor` of shape `(n, D)`).
        weights (`torch.Tensor` of shape `(m, n)`).

    Returns:
        `torch.Tensor` of shape `(m, D)`.

    Raises:
        `ValueError`: a sum is the zero vector, which is not a snippet but the null memory.
    """
    total = weights @ snippets
    lengths = total.norm(dim=1, keepdim=True)
    cancelled = lengths[:, 0] <= _CANCELLED * (weights.abs() @ snippets.norm(dim=1))
    if cancelled.any():
        raise ValueError(
            f"with the weights {weights[cancelled][0].tolist()} the snippets cancel each other out: nothing is left."
        )
    return total / lengths


def interpolate_snippets(
    first: torch.Tensor,
    second: torch.Tensor,
    alphas: torch.Tensor,
    method: str,
    take_first: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Unit-length snippets between two snippets, in float64.

    Args:
        first, second (`torch.Tensor` of shape `(D,)`): float64.
        alphas (`torch.Tensor` of shape `(num,)`): 0 is `first`, 1 is `second`; float64.
        method (`str`): See [`GMemMemoryBank.interpolate`].
        take_first (`torch.Tensor` of shape `(num, D)`, *optional*):
            For `"mask"`: whether an entry is taken from `first`; bool.

    Raises:
        `ValueError`: a snippet or a result is the zero vector, or `"slerp"` of two that point in opposite directions.
    """
    snippets = torch.stack([first, second])
    if not snippets.norm(dim=1).all():
        raise ValueError("one of the two snippets is the zero vector, the null memory, which has no direction.")
    if method == "linear":
        return unit_sum(snippets, torch.stack([1 - alphas, alphas], dim=1))
    if method == "slerp":
        snippets = snippets / snippets.norm(dim=1, keepdim=True)
        # Unlike the arc cosine of the product exact for small angles too
        angle = 2 * torch.atan2((snippets[0] - snippets[1]).norm(), snippets.sum(dim=0).norm())
        if math.pi - angle < _CANCELLED:
            raise ValueError("the two snippets point in opposite directions: no path between them is the shortest.")
        # The usual division by sin(angle) is undone by the scaling to unit length; between equal snippets any path does
        angle = angle.clamp(min=_CANCELLED)
        return unit_sum(snippets, torch.stack([(1 - alphas) * angle, alphas * angle], dim=1).sin())
    if method == "concat":
        take_first = (torch.arange(len(first)) < len(first) // 2).expand(len(alphas), -1)
    mixed = torch.where(take_first, first, second)
    lengths = mixed.norm(dim=1, keepdim=True)
    if not lengths.all():
        raise ValueError("all entries that were taken from the two snippets are zero: nothing is left.")
    return mixed / lengths
