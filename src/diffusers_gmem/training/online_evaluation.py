# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""
The Fréchet distance while training, in the features of the bank's own encoder. Those of the training images are the snippets
of the bank, so that only generated images are encoded.
"""

import torch
from diffusers.utils import logging

from ..evaluation import FeatureStatistics
from ..models.memory_bank import GMemMemoryBank
from ..pipelines.pipeline_gmem import GMemPipeline


tqdm = logging.tqdm


def snippet_statistics(memory_bank: GMemMemoryBank, batch_size: int = 4096) -> FeatureStatistics:
    """Mean and covariance of the snippets of a bank."""
    statistics = FeatureStatistics(memory_bank.dim)
    for start in range(0, len(memory_bank), batch_size):
        statistics.update(memory_bank[start : start + batch_size])
    return statistics


def sample_statistics(
    pipeline: GMemPipeline, num_images: int, batch_size: int, num_inference_steps: int, seed: int
) -> FeatureStatistics:
    """
    Mean and covariance of the snippets of generated images, of memories drawn from the pipeline's bank.

    Args:
        pipeline ([`GMemPipeline`]): with a bank, an image encoder and an image processor.
        num_images (`int`): how many images, at least 2.
        batch_size (`int`): images at a time.
        num_inference_steps (`int`): steps of the sampler.
        seed (`int`): image k, and the memory that it is drawn with, depend on the seed and k alone.
    """
    statistics = FeatureStatistics(pipeline.memory_bank.dim)
    for start in tqdm(range(0, num_images, batch_size), desc="Fréchet distance"):
        numbers = range(start, min(start + batch_size, num_images))
        generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
        images = pipeline(
            num_images=len(numbers), generator=generators, num_inference_steps=num_inference_steps
        ).images
        statistics.update(pipeline.encode_image(images))
    return statistics
