# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from diffusers.training_utils import EMAModel
from tiny_pipeline import make_transformer

from diffusers_gmem.training import GMemEMAModel


@pytest.mark.parametrize(
    "options",
    [{"decay": 0.9}, {"decay": 0.9, "min_decay": 0.9, "update_after_step": -1}],
    ids=["warm-up", "constant"],
)
def test_it_is_diffusers_average_to_rounding(options):
    parameters = list(make_transformer().parameters())
    ours, theirs = (cls(parameters, foreach=True, **options) for cls in (GMemEMAModel, EMAModel))
    for step in range(20):
        with torch.no_grad():
            for parameter in parameters:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        for ema in (ours, theirs):
            ema.step(parameters)
        assert ours.cur_decay_value == theirs.cur_decay_value
    assert ours.optimization_step == 20
    for found, expected, parameter in zip(ours.shadow_params, theirs.shadow_params, parameters, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert not found.requires_grad and not torch.allclose(found, parameter)


def test_a_step_copies_no_weights():
    parameters = [torch.nn.Parameter(torch.zeros(1000, 1000)) for _ in range(3)]
    ema = GMemEMAModel(parameters)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        ema.step(parameters)
    assert max(event.self_cpu_memory_usage for event in profiler.key_averages()) < 1e6
