# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


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

    Conventions are diffusers': sigma runs from 1 (noise) to 0 (data), `x = (1 - sigma) * data + sigma * noise`,
    `timestep = num_train_timesteps * sigma`, and the model's output `u` predicts `noise - data`. (The papers count
    time as `t = 1 - sigma` and predict the velocity `v = data - noise = -u`.) Per unit of `t` the sampler follows

        ODE:  dx = -u dt
        SDE:  dx = b dt + sqrt(2 D) dw,   b = -u + D * score,   score = -((1 - sigma) * u + x) / sigma

    where `D` is the diffusion coefficient (`diffusion_form`). The marginals are the same for every `D`. The score
    comes from the same output as the velocity, hence one model evaluation per drift. With the grid
    `1 = s_0 > s_1 > ...` of the `N = num_inference_steps` steps, `timesteps` has one entry per model call:

    | `solver`      | one step, of size h                                      | calls    | at the sigmas             |
    |---------------|----------------------------------------------------------|----------|---------------------------|
    | SDE `"heun"`  | `y = x + sqrt(2Dh) w; x = y + h/2 (b(y) + b(y + hb(y)))` | `2N - 1` | `s_0, s_1, s_1, s_2, ...` |
    | SDE `"euler"` | `x = x + hb(x) + sqrt(2Dh) w`                            | `N`      | `s_0, s_1, s_2, ...`      |
    | ODE `"heun"`  | `x = x - h/2 (u(x) + u(x - hu(x)))`                      | `2N`     | `s_0, s_1, s_1, ..., 0`   |
    | ODE `"euler"` | `x = x - hu(x)`                                          | `N`      | `s_0, s_1, s_2, ...`      |

    In the noise, `D` is that at the start of the step. An SDE goes in `N - 1` equal steps (before `shift`) to
    `last_step_size`, and from there to 0 in a last step with one evaluation and no noise; an ODE goes to 0 in `N`
    equal steps.

    **The noise of stochastic Heun comes first**, and the model has to see it. So the `step` that completes one Heun
    step already adds the noise of the next, and the sample in the loop is always the one to evaluate the model at. The
    noise of the very first step is part of `init_noise_sigma`: at sigma 1 the sample is pure noise, and independent
    noise only widens it. To start elsewhere, or with given noise, call [`~GMemFlowMatchScheduler.add_step_noise`] on
    the sample instead.

    Example:

    ```py
    >>> scheduler = GMemFlowMatchScheduler()
    >>> scheduler.set_timesteps(50)
    >>> sample = torch.randn(4, 3, 16, 16, generator=generator) * scheduler.init_noise_sigma
    >>> for timestep in scheduler.timesteps:
    ...     model_output = -velocity(sample, 1 - timestep / 1000)
    ...     sample = scheduler.step(model_output, timestep, sample, generator=generator).prev_sample
    ```

    For other solvers, `UniPCMultistepScheduler.from_config(scheduler.config, use_flow_sigmas=True)`, the same with
    `DPMSolverMultistepScheduler`, and `from_config` of `FlowMatchEulerDiscreteScheduler` and
    `FlowMatchHeunDiscreteScheduler` work. The first two name the shift `flow_shift`: pass it to them.

    Args:
        num_train_timesteps (`int`, defaults to 1000):
            Timestep of pure noise.
        shift (`float`, defaults to 1.0):
            Every sigma of the grid becomes `shift * sigma / (1 + (shift - 1) * sigma)`; above 1 more steps are spent
            near the noise. Positive.
        prediction_type (`str`, defaults to `"flow_prediction"`):
            What the model predicts: `"flow_prediction"`, that is `noise - data`.
        stochastic (`bool`, defaults to `True`):
            Whether to solve the SDE (`True`) or the ODE (`False`; the diffusion and last-step arguments then have no
            effect).
        solver (`str`, defaults to `"heun"`):
            `"euler"` or `"heun"`, as in the table.
        diffusion_form (`str`, defaults to `"linear"`):
            The diffusion coefficient: `"linear"`, that is `D = diffusion_norm * sigma`.
        diffusion_norm (`float`, defaults to 1.0):
            Scale of the diffusion coefficient, not negative.
        last_step (`str`, defaults to `"mean"`):
            The last step of the SDE: `"mean"`, that is a step along `b` without noise.
        last_step_size (`float`, defaults to 0.004):
            Size of the last step of the SDE in units of sigma, before `shift`; between 0 and 1, both excluded.

    Raises:
        ValueError: If an argument is outside what is accepted.
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
        last_step: str = "mean",
        last_step_size: float = 0.004,
    ):
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` must be at least 1, got {num_train_timesteps!r}.")
        if not 0 < shift < math.inf:
            raise ValueError(f"`shift` must be a positive finite number, got {shift!r}.")
        if not 0 <= diffusion_norm < math.inf:
            raise ValueError(f"`diffusion_norm` must be a finite number, 0 or above, got {diffusion_norm!r}.")
        if not 0 < last_step_size < 1:
            raise ValueError(f"`last_step_size` must lie between 0 and 1, both excluded, got {last_step_size!r}.")
        for name, value, accepted in (
            ("prediction_type", prediction_type, ("flow_prediction",)),
            ("stochastic", stochastic, (True, False)),
            ("solver", solver, ("euler", "heun")),
            ("diffusion_form", diffusion_form, ("linear",)),
            ("last_step", last_step, ("mean",)),
        ):
            if value not in accepted:
                raise ValueError(f"`{name}` must be one of {accepted}, got {value!r}.")

        # diffusers does not pass arguments that were left at their defaults on to another class's `from_config`. What
        # the model predicts has to reach it, or UniPC and DPM++ would take the output for `epsilon`.
        self.register_to_config(_use_default_values=[])

        self.num_inference_steps = None
        self._set_schedule(torch.linspace(1, 1 / num_train_timesteps, num_train_timesteps, dtype=torch.float64))

    @property
    def order(self) -> int:
        """Evaluations per step: 2 for Heun (also where its last step takes one only, as in diffusers), 1 for Euler."""
        return 2 if self.config.solver == "heun" else 1

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
                The first evaluation of a step: with Heun, an even number.
        """
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Sets `timesteps` (one entry per model evaluation) and `sigmas` (the same over `num_train_timesteps`, and a
        final 0), and starts a new run.

        Args:
            num_inference_steps (`int`):
                Number of steps `N`, the last step of the SDE included: 1 or more for the ODE, 2 or more for the SDE.
            device (`str` or `torch.device`, *optional*):
                Device of `timesteps`. `sigmas` stays on the CPU, so that `step` never waits for the device.

        Raises:
            ValueError: If there are too few steps.
        """
        fewest = 2 if self.config.stochastic else 1
        if num_inference_steps < fewest:
            reason = " with `stochastic=True`, the last step included" if self.config.stochastic else ""
            raise ValueError(f"`num_inference_steps` must be at least {fewest}{reason}, got {num_inference_steps!r}.")

        if self.config.stochastic:
            sigmas = torch.linspace(1, self.config.last_step_size, num_inference_steps, dtype=torch.float64)
        else:
            sigmas = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)

        if self.config.solver == "heun":
            sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
            if self.config.stochastic:  # end of the last Heun step, then the last step
                sigmas = torch.cat([sigmas, sigmas[-1:]])
        elif not self.config.stochastic:  # Euler does not evaluate at the end
            sigmas = sigmas[:-1]

        self.num_inference_steps = num_inference_steps
        self._set_schedule(sigmas, device)

    def _set_schedule(self, sigmas: torch.Tensor, device: str | torch.device | None = None) -> None:
        """Takes the unshifted sigma of every evaluation and forgets everything about an earlier run."""
        sigmas = self.config.shift * sigmas / (1 + (self.config.shift - 1) * sigmas)
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(device=device, dtype=torch.float32)
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).float()

        self._step_index = None
        self._begin_index = None
        # Sample and drift at the start of the Heun step under way
        self._heun_start = None

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """
        Index in `timesteps` of the step that starts at a timestep. Where Heun has the timestep twice, as the end of
        one step and the start of the next, it is the second.

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
        Mixes data with noise: `(1 - sigma) * sample + sigma * noise`, `sigma = timestep / num_train_timesteps`.

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
        return (sigma * noise + (1 - sigma) * sample).to(sample.dtype)

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

        Noise enters at every call but the last with stochastic Euler. With stochastic Heun it enters at the calls with
        the second evaluation of a step, except before the last step. Other calls draw none.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, ...)`):
                The model's output `noise - data` at `sample` and `timestep`.
            timestep (`float` or 0-dimensional `torch.Tensor`):
                The entry of `timesteps` that the model was evaluated at. Only the first call of a run looks at it, to
                find where to begin; the following calls walk on from there.
            sample (`torch.Tensor`, shape of `model_output`):
                The sample that the model was evaluated at.
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

        sample = sample.float()
        drift = self._drift(model_output.float(), sample, self.sigmas[index].item())

        start = index - index % self.order
        dt = self._step_size(start)
        if index > start:
            start_sample, start_drift = self._heun_start
            self._heun_start = None
            prev_sample = start_sample + dt / 2 * (start_drift + drift)
            noise_std = self._step_noise_std(index + 1)
        elif self.order == 2 and index + 1 < len(self.timesteps):
            self._heun_start = (sample, drift)
            prev_sample = sample + dt * drift
            noise_std = 0.0
        else:  # a step of one evaluation: Euler, and the last step of the SDE, which has no noise
            prev_sample = sample + dt * drift
            noise_std = self._step_noise_std(index)

        prev_sample = _add_noise(prev_sample, noise_std, generator, variance_noise).to(model_output.dtype)
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
        index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if index not in range(0, len(self.timesteps), self.order):
            raise ValueError(
                "A run must begin at the first evaluation of a step, as an index in `timesteps` one of"
                f" range(0, {len(self.timesteps)}, {self.order}), got index {index}."
            )
        self._step_index = index

    def _step_size(self, start: int) -> float:
        """Size of the step whose first evaluation has index `start`."""
        return (self.sigmas[start] - self.sigmas[start + 1]).item()

    def _step_noise_std(self, start: int) -> float:
        """Standard deviation of the noise of the step whose first evaluation has index `start`; 0 for the last."""
        if not self.config.stochastic or start >= len(self.timesteps) - 1:
            return 0.0
        diffusion = self.config.diffusion_norm * self.sigmas[start].item()
        return math.sqrt(2 * diffusion * self._step_size(start))

    def _drift(self, model_output: torch.Tensor, sample: torch.Tensor, sigma: float) -> torch.Tensor:
        """Drift per unit of t = 1 - sigma."""
        if not self.config.stochastic:
            return -model_output
        # The sigma in the linear diffusion coefficient cancels the one that the score is divided by
        diffusion_times_score = -self.config.diffusion_norm * ((1 - sigma) * model_output + sample)
        return -model_output + diffusion_times_score

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
