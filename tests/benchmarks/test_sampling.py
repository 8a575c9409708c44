# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import importlib.util
import sys
from pathlib import Path

import pytest


ARGUMENTS = "--num_attention_heads 1 --attention_head_dim 8 --sample_size 2 --repeats 1".split()


@pytest.fixture(scope="module")
def sampling():
    path = Path(__file__).parents[2] / "benchmarks/sampling.py"
    spec = importlib.util.spec_from_file_location("sampling_benchmark", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    ("guided", "images_evaluated"),
    # 99 evaluations; those at the last six of the 50 times, two of each, are guided
    [(False, (2 * 198, 2 * 99)), (True, (4 * 198, 2 * (99 + 12)))],
    ids=["no guidance", "guided"],
)
def test_evaluations(sampling, guided, images_evaluated):
    result = sampling.compare(sampling.parse_args(ARGUMENTS), guided)
    assert result.evaluations == (198, 99)
    assert result.images_evaluated == images_evaluated
    assert result.relative_difference < 1e-5


def test_exit_status(sampling, monkeypatch, capsys):
    arguments = [*ARGUMENTS, "--num_steps", "5"]
    assert sampling.main(arguments) == 0
    assert "images agree" in capsys.readouterr().out
    monkeypatch.setattr(sampling.GivenNoise, "_step_noise_std", lambda self, start: 0.1)
    assert sampling.main(arguments) == 1
    assert "images DISAGREE" in capsys.readouterr().out
