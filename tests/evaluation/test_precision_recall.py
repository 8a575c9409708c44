import numpy as np
import pytest
import torch

from diffusers_gmem.evaluation import precision_recall


def brute_force(reference, samples, k):
    def lies_among(points, others):
        found = []
        for point in points:
            inside = False
            for i, other in enumerate(others):
                neighbours = np.sort([np.linalg.norm(other - x) for j, x in enumerate(others) if j != i])
                inside = inside or np.linalg.norm(point - other) <= neighbours[k - 1]
            found.append(inside)
        return np.mean(found)

    reference, samples = reference.double().numpy(), samples.double().numpy()
    return lies_among(samples, reference), lies_among(reference, samples)


def draw(count, seed, scale=1.0, shift=0.0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) * scale + shift


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block_size", [4096, 7])
def test_agrees_with_brute_force(k, block_size):
    reference, samples = draw(40, seed=0), draw(30, seed=1, scale=0.6, shift=0.5)
    expected = brute_force(reference, samples, k)
    assert expected[0] != expected[1] and 0 < min(expected) < max(expected) < 1
    assert precision_recall(reference, samples, k, block_size=block_size) == pytest.approx(expected, abs=1e-12)


def test_k_is_3_by_default():
    reference, samples = draw(40, seed=2), draw(40, seed=3, shift=0.7)
    assert precision_recall(reference, samples) == pytest.approx(brute_force(reference, samples, 3), abs=1e-12)


def test_a_large_common_mean_changes_nothing():
    reference, samples = draw(40, seed=0), draw(30, seed=1)
    # Differences of float32 numbers around 1000 are the same without the thousand
    reference, samples = (reference + 1000), (samples + 1000)
    assert precision_recall(reference, samples) == precision_recall(reference - 1000, samples - 1000)


def test_limits():
    points = draw(20, seed=0)
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 100) == (0, 0)
    # Samples of one of two groups: all precise, half of the images recalled
    two_groups = torch.cat([points, points + 100])
    assert precision_recall(two_groups, points) == (1, 0.5)
    assert precision_recall(points, two_groups) == (0.5, 1)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="at least 4 images, got 20 reference images and 3 samples"):
        precision_recall(draw(20, 0), draw(3, 0))
    with pytest.raises(ValueError, match=r"\(20, 3\) and \(20, 2\)"):
        precision_recall(draw(20, 0), draw(20, 0)[:, :2])
