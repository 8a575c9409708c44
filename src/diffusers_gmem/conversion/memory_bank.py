# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The public reference implementation's memory banks -> [`GMemMemoryBank`]."""

from collections.abc import Mapping
from typing import Any

import torch

from ..models.memory_bank import GMemMemoryBank


# What made the snippets of the reference's own banks (its `models/dinov2.py` and `datasets/construct_memory_bank.py`).
# Fitting arguments of `convert_memory_bank`; `load_bank_encoder` of `diffusers_gmem.data` loads that encoder.
REFERENCE_ENCODER = {
    "encoder": "facebookresearch/dinov2:dinov2_vitb14",
    "preprocessing": {
        "image_processor_type": "GMemImageProcessor",
        "crop_size": 256,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "size": 224,
        "resample": "bicubic without antialiasing, after normalization",
        "position_embedding": {"grid": [16, 16], "resample": "timm's resample_abs_pos_embed"},
        "snippet": "class token after the last layer norm",
    },
    "normalized": False,
}

_LOW_RANK_ENTRIES = ("C", "M", "S", "mean", "latent_dim", "feature_dim")


def convert_memory_bank(bank: torch.Tensor | Mapping[str, Any], **record) -> GMemMemoryBank:
    """
    Builds a [`GMemMemoryBank`] from what a bank file of the public reference implementation (LINs-lab/GMem) holds.

    The rows are not copied: the bank shares their memory, so that a memory-mapped file stays one.

    A low-rank bank stays one: its snippet i is `C[i] @ M.T + mean`. Its singular values `S` are not kept, as they are
    the squared lengths of the columns of `M`.

    Args:
        bank (`torch.Tensor` of shape `(N, D)`, or `dict`):
            A full bank ("full"), or a low-rank one ("dmd"): `C` of shape `(N, r)`, `M` `(D, r)`, `S` `(r,)`, `mean`
            `(D,)`, and the numbers `latent_dim` and `feature_dim`.
        record:
            What the file does not say, as [`GMemMemoryBank`] takes it: `labels`, `metadata`, `id2label`, `encoder`,
            `encoder_revision`, `preprocessing`, `source_dataset`, `normalized`. Pass `**REFERENCE_ENCODER` for a bank
            that the reference's own scripts built.

    Raises:
        TypeError: if `bank` is neither a tensor nor a dict.
        ValueError: if entries are missing, unknown, or do not fit together.
    """
    if isinstance(bank, torch.Tensor):
        return GMemMemoryBank(bank, copy=False, **record)
    if not isinstance(bank, Mapping):
        raise TypeError(f"`bank` must be a tensor or a dict of a low-rank bank, got {type(bank)}.")
    if set(bank) != set(_LOW_RANK_ENTRIES):
        raise ValueError(f"A low-rank bank has the entries {', '.join(_LOW_RANK_ENTRIES)}, got {', '.join(bank)}.")

    coefficients, basis, mean = bank["C"], bank["M"], bank["mean"]
    rank, dim = coefficients.shape[-1], bank["feature_dim"]
    found = {name: tuple(bank[name].shape) for name in ("C", "M", "S", "mean")}
    if found != {"C": (len(coefficients), rank), "M": (dim, rank), "S": (rank,), "mean": (dim,)}:
        raise ValueError(f"The parts of the low-rank bank do not fit together: feature_dim {dim}, shapes {found}.")
    return GMemMemoryBank.from_low_rank(coefficients, basis, mean, copy=False, **record)
