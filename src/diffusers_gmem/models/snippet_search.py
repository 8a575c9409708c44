# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import torch

from .snippet_storage import SnippetStorage, StoredRows


SEARCH_METRICS = ("cosine", "dot")


def nearest_snippets(
    storage: SnippetStorage, queries: torch.Tensor, k: int, metric: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `k` snippets with the highest scores, exactly, in one pass over the stored rows.

    Per piece of the rows, fast products find which rows can be among the best; only these are scored in float64, row by
    row, so that equal snippets have equal scores wherever they lie, and the first of them wins.

    Args:
        storage (`SnippetStorage`).
        queries (`torch.Tensor` of shape `(q, D)`): float32, on the device that computes the products.
        k (`int`): At most N.
        metric (`str`): One of `SEARCH_METRICS`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the scores, float32, and the row numbers, int64; both of shape `(q, k)`, on the
        CPU, the best first.
    """
    exact_queries = queries.cpu().double()
    if metric == "cosine":
        exact_queries = exact_queries / exact_queries.norm(dim=1, keepdim=True)
        queries = exact_queries.to(queries)
    best = [(torch.empty(0), torch.empty(0, dtype=torch.int64)) for _ in queries]
    for start, piece in storage.pieces(max(storage.dim, len(queries))):
        scores, uncertainty = _fast_scores(storage, piece, queries, metric)
        # Below these a row is certainly not among the best: of this piece, and of the ones before it
        thresholds = torch.full((len(queries),), -torch.inf)
        if k <= len(piece):
            thresholds = scores.topk(k).values[:, -1].cpu() - 2 * uncertainty
        if len(best[0][0]) == k:
            thresholds = thresholds.maximum(torch.stack([found[-1] for found, _ in best]) - uncertainty)
        possible = (scores >= thresholds[:, None].to(scores)).cpu()
        for i in possible.any(dim=1).nonzero().flatten().tolist():
            columns = possible[i].nonzero().flatten()
            snippets = storage.codec.decode(piece[columns]).double()
            exact = (snippets * exact_queries[i]).sum(dim=1)
            if metric == "cosine":
                exact = exact / snippets.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            found = torch.cat([best[i][0], exact.float()])
            rows = torch.cat([best[i][1], columns + start])
            order = found.sort(descending=True, stable=True).indices[:k]
            best[i] = found[order], rows[order]
    return torch.stack([found for found, _ in best]), torch.stack([rows for _, rows in best])


def _fast_scores(
    storage: SnippetStorage, piece: StoredRows, queries: torch.Tensor, metric: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of shape `(q, n)` on the device of the queries, and bounds on their rounding errors, of shape `(q,)`."""
    piece = piece.to(queries.device)
    scales = None
    if storage.codec.basis is None:
        # A cosine needs no scales of int8 rows, and a dot product needs them once per row, not per number
        numbers, scales = piece.codes.float(), piece.scales
        products, lengths = queries @ numbers.T, numbers.norm(dim=1)
    else:
        # r numbers per row instead of D; in float64, since the parts of a length can cancel each other out
        basis, mean = (
            tensor.to(queries.device, torch.float64) for tensor in (storage.codec.basis, storage.codec.mean)
        )
        coefficients = piece.numbers.double()
        products = (queries.double() @ basis) @ coefficients.T + (queries.double() @ mean)[:, None]
        squares = ((coefficients @ (basis.T @ basis) + 2 * mean @ basis) * coefficients).sum(dim=1) + mean @ mean
        lengths = squares.clamp(min=0).sqrt()

    # Of sums of D products, relative to the lengths; the settings "high" and "medium" allow shortened factors
    rounding = (
        storage.dim * 2**-22 + {"highest": 0, "high": 2**-9, "medium": 2**-6}[torch.get_float32_matmul_precision()]
    )
    bounds = rounding * queries.norm(dim=1).cpu()
    if metric == "cosine":
        return products / lengths.clamp(min=torch.finfo(torch.float32).tiny), bounds
    if scales is not None:
        products, lengths = products * scales, lengths * scales
    return products, bounds * lengths.max().cpu()
