# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0
r"""
How fast cached latents are read, beside opening the file of every sample as the public implementation does.

    python benchmarks/data.py                          # 4096 images of 32 x 16 x 16 latents; needs 0.3 GB of disk, Linux
    python benchmarks/data.py --num_images 65536       # 4.6 GB
    python benchmarks/data.py --folder my_latents      # a cache that `examples/cache_latents.py` made

Both read the same tensors (mean and log-variance of the latents, snippets) of the same cache, batch by batch, a random view
of each image, in one process with one thread, as a data loader's worker does:

- one by one: samples in random order, `safe_open` and a slice of each tensor for every sample, stacked to a batch;
- LatentCache: batches of `BlockOrder`, read from the mapped files.

They take turns, `--repeats` times, and the median is printed: samples per second, and by how much the process's own memory
("anonymous": RAM that cannot be dropped, as pages of files can) has grown over its runs. The files have just been written, so
they lie in the page cache. The last line is the whole training sample, with the noise, time and masks that are drawn for it.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_gmem.data import LatentCache
from diffusers_gmem.training.dataset import GMemLatentTrainingDataset
from diffusers_gmem.training.sampling_order import BlockOrder


NAMES = ("latents_mean", "latents_logvar", "snippets")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=str, help="Cache to read. Default: a temporary one of random numbers.")
    parser.add_argument("--num_images", type=int, default=4096, help="Images of the temporary one (default 4096).")
    parser.add_argument("--shard_size", type=int, default=1024, help="Images in one of its files (default 1024).")
    parser.add_argument("--batch_size", type=int, default=64, help="Samples in a batch (default 64).")
    parser.add_argument("--block_size", type=int, default=16, help="Neighbours that are read together (default 16).")
    parser.add_argument("--num_samples", type=int, default=2048, help="Samples that are read per run (default 2048).")
    parser.add_argument("--repeats", type=int, default=5, help="Runs of each (default 5).")
    parser.add_argument("--seed", type=int, default=0, help="Seed (default 0).")
    return parser.parse_args()


def write_cache(folder: Path, args) -> None:
    """A cache of random numbers, of the shapes of VA-VAE (f16d32) and DINOv2-B at 256 pixels."""
    generator = torch.Generator().manual_seed(args.seed)
    shards = []
    for start in range(0, args.num_images, args.shard_size):
        rows = min(args.shard_size, args.num_images - start)
        path = folder / f"latents-{len(shards) + 1:05d}.safetensors"
        latents = [torch.randn(rows, 2, 32, 16, 16, generator=generator, dtype=torch.float16) for _ in range(2)]
        snippets = torch.randn(rows, 2, 768, generator=generator)
        save_file(dict(zip(NAMES, (*latents, snippets), strict=True)), path)
        shards.append([path.name, rows, path.stat().st_size, ""])
    config = {"_class_name": "LatentCache", "format_version": 1, "shards": shards}
    (folder / "config.json").write_text(json.dumps(config))


def read_one_by_one(cache: LatentCache, indices: list[int], flipped: torch.Tensor) -> list[torch.Tensor]:
    samples = []
    for index, view in zip(indices, flipped.long().tolist(), strict=True):
        shard = int(torch.bucketize(index, cache.starts[1:], right=True))
        row = index - int(cache.starts[shard])
        with safe_open(cache.folder / cache.config["shards"][shard][0], framework="pt") as file:
            samples.append([file.get_slice(name)[row : row + 1, view] for name in NAMES])
    return [torch.cat(tensors) for tensors in zip(*samples, strict=True)]


def read_batch(cache: LatentCache, indices: list[int], flipped: torch.Tensor) -> list[torch.Tensor]:
    return [cache.read(name, torch.tensor(indices), flipped) for name in NAMES]


def random_batches(cache: LatentCache, args, epoch: int) -> Iterator[list[int]]:
    order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
    for start in range(0, args.num_samples, args.batch_size):
        yield order[start : start + args.batch_size]


def block_batches(cache: LatentCache, args, epoch: int) -> Iterator[list[int]]:
    order = BlockOrder(len(cache), args.block_size, args.seed, epoch)
    for start in range(0, args.num_samples, args.batch_size):
        yield [order[k] for k in range(start, min(start + args.batch_size, args.num_samples))]


def anonymous_bytes() -> int:
    """Memory of this process that is not pages of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # as in a worker of a data loader
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if args.folder is None:
            print(f"writing {args.num_images} images ...", flush=True)
            write_cache(folder, args)
        cache = LatentCache.from_pretrained(folder)
        args.num_samples = min(args.num_samples, len(cache))
        dataset = GMemLatentTrainingDataset(cache, args.seed, memory_dropout=0.4, random_flip=True)

        indices = next(block_batches(cache, args, 0))
        flipped = torch.rand(len(indices)) < 0.5
        for one, other in zip(
            read_one_by_one(cache, indices, flipped), read_batch(cache, indices, flipped), strict=True
        ):
            if not torch.equal(one, other):
                raise RuntimeError("the two read different rows.")

        methods = {
            "one safe_open per sample": (random_batches, read_one_by_one),
            "LatentCache": (block_batches, read_batch),
            "LatentCache, with all draws": (
                block_batches,
                lambda cache, indices, flipped: dataset.__getitems__([(0, index) for index in indices]),
            ),
        }
        rates = {name: [] for name in methods}
        growth = dict.fromkeys(methods, 0)
        for repeat in range(args.repeats):
            for name, (batches, read) in methods.items():  # in turn, so that a busy moment of the machine meets all
                before, start = anonymous_bytes(), time.perf_counter()
                for indices in batches(cache, args, repeat):
                    read(cache, indices, torch.rand(len(indices)) < 0.5)
                rates[name].append(args.num_samples / (time.perf_counter() - start))
                growth[name] += anonymous_bytes() - before

    print(f"{len(cache)} images, batches of {args.batch_size}, blocks of {args.block_size}, median of {args.repeats}")
    print(f"{platform.platform()}, {platform.machine()}, torch {torch.__version__}\n")
    print(f"{'':30}{'samples/s':>12}{'ratio':>8}{'anonymous MB':>14}")
    baseline = statistics.median(rates["one safe_open per sample"])
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"{name:30}{rate:12.0f}{rate / baseline:8.1f}{growth[name] / 1e6:14.1f}")


if __name__ == "__main__":
    main()
