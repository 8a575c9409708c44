# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import torch

from .snippet_storage import SnippetStorage


def low_rank_basis(storage: SnippetStorage, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The basis and the mean of the best approximation of N snippets by `rank` coefficients each.

    With the thin SVD $U S V^T$ of the snippets less their mean, the basis is $V_r \sqrt{S_r}$, to which the coefficients
    $U_r \sqrt{S_r}$ belong. V and S come from the eigenvectors of the Gram matrix $V S^2 V^T$ of shape `(D, D)`, which is
    summed up in float64 over float32 products of pieces of the rows.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: float32, of shapes `(D, rank)` and `(D,)`.

    Raises:
        `ValueError`: the snippets vary in fewer than `rank` directions, or are not finite.
    """
    count, dim = len(storage), storage.dim
    gram, total = torch.zeros(dim, dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    shift = None
    tile = -(-dim // 4)  # only the tiles on and above the diagonal are computed
    for snippets in storage.decoded_pieces():
        snippets = snippets.float()
        # A value near the mean: without it, a mean that is large beside the deviations would cost digits
        shift = snippets.mean(dim=0) if shift is None else shift
        snippets = snippets - shift
        total += snippets.sum(dim=0)
        for start in range(0, dim, tile):
            stop = start + tile
            gram[start:stop, start:] += snippets[:, start:stop].T @ snippets[:, start:]
    gram = gram.triu() + gram.triu(1).T - torch.outer(total, total) / count
    if not gram.isfinite().all():
        raise ValueError("the bank has rows that are not finite; `verify()` names the file.")

    eigenvalues, directions = torch.linalg.eigh(gram)
    available = int((eigenvalues > torch.finfo(torch.float32).eps * eigenvalues[-1]).sum())
    if not 1 <= rank <= available:
        raise ValueError(
            f"`rank` is {rank}, but accepted is 1 to {available}, the number of directions in which the snippets vary."
        )
    singular_values = eigenvalues[-rank:].flip(0).sqrt()
    basis = directions[:, -rank:].flip(1) * singular_values.sqrt()
    return basis.float().contiguous(), (shift + total / count).float()
