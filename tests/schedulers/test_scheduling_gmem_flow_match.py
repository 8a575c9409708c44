# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from reference_cases import assert_matches, case_tensors, reference_cases

from diffusers_gmem.schedulers.scheduling_gmem_flow_match import GMemFlowMatchScheduler


SOLVERS = {
    "sde_heun": {"stochastic": True, "solver": "heun"},
    "sde_euler": {"stochastic": True, "solver": "euler"},
    "ode_heun": {"stochastic": False, "solver": "heun"},
    "ode_euler": {"stochastic": False, "solver": "euler"},
}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


# Reference trajectories


def is_covered(case):
    options = case["options"]
    if (options["path"], options["prediction"]) != ("Linear", "velocity") or "weights_from" in case:
        return False
    if options["mode"] == "ODE":
        return options["sampling_method"] in ("euler", "heun2")
    return options["diffusion_form"] == "linear" and options["last_step"] == "Mean"


def scheduler_for(case):
    """The scheduler of a case, with its timesteps set."""
    options = case["options"]
    if options["mode"] == "ODE":
        shift = options["timestep_shift"]
        solver = {"euler": "euler", "heun2": "heun"}[options["sampling_method"]]
        scheduler = GMemFlowMatchScheduler(stochastic=False, solver=solver, shift=1 / shift if shift > 0 else 1.0)
        scheduler.set_timesteps(options["num_steps"] - 1)
    else:
        scheduler = GMemFlowMatchScheduler(
            solver=options["sampling_method"].lower(),
            diffusion_norm=options["diffusion_norm"],
            last_step_size=options["last_step_size"],
        )
        scheduler.set_timesteps(options["num_steps"])
    return scheduler


def reference_velocity(function, x, t, c):
    condition = c[:, : x.shape[1], None, None]
    wave = function["B"] * torch.sin(function["w2"] * x + function["w3"] * t)
    return function["A"] * math.cos(function["w1"] * t + function["p"]) * x + wave + function["D"] * condition


@pytest.mark.parametrize("case", list(filter(is_covered, reference_cases("sampler"))), ids=lambda case: case["id"])
def test_reference_trajectory(case):
    tensors = case_tensors(case)
    stochastic = case["options"]["mode"] == "SDE"
    scheduler = scheduler_for(case)
    draws = list(tensors["noise"]) if stochastic else []
    heun = scheduler.order == 2

    sample = tensors["x_init"]
    if stochastic and heun:
        sample = scheduler.add_step_noise(sample, scheduler.timesteps[0], variance_noise=draws.pop(0))

    expected = list(tensors["xs"] if stochastic else tensors["xs"][1:])
    num_evaluations = len(scheduler.timesteps)
    for i, timestep in enumerate(scheduler.timesteps):
        model_output = -reference_velocity(case["function"], sample, 1 - timestep.item() / 1000, tensors["c"])
        completes_step = not heun or i % 2 == 1 or i == num_evaluations - 1
        draw = draws.pop(0) if completes_step and draws else None
        sample = scheduler.step(model_output, timestep, sample, variance_noise=draw).prev_sample

        if completes_step:
            state = expected.pop(0)
            if heun and draw is not None:  # what comes back has the next step's noise in it
                state = scheduler.add_step_noise(state, scheduler.timesteps[i + 1], variance_noise=draw)
            assert_matches(case, "xs", sample, state)
    assert not expected and not draws

    # The reference evaluates the model twice for every drift of an SDE
    assert num_evaluations == case["model_evals_needed"]
    eval_t = tensors["eval_t"][::2] if stochastic else tensors["eval_t"]
    torch.testing.assert_close(1 - scheduler.timesteps / 1000, eval_t, rtol=0, atol=1e-6)
    assert scheduler.num_inference_steps == len(tensors["grid"]) - (0 if stochastic else 1)


# Closed form: for data ~ N(MEAN, STD^2) everything about the flow is known


MEAN, STD = 1.5, 0.4


def gaussian_model_output(sample, timestep):
    """noise - data, expected at `sample` for data of this Gaussian. Affine in the sample."""
    sigma = float(timestep) / 1000
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * STD**2) / variance * (sample - (1 - sigma) * MEAN)


def run(scheduler, sample, model=gaussian_model_output, **kwargs):
    for timestep in scheduler.timesteps:
        sample = scheduler.step(model(sample, timestep), timestep, sample, **kwargs).prev_sample
    return sample


@each_solver
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samples_have_the_distribution_of_the_data(solver, shift):
    scheduler = GMemFlowMatchScheduler(shift=shift, last_step_size=0.001, **solver)
    scheduler.set_timesteps(100)
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    noise = torch.randn(1, n, generator=generator) * scheduler.init_noise_sigma
    sample = run(scheduler, noise, generator=generator)

    # Five standard errors, and what is left of the discretisation
    assert abs(sample.mean().item() - MEAN) < 5 * STD / math.sqrt(n) + 0.005
    assert abs(sample.var().item() / STD**2 - 1) < 5 * math.sqrt(2 / n) + 0.03


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_ode_convergence_order(solver, order):
    noise = torch.linspace(-2, 2, 9)[None]
    errors = []
    for num_inference_steps in (16, 32, 64):
        scheduler = GMemFlowMatchScheduler(stochastic=False, solver=solver)
        scheduler.set_timesteps(num_inference_steps)
        errors.append((run(scheduler, noise) - (MEAN + STD * noise)).abs().max().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


def sde_moments(num_inference_steps, **config):
    """
    Exact mean and variance of the samples. With this model every sampler is affine in the independent standard normal
    draws (the initial one included), so the variance is the sum of its squared responses to a unit in each of them.
    """
    scheduler = GMemFlowMatchScheduler(**config)
    scheduler.set_timesteps(num_inference_steps)
    num_draws = len(scheduler.timesteps) + 1
    units = torch.cat([torch.zeros(1, num_draws), torch.eye(num_draws)])  # (nothing and each draw, draws)

    sample = units[:, :1] * scheduler.init_noise_sigma
    for i, timestep in enumerate(scheduler.timesteps):
        output = gaussian_model_output(sample, timestep)
        sample = scheduler.step(output, timestep, sample, variance_noise=units[:, i + 1, None]).prev_sample
    return sample[0].item(), (sample[1:] - sample[0]).square().sum().item()


@pytest.mark.parametrize("diffusion_norm", [0.3, 1.0, 2.0])
def test_sde_moments_converge_to_the_data(diffusion_norm):
    def error(solver, num_inference_steps):
        mean, variance = sde_moments(
            num_inference_steps, solver=solver, diffusion_norm=diffusion_norm, last_step_size=0.2 / num_inference_steps
        )
        return max(abs(mean - MEAN), abs(variance - STD**2))

    for coarse, fine in ((50, 100), (100, 200)):
        assert error("euler", coarse) / error("euler", fine) == pytest.approx(2, abs=0.5)
    # Heun is the more accurate for the same number of evaluations
    assert error("heun", 50) < error("euler", 99)
    assert error("heun", 100) < 5e-4


# Schedule


@pytest.mark.parametrize(
    "name, sigmas",
    [
        ("sde_heun", [1, 0.7, 0.7, 0.4, 0.4, 0.1, 0.1, 0]),
        ("sde_euler", [1, 0.7, 0.4, 0.1, 0]),
        ("ode_heun", [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0, 0]),
        ("ode_euler", [1, 0.75, 0.5, 0.25, 0]),
    ],
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedule(name, sigmas, shift):
    scheduler = GMemFlowMatchScheduler(shift=shift, last_step_size=0.1, **SOLVERS[name])
    scheduler.set_timesteps(4)
    sigmas = torch.tensor(sigmas)
    torch.testing.assert_close(scheduler.sigmas, shift * sigmas / (1 + (shift - 1) * sigmas))
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32
    assert scheduler.order == (2 if "heun" in name else 1)
    assert scheduler.num_inference_steps == 4


def test_the_default_is_the_setting_of_the_paper():
    scheduler = GMemFlowMatchScheduler()
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps) == 99
    assert scheduler.sigmas[-2].item() == pytest.approx(0.004)


@each_solver
def test_shortest_run(solver):
    scheduler = GMemFlowMatchScheduler(**solver)
    scheduler.set_timesteps(2 if solver["stochastic"] else 1)
    assert run(scheduler, torch.zeros(1, 4), generator=torch.Generator().manual_seed(0)).isfinite().all()


def test_shift_agrees_with_diffusers():
    ours = GMemFlowMatchScheduler(shift=3.0, stochastic=False, solver="euler")
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    ours.set_timesteps(8)
    theirs.set_timesteps(sigmas=torch.linspace(1, 0, 9)[:-1].tolist())
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)


def test_timesteps_go_to_the_device_and_sigmas_stay():
    scheduler = GMemFlowMatchScheduler()
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    assert scheduler.sigmas.device.type == "cpu"


@each_solver
def test_step_never_waits_for_the_device(solver):
    # Bringing a number back from the meta device is an error
    scheduler = GMemFlowMatchScheduler(**solver)
    scheduler.set_timesteps(4, device="meta")
    scheduler.set_begin_index(0)
    sample = torch.ones(2, 3, device="meta")
    for timestep in scheduler.timesteps:
        sample = scheduler.step(sample, timestep, sample).prev_sample
    assert sample.device.type == "meta"


# Noise


def test_init_noise_sigma_includes_the_first_noise_of_stochastic_heun():
    scheduler = GMemFlowMatchScheduler(diffusion_norm=0.7, last_step_size=0.1)
    assert scheduler.init_noise_sigma == 1.0
    scheduler.set_timesteps(4)
    one = torch.ones(1)
    noise_std = scheduler.add_step_noise(0 * one, scheduler.timesteps[0], variance_noise=one).item()
    assert noise_std == pytest.approx(math.sqrt(2 * 0.7 * 0.3))
    assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(1 + noise_std**2))


@pytest.mark.parametrize("name", ["sde_euler", "ode_heun", "ode_euler"])
def test_no_other_solver_has_noise_before_its_first_evaluation(name):
    scheduler = GMemFlowMatchScheduler(**SOLVERS[name])
    scheduler.set_timesteps(4)
    assert scheduler.init_noise_sigma == 1.0
    sample = torch.ones(2, 3)
    assert torch.equal(scheduler.add_step_noise(sample, scheduler.timesteps[0]), sample)


@pytest.mark.parametrize("name, noisy", [("sde_heun", [1, 3]), ("sde_euler", [0, 1, 2]), ("ode_heun", [])])
def test_calls_at_which_noise_enters(name, noisy):
    scheduler = GMemFlowMatchScheduler(**SOLVERS[name])
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    drew = []
    for i, timestep in enumerate(scheduler.timesteps):
        before = generator.get_state()
        scheduler.step(torch.zeros(1, 2), timestep, torch.zeros(1, 2), generator=generator)
        if not torch.equal(before, generator.get_state()):
            drew.append(i)
    assert drew == noisy


@each_solver
def test_a_list_of_generators_makes_samples_independent_of_the_batch(solver):
    def sample(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        scheduler.set_timesteps(5)
        noise = torch.cat([torch.randn(1, 3, 2, 2, generator=generator) for generator in generators])
        return run(scheduler, noise * scheduler.init_noise_sigma, generator=generators)

    scheduler = GMemFlowMatchScheduler(**solver)
    batch = sample([0, 1, 2])
    for seed in (0, 1, 2):
        assert torch.equal(sample([seed])[0], batch[seed])


def test_variance_noise_is_what_a_generator_would_draw():
    scheduler = GMemFlowMatchScheduler(solver="euler")
    results = []
    for kwargs in (
        {"generator": torch.Generator().manual_seed(3)},
        {"variance_noise": torch.randn(2, 5, generator=torch.Generator().manual_seed(3))},
    ):
        scheduler.set_timesteps(4)
        results.append(scheduler.step(torch.ones(2, 5), scheduler.timesteps[0], torch.ones(2, 5), **kwargs))
    assert torch.equal(results[0].prev_sample, results[1].prev_sample)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_without_diffusion_the_sde_is_the_ode_on_its_grid(solver):
    sde = GMemFlowMatchScheduler(solver=solver, diffusion_norm=0.0, last_step_size=0.25)
    ode = GMemFlowMatchScheduler(solver=solver, stochastic=False)
    sde.set_timesteps(4)
    ode.set_timesteps(4)
    sde_sample = ode_sample = torch.linspace(-1, 1, 5)[None]
    for timestep in sde.timesteps[:-1]:  # the SDE's last step has one evaluation whatever the solver
        sde_sample = sde.step(gaussian_model_output(sde_sample, timestep), timestep, sde_sample).prev_sample
        ode_sample = ode.step(gaussian_model_output(ode_sample, timestep), timestep, ode_sample).prev_sample
        assert torch.equal(sde_sample, ode_sample)


def test_scale_noise():
    scheduler = GMemFlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    data, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for timestep, sigma in (
        (250.0, 0.25),
        (torch.tensor(250.0), 0.25),
        (torch.tensor([250.0]), 0.25),
        (torch.tensor([0.0, 250.0, 1000.0]), torch.tensor([0, 0.25, 1]).view(3, 1, 1, 1)),
    ):
        torch.testing.assert_close(scheduler.scale_noise(data, timestep, noise), (1 - sigma) * data + sigma * noise)
    assert scheduler.scale_noise(data.bfloat16(), torch.tensor([250.0]), noise).dtype == torch.bfloat16

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = theirs.timesteps[[0, 500, 999]]
    torch.testing.assert_close(
        scheduler.scale_noise(data, timesteps, noise), theirs.scale_noise(data, timesteps, noise)
    )


# Runs


@each_solver
def test_several_runs_on_one_object(solver):
    scheduler = GMemFlowMatchScheduler(**solver)

    def sample():
        scheduler.set_timesteps(4)
        return run(scheduler, torch.ones(1, 3), generator=torch.Generator().manual_seed(0))

    first = sample()
    assert torch.equal(sample(), first)
    # A run that is given up between the two evaluations of a Heun step leaves nothing behind
    scheduler.set_timesteps(7)
    scheduler.step(torch.ones(1, 3), scheduler.timesteps[0], torch.ones(1, 3))
    assert torch.equal(sample(), first)


@each_solver
@pytest.mark.parametrize("by_begin_index", [True, False])
def test_starting_in_the_middle(solver, by_begin_index):
    scheduler = GMemFlowMatchScheduler(**solver)
    scheduler.set_timesteps(4)
    middle = 2 * scheduler.order
    samples, generator = [torch.ones(1, 3)], torch.Generator().manual_seed(0)
    for i, timestep in enumerate(scheduler.timesteps):
        if i == middle:
            state = generator.get_state()
        output = gaussian_model_output(samples[-1], timestep)
        samples.append(scheduler.step(output, timestep, samples[-1], generator=generator).prev_sample)

    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None
    if by_begin_index:
        scheduler.set_begin_index(middle)
        assert scheduler.begin_index == middle
    generator.set_state(state)
    sample = samples[middle]
    for timestep in scheduler.timesteps[middle:]:
        output = gaussian_model_output(sample, timestep)
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
    assert torch.equal(sample, samples[-1])
    assert scheduler.step_index == len(scheduler.timesteps)


@each_solver
def test_index_for_timestep_is_where_a_step_starts(solver):
    scheduler = GMemFlowMatchScheduler(**solver)
    scheduler.set_timesteps(4)
    for start in range(0, len(scheduler.timesteps), scheduler.order):
        assert scheduler.index_for_timestep(scheduler.timesteps[start]) == start
        assert scheduler.index_for_timestep(scheduler.timesteps[start].item()) == start


@each_solver
def test_step_computes_in_float32_and_returns_the_dtype_of_the_model_output(solver):
    scheduler = GMemFlowMatchScheduler(**solver)
    model_output, sample, noise = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(0))
    model_output = model_output.bfloat16()
    results = []
    for output in (model_output, model_output.float()):
        scheduler.set_timesteps(4)
        step = scheduler.step(output, scheduler.timesteps[0], sample, variance_noise=noise)
        assert step.prev_sample.dtype == output.dtype
        results.append(step.prev_sample)
    assert torch.equal(results[0], results[1].bfloat16())
    assert scheduler.add_step_noise(sample.bfloat16(), scheduler.timesteps[0]).dtype == torch.bfloat16


def test_return_dict_and_length():
    scheduler = GMemFlowMatchScheduler(stochastic=False)
    assert len(scheduler) == 1000
    results = []
    for return_dict in (True, False):
        scheduler.set_timesteps(4)
        ones = torch.ones(1, 3)
        results.append(scheduler.step(ones, scheduler.timesteps[0], ones, return_dict=return_dict))
    assert torch.equal(results[0].prev_sample, results[1][0])
    assert type(results[1]) is tuple and len(results[1]) == 1


# Configuration


CONFIG = {"shift": 2.0, "stochastic": False, "solver": "euler", "diffusion_norm": 0.5, "last_step_size": 0.01}


def test_config_round_trip(tmp_path):
    scheduler = GMemFlowMatchScheduler(**CONFIG)
    scheduler.save_pretrained(tmp_path)
    loaded = GMemFlowMatchScheduler.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(scheduler.config)
    for name, value in CONFIG.items():
        assert loaded.config[name] == value


OTHERS = {
    DPMSolverMultistepScheduler: {"use_flow_sigmas": True},
    FlowMatchEulerDiscreteScheduler: {},
    FlowMatchHeunDiscreteScheduler: {},
    UniPCMultistepScheduler: {"use_flow_sigmas": True},
}


@pytest.mark.parametrize("scheduler_class", OTHERS, ids=lambda scheduler_class: scheduler_class.__name__)
def test_other_flow_schedulers_from_our_config(scheduler_class):
    ours = GMemFlowMatchScheduler(**CONFIG)
    theirs = scheduler_class.from_config(ours.config, **OTHERS[scheduler_class])
    assert scheduler_class in ours.compatibles
    if "FlowMatch" in scheduler_class.__name__:
        assert theirs.config.shift == 2.0

    theirs.set_timesteps(50)
    noise = torch.linspace(-2, 2, 9)[None]
    # They round timesteps to integers or end their grid at 1/1000; Euler has an error of order 1/50
    tolerance = 0.05 if scheduler_class is FlowMatchEulerDiscreteScheduler else 0.01
    torch.testing.assert_close(run(theirs, noise), MEAN + STD * noise, rtol=0, atol=tolerance)

    back = GMemFlowMatchScheduler.from_config(theirs.config)
    for name, value in CONFIG.items():
        assert back.config[name] == value


# Errors


@pytest.mark.parametrize(
    "argument, value, accepted",
    [
        ("num_train_timesteps", 0, "at least 1"),
        ("shift", 0.0, "positive finite"),
        ("shift", math.nan, "positive finite"),
        ("prediction_type", "epsilon", "flow_prediction"),
        ("stochastic", "False", "True, False"),
        ("solver", "dopri5", "euler.*heun"),
        ("diffusion_form", "cosine", "linear"),
        ("diffusion_norm", -1.0, "0 or above"),
        ("diffusion_norm", math.inf, "finite"),
        ("last_step", "Mean", "mean"),
        ("last_step_size", 0.0, "between 0 and 1"),
        ("last_step_size", 1.0, "between 0 and 1"),
    ],
)
def test_wrong_configuration(argument, value, accepted):
    with pytest.raises(ValueError, match=f"`{argument}` must .*{accepted}.*got {value!r}"):
        GMemFlowMatchScheduler(**{argument: value})


@pytest.mark.parametrize("stochastic, fewest", [(True, 2), (False, 1)])
def test_too_few_steps(stochastic, fewest):
    scheduler = GMemFlowMatchScheduler(stochastic=stochastic)
    with pytest.raises(ValueError, match=f"`num_inference_steps` must be at least {fewest}.*got {fewest - 1}"):
        scheduler.set_timesteps(fewest - 1)


def test_set_timesteps_must_come_first():
    scheduler = GMemFlowMatchScheduler()
    ones = torch.ones(1, 3)
    with pytest.raises(ValueError, match="`set_timesteps` must be called before `step`"):
        scheduler.step(ones, scheduler.timesteps[0], ones)
    with pytest.raises(ValueError, match="`set_timesteps` must be called before `add_step_noise`"):
        scheduler.add_step_noise(ones, scheduler.timesteps[0])


@each_solver
def test_too_many_steps(solver):
    scheduler = GMemFlowMatchScheduler(**solver)
    scheduler.set_timesteps(3)
    sample = run(scheduler, torch.ones(1, 3))
    with pytest.raises(ValueError, match=f"after the last of the {len(scheduler.timesteps)} timesteps"):
        scheduler.step(sample, scheduler.timesteps[-1], sample)


@pytest.mark.parametrize("timestep", [0, torch.tensor(0), torch.tensor(0, dtype=torch.int32)])
def test_integer_timestep(timestep):
    scheduler = GMemFlowMatchScheduler()
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="`timestep` must be one of the scheduler's `timesteps`.*enumerate"):
        scheduler.step(torch.ones(1, 3), timestep, torch.ones(1, 3))


def test_timestep_that_is_not_in_the_schedule():
    scheduler = GMemFlowMatchScheduler()
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="`timestep` must be one of the scheduler's `timesteps`, got 123.0"):
        scheduler.step(torch.ones(1, 3), 123.0, torch.ones(1, 3))


@pytest.mark.parametrize("begin_index", [1, -2, 6])
def test_run_that_begins_within_a_step_or_outside(begin_index):
    scheduler = GMemFlowMatchScheduler()
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(begin_index)
    with pytest.raises(ValueError, match=rf"one of range\(0, 5, 2\).*got index {begin_index}"):
        scheduler.step(torch.ones(1, 3), scheduler.timesteps[0], torch.ones(1, 3))


def test_wrong_noise():
    scheduler = GMemFlowMatchScheduler()
    scheduler.set_timesteps(3)
    timestep, ones = scheduler.timesteps[0], torch.ones(2, 3)
    for method, arguments in ((scheduler.step, (ones, timestep, ones)), (scheduler.add_step_noise, (ones, timestep))):
        with pytest.raises(ValueError, match=r"`variance_noise` must have the shape .*\(2, 3\), got \(1, 3\)"):
            method(*arguments, variance_noise=torch.ones(1, 3))
        with pytest.raises(ValueError, match="`generator` must be one, or a list of 2, got a list of 3"):
            method(*arguments, generator=[torch.Generator()] * 3)
