# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0
r"""
What a memory bank costs, beside the public implementation's way: a tensor that is loaded whole, and a full SVD.

    python benchmarks/bank.py                   # opening, gathering and search; 8 GB of disk, 6 GB of RAM, Linux
    python benchmarks/bank.py --rows 50000      # a small bank
    python benchmarks/bank.py compress          # a bank of low rank, from 200,000 rows
    python benchmarks/bank.py int8              # opening, gathering and search in int8 rows; 8 GB of disk, 12 GB of RAM

Each measurement is made in a process of its own, `--repeats` times, and the median printed. "processor seconds", of all
threads together, stay the same where other processes keep the machine busy. Memory is that of the process
beyond what it had before it touched the bank: "anonymous" is RAM that it has for itself; "file" is pages of the files,
which the system can drop at any time; the peak counts both. The files have just been written, so they lie in the page
cache: that favours loading the whole.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffusers_gmem import GMemMemoryBank


DEFAULT_ROWS = {"search": 1_281_167, "compress": 200_000, "int8": 10_000_000}
# The method, its title, and the title of what it is compared with: the public implementation's way
METHODS = {
    "search": {"bank": "GMemMemoryBank", "tensor": "torch.load, matmul"},
    "compress": {"compress": "GMemMemoryBank.compress", "svd": "torch.linalg.svd"},
    "int8": {"bank": "GMemMemoryBank"},
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=list(METHODS), default="search", help="What to measure (search).")
    parser.add_argument("--rows", type=int, help=f"Rows of the bank (default {DEFAULT_ROWS}).")
    parser.add_argument("--dim", type=int, default=768, help="Dimension of a snippet (default 768).")
    parser.add_argument("--rows_to_gather", type=int, default=256, help="Random rows that are gathered (default 256).")
    parser.add_argument("--queries", type=int, default=16, help="Queries of the batched search (default 16).")
    parser.add_argument("--rank", type=int, default=64, help="Rank of the compressed bank (default 64).")
    parser.add_argument("--repeats", type=int, default=3, help="Processes per method (default 3).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of all that is random (default 0).")
    parser.add_argument("--measure", nargs=3, metavar=("METHOD", "PATH", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rows = args.rows or DEFAULT_ROWS[args.part]
    return args


class Meter:
    """Times steps, and measures how the resident memory of the process has grown since the meter was made."""

    def __init__(self):
        self.start = self._resident()
        self.results = []

    def _resident(self) -> dict[str, float]:
        """Megabytes."""
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        names = {"anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
        return {kind: int(lines[name].split()[0]) * 1024 / 1e6 for kind, name in names.items()}

    def step(self, name: str, function):
        start, processor_start = time.perf_counter(), time.process_time()
        result = function()
        self.results.append((f"{name}, seconds", time.perf_counter() - start))
        self.results.append(("  processor seconds", time.process_time() - processor_start))
        for kind, megabytes in self._resident().items():
            self.results.append((f"  {kind} memory, MB", megabytes - self.start[kind]))
        return result


def measure_search(args, method: str, path: str, output: str, meter: Meter) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    queries = torch.randn(args.queries, args.dim, generator=generator)
    indices = torch.randint(args.rows, (args.rows_to_gather,), generator=generator)
    if method == "bank":
        bank = meter.step("opening", lambda: GMemMemoryBank.from_pretrained(path))
        rows = meter.step("gathering", lambda: bank[indices])
        meter.step("search, one query", lambda: bank.nearest(queries[0], 10))
        found = meter.step("search, all queries", lambda: bank.nearest(queries, 10))[1]
    else:
        bank = meter.step("opening", lambda: torch.load(path, weights_only=True))
        rows = meter.step("gathering", lambda: bank[indices])

        def nearest(queries):
            return (queries @ bank.T / bank.norm(dim=1)).topk(10)

        meter.step("search, one query", lambda: nearest(queries[:1]))
        found = meter.step("search, all queries", lambda: nearest(queries))[1]
    save_file({"rows": rows, "found": found}, output)


def measure_compress(args, method: str, path: str, output: str, meter: Meter) -> None:
    if method == "compress":
        bank = meter.step("opening", lambda: GMemMemoryBank.from_pretrained(path))
        small = meter.step("compressing", lambda: bank.compress(rank=args.rank))
        basis = small.basis
    else:
        bank = meter.step("opening", lambda: torch.load(path, weights_only=True))

        def compress():
            centred = bank - bank.mean(dim=0)
            left, singular_values, right = torch.linalg.svd(centred, full_matrices=False)
            scale = singular_values[: args.rank].sqrt()
            return left[:, : args.rank] * scale, right.T[:, : args.rank] * scale

        _, basis = meter.step("compressing", compress)
    save_file({"basis": basis.contiguous()}, output)


def write_bank(args, folder: Path) -> dict[str, Path]:
    """Writes the same rows for each method."""
    generator = torch.Generator().manual_seed(args.seed)
    if args.part == "int8":
        bank = None
        for rows in torch.arange(args.rows).chunk(10):
            snippets = torch.empty(len(rows), args.dim, dtype=torch.float16)
            for piece in snippets.split(10_000):
                piece.copy_(torch.randn(piece.shape, generator=generator))
            part = GMemMemoryBank(snippets).compress(dtype="int8")
            bank = part if bank is None else bank.merge(part)
    else:
        snippets = torch.empty(args.rows, args.dim)
        rotation = torch.linalg.qr(torch.randn(args.dim, args.dim, generator=generator)).Q
        spectrum = torch.arange(1, args.dim + 1) ** -0.5
        for piece in snippets.split(10_000):
            torch.randn(piece.shape, generator=generator, out=piece)
            if args.part == "compress":
                piece.copy_(piece * spectrum @ rotation)
        torch.save(snippets, folder / "bank.pt")
        bank = GMemMemoryBank(snippets)
        del snippets
    bank.save_pretrained(folder / "bank")
    return {method: folder / ("bank.pt" if method in ("tensor", "svd") else "bank") for method in METHODS[args.part]}


def check(part: str, outputs: dict[str, dict[str, torch.Tensor]]) -> None:
    """The methods have to agree."""
    ours, theirs = outputs.values()
    if part == "search":
        if not torch.equal(ours["rows"], theirs["rows"]) or not torch.equal(ours["found"], theirs["found"]):
            raise RuntimeError("the two methods found different rows.")
    else:
        ours, theirs = (torch.linalg.qr(output["basis"].double()).Q for output in (ours, theirs))
        distance = torch.linalg.matrix_norm(ours - theirs @ (theirs.T @ ours), 2)
        print(f"\nlargest angle between the two subspaces: {distance.asin():.1e}")


def main() -> None:
    args = parse_args()
    if args.measure is not None:
        meter = Meter()
        (measure_compress if args.part == "compress" else measure_search)(args, *args.measure, meter)
        print(json.dumps(meter.results))
        return

    methods = METHODS[args.part]
    with tempfile.TemporaryDirectory() as folder:
        print(f"writing {args.rows} x {args.dim} rows ...", flush=True)
        paths = write_bank(args, Path(folder))
        os.sync()  # writing back would disturb the measurements
        results, outputs = {method: [] for method in methods}, {}
        for _ in range(args.repeats):
            for method in methods:  # in turn, so that a busy moment of the machine meets both
                output = Path(folder, "output.safetensors")
                command = [sys.executable, __file__, *sys.argv[1:], "--measure", method, paths[method], output]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                results[method].append(json.loads(printed.splitlines()[-1]))
                outputs[method] = load_file(output)

    print(f"{args.rows} x {args.dim}, {args.rows_to_gather} rows gathered, {args.queries} queries, rank {args.rank};")
    print(f"median of {args.repeats} processes; {platform.platform()}, {torch.get_num_threads()} threads,", end=" ")
    print(f"torch {torch.__version__}\n")
    titles = [f"{title:>26}" for title in methods.values()]
    print(f"{'':30}{''.join(titles)}{'ratio':>10}")
    for k, (title, _) in enumerate(results[next(iter(methods))][0]):
        values = [statistics.median(run[k][1] for run in results[method]) for method in methods]
        digits = 4 if "seconds" in title else 1
        ratio = f"{values[-1] / values[0]:.1f}" if len(values) == 2 and min(values) > 0 else "-"
        print(f"{title:30}{''.join(f'{value:26.{digits}f}' for value in values)}{ratio:>10}")
    if len(outputs) == 2:
        check(args.part, outputs)


if __name__ == "__main__":
    main()
