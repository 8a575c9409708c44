# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import torch
from tiny_pipeline import make_bank, make_image_encoder, make_pipeline, make_transformer

from diffusers_gmem.training.online_evaluation import sample_statistics, snippet_statistics


def test_the_snippets_of_a_bank():
    bank = make_bank()
    statistics = snippet_statistics(bank, batch_size=3)
    snippets = bank[:].double()
    assert statistics.count == len(bank)
    torch.testing.assert_close(statistics.mean, snippets.mean(dim=0))
    torch.testing.assert_close(statistics.covariance, snippets.T.cov())


def test_the_snippets_of_samples_in_batches_of_any_size():
    pipe = make_pipeline(make_transformer(in_channels=3), memory_bank=make_bank(), **make_image_encoder())
    generators = [torch.Generator().manual_seed(7 + k) for k in range(5)]
    images = pipe(num_images=5, generator=generators, num_inference_steps=2).images
    expected = pipe.encode_image(images).double()
    for batch_size in (2, 8):
        statistics = sample_statistics(pipe, 5, batch_size, num_inference_steps=2, seed=7)
        assert statistics.count == 5
        torch.testing.assert_close(statistics.mean, expected.mean(dim=0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(statistics.covariance, expected.T.cov(), rtol=1e-3, atol=1e-3)
