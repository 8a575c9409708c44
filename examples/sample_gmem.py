# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

r"""
Generates many images from snippets of a memory bank, for evaluation, and records how.

    accelerate launch examples/sample_gmem.py --model org/gmem-in256 --num_images 50000 --batch_size 64 \
        --dtype bfloat16 --npz --output_dir samples

On a CPU, from the pipeline of `make quickstart`:

    accelerate launch examples/sample_gmem.py --model quickstart/pipeline --num_images 100 --num_inference_steps 20 \
        --output_dir quickstart/samples

Into `output_dir` go

- `00000/000000.png`, ...: image k, `--folder_size` of them in a folder;
- `images.npz` with `--npz`: all of them as `arr_0`, uint8 of shape (n, height, width, 3), as ADM's evaluator reads it;
- `memory_indices.npy`: for each image, the row of the bank that it was made from;
- `protocol.json`: everything that decides what the images are, and `runs`, where they were made.

Image k depends on the seed and k alone: its snippet and its noise are the same bit for bit whatever the number of
processes, the batch size and the order. With the same `--batch_size` (and kind of device), so is the file. Another batch size
rounds differently within the networks: in float32 that can move a value of a picture by one of its 256 levels.

A run may be killed and started again, with any number of processes: what is there stays, and only what is missing is made.
"""

import argparse
import datetime
import hashlib
import io
import json
import logging
import platform
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

import diffusers_gmem
from diffusers_gmem import GMemMemoryBank, GMemPipeline
from diffusers_gmem.data.arguments import DTYPES, name_or_absolute_path
from diffusers_gmem.data.keyed_permutation import KeyedPermutation
from diffusers_gmem.data.shards import open_folder
from diffusers_gmem.files import atomic_path, write_json
from diffusers_gmem.models.fingerprint import fingerprint


logger = get_logger(__name__)

PROTOCOL_NAME = "protocol.json"
SCHEDULERS = (
    "GMemFlowMatchScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Generate images for evaluation.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=str, required=True, help="A GMemPipeline, by name on the Hub or folder.")
    model.add_argument("--revision", type=str, help="Its revision.")
    model.add_argument("--dtype", choices=list(DTYPES), default="float32", help="In which the transformer computes.")
    model.add_argument("--vae_dtype", choices=list(DTYPES), default="float32", help="In which the VAE computes.")
    model.add_argument("--allow_tf32", action="store_true", help="TF32 products on an NVIDIA GPU.")
    model.add_argument("--cache_dir", type=str, help="Where downloads are kept.")

    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--memory_bank",
        type=str,
        help="Another bank than the pipeline's, by name on the Hub or folder: for example of images held out of training.",
    )
    memory.add_argument("--memory_bank_revision", type=str, help="Its revision.")
    memory.add_argument(
        "--draws",
        choices=["uniform", "class_balanced"],
        default="uniform",
        help="Which row an image is made from. uniform: any, each as likely. class_balanced: images take the bank's labels "
        "in turn, and any row with that label.",
    )
    memory.add_argument(
        "--replacement",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Whether several images may have the same row.",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--num_images", type=int, default=50_000, help="How many images.")
    sampling.add_argument("--seed", type=int, default=0, help="Seed of all draws.")
    sampling.add_argument("--num_inference_steps", type=int, default=50, help="Sampling steps, the last one included.")
    sampling.add_argument("--guidance_scale", type=float, default=1.0, help="1 is no guidance.")
    sampling.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("START", "END"),
        default=[0.0, 1.0],
        help="Times between which guidance acts: 0 is noise, 1 is data.",
    )
    sampling.add_argument("--scheduler", choices=SCHEDULERS, help="Default: that of the pipeline.")
    sampling.add_argument(
        "--scheduler_options",
        type=json.loads,
        default={},
        metavar="JSON",
        help='Arguments of the scheduler instead of the pipeline\'s, such as \'{"stochastic": false, "shift": 0.3}\'.',
    )

    work = parser.add_argument_group("work")
    work.add_argument("--output_dir", type=str, required=True, help="Where everything is written.")
    work.add_argument("--batch_size", type=int, default=32, help="Images per device at a time.")
    work.add_argument("--folder_size", type=int, default=1000, help="Images in a sub-folder.")
    work.add_argument("--npz", action="store_true", help="Also write images.npz.")
    work.add_argument(
        "--num_threads",
        type=int,
        default=1,
        help="Threads that compute in each process, on a CPU: another number gives other last digits, so it does not "
        "follow the machine.",
    )

    args = parser.parse_args(input_args)
    for name in ("num_images", "num_inference_steps", "batch_size", "folder_size", "num_threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if not isinstance(args.scheduler_options, dict):
        parser.error(f"--scheduler_options must be a JSON object, got {json.dumps(args.scheduler_options)}.")
    if args.memory_bank_revision is not None and args.memory_bank is None:
        parser.error("--memory_bank_revision needs --memory_bank.")
    return args


def load_pipeline(args: argparse.Namespace) -> GMemPipeline:
    """The pipeline with the memory bank and the scheduler that the arguments ask for."""
    components = {}
    if args.memory_bank is not None:
        components["memory_bank"] = GMemMemoryBank.from_pretrained(
            args.memory_bank, revision=args.memory_bank_revision, cache_dir=args.cache_dir
        )
    pipe = GMemPipeline.from_pretrained(
        args.model,
        revision=args.revision,
        cache_dir=args.cache_dir,
        dtype={"transformer": DTYPES[args.dtype], "vae": DTYPES[args.vae_dtype], "default": torch.float32},
        **components,
    )
    if pipe.load_memory_bank() is None:
        raise ValueError(f"{args.model} has no memory bank: name one by --memory_bank.")

    scheduler_class = type(pipe.scheduler)
    options = args.scheduler_options
    if args.scheduler is not None:
        scheduler_class = getattr(diffusers, args.scheduler, None) or getattr(diffusers_gmem, args.scheduler)
        if "use_flow_sigmas" in scheduler_class._get_init_keys(scheduler_class):
            options = {"use_flow_sigmas": True} | options
    accepted = scheduler_class._get_init_keys(scheduler_class)
    unknown = sorted(options.keys() - accepted)
    if unknown:
        raise ValueError(
            f"--scheduler_options holds {unknown}; {scheduler_class.__name__} accepts {sorted(accepted - {'self'})}."
        )
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **options)
    if pipe.scheduler.config.get("solver") == "dopri5" and args.batch_size > 1:
        raise ValueError(
            f"The steps of the solver 'dopri5' depend on all images of a batch: --batch_size must be 1, got {args.batch_size}."
        )
    return pipe


def describe_protocol(args: argparse.Namespace, pipe: GMemPipeline) -> dict[str, Any]:
    """Everything that decides what the images are."""
    bank = pipe.memory_bank
    source = pipe.config.memory_bank_source or {}
    own_bank = {"name_or_path": source.get("repo_id"), "revision": source.get("revision")}
    other_bank = {
        "name_or_path": args.memory_bank and name_or_absolute_path(args.memory_bank),
        "revision": args.memory_bank_revision,
    }
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    accepted = pipe.scheduler._get_init_keys(type(pipe.scheduler))
    return {
        "num_images": args.num_images,
        "seed": args.seed,
        "model": {
            "name_or_path": name_or_absolute_path(args.model),
            "revision": pipe._own_repo().revision,
            "transformer": fingerprint(pipe.transformer),
            "vae": None if pipe.vae is None else fingerprint(pipe.vae),
        },
        "memory_bank": {
            "of_the_pipeline": args.memory_bank is None,
            **(own_bank if args.memory_bank is None else other_bank),
            "fingerprint": bank.fingerprint,
            "num_snippets": len(bank),
        },
        "draws": args.draws,
        "replacement": args.replacement,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "guidance_interval": args.guidance_interval,
        "scheduler": {
            "_class_name": type(pipe.scheduler).__name__,
            **{name: value for name, value in config.items() if name in accepted},
        },
        "dtype": args.dtype,
        "vae_dtype": args.vae_dtype if pipe.vae is not None else None,
        "allow_tf32": args.allow_tf32,
        "num_threads": args.num_threads,
        "folder_size": args.folder_size,
    }


def describe_run(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """What else may move the last digits."""
    on_gpu = accelerator.device.type == "cuda"
    packages = {name: version(name) for name in ("diffusers", "torch", "numpy", "pillow")}
    return {
        "batch_size": args.batch_size,
        "num_processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if on_gpu else f"{accelerator.device.type} ({platform.machine()})",
        "versions": {
            "diffusers_gmem": diffusers_gmem.__version__,
            **packages,
            "python": platform.python_version(),
        },
    }


def image_generator(seed: int, k: int) -> torch.Generator:
    """The generator of everything that is drawn for image k."""
    digest = hashlib.blake2b(f"{seed}/image/{k}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class MemoryDraws:
    """
    Says from which row of a bank image k is made, as a function of the seed and k alone.

    With replacement, the image's generator draws the row, as the pipeline would: `pipe(generator=[image_generator(seed,
    k)])` is image k of uniform draws, and with `class_labels` the same of balanced ones. Without, the rows come in a random
    order (of each class), which is computed row by row.
    """

    def __init__(self, bank: GMemMemoryBank, num_images: int, seed: int, draws: str, replacement: bool):
        if draws == "uniform":
            self.groups = [range(len(bank))]
        else:
            if bank.labels is None:
                raise ValueError(f"--draws class_balanced needs labels, which {bank} does not have.")
            order, counts = bank.labels.argsort(stable=True), bank.labels.unique(return_counts=True)[1]
            self.groups = order.split(counts.tolist())
        self.orders = None
        if not replacement:
            needed = -(-num_images // len(self.groups))
            smallest = min(map(len, self.groups))
            if needed > smallest:
                of_class = " of each class" if draws == "class_balanced" else ""
                raise ValueError(
                    f"--num_images {num_images} without replacement takes {needed} rows{of_class}, but there are only "
                    f"{smallest} in {bank}."
                )
            self.orders = [KeyedPermutation(len(rows), f"{seed}/memories/{n}") for n, rows in enumerate(self.groups)]

    def row(self, k: int, generator: torch.Generator) -> int:
        number, group = divmod(k, len(self.groups))
        rows = self.groups[group]
        if self.orders is None:
            chosen = int(torch.randint(len(rows), (1,), generator=generator))
        else:
            chosen = self.orders[group][number]
        return int(rows[chosen])


def write_image(path: Path, image: PIL.Image.Image) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def write_npz(path: Path, image_paths: list[Path]) -> None:
    """The images as `np.savez` would write them, but one at a time."""
    height, width = np.array(PIL.Image.open(image_paths[0])).shape[:2]
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (len(image_paths), height, width, 3)}
    )
    # The name alone: without a date, the same images make the same file
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member,
    ):
        member.write(header.getvalue())
        for image_path in tqdm(image_paths, desc=path.name, unit="images"):
            with PIL.Image.open(image_path) as image:
                member.write(np.array(image.convert("RGB")).tobytes())


def main(args: argparse.Namespace) -> None:
    # A process that is done waits for the others, however long they take
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(args.num_threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    folder = Path(args.output_dir)

    # 1. Pipeline and protocol
    with accelerator.main_process_first():
        pipe = load_pipeline(args)
        draws = MemoryDraws(pipe.memory_bank, args.num_images, args.seed, args.draws, args.replacement)
        protocol = open_folder(folder, describe_protocol(args, pipe), PROTOCOL_NAME)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(accelerator.device)

    # 2. What is missing. Batches are the same whatever is there. One process looks: what the others see of a shared disk may
    # be old.
    paths = [folder / f"{k // args.folder_size:05d}" / f"{k:06d}.png" for k in range(args.num_images)]
    batches = [None]
    if accelerator.is_main_process:
        starts = range(0, args.num_images, args.batch_size)
        batches = [[k for k in starts if not all(path.exists() for path in paths[k : k + args.batch_size])]]
        run = describe_run(args, accelerator)
        runs = protocol.get("runs", [])
        protocol |= {"runs": runs if run in runs or not batches[0] else [*runs, run], "complete": not batches[0]}
        write_json(folder / PROTOCOL_NAME, protocol)
        for path in dict.fromkeys(path.parent for path in paths):
            path.mkdir(exist_ok=True)
    batches = broadcast_object_list(batches)[0]

    # 3. Images
    progress_bar = tqdm(
        total=args.num_images,
        initial=max(0, args.num_images - len(batches) * args.batch_size),
        desc="Sampling",
        unit="images",
        smoothing=0.05,
        disable=not accelerator.is_main_process,
    )
    with ThreadPoolExecutor() as writers:
        for start in batches[accelerator.process_index :: accelerator.num_processes]:
            numbers = range(start, min(start + args.batch_size, args.num_images))
            generators = [image_generator(args.seed, k) for k in numbers]
            images = pipe(
                memory_indices=[draws.row(k, generator) for k, generator in zip(numbers, generators, strict=True)],
                generator=generators,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                guidance_interval=tuple(args.guidance_interval),
            ).images
            # What another batch size left is as good
            missing = [(paths[k], image) for k, image in zip(numbers, images, strict=True) if not paths[k].exists()]
            list(writers.map(lambda item: write_image(*item), missing))
            # The main process counts for the others: batches are dealt out evenly
            progress_bar.update(min(len(numbers) * accelerator.num_processes, args.num_images - progress_bar.n))
    progress_bar.close()
    accelerator.wait_for_everyone()

    # 4. The whole
    if accelerator.is_main_process:
        lost = [str(path) for path in paths if not path.exists()]
        if lost:
            raise RuntimeError(f"{len(lost)} images are missing, the first is {lost[0]}.")
        rows = np.array([draws.row(k, image_generator(args.seed, k)) for k in range(args.num_images)])
        with atomic_path(folder / "memory_indices.npy") as temporary, temporary.open("wb") as file:
            np.save(file, rows)
        if args.npz and (batches or not (folder / "images.npz").exists()):
            write_npz(folder / "images.npz", paths)
        write_json(folder / PROTOCOL_NAME, protocol | {"complete": True})
        logger.info(f"{folder}: {args.num_images} images from {len(np.unique(rows))} rows of {pipe.memory_bank}.")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
