# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import math

import torch


def inception_score(logits: torch.Tensor, split_size: int = 5000) -> float:
    """
    Inception score (arXiv 1606.03498): `exp(mean over the images of KL(p(y|x) | p(y)))`, the mean over consecutive parts of
    5000 images as ADM's evaluator (arXiv 2105.05233) takes it, a shorter one at the end included.

    Args:
        logits (`torch.Tensor` of shape `(num_images, num_classes)`): [`~InceptionV3.logits`], in the order of the images.
        split_size (`int`, defaults to 5000): images in a part.

    Raises:
        ValueError: if there are no images.
    """
    if len(logits) == 0:
        raise ValueError("An Inception score needs at least one image, `logits` is empty.")
    scores = []
    for part in logits.split(split_size):
        log_probs = part.double().log_softmax(dim=1)
        # Of logarithms, so that a class that no image has is not 0 * inf
        log_marginal = log_probs.logsumexp(dim=0) - math.log(len(part))
        divergence = (log_probs.exp() * (log_probs - log_marginal)).sum(dim=1).mean()
        scores.append(divergence.exp())
    return torch.stack(scores).mean().item()
