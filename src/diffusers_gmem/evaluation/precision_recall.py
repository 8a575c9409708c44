# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

from typing import NamedTuple

import torch


class PrecisionRecall(NamedTuple):
    """
    Attributes:
        precision (`float`): share of the samples that lie among the reference images.
        recall (`float`): share of the reference images that lie among the samples.
    """

    precision: float
    recall: float


def precision_recall(
    reference: torch.Tensor,
    samples: torch.Tensor,
    k: int = 3,
    device: torch.device | str = "cpu",
    block_size: int = 4096,
) -> PrecisionRecall:
    """
    Improved precision and recall (arXiv 1904.06991): an image lies among others if it is not farther from one of them than
    that one's k-th nearest neighbour of its own set. As ADM's evaluator (arXiv 2105.05233) on `pool` features of 10,000
    reference images and 50,000 samples, but with distances in float64: ADM's are rounded to float16.

    Args:
        reference (`torch.Tensor` of shape `(num_reference, dim)`): features of the reference images.
        samples (`torch.Tensor` of shape `(num_samples, dim)`): features of the samples.
        k (`int`, defaults to 3): neighbours that make the radius.
        device (`torch.device` or `str`, defaults to `"cpu"`): where to compute; it must have float64.
        block_size (`int`, defaults to 4096): the distances of as many images by as many are in memory at a time.

    Raises:
        ValueError: if a set has fewer than `k + 1` images, or the shapes do not fit.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            "`reference` and `samples` must have the shapes (n, dim) and (m, dim), got "
            f"{tuple(reference.shape)} and {tuple(samples.shape)}."
        )
    if min(len(reference), len(samples)) <= k:
        raise ValueError(
            f"`k`={k} neighbours need at least {k + 1} images, got {len(reference)} reference images and {len(samples)} "
            "samples."
        )
    reference_blocks = reference.split(block_size)
    sample_blocks = samples.split(block_size)
    reference_radii = _radii(reference_blocks, k, device)
    sample_radii = _radii(sample_blocks, k, device)

    is_precise = [torch.zeros(len(block), dtype=torch.bool, device=device) for block in sample_blocks]
    is_recalled = [torch.zeros(len(block), dtype=torch.bool, device=device) for block in reference_blocks]
    for i, rows in enumerate(reference_blocks):
        for j, columns in enumerate(sample_blocks):
            distances = _squared_distances(rows, columns, device)
            is_precise[j] |= (distances <= reference_radii[i][:, None]).any(dim=0)
            is_recalled[i] |= (distances <= sample_radii[j]).any(dim=1)
    return PrecisionRecall(
        precision=torch.cat(is_precise).double().mean().item(), recall=torch.cat(is_recalled).double().mean().item()
    )


def _radii(blocks: tuple[torch.Tensor, ...], k: int, device: torch.device | str) -> list[torch.Tensor]:
    """Per block, each image's squared distance to its k-th neighbour."""
    radii = []
    for rows in blocks:
        nearest = torch.empty(len(rows), 0, dtype=torch.float64, device=device)
        for columns in blocks:
            nearest = torch.cat([nearest, _squared_distances(rows, columns, device)], dim=1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), largest=False).values
        # The nearest of all is the image itself
        radii.append(nearest[:, k])
    return radii


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    rows, columns = rows.to(device, torch.float64), columns.to(device, torch.float64)
    squares = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    return (squares - 2 * rows @ columns.T).clamp(min=0)
