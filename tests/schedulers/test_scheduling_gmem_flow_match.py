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
from reference_cases import assert_matches, case_state_dict, case_tensors, reference_cases

from diffusers_gmem.conversion import convert_transformer
from diffusers_gmem.schedulers.probability_paths import (
    DIFFUSION_FORMS,
    PATH_TYPES,
    PREDICTION_TYPES,
    ProbabilityPath,
)
from diffusers_gmem.schedulers.scheduling_gmem_flow_match import GMemFlowMatchScheduler


FIXED_SOLVERS = {
    "sde_heun": {"stochastic": True, "solver": "heun"},
    "sde_euler": {"stochastic": True, "solver": "euler"},
    "sde_heun_no_last_step": {"stochastic": True, "solver": "heun", "last_step": None},
    "sde_euler_no_last_step": {"stochastic": True, "solver": "euler", "last_step": None},
    "ode_euler": {"stochastic": False, "solver": "euler"},
    "ode_midpoint": {"stochastic": False, "solver": "midpoint"},
    "ode_heun": {"stochastic": False, "solver": "heun"},
    "ode_heun3": {"stochastic": False, "solver": "heun3"},
    "ode_rk4": {"stochastic": False, "solver": "rk4"},
}
SOLVERS = FIXED_SOLVERS | {"ode_dopri5": {"stochastic": False, "solver": "dopri5"}}
each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
each_fixed_solver = pytest.mark.parametrize("solver", FIXED_SOLVERS.values(), ids=FIXED_SOLVERS.keys())


def run(scheduler, sample, model=None, **kwargs):
    """The loop that drives every solver; the model is called with a number for the timestep."""
    model = model or GaussianModel(scheduler.config.path_type, scheduler.config.prediction_type)
    i = 0
    while i < len(scheduler.timesteps):
        timestep = scheduler.timesteps[i]
        sample = scheduler.step(model(sample, timestep.item()), timestep, sample, **kwargs).prev_sample
        i += 1
    return sample


# Reference trajectories


PREDICTIONS = {"velocity": "flow_prediction", "noise": "epsilon", "score": "score"}


def scheduler_for(case):
    """The scheduler of a case, with its timesteps set."""
    options = case["options"]
    config = {"path_type": options["path"].lower(), "prediction_type": PREDICTIONS[options["prediction"]]}
    if options["sample_eps"] is not None:
        config["sample_eps"] = options["sample_eps"]
    num_inference_steps = options["num_steps"]
    if options["mode"] == "ODE":
        shift = options["timestep_shift"]
        config |= {
            "stochastic": False,
            "solver": {"heun2": "heun"}.get(options["sampling_method"], options["sampling_method"]),
            "shift": 1 / shift if shift > 0 else 1.0,
            "atol": 1e-7,
            "rtol": 1e-7,
        }
        num_inference_steps -= 1
    else:
        last_step = options["last_step"]
        config |= {
            "solver": options["sampling_method"].lower(),
            "diffusion_form": options["diffusion_form"].lower().replace("inccreasing", "increasing"),
            "diffusion_norm": options["diffusion_norm"],
            "last_step": None if last_step is None else last_step.lower(),
            "last_step_size": options["last_step_size"],
        }
        num_inference_steps -= last_step is None
    scheduler = GMemFlowMatchScheduler(**config)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


def model_for(case, snippets):
    """The model of a case, of a sample and a timestep, with the sign that the scheduler wants."""
    if "weights_from" in case:
        return guided_transformer(case, snippets)
    function, path_type = case["function"], case["options"]["path"].lower()

    def model(sample, timestep):
        t = torch.tensor(1 - timestep / 1000)
        condition = snippets[:, : sample.shape[1], None, None]
        if function["name"] == "velocity":
            wave = function["B"] * torch.sin(function["w2"] * sample + function["w3"] * t)
            return -(
                function["A"] * torch.cos(function["w1"] * t + function["p"]) * sample
                + wave
                + function["D"] * condition
            )
        path = ProbabilityPath.at(path_type, t, 1 - t)
        scale = {"noise": path.sigma, "score": -1}[function["name"]] / (path.alpha**2 + path.sigma**2)
        return scale * sample + function["E"] * t * (torch.sin(function["w"] * sample) + condition)

    return model


def guided_transformer(case, snippets):
    weights = next(other for other in reference_cases("model_forward") if other["file"] == case["weights_from"])
    transformer = convert_transformer(case_state_dict(case), weights["options"]["num_heads"]).eval()
    cfg = case["cfg"]

    @torch.no_grad()
    def model(sample, timestep):
        time = 1 - timestep / 1000
        times = torch.full((len(sample),), time)
        velocity = transformer(sample, times, snippets, return_dict=False)[0]
        if cfg is not None and (not cfg["cfg_interval"] or time >= cfg["cfg_interval_start"] - 1e-6):
            unconditional = transformer(sample, times, None, return_dict=False)[0]
            velocity = unconditional + cfg["cfg_scale"] * (velocity - unconditional)
        return -velocity

    return model


@pytest.mark.parametrize("case", reference_cases("sampler"), ids=lambda case: case["id"])
def test_reference_trajectory(case):
    tensors = case_tensors(case)
    stochastic, adaptive = case["options"]["mode"] == "SDE", case["options"]["sampling_method"] == "dopri5"
    scheduler = scheduler_for(case)
    if "B" in case:  # a guided case has each sample twice, and its second half influences nothing
        for name in tensors.keys() & {"x_init", "c", "noise", "xs"}:
            batch_dim = 1 if name in ("noise", "xs") else 0
            tensors[name] = tensors[name].narrow(batch_dim, 0, case["B"])
    model = model_for(case, tensors["c"])

    if adaptive:  # the reference is the less accurate, and evaluates beyond the end
        sample = run(scheduler, tensors["x_init"], model)
        torch.testing.assert_close(sample, tensors["xs_tight"][-1], rtol=1e-4, atol=1e-4)
        assert scheduler.timesteps.min() == scheduler.timesteps[-1] == 1000 * scheduler.sigmas[-1]
        return

    draws = list(tensors["noise"]) if stochastic else []
    noise_comes_first = stochastic and scheduler.order == 2
    sample = tensors["x_init"]
    if noise_comes_first:
        sample = scheduler.add_step_noise(sample, scheduler.timesteps[0], variance_noise=draws.pop(0))

    expected = list(tensors["xs"] if stochastic else tensors["xs"][1:])
    num_evaluations = len(scheduler.timesteps)
    for i, timestep in enumerate(scheduler.timesteps):
        model_output = model(sample, timestep.item())
        completes_step = i % scheduler.order == scheduler.order - 1 or (stochastic and i == num_evaluations - 1)
        draw = draws.pop(0) if completes_step and draws else None
        sample = scheduler.step(model_output, timestep, sample, variance_noise=draw).prev_sample

        if completes_step:
            state = expected.pop(0)
            if noise_comes_first and draw is not None:  # what comes back has the next step's noise in it
                state = scheduler.add_step_noise(state, scheduler.timesteps[i + 1], variance_noise=draw)
            assert_matches(case, "xs", sample, state)
    if stochastic and case["options"]["last_step"] is None:
        # The reference calls it a last step that nothing happens in
        assert_matches(case, "xs", sample, expected.pop(0))
    assert not expected and not draws

    assert num_evaluations == case["model_evals_needed"]
    eval_t = tensors["eval_t"]
    if stochastic:  # the reference evaluates twice for every drift, and once in some last steps
        num_drifts = num_evaluations - (case["options"]["last_step"] is not None)
        eval_t = torch.cat([eval_t[: 2 * num_drifts : 2], eval_t[2 * num_drifts :][:1]])
    torch.testing.assert_close(1 - scheduler.timesteps / 1000, eval_t, rtol=0, atol=1e-6)
    assert scheduler.num_inference_steps == len(tensors["grid"]) - (
        not stochastic or case["options"]["last_step"] is None
    )


# Closed form: for data ~ N(MEAN, STD^2) everything about the flow is known


MEAN, STD = 1.5, 0.4


class GaussianModel:
    """
    What a perfectly trained model puts out for data of this Gaussian; affine in the sample. `mean` and `std` may be
    tensors that broadcast over the samples.
    """

    def __init__(self, path_type="linear", prediction_type="flow_prediction", mean=MEAN, std=STD):
        self.path_type, self.prediction_type = path_type, prediction_type
        self.mean, self.std = mean, std

    def path(self, sigma):
        sigma = torch.tensor(sigma, dtype=torch.float64)
        return ProbabilityPath(*map(float, ProbabilityPath.at(self.path_type, 1 - sigma, sigma)))

    def moments(self, sigma):
        """Mean and variance of the noisy samples at sigma = 1 - t."""
        path = self.path(sigma)
        return path.alpha * self.mean, path.alpha**2 * self.std**2 + path.sigma**2

    def __call__(self, sample, timestep):
        sigma = timestep / 1000
        path, (mean, variance) = self.path(sigma), self.moments(sigma)
        noise = path.sigma / variance * (sample - mean)
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "score":
            return -(sample - mean) / variance
        data = self.mean + path.alpha * self.std**2 / variance * (sample - mean)
        return -path.velocity(data, noise)


gaussian_model_output = GaussianModel()


@each_solver
@pytest.mark.parametrize("path_type", PATH_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_samples_have_the_mean_and_covariance_of_the_data(solver, path_type, prediction_type):
    mean, std = torch.tensor([1.5, -0.5]), torch.tensor([0.4, 1.3])
    rotation = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    covariance = rotation @ torch.diag(std**2) @ rotation.T
    in_principal_axes = GaussianModel(path_type, prediction_type, mean @ rotation, std)

    def model(sample, timestep):
        return in_principal_axes(sample @ rotation, timestep) @ rotation.T

    scheduler = GMemFlowMatchScheduler(path_type=path_type, prediction_type=prediction_type, **solver)
    scheduler.set_timesteps(30)
    generator = torch.Generator().manual_seed(0)
    n = 2_000
    noise = torch.randn(n, 2, generator=generator) * scheduler.init_noise_sigma
    sample = run(scheduler, noise, model, generator=generator)

    # Five standard errors, and what is left of the discretisation and at the singular ends
    assert ((sample.mean(dim=0) - mean).abs() < 5 * std.max() / math.sqrt(n) + 0.01).all()
    assert ((sample.T.cov() - covariance).abs() < (5 * math.sqrt(2 / n) + 0.05) * covariance.max()).all()


def ode_end(model, scheduler, noise):
    """Exact end of the probability flow that starts from noise: it keeps the distance from the mean in deviations."""
    (start_mean, start_variance), (end_mean, end_variance) = (
        model.moments(scheduler.sigmas[index].item()) for index in (0, -1)
    )
    return end_mean + math.sqrt(end_variance / start_variance) * (noise - start_mean)


@pytest.mark.parametrize("path_type", PATH_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("heun3", 3), ("rk4", 4), ("dopri5", None)]
)
def test_ode_converges_to_the_exact_flow(solver, order, path_type, prediction_type):
    noise = torch.linspace(-2, 2, 9)[None]
    model = GaussianModel(path_type, prediction_type)

    def error(num_inference_steps):
        scheduler = GMemFlowMatchScheduler(
            stochastic=False,
            solver=solver,
            path_type=path_type,
            prediction_type=prediction_type,
            sample_eps=0.05,
            atol=1e-6,
            rtol=1e-6,
        )
        scheduler.set_timesteps(num_inference_steps)
        return (run(scheduler, noise, model) - ode_end(model, scheduler, noise)).abs().max().item()

    if solver == "dopri5":
        assert error(10) < 2e-5
        return
    num_inference_steps = {1: 64, 2: 32, 3: 24, 4: 16}[order]
    coarse, fine = error(num_inference_steps), error(2 * num_inference_steps)
    assert fine < 0.05
    assert fine < 2e-6 or math.log2(coarse / fine) == pytest.approx(order, abs=0.5)


def sde_moments(num_inference_steps, with_last_step=True, **config):
    """
    Exact mean and variance of the samples, for a start with the exact moments. With this model every sampler is affine
    in the independent standard normal draws (the initial one included), so the variance is the sum of its squared
    responses to a unit in each of them. Returns the scheduler as well.
    """
    scheduler = GMemFlowMatchScheduler(**config)
    scheduler.set_timesteps(num_inference_steps)
    model = GaussianModel(scheduler.config.path_type, scheduler.config.prediction_type)
    num_draws = len(scheduler.timesteps) + 2
    units = torch.cat([torch.zeros(1, num_draws), torch.eye(num_draws)])  # (nothing and each draw, draws)

    mean, variance = model.moments(scheduler.sigmas[0].item())
    sample = mean + math.sqrt(variance) * units[:, :1]
    sample = scheduler.add_step_noise(sample, scheduler.timesteps[0], variance_noise=units[:, 1:2])
    timesteps = scheduler.timesteps if with_last_step else scheduler.timesteps[:-1]
    for i, timestep in enumerate(timesteps):
        output = model(sample, timestep.item())
        sample = scheduler.step(output, timestep, sample, variance_noise=units[:, i + 2, None]).prev_sample
    return sample[0].item(), (sample[1:] - sample[0]).square().sum().item(), scheduler


@pytest.mark.parametrize("diffusion_norm", [0.3, 1.0, 2.0])
def test_sde_moments_converge_to_the_data(diffusion_norm):
    def error(solver, num_inference_steps):
        mean, variance, _ = sde_moments(
            num_inference_steps, solver=solver, diffusion_norm=diffusion_norm, last_step_size=0.2 / num_inference_steps
        )
        return max(abs(mean - MEAN), abs(variance - STD**2))

    for coarse, fine in ((50, 100), (100, 200)):
        assert error("euler", coarse) / error("euler", fine) == pytest.approx(2, abs=0.5)
    # Heun is the more accurate for the same number of evaluations
    assert error("heun", 50) < error("euler", 99)
    assert error("heun", 100) < 5e-4


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("path_type", PATH_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("diffusion_form", DIFFUSION_FORMS)
def test_every_diffusion_form_keeps_the_marginals(solver, path_type, prediction_type, diffusion_form):
    def error(num_inference_steps):
        mean, variance, scheduler = sde_moments(
            num_inference_steps,
            with_last_step=False,
            solver=solver,
            path_type=path_type,
            prediction_type=prediction_type,
            diffusion_form=diffusion_form,
            diffusion_norm=0.5,
            last_step_size=0.2,
            sample_eps=0.1,
        )
        exact_mean, exact_variance = GaussianModel(path_type).moments(scheduler.sigmas[-2].item())
        return max(abs(mean - exact_mean), abs(variance - exact_variance))

    # Both are of weak order 1: Heun has all noise of a step at its start
    coarse, fine = error(40), error(80)
    assert fine < 0.02
    assert coarse / fine == pytest.approx(2, abs=0.5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("path_type", PATH_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("last_step_size", [0.0, 0.1])
@pytest.mark.parametrize("last_step", [None, "mean", "tweedie", "euler"])
def test_last_steps(solver, path_type, prediction_type, last_step, last_step_size):
    mean, variance, scheduler = sde_moments(
        60,
        solver=solver,
        path_type=path_type,
        prediction_type=prediction_type,
        last_step=last_step,
        last_step_size=last_step_size,
        sample_eps=0.05,
    )
    model = GaussianModel(path_type, prediction_type)
    start = scheduler.sigmas[-2].item()
    if last_step == "tweedie":  # the expected data, given the sample before
        assert scheduler.sigmas[-1] == 0
        path, (_, sample_variance) = model.path(start), model.moments(start)
        exact_mean, exact_variance = MEAN, path.alpha**2 * STD**4 / sample_variance
    else:
        exact_mean, exact_variance = model.moments(scheduler.sigmas[-1].item())

    singular = prediction_type != "flow_prediction" or path_type == "vp"
    if last_step is None or last_step_size == 0:
        end = 0.05 if singular else 0.0
    else:
        end = last_step_size
    if last_step is None:
        assert scheduler.sigmas[-1].item() == pytest.approx(end)
    else:
        assert start == pytest.approx(end)
        assert scheduler.sigmas[-1].item() == pytest.approx(0.0 if last_step_size or last_step == "tweedie" else end)

    # A step of 0.1 without noise is a large one, most of all on VP, whose velocity is infinite at its end
    long_last_step = last_step in ("mean", "euler") and last_step_size == 0.1
    tolerance = (0.15 if path_type == "vp" else 0.05) if long_last_step else 0.02
    assert abs(mean - exact_mean) < tolerance
    assert abs(variance - exact_variance) < tolerance


# Schedule


THIRD, TWO_THIRDS = 1 / 3, 2 / 3


@pytest.mark.parametrize(
    "name, sigmas",
    [
        ("sde_heun", [1, 0.7, 0.7, 0.4, 0.4, 0.1, 0.1, 0]),
        ("sde_euler", [1, 0.7, 0.4, 0.1, 0]),
        ("sde_heun_no_last_step", [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0, 0]),
        ("sde_euler_no_last_step", [1, 0.75, 0.5, 0.25, 0]),
        ("ode_euler", [1, 0.75, 0.5, 0.25, 0]),
        ("ode_heun", [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0, 0]),
    ],
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedule(name, sigmas, shift):
    scheduler = GMemFlowMatchScheduler(shift=shift, **{"last_step_size": 0.1, **SOLVERS[name]})
    scheduler.set_timesteps(4)
    sigmas = torch.tensor(sigmas)
    torch.testing.assert_close(scheduler.sigmas, shift * sigmas / (1 + (shift - 1) * sigmas))
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32
    assert scheduler.order == (2 if "heun" in name else 1)
    assert scheduler.num_inference_steps == 4


@pytest.mark.parametrize(
    "solver, nodes",
    [
        ("midpoint", [0, 0.5]),
        ("heun3", [0, THIRD, TWO_THIRDS]),
        ("rk4", [0, THIRD, TWO_THIRDS, 1]),
        ("dopri5", [0, 0.2, 0.3, 0.8, 8 / 9, 1, 1]),
    ],
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_evaluations_within_the_steps(solver, nodes, shift):
    scheduler = GMemFlowMatchScheduler(stochastic=False, solver=solver, shift=shift)
    scheduler.set_timesteps(4)
    grid = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    grid = shift * grid / (1 + (shift - 1) * grid)
    sigmas = [start + node * (end - start) for start, end in zip(grid, grid[1:], strict=False) for node in nodes]
    if solver == "dopri5":  # knows the first step only
        sigmas = sigmas[:7]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*sigmas, 0]))
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    assert scheduler.order == (6 if solver == "dopri5" else len(nodes))


@pytest.mark.parametrize(
    "name, num_evaluations",
    [
        ("sde_heun", 19),
        ("sde_euler", 10),
        ("sde_heun_no_last_step", 20),
        ("sde_euler_no_last_step", 10),
        ("ode_euler", 10),
        ("ode_midpoint", 20),
        ("ode_heun", 20),
        ("ode_heun3", 30),
        ("ode_rk4", 40),
    ],
)
@pytest.mark.parametrize("path_type", PATH_TYPES)
def test_number_of_model_evaluations_in_ten_steps(name, num_evaluations, path_type):
    scheduler = GMemFlowMatchScheduler(path_type=path_type, **SOLVERS[name])
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == num_evaluations


@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler"])
@pytest.mark.parametrize("last_step_size", [0.0, 0.1])
def test_every_last_step_takes_one_evaluation(last_step, last_step_size):
    scheduler = GMemFlowMatchScheduler(last_step=last_step, last_step_size=last_step_size)
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 19


EPS = 0.05


@pytest.mark.parametrize("path_type", PATH_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "config",
    [
        {"stochastic": False, "solver": "euler"},
        {"stochastic": False, "solver": "dopri5"},
        {"last_step": None},
        {"last_step": None, "diffusion_form": "sbdm"},
        {"last_step_size": 0.2},
        {"last_step_size": 0.2, "diffusion_form": "sbdm"},
    ],
)
def test_ends_keep_away_from_where_they_are_singular(path_type, prediction_type, config):
    scheduler = GMemFlowMatchScheduler(path_type=path_type, prediction_type=prediction_type, sample_eps=EPS, **config)
    scheduler.set_timesteps(4)
    starts_late = path_type != "vp" and (
        prediction_type != "flow_prediction" or config.get("diffusion_form") == "sbdm"
    )
    assert scheduler.sigmas[0].item() == pytest.approx(1 - EPS if starts_late else 1)
    if "last_step_size" in config:
        assert scheduler.sigmas[-2].item() == pytest.approx(0.2)
        assert scheduler.sigmas[-1] == 0
    else:
        ends_early = path_type == "vp" or prediction_type != "flow_prediction"
        assert scheduler.sigmas[-1].item() == pytest.approx(EPS if ends_early else 0)


@pytest.mark.parametrize("path_type", ["linear", "gvp"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(
    "diffusion", [("sbdm", 1.0), ("sigma", 1.0), ("linear", 2.0), ("decreasing", 1.0), ("increasing-decreasing", 1.0)]
)
def test_sde_that_goes_to_sigma_0(path_type, solver, diffusion):
    # The score is infinite there, but the diffusion coefficient times the score has a limit
    form, norm = diffusion
    config = {"path_type": path_type, "solver": solver, "diffusion_form": form, "diffusion_norm": norm}
    config["sample_eps"] = 0.1
    scheduler = GMemFlowMatchScheduler(last_step=None, **config)
    scheduler.set_timesteps(4)
    near = GMemFlowMatchScheduler(last_step="tweedie", last_step_size=1e-6, **config)
    near.set_timesteps(5)
    noise = torch.randn(5, 1, 6, generator=torch.Generator().manual_seed(0))
    model = GaussianModel(path_type)
    samples = []
    for each in (scheduler, near):
        sample, draws = noise[0], list(noise[1:])
        if solver == "heun":
            sample = each.add_step_noise(sample, each.timesteps[0], variance_noise=draws.pop(0))
        for i, timestep in enumerate(each.timesteps[: 4 * each.order]):
            draw = draws.pop(0) if draws and i % each.order == each.order - 1 else None
            sample = each.step(model(sample, timestep.item()), timestep, sample, variance_noise=draw).prev_sample
        samples.append(sample)
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=1e-4)


def test_the_default_is_the_setting_of_the_paper():
    scheduler = GMemFlowMatchScheduler()
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps) == 99
    assert scheduler.sigmas[-2].item() == pytest.approx(0.004)


@each_solver
def test_shortest_run(solver):
    scheduler = GMemFlowMatchScheduler(**solver)
    scheduler.set_timesteps(2 if solver["stochastic"] and "last_step" not in solver else 1)
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


@each_fixed_solver
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


@pytest.mark.parametrize("name", [name for name in SOLVERS if not name.startswith("sde_heun")])
def test_no_other_solver_has_noise_before_its_first_evaluation(name):
    scheduler = GMemFlowMatchScheduler(**SOLVERS[name])
    scheduler.set_timesteps(4)
    assert scheduler.init_noise_sigma == 1.0
    sample = torch.ones(2, 3)
    assert torch.equal(scheduler.add_step_noise(sample, scheduler.timesteps[0]), sample)


@pytest.mark.parametrize(
    "name, noisy",
    [
        ("sde_heun", [1, 3]),
        ("sde_heun_no_last_step", [1, 3, 5]),
        ("sde_euler", [0, 1, 2]),
        ("sde_euler_no_last_step", [0, 1, 2, 3]),
        ("ode_heun", []),
        ("ode_rk4", []),
    ],
)
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
        if solver["solver"] == "dopri5":  # the step size is common to the batch
            torch.testing.assert_close(sample([seed])[0], batch[seed], rtol=3e-3, atol=3e-3)
        else:
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


def test_predictions_of_one_model_make_the_same_steps():
    for path_type in PATH_TYPES:
        samples = []
        for prediction_type in PREDICTION_TYPES:
            scheduler = GMemFlowMatchScheduler(
                path_type=path_type, prediction_type=prediction_type, diffusion_form="sbdm", sample_eps=0.1
            )
            scheduler.set_timesteps(4)
            noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
            samples.append(run(scheduler, noise, generator=torch.Generator().manual_seed(1)))
        for sample in samples[1:]:
            torch.testing.assert_close(sample, samples[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_without_diffusion_the_sde_is_the_ode_on_its_grid(solver):
    sde = GMemFlowMatchScheduler(solver=solver, diffusion_norm=0.0, last_step_size=0.25)
    ode = GMemFlowMatchScheduler(solver=solver, stochastic=False)
    sde.set_timesteps(4)
    ode.set_timesteps(4)
    sde_sample = ode_sample = torch.linspace(-1, 1, 5)[None]
    for timestep in sde.timesteps[:-1]:  # the SDE's last step has one evaluation whatever the solver
        sde_sample = sde.step(gaussian_model_output(sde_sample, timestep.item()), timestep, sde_sample).prev_sample
        ode_sample = ode.step(gaussian_model_output(ode_sample, timestep.item()), timestep, ode_sample).prev_sample
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

    for path_type in PATH_TYPES:
        path = GaussianModel(path_type).path(0.25)
        mixed = GMemFlowMatchScheduler(path_type=path_type).scale_noise(data, 250.0, noise)
        torch.testing.assert_close(mixed, path.alpha * data + path.sigma * noise)

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
        sample = run(scheduler, torch.ones(1, 3), generator=torch.Generator().manual_seed(0))
        return torch.cat([sample.flatten(), scheduler.timesteps, scheduler.sigmas])

    first = sample()
    assert torch.equal(sample(), first)
    # A run that is given up within a step leaves nothing behind
    scheduler.set_timesteps(7)
    scheduler.step(torch.ones(1, 3), scheduler.timesteps[0], torch.ones(1, 3))
    assert torch.equal(sample(), first)


@each_fixed_solver
@pytest.mark.parametrize("by_begin_index", [True, False])
def test_starting_in_the_middle(solver, by_begin_index):
    scheduler = GMemFlowMatchScheduler(**solver)
    scheduler.set_timesteps(4)
    middle = 2 * scheduler.order
    samples, generator = [torch.ones(1, 3)], torch.Generator().manual_seed(0)
    for i, timestep in enumerate(scheduler.timesteps):
        if i == middle:
            state = generator.get_state()
        output = gaussian_model_output(samples[-1], timestep.item())
        samples.append(scheduler.step(output, timestep, samples[-1], generator=generator).prev_sample)

    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None
    if by_begin_index:
        scheduler.set_begin_index(middle)
        assert scheduler.begin_index == middle
    generator.set_state(state)
    sample = samples[middle]
    for timestep in scheduler.timesteps[middle:]:
        output = gaussian_model_output(sample, timestep.item())
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
    assert torch.equal(sample, samples[-1])
    assert scheduler.step_index == len(scheduler.timesteps)


@each_fixed_solver
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


# dopri5


def make_dopri5(tolerance=1e-4, **config):
    return GMemFlowMatchScheduler(stochastic=False, solver="dopri5", atol=tolerance, rtol=tolerance, **config)


def test_dopri5_takes_six_evaluations_for_every_step_tried():
    scheduler = make_dopri5(1e-6)
    scheduler.set_timesteps(2)  # too large a first step
    sample = run(scheduler, torch.linspace(-2, 2, 9)[None])
    torch.testing.assert_close(sample, MEAN + STD * torch.linspace(-2, 2, 9)[None], rtol=0, atol=1e-5)

    num_tried, remainder = divmod(len(scheduler.timesteps) - 1, 6)
    assert remainder == 0
    # Where a step was kept, the next goes on; where not, it is tried again, smaller
    starts, start = [], 1.0
    for i in range(num_tried):
        first, end = scheduler.sigmas[6 * i + 1].item(), scheduler.sigmas[6 * i + 6].item()
        start = end + (first - end) / 0.8
        starts.append((start, end))
    kept = [after[0] == pytest.approx(before[1], abs=1e-6) for before, after in zip(starts, starts[1:], strict=False)]
    tried_again = [
        after[0] == pytest.approx(before[0], abs=1e-6) and after[1] > before[1]
        for before, after in zip(starts, starts[1:], strict=False)
    ]
    assert all(a != b for a, b in zip(kept, tried_again, strict=True))
    assert not kept[0] and any(kept)
    assert scheduler.sigmas.min() == scheduler.sigmas[-1] == scheduler.sigmas[-2] == 0


def test_the_first_step_of_dopri5_is_one_of_the_steps_asked_for():
    for num_inference_steps in (1, 4, 50):
        scheduler = make_dopri5()
        scheduler.set_timesteps(num_inference_steps)
        assert len(scheduler.timesteps) == 7
        assert 1 - scheduler.sigmas[6].item() == pytest.approx(1 / num_inference_steps)


def test_dopri5_follows_its_tolerance():
    noise = torch.linspace(-2, 2, 9)[None]
    errors, evaluations = [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        scheduler = make_dopri5(tolerance)
        scheduler.set_timesteps(20)
        errors.append((run(scheduler, noise) - (MEAN + STD * noise)).abs().max().item())
        evaluations.append(len(scheduler.timesteps))
        assert errors[-1] < 30 * tolerance
    assert errors == sorted(errors, reverse=True)
    assert evaluations == sorted(evaluations)


def test_every_sample_of_a_batch_keeps_the_tolerance_of_dopri5():
    # One sample in a hundred has a model that needs small steps; a mean over the batch would pass it over
    std = torch.ones(100, 1)
    std[17] = 0.01
    mean = 5 * (std == 0.01)
    model, noise = GaussianModel(mean=mean, std=std), torch.linspace(-2, 2, 4).expand(100, 4)
    scheduler = make_dopri5(1e-4)
    scheduler.set_timesteps(4)
    sample = run(scheduler, noise, model)
    assert ((sample - (mean + std * noise)).abs() < 1e-3).all()


def test_the_steps_of_dopri5_do_not_depend_on_the_size_of_the_samples():
    timesteps = []
    for repeats in (1, 100):
        scheduler = make_dopri5()
        scheduler.set_timesteps(10)
        run(scheduler, torch.linspace(-2, 2, 9).repeat(1, repeats))
        timesteps.append(scheduler.timesteps)
    torch.testing.assert_close(timesteps[0], timesteps[1], rtol=0, atol=0.1)


def test_dopri5_can_begin_anywhere():
    data, noise = torch.linspace(-1, 1, 5)[None], torch.linspace(2, -2, 5)[None]
    model = GaussianModel()
    for timestep in (torch.tensor(600.0), 37.5):
        scheduler = make_dopri5(1e-6)
        scheduler.set_timesteps(20)
        start = sample = scheduler.scale_noise(data, timestep, noise)
        output = model(sample, float(timestep))
        sample = scheduler.step(output, timestep, sample).prev_sample
        assert scheduler.step_index == 1
        assert scheduler.timesteps[0] == float(timestep)
        while scheduler.step_index < len(scheduler.timesteps):
            timestep = scheduler.timesteps[scheduler.step_index]
            sample = scheduler.step(model(sample, timestep.item()), timestep, sample).prev_sample
        torch.testing.assert_close(sample, ode_end(model, scheduler, start), rtol=0, atol=1e-5)


@pytest.mark.parametrize("timestep", [0.0, 1000.5])
def test_dopri5_cannot_begin_outside(timestep):
    scheduler = make_dopri5()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=f"`timestep` must be at most 1000 and above 0.0, .*got {timestep}"):
        scheduler.step(torch.ones(1, 3), timestep, torch.ones(1, 3))


def test_begin_index_of_dopri5():
    scheduler = make_dopri5()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    scheduler.step(torch.ones(1, 3), scheduler.timesteps[0], torch.ones(1, 3))
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(6)
    with pytest.raises(ValueError, match=r"one of range\(0, 1\).*got index 6"):
        scheduler.step(torch.ones(1, 3), scheduler.timesteps[6], torch.ones(1, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_dopri5_gives_up_on_an_output_that_is_not_finite(value):
    scheduler = make_dopri5()
    scheduler.set_timesteps(4)
    with pytest.raises(RuntimeError, match="dopri5 solver gives up at sigma .*`atol=0.0001`.*not finite"):
        run(scheduler, torch.ones(1, 3), lambda sample, timestep: sample * (value if timestep < 500 else 1.0))
    # Soon, as each try is a fifth of the one before
    assert len(scheduler.timesteps) < 1000


def test_dopri5_tries_a_smaller_step_where_one_overflowed():
    scheduler = make_dopri5(1e-6)
    scheduler.set_timesteps(4)
    noise, model, calls = torch.linspace(-2, 2, 9)[None], GaussianModel(), []

    def overflowing_once(sample, timestep):
        calls.append(timestep)
        return model(sample, timestep) * (math.inf if len(calls) == 3 else 1.0)

    sample = run(scheduler, noise, overflowing_once)
    torch.testing.assert_close(sample, MEAN + STD * noise, rtol=0, atol=1e-5)


def test_dopri5_gives_up_on_a_tolerance_below_the_rounding():
    scheduler = make_dopri5(1e-18)
    scheduler.set_timesteps(4)
    with pytest.raises(RuntimeError, match="tolerance is finer than its rounding"):
        run(scheduler, torch.ones(1, 3))


def test_dopri5_gives_up_after_many_steps(monkeypatch):
    monkeypatch.setattr("diffusers_gmem.schedulers.scheduling_gmem_flow_match.DOPRI5_MOST_TRIES", 5)
    scheduler = make_dopri5(1e-6)
    scheduler.set_timesteps(4)
    with pytest.raises(RuntimeError, match="gives up at sigma .* after 31 evaluations"):
        run(scheduler, torch.ones(1, 3))


def test_dopri5_gets_over_a_jump_in_the_model():
    # As guidance in an interval makes it; the error estimate supposes a smooth model
    scheduler = make_dopri5()
    scheduler.set_timesteps(10)
    sample = run(scheduler, torch.zeros(1, 3), lambda sample, timestep: torch.full_like(sample, float(timestep < 110)))
    torch.testing.assert_close(sample, torch.full((1, 3), -0.11), rtol=0, atol=0.02)


# Configuration


CONFIG = {
    "shift": 2.0,
    "stochastic": False,
    "solver": "rk4",
    "diffusion_form": "sbdm",
    "diffusion_norm": 0.5,
    "last_step": None,
    "last_step_size": 0.01,
    "sample_eps": 0.01,
    "atol": 1e-5,
    "rtol": 1e-2,
}


def test_config_round_trip(tmp_path):
    config = {**CONFIG, "path_type": "gvp", "prediction_type": "epsilon"}
    scheduler = GMemFlowMatchScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    loaded = GMemFlowMatchScheduler.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(scheduler.config)
    for name, value in config.items():
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
        ("prediction_type", "noise", "flow_prediction.*epsilon.*score"),
        ("stochastic", "False", "True, False"),
        ("solver", "heun2", "euler.*midpoint.*heun.*heun3.*rk4.*dopri5"),
        ("solver", "rk4", "'euler', 'heun'.*stochastic=True"),
        ("diffusion_form", "SBDM", "constant.*sbdm.*sigma.*linear.*decreasing.*increasing-decreasing"),
        ("diffusion_norm", -1.0, "0 or above"),
        ("diffusion_norm", math.inf, "finite"),
        ("last_step", "Mean", "mean.*tweedie.*euler.*None"),
        ("last_step_size", -0.1, "0 or above"),
        ("last_step_size", 1.0, "below 1"),
        ("path_type", "Linear", "linear.*gvp.*vp"),
        ("sample_eps", 0.0, "between 0 and 0.5"),
        ("sample_eps", 0.5, "between 0 and 0.5"),
        ("atol", 0.0, "positive finite"),
        ("rtol", 0.0, "positive finite"),
        ("rtol", math.nan, "positive finite"),
    ],
)
def test_wrong_configuration(argument, value, accepted):
    with pytest.raises(ValueError, match=f"`{argument}` must .*{accepted}.*got {value!r}"):
        GMemFlowMatchScheduler(**{argument: value})


def test_sde_that_would_start_where_it_ends():
    with pytest.raises(ValueError, match="`last_step_size` must be below.*0.6.*sample_eps=0.4.*got 0.7"):
        GMemFlowMatchScheduler(prediction_type="score", sample_eps=0.4, last_step_size=0.7)


@pytest.mark.parametrize("path_type", ["linear", "gvp"])
@pytest.mark.parametrize("diffusion", [("constant", 1.0), ("decreasing", 0.5), ("decreasing", 2.0)])
@pytest.mark.parametrize(
    "end",
    [
        {"last_step": None},
        {"last_step": "tweedie", "last_step_size": 0.0},
        {"last_step": "mean", "last_step_size": 0.0, "solver": "euler"},
    ],
)
def test_drift_that_is_infinite_where_it_is_evaluated(path_type, diffusion, end):
    config = {"path_type": path_type, "diffusion_form": diffusion[0], "diffusion_norm": diffusion[1]}
    with pytest.raises(ValueError, match=f"`diffusion_form='{diffusion[0]}'`.*infinite.*got {end['last_step']!r} and"):
        GMemFlowMatchScheduler(**config, **end)
    # The same with another end, or where the drift is not evaluated there
    GMemFlowMatchScheduler(**config)
    GMemFlowMatchScheduler(**config, last_step=None, solver="euler")
    GMemFlowMatchScheduler(**config, **end, stochastic=False)
    GMemFlowMatchScheduler(**{**config, "diffusion_norm": 0.0 if diffusion[0] == "constant" else 1.0}, **end)
    GMemFlowMatchScheduler(**{**config, "path_type": "vp"}, **end)
    GMemFlowMatchScheduler(**config, **end, prediction_type="epsilon")


@pytest.mark.parametrize("config, fewest", [({}, 2), ({"last_step": None}, 1), ({"stochastic": False}, 1)])
def test_too_few_steps(config, fewest):
    scheduler = GMemFlowMatchScheduler(**config)
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
