# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Does memory help? Trains one small network on the same real images with and without memory, and draws the Fréchet distance
(FD) of what it generates against the steps and against the seconds of training.

    python examples/quickstart/prepare_data.py --num_held_out 128 --output_dir convergence/data
    python benchmarks/convergence.py --data_dir convergence/data --output_dir convergence       # about 20 min on two cores

Both runs have the same network, initial weights, order of the images, noise, times and learning rate. One gets each image's
own snippet, the other the null memory always. They take turns from one evaluation to the next, so that a busy moment of the
machine meets both. `--num_images` images are generated each time from the moving average of the weights, with the same
noise everywhere:

- no memory: from the null memory, by the network that never saw another;
- training memories: from snippets drawn from the bank of the training images;
- held-out memories: by the same network, from snippets of images that neither training nor bank has seen.

The distance is that to the training images, at the resolution of the training, in two spaces, both reduced to the leading
principal components of the training images:

- encoder: features of the network that also makes the snippets;
- pixels: the pixel values. No network is involved, so nothing is shared with the memory's encoder.

The real held-out images have a distance to the training images, too, as they are others and few: the dotted lines. The
seconds are those of the training steps and, with memory, of making the bank. Written into `output_dir`: `convergence.csv`,
`convergence.png` and `samples.png`. Printed: at how many steps each curve first reaches the last distance of the run
without memory, between evaluations by log-linear interpolation, and the ratio of the steps.
"""

import argparse
import csv
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import torch
from tqdm.auto import tqdm

from diffusers_gmem import (
    GMemFlowMatchScheduler,
    GMemImageEncoder,
    GMemMemoryBank,
    GMemPipeline,
    GMemTransformer2DModel,
)
from diffusers_gmem.data import ImageSource, center_crop, compute_snippets, image_to_tensor, load_image_encoder
from diffusers_gmem.evaluation import FeatureStatistics, frechet_distance
from diffusers_gmem.training import GMemEMAModel, GMemTrainingDataset, TrainingBatchSampler, flow_matching_loss


CURVES = ("no memory", "training memories", "held-out memories")
SPACES = ("encoder", "pixels")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", required=True, help="Folder with the folders train and held_out of images.")
    data.add_argument("--cache_dir", help="Where `datasets` keeps its files.")
    data.add_argument("--resolution", type=int, default=24, help="Side of the images in pixels (default 24).")
    data.add_argument(
        "--image_encoder", default="efficientnet-lite0", help="Makes the snippets (default efficientnet-lite0)."
    )
    data.add_argument(
        "--snippet_layers", type=int, nargs="*", default=[11], help="Its hidden states in the snippet (default 11)."
    )
    data.add_argument("--snippet_dim", type=int, default=256, help="Dimension of a snippet (default 256).")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--model_config",
        default=root / "examples/configs/quickstart.json",
        help="JSON file with arguments of GMemTransformer2DModel (default: the quickstart's).",
    )
    training.add_argument("--batch_size", type=int, default=32, help="Images in a step (default 32).")
    training.add_argument("--learning_rate", type=float, default=3e-3, help="After the warm-up (default 3e-3).")
    training.add_argument("--warmup_steps", type=int, default=100, help="Steps of linear warm-up (default 100).")
    training.add_argument(
        "--ema_decay", type=float, default=0.99, help="Of the moving average of the weights (default 0.99)."
    )
    training.add_argument("--seed", type=int, default=0, help="Seed of everything (default 0).")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument(
        "--evaluation_steps",
        type=int,
        nargs="+",
        default=[100, 200, 400, 700, 1000, 1500],
        help="After how many steps to evaluate; the training ends with the last (default 100 200 400 700 1000 1500).",
    )
    evaluation.add_argument("--num_images", type=int, default=1024, help="Images of each evaluation (default 1024).")
    evaluation.add_argument(
        "--num_inference_steps", type=int, default=10, help="Steps of Heun's ODE solver (default 10)."
    )
    evaluation.add_argument(
        "--feature_size", type=int, default=112, help="Side at which the encoder sees them, in pixels (default 112)."
    )
    evaluation.add_argument(
        "--feature_dim", type=int, default=64, help="Principal components that are compared (default 64)."
    )
    parser.add_argument("--output_dir", default="convergence", help="Where the results go (default convergence).")
    args = parser.parse_args(arguments)
    if args.evaluation_steps != sorted(set(args.evaluation_steps)) or args.evaluation_steps[0] < 1:
        parser.error(f"--evaluation_steps must ascend from at least 1, got {args.evaluation_steps}.")
    return args


class FeatureSpace:
    """Statistics of features of images, on the principal components of those of the training images."""

    def __init__(
        self, features: Callable[[list[PIL.Image.Image]], torch.Tensor], real_images: list[PIL.Image.Image], dim: int
    ):
        self.features = features
        real_features = features(real_images).double()
        self.mean = real_features.mean(dim=0)
        self.axes = torch.linalg.svd(real_features - self.mean, full_matrices=False).Vh[:dim].T
        self.real = self.statistics(real_images)

    def statistics(self, images: list[PIL.Image.Image]) -> FeatureStatistics:
        statistics = FeatureStatistics(self.axes.shape[1])
        statistics.update((self.features(images).double() - self.mean) @ self.axes)
        return statistics

    def distance(self, images: list[PIL.Image.Image]) -> float:
        """To the training images."""
        return frechet_distance(self.statistics(images), self.real)


def pixel_features(images: list[PIL.Image.Image]) -> torch.Tensor:
    return torch.stack([image_to_tensor(image).flatten() for image in images])


class EncoderFeatures:
    def __init__(self, encoder: torch.nn.Module, processor, image_size: int):
        self.encoder = encoder
        self.processor = processor
        self.size = {
            "size": {"shortest_edge": image_size},
            "crop_size": {"height": image_size, "width": image_size},
        }

    @torch.no_grad()
    def __call__(self, images: list[PIL.Image.Image]) -> torch.Tensor:
        features = []
        for start in range(0, len(images), 32):
            batch = images[start : start + 32]
            pixel_values = self.processor(images=batch, return_tensors="pt", **self.size).pixel_values
            pixel_values = pixel_values.to(self.encoder.device, memory_format=torch.channels_last)
            features.append(self.encoder(pixel_values).pooler_output.flatten(1).cpu())
        return torch.cat(features)


class Run:
    """A training that can go on for some steps at a time."""

    def __init__(
        self, args: argparse.Namespace, transformer: GMemTransformer2DModel, dataset: GMemTrainingDataset, device: str
    ):
        self.args = args
        self.transformer = transformer.to(device).train()
        self.dataset = dataset
        self.step = 0
        self.seconds = 0.0
        self.optimizer = torch.optim.AdamW(
            transformer.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / args.warmup_steps)
        )
        self.ema = GMemEMAModel(transformer.parameters(), decay=args.ema_decay, foreach=True)

    def train_until(self, step: int, progress_bar: tqdm) -> None:
        args, device = self.args, self.transformer.device
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=TrainingBatchSampler(len(self.dataset), args.batch_size, args.seed, self.step, step),
        )
        start = time.perf_counter()
        for batch in loader:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            loss = flow_matching_loss(
                self.transformer,
                batch["pixel_values"],
                batch["memory"],
                batch["noise"],
                batch["timestep"],
                memory_dropout_mask=batch["memory_dropout_mask"],
            )["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.ema.step(self.transformer.parameters())
            progress_bar.update()
        if math.isnan(loss.item()):
            raise RuntimeError(f"The loss is NaN before step {step}: lower --learning_rate.")
        self.seconds += time.perf_counter() - start
        self.step = step

    def generate(self, memory: torch.Tensor, desc: str) -> list[PIL.Image.Image]:
        """One image from each snippet, by the moving average of the weights, with noise that depends on its number."""
        pipeline = GMemPipeline(self.transformer, GMemFlowMatchScheduler(stochastic=False))
        pipeline.set_progress_bar_config(disable=True)
        self.ema.store(self.transformer.parameters())
        self.ema.copy_to(self.transformer.parameters())
        images = []
        for start in tqdm(range(0, len(memory), 64), desc=desc, leave=False):
            rows = memory[start : start + 64]
            images += pipeline(
                memory=rows,
                generator=[torch.Generator().manual_seed(self.args.seed + start + k) for k in range(len(rows))],
                num_inference_steps=self.args.num_inference_steps,
            ).images
        self.ema.restore(self.transformer.parameters())
        self.transformer.train()
        return images


def steps_until(steps: list[int], distances: list[float], target: float) -> float | None:
    """After how many steps a curve first is at or below a distance; `None` if it never is."""
    for k, distance in enumerate(distances):
        if distance <= target:
            if k == 0:
                return float(steps[0])
            before, after = math.log(distances[k - 1]), math.log(distance)
            fraction = (before - math.log(target)) / (before - after)
            return steps[k - 1] + fraction * (steps[k] - steps[k - 1])
    return None


def draw(rows: list[dict], floors: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharey="row", layout="constrained")
    for line, space in zip(axes, SPACES, strict=True):
        for axis, unit in zip(line, ("step", "seconds"), strict=True):
            for curve in CURVES:
                points = [row for row in rows if (row["curve"], row["space"]) == (curve, space)]
                axis.plot([row[unit] for row in points], [row["fd"] for row in points], marker="o", label=curve)
            axis.axhline(floors[space], color="gray", linestyle=":", label="real held-out images")
            axis.set(yscale="log", xlabel={"step": "steps", "seconds": "seconds of training"}[unit])
            axis.grid(alpha=0.3, which="both")
        line[0].set_ylabel(f"Fréchet distance, {space}")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(rows: list[dict], floors: dict[str, float]) -> None:
    for space in SPACES:
        curves = {curve: [row for row in rows if (row["curve"], row["space"]) == (curve, space)] for curve in CURVES}
        baseline = curves["no memory"][-1]
        target, last_step = baseline["fd"], baseline["step"]
        print(f"\nFD in the space {space}; the real held-out images: {floors[space]:.4g}")
        print("  steps" + "".join(f"{row['step']:>11}" for row in curves["no memory"]))
        for curve, points in curves.items():
            print(f"  {curve:18}" + "".join(f"{row['fd']:>11.4g}" for row in points))
        for curve in CURVES[1:]:
            points = curves[curve]
            steps = steps_until([row["step"] for row in points], [row["fd"] for row in points], target)
            if steps is None:
                reached = "not reached"
            elif steps == points[0]["step"]:
                reached = f"at the first evaluation, after {steps:.0f} steps or fewer: at least {last_step / steps:.2f}x fewer"
            else:
                reached = f"after {steps:.0f} steps instead of {last_step}: {last_step / steps:.2f}x fewer"
            print(f"  FD {target:.4g}, the last one without memory, is reached from {curve}: {reached}")


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    sources = {
        split: ImageSource(str(Path(args.data_dir, split)), cache_dir=args.cache_dir)
        for split in ("train", "held_out")
    }
    print(
        f"{len(sources['train'])} training images, {len(sources['held_out'])} held out, {args.num_images} generated\n"
        f"{platform.platform()}, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )

    # 1. Snippets, as the quickstart makes them
    start = time.perf_counter()
    backbone, processor = load_image_encoder(args.image_encoder, cache_dir=args.cache_dir)
    encoder = GMemImageEncoder.from_backbone(backbone, args.snippet_layers)
    snippets = compute_snippets(sources["train"], encoder, processor, device=device)
    encoder.fit_projection(snippets, args.snippet_dim)
    bank = GMemMemoryBank(encoder.project(snippets.to(device)).cpu())
    bank_seconds = time.perf_counter() - start
    held_out_bank = GMemMemoryBank(compute_snippets(sources["held_out"], encoder, processor, device=device))
    generator = torch.Generator().manual_seed(args.seed)
    memories = {
        "no memory": torch.zeros(args.num_images, args.snippet_dim),
        "training memories": bank.sample(args.num_images, generator)[0],
        "held-out memories": held_out_bank.sample(args.num_images, generator)[0],
    }

    # 2. The two spaces
    real = {
        split: [center_crop(source[k], args.resolution) for k in range(len(source))]
        for split, source in sources.items()
    }
    features = {"encoder": EncoderFeatures(backbone, processor, args.feature_size), "pixels": pixel_features}
    spaces = {name: FeatureSpace(features[name], real["train"], args.feature_dim) for name in SPACES}
    floors = {name: space.distance(real["held_out"]) for name, space in spaces.items()}

    # 3. The same network twice
    shape = (3, args.resolution, args.resolution)
    config = json.loads(Path(args.model_config).read_text()) | {
        "in_channels": 3,
        "sample_size": args.resolution,
        "memory_dim": args.snippet_dim,
        "alignment_layer": None,
    }
    runs = {}
    for name, memory_drop_prob in (("no memory", 1.0), ("memory", 0.0)):
        torch.manual_seed(args.seed)
        transformer = GMemTransformer2DModel(**config)
        dataset = GMemTrainingDataset(
            sources["train"],
            bank,
            args.resolution,
            shape,
            args.seed,
            memory_dropout=transformer.config.memory_dropout,
            memory_drop_prob=memory_drop_prob,
            cache_images=True,
        )
        runs[name] = Run(args, transformer, dataset, device)
    runs["memory"].seconds = bank_seconds

    # 4. Training and evaluation in turn
    rows, last_images = [], {}
    progress_bar = tqdm(total=2 * args.evaluation_steps[-1], desc="Training")
    with (output_dir / "convergence.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "seconds", "curve", "space", "fd"])
        writer.writeheader()
        for step in args.evaluation_steps:
            for run in runs.values():
                run.train_until(step, progress_bar)
            for curve, memory in memories.items():
                run = runs["no memory" if curve == "no memory" else "memory"]
                last_images[curve] = run.generate(memory, curve)
                for name, space in spaces.items():
                    row = {"step": step, "seconds": round(run.seconds, 2), "curve": curve, "space": name}
                    rows.append(row | {"fd": space.distance(last_images[curve])})
                    writer.writerow(rows[-1])
            file.flush()
            distances = {f"{row['curve']}/{row['space']}": f"{row['fd']:.3g}" for row in rows[-6:]}
            progress_bar.write(f"step {step}: {distances}")
    progress_bar.close()

    # 5. Results
    draw(rows, floors, output_dir / "convergence.png")
    columns = min(16, args.num_images)
    sheet = PIL.Image.new("RGB", (columns * args.resolution, len(CURVES) * args.resolution))
    for k, curve in enumerate(CURVES):
        for column, image in enumerate(last_images[curve][:columns]):
            sheet.paste(image, (column * args.resolution, k * args.resolution))
    sheet.resize((3 * sheet.width, 3 * sheet.height), PIL.Image.Resampling.NEAREST).save(output_dir / "samples.png")
    report(rows, floors)
    print("\nseconds of training: " + ", ".join(f"{name} {run.seconds:.0f}" for name, run in runs.items()))
    print(f"{output_dir / 'convergence.png'}, {output_dir / 'convergence.csv'}, {output_dir / 'samples.png'}")


if __name__ == "__main__":
    main()
