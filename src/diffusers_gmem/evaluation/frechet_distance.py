# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The Fréchet distance between two sets of features (FID, arXiv 1706.08500), in one pass over each and in float64."""

import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import atomic_path


class FeatureStatistics:
    """
    Number, mean and covariance of features that arrive in batches. Only sums of centred features are kept, in float64 and
    on the CPU, and two parts are united by the formula of Chan, Golub and LeVeque (1979), so that a large mean or many
    batches cost no accuracy. In what pieces the features come changes the result by rounding only.

    Args:
        dim (`int`): dimension of the features.

    Attributes:
        count (`int`): features so far.
        mean (`torch.Tensor` of shape `(dim,)`): float64.

    ```python
    >>> statistics = FeatureStatistics(768)
    >>> for batch in batches:
    ...     statistics.update(encoder(batch).pooler_output)
    ```
    """

    def __init__(self, dim: int):
        if dim < 1:
            raise ValueError(f"`dim` must be at least 1, got {dim}.")
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        # Sum over the features of (x - mean)(x - mean)^T
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @property
    def dim(self) -> int:
        """Dimension of the features."""
        return len(self.mean)

    @property
    def covariance(self) -> torch.Tensor:
        """
        The unbiased covariance, float64 of shape `(dim, dim)`.

        Raises:
            ValueError: with fewer than 2 features.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 features, got {self.count}.")
        return self._scatter / (self.count - 1)

    @torch.no_grad()
    def update(self, features: torch.Tensor) -> None:
        """
        Adds features.

        Args:
            features (`torch.Tensor` of shape `(batch_size, dim)`): of any dtype, on any device.

        Raises:
            ValueError: if the shape is another, or a number is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"`features` must have the shape (batch_size, {self.dim}), got {tuple(features.shape)}.")
        if not features.isfinite().all():
            raise ValueError("`features` holds numbers that are not finite.")
        if len(features) == 0:
            return
        features = features.cpu().double()
        mean = features.mean(dim=0)
        features = features - mean
        self._unite(len(features), mean, features.T @ features)

    def merge(self, other: "FeatureStatistics") -> None:
        """
        Adds the features that another object has seen, such as that of another process.

        Raises:
            ValueError: if the dimensions differ.
        """
        if other.dim != self.dim:
            raise ValueError(f"Features of {self.dim} and of {other.dim} dimensions cannot be put together.")
        if other.count > 0:
            self._unite(other.count, other.mean, other._scatter)

    def _unite(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self._scatter += scatter
        self._scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @classmethod
    def from_moments(cls, mean: torch.Tensor, covariance: torch.Tensor, count: int) -> "FeatureStatistics":
        """
        Statistics that are known, such as published ones.

        Args:
            mean (`torch.Tensor` of shape `(dim,)`).
            covariance (`torch.Tensor` of shape `(dim, dim)`): the unbiased covariance.
            count (`int`): how many features they are of.

        Raises:
            ValueError: if the shapes do not fit, a number is not finite, or `count` is less than 2.
        """
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                "`mean` and `covariance` must have the shapes (dim,) and (dim, dim), got "
                f"{tuple(mean.shape)} and {tuple(covariance.shape)}."
            )
        if count < 2:
            raise ValueError(f"A covariance needs at least 2 features, got `count`={count}.")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("`mean` or `covariance` holds numbers that are not finite.")
        statistics = cls(len(mean))
        statistics._unite(count, mean.cpu().double(), covariance.cpu().double() * (count - 1))
        return statistics

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file. It appears under its name only when it is complete."""
        with atomic_path(path) as temporary:
            save_file({"mean": self.mean, "scatter": self._scatter}, temporary, metadata={"count": str(self.count)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureStatistics":
        """
        Reads what [`~FeatureStatistics.save`] wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                count = (file.metadata() or {}).get("count")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error
        if tensors.keys() != {"mean", "scatter"} or count is None:
            raise ValueError(f"{path} does not hold feature statistics but {sorted(tensors)}.")
        statistics = cls(len(tensors["mean"]))
        statistics._unite(int(count), tensors["mean"], tensors["scatter"])
        return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """
    Squared Fréchet distance of the Gaussians with these moments: `|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`.

    With factors `C = F F^T`, the trace of the root is the sum of the singular values of `F_a^T F_b`. So no root of an
    unsymmetric matrix is taken, which for singular covariances (fewer features than dimensions, or some that never
    change) has no unique value and in SciPy's `sqrtm` becomes NaN or complex.

    Args:
        a ([`FeatureStatistics`]), b ([`FeatureStatistics`]): statistics of the same features of two sets of images.

    Raises:
        ValueError: if the dimensions differ, or one of them has seen fewer than 2 features.
    """
    if a.dim != b.dim:
        raise ValueError(f"The features have {a.dim} and {b.dim} dimensions: they are not of the same kind.")
    for statistics in (a, b):
        if statistics.count < 2:
            raise ValueError(f"A Fréchet distance needs at least 2 features on both sides, got {statistics.count}.")
    root_trace = torch.linalg.svdvals(_factor(a).T @ _factor(b)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root_trace
    # Of equal statistics rounding may leave a little less than nothing
    return distance.clamp(min=0).item()


def _factor(statistics: FeatureStatistics) -> torch.Tensor:
    """A matrix F with `F F^T` = covariance, of as many columns as the rank can have."""
    eigenvalues, eigenvectors = torch.linalg.eigh(statistics.covariance)
    # n features have a covariance of rank n - 1 at most; in ascending order, the eigenvalues before are rounding
    rank = min(statistics.count - 1, statistics.dim)
    return eigenvectors[:, -rank:] * eigenvalues[-rank:].clamp(min=0).sqrt()
