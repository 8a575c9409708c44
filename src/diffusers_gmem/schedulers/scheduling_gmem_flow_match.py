# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .probability_paths import (
    DIFFUSION_FORMS,
    PATH_TYPES,
    PREDICTION_TYPES,
    ProbabilityPath,
    check_choice,
    diffusion_coefficient,
    time_interval,
)


# Butcher tableaux: where in the step the slopes of a method are taken, and for each slope the weights of all slopes so
# far in what comes next, which is the sample to take the next slope at or, after the last one, the result of the step.
# dopri5 takes its last slope at the result itself: it serves the error estimate, and is the first of the next step.
TABLEAUS = {
    "euler": ((0,), ((1,),)),
    "midpoint": ((0, 1 / 2), ((1 / 2,), (0, 1))),
    "heun": ((0, 1), ((1,), (1 / 2, 1 / 2))),
    "heun3": ((0, 1 / 3, 2 / 3), ((1 / 3,), (0, 2 / 3), (1 / 4, 0, 3 / 4))),
    "rk4": ((0, 1 / 3, 2 / 3, 1), ((1 / 3,), (-1 / 3, 1), (1, -1, 1), (1 / 8, 3 / 8, 3 / 8, 1 / 8))),
    "dopri5": (
        (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
    ),
}
STOCHASTIC_SOLVERS = ("euler", "heun")

# Weights of dopri5's slopes in the difference between its results of order 5 and 4
DOPRI5_ERROR_WEIGHTS = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
# Where dopri5 gives up. Timesteps in float32 resolve about a tenth of the smallest step.
DOPRI5_SMALLEST_STEP = 1e-6
DOPRI5_MOST_TRIES = 1000


@dataclass
class GMemFlowMatchSchedulerOutput(BaseOutput):
    """
    Output of [`GMemFlowMatchScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, ...)`):
            The sample at which the model is to be evaluated next; after the last step, the finished sample.
    """

    prev_sample: torch.Tensor


class GMemFlowMatchScheduler(SchedulerMixin, ConfigMixin):
    r"""
    ODE and SDE solvers for flow-matching models; the defaults are the SDE sampler of GMem
    ([arXiv 2412.08781](https://huggingface.co/papers/2412.08781)), which is SiT's
    ([arXiv 2401.08740](https://huggingface.co/papers/2401.08740)).

    The papers count time as `t`, from 0 (noise) to 1 (data), along a path `x = alpha(t) * data + sigma(t) * noise`
    with the velocity `v = alpha'(t) * data + sigma'(t) * noise`. The interface has diffusers' conventions: the entries
    of `sigmas` are `1 - t` on every path, `timestep = num_train_timesteps * (1 - t)`, and a model of the flow puts out
    `-v`; on the linear path, where `sigma(t) = 1 - t`, that is `noise - data`. Per unit of `t` the sampler follows

        ODE:  dx = v dt
        SDE:  dx = b dt + sqrt(2 D) dw,   b = v + D * score

    where `D` is the diffusion coefficient (`diffusion_form`). The marginals are the same for every `D`. Velocity and
    score come from the same output, hence one model evaluation per drift. With the grid `s_0 > s_1 > ...` of the
    `N = num_inference_steps` steps, `timesteps` has one entry per model evaluation:

    | `solver`       | one step, of size h                                      | evaluations   | at the sigmas        |
    |----------------|----------------------------------------------------------|---------------|----------------------|
    | SDE `heun`     | `y = x + sqrt(2Dh) w; x = y + h/2 (b(y) + b(y + hb(y)))` | `2N - 1` (*)  | `s_0, s_1, s_1, ...` |
    | SDE `euler`    | `x = x + hb(x) + sqrt(2Dh) w`                            | `N`           | `s_0, s_1, ...`      |
    | ODE `euler`    | order 1                                                  | `N`           | `s_0, s_1, ...`      |
    | ODE `midpoint` | order 2                                                  | `2N`          | at 0, 1/2 of a step  |
    | ODE `heun`     | order 2: `x = x + h/2 (v(x) + v(x + hv(x)))`             | `2N`          | at 0, 1 of a step    |
    | ODE `heun3`    | order 3, Heun's                                          | `3N`          | at 0, 1/3, 2/3       |
    | ODE `rk4`      | order 4, Kutta's 3/8 rule                                | `4N`          | at 0, 1/3, 2/3, 1    |
    | ODE `dopri5`   | order 5, Dormand and Prince's, adaptive                  | `1 + 6 tries` | see below            |

    (*) `2N` with `last_step=None`. In the noise, `D` is that at the start of the step. An ODE goes from 1 to 0 in `N`
    equal steps (before `shift`). An SDE goes in `N - 1` equal steps to `last_step_size`, and from there to 0 in a last
    step with one evaluation and no noise; without a last step it goes as the ODE does. Where the mathematics divides
    by zero, a run keeps `sample_eps` away from the end:

    - a noise or score prediction starts at `1 - sample_eps` except on `"vp"`, and so does the diffusion form `"sbdm"`;
    - a noise or score prediction, and any model on `"vp"`, ends at `sample_eps` where no last step leads on to 0.

    **The noise of stochastic Heun comes first**, and the model has to see it. So the `step` that completes one Heun
    step already adds the noise of the next, and the sample in the loop is always the one to evaluate the model at. The
    noise of the very first step is part of `init_noise_sigma`: the first sample is pure noise, and independent noise
    only widens it. To start elsewhere, or with given noise, call [`~GMemFlowMatchScheduler.add_step_noise`] on the
    sample instead.

    **The steps of dopri5 are chosen on the way.** The first one tried is the first of the equal steps above. A step
    is kept if its estimated error is within `atol + rtol * |x|` (root mean square over the elements of a sample, in
    the worst sample of the batch), else tried again, smaller; the estimate also says how large the next can be. As the
    batch has its step size in common, the rest of the batch changes a sample, but within the tolerance. `timesteps`
    and `sigmas` list the evaluations up to the end of the step being tried; the `step` call that decides on it appends
    those of the next, and the run is over when none is left. A loop for it, which drives the other solvers as well:

    ```py
    >>> i = 0
    >>> while i < len(scheduler.timesteps):
    ...     timestep = scheduler.timesteps[i]
    ...     model_output = -velocity(sample, 1 - timestep / 1000)
    ...     sample = scheduler.step(model_output, timestep, sample, generator=generator).prev_sample
    ...     i += 1
    ```

    This is why the solver is here and not torchdiffeq's, which calls the model itself: guidance, callbacks, caches and
    interrupts stay in the one loop of the pipeline. It also never evaluates beyond the end, where no model was trained
    and where torchdiffeq goes to interpolate.

    Example:

    ```py
    >>> scheduler = GMemFlowMatchScheduler()
    >>> scheduler.set_timesteps(50)
    >>> sample = torch.randn(4, 3, 16, 16, generator=generator) * scheduler.init_noise_sigma
    >>> for timestep in scheduler.timesteps:
    ...     model_output = -velocity(sample, 1 - timestep / 1000)
    ...     sample = scheduler.step(model_output, timestep, sample, generator=generator).prev_sample
    ```

    For other solvers of a flow prediction on the linear path, `UniPCMultistepScheduler.from_config(scheduler.config,
    use_flow_sigmas=True)`, the same with `DPMSolverMultistepScheduler`, and `from_config` of
    `FlowMatchEulerDiscreteScheduler` and `FlowMatchHeunDiscreteScheduler` work. The first two name the shift
    `flow_shift`: pass it to them.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            Timestep of pure noise.
        shift (`float`, defaults to 1.0):
            Every sigma of the grid becomes `shift * sigma / (1 + (shift - 1) * sigma)`; above 1 more steps are spent
            near the noise. Positive.
        prediction_type (`str`, defaults to `"flow_prediction"`):
            What the model predicts: `"flow_prediction"`, that is `-v`; `"epsilon"`, the noise; `"score"`, that is
            `-noise / sigma(t)`.
        stochastic (`bool`, defaults to `True`):
            Whether to solve the SDE (`True`) or the ODE (`False`; the diffusion and last-step arguments then have no
            effect).
        solver (`str`, defaults to `"heun"`):
            One of the table.
        diffusion_form (`str`, defaults to `"linear"`):
            The diffusion coefficient, with k the `diffusion_norm`: `"constant"` k; `"sbdm"` k * (alpha' / alpha *
            sigma^2 - sigma * sigma'), which on `"vp"` is the reverse of the SDE of training; `"sigma"` k * sigma(t);
            `"linear"` k * (1 - t); `"decreasing"` (k * cos(pi t) + 1)^2 / 4; `"increasing-decreasing"`
            k * sin(pi t)^2.
        diffusion_norm (`float`, defaults to 1.0):
            Scale of the diffusion coefficient, not negative.
        last_step (`str`, *optional*, defaults to `"mean"`):
            The last step of the SDE: `"mean"`, a step along `b`; `"euler"`, a step along `v`; `"tweedie"`, the data
            that the model predicts, `(x + sigma^2 * score) / alpha`; `None`, no last step.
        last_step_size (`float`, defaults to 0.004):
            Where the last step of the SDE starts, as a sigma before `shift`; 0 or above, below 1. With 0, it starts
            where a run without last step ends, and `"mean"` and `"euler"` change nothing.
        path_type (`str`, defaults to `"linear"`):
            The path that the model was trained on: `"linear"`, `"gvp"` or `"vp"`, see [`ProbabilityPath.at`].
        sample_eps (`float`, defaults to 0.001):
            Distance in sigma, before `shift`, from the singular ends; above 0, below 0.5.
        atol (`float`, defaults to 1e-6):
            Absolute tolerance of `"dopri5"`, positive.
        rtol (`float`, defaults to 1e-3):
            Relative tolerance of `"dopri5"`, positive.

    Raises:
        ValueError: If an argument is outside what is accepted, or the SDE would start where it ends, or evaluate at
            sigma 0 a drift that is infinite there.
    """

    _compatibles = [
        "DPMSolverMultistepScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "UniPCMultistepScheduler",
    ]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        prediction_type: str = "flow_prediction",
        stochastic: bool = True,
        solver: str = "heun",
        diffusion_form: str = "linear",
        diffusion_norm: float = 1.0,
        last_step: str | None = "mean",
        last_step_size: float = 0.004,
        path_type: str = "linear",
        sample_eps: float = 1e-3,
        atol: float = 1e-6,
        rtol: float = 1e-3,
    ):
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` must be at least 1, got {num_train_timesteps!r}.")
        if not 0 < shift < math.inf:
            raise ValueError(f"`shift` must be a positive finite number, got {shift!r}.")
        if not 0 <= diffusion_norm < math.inf:
            raise ValueError(f"`diffusion_norm` must be a finite number, 0 or above, got {diffusion_norm!r}.")
        if not 0 <= last_step_size < 1:
            raise ValueError(f"`last_step_size` must be 0 or above and below 1, got {last_step_size!r}.")
        if not 0 < sample_eps < 0.5:
            raise ValueError(f"`sample_eps` must lie between 0 and 0.5, both excluded, got {sample_eps!r}.")
        if not 0 < atol < math.inf:
            raise ValueError(f"`atol` must be a positive finite number, got {atol!r}.")
        if not 0 < rtol < math.inf:
            raise ValueError(f"`rtol` must be a positive finite number, got {rtol!r}.")
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("stochastic", stochastic, (True, False))
        check_choice("solver", solver, TABLEAUS)
        check_choice("diffusion_form", diffusion_form, DIFFUSION_FORMS)
        check_choice("last_step", last_step, ("mean", "tweedie", "euler", None))
        check_choice("path_type", path_type, PATH_TYPES)
        if stochastic and solver not in STOCHASTIC_SOLVERS:
            raise ValueError(
                f"`solver` must be one of {STOCHASTIC_SOLVERS} with `stochastic=True`, got {solver!r}; with"
                f" `stochastic=False` one of {tuple(TABLEAUS)}."
            )

        # diffusers does not pass arguments that were left at their defaults on to another class's `from_config`. What
        # the model predicts has to reach it, or UniPC and DPM++ would take the output for `epsilon`.
        self.register_to_config(_use_default_values=[])

        start, end = self._sigma_range()
        if start <= end:
            raise ValueError(
                f"`last_step_size` must be below the sigma that the SDE starts at, {start} with"
                f" `sample_eps={sample_eps!r}`, got {last_step_size!r}."
            )
        # D * score is -D / sigma(t) times the predicted noise
        drift_at_the_end = stochastic and (solver == "heun" or last_step == "mean")
        if (
            drift_at_the_end
            and end == 0
            and diffusion_coefficient(diffusion_form, diffusion_norm, self._path(0), 0) > 0
        ):
            raise ValueError(
                f"`diffusion_form={diffusion_form!r}` with `diffusion_norm={diffusion_norm!r}` makes the drift"
                " infinite at sigma 0, where this SDE evaluates it: `last_step` must not be None and `last_step_size`"
                f" above 0, got {last_step!r} and {last_step_size!r}."
            )

        self.num_inference_steps = None
        sigmas = torch.linspace(1, 1 / num_train_timesteps, num_train_timesteps, dtype=torch.float64)
        self._set_schedule(self._shifted(sigmas), 0.0)

    @property
    def order(self) -> int:
        """Evaluations per step, see the table; dopri5 takes one more at its start, the SDE one in its last step."""
        return len(TABLEAUS[self.config.solver][1])

    @property
    def init_noise_sigma(self) -> float:
        """
        Standard deviation that the initial noise needs: 1.0, or `sqrt(1 + 2 D(s_0) (s_0 - s_1))` for stochastic Heun
        once `set_timesteps` has been called, which includes the noise of the first step.
        """
        if self.num_inference_steps is None or not self._noise_comes_first:
            return 1.0
        return math.sqrt(1 + self._step_noise_std(0) ** 2)

    @property
    def step_index(self) -> int | None:
        """Index in `timesteps` of the evaluation that the next `step` takes; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index in `timesteps` of the first evaluation, if set with `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Sets the index in `timesteps` at which the next run begins. Call it after `set_timesteps`, which resets it;
        without it, the first `step` finds the place by its timestep.

        Args:
            begin_index (`int`, defaults to 0):
                The first evaluation of a step: a multiple of `order`. With dopri5, 0.
        """
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Sets `timesteps` (one entry per model evaluation; with dopri5, those of the first step) and `sigmas` (the same
        over `num_train_timesteps`, and that of the finished sample), and starts a new run.

        Args:
            num_inference_steps (`int`):
                Number of steps `N`, the last step of the SDE included: 1 or more, 2 or more with a last step. With
                dopri5 it only says how large the first step is.
            device (`str` or `torch.device`, *optional*):
                Device of `timesteps`. `sigmas` stays on the CPU, so that `step` never waits for the device (dopri5's
                does, once for every step it tries).

        Raises:
            ValueError: If there are too few steps.
        """
        fewest = 2 if self._has_last_step else 1
        if num_inference_steps < fewest:
            reason = " with `stochastic=True`, the last step included" if self._has_last_step else ""
            raise ValueError(f"`num_inference_steps` must be at least {fewest}{reason}, got {num_inference_steps!r}.")
        self.num_inference_steps = num_inference_steps

        num_points = num_inference_steps if self._has_last_step else num_inference_steps + 1
        grid = self._shifted(torch.linspace(*self._sigma_range(), num_points, dtype=torch.float64))
        if self.config.solver == "dopri5":
            self._start_dopri5(grid[0].item(), grid[-1].item(), (grid[0] - grid[1]).item(), device)
            return

        nodes = torch.tensor(TABLEAUS[self.config.solver][0], dtype=torch.float64)
        sigmas = ((1 - nodes) * grid[:-1, None] + nodes * grid[1:, None]).flatten()
        final_sigma = grid[-1].item()
        if self._has_last_step:
            sigmas = torch.cat([sigmas, grid[-1:]])
            if self.config.last_step_size > 0 or self.config.last_step == "tweedie":
                final_sigma = 0.0
        self._set_schedule(sigmas, final_sigma, device)

    @property
    def _has_last_step(self) -> bool:
        return self.config.stochastic and self.config.last_step is not None

    def _sigma_range(self) -> tuple[float, float]:
        """The sigmas between which the steps are equal, before `shift`."""
        start, end = (
            1 - t for t in time_interval(self.config.path_type, self.config.prediction_type, self.config.sample_eps)
        )
        if self.config.stochastic and self.config.diffusion_form == "sbdm" and self.config.path_type != "vp":
            start = 1 - self.config.sample_eps
        if self._has_last_step and self.config.last_step_size > 0:
            end = self.config.last_step_size
        return start, end

    def _shifted(self, sigmas: torch.Tensor) -> torch.Tensor:
        return self.config.shift * sigmas / (1 + (self.config.shift - 1) * sigmas)

    def _set_schedule(
        self, sigmas: torch.Tensor, final_sigma: float, device: str | torch.device | None = None
    ) -> None:
        """Takes the sigma of every evaluation and of the finished sample, and forgets all about an earlier run."""
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(device=device, dtype=torch.float32)
        self.sigmas = torch.cat([sigmas, sigmas.new_tensor([final_sigma])]).float()

        self._step_index = None
        self._begin_index = None
        # The step under way: where it starts (the sigma only with dopri5), its size, and its slopes so far
        self._start_sample = None
        self._start_sigma = None
        self._step_size = None
        self._slopes = []

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """
        Index in `timesteps` of the step that starts at a timestep. Where a solver has the timestep twice, as the end
        of one step and the start of the next, it is the second.

        Args:
            timestep (`float` or 0-dimensional `torch.Tensor`):
                One of `timesteps`.

        Raises:
            ValueError: If the timestep is not in `timesteps`.
        """
        if isinstance(timestep, torch.Tensor):
            timestep = timestep.to(self.timesteps.device)
        indices = (self.timesteps == timestep).nonzero()
        if len(indices) == 0:
            raise ValueError(f"`timestep` must be one of the scheduler's `timesteps`, got {timestep}.")
        return indices[-1].item()

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        Mixes data with noise as the path does: `alpha(t) * sample + sigma(t) * noise`, `t = 1 - timestep /
        num_train_timesteps`.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`):
                Data.
            timestep (`float` or `torch.Tensor` of shape `()`, `(1,)` or `(batch_size,)`):
                Any time from 0 to `num_train_timesteps`; it need not be in `timesteps`.
            noise (`torch.Tensor`, shape of `sample`):
                Standard normal noise.

        Returns:
            `torch.Tensor`: Shape and dtype of `sample`.
        """
        sigma = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device) / self.config.num_train_timesteps
        sigma = sigma.reshape(-1, *[1] * (sample.ndim - 1))
        path = ProbabilityPath.at(self.config.path_type, 1 - sigma, sigma)
        return path.mix(sample, noise).to(sample.dtype)

    def add_step_noise(
        self,
        sample: torch.Tensor,
        timestep: float | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Adds the noise that the step starting at `timestep` puts in front of its first model evaluation. Needed once,
        before the first `step`, for a run whose sample was not scaled by `init_noise_sigma`: one that starts in the
        middle (after `scale_noise`) or with given noise. Only stochastic Heun has such noise, before every step but
        the last; otherwise the sample comes back unchanged.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`):
                The sample at `timestep`.
            timestep (`float` or 0-dimensional `torch.Tensor`):
                One of `timesteps`.
            generator (`torch.Generator` or a list of one per sample, *optional*):
                Where the noise is drawn from.
            variance_noise (`torch.Tensor`, shape of `sample`, *optional*):
                Standard normal noise to use instead of a draw.

        Returns:
            `torch.Tensor`: Shape and dtype of `sample`.

        Raises:
            ValueError: If `set_timesteps` was not called, the timestep is not in `timesteps`, or `variance_noise` or
                the list of generators has the wrong size.
        """
        self._check_timesteps_set("add_step_noise")
        _check_noise_arguments(sample, generator, variance_noise)
        noise_std = self._step_noise_std(self.index_for_timestep(timestep)) if self._noise_comes_first else 0.0
        return _add_noise(sample.float(), noise_std, generator, variance_noise).to(sample.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> GMemFlowMatchSchedulerOutput | tuple[torch.Tensor]:
        """
        Takes one model evaluation and returns the sample for the next. Computes in float32.

        Noise enters at every call with stochastic Euler. With stochastic Heun it enters at the calls with the second
        evaluation of a step, if a step other than the last follows. The last step, and an ODE, draw none.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, ...)`):
                The model's output (see `prediction_type`) at `sample` and `timestep`.
            timestep (`float` or 0-dimensional `torch.Tensor`):
                The entry of `timesteps` that the model was evaluated at. Only the first call of a run looks at it, to
                find where to begin; the following calls walk on from there. dopri5 can begin at any timestep:
                `timesteps` then starts anew with the one given.
            sample (`torch.Tensor`, shape of `model_output`):
                The sample that the model was evaluated at: what the last call returned. A change made to it counts at
                the first evaluation of a step only, with dopri5 of the run only: the other slopes are added to the
                sample that the step started from.
            generator (`torch.Generator` or a list of one per sample, *optional*):
                Where the noise is drawn from.
            variance_noise (`torch.Tensor`, shape of `sample`, *optional*):
                Standard normal noise to use instead of a draw, by the calls at which noise enters.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`GMemFlowMatchSchedulerOutput`] or a tuple.

        Returns:
            [`GMemFlowMatchSchedulerOutput`] or `tuple`: `prev_sample`, in the dtype of `model_output`; in a tuple, it
            is the only entry.

        Raises:
            ValueError: If `set_timesteps` was not called, the run is over or does not begin at the start of a step,
                the timestep is an integer or not in `timesteps`, or `variance_noise` or the list of generators has the
                wrong size.
            RuntimeError: If dopri5 cannot keep its tolerance, for example because the model's output is not finite.
        """
        self._check_timesteps_set("step")
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError(
                f"`timestep` must be one of the scheduler's `timesteps`, a floating point number, got {timestep!r}: an"
                " index, for example from `enumerate(timesteps)`, is not accepted."
            )
        _check_noise_arguments(sample, generator, variance_noise)

        if self._step_index is None:
            self._init_step_index(timestep)
        index = self._step_index
        if index >= len(self.timesteps):
            raise ValueError(
                f"`step` was called after the last of the {len(self.timesteps)} timesteps. Call `set_timesteps` to"
                " start another run."
            )

        dtype = model_output.dtype
        model_output, sample = model_output.float(), sample.float()
        sigma = self.sigmas[index].item()
        noise_std = 0.0
        if self._has_last_step and index == len(self.timesteps) - 1:
            prev_sample = self._take_last_step(model_output, sample, sigma)
        else:
            prev_sample = self._take_slope(self._drift(model_output, sample, sigma), sample)
            if not self._slopes:  # the step is complete
                noise_std = self._step_noise_std(index + 1 if self._noise_comes_first else index)

        prev_sample = _add_noise(prev_sample, noise_std, generator, variance_noise).to(dtype)
        self._step_index += 1

        if not return_dict:
            return (prev_sample,)
        return GMemFlowMatchSchedulerOutput(prev_sample=prev_sample)

    @property
    def _noise_comes_first(self) -> bool:
        return self.config.stochastic and self.config.solver == "heun"

    def _check_timesteps_set(self, method: str) -> None:
        if self.num_inference_steps is None:
            raise ValueError(f"`set_timesteps` must be called before `{method}`.")

    def _init_step_index(self, timestep: float | torch.Tensor) -> None:
        index, starts = self._begin_index, range(0, len(self.timesteps), self.order)
        if self.config.solver == "dopri5":
            starts = range(1)
            if index is None:
                self._restart_dopri5(float(timestep))
                index = 0
        elif index is None:
            index = self.index_for_timestep(timestep)
        if index not in starts:
            raise ValueError(
                f"A run must begin at the first evaluation of a step, as an index in `timesteps` one of {starts}, got"
                f" index {index}."
            )
        self._step_index = index

    def _step_noise_std(self, start: int) -> float:
        """Standard deviation of the noise of the step whose first evaluation has index `start`; 0 in the last step."""
        if not self.config.stochastic or start >= len(self.timesteps) - int(self._has_last_step):
            return 0.0
        sigma = self.sigmas[start].item()
        diffusion = diffusion_coefficient(
            self.config.diffusion_form, self.config.diffusion_norm, self._path(sigma), sigma
        )
        return math.sqrt(2 * diffusion * self._step_size_from(start))

    def _step_size_from(self, start: int) -> float:
        """Size of the step whose first evaluation has index `start`; not of dopri5."""
        return (self.sigmas[start] - self.sigmas[start + self.order]).item()

    def _path(self, sigma: float) -> ProbabilityPath:
        sigma = torch.tensor(sigma, dtype=torch.float64)
        return ProbabilityPath(*map(float, ProbabilityPath.at(self.config.path_type, 1 - sigma, sigma)))

    def _predicted_noise(
        self, model_output: torch.Tensor, sample: torch.Tensor, path: ProbabilityPath
    ) -> torch.Tensor:
        if self.config.prediction_type == "flow_prediction":
            return path.noise_from_velocity(-model_output, sample)
        if self.config.prediction_type == "epsilon":
            return model_output
        return -path.sigma * model_output

    def _predicted_velocity(
        self, model_output: torch.Tensor, sample: torch.Tensor, path: ProbabilityPath
    ) -> torch.Tensor:
        if self.config.prediction_type == "flow_prediction":
            return -model_output
        return path.velocity_from_noise(self._predicted_noise(model_output, sample, path), sample)

    def _drift(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float) -> torch.Tensor:
        """Drift per unit of t: v of the ODE, b of the SDE."""
        # At sigma 0, D / sigma(t) is a limit, which this gives to rounding. `__init__` refuses what has none.
        sigma = max(sigma, 1e-9)
        path = self._path(sigma)
        velocity = self._predicted_velocity(model_output, sample, path)
        if not self.config.stochastic:
            return velocity
        diffusion = diffusion_coefficient(self.config.diffusion_form, self.config.diffusion_norm, path, sigma)
        # D * score, without dividing by sigma(t) what is multiplied by it again
        return velocity - diffusion / path.sigma * self._predicted_noise(model_output, sample, path)

    def _take_last_step(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float) -> torch.Tensor:
        if self.config.last_step == "tweedie":
            path = self._path(sigma)
            return (sample - path.sigma * self._predicted_noise(model_output, sample, path)) / path.alpha
        if self.config.last_step == "mean":
            slope = self._drift(model_output, sample, sigma)
        else:
            slope = self._predicted_velocity(model_output, sample, self._path(sigma))
        return sample + (self.sigmas[-2] - self.sigmas[-1]).item() * slope

    def _take_slope(self, slope: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Adds a slope to the step under way and returns the sample that it leads to."""
        adaptive = self.config.solver == "dopri5"
        if not self._slopes:
            self._start_sample = sample
            if not adaptive:
                self._step_size = self._step_size_from(self._step_index)
        self._slopes.append(slope)

        nodes, weights = TABLEAUS[self.config.solver]
        row = weights[min(len(self._slopes), len(weights)) - 1]
        prev_sample = self._start_sample + self._step_size * _weighted_sum(row, self._slopes)
        if len(self._slopes) == len(nodes):
            if adaptive:
                return self._decide_on_dopri5_step(prev_sample)
            self._start_sample, self._slopes = None, []
        return prev_sample

    def _start_dopri5(
        self, sigma: float, final_sigma: float, step_size: float, device: str | torch.device | None
    ) -> None:
        self._set_schedule(torch.tensor([sigma], dtype=torch.float64), final_sigma, device)
        self._start_sigma = sigma
        self._append_dopri5_step(step_size)

    def _restart_dopri5(self, timestep: float) -> None:
        final_sigma = self.sigmas[-1].item()
        first, final = self.config.num_train_timesteps, self.config.num_train_timesteps * final_sigma
        if not final < timestep <= first:
            raise ValueError(
                f"`timestep` must be at most {first} and above {final}, where the run ends, got {timestep}."
            )
        self._start_dopri5(timestep / first, final_sigma, self._step_size, self.timesteps.device)

    def _append_dopri5_step(self, step_size: float) -> None:
        """Lists the evaluations of the step that is tried next: all of its slopes but the first, which is there."""
        end_sigma = max(self._start_sigma - step_size, self.sigmas[-1].item())
        self._step_size = self._start_sigma - end_sigma
        nodes = torch.tensor(TABLEAUS["dopri5"][0][1:], dtype=torch.float64)
        sigmas = (1 - nodes) * self._start_sigma + nodes * end_sigma
        self.timesteps = torch.cat([self.timesteps, (sigmas * self.config.num_train_timesteps).to(self.timesteps)])
        self.sigmas = torch.cat([self.sigmas[:-1], sigmas.float(), self.sigmas[-1:]])

    def _decide_on_dopri5_step(self, result: torch.Tensor) -> torch.Tensor:
        """Keeps the step that was tried or not, lists the next, and returns the sample of its next evaluation."""
        error = self._step_size * _weighted_sum(DOPRI5_ERROR_WEIGHTS, self._slopes)
        tolerance = self.config.atol + self.config.rtol * torch.maximum(self._start_sample.abs(), result.abs())
        error = (error / tolerance).square().reshape(len(error), -1).mean(dim=1).sqrt().max().item()

        if error <= 1:
            self._start_sample, self._start_sigma = result, self._start_sigma - self._step_size
            self._slopes = self._slopes[-1:]
            if self.sigmas[-2] == self.sigmas[-1]:  # the end is reached
                self._start_sample, self._slopes = None, []
                return result
        else:
            self._slopes = self._slopes[:1]

        # The estimate is of order 5 in the step size. One that is not finite says only that the step was too large.
        factor = 0.9 * max(error, 1e-10) ** -0.2 if error < math.inf else 0.0
        step_size = self._step_size * min(max(factor, 0.2), 10.0)
        if step_size < DOPRI5_SMALLEST_STEP or len(self.timesteps) > 6 * DOPRI5_MOST_TRIES:
            raise RuntimeError(
                f"The dopri5 solver gives up at sigma {self._start_sigma:.6f}, after {len(self.timesteps)}"
                f" evaluations: the estimated error of its last step, of size {self._step_size:.1e}, is {error:.1e} of"
                f" what `atol={self.config.atol}` and `rtol={self.config.rtol}` allow. Either the model's output is not"
                " finite or not smooth there, or the tolerance is finer than its rounding."
            )
        self._append_dopri5_step(step_size)
        return self._start_sample + self._step_size * _weighted_sum(TABLEAUS["dopri5"][1][0], self._slopes)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _check_noise_arguments(
    sample: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
    variance_noise: torch.Tensor | None,
) -> None:
    if variance_noise is not None and variance_noise.shape != sample.shape:
        raise ValueError(
            f"`variance_noise` must have the shape of the sample, {tuple(sample.shape)}, got"
            f" {tuple(variance_noise.shape)}."
        )
    if isinstance(generator, list) and len(generator) != len(sample):
        raise ValueError(f"`generator` must be one, or a list of {len(sample)}, got a list of {len(generator)}.")


def _add_noise(
    sample: torch.Tensor,
    std: float,
    generator: torch.Generator | list[torch.Generator] | None,
    variance_noise: torch.Tensor | None,
) -> torch.Tensor:
    if std == 0:
        return sample
    if variance_noise is None:
        variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)
    return sample + std * variance_noise.to(device=sample.device, dtype=torch.float32)


def _weighted_sum(weights: tuple[float, ...], slopes: list[torch.Tensor]) -> torch.Tensor:
    return sum(weight * slope for weight, slope in zip(weights, slopes, strict=False) if weight != 0)
