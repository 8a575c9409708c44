# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0
r"""
What the paper's sampler costs (stochastic Heun, 50 steps), beside the way the public implementation evaluates it.

    python benchmarks/sampling.py                                        # a CPU; one block as wide as S/1's
    python benchmarks/sampling.py --num_layers 28 --num_attention_heads 16 --attention_head_dim 72 \
        --batch_size 32 --device cuda --dtype bfloat16                   # XL/1 on a GPU

The public implementation evaluates the model twice with the same input at each drift, once for the velocity and once
for the score. With guidance it evaluates every image with both memories at every time, also outside the interval of
guidance, and carries two copies of every image through the sampler. Both ways are run in turn in this process with the
same weights (drawn, not trained: the cost is the same), memory and noise. The medians of the seconds are printed. The
exit status is 1 if the images of the two ways disagree.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusers_gmem import GMemFlowMatchScheduler, GMemPipeline, GMemTransformer2DModel


# Largest difference over the largest value: other batch sizes and orders of summation round differently
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model (LightningDiT)")
    model.add_argument("--num_layers", type=int, default=1, help="Transformer blocks (default 1).")
    model.add_argument("--num_attention_heads", type=int, default=6, help="Attention heads (default 6).")
    model.add_argument("--attention_head_dim", type=int, default=64, help="Channels of a head (default 64).")
    model.add_argument("--sample_size", type=int, default=16, help="Side of the latents (default 16).")
    model.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    model.add_argument("--dtype", choices=TOLERANCES, default="float32", help="Of the model (default float32).")
    run = parser.add_argument_group("run")
    run.add_argument("--batch_size", type=int, default=2, help="Images in a batch (default 2).")
    run.add_argument("--num_steps", type=int, default=50, help="Steps, the last one included (default 50).")
    run.add_argument("--guidance_scale", type=float, default=7.75, help="In the guided setting (default 7.75).")
    run.add_argument(
        "--guidance_start", type=float, default=0.89, help="Time at which guidance begins (default 0.89)."
    )
    run.add_argument("--repeats", type=int, default=3, help="Timed runs of each way (default 3).")
    run.add_argument("--seed", type=int, default=0, help="Seed of weights, memory and noise (default 0).")
    return parser.parse_args(arguments)


# The public implementation's pattern of evaluations. Time t runs from noise (0) to data (1).

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def conditional_velocity(transformer: GMemTransformer2DModel, memory: torch.Tensor) -> Velocity:
    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return transformer(x.to(transformer.dtype), t, memory).sample.float()

    return velocity


def guided_velocity(
    transformer: GMemTransformer2DModel, memory: torch.Tensor, guidance_scale: float, guidance_start: float
) -> Velocity:
    """Of a doubled batch, whose second half is replaced by the first."""
    evaluate = conditional_velocity(transformer, torch.cat([memory, torch.zeros_like(memory)]))

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        half = x[: len(x) // 2]
        conditional, unconditional = evaluate(torch.cat([half, half]), t).chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        if t[0] < guidance_start:
            guided = conditional
        return torch.cat([guided, guided])

    return velocity


def reference_sample(
    velocity: Velocity, x: torch.Tensor, noise: torch.Tensor, num_steps: int, last_step_size: float
) -> torch.Tensor:
    """Stochastic Heun with the diffusion coefficient 1 - t, and a last step along the drift."""

    def drift(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        column = t.view(-1, 1, 1, 1)
        score = (column * velocity(x, t) - x) / (1 - column)
        return velocity(x, t) + (1 - column) * score

    times = torch.linspace(0, 1 - last_step_size, num_steps, device=x.device)
    dt = times[1] - times[0]
    for time_now, draw in zip(times[:-1], noise, strict=True):
        t = time_now.expand(len(x))
        x = x + torch.sqrt(2 * (1 - time_now) * dt) * draw
        slope = drift(x, t)
        x = x + dt / 2 * (slope + drift(x + dt * slope, t + dt))
    return x + last_step_size * drift(x, times[-1].expand(len(x)))


# Ours


class GivenNoise(GMemFlowMatchScheduler):
    """Adds the noise of `draws`, one draw for each Heun step, instead of drawing."""

    draws: torch.Tensor

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        # The second evaluation of a step adds the noise of the next; before the last step there is none
        next_step = ((self.step_index or 0) + 1) // 2
        draw = self.draws[next_step] if next_step < len(self.draws) else None
        return super().step(model_output, timestep, sample, variance_noise=draw, return_dict=return_dict)


def make_pipeline(transformer: GMemTransformer2DModel, draws: torch.Tensor) -> GMemPipeline:
    scheduler = GivenNoise()
    scheduler.draws = draws
    pipe = GMemPipeline(transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass
class Comparison:
    """Each pair is of the public implementation's way and ours."""

    evaluations: tuple[int, int]
    images_evaluated: tuple[int, int]
    seconds: tuple[float, float]
    relative_difference: float


def compare(args: argparse.Namespace, guided: bool) -> Comparison:
    torch.manual_seed(args.seed)
    transformer = GMemTransformer2DModel(
        sample_size=args.sample_size,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        alignment_layer=None,
    )
    transformer = transformer.to(args.device).eval()
    if args.dtype != "float32":
        transformer.to(getattr(torch, args.dtype))
    shape = (args.batch_size, transformer.config.in_channels, args.sample_size, args.sample_size)
    memory = torch.randn(args.batch_size, transformer.config.memory_dim).to(args.device)
    latents = torch.randn(shape).to(args.device)
    draws = torch.randn(args.num_steps - 1, *shape).to(args.device)
    pipe = make_pipeline(transformer, draws)
    last_step_size = pipe.scheduler.config.last_step_size

    # The pipeline makes the noise of the first step part of the latents' scale; here it is given
    pipe.scheduler.set_timesteps(args.num_steps)
    noised = pipe.scheduler.add_step_noise(latents, pipe.scheduler.timesteps[0], variance_noise=draws[0])
    our_arguments = {
        "memory": memory,
        "latents": noised / pipe.scheduler.init_noise_sigma,
        "num_inference_steps": args.num_steps,
        "output_type": "latent",
    }
    if guided:
        our_arguments |= {"guidance_scale": args.guidance_scale, "guidance_interval": (args.guidance_start, 1.0)}
        velocity = guided_velocity(transformer, memory, args.guidance_scale, args.guidance_start)
        # The second copy has noise of its own there, and no influence on the first
        copies, their_draws = torch.cat([latents, latents]), torch.cat([draws, draws.flip(0)], dim=1)
    else:
        velocity = conditional_velocity(transformer, memory)
        copies, their_draws = latents, draws

    @torch.no_grad()
    def run_reference() -> torch.Tensor:
        return reference_sample(velocity, copies, their_draws, args.num_steps, last_step_size)[: args.batch_size]

    def run_ours() -> torch.Tensor:
        return pipe(**our_arguments).images

    batch_sizes = []
    transformer.register_forward_hook(lambda module, inputs, output: batch_sizes.append(len(output[0])))
    with torch.no_grad():
        velocity(copies, torch.zeros(len(copies), device=args.device))  # warms up
    samples, counts, seconds = [None, None], [None, None], [[], []]
    for _ in range(args.repeats):
        for way, run in enumerate((run_reference, run_ours)):  # in turn, so that a busy moment meets both
            batch_sizes.clear()
            start = time.perf_counter()
            samples[way] = run().cpu()
            seconds[way].append(time.perf_counter() - start)
            counts[way] = len(batch_sizes), sum(batch_sizes)

    expected, actual = samples
    evaluations, images_evaluated = zip(*counts, strict=True)
    return Comparison(
        evaluations=evaluations,
        images_evaluated=images_evaluated,
        seconds=tuple(map(statistics.median, seconds)),
        relative_difference=((actual - expected).abs().max() / expected.abs().max()).item(),
    )


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    width = args.num_attention_heads * args.attention_head_dim
    print(
        f"{args.num_layers} blocks of width {width}, {args.sample_size**2} tokens, {args.dtype} on {args.device}; "
        f"{args.batch_size} images, {args.num_steps} steps, median of {args.repeats} runs"
    )
    print(f"{platform.platform()}, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")

    disagree = False
    for guided in (False, True):
        result = compare(args, guided)
        setting = f"scale {args.guidance_scale}, from t = {args.guidance_start}" if guided else "no guidance"
        print(f"\n{f'stochastic Heun, {setting}':44}{'reference':>12}{'ours':>12}{'ratio':>9}")
        for name in ("evaluations", "images_evaluated", "seconds"):
            reference, ours = getattr(result, name)
            digits = 3 if name == "seconds" else 0
            title = name.replace("_", " ")
            print(f"  {title:42}{reference:12.{digits}f}{ours:12.{digits}f}{reference / ours:9.3f}")
        agrees = result.relative_difference <= TOLERANCES[args.dtype]
        verdict = "agree" if agrees else f"DISAGREE (more than {TOLERANCES[args.dtype]})"
        print(f"  images {verdict}: largest difference / largest value = {result.relative_difference:.1e}")
        disagree |= not agrees
    return int(disagree)


if __name__ == "__main__":
    raise SystemExit(main())
