import math

import mpmath
import numpy as np
import pytest
import torch

from diffusers_gmem.evaluation import FeatureStatistics, frechet_distance


def statistics_of(features, batch_size=1000):
    statistics = FeatureStatistics(features.shape[1])
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


def random_features(count, dim, seed, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    features = torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing
    return features + torch.randn(dim, generator=generator, dtype=torch.float64) + mean


def reference_distance(features_a, features_b) -> float:
    """With 60 digits, from the features on, by eigenvalues of `C_a^(1/2) C_b C_a^(1/2)`."""
    with mpmath.workdps(60):
        means, covariances = [], []
        for features in (features_a, features_b):
            rows = mpmath.matrix(features.tolist())
            mean = (mpmath.ones(1, rows.rows) * rows) / rows.rows
            rows -= mpmath.ones(rows.rows, 1) * mean
            means.append(mean)
            covariances.append(rows.T * rows / (rows.rows - 1))
        eigenvalues, vectors = mpmath.eigsy(covariances[0])
        root = vectors * mpmath.diag([mpmath.sqrt(max(value, 0)) for value in eigenvalues]) * vectors.T
        products = mpmath.eigsy(root * covariances[1] * root, eigvals_only=True)
        trace = sum(covariance[i, i] for covariance in covariances for i in range(covariance.rows))
        delta = means[0] - means[1]
        return float((delta * delta.T)[0] + trace - 2 * sum(mpmath.sqrt(max(value, 0)) for value in products))


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_moments_are_those_of_numpy_whatever_the_batches(batch_size):
    features = random_features(100, 6, seed=0)
    statistics = statistics_of(features, batch_size)
    assert statistics.count == 100 and statistics.dim == 6
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_a_large_mean_costs_no_accuracy():
    features = random_features(1000, 4, seed=1)
    shifted = statistics_of(features + 1e6, batch_size=10)
    np.testing.assert_allclose(shifted.covariance, statistics_of(features).covariance, rtol=1e-8)


def test_low_precision_features_are_summed_in_float64():
    features = random_features(64, 3, seed=2).bfloat16()
    statistics = statistics_of(features, batch_size=5)
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
    torch.testing.assert_close(statistics.mean, features.double().mean(dim=0))


def test_parts_can_be_merged():
    features = random_features(90, 5, seed=3)
    merged = FeatureStatistics(5)
    for part in (features[:1], features[1:1], features[1:40], features[40:]):
        merged.merge(statistics_of(part))
    whole = statistics_of(features)
    assert merged.count == 90
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


def test_saved_statistics_can_be_loaded_and_added_to(tmp_path):
    features = random_features(50, 4, seed=4)
    statistics_of(features[:30]).save(tmp_path / "statistics.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]
    loaded = FeatureStatistics.load(tmp_path / "statistics.safetensors")
    torch.testing.assert_close(loaded.covariance, statistics_of(features[:30]).covariance, rtol=0, atol=0)
    loaded.update(features[30:])
    assert loaded.count == 50
    torch.testing.assert_close(loaded.covariance, statistics_of(features).covariance)


def test_files_with_something_else_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold feature statistics but .*weight"):
        FeatureStatistics.load(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        FeatureStatistics.load(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError):
        FeatureStatistics.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("seed", range(5))
def test_distance_of_random_gaussians(seed):
    features_a, features_b = random_features(60, 6, seed), random_features(50, 6, seed + 100)
    a, b = statistics_of(features_a), statistics_of(features_b)
    assert frechet_distance(a, b) == pytest.approx(reference_distance(features_a, features_b), rel=1e-12)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_distance_of_commuting_covariances():
    # With common eigenvectors: |m_a - m_b|^2 + sum of (s_a - s_b)^2, over scales of five orders of magnitude
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    scales_a, scales_b = torch.logspace(-3, 2, 8, dtype=torch.float64), torch.logspace(1, -3, 8, dtype=torch.float64)
    mean_a, mean_b = torch.zeros(8), torch.arange(8.0)
    a, b = (
        FeatureStatistics.from_moments(mean, rotation * scales.square() @ rotation.T, 1000)
        for mean, scales in ((mean_a, scales_a), (mean_b, scales_b))
    )
    expected = 140 + (scales_a - scales_b).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count_a, count_b", [(3, 4), (2, 40), (5, 5)])
def test_fewer_features_than_dimensions(count_a, count_b):
    features_a, features_b = random_features(count_a, 12, 0), random_features(count_b, 12, 1)
    a, b = statistics_of(features_a), statistics_of(features_b)
    assert frechet_distance(a, b) == pytest.approx(reference_distance(features_a, features_b), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-11)


def test_features_that_never_change_or_depend_on_each_other():
    features = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([features, features, torch.full((500, 4), 7.0)], dim=1)
    a, b = statistics_of(wide), statistics_of(2 * wide)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    # C_b = 4 C_a: the distance is |m_a|^2 + tr(C_a)
    expected = a.mean.square().sum() + a.covariance.trace()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_distance_of_a_constant_is_not_nan():
    constant = statistics_of(torch.full((10, 4), 0.1))
    assert frechet_distance(constant, constant) == 0
    assert math.isfinite(frechet_distance(constant, statistics_of(random_features(10, 4, 0))))


class Extractor(torch.nn.Module):
    """Features of images for torchmetrics."""

    num_features = 16

    def forward(self, images):
        return images.float()[:, :, ::2, ::3].flatten(1)[:, :16].sin()


def test_the_distance_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = Extractor()
    metric = FrechetInceptionDistance(extractor, normalize=False, input_img_size=(3, 8, 8)).set_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    statistics = {}
    for real, levels in ((True, 256), (False, 200)):
        images = torch.randint(levels, (100, 3, 8, 8), generator=generator, dtype=torch.uint8)
        statistics[real] = statistics_of(extractor(images), batch_size=30)
        metric.update(images, real=real)
    expected = metric.compute().item()
    assert frechet_distance(statistics[True], statistics[False]) == pytest.approx(expected, rel=1e-5)


def test_what_has_no_distance_is_refused():
    with pytest.raises(ValueError, match="at least 2 features on both sides, got 1"):
        frechet_distance(statistics_of(torch.randn(10, 3)), statistics_of(torch.randn(1, 3)))
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(statistics_of(torch.randn(10, 3)), statistics_of(torch.randn(10, 4)))
    with pytest.raises(ValueError, match="at least 2 features, got 0"):
        FeatureStatistics(3).covariance  # noqa: B018
    with pytest.raises(ValueError, match=r"\(batch_size, 3\), got \(2, 4\)"):
        FeatureStatistics(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics(3).update(torch.tensor([[0, math.nan, 0]]))
    with pytest.raises(ValueError, match="3 and of 4 dimensions"):
        FeatureStatistics(3).merge(FeatureStatistics(4))
    with pytest.raises(ValueError, match="`dim` must be at least 1, got 0"):
        FeatureStatistics(0)
    with pytest.raises(ValueError, match=r"\(3,\) and \(4, 4\)"):
        FeatureStatistics.from_moments(torch.zeros(3), torch.eye(4), 10)
    with pytest.raises(ValueError, match="`count`=1"):
        FeatureStatistics.from_moments(torch.zeros(3), torch.eye(3), 1)
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics.from_moments(torch.zeros(3), torch.full((3, 3), math.inf), 10)
