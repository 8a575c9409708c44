# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

"""The sampler settings of the public reference implementation's configuration -> [`GMemFlowMatchScheduler`]."""

from collections.abc import Mapping
from typing import Any

from ..schedulers.scheduling_gmem_flow_match import GMemFlowMatchScheduler


# Files of the paper's first version carry no configuration; this is what its scripts say.
FIRST_VERSION_CONFIG = {
    "data": {"latent_norm": False, "latent_multiplier": 0.18215},
    "transport": {"path_type": "Linear", "prediction": "velocity"},
    "sample": {
        "mode": "SDE",
        "sampling_method": "Euler",
        "diffusion_form": "linear",
        "diffusion_norm": 1.0,
        "last_step": "Mean",
        "last_step_size": 0.04,
        "num_sampling_steps": 250,
        "cfg_scale": 0,
    },
}

_PATH_TYPES = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
_PREDICTION_TYPES = {"velocity": "flow_prediction", "noise": "epsilon", "score": "score"}
_ODE_SOLVERS = {
    "euler": "euler",
    "midpoint": "midpoint",
    "heun2": "heun",
    "heun3": "heun3",
    "rk4": "rk4",
    "dopri5": "dopri5",
}
_SDE_SOLVERS = {"Euler": "euler", "Heun": "heun"}
_DIFFUSION_FORMS = {
    "constant": "constant",
    "SBDM": "sbdm",
    "sigma": "sigma",
    "linear": "linear",
    "decreasing": "decreasing",
    "inccreasing-decreasing": "increasing-decreasing",
    "increasing-decreasing": "increasing-decreasing",
}
_LAST_STEPS = {None: None, "Mean": "mean", "Tweedie": "tweedie", "Euler": "euler"}


def convert_scheduler(config: Mapping[str, Any]) -> GMemFlowMatchScheduler:
    """
    Builds the scheduler that the sections `transport` and `sample` of an original configuration describe.

    The original's time shift acts on the ODE only, and its `timestep_shift` s is the `shift` 1/s.

    Args:
        config (`dict`): The configuration, as read from YAML.

    Raises:
        ValueError: if an entry is missing or has another value than those the original knows (it is named).
    """
    arguments = {
        "path_type": _choice(config, "transport", "path_type", _PATH_TYPES),
        "prediction_type": _choice(config, "transport", "prediction", _PREDICTION_TYPES),
    }
    if config["transport"].get("sample_eps") is not None:
        arguments["sample_eps"] = _number(config, "transport", "sample_eps")

    mode = _choice(config, "sample", "mode", {"ODE": "ODE", "SDE": "SDE"})
    if mode == "ODE":
        shift = _number(config, "sample", "timestep_shift") if config["sample"].get("timestep_shift") else 1.0
        if config["sample"].get("reverse"):
            raise ValueError(
                "`sample.reverse: true` in the configuration asks for noise from data, which no GMem does."
            )
        arguments |= {
            "stochastic": False,
            "solver": _choice(config, "sample", "sampling_method", _ODE_SOLVERS),
            "shift": 1 / shift,
        }
        for tolerance in ("atol", "rtol"):
            if arguments["solver"] == "dopri5" and tolerance in config["sample"]:
                arguments[tolerance] = _number(config, "sample", tolerance)
    else:
        arguments |= {
            "stochastic": True,
            "solver": _choice(config, "sample", "sampling_method", _SDE_SOLVERS),
            "diffusion_form": _choice(config, "sample", "diffusion_form", _DIFFUSION_FORMS),
            "diffusion_norm": _number(config, "sample", "diffusion_norm"),
            "last_step": _choice(config, "sample", "last_step", _LAST_STEPS),
        }
        if arguments["last_step"] is not None:
            arguments["last_step_size"] = _number(config, "sample", "last_step_size")
    return GMemFlowMatchScheduler(**arguments)


def sampling_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    What an original configuration says about sampling that a pipeline takes per call: `num_inference_steps` and, where
    guidance is on, `guidance_scale` and `guidance_interval`.

    Raises:
        ValueError: if an entry is missing or not a number.
    """
    # The original counts the points of its grid; the last step of an SDE takes the place of the missing step
    steps = int(_number(config, "sample", "num_sampling_steps"))
    with_last_step = config["sample"]["mode"] == "SDE" and config["sample"]["last_step"] is not None
    arguments = {"num_inference_steps": steps if with_last_step else steps - 1}
    if "cfg_scale" in config["sample"] and _number(config, "sample", "cfg_scale") > 1:
        start = _number(config, "sample", "cfg_interval_start") if "cfg_interval_start" in config["sample"] else 0.0
        arguments |= {"guidance_scale": _number(config, "sample", "cfg_scale"), "guidance_interval": (start, 1.0)}
    return arguments


def _entry(config: Mapping[str, Any], section: str, name: str) -> Any:
    try:
        return config[section][name]
    except (KeyError, TypeError) as error:
        raise ValueError(f"The configuration has no `{section}.{name}`.") from error


def _choice(config: Mapping[str, Any], section: str, name: str, accepted: Mapping[Any, Any]) -> Any:
    value = _entry(config, section, name)
    if value not in accepted:
        names = ", ".join(map(str, accepted))
        raise ValueError(f"`{section}.{name}` of the configuration must be one of {names}, got {value!r}.")
    return accepted[value]


def _number(config: Mapping[str, Any], section: str, name: str) -> float:
    value = _entry(config, section, name)
    try:
        return float(value)  # YAML reads 1e-6 as a string
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{section}.{name}` of the configuration must be a number, got {value!r}.") from error
