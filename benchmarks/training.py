# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0
r"""
How fast a training step is, beside a plain eager one that does what the public implementation's loop does.

    python benchmarks/training.py                                        # a CPU: the quickstart's network and batch
    python benchmarks/training.py --model_config examples/configs/lightningdit_b2.json --sample_size 16 --in_channels 32 \
        --memory_dim 768 --alignment --batch_size 256 --mixed_precision bf16 --device cuda            # a GPU

Both train the same network from the same weights on the same batches, with the same noise, times and dropout masks:

- plain: the modules run one by one; AdamW and the moving average of the weights go through the parameters in a Python loop;
  the alignment term goes through the images in one; the loss is read at every step, which waits for the device;
- ours: what `examples/train_gmem.py --torch_compile` does: compiled blocks, `flow_matching_loss`, fused AdamW, and a moving
  average in one call.

In between, for what is due to what: ours without compilation; and plain with compiled blocks, as the public implementation
decorates its own. The first steps, which also compile, are compared: the exit status is 1 if the losses of any two differ by
more than rounding. Then the ways take turns, a few steps at a time, so that a busy moment of the machine meets all. Printed
are medians over the rounds, and of the ratio to plain in each round, with quartiles. The peak memory is that of a process
that runs this way alone, after its first steps: resident memory on a CPU (Linux), with Python's own; allocated memory on a GPU.
On a GPU whose peak rate in bfloat16 is known, the model FLOPs utilisation (MFU) is printed, too. Reading data is not part of
it (see `benchmarks/data.py`).
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers_gmem import GMemTransformer2DModel
from diffusers_gmem.training import GMemEMAModel, flow_matching_loss, model_flops_per_image, peak_flops


# Largest relative difference of the losses of the first steps: the orders of summation differ
TOLERANCES = {"no": 1e-4, "bf16": 2e-2}
LEARNING_RATE, BETAS, MAX_GRAD_NORM, EMA_DECAY, ALIGNMENT_WEIGHT = 2e-4, (0.9, 0.95), 1.0, 0.9999, 0.5


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_config",
        default=str(root / "examples/configs/quickstart.json"),
        help="JSON file with arguments of GMemTransformer2DModel (default: the quickstart's).",
    )
    model.add_argument("--sample_size", type=int, default=24, help="Side of latents or pixels (default 24).")
    model.add_argument("--in_channels", type=int, default=3, help="Their channels (default 3).")
    model.add_argument("--memory_dim", type=int, default=256, help="Dimension of a snippet (default 256).")
    model.add_argument(
        "--alignment",
        action="store_true",
        help="With the alignment term, of 768-dimensional features (default: without).",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--batch_size", type=int, default=32, help="Images in a step (default 32).")
    run.add_argument("--mixed_precision", choices=TOLERANCES, default="no", help="Autocast (default no).")
    run.add_argument("--device", default="cpu", help="cpu (default) or cuda.")
    run.add_argument("--num_first_steps", type=int, default=5, help="Steps that are compared (default 5).")
    run.add_argument("--steps_per_round", type=int, default=5, help="Steps of a way in a round (default 5).")
    run.add_argument("--rounds", type=int, default=12, help="Rounds (default 12).")
    run.add_argument("--seed", type=int, default=0, help="Seed of weights and batches (default 0).")
    run.add_argument("--only", choices=WAYS, help="Print only the peak memory of one way, in bytes.")
    return parser.parse_args(arguments)


def make_transformer(args: argparse.Namespace) -> GMemTransformer2DModel:
    torch.manual_seed(args.seed)
    config = json.loads(Path(args.model_config).read_text()) | {
        "sample_size": args.sample_size,
        "in_channels": args.in_channels,
        "memory_dim": args.memory_dim,
    }
    if not args.alignment:
        config["alignment_layer"] = None
    return GMemTransformer2DModel(**config).to(args.device).train()


def make_batches(args: argparse.Namespace, transformer: GMemTransformer2DModel) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch_size, args.in_channels, args.sample_size, args.sample_size)
    num_tokens = (args.sample_size // transformer.config.patch_size) ** 2
    batches = []
    for _ in range(args.num_first_steps):
        batch = {
            "latents": torch.randn(shape, generator=generator),
            "memory": torch.randn(args.batch_size, args.memory_dim, generator=generator),
            "noise": torch.randn(shape, generator=generator),
            "timestep": torch.rand(args.batch_size, generator=generator),
            "memory_dropout_mask": torch.rand(args.batch_size, args.memory_dim, generator=generator)
            >= transformer.config.memory_dropout,
        }
        if args.alignment:
            batch["alignment_features"] = torch.randn(args.batch_size, num_tokens, 768, generator=generator)
        batches.append({name: tensor.to(args.device) for name, tensor in batch.items()})
    return batches


class PlainStep:
    """What the public implementation does in a step."""

    def __init__(self, transformer: GMemTransformer2DModel, args: argparse.Namespace, compiled: bool = False):
        self.transformer = transformer
        self.forward = autocast(transformer, args)
        self.optimizer = torch.optim.AdamW(
            transformer.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0, foreach=False
        )
        self.average = copy.deepcopy(transformer).requires_grad_(False)
        if compiled:
            transformer.compile_repeated_blocks()
        self.running_loss = 0.0

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        latents, noise, features = batch["latents"], batch["noise"], batch.get("alignment_features")
        time = batch["timestep"].view(-1, 1, 1, 1)
        target = latents - noise
        velocity, *projected = self.forward(
            hidden_states=time * latents + (1 - time) * noise,
            timestep=batch["timestep"],
            memory=F.normalize(batch["memory"], dim=1),
            memory_dropout_mask=batch["memory_dropout_mask"],
            return_alignment=features is not None,
            return_dict=False,
        )
        velocity = velocity.float()
        squares = ((velocity - target) ** 2).mean(dim=(1, 2, 3)).mean()
        loss = squares + (1 - F.cosine_similarity(velocity, target, dim=1)).mean(dim=(1, 2)).mean()
        if features is not None:
            alignment = 0.0
            for expected, found in zip(features, projected[0].float(), strict=True):
                cosine = (F.normalize(expected, dim=-1) * F.normalize(found, dim=-1)).sum(dim=-1)
                alignment = alignment - cosine.mean()
            loss = loss + ALIGNMENT_WEIGHT * alignment / len(features)

        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self._update_average()
        self.running_loss += squares.item()
        return loss.detach()

    @torch.no_grad()
    def _update_average(self) -> None:
        averages = OrderedDict(self.average.named_parameters())
        for name, parameter in OrderedDict(self.transformer.named_parameters()).items():
            averages[name].mul_(EMA_DECAY).add_(parameter.data, alpha=1 - EMA_DECAY)


class OurStep:
    """What `examples/train_gmem.py` does in a step."""

    def __init__(self, transformer: GMemTransformer2DModel, args: argparse.Namespace, compiled: bool = True):
        self.transformer = transformer
        self.forward = autocast(transformer, args)
        self.optimizer = torch.optim.AdamW(
            transformer.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0, fused=True
        )
        self.ema = GMemEMAModel(
            transformer.parameters(), decay=EMA_DECAY, min_decay=EMA_DECAY, update_after_step=-1, foreach=True
        )
        if compiled:
            transformer.compile_repeated_blocks()

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        terms = flow_matching_loss(self.forward, alignment_weight=ALIGNMENT_WEIGHT, **batch)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.transformer.parameters())
        return terms["loss"].detach()


# In the order in which they are printed: the first is what the others are compared with
WAYS: dict[str, Callable] = {
    "plain": PlainStep,
    "plain, compiled blocks": lambda transformer, args: PlainStep(transformer, args, compiled=True),
    "ours, not compiled": lambda transformer, args: OurStep(transformer, args, compiled=False),
    "ours": OurStep,
}


def autocast(transformer: GMemTransformer2DModel, args: argparse.Namespace) -> Callable:
    """The forward pass in the precision asked for; the weights stay float32."""
    if args.mixed_precision == "no":
        return transformer
    return torch.autocast(args.device, dtype=torch.bfloat16)(transformer.forward)


def synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def print_peak_memory(args: argparse.Namespace) -> None:
    transformer = make_transformer(args)
    batches = make_batches(args, transformer)
    step = WAYS[args.only](transformer, args)
    for _ in range(2):
        step(batches[0])
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the first steps, that of compiling
    for batch in batches:
        step(batch)
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(int(status["VmHWM"].split()[0]) * 1024)


def peak_memory(way: str, arguments: list[str]) -> int:
    """In a process of its own."""
    command = [sys.executable, __file__, *arguments, "--only", way]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return median, lower, upper


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_args(arguments)
    if args.only is not None:
        print_peak_memory(args)
        return 0

    transformer = make_transformer(args)
    batches = make_batches(args, transformer)
    steps = {way: make(copy.deepcopy(transformer), args) for way, make in WAYS.items()}
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{parameters / 1e6:.1f} million parameters, batches of {args.batch_size}, mixed precision {args.mixed_precision}, "
        f"{device}\n{platform.platform()}, {platform.machine()}, torch {torch.__version__}"
    )

    losses = {way: torch.stack([step(batch) for batch in batches]).cpu() for way, step in steps.items()}
    difference = max(((other - losses["plain"]) / losses["plain"]).abs().max().item() for other in losses.values())
    tolerance = TOLERANCES[args.mixed_precision]
    verdict = "agree" if difference <= tolerance else f"DISAGREE (more than {tolerance})"
    print(
        f"losses of the first {len(batches)} steps {verdict}, largest relative difference {difference:.1e}: "
        + " ".join(f"{loss:.4f}" for loss in losses["ours"].tolist())
    )

    seconds = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, step in steps.items():
            synchronize(args)
            start = time.perf_counter()
            for k in range(args.steps_per_round):
                step(batches[k % len(batches)])
            synchronize(args)
            seconds[way].append(time.perf_counter() - start)
    del steps

    print(f"\n{args.rounds} rounds of {args.steps_per_round} steps each, in turn\n")
    # The share of the device's peak rate that the matrix products of the model take up
    peak = peak_flops(args.device)
    flops = model_flops_per_image(transformer.config, args.alignment)
    print(f"{'':24}{'images/s':>10}{'ratio':>8}{'(quartiles)':>18}{'MFU':>8}{'peak memory':>14}")
    for way, times in seconds.items():
        ratio, lower, upper = spread([plain / own for plain, own in zip(seconds["plain"], times, strict=True)])
        rate = args.batch_size * args.steps_per_round / statistics.median(times)
        mfu = "-" if peak is None else f"{rate * flops / peak:.1%}"
        memory = f"{peak_memory(way, arguments) / 1e6:.0f} MB"
        print(f"{way:24}{rate:10.1f}{ratio:8.3f}{f'({lower:.3f} to {upper:.3f})':>18}{mfu:>8}{memory:>14}")
    return int(difference > tolerance)


if __name__ == "__main__":
    raise SystemExit(main())
