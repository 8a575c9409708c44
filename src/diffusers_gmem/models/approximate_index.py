# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .snippet_search import nearest_snippets
from .snippet_storage import SnippetStorage


TRAINING_ROWS_PER_LIST = 64
NUM_RECALL_QUERIES = 256


@dataclass(frozen=True, eq=False)
class ApproximateIndex:
    """
    An inverted file: the rows of a bank in lists, by the closest of some centroids (k-means of the directions, by faiss). A
    search by cosine looks into the lists whose centroids are closest to the query, and there it is exact.

    Args:
        centroids (`torch.Tensor` of shape `(L, D)`): Of unit length, float32.
        rows (`torch.Tensor` of shape `(N,)`): The row numbers list by list, in ascending order within a list, int64.
        starts (`torch.Tensor` of shape `(L + 1,)`): Where each list starts in `rows`, and N, int64.
        num_probes (`int`): How many lists a search looks into.
        k (`int`): Of how many neighbours `recall` tells.
        recall (`float`): The part of the exact `k` nearest other rows that a search for a row of the bank finds.
    """

    centroids: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor
    num_probes: int
    k: int
    recall: float

    @classmethod
    def build(cls, storage: SnippetStorage, recall: float, k: int, seed: int) -> "ApproximateIndex":
        """
        Looks into as few lists as have the recall on some rows of the bank; the recall that the index then states is that
        on other rows. The exact neighbours come from `nearest_snippets`.

        Raises:
            `ImportError`: faiss is not installed.
            `ValueError`: less than two rows have a direction.
        """
        try:
            import faiss
        except ImportError as error:
            raise ImportError('An approximate index needs faiss: pip install "diffusers_gmem[index]"') from error

        generator = torch.Generator().manual_seed(seed)
        num_lists = round(math.sqrt(len(storage)))
        order = torch.randperm(len(storage), generator=generator)
        sample_rows = order[: TRAINING_ROWS_PER_LIST * num_lists].sort().values
        sample = storage.gather(sample_rows).float()
        has_direction = sample.any(dim=1)
        sample_rows, sample = sample_rows[has_direction], sample[has_direction]
        if len(sample) < 2:
            raise ValueError("an index needs at least two rows that are not the zero vector.")
        num_lists = min(num_lists, len(sample))
        kmeans = faiss.Kmeans(storage.dim, num_lists, spherical=True, seed=seed, min_points_per_centroid=1)
        kmeans.train(F.normalize(sample, dim=1).numpy())
        centroids = torch.from_numpy(kmeans.centroids.copy())
        # The length of a snippet does not change which centroid is the closest
        list_of_row = torch.cat([(piece.float() @ centroids.T).argmax(dim=1) for piece in storage.decoded_pieces()])
        rows = list_of_row.argsort(stable=True)
        starts = F.pad(list_of_row.bincount(minlength=num_lists).cumsum(0), (1, 0))

        queries = sample_rows[torch.randperm(len(sample_rows), generator=generator)[: 2 * NUM_RECALL_QUERIES]]
        places = [_places_of_neighbours(storage, centroids, list_of_row, half, k) for half in queries.chunk(2)]
        num_probes = int(places[0].sort().values[math.ceil(recall * len(places[0])) - 1]) + 1
        reached = (places[1] < num_probes).double().mean().item()
        return cls(centroids, rows, starts, num_probes, k, reached)

    def nearest(self, storage: SnippetStorage, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `nearest_snippets` with the metric `"cosine"`, among the rows in the lists that are looked into: in more than
        `num_probes`, where these have less than `k` rows."""
        found = []
        for query, lists in zip(queries, _lists_by_distance(self.centroids, queries), strict=True):
            sizes = (self.starts[lists + 1] - self.starts[lists]).cumsum(0)
            num_probes = max(self.num_probes, int((sizes < k).sum()) + 1)
            parts = [self.rows[self.starts[i] : self.starts[i + 1]] for i in lists[:num_probes]]
            candidates = torch.cat(parts).sort().values
            scores, places = nearest_snippets(storage.select(candidates), query[None], k, "cosine")
            found.append((scores, candidates[places]))
        scores, rows = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(rows)


def _lists_by_distance(centroids: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    return (queries.cpu().float() @ centroids.T).argsort(dim=1, descending=True, stable=True)


def _places_of_neighbours(
    storage: SnippetStorage, centroids: torch.Tensor, list_of_row: torch.Tensor, queries: torch.Tensor, k: int
) -> torch.Tensor:
    """For each of the `k` nearest other rows of each of the rows `queries`: which list is its own, the one that is looked
    into first being 0. So a search of `n` lists finds those below `n`. Of shape `(q * k,)`."""
    snippets = storage.gather(queries).float()
    _, rows = nearest_snippets(storage, snippets, k + 1, "cosine")
    # Of more than k equal rows the query itself need not be among the first
    is_other = rows != queries[:, None]
    is_other[is_other.all(dim=1), k] = False
    neighbours = rows[is_other].reshape(len(queries), k)
    place_of_list = _lists_by_distance(centroids, snippets).argsort(dim=1)
    return place_of_list.gather(1, list_of_row[neighbours]).flatten()
