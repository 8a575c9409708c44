# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0
r"""
What opening a memory bank costs, beside loading the whole tensor as the public implementation does.

    python benchmarks/bank.py                       # 1 GB of float32 rows; needs 2 GB of disk and of RAM, Linux
    python benchmarks/bank.py --gigabytes 0.05      # a small one
    python benchmarks/bank.py --gigabytes 4 --dim 1024 --rows_to_gather 1024

Each measurement is made in a process of its own, `--repeats` times, and the median printed: the seconds to open the bank
and to gather random rows, and by how much the resident memory of the process has grown since before the opening.
"anonymous" is RAM that the process has for itself; "file" is pages of the file, which the system can drop at any time.
The files have just been written, so they lie in the page cache: that favours loading the whole.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from diffusers_gmem import GMemMemoryBank


METHODS = {"bank": "GMemMemoryBank.from_pretrained", "tensor": "torch.load"}
ROWS = [
    ("open_seconds", "opening, seconds", 1),
    ("open_anonymous", "  anonymous memory, MB", 1e6),
    ("open_file", "  file memory, MB", 1e6),
    ("gather_seconds", "gathering rows, seconds", 1),
    ("gather_anonymous", "  anonymous memory, MB", 1e6),
    ("gather_file", "  file memory, MB", 1e6),
]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="Size of the bank in 10^9 bytes (default 1).")
    parser.add_argument("--dim", type=int, default=768, help="Dimension of a snippet (default 768).")
    parser.add_argument("--rows_to_gather", type=int, default=256, help="Random rows that are gathered (default 256).")
    parser.add_argument("--repeats", type=int, default=5, help="Processes per method (default 5).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the rows and of the draw (default 0).")
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "PATH"), help=argparse.SUPPRESS)
    return parser.parse_args()


def resident_bytes() -> tuple[int, int]:
    """Anonymous and file-backed resident memory of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def measure(args) -> None:
    """In the child process: prints one measurement as JSON."""
    method, path = args.measure
    generator = torch.Generator().manual_seed(args.seed)
    anonymous, file = resident_bytes()

    start = time.perf_counter()
    bank = GMemMemoryBank.from_pretrained(path) if method == "bank" else torch.load(path, weights_only=True)
    result = {"open_seconds": time.perf_counter() - start}
    result["open_anonymous"], result["open_file"] = (
        now - before for now, before in zip(resident_bytes(), (anonymous, file), strict=True)
    )

    indices = torch.randint(len(bank), (args.rows_to_gather,), generator=generator)
    start = time.perf_counter()
    rows = bank[indices]
    result["gather_seconds"] = time.perf_counter() - start
    result["gather_anonymous"], result["gather_file"] = (
        now - before for now, before in zip(resident_bytes(), (anonymous, file), strict=True)
    )
    result["checksum"] = rows.double().sum().item()
    print(json.dumps(result))


def main() -> None:
    args = parse_args()
    if args.measure is not None:
        measure(args)
        return

    count = max(1, int(args.gigabytes * 1e9) // (args.dim * 4))
    with tempfile.TemporaryDirectory() as folder:
        paths = {"bank": Path(folder, "bank"), "tensor": Path(folder, "bank.pt")}
        print(f"writing {count} x {args.dim} float32 rows ...", flush=True)
        snippets = torch.randn(count, args.dim, generator=torch.Generator().manual_seed(args.seed))
        torch.save(snippets, paths["tensor"])
        GMemMemoryBank(snippets).save_pretrained(paths["bank"])
        del snippets

        options = [f"--rows_to_gather={args.rows_to_gather}", f"--seed={args.seed}"]
        runs = {method: [] for method in METHODS}
        for _ in range(args.repeats):
            for method in METHODS:  # in turn, so that a busy moment of the machine meets both
                command = [sys.executable, __file__, *options, "--measure", method, str(paths[method])]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs[method].append(json.loads(output.splitlines()[-1]))
    if len({run["checksum"] for method in METHODS for run in runs[method]}) != 1:
        raise RuntimeError("the two methods gathered different rows.")

    print(f"{count} x {args.dim} float32, {args.rows_to_gather} rows gathered, median of {args.repeats} processes")
    print(f"{platform.platform()}, {platform.machine()}, torch {torch.__version__}\n")
    print(f"{'':26}{METHODS['bank']:>32}{METHODS['tensor']:>14}{'ratio':>10}")
    for key, title, unit in ROWS:
        bank, tensor = (statistics.median(run[key] for run in runs[method]) / unit for method in METHODS)
        digits = 5 if unit == 1 else 1
        ratio = f"{tensor / bank:.1f}" if bank > 0 and tensor > 0 else "-"
        print(f"{title:26}{bank:32.{digits}f}{tensor:14.{digits}f}{ratio:>10}")


if __name__ == "__main__":
    main()
