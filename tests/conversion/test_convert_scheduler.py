# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import pytest

from diffusers_gmem import GMemFlowMatchScheduler
from diffusers_gmem.conversion import FIRST_VERSION_CONFIG, convert_scheduler, sampling_arguments


def configuration(transport=None, **sample):
    """That of the published XL model, `configs/gmem_sde_xl_cfg.yaml`, with changes."""
    return {
        "transport": {
            "path_type": "Linear",
            "prediction": "velocity",
            "loss_weight": None,
            "sample_eps": None,
            "train_eps": None,
        }
        | (transport or {}),
        "sample": {
            "mode": "SDE",
            "sampling_method": "Heun",
            "diffusion_form": "linear",
            "diffusion_norm": 1,
            "last_step": "Mean",
            "last_step_size": 0.004,
            "cfg_scale": 7.75,
            "num_sampling_steps": 50,
            "cfg_interval_start": 0.89,
            "timestep_shift": 0.3,
        }
        | sample,
    }


def ode_configuration(transport=None, **sample):
    return configuration(
        transport, **{"mode": "ODE", "sampling_method": "euler", "atol": 1e-6, "rtol": 1e-3, "reverse": False} | sample
    )


def test_the_published_settings_are_the_defaults():
    assert dict(convert_scheduler(configuration()).config) == dict(GMemFlowMatchScheduler().config)


@pytest.mark.parametrize(
    "original, ours",
    [
        ({"sampling_method": "Euler"}, {"solver": "euler"}),
        ({"diffusion_form": "constant", "diffusion_norm": 0.5}, {"diffusion_form": "constant", "diffusion_norm": 0.5}),
        ({"diffusion_form": "SBDM"}, {"diffusion_form": "sbdm"}),
        ({"diffusion_form": "sigma"}, {"diffusion_form": "sigma"}),
        ({"diffusion_form": "decreasing"}, {"diffusion_form": "decreasing"}),
        ({"diffusion_form": "inccreasing-decreasing"}, {"diffusion_form": "increasing-decreasing"}),
        ({"last_step": "Tweedie", "last_step_size": 0.04}, {"last_step": "tweedie", "last_step_size": 0.04}),
        ({"last_step": "Euler"}, {"last_step": "euler"}),
        ({"last_step": None, "sampling_method": "Euler"}, {"last_step": None, "solver": "euler"}),
    ],
)
def test_sde_settings(original, ours):
    config = convert_scheduler(configuration(**original)).config
    assert {name: config[name] for name in ours} == ours
    assert config.stochastic and config.shift == 1.0  # the original's shift acts on the ODE only


@pytest.mark.parametrize(
    "original, solver",
    [
        ("euler", "euler"),
        ("midpoint", "midpoint"),
        ("heun2", "heun"),
        ("heun3", "heun3"),
        ("rk4", "rk4"),
        ("dopri5", "dopri5"),
    ],
)
def test_ode_settings(original, solver):
    config = convert_scheduler(ode_configuration(sampling_method=original)).config
    assert (config.solver, config.stochastic) == (solver, False)
    assert config.shift == 1 / 0.3
    for no_shift in (0, 0.0, None):
        assert convert_scheduler(ode_configuration(timestep_shift=no_shift)).config.shift == 1.0


def test_the_shift_moves_the_times_as_the_original_does():
    scheduler = convert_scheduler(ode_configuration(timestep_shift=0.3))
    scheduler.set_timesteps(sampling_arguments(ode_configuration())["num_inference_steps"])
    original = [0.3 * t / (1 - 0.7 * t) for t in (index / 49 for index in range(49))]
    assert (1 - scheduler.timesteps / 1000).tolist() == pytest.approx(original, abs=1e-6)


def test_tolerances_that_yaml_reads_as_text():
    config = convert_scheduler(ode_configuration(sampling_method="dopri5", atol="1e-7", rtol="1e-5")).config
    assert (config.atol, config.rtol) == (1e-7, 1e-5)


@pytest.mark.parametrize("path, ours", [("Linear", "linear"), ("GVP", "gvp"), ("VP", "vp")])
@pytest.mark.parametrize(
    "prediction, prediction_type", [("velocity", "flow_prediction"), ("noise", "epsilon"), ("score", "score")]
)
def test_path_and_prediction(path, ours, prediction, prediction_type):
    transport = {"path_type": path, "prediction": prediction, "sample_eps": 0.002}
    config = convert_scheduler(ode_configuration(transport)).config
    assert (config.path_type, config.prediction_type, config.sample_eps) == (ours, prediction_type, 0.002)


def test_what_is_given_per_call():
    assert sampling_arguments(configuration()) == {
        "num_inference_steps": 50,
        "guidance_scale": 7.75,
        "guidance_interval": (0.89, 1.0),
    }
    assert sampling_arguments(configuration(cfg_scale=1)) == {"num_inference_steps": 50}
    # The original counts the points of the grid
    assert sampling_arguments(configuration(cfg_scale=1, last_step=None)) == {"num_inference_steps": 49}
    assert sampling_arguments(ode_configuration(cfg_scale=1.0)) == {"num_inference_steps": 49}
    config = configuration()
    del config["sample"]["cfg_interval_start"]
    assert sampling_arguments(config)["guidance_interval"] == (0.0, 1.0)
    del config["sample"]["cfg_scale"]
    assert sampling_arguments(config) == {"num_inference_steps": 50}


def test_settings_of_the_first_version():
    config = convert_scheduler(FIRST_VERSION_CONFIG).config
    assert (config.stochastic, config.solver, config.last_step_size) == (True, "euler", 0.04)
    assert sampling_arguments(FIRST_VERSION_CONFIG) == {"num_inference_steps": 250}


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "The configuration has no `transport.path_type`"),
        ({"transport": None}, "The configuration has no `transport.path_type`"),
        ({"transport": configuration()["transport"]}, "The configuration has no `sample.mode`"),
        (configuration({"path_type": "linear"}), "`transport.path_type` .* one of Linear, GVP, VP, got 'linear'"),
        (configuration({"prediction": "x0"}), "`transport.prediction` .* one of velocity, noise, score, got 'x0'"),
        (configuration(mode="SDE2"), "`sample.mode` .* must be one of ODE, SDE, got 'SDE2'"),
        (configuration(sampling_method="heun3"), "`sample.sampling_method` .* one of Euler, Heun, got 'heun3'"),
        (ode_configuration(sampling_method="Heun"), "one of euler, midpoint, heun2, heun3, rk4, dopri5, got 'Heun'"),
        (configuration(diffusion_form="cubic"), "`sample.diffusion_form` .* got 'cubic'"),
        (configuration(last_step="mean"), "`sample.last_step` .* one of None, Mean, Tweedie, Euler, got 'mean'"),
        (configuration(diffusion_norm="much"), "`sample.diffusion_norm` .* must be a number, got 'much'"),
        (configuration(last_step_size=None), "`sample.last_step_size` .* must be a number, got None"),
        (ode_configuration(reverse=True), "`sample.reverse: true`"),
        # the scheduler's own check
        (configuration(last_step=None, diffusion_form="constant"), "`last_step` must not be None"),
    ],
)
def test_wrong_settings(config, message):
    with pytest.raises(ValueError, match=message):
        convert_scheduler(config)
