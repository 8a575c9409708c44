# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.nn.functional as F

from diffusers_gmem.models import snippet_storage
from diffusers_gmem.models.memory_bank import GMemMemoryBank


def rows(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def brute_force(bank, queries, k, metric="cosine"):
    """Scores in float64; of equal ones the first."""
    snippets, queries = bank[:].double(), queries.double()
    if metric == "cosine":
        snippets, queries = F.normalize(snippets, dim=1), F.normalize(queries, dim=1)
    scores, order = (queries @ snippets.T).float().sort(dim=1, descending=True, stable=True)
    return scores[:, :k], order[:, :k]


@pytest.fixture(params=[40, 1000, 2**21])
def piece_elements(request, monkeypatch):
    monkeypatch.setattr(snippet_storage, "PIECE_ELEMENTS", request.param)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize(
    "kind", ["float32", "float16", "bfloat16", "int8", "rank", "rank and int8", "edited", "mapped"]
)
def test_nearest_is_exact(kind, metric, piece_elements, tmp_path):
    bank = GMemMemoryBank(rows(90, 12) + 3 * rows(1, 12, seed=1))
    if kind in ("float16", "bfloat16", "int8"):
        bank = bank.compress(dtype=kind)
    elif kind.startswith("rank"):
        bank = bank.compress(rank=5, dtype="int8" if "int8" in kind else None)
    elif kind == "edited":
        bank = bank.without([3, 50]).extend(rows(7, 12, seed=2)).select(torch.randperm(90))
    elif kind == "mapped":
        bank.save_pretrained(tmp_path, max_shard_size=17 * 48)
        bank = GMemMemoryBank.from_pretrained(tmp_path)
    queries = 5 * rows(6, 12, seed=3)
    for k in (1, 4, len(bank)):
        scores, indices = bank.nearest(queries, k, metric)
        expected_scores, expected_indices = brute_force(bank, queries, k, metric)
        assert scores.dtype == torch.float32 and indices.dtype == torch.int64
        torch.testing.assert_close(scores, expected_scores)
        assert torch.equal(indices, expected_indices)
        one_score, one_index = bank.nearest(queries[2], k, metric)
        assert torch.equal(one_index, indices[2]) and torch.equal(one_score, scores[2])


@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("rank", [None, 3])
def test_equal_rows_come_in_the_order_of_their_numbers(metric, rank, piece_elements):
    # Copies at all places of the pieces, far more of them than are asked for
    bank = GMemMemoryBank(rows(5, 37))
    if rank is not None:
        bank = bank.compress(rank=rank)
    bank = bank.select(torch.randint(5, (400,), generator=torch.Generator().manual_seed(0)))
    for k in (3, 130):
        scores, indices = bank.nearest(rows(3, 37, seed=4), k, metric)
        for found, numbers in zip(scores, indices, strict=True):
            for score in found.unique():
                tied = numbers[found == score]
                expected = (bank[:] == bank[int(tied[0])]).all(dim=1).nonzero().flatten()
                assert torch.equal(tied, expected[: len(tied)])
                assert len(tied) == len(expected) or score == found[-1]


@pytest.mark.parametrize(("metric", "distance"), [("cosine", 1e-3), ("dot", 1e-4)])
@pytest.mark.parametrize("piece_elements", [768 * 7, 2**21])
def test_near_ties_are_told_apart(piece_elements, metric, distance, monkeypatch):
    # Their scores lie closer together than float32 products are exact
    monkeypatch.setattr(snippet_storage, "PIECE_ELEMENTS", piece_elements)
    queries = rows(3, 768)
    for k in (1, 5, 60):
        for query in queries:
            bank = GMemMemoryBank(1000 * (query + distance * rows(300, 768, seed=5)))
            expected_scores, expected_indices = brute_force(bank, query[None], k, metric)
            scores, indices = bank.nearest(query, k, metric)
            assert torch.equal(scores, expected_scores[0]) and torch.equal(indices, expected_indices[0])


def test_queries_by_row_number():
    bank = GMemMemoryBank(rows(20, 8))
    assert bank.nearest(7, 1)[1].tolist() == [7] and bank.nearest(torch.tensor(7), 1)[1].tolist() == [7]
    for query in ([3, -1], torch.tensor([3, 19]), bank[[3, 19]], bank[[3, 19]].double()):
        scores, indices = bank.nearest(query, 2)
        assert scores.shape == (2, 2) and indices[:, 0].tolist() == [3, 19]
        torch.testing.assert_close(scores[:, 0], torch.ones(2))


def test_zero_rows_and_zero_queries():
    bank = GMemMemoryBank(torch.cat([torch.zeros(2, 4), -torch.ones(1, 4), torch.ones(1, 4)]))
    scores, indices = bank.nearest(torch.ones(4), 4)
    assert indices.tolist() == [3, 0, 1, 2]
    torch.testing.assert_close(scores, torch.tensor([1.0, 0, 0, -1]))
    with pytest.raises(ValueError, match="query.*zero"):
        bank.nearest(torch.zeros(4), 1)
    assert bank.nearest(torch.zeros(4), 4, "dot")[1].tolist() == [0, 1, 2, 3]


def test_scores_do_not_depend_on_the_precision_of_products(monkeypatch):
    bank, queries = GMemMemoryBank(rows(200, 64)), rows(4, 64, seed=1)
    expected = bank.nearest(queries, 5)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        for actual, wanted in zip(bank.nearest(queries, 5), expected, strict=True):
            assert torch.equal(actual, wanted)
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [None, 5])
def test_search_on_a_gpu(rank):
    bank, queries = GMemMemoryBank(rows(500, 32)), rows(4, 32, seed=1)
    if rank is not None:
        bank = bank.compress(rank=rank)
    for actual, expected in zip(bank.nearest(queries.cuda(), 9), bank.nearest(queries, 9), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(4), 0), ValueError, "`k` is 0.*1 to 3"),
        ((torch.ones(4), 4), ValueError, "`k` is 4.*1 to 3"),
        ((torch.ones(4), 1, "l2"), ValueError, "metric.*'l2'.*'cosine', 'dot'"),
        ((torch.ones(5), 1), ValueError, r"\(4,\).*\(5,\)"),
        ((torch.ones(0, 4), 1), ValueError, r"\(0, 4\)"),
        ((torch.full((4,), torch.nan), 1), ValueError, "finite"),
        ((3, 1), IndexError, "row 3 "),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        GMemMemoryBank(torch.ones(3, 4)).nearest(*arguments)
