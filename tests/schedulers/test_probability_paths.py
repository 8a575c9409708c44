# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from reference_cases import assert_matches, case_tensors, reference_cases

from diffusers_gmem.schedulers.probability_paths import (
    DIFFUSION_FORMS,
    PATH_TYPES,
    PREDICTION_TYPES,
    ProbabilityPath,
    diffusion_coefficient,
    time_interval,
)


each_path = pytest.mark.parametrize("path_type", PATH_TYPES)


def path_at(path_type, t, dtype=torch.float64):
    t = torch.as_tensor(t, dtype=dtype)
    return ProbabilityPath.at(path_type, t, 1 - t)


@pytest.mark.parametrize("case", reference_cases("path"), ids=lambda case: case["id"])
def test_reference_path(case):
    tensors = case_tensors(case)
    path_type = case["options"]["path"].lower()
    t, x, v, s = (tensors[name] for name in ("t", "x", "v", "s"))

    path = path_at(path_type, t, torch.float32)
    actual = {
        "alpha": path.alpha,
        "sigma": path.sigma,
        "d_alpha": torch.as_tensor(path.d_alpha).expand_as(t),
        "d_sigma": torch.as_tensor(path.d_sigma).expand_as(t),
        "d_alpha_over_alpha": path.d_alpha / path.alpha,
    }
    path = path_at(path_type, t[:, None, None], torch.float32)
    actual |= {
        "xt": path.mix(tensors["x1"], tensors["x0"]),
        "ut": path.velocity(tensors["x1"], tensors["x0"]),
        "drift_mean": -path.velocity_from_noise(torch.zeros_like(x), x),
        "drift_var": path.drift_variance,
        "noise_from_velocity": path.noise_from_velocity(v, x),
        "score_from_velocity": -path.noise_from_velocity(v, x) / path.sigma,
        "velocity_from_score": path.velocity_from_noise(-path.sigma * s, x),
    }
    numbers = [ProbabilityPath(*map(float, path_at(path_type, time))) for time in t]
    for name in tensors:
        if name.startswith("diffusion/"):
            form, norm = name.split("/")[1:]
            form = form.lower().replace("inccreasing", "increasing")
            diffusion = [
                diffusion_coefficient(form, float(norm), path, 1 - time.item())
                for path, time in zip(numbers, t, strict=True)
            ]
            actual[name] = torch.tensor(diffusion)[:, None, None]

    assert set(actual) == set(tensors) - {"t", "x", "v", "s", "x0", "x1"}
    for name, value in actual.items():
        assert_matches(case, name, value, tensors[name])


@each_path
def test_path_goes_from_noise_to_data(path_type):
    path = path_at(path_type, [0.0, 1.0])
    torch.testing.assert_close(path.sigma, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=3e-5)
    # A hundredth of the data is left at the noise end of VP
    torch.testing.assert_close(path.alpha, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=0.01)
    if path_type != "linear":
        torch.testing.assert_close(path.alpha**2 + path.sigma**2, torch.ones(2, dtype=torch.float64))


@each_path
def test_derivatives(path_type):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    step = 1e-6
    path, before, after = (path_at(path_type, t + offset) for offset in (0, -step, step))
    for value, name in (("alpha", "d_alpha"), ("sigma", "d_sigma")):
        difference = (getattr(after, value) - getattr(before, value)) / (2 * step)
        derivative = torch.as_tensor(getattr(path, name), dtype=torch.float64).expand_as(t)
        torch.testing.assert_close(derivative, difference, rtol=1e-7, atol=1e-7)


@each_path
@pytest.mark.parametrize("t", [1e-6, 1e-3, 0.5, 0.999, 1 - 1e-6])
def test_noise_and_velocity_determine_each_other(path_type, t):
    data, noise = torch.randn(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = path_at(path_type, t)
    sample, velocity = path.mix(data, noise), path.velocity(data, noise)
    torch.testing.assert_close(path.noise_from_velocity(velocity, sample), noise)
    torch.testing.assert_close(path.velocity_from_noise(noise, sample), velocity)


def test_velocity_near_the_noise_end_keeps_its_digits_in_float32():
    data, noise = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    path = ProbabilityPath(*map(float, path_at("linear", 1e-3)))
    sample = path.mix(data, noise)
    exact = path.velocity_from_noise(noise.double(), sample.double())
    torch.testing.assert_close(path.velocity_from_noise(noise, sample).double(), exact, rtol=1e-6, atol=1e-6)


@each_path
def test_diffusion_vanishes_at_the_data_end_but_for_some_forms(path_type):
    path = ProbabilityPath(*map(float, path_at(path_type, 1 - 1e-12)))
    for form in DIFFUSION_FORMS:
        for norm in (0.5, 1.0):
            diffusion = diffusion_coefficient(form, norm, path, 1e-12)
            if form == "constant":
                assert diffusion == norm
            elif form == "decreasing":
                assert diffusion == pytest.approx((1 - norm) ** 2 / 4)
            elif (form, path_type) == ("sbdm", "vp"):
                assert diffusion == pytest.approx(norm * 0.1 / 2)
            else:
                assert diffusion == pytest.approx(0, abs=1e-6)


def test_forms_of_the_diffusion_in_the_middle():
    path = ProbabilityPath(*map(float, path_at("gvp", 0.25)))
    expected = {
        "constant": 0.8,
        "sbdm": 0.8 * math.pi / 2 / math.tan(math.pi / 8),
        "sigma": 0.8 * math.cos(math.pi / 8),
        "linear": 0.8 * 0.75,
        "decreasing": (0.8 * math.cos(math.pi / 4) + 1) ** 2 / 4,
        "increasing-decreasing": 0.8 * 0.5,
    }
    assert set(expected) == set(DIFFUSION_FORMS)
    for form, value in expected.items():
        assert diffusion_coefficient(form, 0.8, path, 0.75) == pytest.approx(value)


@each_path
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_time_interval(path_type, prediction_type):
    expected = (0.1, 0.9)
    if path_type == "vp":
        expected = (0.0, 0.9)
    elif prediction_type == "flow_prediction":
        expected = (0.0, 1.0)
    assert time_interval(path_type, prediction_type, 0.1) == expected


def test_unknown_names():
    with pytest.raises(ValueError, match="`path_type` must be one of .*gvp.*got 'VP'"):
        path_at("VP", 0.5)
    with pytest.raises(ValueError, match="`path_type` must be one of .*gvp.*got 'VP'"):
        time_interval("VP", "epsilon", 0.1)
    with pytest.raises(ValueError, match="`prediction_type` must be one of .*epsilon.*got 'noise'"):
        time_interval("vp", "noise", 0.1)
