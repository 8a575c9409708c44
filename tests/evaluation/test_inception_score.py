import numpy as np
import pytest
import torch

from diffusers_gmem.evaluation import inception_score


def reference_score(probabilities, split_size):
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return np.mean(scores)


@pytest.mark.parametrize("split_size", [5000, 40, 30])
def test_it_is_the_mean_over_parts(split_size):
    logits = torch.randn(100, 12, generator=torch.Generator().manual_seed(0)) * 2
    expected = reference_score(logits.double().softmax(dim=1).numpy(), split_size)
    assert inception_score(logits, split_size) == pytest.approx(expected, rel=1e-12)


def test_the_parts_have_5000_images():
    logits = torch.randn(7000, 3, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 4, 7000)[:, None]
    assert inception_score(logits) == inception_score(logits, 5000) != inception_score(logits, 7000)


def test_limits():
    assert inception_score(torch.zeros(10, 4)) == pytest.approx(1)
    # Each image surely of one class, all classes alike: as many as there are classes, though exp(-2000) is zero
    logits = torch.eye(4).repeat(5, 1) * 2000
    assert inception_score(logits) == pytest.approx(4)
    # Two classes that no image has
    assert inception_score(logits[:2]) == pytest.approx(2)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        inception_score(torch.empty(0, 4))
